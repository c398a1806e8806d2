"""The step to the sharpest nearby point: ``w + rho * g / ||g|| * m`` and its variants."""

from typing import Literal

import jax
import jax.numpy as jnp

from ssam_jax._base import trees
from ssam_jax.typing import Gradients, Mask, Params, Scalar

Normalize = Literal["global", "masked"]

ASAM_ETA = 0.01
"""Added to ``|w|`` for stability, the value of ASAM's authors (arXiv 2102.11600)."""

BIAS_NAMES = ("b", "beta", "offset")
"""Last parts of a path that mean a bias besides those that contain "bias" (Haiku, TensorFlow)."""


def perturb(
    params: Params,
    grads: Gradients,
    *,
    rho: Scalar,
    mask: Mask | None = None,
    normalize: Normalize = "global",
    adaptive: bool = False,
) -> Params:
    r"""Return the parameters at the sharpest nearby point, to first order.

    .. math:: w + \rho \, m \odot g / \|g\|_2

    (arXiv 2306.17504; SAM itself: arXiv 2010.01412, eq. 2). ASAM (arXiv 2102.11600)
    replaces the perturbation by :math:`\rho \, T^2 g / \|T g\|_2` with :math:`T = |w| + 0.01`, and
    :math:`T = 1` for biases, as its authors do.

    The norm is accumulated in float32. A norm of zero or one that is not finite gives ``params``.

    Args:
      params: pytree of floating-point arrays.
      grads: the ascent gradient, shaped like ``params``.
      rho: radius, a scalar, in the units of the parameters (ASAM: relative to them).
      mask: bool leaves that broadcast against ``params``; None perturbs everything.
      normalize: ``"global"`` divides by the norm of the whole gradient and masks after, so that the
        perturbation is no longer than rho; ``"masked"`` divides by that of the masked gradient, so
        that it is exactly rho long.
      adaptive: whether to scale by the parameters, as ASAM does.

    Returns:
      A tree of the structure, shapes, dtypes and shardings of ``params``.
    """
    grads = jax.tree.map(trees.widened, grads)
    scale = trees.map_with_path(asam_scale, params) if adaptive else None
    if scale is not None:
        grads = jax.tree.map(jnp.multiply, grads, scale)
    masked = grads if mask is None else jax.tree.map(apply_mask, mask, grads)
    norm = trees.global_norm(masked if normalize == "masked" else grads)
    usable = jnp.isfinite(norm) & (norm > 0)
    factor = jnp.asarray(rho, norm.dtype) / jnp.where(usable, norm, 1)
    if scale is not None:
        masked = jax.tree.map(jnp.multiply, masked, scale)

    def move(p: jax.Array, g: jax.Array) -> jax.Array:
        moved = trees.widened(p) + jnp.where(usable, factor.astype(g.dtype) * g, 0)
        return moved.astype(p.dtype)

    return jax.tree.map(move, params, masked)


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
