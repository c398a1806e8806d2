"""Random bits of single entries, from a counter: a few integer operations, and no state.

Every entry's bits depend on the key, the number of its leaf and its own index alone, so they are the same on
any number of devices and in any layout. They serve to shuffle entries, not to hide anything.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GOLDEN = 0x9E37_79B9
"""The golden ratio's bits, which keep small counters apart."""


def salts(key_data: jax.Array, leaves: int) -> tuple[jax.Array, jax.Array]:
    """Return two uint32 arrays of shape (leaves,) that tell the leaves of a key apart."""
    words = key_data.reshape(-1)
    first = jnp.arange(leaves, dtype=jnp.uint32) * np.uint32(GOLDEN) + np.uint32(1)
    second = ~first
    for i in range(words.size):
        first = mixed(first ^ words[i])
        second = mixed(second + words[i])
    return mixed(first + np.uint32(GOLDEN)), mixed(second)


def folded(key_data: jax.Array, number: jax.Array | int) -> jax.Array:
    """Return other key data for every number, as ``jax.random.fold_in``, in a tenth of the operations."""
    place = lax.broadcasted_iota(jnp.uint32, key_data.shape, key_data.ndim - 1)
    return mixed(key_data ^ mixed(jnp.asarray(number).astype(jnp.uint32) * np.uint32(GOLDEN) + place))


def bits(index: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Return uniform uint32 for uint32 indices in leaves of these salts: within a leaf, all different."""
    return mixed(mixed(index ^ first) + second)


def mixed(x: jax.Array) -> jax.Array:
    """Map uint32 one to one onto uint32 so that each bit depends on all (C. Wellons' triple32)."""
    x ^= x >> np.uint32(17)
    x *= np.uint32(0xED5A_D4BB)
    x ^= x >> np.uint32(11)
    x *= np.uint32(0xAC4C_1B51)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x3184_8BAB)
    return x ^ (x >> np.uint32(14))


def uniform(key: jax.Array, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
    """Return float32 arrays of these shapes, uniform from 0 to below 1, each with the index of a leaf."""
    first, second = salts(jax.random.key_data(key), len(shapes))
    drawn = (bits(_index(shape), first[i], second[i]) for i, shape in enumerate(shapes))
    return [(x >> np.uint32(8)).astype(jnp.float32) * jnp.float32(2**-24) for x in drawn]


def _index(shape: tuple[int, ...]) -> jax.Array:
    """Return the row-major index, built from one iota an axis, so that a sharded array needs no reshape."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :])
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
    return index
