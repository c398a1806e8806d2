"""Which leaves to perturb for what they cost: a report on a choice, and the best choice for a budget."""

import dataclasses
import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssam_jax._base import checks, tracing, trees
from ssam_jax.two_pass import loss as losses
from ssam_jax.two_pass import primitives, splitting
from ssam_jax.two_pass.active import Active, check_active
from ssam_jax.two_pass.planning import costs, counting, search
from ssam_jax.two_pass.primitives import Trait
from ssam_jax.typing import Params, PyTree, Scalar, Scores


class Part(NamedTuple):
    """The size of one of the two parts of a forward pass.

    Attributes:
      equations: the number of equations, those in the bodies of loops and of nested functions once each.
      flops: operations of the matrix products and convolutions; a multiply-add is two.
      bytes: what the equations read and write, each on its own, as if nothing were fused.
    """

    equations: int
    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class TwoPassReport:
    """What `two_pass_value_and_grad` does with a loss; its ``str`` is a table.

    Attributes:
      prefix: the part of the forward pass that depends on no active leaf, computed once a step.
      suffix: the part that depends on one, computed in both passes. A loss with side effects is all suffix.
      whole: equations that are not split: all that is in them is suffix, although some of their operands
        depend on no active leaf.
      unknown: equations whose operations are not counted, or not fully (a loop of unknown length counts as
        if it ran once).
      side_effect: why the loss is not split at all; None if it is.
      relative_to_sgd: predicted cost of a step, forward and backward, in SGD steps.
      relative_to_sam: the same in steps of plain SAM, each of which costs two SGD steps.
    """

    prefix: Part
    suffix: Part
    whole: tuple[str, ...]
    unknown: tuple[str, ...]
    side_effect: str | None
    relative_to_sgd: float
    relative_to_sam: float

    def __str__(self) -> str:
        lines = [f"{'forward pass':<16}{'equations':>12}{'Gflop':>12}{'MB':>12}"]
        for name, part in (("prefix, once", self.prefix), ("suffix, twice", self.suffix)):
            lines.append(f"{name:<16}{part.equations:>12}{part.flops / 1e9:>12.4g}{part.bytes / 1e6:>12.4g}")
        lines.append(f"a step costs {self.relative_to_sgd:.2f} of SGD's, {self.relative_to_sam:.2f} of SAM's")
        if self.side_effect is not None:
            lines.append(f"not split, because of a side effect: {self.side_effect}")
        lines += [f"not split: {equation}" for equation in self.whole]
        lines += [f"not counted: {equation}" for equation in self.unknown]
        return "\n".join(lines)


def explain_two_pass(
    loss_fn: Callable[..., Scalar | tuple[Scalar, PyTree]],
    params: Params,
    *args: PyTree,
    active: Active | None = None,
    **kwargs: PyTree,
) -> TwoPassReport:
    """Report what two-pass gradients of a loss cost for a choice of active leaves.

    Nothing is computed: the loss is traced and differentiated, and its matrix products and convolutions are
    counted, as they are in the compiled step. The cost leaves out other operations and the time that memory
    takes.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)`` returns a scalar or a pair of it and aux.
      params: pytree of floating-point arrays, or of their ``jax.ShapeDtypeStruct``.
      *args: as in a call of the loss; arrays may be given as ``jax.ShapeDtypeStruct``.
      active: None for all, or an entry for each leaf, as `two_pass_value_and_grad` takes it.
      **kwargs: likewise; the name ``active`` is not passed on.

    Raises:
      TypeError: a parameter is not a real floating-point array, or the loss is not one.
      ValueError: the loss is not a scalar, or ``active`` does not fit ``params``.

    >>> import jax, jax.numpy as jnp
    >>> def loss_fn(params, x):
    ...     return jnp.sum(jnp.tanh(x @ params["body"]) @ params["head"])
    >>> shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    >>> params = {"body": shape(1000, 1000), "head": shape(1000, 1000)}
    >>> report = explain_two_pass(loss_fn, params, shape(500, 1000), active=(False, True))
    >>> report.relative_to_sgd
    1.2
    """
    traced = _trace(loss_fn, params, args, kwargs)
    chosen = check_active(active, params)
    counted = costs.count(traced)
    effect = tracing.side_effect(traced.jaxpr)
    if effect is None:
        leaves = jax.tree.leaves(params)
        cuts = splitting.pieces(leaves, chosen)
        values = [jax.eval_shape(cut.of, leaves[cut.leaf]) for cut in cuts]
        jaxpr, _ = splitting.unfold(traced, cuts, values)
        halves = splitting.split(jaxpr, [*(cut.active for cut in cuts), *(False for _ in traced.args)])
        prefix, suffix, whole = _part(halves.prefix), _part(halves.suffix), _whole(halves)
    else:
        prefix, suffix, whole = Part(0, 0.0, 0.0), _part(traced.jaxpr), ()
    relative = counted.relative(chosen)
    return TwoPassReport(prefix, suffix, whole, counted.opaque, effect, relative, relative / 2)


def choose_active(
    loss_fn: Callable[..., Scalar | tuple[Scalar, PyTree]],
    params: Params,
    *args: PyTree,
    scores: Scores,
    budget: float = 1.25,
    **kwargs: PyTree,
) -> Active:
    """Return the leaves with the largest total score that a step can perturb within a budget.

    With accumulated Fisher scores this is structured SSAM that knows what each leaf costs: a leaf in an
    early layer needs most of the backward pass, and a leaf behind a chosen one needs little more. Of a leaf
    that is scanned over, or whose rows are taken one by one, the rows from some row on may be chosen.
    Leaves whose score is 0 are not chosen.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)`` returns a scalar or a pair of it and aux.
      params: pytree of floating-point arrays, or of their ``jax.ShapeDtypeStruct``.
      *args: as in a call of the loss; arrays may be given as ``jax.ShapeDtypeStruct``.
      scores: tree of the structure of ``params``, of arrays of any shape, finite and not negative. A
        leaf's score is the sum of its array, in float64 on the host. A row's score is the sum of its row;
        if the array does not have as many rows, they share its sum equally.
      budget: what a step may cost, in SGD steps: 1 perturbs next to nothing, and 2 suffices for all.
      **kwargs: as ``args``; the names ``scores`` and ``budget`` are not passed on.

    Returns:
      The choice, to be the static ``active`` of `two_pass_value_and_grad`. No other choice within the budget
      scores more, unless a UserWarning says how much may be missing: a loss of several hundred leaves and
      rows may have too many choices.

    Raises:
      TypeError: a parameter is not a real floating-point array, the loss is not one, ``scores`` are
        traced, or ``budget`` is not a number.
      ValueError: ``scores`` do not fit ``params``, or hold negative, infinite or NaN values; ``budget``
        is below 1 or not finite.

    >>> import jax, jax.numpy as jnp
    >>> def loss_fn(params, x):
    ...     return jnp.sum(jnp.tanh(x @ params["body"]) @ params["head"])
    >>> params = {"body": jnp.zeros((4, 4)), "head": jnp.zeros((4, 4))}
    >>> choose_active(loss_fn, params, jnp.zeros((8, 4)), scores={"body": 2.0, "head": 1.0})
    (False, True)
    """
    arrays = _check_choice(params, scores, budget)
    counted = costs.count(_trace(loss_fn, params, args, kwargs))
    if not counted.sgd:
        return tuple(bool(budget >= 2 and array.sum() > 0) for array in arrays)
    by_row = list(itertools.chain(*map(_row_scores, arrays, counted.rows)))
    limit = (budget - 1) * counted.sgd
    choice = search.best(counted.needs(), list(counted.units.values()), by_row, limit)
    if choice.short:
        warnings.warn(
            f"choose_active has found leaves with a total score of {choice.score:.6g}; the best choice may"
            f" score up to {choice.short:.2g} more.",
            stacklevel=2,
        )
    return counted.active(choice.items)


def _trace(
    loss_fn: Callable[..., Scalar | tuple[Scalar, PyTree]],
    params: Params,
    args: Sequence[PyTree],
    kwargs: Mapping[str, PyTree],
) -> tracing.Traced:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (params, *args), got {loss_fn!r}.")
    trees.check_floating(params, "params")

    def pair(params: Params, args: PyTree, kwargs: PyTree) -> tuple[Scalar, PyTree]:
        value = loss_fn(params, *args, **kwargs)
        return value if isinstance(value, tuple) and len(value) == 2 else (value, ())

    return losses.trace_loss(pair, params, args, kwargs, has_aux=True).traced


def _part(jaxpr: tracing.Equations) -> Part:
    equations, moved = _size(jaxpr)
    return Part(equations, counting.forward_flops(jaxpr), moved)


def _size(jaxpr: tracing.Equations) -> tuple[int, float]:
    """Return the number of equations and the bytes they read and write."""
    equations, moved = 0, 0.0
    for eqn in jaxpr.eqns:
        inner = [_size(body) for body in tracing.bodies(eqn)]
        if inner and not primitives.has(eqn, Trait.CUSTOM_RULE):
            equations += sum(size[0] for size in inner)
            moved += eqn.params.get("length", 1) * max(size[1] for size in inner)
        else:
            equations += 1
            moved += sum(map(_bytes, (*eqn.invars, *eqn.outvars)))
    return equations, moved


def _bytes(atom: tracing.Atom) -> float:
    dtype = getattr(atom.aval, "dtype", None)
    return math.prod(getattr(atom.aval, "shape", ())) * getattr(dtype, "itemsize", 0)


def _whole(halves: splitting.Halves) -> tuple[str, ...]:
    """Return the equations of the suffix that hold products and read something from the prefix."""
    known = set(halves.suffix.invars[len(halves.suffix.invars) - len(halves.cut) :])
    found = []
    for eqn in halves.suffix.eqns:
        mixed = any(not tracing.is_literal(atom) and atom in known for atom in eqn.invars)
        split = tracing.inlined_body(eqn) is not None or primitives.has(eqn, Trait.CHECKPOINT)
        if mixed and not split and any(map(counting.forward_flops, tracing.bodies(eqn))):
            found.append(tracing.describe(eqn))
    return tuple(dict.fromkeys(found))


def _check_choice(params: Params, scores: Scores, budget: float) -> list[np.ndarray]:
    """Return the scores of each leaf on the host, or raise if the arguments of a choice do not fit."""
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"budget must be a number of SGD steps, got {budget!r}.")
    if not 1 <= float(budget) < math.inf:
        raise ValueError(f"budget must be finite and at least 1, the cost of an SGD step, got {budget}.")
    trees.check_same_structure(scores, params, "scores", "params")
    arrays = []
    for path, leaf in zip(trees.leaf_paths(params), jax.tree.leaves(scores)):
        if isinstance(leaf, jax.core.Tracer):
            raise TypeError(f"scores must be known, but the leaf {path!r} is traced: choose outside of jit.")
        if not checks.is_kind(leaf, jnp.floating, jnp.integer, jnp.bool_):
            found = checks.named(checks.kind(leaf))
            raise TypeError(f"scores must hold real numbers, but the leaf {path!r} is {found}.")
        array = np.asarray(leaf).astype(np.float64)
        if not np.all(np.isfinite(array)) or np.any(array < 0):
            raise ValueError(f"scores must be finite and not negative, but the leaf {path!r} holds others.")
        arrays.append(array)
    return arrays


def _row_scores(array: np.ndarray, rows: int) -> list[float]:
    if rows > 1 and array.ndim and array.shape[0] == rows:
        return array.reshape(rows, -1).sum(1).tolist()
    return [float(array.sum()) / rows] * rows
