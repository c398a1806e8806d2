"""Exact selection of the largest scores of many arrays, which lie in the rows of one (`rows.Rows`).

The k-th largest of many scores is found by counting, not by sorting. Floats are mapped to
unsigned integers of the same order, and a bracket ``low <= key < high`` around the answer shrinks
eightfold with every pass over the data: each pass counts, per array, the keys at or above seven
pivots. Only those counts leave a device, in one collective a pass, whatever the number of arrays.
A search over 32-bit keys takes at most 11 passes, and ends as soon as a pivot splits off exactly k.
Where equal keys are left that cannot all be taken, they are searched once more, by their index: the same
loop, compiled once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ssam_jax.masks.counts import LARGEST_LEAF, Count
from ssam_jax.masks.rows import Rows

PIVOTS = 7
"""Pivots of one pass, a power of two less one: three bits of the answer. More pivots mean fewer
reads but more comparisons; `benchmarks/selection.py` compares 3, 7 and 15."""


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


class Accounts(NamedTuple):
    """What is to be selected, with a row for each array and a column for each class of its entries.

    Attributes:
      candidates: int32, how many entries there are to choose from.
      weights: what one entry of each array weighs, so that an array weighs less than 2**31.
      budget: the weight to reach; at most that of all candidates. With unit weights it is the number of
        entries marked.
      shared: whether all arrays compete for one budget (every row of ``budget`` is then the same)
        or each has its own.
    """

    candidates: jax.Array
    weights: list[int]
    budget: Count
    shared: bool


def largest(rows: Rows, keys: jax.Array, accounts: Accounts, second: jax.Array | None = None) -> jax.Array:
    """Mark the entries with the largest keys whose weights together just reach a budget.

    Args:
      rows: what the arrays are.
      keys: their rows, unsigned integers below the two largest. An entry of key 0 is no candidate.
      accounts: what to mark.
      second: rows of bool, True for entries that belong to the second class; None if there is one class.

    Returns:
      Rows of bool. Among equal keys those in earlier arrays, and within an array those of lower row-major
      index, are marked first.
    """
    mark = most(keys.dtype) - 1
    weighted = any(weight != 1 for weight in accounts.weights)
    weights = jnp.array(accounts.weights, jnp.int32)[:, None]

    def phase(i: jax.Array, carry: tuple[jax.Array, jax.Array, Count, jax.Array]) -> Any:
        """Search; then make the ties the only keys that differ, in the order in which they are taken."""
        keys, candidates, budget, more = carry
        first = i == 0  # the second time, of indices, each array has its own budget, of entries
        weight = jnp.where(first, weights, 1) if weighted else None
        shared = _Shared.of(len(accounts.weights), first) if accounts.shared else None
        found = _search(_Problem(rows, keys, second, weight, budget, shared), candidates, more)
        tied = found.at_low - found.at_high
        take = _share_out(budget, found, tied, weight, shared)
        low, high = _of_entries(rows, jnp.stack([found.low, found.high], axis=2), second)
        # The zero is of the loop, and keeps what is made of it out of memory.
        order = jnp.uint32(LARGEST_LEAF + 1) - rows.index(i)
        marked = jnp.where(keys >= low, order.astype(keys.dtype), jnp.zeros_like(keys))
        marked = jnp.where(keys >= high, mark, marked)
        at_low, at_high = (x if weight is None else lax.div(x, weight) for x in (found.at_low, found.at_high))
        return marked, at_low, budget.like(at_high + take), jnp.any(at_high + take < at_low)

    start = keys, accounts.candidates, accounts.budget, jnp.array(True)
    return lax.fori_loop(0, 2, phase, start)[0] != 0


def largest_in_groups(keys: jax.Array, n: int, m: int) -> jax.Array:
    """Mark the ``n`` largest of every ``m`` consecutive entries of each row.

    Each entry's rank is counted by comparing it with the ``m`` entries of its group; nothing is
    sorted. Among equal keys the lower index is marked first.

    Args:
      keys: integers of shape (rows, width), where ``m`` divides the width.
      n: entries to mark in each group, 0 to ``m``.
      m: entries in a group.
    """
    grouped = keys.reshape(keys.shape[0], keys.shape[1] // m, m)
    index = lax.broadcasted_iota(jnp.int32, grouped.shape, 2)
    rank = jnp.zeros(grouped.shape, jnp.int32)
    for j in range(m):
        other = lax.slice_in_dim(grouped, j, j + 1, axis=2)
        rank += ((other > grouped) | ((other == grouped) & (j < index))).astype(jnp.int32)
    return (rank < n).reshape(keys.shape)


class _Shared(NamedTuple):
    """Which arrays compete for one budget, as matrices by which counts are added up.

    Attributes:
      everywhere: int32 of shape (arrays, arrays), 1 for those that compete, an array with itself too.
      before: 1 for those that compete, where the second comes before the first.
    """

    everywhere: jax.Array
    before: jax.Array

    @classmethod
    def of(cls, arrays: int, together: jax.Array) -> "_Shared":
        """Return that all arrays compete, or none."""
        row, column = (lax.broadcasted_iota(jnp.int32, (arrays, arrays), axis) for axis in (0, 1))
        return cls(
            ((row == column) | together).astype(jnp.int32), ((column < row) & together).astype(jnp.int32)
        )


class _Problem(NamedTuple):
    """What a search is given.

    Attributes:
      rows: what the arrays are.
      keys: their rows.
      second: which entries belong to the second class; None if there is one class.
      weight: of one entry, int32 of shape (arrays, 1); None if all are 1.
      budget: the weight to reach, of shape (arrays, classes).
      shared: which arrays have one budget; None if each has its own.
    """

    rows: Rows
    keys: jax.Array
    second: jax.Array | None
    weight: jax.Array | None
    budget: Count
    shared: _Shared | None


class _Bracket(NamedTuple):
    """What is known of each account's threshold, of shape (arrays, classes).

    The weight at or above ``low`` reaches the budget, that at or above ``high`` does not. ``exact`` says that
    the former is the budget.
    """

    low: jax.Array
    high: jax.Array
    at_low: jax.Array
    at_high: jax.Array
    exact: jax.Array


def _search(problem: _Problem, candidates: jax.Array, more: jax.Array) -> _Bracket:
    """Shrink the bracket until ``low`` splits off the exact budget or holds a single key.

    Args:
      problem: what is searched.
      candidates: the number of all, int32 of shape (arrays, classes).
      more: a bool, whether there is anything to be found: not if all candidates are wanted.
    """
    rows, keys, _, weight, budget, shared = problem
    dtype, bits = keys.dtype, PIVOTS.bit_length()

    def over_arrays(count: jax.Array) -> Count:
        own = budget.like(count)
        return own if shared is None else own.summed(shared.everywhere)

    def shrink(carry: tuple[_Bracket, jax.Array]) -> tuple[_Bracket, jax.Array]:
        b = _Bracket(*(x[..., None] for x in carry[0]))
        width, part = b.high - b.low, jnp.arange(1, PIVOTS + 1, dtype=dtype)[None, None]
        offset = (width >> bits) * part + ((width & PIVOTS) * part >> bits)  # 1/8 to 7/8 of the width
        pivots = b.low + offset
        found = rows.sums(_count_at_least(problem, pivots))
        found = found if weight is None else found * weight[..., None]
        reached = over_arrays(found)
        wanted = budget.of_pivots()
        enough = reached.at_least(wanted)
        # Counts fall as pivots rise: those of the nearest pivot on either side are the nearest.
        candidates = _Bracket(
            jnp.where(enough, pivots, b.low),
            jnp.where(enough, b.high, pivots),
            jnp.where(enough, found, b.at_low),
            jnp.where(enough, b.at_high, found),
            b.exact | (enough & wanted.at_least(reached)),
        )
        nothing = jnp.zeros((), dtype), most(dtype), jnp.int32(LARGEST_LEAF), jnp.int32(0), jnp.array(False)
        nearest = _Bracket(*lax.reduce(tuple(candidates), nothing, _nearest, (2,)))
        return nearest, jnp.any((nearest.high - nearest.low > 1) & ~nearest.exact)

    shape = candidates.shape
    start = _Bracket(
        jnp.ones(shape, dtype),
        jnp.full(shape, most(dtype), dtype),
        candidates if weight is None else candidates * weight,
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, bool),
    )
    return lax.while_loop(lambda carry: carry[1], shrink, (start, more))[0]


def _nearest(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    ways = jnp.maximum, jnp.minimum, jnp.minimum, jnp.maximum, jnp.logical_or
    return tuple(way(x, y) for way, x, y in zip(ways, a, b))


def most(dtype: Any) -> jax.Array:
    """Return the largest unsigned integer, which is no key."""
    return ~jnp.zeros((), dtype)


def _of_entries(rows: Rows, by_account: jax.Array, second: jax.Array | None) -> list[jax.Array]:
    """Return for each of some values by array and class, (arrays, classes, values), those of all entries."""
    by_row = rows.spread(by_account)
    found = []
    for i in range(by_account.shape[2]):
        value = by_row[:, :1, i]
        found.append(value if second is None else jnp.where(second, by_row[:, 1:, i], value))
    return found


def _count_at_least(problem: _Problem, pivots: jax.Array) -> jax.Array:
    """Count each row's keys at or above each pivot, int32 of shape (rows, classes, pivots), in one pass.

    One reduction with an operand for each pivot reads the keys once; separate sums read them once
    each. Both classes are counted in one number: a row has fewer than 2**16 entries.
    """
    rows, keys, second, *_ = problem
    above = [(keys >= p).astype(jnp.int32) for p in _of_entries(rows, pivots, second)]
    if second is not None:
        above = [jnp.where(second, one << 16, one) for one in above]

    def add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(a, b))

    found = jnp.stack(lax.reduce(tuple(above), (jnp.int32(0),) * len(above), add, (1,)), axis=1)
    return found[:, None] if second is None else jnp.stack([found & 0xFFFF, found >> 16], axis=1)


def _share_out(
    budget: Count,
    bracket: _Bracket,
    ties: jax.Array,
    weight: jax.Array | None,
    shared: "_Shared | None",
) -> jax.Array:
    """Return how many tied entries each account may mark, int32 of shape (arrays, classes), earlier first."""
    spent = budget.like(bracket.at_high)
    if shared is not None:
        spent = spent.summed(shared.everywhere).plus(budget.like(ties).summed(shared.before))
    owed = jnp.minimum(budget.minus(spent).clipped(), ties)
    if weight is None:
        return owed
    return lax.div(owed, weight) + (lax.rem(owed, weight) > 0).astype(jnp.int32)
