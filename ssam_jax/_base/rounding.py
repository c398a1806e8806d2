"""Rounding to few bits that does not stall a running mean."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

GOLDEN = 0x9E37_79B9
"""The golden ratio's bits, whose multiples fill the uint32 evenly, however many one takes."""

LARGEST = (2 - 2**-7) * 2.0**127
"""The largest number of bfloat16."""


def rounded(x: jax.Array, dtype: Any, step: jax.Array) -> jax.Array:
    """Return an array of numbers of at least 0 in a dtype, so that running means of bfloat16 do not stall.

    Bfloat16 has eight significant bits. A mean with a decay of 0.998 that is rounded to the nearest stops
    moving once a step changes it by less than half of its last bit. Here it is rounded up on some steps and
    down on the others, as often as its place between two neighbors says, which is right on average. Which
    steps those are depends on the step alone (the multiples of the golden ratio, a low-discrepancy sequence),
    so that equal numbers stay equal, on any number of devices, and nothing is drawn.

    Args:
      x: floating-point array, float32 where ``dtype`` is bfloat16.
      dtype: a floating-point dtype. To any other than bfloat16 this is a plain cast.
      step: int32 scalar, another one at every call.

    Returns:
      An array like ``x``, of the dtype; finite where ``x`` is.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return x.astype(dtype)
    bits = lax.bitcast_convert_type(jnp.minimum(x, LARGEST), jnp.uint32)
    share = (jnp.asarray(step).astype(jnp.uint32) * jnp.uint32(GOLDEN)) >> jnp.uint32(16)
    # Bfloat16 is the upper half of float32: the carry from the lower half rounds up.
    upper = ((bits + share) >> jnp.uint32(16)).astype(jnp.uint16)
    return lax.bitcast_convert_type(upper, jnp.bfloat16)
