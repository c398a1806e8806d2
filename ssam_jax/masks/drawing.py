"""The first, random mask, drawn where the parameters lie."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ssam_jax._base import shardings
from ssam_jax.masks.patterns import Pattern
from ssam_jax.typing import Mask, Params


def random_first(pattern: Pattern, key: jax.Array, params: Params) -> Mask:
    """Return a random mask that obeys the pattern and lies where the parameters do."""
    leaves, treedef = jax.tree.flatten(params)
    if any(isinstance(leaf, jax.core.Tracer) or shardings.explicit(leaf) for leaf in leaves):
        return _draw_like(pattern, key, params)
    shapes = tuple(jnp.shape(leaf) for leaf in leaves)
    placed = tuple(shardings.concrete(leaf) for leaf in leaves)
    if len({frozenset(s.device_set) for s in placed if s is not None}) > 1:  # no program spans them
        mask = _draw(pattern, treedef, tuple((shape, None) for shape in shapes), key)
        return jax.tree.map(shardings.alike, mask, params)
    return _draw(pattern, treedef, tuple(zip(shapes, placed)), key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(
    pattern: Pattern, treedef: Any, placed: tuple[tuple[tuple[int, ...], Any], ...], key: jax.Array
) -> Mask:
    """Draw under ``jit``: op by op, ``init`` would compile every operation, and fill one device first."""
    params = treedef.unflatten([jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in placed])
    mask = pattern.random(key, params)
    leaves = [
        m if sharding is None else shardings.constrained(m, sharding, shape)
        for m, (shape, sharding) in zip(treedef.flatten_up_to(mask), placed)
    ]
    return treedef.unflatten(leaves)


@functools.partial(jax.jit, static_argnums=0, keep_unused=True)
def _draw_like(pattern: Pattern, key: jax.Array, params: Params) -> Mask:
    return pattern.random(key, params)
