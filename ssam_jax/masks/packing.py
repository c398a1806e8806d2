"""Full-size masks as bits: 8, 16 or 32 entries to a word.

A packed leaf describes itself: the width of its words says along which axis they run. So packed masks are
plain arrays in a tree of the structure and ranks of the parameters, and whatever handles those (sharding
rules, checkpoints, ``vmap``, ``optax.tree``) handles these.

The work on a leaf is under ``jit`` for callers that are not: op by op, each operation is compiled by itself.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssam_jax._base import boxes, shardings
from ssam_jax.masks.shards import Here, Lie, by_part
from ssam_jax.typing import Mask

AXES = {8: -1, 16: -2, 32: -3}
"""The axis along which words of so many bits run. Other leaves, all short ones among them, stay bool."""

ROW_BITS = 8
"""The bits of words along the last axis."""

TOGETHER = 8
"""Along the axis a leaf must have a multiple of so many words: a mesh divides words, not the bits of one."""

WIDTH = 1024
"""Bytes that are counted in one number."""


def pack(mask: Mask) -> Mask:
    """Return a tree of bool arrays with those packed whose shape allows it; those that are, stay so.

    The axis is the last that is a multiple of 8 words, of as many bits as `AXES` says. A leaf in a box of
    Flax's that says how it is split stays as it is: words would have to lie outside of the box, on every
    device. So does one whose type says that it is split over more devices than divide its words.

    Returns:
      uint8, uint16 or uint32 arrays, shorter along one axis by the bits of a word. Bit ``j`` of word
      ``i`` is entry ``bits * i + j``.
    """

    def packed(leaf: Any) -> Any:
        if boxes.is_box(leaf) or _bits(leaf) > 1:
            return leaf
        bits = word_bits(leaf.shape)
        return _packed(leaf, bits if _words_stay_whole(leaf, bits) else 1)

    return jax.tree.map(packed, mask, is_leaf=boxes.splits)


def pack_like(mask: Mask, like: Mask) -> Mask:
    """Return the mask packed as another one is, leaf by leaf; leaves that are packed already stay so."""
    return jax.tree.map(lambda leaf, other: _packed(leaf, _bits(other)), mask, like)


def runs_along_rows(shape: Sequence[int]) -> bool:
    """Whether a leaf of a shape is packed along its last axis, so that words are in row-major order."""
    return word_bits(shape) == ROW_BITS


def packed_along_rows(leaf: jax.Array) -> bool:
    """Whether a leaf is packed along its last axis."""
    return _bits(leaf) == ROW_BITS


def pack_rows(x: jax.Array) -> jax.Array:
    """Pack bools of shape (rows, width), of a width of whole words, along the rows."""
    words = x.reshape(x.shape[0], x.shape[1] // ROW_BITS, ROW_BITS).astype(jnp.uint8)
    return jnp.sum(words << lax.broadcasted_iota(jnp.uint8, words.shape, 2), axis=2, dtype=jnp.uint8)


def unpack_rows(words: jax.Array) -> jax.Array:
    """Undo `pack_rows`."""
    place = lax.broadcasted_iota(jnp.uint8, (*words.shape, ROW_BITS), 2)
    split = words[..., None] & (np.uint8(1) << place)
    return (split != 0).reshape(words.shape[0], words.shape[1] * ROW_BITS)


def unpack_but_rows(leaves: list[jax.Array]) -> list[jax.Array]:
    """Return leaves of a mask, those unpacked that are not packed along their last axis."""
    return [leaf if packed_along_rows(leaf) else _unpacked(leaf) for leaf in leaves]


def unpack(mask: Mask) -> Mask:
    """Return a tree of bool arrays: undo `pack`."""
    leaves = jax.tree.leaves(mask)
    if any(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves
    ):  # one that is not packed stays as it is
        return jax.tree.map(lambda x: x if _bits(x) == 1 else jax.eval_shape(_unpacked, x), mask)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return _unpack(mask)
    if len({frozenset(leaf.devices()) for leaf in leaves if isinstance(leaf, jax.Array)}) > 1:
        return jax.tree.map(_unpacked, mask)  # no program spans them
    return _together(mask)


@jax.jit
def churn(old: Mask, new: Mask) -> jax.Array:
    """Return the share of the True entries of one packed mask that are False in another packed alike.

    Entries of masks that broadcast count once, however many parameters they stand for.

    Returns:
      A float32 scalar, 0 if no entry of ``new`` is True.
    """
    return _share(*shardings.computed_everywhere(_came_and_active, old, new))


def churn_of_rows(old: jax.Array, new: jax.Array) -> jax.Array:
    """Return the same for masks as packed rows, of shape (rows, words)."""
    came, active = (lax.population_count(x).astype(jnp.float32) for x in (new & ~old, new))
    ones = jnp.ones(new.shape[1]), jnp.ones(new.shape[0])
    both = came * 2.0**12 + active  # of a word at most eight, of a row at most 2**11: exact
    by_row = jnp.matmul(both, ones[0], precision="highest")
    came = jnp.floor(by_row / 2.0**12)
    columns = jnp.stack([came, by_row - came * 2.0**12], axis=1)
    return _share(*jnp.matmul(ones[1], columns, precision="highest"))


def _share(came: jax.Array, active: jax.Array) -> jax.Array:
    return jnp.where(active > 0, came / jnp.maximum(active, 1), 0)


def _came_and_active(old: Mask, new: Mask) -> jax.Array:
    """Count entries that are new, and all that are True: float32 of shape (2,)."""
    before, after = jax.tree.leaves(old), jax.tree.leaves(new)
    count = len(after)
    if not count:
        return jnp.zeros(2, jnp.float32)

    def local(here: Here, parts: list[jax.Array]) -> list[jax.Array]:
        new, old = _bytes(here, parts, 0, count), _bytes(here, parts, count, 2 * count)
        came, active = (lax.population_count(x).astype(jnp.int32) for x in (new & ~old, new))
        both = jnp.sum((came << 16) + active, axis=1)  # of a row at most 2**13
        return [here.total(jnp.stack([jnp.sum(x.astype(jnp.float32)) for x in (both >> 16, both & 0xFFFF)]))]

    inputs = [Lie(leaf.shape) for leaf in after]
    inputs += [Lie(leaf.shape, i) for i, leaf in enumerate(before)]
    [found] = by_part(local, [*after, *before], inputs, [Lie((2,))])
    return found


def _bytes(here: Here, parts: list[jax.Array], first: int, last: int) -> jax.Array:
    """Return rows of the bytes of some leaves, zeros for what another device counts."""
    words: dict[Any, list[jax.Array]] = {}
    for part, leaf in zip(here.inputs[first:last], parts[first:last]):
        mine = part.first()
        kept = leaf if mine.all() else jnp.where(here.mine(mine), leaf, jnp.zeros_like(leaf))
        words.setdefault(leaf.dtype, []).append(kept.reshape(-1))
    joined = [jnp.concatenate(words[kind]) for kind in sorted(words, key=str)]
    found = [x.astype(jnp.uint8) if _bits(x) == 1 else lax.bitcast_convert_type(x, jnp.uint8) for x in joined]
    size = sum(x.size for x in found)
    padding = jnp.zeros(-size % WIDTH, jnp.uint8)
    return jnp.concatenate([*(x.reshape(-1) for x in found), padding]).reshape(-1, WIDTH)


def word_bits(shape: Sequence[int]) -> int:
    """Return how many bits the words of a packed leaf of a shape have; 1 if it is not packed."""
    for bits, axis in AXES.items():
        if len(shape) >= -axis and shape[axis] and not shape[axis] % (bits * TOGETHER):
            return bits
    return 1


def _words_stay_whole(leaf: Any, bits: int) -> bool:
    """Whether no device would hold a part of a word, as far as the type of a leaf says how it is split."""
    typed = shardings.explicit(leaf)
    if bits == 1 or typed is None:
        return True
    axis = leaf.ndim + AXES[bits]
    names = (*typed.spec, *[None] * leaf.ndim)[axis]
    devices = math.prod(typed.mesh.shape[name] for name in _as_tuple(names))
    return bool(leaf.shape[axis] // bits % devices == 0)


def _as_tuple(names: Any) -> tuple[str, ...]:
    return () if names is None else names if isinstance(names, tuple) else (names,)


def _bits(leaf: Any) -> int:
    return 1 if leaf.dtype == jnp.bool_ else 8 * leaf.dtype.itemsize


def _packed(leaf: jax.Array, bits: int) -> jax.Array:
    return leaf if bits == 1 or _bits(leaf) > 1 else _words(leaf, bits)


def _unpack(mask: Mask) -> Mask:
    return jax.tree.map(_unpacked, mask)


_together = jax.jit(_unpack)
"""The same as one program, where each leaf's would have to be compiled."""


def _unpacked(leaf: jax.Array) -> jax.Array:
    return leaf if _bits(leaf) == 1 else _entries(leaf)


@functools.partial(jax.jit, static_argnums=1)
def _words(leaf: jax.Array, bits: int) -> jax.Array:
    axis, dtype = leaf.ndim + AXES[bits], jnp.dtype(f"uint{bits}")
    split = leaf.reshape(*leaf.shape[:axis], leaf.shape[axis] // bits, bits, *leaf.shape[axis + 1 :])
    return jnp.sum(split.astype(dtype) << _positions(bits, split.ndim), axis=axis + 1, dtype=dtype)


@jax.jit
def _entries(leaf: jax.Array) -> jax.Array:
    bits = _bits(leaf)
    axis = leaf.ndim + AXES[bits]
    words = jnp.expand_dims(leaf, axis + 1)
    split = words & (jnp.ones((), leaf.dtype) << _positions(bits, words.ndim))
    return (split != 0).reshape(*leaf.shape[:axis], leaf.shape[axis] * bits, *leaf.shape[axis + 1 :])


def _positions(bits: int, ndim: int) -> jax.Array:
    """Return 0, 1, .. along the axis of the bits of a word, which comes right after that of the words."""
    shape = [1] * ndim
    shape[ndim + AXES[bits]] = bits
    return jnp.arange(bits, dtype=f"uint{bits}").reshape(shape)
