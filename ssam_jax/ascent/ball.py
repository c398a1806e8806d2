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

    The norm is accumulated in float32. A norm of zero or one that is not finite gives ``params``. So do
    norms below 1e-19 or above 1e19, whose squares are no numbers of float32: scale the direction by a power
    of two, on whose size the point does not depend.

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
    scale = scales(params) if adaptive else None
    return displaced(params, step(direction, scale, rho=rho, mask=mask, normalize=normalize), scale)


def step(
    direction: Gradients,
    scale: Params | None = None,
    *,
    rho: Scalar,
    mask: Mask | None = None,
    normalize: Normalize = "global",
) -> Params:
    r"""Return :math:`\rho \, m \odot T d / \|T d\|`, the step in the coordinates in which the ball is round.

    Args:
      direction: pytree of floating-point arrays.
      scale: T, as `scales` returns it; None is 1.
      rho: as for `perturb`, with ``mask`` and ``normalize``.
      mask: bool leaves that broadcast against ``direction``.
      normalize: ``"global"``, ``"masked"`` or ``"leaf"``.

    Returns:
      A tree like ``direction``, float32 (float64 where the direction is). Zeros where the norm is not usable.
    """
    direction = jax.tree.map(trees.widened, direction)
    if scale is not None:
        direction = jax.tree.map(jnp.multiply, direction, scale)
    masked = direction if mask is None else jax.tree.map(apply_mask, mask, direction)
    measured = masked if normalize == "masked" else direction
    if normalize == "leaf":
        factors = jax.tree.map(lambda d: _factor(rho, trees.global_norm(d)), measured)
    else:
        factor = _factor(rho, trees.global_norm(measured))  # once: a kernel for each leaf would repeat it
        factors = jax.tree.map(lambda _: factor, measured)
    return jax.tree.map(_scaled, masked, factors)


def _factor(rho: Scalar, norm: jax.Array) -> jax.Array:
    """Return ``rho / norm``, and 0 for a norm that is 0 or not finite."""
    usable = jnp.isfinite(norm) & (norm > 0)
    # A division at the end, which compilers do once; what is cheaper they repeat in the kernel of each leaf.
    return jnp.asarray(rho, norm.dtype) / jnp.where(usable, norm, jnp.inf)


def _scaled(direction: jax.Array, factor: jax.Array) -> jax.Array:
    """Return a leaf times a factor; zeros for a factor of 0, whatever the leaf holds."""
    return jnp.where(factor != 0, factor * direction.astype(factor.dtype), 0).astype(direction.dtype)


def displaced(params: Params, away: Params, scale: Params | None = None) -> Params:
    """Return ``w + T away``, in the dtypes of the parameters."""
    if scale is not None:
        away = jax.tree.map(jnp.multiply, away, scale)
    return jax.tree.map(lambda p, d: (trees.widened(p) + d).astype(jnp.result_type(p)), params, away)


def projected(away: Params, rho: Scalar) -> Params:
    """Return the nearest point of the round ball to a displacement."""
    return trees.where(trees.global_norm(away) <= rho, away, step(away, rho=rho))


def scales(params: Params) -> Params:
    """Return T for each leaf, ASAM's."""
    return trees.map_with_path(asam_scale, params)


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
