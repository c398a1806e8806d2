"""N:M masks: the best of every few consecutive entries along an axis."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ssam_jax.masks import packing, selection, units
from ssam_jax.masks import rows as layout
from ssam_jax.masks.rows import Rows
from ssam_jax.masks.shards import Here, Lie, Shape, by_part


def best(leaves: list[jax.Array], grouped: list[bool], n: int, m: int, axis: int) -> list[jax.Array]:
    """Return masks of the ``n`` best of every ``m`` entries along an axis; True for leaves not grouped."""

    def local(here: Here, leaves: list[jax.Array]) -> list[jax.Array]:
        rows = Rows(here, [part.moved(axis) for part in here.inputs], _width(m))
        keys = units.unpadded_keys(rows, [jnp.moveaxis(leaf, axis, -1) for leaf in leaves])
        return _chosen(rows, keys, n, m, axis)

    arrays = [leaf for leaf, there in zip(leaves, grouped) if there]
    inputs = [Lie(x.shape, None, _grain(x.shape, m, axis)) for x in arrays]
    outputs = [Lie(x.shape, i) for i, x in enumerate(arrays)]
    return _among(grouped, by_part(local, arrays, inputs, outputs) if arrays else [])


def drawn(
    key: jax.Array, shapes: list[Shape], grouped: list[bool], n: int, m: int, axis: int, *, packed: bool
) -> list[jax.Array]:
    """Return masks of ``n`` random ones of every ``m`` entries along an axis; True for leaves not grouped.

    On a single device, those that are packed along the last axis can be returned so.
    """
    shapes = [shape for shape, there in zip(shapes, grouped) if there]
    short = [
        packed and axis % len(shape) == len(shape) - 1 and packing.runs_along_rows(shape) for shape in shapes
    ]

    def local(here: Here, leaves: list[jax.Array], key_data: jax.Array) -> list[jax.Array]:
        del leaves
        rows = Rows(here, [part.moved(axis) for part in here.outputs], _width(m))
        return _chosen(rows, units.random_keys(rows, key_data), n, m, axis, short)

    outputs = [Lie(shape, None, _grain(shape, m, axis)) for shape in shapes]
    found = by_part(local, [], [], outputs, jax.random.key_data(key)) if outputs else []
    return _among(grouped, found)


def _width(m: int) -> int:
    """Return a width of rows that groups divide."""
    return max(1, layout.WIDTH // m) * m


def _grain(shape: Shape, m: int, axis: int) -> Shape:
    return tuple(m if i == axis % len(shape) else 1 for i in range(len(shape)))


def _chosen(
    rows: Rows, keys: jax.Array, n: int, m: int, axis: int, packed: Sequence[bool] = ()
) -> list[jax.Array]:
    chosen, unknown = units.computed_once(selection.largest_in_groups(keys, n, m), keys)
    whole = rows.shape[1] % packing.ROW_BITS == 0
    words = packing.pack_rows(chosen) if whole and any(packed) else None
    return [jnp.moveaxis(mask, -1, axis) for mask in rows.parted(chosen, unknown, words, packed)]


def _among(grouped: list[bool], found: list[jax.Array]) -> list[jax.Array]:
    rest = iter(found)
    return [next(rest) if there else jnp.array(True) for there in grouped]
