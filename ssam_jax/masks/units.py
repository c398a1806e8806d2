"""Masks of units: how the entries of a leaf form units, and which of them are the best or are drawn."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ssam_jax._base import trees
from ssam_jax.masks import packing, selection, shuffling
from ssam_jax.masks.counts import LARGEST_LEAF, Count
from ssam_jax.masks.rows import Rows
from ssam_jax.masks.shards import Here, Lie, Part, Shape, by_part


class Units(NamedTuple):
    """How the entries of a leaf form units.

    Attributes:
      whole: the leaf's shape.
      extents: how far a unit reaches along each axis.
      mask: the shape of a mask: the leaf's, or that of the units, or a scalar's for a single one.
    """

    whole: Shape
    extents: Shape
    mask: Shape

    @property
    def shape(self) -> Shape:
        """The shape of an array of the units, an axis for each of the leaf's."""
        return tuple(-(-size // extent) for size, extent in zip(self.whole, self.extents))

    @property
    def size(self) -> int:
        """How many entries a unit has."""
        return max(1, math.prod(self.extents))

    @property
    def tiles(self) -> Shape:
        """How far a unit reaches in a mask."""
        return self.extents if self.mask == self.whole else (1,) * len(self.mask)

    @property
    def packs_in_rows(self) -> bool:
        """Whether units are entries, and their mask is packed along its last axis."""
        return self.size == 1 and packing.runs_along_rows(self.mask)

    def lie(self) -> Lie:
        """Return how the leaf is to lie: with whole units on a device, but for those as long as an axis."""
        grain = (1 if extent == size else extent for extent, size in zip(self.extents, self.whole))
        return Lie(self.whole, None, tuple(grain))


def best(leaves: list[jax.Array], units: list[Units], sparsity: float, *, shared: bool) -> list[jax.Array]:
    """Return masks of the units with the best mean scores."""
    if nothing(units):
        return [jnp.zeros(u.mask, bool) for u in units]
    check_countable(units)

    def local(here: Here, leaves: list[jax.Array]) -> list[jax.Array]:
        rows = Rows(here, [part.coarser(u.extents) for part, u in zip(here.inputs, units)])
        keys = keys_of(rows, means(here, leaves, units))
        chosen = selection.largest(rows, keys, _accounts(units, sparsity, shared=shared))
        return expanded(rows, chosen, keys, units)

    inputs = [u.lie() for u in units]
    outputs = [Lie(u.mask, i) for i, u in enumerate(units)]
    return by_part(local, leaves, inputs, outputs)


def best_entries(
    leaves: list[jax.Array], old: list[jax.Array], units: list[Units], sparsity: float, *, shared: bool
) -> tuple[list[jax.Array], jax.Array]:
    """Return what `best` does where units are entries, as `refreshed` returns it."""

    def choose(rows: Rows, words: jax.Array) -> tuple[jax.Array, jax.Array]:
        del words
        keys = keys_of(rows, leaves)
        return selection.largest(rows, keys, _accounts(units, sparsity, shared=shared)), keys

    return refreshed(old, units, choose)


def refreshed(
    old: list[jax.Array],
    units: list[Units],
    choose: Callable[[Rows, jax.Array], tuple[jax.Array, jax.Array]],
) -> tuple[list[jax.Array], jax.Array]:
    """Return masks where units are entries, packed as the old ones are, and the churn.

    On a single device, where it takes fewer kernels than masks of bools.

    Args:
      old: the masks, packed.
      units: what the entries of each leaf form.
      choose: given the rows of the leaves and the packed rows of the old masks, it returns rows of bool, of
        the entries chosen, and any integers that the compiler does not know.
    """
    if nothing(units):
        return old, jnp.zeros((), jnp.float32)
    check_countable(units)
    rows = Rows(Here([], [], ()), [Part.of(u.whole, None) for u in units])
    before = rows.joined_words(packing.unpack_but_rows(old))
    chosen, numbers = choose(rows, before)
    after = packing.pack_rows(chosen)
    new = rows.parted(chosen, unknown(numbers), after, list(map(packing.packed_along_rows, old)))
    return packing.pack_like(new, old), packing.churn_of_rows(before, after)


def drawn(
    key: jax.Array,
    units: list[Units],
    sparsity: float,
    *,
    shared: bool,
    packed: bool = False,
) -> list[jax.Array]:
    """Return masks of random units.

    Args:
      key: a typed key.
      units: what the entries of each leaf form.
      sparsity: the share of entries that are not kept.
      shared: whether the leaves compete for one budget.
      packed: on a single device, whether to return masks of entries packed where that is along the last axis.
    """
    if nothing(units):
        return [jnp.zeros(u.mask, bool) for u in units]
    check_countable(units)

    def local(here: Here, leaves: list[jax.Array], key_data: jax.Array) -> list[jax.Array]:
        del leaves
        rows = Rows(here, [part.coarser(u.tiles) for part, u in zip(here.outputs, units)])
        chosen, numbers = _drawn(rows, units, sparsity, key_data, shared=shared)
        return expanded(rows, chosen, numbers, units, packed=packed)

    outputs = [Lie(u.mask, None, u.tiles) for u in units]
    return by_part(local, [], [], outputs, jax.random.key_data(key))


def drawn_entries(
    key: jax.Array, old: list[jax.Array], units: list[Units], sparsity: float, *, shared: bool
) -> tuple[list[jax.Array], jax.Array]:
    """Return what `drawn` does where units are entries, as `refreshed` returns it."""
    key_data = jax.random.key_data(key)
    return refreshed(old, units, lambda rows, words: _drawn(rows, units, sparsity, key_data, shared=shared))


def _drawn(
    rows: Rows, units: list[Units], sparsity: float, key_data: jax.Array, *, shared: bool
) -> tuple[jax.Array, jax.Array]:
    """Return rows of the units drawn, and integers that the compiler does not know."""
    sizes = _sizes(units, shared=shared)
    if all(u.size == 1 for u in units) and max(sizes) <= shuffling.LARGEST:
        kept = [round((1 - sparsity) * size) for size in sizes]
        chosen, _ = computed_once(shuffling.first(rows, key_data, kept, shared=shared), key_data)
        return chosen, key_data
    keys = random_keys(rows, key_data)
    return selection.largest(rows, keys, _accounts(units, sparsity, shared=shared)), keys


def nothing(units: Sequence[Units]) -> bool:
    """Whether there is nothing to choose: no leaf, or empty ones alone."""
    return not any(math.prod(u.whole) for u in units)


def check_countable(units: Sequence[Units]) -> None:
    """Raise ValueError if a leaf has too many entries."""
    if max(math.prod(u.whole) for u in units) > LARGEST_LEAF:
        raise ValueError(
            f"cannot count in a leaf of more than {LARGEST_LEAF} entries; split it, for instance by layer."
        )


def _accounts(units: list[Units], sparsity: float, *, shared: bool) -> selection.Accounts:
    sizes = _sizes(units, shared=shared)
    kept = [[round((1 - sparsity) * size)] for size in sizes]
    candidates, budget = (Count.static(x, sum(sizes)) for x in ([[size] for size in sizes], kept))
    return selection.Accounts(candidates, [u.size for u in units], budget, shared)


def _sizes(units: list[Units], *, shared: bool) -> list[int]:
    """Return the number of entries of each account."""
    each = [math.prod(u.whole) for u in units]
    return [sum(each)] if shared else each


def keys_of(rows: Rows, scores: list[jax.Array], *, sizes: bool = False) -> jax.Array:
    """Return the rows of the keys of scores, or of their sizes, 0 where they are padded."""
    keys = unpadded_keys(rows, scores, sizes=sizes)
    return jnp.where(rows.filled(), keys, jnp.zeros_like(keys))


def unpadded_keys(rows: Rows, scores: list[jax.Array], *, sizes: bool = False) -> jax.Array:
    """Return the rows of the keys of scores, or of their sizes, any keys where they are padded."""
    if len({score.dtype for score in scores}) == 1:
        joined = rows.joined(scores)
        return selection.ordered_keys(jnp.abs(joined) if sizes else joined)
    return rows.joined(selection.comparable_keys([jnp.abs(x) for x in scores] if sizes else scores))


def unknown(x: jax.Array) -> jax.Array:
    """Return a True that the compiler does not know, of an array of integers: no odd number is 0."""
    return (x.reshape(-1)[0] | 1) != 0 if x.size else jnp.array(True)


def computed_once(chosen: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return rows that are not computed in a kernel for each shape of leaf, and `unknown` of the numbers.

    They come out of a conditional, whose predicate is true.
    """
    true = unknown(numbers)
    return lax.cond(true, lambda x: x, jnp.logical_not, chosen), true


def random_keys(rows: Rows, key_data: jax.Array) -> jax.Array:
    """Return rows of random keys, 0 where they are padded."""
    keys = jnp.clip(rows.bits(key_data), jnp.uint32(1), jnp.uint32(2**32 - 3))
    return jnp.where(rows.filled(), keys, jnp.uint32(0))


def means(here: Here, leaves: list[jax.Array], units: Sequence[Units]) -> list[jax.Array]:
    """Return the mean score of each unit of which a device holds entries; entries are left as they are.

    Units spread over devices are added up in one sum over all of them.
    """
    spread = [
        any(part.local[axis] < extent for axis, extent in enumerate(u.extents))
        for part, u in zip(here.inputs, units)
    ]
    found = [_mean(leaf, u, spread=s) for leaf, u, s in zip(leaves, units, spread)]
    open_sums = [i for i, s in enumerate(spread) if s]
    if open_sums:
        wide = trees.wide_dtype(*(found[i] for i in open_sums))
        sums = [_in_its_place(here, here.inputs[i], units[i], found[i].astype(wide)) for i in open_sums]
        total = here.total(jnp.concatenate([x.reshape(-1) for x in sums]))
        ends = 0
        for i, x in zip(open_sums, sums):
            whole = total[ends : ends + x.size].reshape(x.shape)
            part = here.inputs[i].coarser(units[i].extents)
            mine = lax.dynamic_slice(whole, list(here.mine(part.starts)), part.local)
            found[i] = (mine / units[i].size).astype(found[i].dtype)
            ends += x.size
    return found


def _mean(leaf: jax.Array, unit: Units, *, spread: bool) -> jax.Array:
    """Return the mean of each unit, or their sums where other devices hold the rest."""
    if unit.size == 1:
        return leaf
    leaf = trees.widened(leaf)
    reach = [min(extent, size) for extent, size in zip(unit.extents, leaf.shape)]
    split = [n for size, extent in zip(leaf.shape, reach) for n in (size // extent, extent)]
    within = tuple(range(1, len(split), 2))
    tiles = leaf.reshape(split)
    return jnp.sum(tiles, axis=within) if spread else jnp.mean(tiles, axis=within)


def _in_its_place(here: Here, part: Part, unit: Units, sums: jax.Array) -> jax.Array:
    """Return an array of all units of a leaf that is zero but for a device's own; a copy counts once."""
    own = jnp.where(here.mine(part.first()), sums, jnp.zeros_like(sums))
    starts = list(here.mine(part.coarser(unit.extents).starts))
    return lax.dynamic_update_slice(jnp.zeros(unit.shape, sums.dtype), own, starts)


def expanded(
    rows: Rows, chosen: jax.Array, numbers: jax.Array, units: Sequence[Units], *, packed: bool = False
) -> list[jax.Array]:
    """Return a device's parts of the masks that keep the units chosen, packed as for `drawn`.

    ``numbers`` are any integers that the compiler does not know.
    """
    short = [packed and u.packs_in_rows for u in units]
    words = packing.pack_rows(chosen) if any(short) else None
    found = []
    for mask, u in zip(rows.parted(chosen, unknown(numbers), words, short), units):
        if not u.mask:
            mask = mask.reshape(())
        elif u.mask == u.whole:
            for axis, extent in enumerate(u.extents):
                mask = jnp.repeat(mask, extent, axis=axis) if extent > 1 else mask
        found.append(mask)
    return found


def collapsed(mask: jax.Array, unit: Units, shape: Shape) -> jax.Array:
    """Return which units a device's part of a mask keeps, of this shape."""
    if unit.mask == unit.whole and unit.size > 1:
        return lax.slice(mask, (0,) * mask.ndim, mask.shape, unit.extents)
    return mask.reshape(shape)
