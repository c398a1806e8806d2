"""Random crops, flips and cutout, compiled and on the device: images travel as bytes and are made there.

The order is that of PyTorch's training scripts for CIFAR: black borders are added to the bytes, the crop is
taken and flipped, colors are normalized, and only then is a square set to zero, which is the mean color.
"""

import functools
from collections.abc import Callable, Sequence

import dm_pix as pix
import jax
import jax.numpy as jnp


def _each(fun: Callable[[jax.Array, jax.Array], jax.Array], key: jax.Array, images: jax.Array) -> jax.Array:
    """Map over a batch; an example's key is made of the given one and its position in the batch."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(images), dtype=jnp.uint32))
    return jax.vmap(fun)(keys, images)


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Surround each image, of shape (batch, height, width, channels), by zeros, and crop it at random."""
    wide = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return _each(lambda k, image: pix.random_crop(k, image, images.shape[1:]), key, wide)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Swap left and right in each image, of shape (batch, height, width, channels), with probability 0.5."""
    return _each(pix.random_flip_left_right, key, images)


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Return uint8 images of shape (..., channels) less the mean, over the standard deviation, per channel.

    Both are on the scale where 255 is 1. Computed in float32, whatever the dtype returned.

    Raises:
      ValueError: the images are not uint8.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"normalize takes images of uint8, got {images.dtype}.")
    shape = (1,) * (images.ndim - 1) + (-1,)
    shift, scale = (jnp.asarray(v, jnp.float32).reshape(shape) for v in (mean, std))
    return ((images.astype(jnp.float32) / 255 - shift) / scale).astype(dtype)


def random_cutout(key: jax.Array, images: jax.Array, size: int, probability: float = 0.5) -> jax.Array:
    """Set a square of each image, of shape (batch, height, width, channels), to zero with some probability.

    The square's center is uniform over the pixels, so that part of it may lie outside the image
    (DeVries & Taylor, arXiv:1708.04552, section 3); with an even side the center is the pixel below and to
    the right of the middle.
    """

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        height, width, _ = image.shape
        chosen, row, column = jax.random.split(key, 3)
        top = jax.random.randint(row, (), 0, height) - size // 2
        left = jax.random.randint(column, (), 0, width) - size // 2
        rows, columns = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
        inside = (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + size)
        return jnp.where(
            inside & jax.random.bernoulli(chosen, jnp.float32(probability)), jnp.zeros_like(image), image
        )

    return _each(one, key, images)


@functools.partial(jax.jit, static_argnames=("crop", "flip", "cutout", "cutout_probability", "dtype"))
def augment_batch(
    key: jax.Array,
    images: jax.Array,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    crop: int = 4,
    flip: bool = True,
    cutout: int = 0,
    cutout_probability: float = 0.5,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Return a batch for training: crop, flip, normalize, cut out; an example's draws are its own.

    Args:
      key: of this batch.
      images: uint8 of shape (batch, height, width, channels).
      mean: of each channel, where 255 is 1.
      std: likewise, the standard deviation.
      crop: width of the black border before the crop, in pixels; 0 does not crop.
      flip: whether to swap left and right in half of the images.
      cutout: side of the square to cut out, in pixels; 0 cuts nothing out.
      cutout_probability: share of the images to cut from.
      dtype: of the result.

    Raises:
      ValueError: the images are not uint8.
    """
    crop_key, flip_key, cutout_key = jax.random.split(key, 3)
    if crop:
        images = random_crop(crop_key, images, crop)
    if flip:
        images = random_flip(flip_key, images)
    result = normalize(images, mean, std, dtype)
    return random_cutout(cutout_key, result, cutout, cutout_probability) if cutout else result
