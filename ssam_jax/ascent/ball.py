"""The ball: from a direction to the point ``w + eps`` on its surface."""

import jax
import jax.numpy as jnp

from ssam_jax._base import trees
from ssam_jax.typing import Gradients, Mask, Normalize, Params, Scalar

ASAM_ETA = 0.01
"""Added to ``|w|`` for stability, the value of ASAM's authors (arXiv 2102.11600)."""

BIAS_NAMES = ("b", "beta", "offset")
"""Last parts of a path that mean a bias besides those that contain "bias" (Haiku, TensorFlow)."""


def perturb(
    params: Params,
    direction: Gradients,
    *,
    rho: Scalar,
    mask: Mask | None = None,
    normalize: Normalize = "global",
    adaptive: bool = False,
) -> Params:
    r"""Return the parameters at the point of the ball that lies in a direction.

    .. math:: w + \rho \, m \odot d / \|d\|_2

    (arXiv 2306.17504; SAM itself, where d is the gradient: arXiv 2010.01412, eq. 2). ASAM (arXiv 2102.11600)
    replaces the perturbation by :math:`\rho \, T^2 d / \|T d\|_2` with :math:`T = |w| + 0.01`, and
    :math:`T = 1` for biases, as its authors do.

    The norm is accumulated in float32. A norm of zero or one that is not finite gives ``params``.

    Args:
      params: pytree of floating-point arrays.
      direction: the way up, such as the gradient, shaped like ``params``.
      rho: radius, a scalar, in the units of the parameters (ASAM: relative to them).
      mask: bool leaves that broadcast against ``params``; None perturbs everything.
      normalize: ``"global"`` divides by the norm of the direction and masks after, so that the perturbation
        is at most rho long; ``"masked"`` divides by that of the masked direction, so that it is exactly
        rho long; ``"leaf"`` divides each leaf of the direction by its own norm and masks after.
      adaptive: whether to scale by the parameters, as ASAM does.

    Returns:
      A tree of the structure, shapes, dtypes and shardings of ``params``.
    """
    direction = jax.tree.map(trees.widened, direction)
    scale = trees.map_with_path(asam_scale, params) if adaptive else None
    if scale is not None:
        direction = jax.tree.map(jnp.multiply, direction, scale)
    masked = direction if mask is None else jax.tree.map(apply_mask, mask, direction)
    norms = _norms(masked if normalize == "masked" else direction, by_leaf=normalize == "leaf")
    if scale is not None:
        masked = jax.tree.map(jnp.multiply, masked, scale)

    def move(p: jax.Array, d: jax.Array, norm: jax.Array) -> jax.Array:
        usable = jnp.isfinite(norm) & (norm > 0)
        factor = jnp.asarray(rho, norm.dtype) / jnp.where(usable, norm, 1)
        eps = jnp.where(usable, factor * d.astype(norm.dtype), 0).astype(d.dtype)
        return (trees.widened(p) + eps).astype(p.dtype)

    return jax.tree.map(move, params, masked, norms)


def _norms(tree: Gradients, *, by_leaf: bool) -> Gradients:
    """Return for each leaf the norm to divide it by: its own, or that of the tree."""
    if by_leaf:
        return jax.tree.map(trees.global_norm, tree)
    norm = trees.global_norm(tree)
    return jax.tree.map(lambda _: norm, tree)


def apply_mask(mask: jax.Array, grad: jax.Array) -> jax.Array:
    """Return the entries where the mask is True, zeros elsewhere; a NaN that is masked away is gone."""
    return jnp.where(mask, grad, 0)


def asam_scale(path: str, param: jax.Array) -> jax.Array:
    """Return T: ``|w| + eta``, and 1 for a bias."""
    if is_bias(path):
        return jnp.ones((), trees.wide_dtype(param))
    return jnp.abs(trees.widened(param)) + ASAM_ETA


def is_bias(path: str) -> bool:
    """Whether a leaf's path names a bias: its last part contains "bias", or is b, beta or offset.

    A leaf without a name (in a list or a tuple) is taken for a weight.
    """
    name = path.rsplit("/", 1)[-1].lower()
    return "bias" in name or name in BIAS_NAMES
