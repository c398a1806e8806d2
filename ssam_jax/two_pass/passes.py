"""The fast road: both passes of SAM from one trace of the loss, the forward work they share done once."""

import dataclasses
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssam_jax._base import checks, shardings, tracing, trees
from ssam_jax.two_pass import splitting
from ssam_jax.two_pass.active import Active, FirstRow, check_active, check_entry, entries
from ssam_jax.two_pass.implicit.implicit import masked_evaluate
from ssam_jax.two_pass.implicit.weights import cut_leaves, weight_fact
from ssam_jax.two_pass.loss import TracedLoss, trace_loss
from ssam_jax.typing import Gradients, Mask, Params


@dataclasses.dataclass(frozen=True, eq=False)
class TwoPassGradFn:
    """The gradient elsewhere, as ``tx.update`` expects it: ``grad_fn(params, step)``.

    Only the active leaves of ``params`` are read; the others are those that the clean pass had.

    Attributes:
      value_and_grad: ``value_and_grad(params, step) -> (value, grads)``: what a call returns, and
        the loss, or ``(loss, aux)``, that the descent pass finds on the way.
      ascent: ``ascent(params, step) -> grads``: another gradient like the first, of the active leaves,
        and in the implicit form masked; for every step but the last of several ascent steps.
      partial: whether the ascent gradient that came with it is zero outside the active leaves, so
        that only ``ssam(normalize="masked")`` fits it.
      form: ``"explicit"`` or ``"implicit"``.
    """

    value_and_grad: Callable[[Params, int], tuple[Any, Gradients]]
    ascent: Callable[[Params, int], Gradients]
    partial: bool
    form: Literal["explicit", "implicit"]

    def __call__(self, params: Params, step: int = 0, /) -> Gradients:
        """Return the whole gradient at ``params``."""
        return self.value_and_grad(params, step)[1]


def two_pass_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    form: Literal["explicit", "implicit"] = "explicit",
    strict: bool = True,
) -> Callable[..., tuple[Any, Gradients, TwoPassGradFn]]:
    """Return a function that computes what a step of `ssam` needs, for less than two gradients.

    It takes the place of ``jax.value_and_grad`` in a training step, inside ``jit``::

        value, grads, grad_fn = two_pass_value_and_grad(loss_fn)(params, *args, active=active)
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)

    with ``tx`` starting with ``ssam(rho, mask, normalize="masked")`` and ``active`` a static argument
    of ``jit``, from ``active_leaves(state)``.

    The equations of the traced loss are split by data flow. Those that depend on no active leaf are
    computed once, with their gradient, for both passes; of the others the first pass computes the
    gradient of the active leaves alone. If these do the share p of an SGD step's work, the two passes
    cost 1 + p SGD steps; plain SAM costs 2. A nested ``jit`` is looked into, a ``jax.checkpoint`` block
    is cut in two, and a ``lax.scan`` over stacked parameters is cut by rows; what is computed, and by
    which derivative rules, stays as it is. A ``jax.pure_callback`` that depends on no active leaf is
    called once, not twice. A loss with side effects (``jax.debug.print``, ``io_callback``, refs) takes
    the plain road, two whole passes, with a warning that names the equation.

    Args:
      loss_fn: ``loss_fn(params, *args)`` returns a scalar, or ``(scalar, aux)`` with ``has_aux``. It
        must be the same function of its arguments in both passes: pass a dropout key in ``args``.
      has_aux: whether ``loss_fn`` returns a pair.
      form: ``"explicit"``: the ascent gradient is exact, and `ssam` masks the perturbation;
        ``"implicit"``: the first backward pass uses masked weights where it sends gradients to the
        inputs of matrix products and convolutions (arXiv 2306.17504, section on implicit SSAM), for
        ``ssam(..., form="implicit")``.
      strict: in the implicit form, whether a masked parameter that reaches a product by a way that
        cannot be followed is an error; otherwise it is a warning, and that product is not masked.

    Returns:
      ``f(params, *args, active=None, mask=None) -> (value, grads, grad_fn)``.

      - ``params``: pytree of floating-point arrays. Leaves of ``args`` that are no JAX arrays stay static.
      - ``active``: None for all, or a tuple with an entry for each leaf in flattening order: True,
        False, or for a stacked leaf the first perturbed row (`FirstRow`). `active_leaves` returns it
        for a mask. One that is out of date perturbs fewer leaves than the mask says, never wrongly.
      - ``mask``: for the implicit form: a tree like ``params`` of bools or of bool arrays that
        broadcast against the leaves, as `get_mask` returns it; or a tuple like ``active``. Python's
        bools, and arrays that are not traced, are known while compiling: an all-False one makes the
        compiler drop the product.
      - ``value``: the loss of the clean pass, or ``(loss, aux)``: BatchNorm statistics come from here.
      - ``grads``: the ascent gradient of the active leaves, zeros elsewhere; like ``params``.
      - ``grad_fn``: a `TwoPassGradFn`, whose gradients are whole and exact in both forms.

      It raises

      - TypeError if a parameter is not a real floating-point array, if the loss is not one, or if
        ``active`` is traced;
      - ValueError if the loss is not a scalar, if ``active`` or ``mask`` does not fit ``params``, if
        ``mask`` is missing or given to the explicit form, or, ``strict``, if a mask cannot be followed.

    Raises:
      TypeError: ``loss_fn`` is not callable, or ``has_aux`` or ``strict`` is not a bool.
      ValueError: ``form`` is neither of the two.

    >>> import jax, jax.numpy as jnp
    >>> def loss_fn(params, x):
    ...     return jnp.sum(jnp.tanh(x @ params["body"]) @ params["head"])
    >>> params = {"body": jnp.eye(2), "head": jnp.ones(2)}
    >>> f = two_pass_value_and_grad(loss_fn)
    >>> value, grads, grad_fn = f(params, jnp.ones((3, 2)), active=(False, True))
    >>> jax.tree.map(lambda grad: bool(jnp.any(grad)), grads)
    {'body': False, 'head': True}
    >>> jax.tree.map(lambda grad: bool(jnp.any(grad)), grad_fn(params, 0))
    {'body': True, 'head': True}
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (params, *args), got {loss_fn!r}.")
    for name, option in (("has_aux", has_aux), ("strict", strict)):
        if not isinstance(option, bool):
            raise TypeError(f"{name} must be a bool, got {option!r}.")
    checks.choice("form", form, ("explicit", "implicit"))

    def two_pass(
        params: Params, *args: Any, active: Active | None = None, mask: Mask | Active | None = None
    ) -> tuple[Any, Gradients, TwoPassGradFn]:
        trees.check_floating(params, "params")
        chosen = check_active(active, params)
        masks = _check_mask(mask, params, form)
        loss = trace_loss(loss_fn, params, *args, has_aux=has_aux)
        effect = tracing.side_effect(loss.traced.jaxpr)
        if effect is None:
            passes = _shared_passes(loss, params, chosen, masks, strict)
        else:
            warnings.warn(
                f"the loss has a side effect, {effect}, so that two_pass_value_and_grad computes both"
                " passes whole and saves nothing. Take it out of the loss.",
                stacklevel=2,
            )
            exact = jax.value_and_grad(lambda p: loss_fn(p, *args), has_aux=has_aux)
            passes = _whole_passes(loss, exact, params, chosen, masks, strict)
        value, grads = passes.ascent(params)
        grad_fn = TwoPassGradFn(
            value_and_grad=lambda params, step: passes.descent(params),
            ascent=lambda params, step: passes.ascent(params)[1],
            partial=any(entry is not True for entry in chosen),
            form=form,
        )
        return value, grads, grad_fn

    return two_pass


class Passes(NamedTuple):
    """The two passes, each from parameters to value, or value and aux, and a gradient.

    Attributes:
      ascent: the gradient of the active leaves, zeros elsewhere.
      descent: the whole gradient.
    """

    ascent: Callable[[Params], tuple[Any, Gradients]]
    descent: Callable[[Params], tuple[Any, Gradients]]


def _shared_passes(
    loss: TracedLoss, params: Params, active: Active, masks: list[Any] | None, strict: bool
) -> Passes:
    """Return the two passes, which share what does not depend on an active leaf of ``params``."""
    leaves, tree = jax.tree.flatten(params)
    by_row = [tuple(isinstance(mask, FirstRow) and mask for mask in masks)] if masks else []
    cuts = splitting.pieces(leaves, active, *by_row)
    values = [cut.of(leaves[cut.leaf]) for cut in cuts]
    jaxpr, consts = splitting.unfold(loss.traced, cuts, values)
    args = loss.traced.args
    halves = splitting.split(jaxpr, [*(cut.active for cut in cuts), *(False for _ in args)])

    fixed = [value for cut, value in zip(cuts, values) if not cut.active]
    fixed_vars = halves.prefix.invars[len(consts) : len(consts) + len(fixed)]
    graded = list(
        map(
            operator.and_,
            tracing.depends(halves.prefix, fixed_vars),
            splitting.carries_gradient(halves.suffix, halves.cut),
        )
    )
    facts = None if masks is None else _facts(cuts, params, masks)

    def prefix(fixed: list[Any]) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
        values = [*consts, *fixed, *args]
        known: list[Any] = []
        if facts is None:
            results = tracing.evaluate(halves.prefix, (), values)
        else:
            given = [*(None for _ in consts), *facts[False], *(None for _ in args)]
            results, known = masked_evaluate(halves.prefix, (), values, given, masked=False, strict=strict)
        return _where(graded, results), (_where([not is_graded for is_graded in graded], results), known)

    cut_graded, prefix_vjp, (cut_rest, cut_facts) = jax.vjp(prefix, fixed, has_aux=True)

    def suffix(moving: list[Any], cut_graded: list[Any], masked: bool = False) -> tuple[Any, list[Any]]:
        values = [*moving, *_merged(graded, cut_graded, cut_rest)]
        if not masked or facts is None:
            results = tracing.evaluate(halves.suffix, (), values)
        else:
            given = [*facts[True], *cut_facts]
            results, known = masked_evaluate(halves.suffix, (), values, given, masked=True, strict=strict)
            _warn_of_cut_leaves(known[0], [trees.leaf_paths(params)[cut.leaf] for cut in cuts if cut.active])
        return results[0], results[1:]

    def active_pieces(point: Params) -> list[Any]:
        trees.check_same_shapes(point, params, "the argument of grad_fn", "params")
        trees.check_same_dtypes(point, params, "the argument of grad_fn", "params")
        leaves = jax.tree.leaves(point)
        return [cut.of(leaves[cut.leaf]) for cut in cuts if cut.active]

    def gradients(of_moving: list[Any], of_fixed: list[Any]) -> Gradients:
        merged = _merged([cut.active for cut in cuts], of_moving, of_fixed)
        return shardings.typed_like(jax.tree.unflatten(tree, splitting.join(cuts, merged)), params)

    def ascent(params: Params) -> tuple[Any, Gradients]:
        moving = active_pieces(params)
        value, vjp, aux = jax.vjp(lambda moving: suffix(moving, cut_graded, True), moving, has_aux=True)
        (of_moving,) = vjp(_one_like(value))
        return loss.rebuild([value, *aux]), gradients(of_moving, [jnp.zeros_like(leaf) for leaf in fixed])

    def descent(params: Params) -> tuple[Any, Gradients]:
        value, vjp, aux = jax.vjp(suffix, active_pieces(params), cut_graded, has_aux=True)
        of_moving, of_cut = vjp(_one_like(value))
        (of_fixed,) = prefix_vjp(of_cut)
        return loss.rebuild([value, *aux]), gradients(of_moving, of_fixed)

    return Passes(ascent, descent)


def _one_like(value: jax.Array) -> jax.Array:
    """Return 1 of the type of a loss, which in ``shard_map`` says over which axes the loss varies."""
    one = jnp.ones_like(value)
    of_value, of_one = (set(getattr(jax.typeof(x), "vma", ())) for x in (value, one))
    missing = tuple(of_value - of_one)  # as in JAX 0.6, before ones_like knew
    lax: Any = jax.lax
    return lax.pvary(one, missing) if missing else one


def _whole_passes(
    loss: TracedLoss,
    exact: Callable[[Params], tuple[Any, Gradients]],
    params: Params,
    active: Active,
    masks: list[Any] | None,
    strict: bool,
) -> Passes:
    """Return the two passes as whole gradients of the loss, which share nothing."""
    cuts = splitting.pieces(jax.tree.leaves(params), active)
    paths = trees.leaf_paths(params)

    def masked(params: Params, masks: list[Any]) -> tuple[Any, Any]:
        leaves, traced = jax.tree.leaves(params), loss.traced
        facts = _facts(splitting.pieces(leaves, (True,) * len(leaves)), params, masks)
        values, given = [*leaves, *traced.args], [*facts[True], *(None for _ in traced.args)]
        results, known = masked_evaluate(
            traced.jaxpr, traced.consts, values, given, masked=True, strict=strict
        )
        _warn_of_cut_leaves(known[0], [path for path, entry in zip(paths, active) if entry is not False])
        return results[0], loss.rebuild(results)

    def ascent(params: Params) -> tuple[Any, Gradients]:
        if masks is None:
            value, grads = exact(params)
        else:
            (_, value), grads = jax.value_and_grad(masked, has_aux=True)(params, masks)
        leaves, tree = jax.tree.flatten(grads)
        parts = [cut.of(leaves[cut.leaf]) for cut in cuts]
        kept = [part if cut.active else jnp.zeros_like(part) for cut, part in zip(cuts, parts)]
        return value, shardings.typed_like(jax.tree.unflatten(tree, splitting.join(cuts, kept)), params)

    return Passes(ascent, exact)


def _check_mask(mask: Any, params: Params, form: str) -> list[Any] | None:
    """Return the implicit form's mask leaf by leaf: a bool, a `FirstRow` or a bool array of full rank."""
    if form == "explicit":
        if mask is not None:
            raise ValueError(
                "mask is for form='implicit', got one in form='explicit', where ssam masks the perturbation;"
                " which leaves are perturbed at all is told by active."
            )
        return None
    if mask is None:
        raise ValueError("form='implicit' needs mask, such as get_mask(opt_state); got None.")

    def check(entry: Any, path: str, leaf: Any) -> Any:
        if not hasattr(entry, "dtype"):
            return check_entry(entry, path, leaf, "mask")
        if entry.dtype != jnp.bool_:
            raise TypeError(f"mask must be bool, but its leaf {path!r} is {entry.dtype}.")
        shape = jnp.shape(leaf)
        try:
            fits = jnp.broadcast_shapes(entry.shape, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"mask must broadcast against params, but its leaf {path!r} of shape {entry.shape} does not"
                f" broadcast to {shape}."
            )
        return entry.reshape((1,) * (len(shape) - entry.ndim) + entry.shape)

    leaves = zip(entries(mask, params, "mask"), trees.leaf_paths(params), jax.tree.leaves(params))
    return [check(*leaf) for leaf in leaves]


def _facts(cuts: Sequence[splitting.Piece], params: Params, masks: list[Any]) -> dict[bool, list[Any]]:
    """Return the facts about the pieces of the leaves, those of the active ones under True."""
    leaves, paths = jax.tree.leaves(params), trees.leaf_paths(params)
    facts: dict[bool, list[Any]] = {True: [], False: []}
    for cut in cuts:
        mask, leaf = masks[cut.leaf], leaves[cut.leaf]
        if isinstance(mask, FirstRow):
            mask = (np.arange(leaf.shape[0]) >= mask.row).reshape(-1, *[1] * (leaf.ndim - 1))
        if jnp.ndim(mask) and mask.shape[0] > 1 and cut.rows is not None:
            mask = mask[slice(*cut.rows)]
        facts[cut.active].append(weight_fact(paths[cut.leaf], mask))
    return facts


def _warn_of_cut_leaves(fact: Any, active: Sequence[str]) -> None:
    cut = [path for path in cut_leaves(fact) if path in active]
    if cut:
        warnings.warn(
            f"the masks cut every path from the loss to {', '.join(map(repr, cut))}: the ascent gradient is"
            " zero there, and these leaves are not perturbed.",
            stacklevel=2,
        )


def _where(chosen: Sequence[Any], items: Sequence[Any]) -> list[Any]:
    return [item for item, is_chosen in zip(items, chosen) if is_chosen]


def _merged(chosen: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Return the items of ``first`` where chosen, of ``second`` elsewhere, in order."""
    ones, others = iter(first), iter(second)
    return [next(ones) if is_chosen else next(others) for is_chosen in chosen]
