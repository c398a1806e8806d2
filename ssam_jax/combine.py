"""Combines: what a step returns, given the gradients at ``w`` and at ``w + eps``."""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ssam_jax._base import checks, shardings, trees
from ssam_jax.typing import Gradients, Params, PyTree

__all__ = ["Combine", "LookSamState", "gsam", "looksam", "replace", "weighted"]


class UpdateGradients(Protocol):
    """The second function of a `Combine`."""

    def __call__(
        self, grads: Gradients, perturbed: Gradients | None, state: PyTree, params: Params, /
    ) -> tuple[Gradients, PyTree]:
        """Return what the step descends along and the next state."""


class Combine(NamedTuple):
    """What a step returns: a pair of pure functions.

    Attributes:
      init: ``init(params) -> state``, a pytree of arrays.
      update: ``update(grads, perturbed, state, params) -> (updates, state)``. ``grads`` is the gradient at
        ``w``, ``perturbed`` that at ``w + eps``, or None on a step without ascent.
      needs_skips: whether a step without ascent must be known as such, so that a radius that may be 0 needs
        ``skip_zero_rho=True``.
    """

    init: Callable[[Params], PyTree]
    update: UpdateGradients
    needs_skips: bool = False


def replace() -> Combine:
    """Return the perturbed gradient, as SAM does; on a step without ascent, the gradient."""

    def update(
        grads: Gradients, perturbed: Gradients | None, state: PyTree, params: Params
    ) -> tuple[Gradients, PyTree]:
        del params
        return (grads if perturbed is None else perturbed), state

    return Combine(_no_state, update)


def weighted(gamma: float) -> Combine:
    r"""Return a weighted sum of the two gradients.

    .. math:: u = (1 - \gamma) \, g + \gamma \, g'

    Args:
      gamma: weight of the perturbed gradient; 1 is SAM, and above 1 amplifies. WSAM (arXiv 2305.15817) in its
        coupled form has ``gamma = a / (1 - a)``.

    Returns:
      A `Combine` without state.

    Raises:
      TypeError: ``gamma`` is not a real number.
      ValueError: it is not finite.
    """
    checks.number("gamma", gamma, low=-checks.LARGEST, high=checks.LARGEST)

    def update(
        grads: Gradients, perturbed: Gradients | None, state: PyTree, params: Params
    ) -> tuple[Gradients, PyTree]:
        del params
        if perturbed is None:
            return grads, state
        return jax.tree.map(mean, grads, perturbed), state

    def mean(g: jax.Array, p: jax.Array) -> jax.Array:
        return ((1 - gamma) * trees.widened(g) + gamma * trees.widened(p)).astype(p.dtype)

    return Combine(_no_state, update)


def gsam(alpha: float) -> Combine:
    r"""Return GSAM's gradient, which also narrows the gap between the two losses.

    .. math:: u = g' - \alpha \left(g - \frac{\langle g, g' \rangle}{\|g'\|^2} g'\right)

    Args:
      alpha: weight of the part of the gradient that is orthogonal to the perturbed one, at least 0.

    Returns:
      A `Combine` without state.

    Raises:
      TypeError: ``alpha`` is not a real number.
      ValueError: it is negative or not finite.

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, algorithm 1.
    """
    checks.number("alpha", alpha, low=0, high=checks.LARGEST)

    def update(
        grads: Gradients, perturbed: Gradients | None, state: PyTree, params: Params
    ) -> tuple[Gradients, PyTree]:
        del params
        if perturbed is None:
            return grads, state
        along = _ratio(_inner(grads, perturbed), _inner(perturbed, perturbed))

        def surrogate(g: jax.Array, p: jax.Array) -> jax.Array:
            g, wide = trees.widened(g), trees.widened(p)
            return ((1 + alpha * along).astype(wide.dtype) * wide - alpha * g).astype(p.dtype)

        return jax.tree.map(surrogate, grads, perturbed), state

    return Combine(_no_state, update)


def looksam(alpha: float, scope: Literal["global", "leaf"] = "global") -> Combine:
    r"""Return LookSAM's gradient, which reuses the last ascent on the steps without one.

    On an ascent step :math:`u = g'`, and the direction of
    :math:`v = g' - \frac{\langle g, g' \rangle}{\|g\|^2} g` is kept. On a step without,
    :math:`u = g + \alpha \|g\| \, v / \|v\|`; before the first ascent, :math:`u = g`.

    Args:
      alpha: weight of the kept direction, at least 0.
      scope: ``"global"`` takes products and norms over all leaves; ``"leaf"`` leaf by leaf, as the authors'
        code does.

    Returns:
      A `Combine` with a `LookSamState`, one tree of float32 (float64 where the parameter is). Steps without
      ascent are ``grad_fn=None``, or a radius of 0 with ``skip_zero_rho=True``.

    Raises:
      TypeError: ``alpha`` is not a real number.
      ValueError: an argument is out of range.

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, algorithm 1.
    """
    checks.number("alpha", alpha, low=0, high=checks.LARGEST)
    checks.choice("scope", scope, ("global", "leaf"))

    def shape_of(tree: Gradients) -> tuple[int, ...]:
        return (len(jax.tree.leaves(tree)),) if scope == "leaf" else ()

    def inner(a: Gradients, b: Gradients) -> jax.Array:
        """Return the product of two trees, or those of their leaves as a vector."""
        if scope == "global":
            return _inner(a, b)
        dtype = trees.wide_dtype(*jax.tree.leaves(a))
        products = [_inner(*pair).astype(dtype) for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b))]
        return jnp.stack(products) if products else jnp.zeros(0, dtype)

    def each(scalars: jax.Array, tree: Gradients) -> PyTree:
        """Return for each leaf the scalar that serves it."""
        leaves, treedef = jax.tree.flatten(tree)
        return jax.tree.unflatten(treedef, list(jnp.broadcast_to(scalars, len(leaves))))

    def init(params: Params) -> LookSamState:
        across = jax.tree.map(lambda p: shardings.zeros_like(p, trees.wide_dtype(p)), params)
        return LookSamState(across, jnp.zeros(shape_of(params), trees.wide_dtype(*jax.tree.leaves(params))))

    def update(
        grads: Gradients, perturbed: Gradients | None, state: LookSamState, params: Params
    ) -> tuple[Gradients, LookSamState]:
        del params
        square = inner(grads, grads)
        if perturbed is None:
            scale = relative_length(square, state.square)
            return jax.tree.map(reuse, grads, state.across, each(scale, grads)), state
        along = _ratio(inner(grads, perturbed), square)
        across = jax.tree.map(orthogonal, grads, perturbed, each(along, grads))
        return perturbed, LookSamState(across, inner(across, across))

    def relative_length(square: jax.Array, of: jax.Array) -> jax.Array:
        return alpha * trees.safe_sqrt(_ratio(square, of))

    def reuse(g: jax.Array, v: jax.Array, scale: jax.Array) -> jax.Array:
        return (g.astype(v.dtype) + scale.astype(v.dtype) * v).astype(g.dtype)

    def orthogonal(g: jax.Array, p: jax.Array, along: jax.Array) -> jax.Array:
        g = trees.widened(g)
        return p.astype(g.dtype) - along.astype(g.dtype) * g

    return Combine(init, update, needs_skips=True)


class LookSamState(NamedTuple):
    """State of `looksam`.

    Attributes:
      across: v of the last ascent, shaped like the parameters; zeros before the first.
      square: its squared norm, a scalar, or for each leaf, of shape (leaves,).
    """

    across: Gradients
    square: jax.Array


def _no_state(params: Params) -> PyTree:
    del params
    return ()


def _inner(a: Gradients, b: Gradients) -> jax.Array:
    """Return the inner product of two trees, accumulated in float32 at least."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    dtype = trees.wide_dtype(*(leaf for pair in pairs for leaf in pair))
    products = (jnp.sum(x.astype(dtype) * y.astype(dtype)) for x, y in pairs)
    return sum(products, start=jnp.zeros((), dtype))


def _ratio(product: jax.Array, square: jax.Array) -> jax.Array:
    """Divide, with 0 for a vector of length zero or one that is not finite."""
    usable = jnp.isfinite(square) & (square > 0)
    return jnp.where(usable, product / jnp.where(usable, square, 1), 0)


DEFAULT = replace()
"""The perturbed gradient: SAM."""
