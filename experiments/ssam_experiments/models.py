"""Image classifiers of the Sparse SAM papers, and small ones of each kind, in Flax Linen.

Layers, padding and sizes are those of the usual PyTorch models, down to the number of parameters; of those
with convolutions, the ones in github.com/Mi-Peng/Sparse-Sharpness-Aware-Minimization (arXiv 2306.17504):

- ResNet (arXiv 1512.03385): for ImageNet that of torchvision, with the stride of a bottleneck in its 3x3
  convolution; for CIFAR the same behind a stem of one 3x3 convolution and no pooling.
- Wide ResNet (arXiv 1605.07146): normalization before convolution, and no dropout.
- VGG with BatchNorm (arXiv 1409.1556): its dense layers see 7x7 features of ImageNet images, 1x1 of CIFAR's.
- ViT (arXiv 2010.11929) of the size of DeiT-S (arXiv 2012.12877), with a class token and no dropout.

Names of parameters, for masks by path; layers are numbered from 1 in the order in which they are used:

- ResNet: ``stem``, ``norm_stem``, ``stage_3/block_1/{conv_1,norm_1,conv_2,...}``, in blocks that change the
  shape also ``conv_shortcut`` and ``norm_shortcut``, then ``head``.
- Wide ResNet: ``stem``, ``stage_3/block_1/{norm_1,conv_1,...}``, ``conv_shortcut``, ``norm``, ``head``.
- VGG: ``stage_5/{conv_1,norm_1,...}``, ``hidden_1``, ``hidden_2``, ``head``.
- ViT: ``embed``, ``class_token``, ``positions``, ``block_12/{norm_1,attention,norm_2,dense_1,dense_2}``,
  ``norm``, ``head``; ``attention`` has ``query``, ``key``, ``value`` and ``out``.
- MLP: ``hidden_1``, ``hidden_2``, ``head``.

Below these are ``kernel`` and ``bias``, and in normalizations ``scale`` and ``bias``. So ``(^|/)norm`` finds
the normalizations of every model and nothing else, and ``^(stage_4/block_2|head)/`` the last block of a
ResNet-18 and its head. BatchNorm statistics are in the collection ``batch_stats``; ViT and MLP have none.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

Stem = Literal["cifar", "imagenet"]

# Convolutions start as in torchvision and in the wide ResNet: gradients keep their variance on the way back.
# Dense layers start as is usual in Flax, and every normalization with scale 1, the last of a block too.
HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(channels: int, size: int, stride: int, dtype: Any, name: str, use_bias: bool = False) -> nn.Conv:
    """Return a convolution padded as in PyTorch, where "SAME" would pad a strided one more at its end."""
    return nn.Conv(
        channels,
        (size, size),
        stride,
        padding=size // 2,
        use_bias=use_bias,
        kernel_init=HE_FAN_OUT,
        dtype=dtype,
        name=name,
    )


def batch_norm(train: bool, dtype: Any, name: str) -> nn.BatchNorm:
    """Return a normalization with the constants of PyTorch, and statistics in float32.

    The running variance is an average of biased ones, as is usual in Flax; PyTorch's are unbiased.
    """
    return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name)


def hidden_layers(x: jax.Array, width: int, dropout: float, train: bool, dtype: Any) -> jax.Array:
    """Return the output (batch, width) of two dense layers, for a module to call."""
    for name in ("hidden_1", "hidden_2"):
        x = nn.relu(nn.Dense(width, dtype=dtype, name=name)(x))
        x = nn.Dropout(dropout, deterministic=not train)(x)
    return x


class Classifier(nn.Module):
    """What every model is made with; each takes images (batch, height, width, channels).

    Attributes:
      classes: logits for each image.
      kind: of images, and so of the first layers: small ones, or those of ImageNet.
      dtype: to compute in; parameters, BatchNorm statistics and logits are float32 in any case.
    """

    classes: int
    kind: Stem
    dtype: Any

    def logits(self, features: jax.Array) -> jax.Array:
        """Return logits (batch, classes) of features (batch, channels)."""
        return nn.Dense(self.classes, dtype=jnp.float32, name="head")(features)


class ResidualBlock(nn.Module):
    """Convolutions, each before a normalization, and a way past them.

    Attributes:
      convs: channels, size and stride of each.
      dtype: to compute in.
    """

    convs: tuple[tuple[int, int, int], ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return features that are smaller by the strides."""
        y = x
        for i, (channels, size, stride) in enumerate(self.convs, 1):
            y = nn.relu(y) if i > 1 else y
            y = conv(channels, size, stride, self.dtype, f"conv_{i}")(y)
            y = batch_norm(train, self.dtype, f"norm_{i}")(y)
        if x.shape != y.shape:
            stride = max(stride for _, _, stride in self.convs)
            x = conv(y.shape[-1], 1, stride, self.dtype, "conv_shortcut")(x)
            x = batch_norm(train, self.dtype, "norm_shortcut")(x)
        return nn.relu(x + y)


def basic(channels: int, stride: int, dtype: Any, name: str) -> ResidualBlock:
    """Return a block of ResNet-18 or 34."""
    return ResidualBlock(((channels, 3, stride), (channels, 3, 1)), dtype, name=name)


def bottleneck(channels: int, stride: int, dtype: Any, name: str) -> ResidualBlock:
    """Return a block of ResNet-50 or deeper."""
    convs = ((channels, 1, 1), (channels, 3, stride), (4 * channels, 1, 1))
    return ResidualBlock(convs, dtype, name=name)


class WideBlock(nn.Module):
    """Two convolutions, each after a normalization, and a way past them; the block of a wide ResNet."""

    channels: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return features that are smaller by the stride."""
        y = nn.relu(batch_norm(train, self.dtype, "norm_1")(x))
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.stride, self.dtype, "conv_shortcut")(y)
        y = conv(self.channels, 3, self.stride, self.dtype, "conv_1")(y)
        y = nn.relu(batch_norm(train, self.dtype, "norm_2")(y))
        return x + conv(self.channels, 3, 1, self.dtype, "conv_2")(y)


class Stage(nn.Module):
    """Residual blocks, made by ``block(channels, stride, dtype, name)``; only the first has the stride."""

    block: Callable[..., nn.Module]
    count: int
    channels: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return features that are smaller by the stride."""
        for i in range(self.count):
            stride = 1 if i else self.stride
            x = self.block(self.channels, stride, self.dtype, name=f"block_{i + 1}")(x, train=train)
        return x


class ResNet(Classifier):
    """A stem, stages of residual blocks, and a linear head on their mean over the pixels.

    Attributes:
      counts: blocks of each stage; every stage after the first halves height and width.
      block: as in `Stage`.
      width: channels of the first stage's blocks; they double from stage to stage.
      stem_width: channels of the stem.
      preactivated: whether blocks normalize first, so that one normalization comes after them all
        and none in the stem.
      small_stem: size and stride of the stem's convolution for small images.
    """

    counts: tuple[int, ...]
    block: Callable[..., nn.Module]
    width: int = 64
    stem_width: int = 64
    preactivated: bool = False
    small_stem: tuple[int, int] = (3, 1)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Return logits; for ImageNet a quarter of the height and width leaves the stem."""
        size, stride = (7, 2) if self.kind == "imagenet" else self.small_stem
        x = conv(self.stem_width, size, stride, self.dtype, "stem")(images)
        if not self.preactivated:
            x = nn.relu(batch_norm(train, self.dtype, "norm_stem")(x))
        if self.kind == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, count in enumerate(self.counts):
            channels, stride = self.width * 2**i, 2 if i else 1
            stage = Stage(self.block, count, channels, stride, self.dtype, name=f"stage_{i + 1}")
            x = stage(x, train=train)
        if self.preactivated:
            x = nn.relu(batch_norm(train, self.dtype, "norm")(x))
        return self.logits(x.mean(axis=(1, 2), dtype=jnp.float32))


class VggStage(nn.Module):
    """Convolutions, each before a normalization, and a pooling that halves height and width."""

    channels: int
    count: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return features of half the size."""
        for i in range(1, self.count + 1):
            x = conv(self.channels, 3, 1, self.dtype, f"conv_{i}", use_bias=True)(x)
            x = nn.relu(batch_norm(train, self.dtype, f"norm_{i}")(x))
        return nn.max_pool(x, (2, 2), (2, 2))


class Vgg(Classifier):
    """Stages of convolutions and three dense layers with dropout between them, for images of either kind.

    Attributes:
      counts: convolutions of each stage.
    """

    counts: tuple[int, int, int, int, int]

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Return logits; parameters fit images of one size."""
        height, width = images.shape[1:3]
        if min(height, width) < 32:
            raise ValueError(f"VGG halves images five times and needs 32x32 or more, got {height}x{width}.")
        x = images
        for i, (channels, count) in enumerate(zip((64, 128, 256, 512, 512), self.counts), 1):
            x = VggStage(channels, count, self.dtype, name=f"stage_{i}")(x, train=train)
        return self.logits(hidden_layers(x.reshape(x.shape[0], -1), 4096, 0.5, train, self.dtype))


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each after a normalization, added to the residual stream."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the next (batch, length, width) from the last."""
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        attention = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, name="attention")
        x = x + attention(norm(name="norm_1")(x))
        hidden = dense(4 * x.shape[-1], name="dense_1")(norm(name="norm_2")(x))
        return x + dense(x.shape[-1], name="dense_2")(nn.gelu(hidden, approximate=False))


class VisionTransformer(Classifier):
    """Patches and a class token, ``depth`` transformer blocks, and a linear head on the token."""

    width: int
    depth: int
    heads: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Return logits; parameters fit images of one size."""
        patch = 16 if self.kind == "imagenet" else 4
        height, width = images.shape[1:3]
        if height % patch or width % patch:
            raise ValueError(f"ViT cannot cut {height}x{width} images into {patch}x{patch} patches.")
        x = nn.Conv(self.width, (patch, patch), patch, dtype=self.dtype, name="embed")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("class_token", nn.initializers.normal(0.02), (1, 1, self.width))
        token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([token, x], axis=1)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + positions.astype(x.dtype)
        for i in range(1, self.depth + 1):
            x = TransformerBlock(self.heads, self.dtype, name=f"block_{i}")(x)
        return self.logits(nn.LayerNorm(dtype=self.dtype, name="norm")(x[:, 0]))


class Mlp(Classifier):
    """Two hidden layers on the pixels, for images of either kind."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Return logits; parameters fit images of one size."""
        pixels = images.reshape(images.shape[0], -1)
        return self.logits(hidden_layers(pixels, self.width, 0.0, train, self.dtype))


wide = functools.partial(ResNet, block=WideBlock, width=160, stem_width=16, preactivated=True)

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": functools.partial(Mlp, width=128),
    "resnet6": functools.partial(
        ResNet, counts=(1, 1), block=basic, width=32, stem_width=32, small_stem=(5, 4)
    ),
    "resnet8": functools.partial(ResNet, counts=(1, 1, 1), block=basic, width=16, stem_width=16),
    "resnet18": functools.partial(ResNet, counts=(2, 2, 2, 2), block=basic),
    "resnet34": functools.partial(ResNet, counts=(3, 4, 6, 3), block=basic),
    "resnet50": functools.partial(ResNet, counts=(3, 4, 6, 3), block=bottleneck),
    "resnet101": functools.partial(ResNet, counts=(3, 4, 23, 3), block=bottleneck),
    "resnet152": functools.partial(ResNet, counts=(3, 8, 36, 3), block=bottleneck),
    "wrn28-10": functools.partial(wide, counts=(4, 4, 4)),
    "wrn34-10": functools.partial(wide, counts=(5, 5, 5)),
    "vgg11-bn": functools.partial(Vgg, counts=(1, 1, 2, 2, 2)),
    "vgg13-bn": functools.partial(Vgg, counts=(2, 2, 2, 2, 2)),
    "vgg16-bn": functools.partial(Vgg, counts=(2, 2, 3, 3, 3)),
    "vgg19-bn": functools.partial(Vgg, counts=(2, 2, 4, 4, 4)),
    "vit-tiny": functools.partial(VisionTransformer, width=64, depth=4, heads=4),
    "vit-s": functools.partial(VisionTransformer, width=384, depth=12, heads=6),
}


@functools.cache
def make_model(
    name: str, *, classes: int, stem: Stem, dtype: Any = jnp.float32, width: int | None = None
) -> nn.Module:
    """Return a model, whose ``apply(variables, images, train=...)`` returns float32 logits.

    The same arguments get the same object, so that what is compiled for one run serves others.

    Args:
      name: one of `MODELS`.
      classes: logits for each image.
      stem: first layers for small images, or for those of ImageNet; the same in VGG and MLP.
      dtype: to compute in; parameters, BatchNorm statistics and logits are float32 in any case.
      width: in place of the model's own; a stem as wide as the first stage stays so.

    Returns:
      A module whose ``__call__(images, *, train)`` takes floating-point images (batch, height, width,
      channels). With ``train``, BatchNorm normalizes by the batch and updates the collection
      ``batch_stats``, and VGG needs a key for ``dropout``. It raises ValueError for images below 32x32
      (VGG), or whose height or width is no multiple of that of a patch (ViT): 4, or 16 for ImageNet.

    Raises:
      ValueError: ``name`` or ``stem`` is unknown, ``classes`` is below 1, or the model has no single width.
    """
    for argument, value, allowed in (("name", name, MODELS), ("stem", stem, get_args(Stem))):
        if value not in allowed:
            raise ValueError(f"{argument} must be one of {', '.join(allowed)}, got {value!r}.")
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}.")
    model = MODELS[name](classes=classes, kind=stem, dtype=dtype)
    if width is None:
        return model
    own = getattr(model, "width", None)
    if own is None:
        raise ValueError(f"{name} has no single width: leave width out, got {width}.")
    same = [field for field in ("width", "stem_width") if getattr(model, field, None) == own]
    changes: dict[str, Any] = dict.fromkeys(same, width)
    return model.clone(**changes)
