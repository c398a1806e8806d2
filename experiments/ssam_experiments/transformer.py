"""A character-level transformer, a scan over the stacked parameters of its layers, and its shardings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def init_params(key: jax.Array, width: int, layers: int, vocabulary: int) -> Any:
    """Return the parameters; those of the layers have a leading axis of layers.

    Layers start as the identity, which trains faster in few steps.
    """
    names = iter(range(9))

    def normal(*shape: int, scale: float | None = None) -> jax.Array:
        scale = shape[-2] ** -0.5 if scale is None else scale
        return scale * jax.random.normal(jax.random.fold_in(key, next(names)), shape)

    return {
        "embed": normal(vocabulary, width, scale=1.0),
        "layers": {
            "attention": normal(layers, width, 3 * width),
            "attention_out": jnp.zeros((layers, width, width)),
            "attention_scale": jnp.ones((layers, width)),
            "perceptron": normal(layers, width, 4 * width),
            "perceptron_out": jnp.zeros((layers, 4 * width, width)),
            "perceptron_scale": jnp.ones((layers, width)),
        },
        "scale": jnp.ones(width),
        "head": normal(width, vocabulary),
    }


def apply(
    params: Any, tokens: jax.Array, heads: int, place: Callable[[jax.Array], jax.Array] = lambda x: x
) -> jax.Array:
    """Return logits of shape (sequences, characters, vocabulary) for tokens of shape (sequences, characters).

    Attention is biased towards what is near, a slope for each head (ALiBi, arXiv 2108.12409). ``place`` says
    where activations lie, so that devices gather the weights of a layer, not its activations.
    """
    position = jnp.arange(tokens.shape[1], dtype=jnp.float32)
    slopes = 4.0 ** -jnp.arange(heads, dtype=jnp.float32)
    bias = -slopes[None, :, None, None] * (position[:, None] - position[None])[None, None]

    def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    @jax.checkpoint
    def block(x: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        qkv = normed(x, layer["attention_scale"]) @ layer["attention"]
        q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * heads, -1), 3, axis=2)
        attended = jax.nn.dot_product_attention(q, k, v, bias, is_causal=True).reshape(x.shape)
        x = place(x + attended @ layer["attention_out"])
        hidden = jax.nn.gelu(normed(x, layer["perceptron_scale"]) @ layer["perceptron"])
        return place(x + hidden @ layer["perceptron_out"]), None

    x = place(params["embed"][tokens])
    x, _ = jax.lax.scan(block, x, params["layers"])
    return normed(x, params["scale"]) @ params["head"]


def sharded(params: Any, mesh: Mesh) -> Any:
    """Return a sharding for each parameter: by its largest axis that the devices divide, or replicated.

    The leading axis of the layers' parameters is left whole: the scan runs along it.
    """

    def choose(path: Any, leaf: Any) -> NamedSharding:
        first = 1 if path[0].key == "layers" else 0
        fitting = [axis for axis in range(first, leaf.ndim) if leaf.shape[axis] % mesh.size == 0]
        spec: list[str | None] = [None] * leaf.ndim
        if fitting:
            spec[max(fitting, key=lambda axis: leaf.shape[axis])] = AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(choose, params)


def like_params(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Return shardings for an optimizer's state: a parameter's for what has its path's end and its shape."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    known = {path: (leaf.shape, s) for (path, leaf), s in zip(leaves, jax.tree.leaves(shardings))}

    def choose(path: Any, leaf: Any) -> NamedSharding:
        ends = (known.get(path[i:], ((), None)) for i in range(len(path)))
        found = [sharding for shape, sharding in ends if sharding and shape == leaf.shape]
        return found[0] if found else NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(choose, state)
