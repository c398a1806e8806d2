"""A random choice of exactly so many entries, without a search: the first of a random order.

The order is a permutation of the entries' numbers that each entry computes for itself. Numbers are written as
``high * base + low``; in turn a hash of the one is added to the other, each within its range, which can be
undone and so maps no two numbers to the same (a Feistel network: M. Luby and C. Rackoff, SIAM Journal on
Computing 17, 1988). The ranges have a few more numbers than there are entries; those
are passed over when the first k are counted.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ssam_jax.masks import hashing
from ssam_jax.masks.rows import Rows

ROUNDS = 11
"""Additions. With seven, the entries of a leaf of ten are drawn in pairs more often than by lot."""

BASE_BITS = 5
"""Of the base at most, so that fewer than 32 numbers belong to no entry."""

LARGEST = 2**31
"""Entries that are put in one order at most: their places are uint32."""


def first(rows: Rows, key_data: jax.Array, kept: list[int], *, shared: bool) -> jax.Array:
    """Return rows of bool that are True for a random choice of entries.

    Args:
      rows: what the arrays are.
      key_data: of a key.
      kept: how many to choose of each array, or in its only number of all, `LARGEST` at most.
      shared: whether it is of all.
    """
    sizes = [sum(rows.wholes)] if shared else rows.wholes
    bits = np.array([min(BASE_BITS, size.bit_length() // 2) for size in sizes], np.uint32)
    highs = np.array([max(1, -(-size >> int(b))) for size, b in zip(sizes, bits)], np.uint32)
    salt, _ = hashing.salts(key_data, len(sizes))
    salts = [hashing.mixed(salt + np.uint32(i)) for i in range(ROUNDS)]
    ends = _ends(np.array(sizes, np.uint32), np.array(kept, np.uint32), bits, highs, salts)

    def of_rows(by_account: np.ndarray | jax.Array) -> jax.Array:
        x = jnp.asarray(by_account)
        return (x if shared else rows.spread(x))[:, None]

    number = rows.index()
    if shared:
        earlier = np.cumsum([0, *rows.wholes[:-1]]).astype(np.uint32)
        number += rows.spread(jnp.asarray(earlier))[:, None]
    place = _place(number, of_rows(bits), of_rows(highs), [of_rows(x) for x in salts])
    return (place < of_rows(ends)) & rows.filled()


def _place(number: jax.Array, bits: jax.Array, highs: jax.Array, salts: list[jax.Array]) -> jax.Array:
    """Return the places of numbers in the order, uint32; ``highs`` is how many values ``high`` has."""
    mask = (np.uint32(1) << bits) - np.uint32(1)
    high, low = number >> bits, number & mask
    for i, salt in enumerate(salts):
        if i % 2:
            low = (low + hashing.mixed(high ^ salt)) & mask
        else:
            share = (hashing.mixed(low ^ salt) >> np.uint32(8)).astype(jnp.float32) * np.float32(2**-24)
            high += jnp.minimum((share * highs.astype(jnp.float32)).astype(jnp.uint32), highs - np.uint32(1))
            high = jnp.where(high >= highs, high - highs, high)
    return (high << bits) | low


def _ends(
    sizes: np.ndarray, kept: np.ndarray, bits: np.ndarray, highs: np.ndarray, salts: list[jax.Array]
) -> jax.Array:
    """Return before which place just as many entries lie as are kept, uint32 of shape (accounts,)."""
    limits = highs << bits
    spare = np.arange(max(1, (limits - sizes).max()), dtype=np.uint32)
    number = sizes[:, None] + spare[None]
    columns = jnp.asarray(bits)[:, None], jnp.asarray(highs)[:, None]
    place = _place(jnp.asarray(number), *columns, [x[:, None] for x in salts])
    place = jnp.where(number < limits[:, None], place, np.uint32(2**32 - 1))
    passed_over = jnp.sum(place[:, None, :] < place[:, :, None], axis=2, dtype=jnp.uint32)
    before = place - passed_over < kept[:, None]
    return jnp.asarray(kept) + jnp.sum(before, axis=1, dtype=jnp.uint32)
