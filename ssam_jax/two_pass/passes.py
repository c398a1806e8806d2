"""Both passes of SAM from one trace of the loss, the forward work that they share done once.

`two_pass_value_and_grad` traces the loss (`loss`), splits its equations by data flow (`splitting`) and
computes the two gradients by an object whose two methods are the two passes: `SharedPasses`, or
`SeparatePasses` for a loss that cannot be split.
"""

import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from ssam_jax._base import checks, shardings, tracing, trees
from ssam_jax.two_pass import splitting
from ssam_jax.two_pass.active import Active, check_active
from ssam_jax.two_pass.implicit.backward import masked_evaluate
from ssam_jax.two_pass.implicit.masks import LeafMask, check_mask, facts_about, first_rows
from ssam_jax.two_pass.implicit.weights import Fact, without_gradient
from ssam_jax.two_pass.loss import TracedLoss, trace_loss
from ssam_jax.two_pass.splitting import Piece
from ssam_jax.typing import Form, Gradients, Mask, Params, PyTree


@dataclasses.dataclass(eq=False)
class GradFn:
    """The `TwoPassGradFn` of two functions; ``dataclasses.replace`` exchanges either.

    Attributes:
      value_and_grad: from parameters and step to the loss, or ``(loss, aux)``, and the complete gradient.
      ascent: from parameters and step to the gradient of the active leaves.
      partial: as in `TwoPassGradFn`.
      form: as in `TwoPassGradFn`.
    """

    value_and_grad: Callable[[Params, int], tuple[PyTree, Gradients]]
    ascent: Callable[[Params, int], Gradients]
    partial: bool
    form: Form

    def __call__(self, params: Params, step: int = 0, /) -> Gradients:
        """Return the complete gradient at ``params``."""
        return self.value_and_grad(params, step)[1]


def two_pass_value_and_grad(
    loss_fn: Callable[..., PyTree],
    *,
    has_aux: bool = False,
    form: Form = "explicit",
    strict: bool = True,
) -> Callable[..., tuple[PyTree, Gradients, GradFn]]:
    """Return a function that computes what a step of `ssam` needs, for less than two gradients.

    It takes the place of ``jax.value_and_grad`` in a training step, inside ``jit``::

        value, grads, grad_fn = two_pass_value_and_grad(loss_fn)(params, *args, active=active)
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)

    where ``tx`` starts with ``ssam(rho, mask, normalize="masked")``, and ``active``, a static argument of
    ``jit``, comes from ``active_leaves(state)``.

    The equations of the traced loss are split by data flow. Those that depend on no active leaf are
    computed once, with their gradient, for both passes; of the others the first pass computes the
    gradient of the active leaves alone. If these do the share p of an SGD step's work, the two passes
    cost 1 + p SGD steps; plain SAM costs 2. The split looks into a nested ``jit``, divides a
    ``jax.checkpoint`` block in two, and divides a ``lax.scan`` over stacked parameters by rows. What is
    computed, and by which derivative rules, stays the same. A ``jax.pure_callback`` that depends on no
    active leaf is called once, not twice. A loss with side effects (``jax.debug.print``, ``io_callback``,
    refs) is not split: it costs two complete passes, and a warning names the equation.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)`` returns a scalar, or ``(scalar, aux)`` with
        ``has_aux``. It must be the same function of its arguments in both passes: pass a dropout key in
        ``args``.
      has_aux: whether ``loss_fn`` returns a pair.
      form: ``"explicit"``: the ascent gradient is exact, and `ssam` masks the perturbation;
        ``"implicit"``: the first backward pass uses masked weights where it sends gradients to the
        inputs of matrix products and convolutions (arXiv 2306.17504, section on implicit SSAM), and `ssam`
        does not mask the perturbation.
      strict: in the implicit form, whether it is an error if a masked parameter reaches a product and its
        mask cannot be followed there; otherwise it is a warning, and that product is not masked.

    Returns:
      ``f(params, *args, active=None, mask=None, **kwargs) -> (value, grads, grad_fn)``.

      - ``params``: pytree of floating-point arrays.
      - ``args``, ``kwargs``: as ``loss_fn`` takes them; leaves that are not JAX arrays stay static. The
        names ``active`` and ``mask`` are not passed on.
      - ``active``: None for all, or a tuple with an entry for each leaf in flattening order: True,
        False, or for a stacked leaf the first perturbed row (`FirstRow`). `active_leaves` returns it
        for a mask. One that is out of date perturbs fewer leaves than the mask asks for, never others.
      - ``mask``: for the implicit form: a tree like ``params`` of bools or of bool arrays that
        broadcast against the leaves, as `get_mask` returns it; or a tuple like ``active``. Python bools,
        and arrays that are not traced, are known while compiling: the compiler drops the product of a
        mask that is all False.
      - ``value``: the loss of the clean pass, or ``(loss, aux)``: BatchNorm statistics come from here.
      - ``grads``: the ascent gradient of the active leaves, zeros elsewhere; like ``params``.
      - ``grad_fn``: a `TwoPassGradFn`, whose gradients are complete and exact in both forms.

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
    _check_options(loss_fn, has_aux, form, strict)

    def two_pass(
        params: Params,
        /,
        *args: PyTree,
        active: Active | None = None,
        mask: Mask | Active | None = None,
        **kwargs: PyTree,
    ) -> tuple[PyTree, Gradients, GradFn]:
        trees.check_floating(params, "params")
        chosen = check_active(active, params)
        masks = check_mask(mask, params, form)

        def call(params: Params, args: PyTree, kwargs: PyTree) -> PyTree:
            return loss_fn(params, *args, **kwargs)

        loss = trace_loss(call, params, args, kwargs, has_aux=has_aux)
        effect = tracing.side_effect(loss.traced.jaxpr)
        passes: Passes
        if effect is None:
            passes = split_passes(loss, params, chosen, masks, strict)
        else:
            warnings.warn(
                f"the loss has a side effect, {effect}, so that two_pass_value_and_grad computes two complete"
                " passes and saves nothing. Take it out of the loss.",
                stacklevel=2,
            )
            exact = jax.value_and_grad(lambda params: call(params, args, kwargs), has_aux=has_aux)
            passes = SeparatePasses(exact, loss, chosen, masks, strict)
        value, grads = passes.ascent(params)
        grad_fn = GradFn(
            value_and_grad=lambda params, step: passes.descent(params),
            ascent=lambda params, step: passes.ascent(params)[1],
            partial=any(entry is not True for entry in chosen),
            form=form,
        )
        return value, grads, grad_fn

    return two_pass


def _check_options(loss_fn: object, has_aux: object, form: object, strict: object) -> None:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (params, *args), got {loss_fn!r}.")
    checks.flag("has_aux", has_aux)
    checks.flag("strict", strict)
    checks.choice("form", form, ("explicit", "implicit"))


class Passes(Protocol):
    """The two passes, each from parameters to the loss, or ``(loss, aux)``, and a gradient."""

    def ascent(self, params: Params, /) -> tuple[PyTree, Gradients]:
        """Return the gradient of the active leaves, zeros elsewhere."""

    def descent(self, params: Params, /) -> tuple[PyTree, Gradients]:
        """Return the complete gradient."""


class Cut(NamedTuple):
    """The values that cross from the prefix to the suffix, computed once.

    Attributes:
      graded: for each value on the cut, whether a gradient flows back across it to an inactive piece.
      with_gradient: the values to which one does.
      others: the values to which none does.
      facts: what the implicit form knows of all values.
      pull: from the cotangents of ``with_gradient`` to the gradients of the inactive pieces.
    """

    graded: list[bool]
    with_gradient: list[tracing.Value]
    others: list[tracing.Value]
    facts: list[Fact | None]
    pull: Callable[[list[jax.Array]], tuple[list[jax.Array]]]


@dataclasses.dataclass(frozen=True, eq=False)
class SharedPasses:
    """The two passes of a loss that is split: both start from the cut and compute the suffix alone.

    Attributes:
      loss: the loss.
      like: the parameters of the clean pass.
      pieces: the ranges of rows into which the leaves are divided, active or not.
      suffix: the equations that depend on an active piece; their inputs are the active pieces and the cut.
      cut: what the other equations computed.
      facts: what the implicit form knows of the active pieces.
      strict: whether a mask that cannot be followed is an error.
    """

    loss: TracedLoss
    like: Params
    pieces: list[Piece]
    suffix: tracing.Equations
    cut: Cut
    facts: list[Fact | None]
    strict: bool

    def ascent(self, params: Params, /) -> tuple[PyTree, Gradients]:
        """Differentiate the suffix by the active pieces, in the implicit form through masked weights."""

        def suffix(active: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
            values = [*active, *self._cut_with(self.cut.with_gradient)]
            facts = [*self.facts, *self.cut.facts]
            results, known = masked_evaluate(self.suffix, (), values, facts, masked=True, strict=self.strict)
            _warn_of_leaves_without_gradient(known[0], self.like, self.pieces)
            return results[0], results[1:]

        value, pull, aux = jax.vjp(suffix, self._active_pieces(params), has_aux=True)
        (of_active,) = pull(_one_like(value))
        leaves = jax.tree.leaves(self.like)
        zeros = [jnp.zeros_like(piece.of(leaves[piece.leaf])) for piece in self.pieces if not piece.active]
        return self.loss.rebuild([value, *aux]), self._gradients(of_active, zeros)

    def descent(self, params: Params, /) -> tuple[PyTree, Gradients]:
        """Differentiate the suffix by the active pieces and the cut, and pull the latter to all others."""

        def suffix(
            active: list[jax.Array], with_gradient: list[jax.Array]
        ) -> tuple[jax.Array, list[jax.Array]]:
            results = tracing.evaluate(self.suffix, (), [*active, *self._cut_with(with_gradient)])
            return results[0], results[1:]

        active = self._active_pieces(params)
        value, pull, aux = jax.vjp(suffix, active, self.cut.with_gradient, has_aux=True)
        of_active, of_cut = pull(_one_like(value))
        (of_inactive,) = self.cut.pull(of_cut)
        return self.loss.rebuild([value, *aux]), self._gradients(of_active, of_inactive)

    def _cut_with(self, with_gradient: list[tracing.Value]) -> list[tracing.Value]:
        return _merged(self.cut.graded, with_gradient, self.cut.others)

    def _active_pieces(self, params: Params) -> list[tracing.Value]:
        trees.check_same_shapes(params, self.like, "the argument of grad_fn", "params")
        trees.check_same_dtypes(params, self.like, "the argument of grad_fn", "params")
        leaves = jax.tree.leaves(params)
        return [piece.of(leaves[piece.leaf]) for piece in self.pieces if piece.active]

    def _gradients(self, of_active: list[jax.Array], of_inactive: list[jax.Array]) -> Gradients:
        by_piece = _merged([piece.active for piece in self.pieces], of_active, of_inactive)
        return _tree_of(self.pieces, by_piece, self.like)


def split_passes(
    loss: TracedLoss, params: Params, active: Active, masks: Sequence[LeafMask] | None, strict: bool
) -> SharedPasses:
    """Split a loss, compute what depends on no active leaf of ``params``, and return the two passes."""
    leaves, args = jax.tree.leaves(params), loss.traced.args
    pieces = splitting.pieces(leaves, active, *first_rows(masks))
    values = [piece.of(leaves[piece.leaf]) for piece in pieces]
    jaxpr, consts = splitting.unfold(loss.traced, pieces, values)
    is_active = [piece.active for piece in pieces]
    halves = splitting.split(jaxpr, [*is_active, *(False for _ in args)])
    facts = facts_about(pieces, params, masks)

    inactive = [not flag for flag in is_active]
    fixed = _where(inactive, values)
    # Only where a gradient flows from both sides; a cotangent of zeros is not the same as none.
    from_the_loss = splitting.carries_gradient(halves.suffix, halves.cut)
    graded: list[bool] = []

    def prefix(fixed: list[jax.Array]) -> tuple[list[jax.Array], tuple[list[jax.Array], list[Fact | None]]]:
        inputs = [*consts, *fixed, *args]
        given = [*(None for _ in consts), *_where(inactive, facts), *(None for _ in args)]
        results, known = masked_evaluate(halves.prefix, (), inputs, given, masked=False, strict=strict)
        graded[:] = map(operator.and_, from_the_loss, splitting.have_derivatives(results, fixed))
        return _where(graded, results), (_where(map(operator.not_, graded), results), known)

    with_gradient, pull, (others, cut_facts) = jax.vjp(prefix, fixed, has_aux=True)
    cut = Cut(graded, with_gradient, others, cut_facts, pull)
    return SharedPasses(loss, params, pieces, halves.suffix, cut, _where(is_active, facts), strict)


@dataclasses.dataclass(frozen=True, eq=False)
class SeparatePasses:
    """The two passes of a loss with side effects: complete gradients that share nothing.

    Attributes:
      exact: the value and the gradient of the loss.
      loss: the loss.
      active: which leaves are perturbed.
      masks: of the implicit form.
      strict: whether a mask that cannot be followed is an error.
    """

    exact: Callable[[Params], tuple[PyTree, Gradients]]
    loss: TracedLoss
    active: Active
    masks: Sequence[LeafMask] | None
    strict: bool

    def ascent(self, params: Params, /) -> tuple[PyTree, Gradients]:
        """Differentiate by all leaves, in the implicit form through masked weights; keep the active ones."""
        value, grads = self.exact(params) if self.masks is None else self._masked(params)
        leaves = jax.tree.leaves(grads)
        pieces = splitting.pieces(leaves, self.active)
        values = [piece.of(leaves[piece.leaf]) for piece in pieces]
        kept = [x if piece.active else jnp.zeros_like(x) for piece, x in zip(pieces, values)]
        return value, _tree_of(pieces, kept, params)

    def descent(self, params: Params, /) -> tuple[PyTree, Gradients]:
        """Differentiate by all leaves."""
        return self.exact(params)

    def _masked(self, params: Params) -> tuple[PyTree, Gradients]:
        traced = self.loss.traced

        def loss(params: Params) -> tuple[jax.Array, PyTree]:
            leaves = jax.tree.leaves(params)
            pieces = splitting.pieces(leaves, (True,) * len(leaves))
            facts = [*facts_about(pieces, params, self.masks), *(None for _ in traced.args)]
            values = [*leaves, *traced.args]
            results, known = masked_evaluate(
                traced.jaxpr, traced.consts, values, facts, masked=True, strict=self.strict
            )
            _warn_of_leaves_without_gradient(known[0], params, splitting.pieces(leaves, self.active))
            return results[0], self.loss.rebuild(results)

        (_, value), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, grads


def _tree_of(pieces: Sequence[Piece], values: Sequence[jax.Array], like: Params) -> Params:
    """Return the tree that the values of all pieces make up, sharded as ``like``."""
    tree: Any = jax.tree.structure(like)
    return shardings.typed_like(tree.unflatten(splitting.join(pieces, values)), like)


def _one_like(value: jax.Array) -> jax.Array:
    """Return 1 of the type of a loss, which in ``shard_map`` includes the axes over which the loss varies."""
    one = jnp.ones_like(value)
    of_value, of_one = (set(getattr(jax.typeof(x), "vma", ())) for x in (value, one))
    missing = tuple(of_value - of_one)  # as in JAX 0.6, before ones_like knew
    lax: Any = jax.lax
    return lax.pvary(one, missing) if missing else one


def _warn_of_leaves_without_gradient(fact: Fact | None, params: Params, pieces: Sequence[Piece]) -> None:
    paths = trees.leaf_paths(params)
    active = {paths[piece.leaf] for piece in pieces if piece.active}
    found = [path for path in without_gradient(fact) if path in active]
    if found:
        warnings.warn(
            f"the masks cut every path from the loss to {', '.join(map(repr, found))}: the ascent gradient is"
            " zero there, and these leaves are not perturbed.",
            stacklevel=2,
        )


_T = TypeVar("_T")


def _where(chosen: Iterable[bool], items: Sequence[_T]) -> list[_T]:
    return [item for item, is_chosen in zip(items, chosen) if is_chosen]


def _merged(chosen: Sequence[bool], first: Sequence[_T], second: Sequence[_T]) -> list[_T]:
    """Return the items of ``first`` where chosen, of ``second`` elsewhere, in order."""
    ones, others = iter(first), iter(second)
    return [next(ones) if is_chosen else next(others) for is_chosen in chosen]
