"""The first mask of most rules: random, and where the parameters lie from the first step on."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from ssam_jax._base import boxes, shardings
from ssam_jax.masks import packing, shards
from ssam_jax.masks.patterns import CompiledPattern, Pattern
from ssam_jax.typing import Mask, Params


def random_bits(pattern: Pattern, key: jax.Array, params: Params, *, packed: bool) -> Mask:
    """Return a random mask that obeys a pattern, its long leaves packed if asked for."""
    leaves, treedef = jax.tree.flatten(params)
    if any(isinstance(leaf, jax.core.Tracer) or shardings.explicit(leaf) for leaf in leaves):
        return _draw_like(pattern, packed, key, params)
    shapes = tuple(jnp.shape(leaf) for leaf in leaves)
    placed = tuple(shardings.concrete(leaf) for leaf in leaves)
    if len({frozenset(s.device_set) for s in placed if s is not None}) > 1:  # no program spans them
        mask = _draw(pattern, treedef, tuple((shape, None) for shape in shapes), False, key)
        mask = jax.tree.map(shardings.alike, mask, params)
        return packing.pack(mask) if packed else mask
    return _draw(pattern, treedef, tuple(zip(shapes, placed)), packed, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(
    pattern: Pattern,
    treedef: jax.tree_util.PyTreeDef,
    placed: tuple[tuple[tuple[int, ...], Sharding | None], ...],
    packed: bool,
    key: jax.Array,
) -> Mask:
    """Draw under ``jit``: op by op, ``init`` would compile every operation, and fill one device first."""
    params = treedef.unflatten([jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in placed])
    meshes = any(isinstance(sharding, NamedSharding) for _, sharding in placed)
    plain = shards.single() and not meshes and not boxes.any_in(params)
    if plain and isinstance(pattern, CompiledPattern):
        return pattern.random_bits(key, params, packed=packed)
    mask = pattern.random(key, params)
    leaves = [
        m if sharding is None else shardings.constrained(m, sharding, shape)
        for m, (shape, sharding) in zip(treedef.flatten_up_to(mask), placed)
    ]
    mask = treedef.unflatten(leaves)
    return packing.pack(mask) if packed else mask


@functools.partial(jax.jit, static_argnums=(0, 1), keep_unused=True)
def _draw_like(pattern: Pattern, packed: bool, key: jax.Array, params: Params) -> Mask:
    mask = jax.tree.map(shardings.alike, pattern.random(key, params), params)
    return packing.pack(mask) if packed else mask
