"""Many arrays as the rows of one, so that a few kernels serve them all, whatever their number.

A kernel takes ten to twenty milliseconds to compile however little it does. Each array is flattened and
padded to whole rows; which array a row belongs to is known while tracing.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssam_jax.masks import hashing, packing
from ssam_jax.masks.shards import Here, Part

WIDTH = 1024
"""Entries of a row: one more row for each small array costs little, and there is little to add up."""

BLOCK = 128
"""Rows that are added up at once, before the sums of blocks are."""

FEW = 4 * BLOCK
"""Rows up to which they are a single block."""


class Rows:
    """Arrays of which a device holds some parts, each flattened, padded and cut into rows.

    Attributes:
      shape: the number of rows and their width.
      sizes: entries of the parts.
      wholes: entries of the whole arrays.
    """

    def __init__(self, here: Here, parts: list[Part], width: int = WIDTH) -> None:
        self._here, self._parts = here, parts
        self.sizes = [math.prod(part.local) for part in parts]
        self.wholes = [math.prod(part.whole) for part in parts]
        counts = [-(-size // width) for size in self.sizes]
        self._ends = np.cumsum(counts, dtype=np.int64).astype(np.int32)
        self._firsts = self._ends - np.array(counts, np.int32)
        self._owner = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
        self.shape = (len(self._owner), width)

    def joined(self, arrays: list[jax.Array]) -> jax.Array:
        """Return the rows of arrays of one dtype, anything where they are padded."""
        pieces = []
        for x, size in zip(arrays, self.sizes):
            pieces += [x.reshape(-1), _padding(-size % self.shape[1], x.dtype)]
        return jnp.concatenate(pieces).reshape(self.shape)

    def joined_words(self, masks: list[jax.Array]) -> jax.Array:
        """Return packed rows of masks, of which some are packed along their last axis."""
        words, width = [], self.shape[1]
        for mask, size in zip(masks, self.sizes):
            if packing.packed_along_rows(mask):
                words += [mask.reshape(-1), _padding(-size % width // packing.ROW_BITS, mask.dtype)]
            else:
                padded = jnp.pad(mask.reshape(-1), (0, -size % width))
                words.append(packing.pack_rows(padded.reshape(-1, width)).reshape(-1))
        return jnp.concatenate(words).reshape(self.shape[0], -1)

    def parted(
        self, x: jax.Array, unknown: jax.Array, words: jax.Array | None = None, packed: Sequence[bool] = ()
    ) -> list[jax.Array]:
        """Return the arrays whose rows these are: undo `joined`.

        Args:
          x: the rows, of bool.
          unknown: a bool that is True, which the compiler does not know.
          words: the same rows packed, if any arrays are wanted so.
          packed: which arrays to return packed along their last axis; none, if it is empty.
        """
        if not self.shape[0]:
            return [jnp.zeros(part.local, x.dtype) for part in self._parts]
        found = []
        short = packed or [False] * len(self.sizes)
        for first, size, part, in_words in zip(self._hidden_firsts(unknown), self.sizes, self._parts, short):
            source, each, shape = x, 1, part.local
            if in_words and words is not None:
                source, each = words, packing.ROW_BITS
                shape = (*shape[:-1], shape[-1] // each)
            rows = lax.dynamic_slice_in_dim(source, first, -(-size // self.shape[1]))
            found.append(rows.reshape(-1)[: size // each].reshape(shape))
        return found

    def _hidden_firsts(self, unknown: jax.Array) -> tuple[jax.Array, ...]:
        """Return in which rows the arrays begin, uint32 scalars that the compiler does not know.

        It makes one kernel for all arrays of a shape, but only if their places are no constants to it.
        """
        firsts = tuple(self._firsts.astype(np.uint32))  # which may not be negative, and need no test of it
        nowhere = tuple(np.uint32(0) for _ in firsts)
        found: tuple[jax.Array, ...] = lax.cond(unknown, lambda: firsts, lambda: nowhere)
        return found

    def spread(self, by_array: jax.Array) -> jax.Array:
        """Return for each row what its array has, of shape (rows, ...)."""
        return by_array.at[self._owner].get(mode="promise_in_bounds")

    def filled(self) -> jax.Array:
        """Return where the entries are that belong to an array, bool of the shape of the rows."""
        left = self.spread(jnp.array(self.sizes, jnp.int32)) - self._offsets()
        return lax.broadcasted_iota(jnp.int32, self.shape, 1) < left[:, None]

    def index(self, zero: jax.Array | int = 0) -> jax.Array:
        """Return each entry's row-major index in the whole array that it belongs to, uint32.

        Args:
          zero: a 0 that the compiler does not know, so that it computes the indices where they are wanted
            and not before, in memory.
        """
        column = lax.broadcasted_iota(jnp.uint32, self.shape, 1)
        place = (self._offsets() + zero).astype(jnp.uint32)[:, None] + column
        if not self._here.axes:
            return place
        sizes, strides, starts = _merged(self._parts)
        starts = self._here.mine(starts)  # (arrays, axes)
        index = jnp.zeros_like(place)
        inner = np.cumprod(np.concatenate([sizes[:, 1:], np.ones_like(sizes[:, :1])], 1)[:, ::-1], 1)[:, ::-1]
        for axis in range(sizes.shape[1]):
            size, stride, below, start = (
                self.spread(jnp.asarray(x, jnp.uint32))[:, None]
                for x in (sizes[:, axis], strides[:, axis], inner[:, axis], starts[:, axis])
            )
            index += (place // below % size + start) * stride
        return index

    def bits(self, key_data: jax.Array) -> jax.Array:
        """Return uniform uint32, the same for an entry wherever it lies."""
        salts = (self.spread(salt)[:, None] for salt in hashing.salts(key_data, len(self._parts)))
        return hashing.bits(self.index(), *salts)

    def order(self) -> jax.Array:
        """Return for each row how many arrays there are from its own to the last, uint32 of shape (rows,)."""
        return jnp.asarray((len(self._parts) - self._owner).astype(np.uint32))

    def total(self, by_row: jax.Array) -> jax.Array:
        """Add up int32 of all rows over all devices: (rows, ...) to (...)."""
        counted = jnp.ones(len(self._owner), jnp.int32)
        if self._here.axes:
            first = np.stack([part.first() for part in self._parts], axis=1)[:, self._owner]
            counted = self._here.mine(first.astype(np.int32))
        # As a product, which needs no kernel of its own.
        return self._here.total(jnp.tensordot(counted, by_row, axes=1))

    def sums(self, by_row: jax.Array) -> jax.Array:
        """Add up int32 by array over all devices: (rows, ...) to (arrays, ...)."""
        shape = by_row.shape[1:]
        block = BLOCK if self.shape[0] > FEW else max(1, self.shape[0])
        spare = -self.shape[0] % block
        blocks = jnp.pad(by_row.reshape(-1, math.prod(shape)), ((0, spare), (0, 0)))
        blocks = blocks.reshape(-1, block, math.prod(shape))
        # Rows before an end, by blocks and then within the last; sums may wrap around, differences do not.
        ends = np.concatenate([[0], self._ends]).astype(np.int32)
        before = np.arange(len(blocks)) < (ends // block)[:, None]
        within = np.arange(block) < (ends % block)[:, None]
        last = blocks.at[np.minimum(ends // block, len(blocks) - 1)].get(mode="promise_in_bounds")
        # As products, which need no kernel of their own.
        total = jnp.einsum("bip->bp", blocks)
        sums = jnp.einsum("eb,bp->ep", jnp.asarray(before, jnp.int32), total)
        sums += jnp.einsum("ei,eip->ep", jnp.asarray(within, jnp.int32), last)
        found = sums[1:] - sums[:-1]
        if self._here.axes:
            counted = self._here.mine(np.stack([part.first() for part in self._parts], axis=1))
            found = self._here.total(jnp.where(counted[:, None], found, 0))
        return found.reshape(len(self._parts), *shape)

    def _offsets(self) -> jax.Array:
        """Return each row's first entry's index in its part, int32 of shape (rows,)."""
        row = lax.iota(jnp.int32, self.shape[0])
        return (row - self.spread(jnp.asarray(self._firsts))) * self.shape[1]


def _padding(size: int, dtype: jnp.dtype) -> jax.Array:
    """Return so many numbers. The compiler would make a kernel for equal ones."""
    return jnp.asarray(np.arange(size) % 2, dtype)


def _merged(parts: list[Part]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return sizes and strides of the parts' axes and where they start, (arrays, axes) for each device.

    Axes that are not split are one with the axis before them, so that there are few.
    """
    rows: list[list[tuple[int, int, np.ndarray]]] = []
    for part in parts:
        merged: list[tuple[int, int, np.ndarray]] = []
        stride = 1
        for axis in reversed(range(len(part.whole))):
            size, start = part.local[axis], part.starts[:, axis].astype(np.int64)
            if merged and merged[-1][0] * merged[-1][1] == stride:  # the axes below are whole
                below, inner, offset = merged.pop()
                merged.append((size * below, inner, start * below + offset))
            else:
                merged.append((size, stride, start))
            stride *= part.whole[axis]
        rows.append(merged[::-1])
    most = max(1, *map(len, rows))
    nothing = (1, 0, np.zeros(len(parts[0].starts), np.int64))
    full = [[nothing] * (most - len(row)) + row for row in rows]
    sizes, strides = (np.array([[axis[i] for axis in row] for row in full], np.int64) for i in (0, 1))
    starts = np.array([[axis[2] for axis in row] for row in full]).transpose(2, 0, 1)
    return sizes, strides, starts.astype(np.uint32)
