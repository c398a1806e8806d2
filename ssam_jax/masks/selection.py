"""Exact selection of the largest scores in a list of arrays that nobody may concatenate.

The k-th largest of many scores is found by counting, not by sorting. Floats are mapped to
unsigned integers of the same order, and a bracket ``low <= key < high`` around the answer shrinks
eightfold with every pass over the data: each pass counts, per array, the keys at or above seven
pivots. Only those counts leave an array, so arrays may live anywhere and on any number of devices.
A search over 32-bit keys takes at most 12 passes, and ends as soon as a pivot splits off exactly k.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

PIVOTS = 7
"""Pivots of one pass, a power of two less one: three bits of the answer. More pivots mean fewer
reads but more comparisons; `benchmarks/selection.py` compares 3, 7 and 15."""

LARGEST_LEAF = 2**31 - 1
"""Counts within one array are int32; counts over several arrays may exceed it (see `Count`)."""


def ordered_keys(scores: jax.Array) -> jax.Array:
    """Map floats of shape (...) to unsigned integers that compare as the floats do.

    The two zeros are equal, NaN of either sign is lowest, and subnormals keep their order even
    where the hardware flushes them, because only integers are compared. No key is 0 or the largest
    integer. Half-precision floats become uint32 keys that compare with those of float32.
    """
    if scores.dtype == jnp.bfloat16:  # the upper half of a float32; a cast could flush subnormals
        bits = lax.bitcast_convert_type(scores, jnp.uint16).astype(jnp.uint32) << 16
    elif scores.dtype == jnp.float64:
        bits = lax.bitcast_convert_type(scores, jnp.uint64)
    else:
        bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    width = 8 * bits.dtype.itemsize
    sign = jnp.array(1 << (width - 1), bits.dtype)
    infinity = {32: 0x7F80_0000, 64: 0x7FF0_0000_0000_0000}[width]
    magnitude = bits & ~sign
    keys = jnp.where((bits & sign) != 0, ~bits, bits | sign)
    keys = jnp.where(magnitude == 0, sign, keys)
    return jnp.where(magnitude > jnp.array(infinity, bits.dtype), jnp.ones_like(keys), keys)


def comparable_keys(scores: list[jax.Array]) -> list[jax.Array]:
    """Return the `ordered_keys` of several arrays, all of the width of the widest."""
    if any(leaf.dtype == jnp.float64 for leaf in scores):
        scores = [leaf.astype(jnp.float64) for leaf in scores]
    return [ordered_keys(leaf) for leaf in scores]


def largest(
    keys: list[jax.Array],
    weights: list[int],
    budget: "Count",
    *,
    shared: bool,
) -> list[jax.Array]:
    """Mark the entries with the largest keys whose weights together just reach a budget.

    Args:
      keys: unsigned integer arrays of one dtype and any shapes. An entry of key 0 is no candidate.
      weights: what one entry of each array weighs, so that an array weighs less than 2**31.
      budget: the weight to reach, for each array a row; at most that of all candidates. With unit
        weights it is the number of entries marked.
      shared: whether all arrays compete for one budget (every row of ``budget`` is then the same)
        or each has its own.

    Returns:
      bool arrays of the shapes of ``keys``. Among equal keys those in earlier arrays, and within an
      array those of lower row-major index, are marked first.
    """
    if not keys:
        return []
    if max(k.size * weight for k, weight in zip(keys, weights)) > LARGEST_LEAF:
        raise ValueError(
            f"cannot count in a leaf of more than {LARGEST_LEAF} entries; split it, for instance by layer."
        )
    bracket = _search(keys, weights, budget, shared=shared)
    rows = [(bracket.low[i], bracket.high[i]) for i in range(len(keys))]
    tied = [(k >= low) & (k < high) for k, (low, high) in zip(keys, rows)]
    ties = bracket.at_low - bracket.at_high
    take = _share_out(budget, bracket, ties, weights, shared=shared)

    def break_ties() -> list[jax.Array]:
        order = [jnp.where(t, _reversed_index(t.shape), jnp.uint32(0)) for t in tied]
        units = _search(order, [1] * len(keys), Count.of(take), shared=False)
        return [o >= low for o, low in zip(order, units.low)]

    weight = jnp.array(weights, jnp.int32)
    chosen = lax.cond(jnp.any(take * weight < ties), break_ties, lambda: tied)
    return [(k >= high) | c for k, (_, high), c in zip(keys, rows, chosen)]


def largest_in_groups(scores: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Mark the ``n`` largest of every ``m`` consecutive entries along ``axis``.

    Each entry's rank is counted by comparing it with the ``m`` entries of its group; nothing is
    sorted and no axis is moved. Among equal scores the lower index is marked first.

    Args:
      scores: floats of shape (..., size, ...), where ``m`` divides ``size``.
      n: entries to mark in each group, 0 to ``m``.
      m: entries in a group.
      axis: the axis along which entries are grouped.

    Returns:
      A bool array of the shape of ``scores``.
    """
    axis = axis % scores.ndim
    grouped = (*scores.shape[:axis], scores.shape[axis] // m, m, *scores.shape[axis + 1 :])
    keys = ordered_keys(scores).reshape(grouped)
    index = lax.broadcasted_iota(jnp.int32, grouped, axis + 1)
    rank = jnp.zeros(grouped, jnp.int32)
    for j in range(m):
        other = lax.slice_in_dim(keys, j, j + 1, axis=axis + 1)
        rank += ((other > keys) | ((other == keys) & (j < index))).astype(jnp.int32)
    return (rank < n).reshape(scores.shape)


class Count(NamedTuple):
    """Non-negative integers as two int32 limbs, ``high * 2**16 + low``, exact up to 2**46.

    Models have more parameters than int32 can count, and 64-bit integers are off by default.

    Attributes:
      high: int32, the count divided by 2**16.
      low: int32, the remainder, 0 to 2**16 - 1.
    """

    high: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, count: jax.Array) -> "Count":
        """Split int32 counts of any shape."""
        return cls(count >> 16, count & 0xFFFF)

    @classmethod
    def static(cls, counts: list[int]) -> "Count":
        """Split Python integers, one for each row."""
        high, low = [c >> 16 for c in counts], [c & 0xFFFF for c in counts]
        return cls(jnp.array(high, jnp.int32), jnp.array(low, jnp.int32))

    @classmethod
    def rounded(cls, value: jax.Array) -> "Count":
        """Split non-negative floats, rounded to the nearest integer, halves to even."""
        value = jnp.round(value)
        high = jnp.floor(value / 2**16)
        return cls(high.astype(jnp.int32), (value - high * 2**16).astype(jnp.int32))

    def total(self) -> "Count":
        """Add up along the first axis, which is kept, every row holding the sum."""
        low = jnp.sum(self.low, axis=0, keepdims=True, dtype=jnp.int32)
        high = jnp.sum(self.high, axis=0, keepdims=True, dtype=jnp.int32) + (low >> 16)
        return Count(*(jnp.broadcast_to(x, self.low.shape) for x in (high, low & 0xFFFF)))

    def total_before(self) -> "Count":
        """Add up the rows before each row."""
        low = jnp.cumsum(self.low, dtype=jnp.int32) - self.low
        high = jnp.cumsum(self.high, dtype=jnp.int32) - self.high
        return Count(high + (low >> 16), low & 0xFFFF)

    def plus(self, other: "Count") -> "Count":
        """Add."""
        low = self.low + other.low
        return Count(self.high + other.high + (low >> 16), low & 0xFFFF)

    def minus(self, other: "Count") -> "Count":
        """Subtract, stopping at 0."""
        low = self.low - other.low
        difference = Count(self.high - other.high + (low >> 16), low & 0xFFFF)
        return Count(*(jnp.where(self.at_least(other), x, 0) for x in difference))

    def at_least(self, other: "Count") -> jax.Array:
        """Compare entry by entry."""
        return (self.high > other.high) | ((self.high == other.high) & (self.low >= other.low))

    def clipped(self) -> jax.Array:
        """Return int32, counts above its range replaced by its largest value."""
        return jnp.where(self.high < 2**15, self.high * 2**16 + self.low, LARGEST_LEAF)

    def as_float(self) -> jax.Array:
        """Return float32, rounded."""
        return self.high.astype(jnp.float32) * 2**16 + self.low.astype(jnp.float32)

    def minimum(self, other: "Count") -> "Count":
        """Return the smaller, entry by entry."""
        smaller = other.at_least(self)
        return Count(*(jnp.where(smaller, a, b) for a, b in zip(self, other)))


class _Bracket(NamedTuple):
    """What is known of each array's threshold, with a row for each array.

    The weight at or above ``low`` reaches the budget, that at or above ``high`` does not.
    """

    low: jax.Array
    high: jax.Array
    at_low: jax.Array
    at_high: jax.Array


def _search(keys: list[jax.Array], weights: list[int], budget: Count, *, shared: bool) -> _Bracket:
    """Shrink the bracket until ``low`` splits off the exact budget or holds a single key."""
    weight = jnp.array(weights, jnp.int32)

    def over_arrays(count: jax.Array) -> Count:
        return Count.of(count).total() if shared else Count.of(count)

    def open_rows(b: _Bracket) -> jax.Array:
        exact = budget.at_least(over_arrays(b.at_low))
        return (b.high - b.low > 1) & ~exact

    def shrink(b: _Bracket) -> _Bracket:
        width, part = b.high - b.low, jnp.arange(1, PIVOTS + 1, dtype=b.low.dtype)
        quotient, remainder = width // (PIVOTS + 1), width % (PIVOTS + 1)
        offset = quotient[:, None] * part[None] + remainder[:, None] * part[None] // (PIVOTS + 1)
        pivots = b.low[:, None] + offset
        found = jnp.stack([_count_at_least(k, p) for k, p in zip(keys, pivots)]) * weight[:, None]
        enough = over_arrays(found).at_least(Count(budget.high[:, None], budget.low[:, None]))
        # Counts fall as pivots rise, so the best pivot on either side has the best count too.
        return _Bracket(
            jnp.maximum(b.low, jnp.max(jnp.where(enough, pivots, 0), axis=1)),
            jnp.minimum(b.high, jnp.min(jnp.where(enough, b.high[:, None], pivots), axis=1)),
            jnp.minimum(b.at_low, jnp.min(jnp.where(enough, found, LARGEST_LEAF), axis=1)),
            jnp.maximum(b.at_high, jnp.max(jnp.where(enough, 0, found), axis=1)),
        )

    start = _whole_range(keys, weight, budget, shared=shared)
    return lax.while_loop(lambda b: jnp.any(open_rows(b)), shrink, start)


def _whole_range(keys: list[jax.Array], weight: jax.Array, budget: Count, *, shared: bool) -> _Bracket:
    """Return the bracket of all candidates, and an empty one where the budget is 0."""
    least, most, candidates = (jnp.stack(x) for x in zip(*map(_range, keys)))
    if shared:
        least = jnp.broadcast_to(jnp.min(least), least.shape)
        most = jnp.broadcast_to(jnp.max(most), most.shape)
    nothing = (budget.high == 0) & (budget.low == 0)
    zero = jnp.zeros_like(candidates)
    return _Bracket(
        jnp.where(nothing, most + 1, least),
        most + 1,
        jnp.where(nothing, zero, candidates * weight),
        zero,
    )


def _range(keys: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the smallest and the largest non-zero key and how many there are, in one pass."""
    zero = jnp.zeros((), keys.dtype)
    top = ~zero
    return lax.reduce(
        (jnp.where(keys == 0, top, keys), keys, (keys != 0).astype(jnp.int32)),
        (top, zero, jnp.int32(0)),
        lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1]), a[2] + b[2]),
        tuple(range(keys.ndim)),
    )


def _count_at_least(keys: jax.Array, pivots: jax.Array) -> jax.Array:
    """Count the keys at or above each pivot, int32 of shape (pivots,), in one pass.

    One reduction with an operand for each pivot reads the keys once; separate sums read them once
    each, and XLA's CPU backend vectorises this form alone (`benchmarks/selection.py`).
    """
    above = tuple((keys >= pivot).astype(jnp.int32) for pivot in pivots)

    def add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(a, b))

    counts: tuple[jax.Array, ...] = lax.reduce(
        above, (jnp.int32(0),) * len(above), add, tuple(range(keys.ndim))
    )
    return jnp.stack(counts)


def _share_out(
    budget: Count, bracket: _Bracket, ties: jax.Array, weights: list[int], *, shared: bool
) -> jax.Array:
    """Return how many tied entries each array may mark, int32 of shape (arrays,), earlier first."""
    spent = Count.of(bracket.at_high)
    if shared:
        spent = spent.total().plus(Count.of(ties).total_before())
    owed = budget.minus(spent).clipped()
    return _ceil_div(jnp.minimum(owed, ties), jnp.array(weights, jnp.int32))


def _ceil_div(a: jax.Array, b: jax.Array) -> jax.Array:
    """Divide non-negative int32, rounding up, without overflow."""
    return a // b + (a % b > 0).astype(jnp.int32)


def _reversed_index(shape: tuple[int, ...]) -> jax.Array:
    """Return ``size - i`` at row-major index ``i``, uint32: a key that is larger for lower indices.

    Built from one iota an axis, so that a sharded array needs no reshape.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(math.prod(shape[i + 1 :]) for i in range(len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return jnp.uint32(math.prod(shape)) - index
