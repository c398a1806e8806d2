"""SAM scaled layer by layer, so that a radius serves networks of every width (muP², arXiv 2411.00075).

A gradient is nearly of rank one, and such a change of a matrix moves the features that come out of it by as
much, whatever its size, if its length is the square root of outputs by inputs. All tensors are made as long
as that, up to one factor: rho.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssam_jax import RadiusRule


def length(shape: tuple[int, ...]) -> float:
    """Return the length that a perturbation of a tensor has at a radius of 1.

    The last axis is that of the outputs, the one before that of the inputs, and what is before these is the
    window of a convolution. A vector has one input.
    """
    inputs = math.prod(shape[:-1])
    return math.sqrt(shape[-1] / inputs) if shape else 1.0


def direction() -> optax.GradientTransformation:
    """Return the gradient with each tensor as long as `length` has it."""

    def scaled(g: jax.Array) -> jax.Array:
        norm = jnp.linalg.norm(g.ravel())
        return jnp.where(norm > 0, g * (length(g.shape) / jnp.where(norm > 0, norm, 1)), 0)

    return optax.stateless(lambda grads, params: jax.tree.map(scaled, grads))


def radius(rho: Any) -> RadiusRule:
    """Return a radius of ``rho`` for each tensor: as long, in all, as the tensors are together."""

    def update(state: Any, grads: Any, params: Any, step: jax.Array, **extra: Any) -> tuple[Any, Any]:
        del grads, step, extra
        return rho * math.sqrt(sum(length(p.shape) ** 2 for p in jax.tree.leaves(params))), state

    return RadiusRule(lambda params: (), update)
