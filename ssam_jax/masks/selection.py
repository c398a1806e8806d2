"""Exact selection of the largest scores of many arrays, which lie in the rows of one (`rows.Rows`).

The k-th largest of many scores is found by counting, not by sorting. Floats are mapped to
unsigned integers of the same order, and a bracket ``low <= key < high`` around the answer shrinks
eightfold with every pass over the data: each pass counts, per array, the keys at or above seven
pivots. Only those counts leave a device, in one collective a pass, whatever the number of arrays.
A search over 32-bit keys takes at most 11 passes, and ends as soon as a pivot splits off exactly k.
Where equal keys are left that cannot all be taken, they are searched by the number of their array, and
then by their index in it: the same loop, compiled once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ssam_jax.masks.counts import Count
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
    """What is to be selected. Each account has a row, and a column for each class of its entries.

    Attributes:
      candidates: what all the entries to choose from weigh.
      weights: what one entry of each array weighs, so that an array weighs less than 2**31.
      budget: the weight to reach, at most that of the candidates. With unit weights it is the number of
        entries marked.
      shared: whether all arrays have one account, or each its own.
    """

    candidates: Count
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
    arrays, longest, mark = len(rows.wholes), max(rows.wholes), most(keys.dtype) - 1
    # What entries compete by: their keys, then the number of their array, then their index in it.
    ranges = jnp.array([0, arrays, longest] if accounts.shared else [0, longest], jnp.uint32)

    def phase(i: jax.Array, carry: tuple[jax.Array, Count, jax.Array]) -> Any:
        """Search; then make the ties the only keys that differ, in the order in which they are taken."""
        keys, candidates, more = carry
        high = jnp.where(i == 0, most(keys.dtype), ranges[i].astype(keys.dtype) + 1)
        found = _search(_Problem(rows, keys, second, accounts), candidates, high, more)
        exact = accounts.budget.at_least(found.at_low)
        # The zero is of the loop, and keeps what is made of it out of memory.
        order = jnp.uint32(longest) - rows.index(jnp.minimum(i, 0))
        if accounts.shared:
            order = jnp.where(i == 0, rows.order()[:, None], order)
        chosen = jnp.where(exact | (i == len(ranges) - 1), found.low, found.high)
        low, surely = _of_entries(accounts, rows, jnp.stack([found.low, chosen], axis=2), second)
        marked = jnp.where(keys >= low, order.astype(keys.dtype), jnp.zeros_like(keys))
        return jnp.where(keys >= surely, mark, marked), found.at_low, ~jnp.all(exact)

    start = keys, accounts.candidates, jnp.array(True)
    return lax.fori_loop(0, len(ranges), phase, start)[0] == mark


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


class _Problem(NamedTuple):
    """What a search is given.

    Attributes:
      rows: what the arrays are.
      keys: their rows.
      second: which entries belong to the second class; None if there is one class.
      accounts: what to mark.
    """

    rows: Rows
    keys: jax.Array
    second: jax.Array | None
    accounts: Accounts


class _Bracket(NamedTuple):
    """What is known of each account's threshold, of shape (accounts, classes).

    The weight at or above ``low``, which is ``at_low``, reaches the budget; that at or above ``high`` does
    not.
    """

    low: jax.Array
    high: jax.Array
    at_low: Count


def _search(problem: _Problem, candidates: Count, high: jax.Array, more: jax.Array) -> _Bracket:
    """Shrink the bracket until ``low`` splits off the exact budget or holds a single key.

    Args:
      problem: what is searched.
      candidates: the weight of all entries whose key is not 0.
      high: a key above all those that are not marked yet.
      more: a bool, whether there is anything to be found: not if all candidates are wanted.
    """
    dtype, bits = problem.keys.dtype, PIVOTS.bit_length()
    budget = problem.accounts.budget

    def shrink(carry: tuple[_Bracket, jax.Array]) -> tuple[_Bracket, jax.Array]:
        low, high = (x[..., None] for x in carry[0][:2])
        width, part = high - low, jnp.arange(1, PIVOTS + 1, dtype=dtype)[None, None]
        pivots = low + (width >> bits) * part + ((width & PIVOTS) * part >> bits)  # 1/8 to 7/8 of the width
        reached = _weight_at_least(problem, pivots)
        enough = reached.at_least(budget.of_pivots())
        nearest = _nearest(
            _Bracket(
                jnp.where(enough, pivots, low),
                jnp.where(enough, high, pivots),
                carry[0].at_low.of_pivots().where(enough, reached),
            )
        )
        exact = budget.at_least(nearest.at_low)
        return nearest, jnp.any((nearest.high - nearest.low > 1) & ~exact)

    shape = candidates.low.shape
    start = _Bracket(jnp.ones(shape, dtype), jnp.full(shape, high), candidates)
    return lax.while_loop(lambda carry: carry[1], shrink, (start, more))[0]


def _nearest(brackets: _Bracket) -> _Bracket:
    """Return the narrowest bracket along the last axis."""
    leaves, treedef = jax.tree.flatten(brackets)

    def narrower(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        at_low = (jnp.where(a[0] >= b[0], x, y) for x, y in zip(a[2:], b[2:]))
        return jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1]), *at_low

    dtype = brackets.low.dtype
    nothing = jnp.zeros((), dtype), most(dtype), *(jnp.int32(0) for _ in leaves[2:])
    found: _Bracket = jax.tree.unflatten(treedef, lax.reduce(tuple(leaves), nothing, narrower, (2,)))
    return found


def most(dtype: Any) -> jax.Array:
    """Return the largest unsigned integer, which is no key."""
    return ~jnp.zeros((), dtype)


def _of_entries(
    accounts: Accounts, rows: Rows, by_account: jax.Array, second: jax.Array | None
) -> list[jax.Array]:
    """Return some values by account and class, (accounts, classes, values), each for all entries."""
    by_row = by_account if accounts.shared else rows.spread(by_account)
    found = []
    for i in range(by_account.shape[2]):
        value = by_row[:, :1, i]
        found.append(value if second is None else jnp.where(second, by_row[:, 1:, i], value))
    return found


def _weight_at_least(problem: _Problem, pivots: jax.Array) -> Count:
    """Return what the entries weigh that are at or above each pivot, of shape (accounts, classes, pivots)."""
    by_row, accounts = _count_at_least(problem, pivots), problem.accounts
    return by_account(problem.rows, by_row, accounts.weights, accounts.budget, shared=accounts.shared)


def by_account(rows: Rows, by_row: jax.Array, weights: list[int], kind: Count, *, shared: bool) -> Count:
    """Add up counts of rows, int32 of shape (rows, ...), by account, as weights: of shape (accounts, ...).

    Args:
      rows: what the arrays are.
      by_row: the counts.
      weights: what one entry of each array weighs.
      kind: a count of the kind to return.
      shared: whether all arrays have one account.
    """
    weighted = any(weight != 1 for weight in weights)
    if shared and not weighted and kind.high is None:
        return Count(None, rows.total(by_row)[None])
    found = rows.sums(by_row)
    if weighted:
        found *= jnp.array(weights, jnp.int32).reshape(-1, *[1] * (found.ndim - 1))
    each = kind.like(found)
    return each.total() if shared else each


def _count_at_least(problem: _Problem, pivots: jax.Array) -> jax.Array:
    """Count each row's keys at or above each pivot, int32 of shape (rows, classes, pivots), in one pass.

    One reduction with an operand for each pivot reads the keys once; separate sums read them once
    each. Both classes are counted in one number: a row has fewer than 2**16 entries.
    """
    rows, keys, second, accounts = problem
    above = [(keys >= p).astype(jnp.int32) for p in _of_entries(accounts, rows, pivots, second)]
    if second is not None:
        above = [jnp.where(second, one << 16, one) for one in above]

    def add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(a, b))

    found = jnp.stack(lax.reduce(tuple(above), (jnp.int32(0),) * len(above), add, (1,)), axis=1)
    return found[:, None] if second is None else jnp.stack([found & 0xFFFF, found >> 16], axis=1)
