"""The trade of dynamic sparse training: drop the lowest units of a mask, grow as many of the others."""

import jax
import jax.numpy as jnp

from ssam_jax.masks import hashing, packing, selection, units
from ssam_jax.masks.counts import Count
from ssam_jax.masks.patterns import Structured, UnitPattern
from ssam_jax.masks.rows import Rows
from ssam_jax.masks.shards import Here, Lie, by_part
from ssam_jax.masks.units import Units
from ssam_jax.typing import Mask, Params, Scores


def traded(
    pattern: UnitPattern,
    mask: Mask,
    params: Params,
    to_keep: Scores | None,
    to_grow: Scores | None,
    fraction: jax.Array,
    key: jax.Array,
) -> Mask:
    """Drop and grow the same number of units, over the whole tree or within each leaf.

    Those that are perturbed compete by one score and the others by another, all in one search: they are two
    classes of entries.

    Args:
      pattern: what the units are. Those of `Structured` are traded within each leaf.
      mask: the mask that obeys it.
      params: the tree that it is a mask for; only shapes are read.
      to_keep: trees like ``params`` by whose size (a unit's mean) the lowest are dropped; None for random.
      to_grow: the same, by which the highest are grown.
      fraction: how many of the units in the mask to trade; NaN counts as 0.
      key: a typed key for what is random.
    """
    leaves, treedef = jax.tree.flatten(mask)
    each, count = pattern.units(params), len(leaves)
    if units.nothing(each):
        return mask
    units.check_countable(each)
    shared = pattern.shared and not isinstance(pattern, Structured)
    # The same scores twice are the same arrays, joined once. Masks lie with the first scores there are.
    # The compiler calls local later, which closes over no array for that reason.
    drawn_keep, drawn_grow = to_keep is None, to_grow is None
    same = not drawn_keep and to_keep is to_grow
    trees = [x for x in (to_keep, None if same else to_grow) if x is not None]
    scored, scores = bool(trees), [leaf for tree in trees for leaf in jax.tree.leaves(tree)]
    inputs = [u.lie() for u in each] if scored else [Lie(u.mask, None, u.tiles) for u in each]
    inputs += [Lie(u.whole, i) for _ in trees[1:] for i, u in enumerate(each)]
    inputs += [Lie(u.mask, i) for i, u in enumerate(each)] if scored else []
    outputs = [Lie(u.mask, i) for i, u in enumerate(each)]

    def local(here: Here, parts: list[jax.Array], data: jax.Array, fraction: jax.Array) -> list[jax.Array]:
        tiled = [part.coarser(u.extents if scored else u.tiles) for part, u in zip(here.inputs, each)]
        rows = Rows(here, tiled)
        masks, rest = parts[-count:], [parts[i : i + count] for i in range(0, len(parts) - count, count)]
        active = rows.joined([units.collapsed(m, u, p.local) for m, u, p in zip(masks, each, tiled)])
        found = iter([_keys(here, rows, x, each) for x in rest])
        keep = None if drawn_keep else next(found)
        grow = keep if same else None if drawn_grow else next(found)
        chosen, keys = _chosen(rows, active, keep, grow, data, fraction, shared=shared)
        return units.expanded(rows, chosen, keys, each)

    everywhere = jax.random.key_data(key), jnp.asarray(fraction, jnp.float32)
    return jax.tree.unflatten(treedef, by_part(local, [*scores, *leaves], inputs, outputs, *everywhere))


def traded_bits(
    pattern: UnitPattern,
    bits: Mask,
    params: Params,
    to_keep: Scores | None,
    to_grow: Scores | None,
    fraction: jax.Array,
    key: jax.Array,
) -> tuple[Mask, jax.Array]:
    """Return what `traded` does where units are entries, as `units.refreshed` returns it."""
    old, treedef = jax.tree.flatten(bits)
    same, key_data = to_keep is to_grow, jax.random.key_data(key)

    def keys_of(rows: Rows, scores: Scores | None) -> jax.Array | None:
        return None if scores is None else units.keys_of(rows, jax.tree.leaves(scores), sizes=True)

    def choose(rows: Rows, words: jax.Array) -> tuple[jax.Array, jax.Array]:
        keep = keys_of(rows, to_keep)
        grow = keep if same else keys_of(rows, to_grow)
        active = packing.unpack_rows(words)
        return _chosen(rows, active, keep, grow, key_data, fraction, shared=pattern.shared)

    new, churn = units.refreshed(old, pattern.units(params), choose)
    return jax.tree.unflatten(treedef, new), churn


def _chosen(
    rows: Rows,
    active: jax.Array,
    keep: jax.Array | None,
    grow: jax.Array | None,
    key_data: jax.Array,
    fraction: jax.Array,
    *,
    shared: bool,
) -> tuple[jax.Array, jax.Array]:
    """Return rows of what is perturbed after a trade, and their keys; those that are None are random."""
    keep, grow = (
        units.random_keys(rows, hashing.folded(key_data, i)) if keys is None else keys
        for i, keys in enumerate((keep, grow))
    )
    keep, grow = _of_one_dtype(keep, grow)
    keys = jnp.where(active, keep, grow)
    accounts = _accounts(rows, active, fraction, shared=shared)
    return selection.largest(rows, keys, accounts, second=~active), keys


def _keys(here: Here, rows: Rows, leaves: list[jax.Array], each: list[Units]) -> jax.Array:
    sizes = [leaf if u.size == 1 else jnp.abs(leaf) for leaf, u in zip(leaves, each)]
    return units.keys_of(rows, units.means(here, sizes, each), sizes=True)


def _of_one_dtype(keep: jax.Array, grow: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return both keys, random ones widened beside those of float64; classes are never compared."""
    widest = max(keep.dtype, grow.dtype, key=lambda dtype: dtype.itemsize)
    return keep.astype(widest), grow.astype(widest)


def _accounts(rows: Rows, active: jax.Array, fraction: jax.Array, *, shared: bool) -> selection.Accounts:
    """Return how many of both classes are kept: of the active those not dropped, of the others as many."""
    zero = Count.static(0, sum(rows.wholes))  # whose kind counts are of
    by_row = jnp.sum(rows.filled() & active, axis=1, dtype=jnp.int32)[:, None]
    weights = [1] * len(rows.wholes)
    on = selection.by_account(rows, by_row, weights, zero, shared=shared).column(0)
    sizes = [sum(rows.wholes)] if shared else rows.wholes
    off = Count.static(sizes, sum(rows.wholes)).minus(on)
    fraction = jnp.where(fraction > 0, jnp.minimum(fraction, 1), 0)  # NaN is not above 0
    moved = zero.rounded(fraction * on.as_float()).minimum(off)
    return selection.Accounts(on.beside(off), weights, on.minus(moved).beside(moved), shared)
