"""Exact counts of more than int32 can hold."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LARGEST_LEAF = 2**31 - 1
"""Counts within one array are int32; counts over several arrays may exceed it (see `Count`)."""


class Count(NamedTuple):
    """Non-negative integers as two int32 limbs, ``high * 2**16 + low``, exact up to 2**46.

    Models may have more parameters than int32 can count, and 64-bit integers are off by default. Those that
    have no more are counted in ``low`` alone, with half the operations.

    Attributes:
      high: int32, the count divided by 2**16; None for counts within int32.
      low: int32, the remainder, 0 to 2**16 - 1; or the count.
    """

    high: jax.Array | None
    low: jax.Array

    @classmethod
    def of(cls, count: jax.Array) -> "Count":
        """Split int32 counts of any shape."""
        return cls(count >> 16, count & 0xFFFF)

    @classmethod
    def static(cls, counts: Any, most: int) -> "Count":
        """Take Python integers, whose sums, and those of what is compared with them, are at most ``most``."""
        known = np.array(counts, np.int64)
        if most <= LARGEST_LEAF:
            return cls(None, jnp.asarray(known.astype(np.int32)))
        return cls(*(jnp.asarray(x.astype(np.int32)) for x in (known >> 16, known & 0xFFFF)))

    def like(self, count: jax.Array) -> "Count":
        """Take int32 counts as this one is kept."""
        return Count(None, count) if self.high is None else Count.of(count)

    def rounded(self, value: jax.Array) -> "Count":
        """Take non-negative floats, rounded to the nearest integer, halves to even, as this count is kept."""
        value = jnp.round(value)
        if self.high is None:
            return Count(None, value.astype(jnp.int32))
        high = jnp.floor(value / 2**16)
        return Count(high.astype(jnp.int32), (value - high * 2**16).astype(jnp.int32))

    def total(self) -> "Count":
        """Add up along the first axis, which is kept: as a product, which needs no kernel of its own."""
        ones = jnp.ones((1, len(self.low)), jnp.int32)
        low = jnp.tensordot(ones, self.low, axes=1)
        if self.high is None:
            return Count(None, low)
        return Count(jnp.tensordot(ones, self.high, axes=1) + (low >> 16), low & 0xFFFF)

    def minus(self, other: "Count") -> "Count":
        """Subtract, stopping at 0."""
        low = self.low - other.low
        if self.high is None or other.high is None:
            return Count(None, jnp.maximum(low, 0))
        enough = self.at_least(other)
        high = self.high - other.high + (low >> 16)
        return Count(jnp.where(enough, high, 0), jnp.where(enough, low & 0xFFFF, 0))

    def at_least(self, other: "Count") -> jax.Array:
        """Compare entry by entry."""
        if self.high is None or other.high is None:
            return self.low >= other.low
        return (self.high > other.high) | ((self.high == other.high) & (self.low >= other.low))

    def as_float(self) -> jax.Array:
        """Return float32, rounded."""
        low = self.low.astype(jnp.float32)
        return low if self.high is None else self.high.astype(jnp.float32) * 2**16 + low

    def minimum(self, other: "Count") -> "Count":
        """Return the smaller, entry by entry."""
        return other.where(other.at_least(self), self)

    def of_pivots(self) -> "Count":
        """Return the count with a last axis, along which it is the same for all."""
        return Count(None if self.high is None else self.high[..., None], self.low[..., None])

    def column(self, i: int) -> "Count":
        """Return a column."""
        return Count(None if self.high is None else self.high[:, i], self.low[:, i])

    def beside(self, other: "Count") -> "Count":
        """Return both as the columns of one."""
        low = jnp.stack([self.low, other.low], axis=1)
        if self.high is None or other.high is None:
            return Count(None, low)
        return Count(jnp.stack([self.high, other.high], axis=1), low)

    def where(self, replace: jax.Array, other: "Count") -> "Count":
        """Return this count, and another where it is to be replaced."""
        low = jnp.where(replace, other.low, self.low)
        if self.high is None or other.high is None:
            return Count(None, low)
        return Count(jnp.where(replace, other.high, self.high), low)
