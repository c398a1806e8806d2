"""Many arrays as the rows of one, so that a few kernels serve them all, whatever their number.

A kernel takes ten to twenty milliseconds to compile however little it does. Each array is flattened and
padded to whole rows; which array a row belongs to is known while tracing.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssam_jax.masks import hashing
from ssam_jax.masks.shards import Here, Part

WIDTH = 1024
"""Entries of a row: one more row for each small array costs little, and there is little to add up."""

BLOCK = 128
"""Rows that are added up at once, before the sums of blocks are. Empty rows fill the last."""

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
        spare = -sum(counts) % BLOCK if sum(counts) > FEW else 0
        self._ends = np.cumsum(counts, dtype=np.int64).astype(np.int32)
        self._firsts = self._ends - np.array(counts, np.int32)
        owner = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
        self._owner = np.pad(owner, (0, spare), mode="edge")
        self.shape = (len(self._owner), width)

    def joined(self, arrays: list[jax.Array]) -> jax.Array:
        """Return the rows of arrays of one dtype, zeros where they are padded."""
        pieces = []
        for x, size in zip(arrays, self.sizes):
            pieces.append(x.reshape(-1))
            if size % self.shape[1]:
                pieces.append(jnp.zeros(-size % self.shape[1], x.dtype))
        spare = self.shape[0] - self._ends[-1]
        if spare:
            pieces.append(jnp.zeros(spare * self.shape[1], x.dtype))
        return jnp.concatenate(pieces).reshape(self.shape)

    def parted(self, x: jax.Array, witness: jax.Array) -> list[jax.Array]:
        """Return the arrays whose rows these are: undo `joined`.

        The compiler makes one kernel for all arrays of a shape, but only if where they start is not known to
        it. A conditional hides it, whose predicate is always true, and keeps the rows from being computed
        anew for each array.

        Args:
          x: the rows, of bool.
          witness: a bool that is True, which the compiler does not know.
        """
        if not self.shape[0]:
            return [jnp.zeros(part.local, x.dtype) for part in self._parts]
        starts = tuple(self._firsts.astype(np.uint32))  # which may not be negative, and need no test of it
        nowhere = tuple(np.uint32(0) for _ in starts)
        hidden, x = lax.cond(witness, lambda x: (starts, x), lambda x: (nowhere, ~x), x)
        found = []
        for start, size, part in zip(hidden, self.sizes, self._parts):
            rows = lax.dynamic_slice_in_dim(x, start, -(-size // self.shape[1]))
            found.append(rows.reshape(-1)[:size].reshape(part.local))
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

    def sums(self, by_row: jax.Array) -> jax.Array:
        """Add up int32 by array over all devices: (rows, ...) to (arrays, ...)."""
        shape = by_row.shape[1:]
        block = BLOCK if self.shape[0] > FEW else self.shape[0]
        blocks = by_row.reshape(-1, block, math.prod(shape))
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
