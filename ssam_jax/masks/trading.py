"""The trade of dynamic sparse training: drop the lowest units of a mask, grow as many of the others."""

import jax
import jax.numpy as jnp

from ssam_jax.masks import selection, units
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
        keep = units.random_keys(rows, data[0]) if drawn_keep else next(found)
        grow = keep if same else units.random_keys(rows, data[1]) if drawn_grow else next(found)
        keep, grow = _of_one_dtype(keep, grow)
        keys = jnp.where(active, keep, grow)
        accounts = _accounts(rows, active, fraction, shared=shared)
        chosen = selection.largest(rows, keys, accounts, second=~active)
        return units.expanded(rows, chosen, keys, each)

    data = jax.vmap(jax.random.key_data)(jax.random.split(key))
    everywhere = data, jnp.asarray(fraction, jnp.float32)
    return jax.tree.unflatten(treedef, by_part(local, [*scores, *leaves], inputs, outputs, *everywhere))


def _keys(here: Here, rows: Rows, leaves: list[jax.Array], each: list[Units]) -> jax.Array:
    sizes = [leaf if u.size == 1 else jnp.abs(leaf) for leaf, u in zip(leaves, each)]
    return units.keys_of(rows, units.means(here, sizes, each), sizes=True)


def _of_one_dtype(keep: jax.Array, grow: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return both keys, random ones widened beside those of float64; classes are never compared."""
    widest = max(keep.dtype, grow.dtype, key=lambda dtype: dtype.itemsize)
    return keep.astype(widest), grow.astype(widest)


def _accounts(rows: Rows, active: jax.Array, fraction: jax.Array, *, shared: bool) -> selection.Accounts:
    """Return how many of both classes are kept: of the active those not dropped, of the others as many."""
    filled = rows.filled()
    by_row = [jnp.sum(filled & x, axis=1, dtype=jnp.int32) for x in (active, ~active)]
    candidates = rows.sums(jnp.stack(by_row, axis=1))

    kept = Count.static([0] * len(rows.wholes), sum(rows.wholes))  # of that kind

    def total(column: jax.Array) -> Count:
        count = kept.like(column)
        return count.total() if shared else count

    on, off = total(candidates[:, 0]), total(candidates[:, 1])
    fraction = jnp.where(fraction > 0, jnp.minimum(fraction, 1), 0)  # NaN is not above 0
    moved = kept.rounded(fraction * on.as_float()).minimum(off)
    weights = [1] * candidates.shape[0]
    return selection.Accounts(candidates, weights, on.minus(moved).beside(moved), shared)
