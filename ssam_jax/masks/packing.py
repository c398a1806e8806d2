"""Full-size masks as bits: 8, 16 or 32 entries to a word.

A packed leaf describes itself: the width of its words says along which axis they run. So packed masks are
plain arrays in a tree of the structure and ranks of the parameters, and whatever handles those (sharding
rules, checkpoints, ``vmap``, ``optax.tree``) handles these.

The work on a leaf is under ``jit`` for callers that are not: op by op, each operation is compiled by itself.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssam_jax.typing import Mask

AXES = {8: -1, 16: -2, 32: -3}
"""The axis along which words of so many bits run. Other leaves, all short ones among them, stay bool."""

LEAST_WORDS = 8
"""Fewer words than this along an axis are not worth having, and could not be spread over many devices."""


def pack(mask: Mask) -> Mask:
    """Return a tree of bool arrays with those packed whose shape allows it.

    The axis is the one whose words can be halved most often, so that most meshes divide them; of equal
    ones the later.

    Returns:
      uint8, uint16 or uint32 arrays, shorter along one axis by the bits of a word. Bit ``j`` of word
      ``i`` is entry ``bits * i + j``.
    """
    return jax.tree.map(lambda leaf: _packed(leaf, word_bits(leaf.shape)), mask)


def pack_like(mask: Mask, like: Mask) -> Mask:
    """Return the mask packed as another one is, leaf by leaf."""
    return jax.tree.map(lambda leaf, other: _packed(leaf, _bits(other)), mask, like)


def unpack(mask: Mask) -> Mask:
    """Return a tree of bool arrays: undo `pack`."""
    return jax.tree.map(_unpacked, mask)


def word_bits(shape: Sequence[int]) -> int:
    """Return how many bits the words of a packed leaf of a shape have; 1 if it is not packed."""
    words = {
        bits: shape[axis] // bits
        for bits, axis in AXES.items()
        if len(shape) >= -axis and not shape[axis] % bits
    }
    halvings = {bits: count & -count for bits, count in words.items() if count >= LEAST_WORDS}
    return max(halvings, key=halvings.__getitem__, default=1)


def _bits(leaf: Any) -> int:
    return 1 if leaf.dtype == jnp.bool_ else 8 * leaf.dtype.itemsize


def _packed(leaf: jax.Array, bits: int) -> jax.Array:
    return leaf if bits == 1 else _words(leaf, bits)


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
    split = (words >> _positions(bits, words.ndim)) & jnp.ones((1,) * words.ndim, leaf.dtype)
    return (split != 0).reshape(*leaf.shape[:axis], leaf.shape[axis] * bits, *leaf.shape[axis + 1 :])


def _positions(bits: int, ndim: int) -> jax.Array:
    """Return 0, 1, .. along the axis of the bits of a word, which comes right after that of the words."""
    shape = [1] * ndim
    shape[ndim + AXES[bits]] = bits
    return jnp.arange(bits, dtype=f"uint{bits}").reshape(shape)
