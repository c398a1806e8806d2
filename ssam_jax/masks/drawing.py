"""The first mask: random, and where the parameters lie from the first step on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ssam_jax._base import shardings
from ssam_jax.masks import packing
from ssam_jax.masks.patterns import Pattern
from ssam_jax.typing import Mask, Params


def first_mask(pattern: Pattern, key_data: jax.Array, params: Params, packed: bool) -> Mask:
    """Return the bits of a random mask that obeys the pattern: masked from the first step on."""
    leaves, treedef = jax.tree.flatten(params)
    if any(isinstance(leaf, jax.core.Tracer) or shardings.explicit(leaf) for leaf in leaves):
        return _draw_like(pattern, packed, key_data, params)
    shapes = tuple(jnp.shape(leaf) for leaf in leaves)
    placed = tuple(shardings.concrete(leaf) for leaf in leaves)
    if len({frozenset(s.device_set) for s in placed if s is not None}) > 1:  # no program spans them
        mask = _draw(pattern, treedef, tuple((shape, None) for shape in shapes), False, key_data)
        mask = jax.tree.map(shardings.alike, mask, params)
        return packing.pack(mask) if packed else mask
    return _draw(pattern, treedef, tuple(zip(shapes, placed)), packed, key_data)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(
    pattern: Pattern,
    treedef: Any,
    placed: tuple[tuple[tuple[int, ...], Any], ...],
    packed: bool,
    key_data: jax.Array,
) -> Mask:
    """Draw under ``jit``: op by op, ``init`` would compile every operation, and fill one device first."""
    params = treedef.unflatten([jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in placed])
    mask = pattern.random(jax.random.wrap_key_data(key_data), params)
    leaves = [
        m if sharding is None else shardings.constrained(m, sharding, shape)
        for m, (shape, sharding) in zip(treedef.flatten_up_to(mask), placed)
    ]
    mask = treedef.unflatten(leaves)
    return packing.pack(mask) if packed else mask


@functools.partial(jax.jit, static_argnums=(0, 1), keep_unused=True)
def _draw_like(pattern: Pattern, packed: bool, key_data: jax.Array, params: Params) -> Mask:
    mask = pattern.random(jax.random.wrap_key_data(key_data), params)
    return packing.pack(mask) if packed else mask
