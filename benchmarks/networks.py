"""Small networks of the usual kinds, each as a loss to differentiate, for benchmarks and tests alike."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ssam_jax._base.trees import leaf_paths, map_with_path
from ssam_jax.two_pass.active import Active, FirstRow

CLASSES = 10


class Problem(NamedTuple):
    """A loss, where it is differentiated, and the order in which it uses its parameters.

    Attributes:
      loss_fn: ``loss_fn(params, *args)`` returns the loss, or ``(loss, aux)`` with ``has_aux``.
      params: pytree of arrays.
      args: what the loss takes beside them: state, batch, keys.
      has_aux: whether the loss returns a pair.
      parts: the first name in the path of every parameter, from the input to the output; a module of
        stacked layers is named once for each of them.
    """

    loss_fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    has_aux: bool
    parts: tuple[str, ...]

    def loss(self, *args: Any) -> jax.Array:
        """Return the loss alone, of ``(params, *args)``."""
        return self.loss_fn(*args)[0] if self.has_aux else self.loss_fn(*args)

    def first(self, examples: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return ``args`` with the first examples of their batch; state, which comes first, is left whole."""
        state = int(self.has_aux)
        return (*args[:state], *(x[:examples] for x in args[state:]))

    def last(self, count: int) -> Active:
        """Return what is active if the last ``count`` parts are perturbed and no others."""
        chosen = self.parts[len(self.parts) - count :]

        def entry(path: str) -> bool | FirstRow:
            name = path.split("/")[0]
            layers, active = self.parts.count(name), chosen.count(name)
            return FirstRow(layers - active) if 0 < active < layers else active > 0

        return active_where(self.params, entry)


def active_where(params: Any, choose: Callable[[str], bool | FirstRow]) -> Active:
    """Return what is active from a function of a parameter's path, such as ``"head/kernel"``."""
    return tuple(map(choose, leaf_paths(params)))


def mask_of(params: Any, active: Active) -> Any:
    """Return the bool mask that perturbs what is active: a scalar a leaf, or one value a row."""

    def mask(leaf: jax.Array, entry: bool | FirstRow) -> jax.Array:
        if not isinstance(entry, FirstRow):
            return jnp.array(entry)
        rows = jnp.arange(leaf.shape[0]) >= entry.row
        return rows.reshape(-1, *[1] * (leaf.ndim - 1))

    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten(map(mask, leaves, active))


def count(params: Any) -> int:
    """Return how many parameters there are."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def mlp(*, width: int = 16, layers: int = 3, batch: int = 4, inputs: int = 64) -> Problem:
    """Return a perceptron of ``layers`` linear layers, the last of them the head."""
    model = MLP(width, layers)
    images, labels = _images(batch, 1, inputs)
    params = _init(model, images)["params"]

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return _cross_entropy(model.apply({"params": params}, images), labels)

    parts = (*(f"hidden_{i}" for i in range(layers - 1)), "head")
    return Problem(loss_fn, params, (images, labels), False, parts)


class MLP(nn.Module):
    """Linear layers, and what is positive of their results in between."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits (batch, CLASSES) of arrays (batch, ...)."""
        x = x.reshape(x.shape[0], -1)
        for i in range(self.layers - 1):
            x = nn.relu(nn.Dense(self.width, name=f"hidden_{i}")(x))
        return nn.Dense(CLASSES, name="head")(x)


def resnet(
    *, widths: tuple[int, ...] = (8, 16), blocks: int = 2, batch: int = 4, size: int = 8, dtype: Any = None
) -> Problem:
    """Return a Linen ResNet with BatchNorm, whose running statistics are its aux.

    Args:
      widths: channels of each stage; every stage after the first halves height and width.
      blocks: residual blocks in each stage.
      batch: images.
      size: height and width of an image.
      dtype: to compute in; parameters are float32.
    """
    model = ResNet(widths, blocks, dtype)
    images, labels = _images(batch, size)
    variables = _init(model, images)

    def loss_fn(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> Any:
        logits, new = model.apply({"params": params, "batch_stats": stats}, images, mutable=["batch_stats"])
        return _cross_entropy(logits, labels), new["batch_stats"]

    parts = ("stem", *(f"block_{i}" for i in range(len(widths) * blocks)), "head")
    return Problem(loss_fn, variables["params"], (variables["batch_stats"], images, labels), True, parts)


class ResNet(nn.Module):
    """A stem, stages of residual blocks, and a linear head."""

    widths: tuple[int, ...]
    blocks: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits (batch, CLASSES) of images (batch, height, width, channels)."""
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False, dtype=self.dtype, name="stem")(x)
        for i in range(len(self.widths) * self.blocks):
            stage, in_stage = divmod(i, self.blocks)
            stride = 2 if stage and not in_stage else 1
            x = ResidualBlock(self.widths[stage], stride, self.dtype, name=f"block_{i}")(x)
        return nn.Dense(CLASSES, dtype=self.dtype, name="head")(x.mean(axis=(1, 2)))


class ResidualBlock(nn.Module):
    """Two convolutions behind normalisations, and a way past them."""

    channels: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return images of ``channels`` channels, smaller by the stride."""
        conv = functools.partial(nn.Conv, self.channels, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, use_running_average=False, dtype=self.dtype)
        y = conv((3, 3), self.stride)(nn.relu(norm()(x)))
        y = conv((3, 3))(nn.relu(norm()(y)))
        return y + (x if x.shape == y.shape else conv((1, 1), self.stride)(x))


def nnx_convnet(*, width: int = 8, batch: int = 4, size: int = 8) -> Problem:
    """Return an NNX network with BatchNorm and dropout: its other state goes in and comes out as aux.

    Dropout keys and counts are part of that state, so both passes drop the same units.
    """
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: ConvNet(width, nnx.Rngs(0))), nnx.Param, ...)
    params, rest = _drawn(params), _drawn(rest)

    def loss_fn(params: Any, rest: Any, images: jax.Array, labels: jax.Array) -> Any:
        model = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, rest))  # a copy: it is mutated
        loss = _cross_entropy(model(images), labels)
        return loss, nnx.split(model, nnx.Param, ...)[2]

    parts = ("conv_0", "norm_0", "conv_1", "norm_1", "hidden", "head")
    return Problem(loss_fn, params, (rest, *_images(batch, size)), True, parts)


class ConvNet(nnx.Module):
    """Two convolutions and a perceptron with dropout."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.conv_0 = nnx.Conv(3, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm_0 = nnx.BatchNorm(width, rngs=rngs)
        self.conv_1 = nnx.Conv(width, 2 * width, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(2 * width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.hidden = nnx.Linear(2 * width, 2 * width, rngs=rngs)
        self.head = nnx.Linear(2 * width, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits (batch, CLASSES) of images (batch, height, width, channels)."""
        x = nnx.relu(self.norm_0(self.conv_0(x)))
        x = nnx.relu(self.norm_1(self.conv_1(x))).mean(axis=(1, 2))
        return self.head(self.dropout(nnx.relu(self.hidden(self.dropout(x)))))


def vit(
    *, width: int = 16, layers: int = 4, heads: int = 2, batch: int = 2, size: int = 16, patch: int = 4
) -> Problem:
    """Return a vision transformer of unrolled layers, mean-pooled."""
    model = ViT(width, layers, heads, patch)
    images, labels = _images(batch, size)
    params = _init(model, images)["params"]

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return _cross_entropy(model.apply({"params": params}, images), labels)

    parts = ("embed", "positions", *(f"block_{i}" for i in range(layers)), "head")
    return Problem(loss_fn, params, (images, labels), False, parts)


class ViT(nn.Module):
    """Patches, transformer layers one after the other, their mean, and a head."""

    width: int
    layers: int
    heads: int
    patch: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits (batch, CLASSES) of images (batch, height, width, channels)."""
        x = nn.Conv(self.width, (self.patch, self.patch), self.patch, name="embed")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for i in range(self.layers):
            x = TransformerLayer(self.heads, name=f"block_{i}")(x)
        return Head(CLASSES, name="head")(x.mean(axis=1))


def scanned_transformer(
    *,
    width: int = 16,
    layers: int = 4,
    heads: int = 2,
    batch: int = 2,
    length: int = 16,
    vocabulary: int = 16,
    remat: bool = False,
) -> Problem:
    """Return a causal language model whose layers are one ``nn.scan`` over stacked parameters.

    Args:
      width: of the residual stream; the hidden layers of the perceptrons are four times as wide.
      layers: in the stack.
      heads: of attention.
      batch: sequences.
      length: tokens of a sequence.
      vocabulary: different tokens.
      remat: whether to recompute each layer in the backward pass.
    """
    model = LanguageModel(width, layers, heads, vocabulary, remat)
    tokens = np.random.default_rng(1).integers(vocabulary, size=(batch, length + 1), dtype=np.int32)
    params = _init(model, tokens[:, :-1])["params"]

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        return _cross_entropy(model.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:])

    parts = ("embed", *["blocks"] * layers, "head")
    return Problem(loss_fn, params, (jnp.asarray(tokens),), False, parts)


class LanguageModel(nn.Module):
    """Embedded tokens, a scan over transformer layers, and a head."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    remat: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return logits (batch, length, vocabulary) of the next tokens."""
        x = nn.Embed(self.vocabulary, self.width, name="embed")(tokens)
        causal = nn.make_causal_mask(tokens)
        layer = nn.remat(TransformerLayer, prevent_cse=False) if self.remat else TransformerLayer
        stack = nn.scan(
            lambda module, x, _: (module(x, causal), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
            check_constancy_invariants=False,  # the check of flax 0.11 needs a newer jax than 0.6
        )
        x, _ = stack(layer(self.heads, name="blocks"), x, None)
        return Head(self.vocabulary, name="head")(x)


class TransformerLayer(nn.Module):
    """Attention and a perceptron, each behind a normalisation and beside the residual stream."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Return the next (batch, length, width) from the last."""
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(self.heads, use_bias=False)
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden)


class Head(nn.Module):
    """A normalisation and a linear layer."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits (..., features)."""
        return nn.Dense(self.features)(nn.LayerNorm()(x))


def _init(model: nn.Module, inputs: jax.Array) -> Any:
    return _drawn(jax.eval_shape(model.init, jax.random.key(0), inputs))


def _drawn(shapes: Any) -> Any:
    """Return variables of the given shapes: random kernels, and norms that do nothing yet.

    NumPy draws them, because the initializers of Flax take longer to compile than a test to run.
    """
    generator = np.random.default_rng(0)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if {"scale", "var"} & set(path.split("/")):
            return jnp.asarray(np.ones(leaf.shape, leaf.dtype))
        if {"bias", "mean", "count"} & set(path.split("/")):
            return jnp.asarray(np.zeros(leaf.shape, leaf.dtype))
        kernel = generator.standard_normal(leaf.shape) / math.prod(leaf.shape[:-1]) ** 0.5
        return jnp.asarray(kernel.astype(leaf.dtype))

    return map_with_path(draw, shapes)


def _images(batch: int, size: int, channels: int = 3) -> tuple[jax.Array, jax.Array]:
    generator = np.random.default_rng(1)
    images = generator.standard_normal((batch, size, size, channels), np.float32)
    return jnp.asarray(images), jnp.asarray(generator.integers(CLASSES, size=batch, dtype=np.int32))


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
