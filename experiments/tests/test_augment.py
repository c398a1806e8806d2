"""Augmentation against what can be read off images whose pixels say where they come from."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssam_experiments.data.augment import augment_batch, normalize, random_crop, random_cutout, random_flip

SIDE, PADDING, COUNT = 8, 2, 2000
MEAN, STD = (0.5, 0.25, 0.125), (0.25, 0.5, 1.0)


def telling_images(count):
    """Return equal images of three channels, in which each value occurs once and is never 0."""
    return np.tile(np.arange(1, 1 + 3 * SIDE**2, dtype=np.uint8).reshape(SIDE, SIDE, 3), (count, 1, 1, 1))


def noise(count):
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def close_to_uniform(values, n):
    """Check counts of 0 to n - 1 within five standard deviations."""
    share, counts = 1 / n, np.bincount(values, minlength=n)
    assert counts.size == n
    assert np.abs(counts - len(values) * share).max() < 5 * np.sqrt(len(values) * share * (1 - share))


def cropped(image, top, left):
    """Return the crop by hand: zeros, and what of the image lies inside."""
    result = np.zeros_like(image)
    for row in range(SIDE):
        for column in range(SIDE):
            r, c = row + top - PADDING, column + left - PADDING
            if 0 <= r < SIDE and 0 <= c < SIDE:
                result[row, column] = image[r, c]
    return result


@pytest.fixture(scope="module")
def crops():
    images = telling_images(COUNT)
    result = jax.jit(random_crop, static_argnums=2)(jax.random.key(0), images, PADDING)
    assert result.shape == images.shape and result.dtype == jnp.uint8
    return np.asarray(result)


def test_a_crop_is_one_of_all_crops_each_as_likely_and_black_at_the_border(crops):
    image, offsets = telling_images(1)[0], range(2 * PADDING + 1)
    index = {cropped(image, *at).tobytes(): i for i, at in enumerate(itertools.product(offsets, offsets))}
    assert len(index) == len(offsets) ** 2
    close_to_uniform([index[crop.tobytes()] for crop in crops], len(index))


def test_a_crop_keeps_the_channels_of_a_pixel_together(crops):
    first, *others = np.moveaxis(crops.astype(int), -1, 0)
    for i, other in enumerate(others, start=1):
        np.testing.assert_array_equal(other, np.where(first, first + i, 0))


def test_half_of_the_images_are_flipped_left_to_right():
    images = noise(COUNT)
    result = np.asarray(jax.jit(random_flip)(jax.random.key(0), images))
    flipped = np.all(result == images[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(flipped | np.all(result == images, axis=(1, 2, 3)))
    close_to_uniform(flipped.astype(int), 2)


compiled_cutout = jax.jit(random_cutout)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_cutout_is_a_square_about_any_pixel_each_as_likely_and_clipped_at_the_border(size):
    images = np.ones((COUNT, SIDE, SIDE, 3), np.float32)
    result = np.asarray(compiled_cutout(jax.random.key(0), images, size, 1.0))
    index = {}
    for row in range(SIDE):
        for column in range(SIDE):
            top, left = row - size // 2, column - size // 2
            image = images[0].copy()
            image[max(top, 0) : top + size, max(left, 0) : left + size] = 0
            index[image.tobytes()] = len(index)
    assert len(index) == SIDE**2
    close_to_uniform([index[image.tobytes()] for image in result], SIDE**2)


def test_cutout_leaves_images_alone_with_the_probability_that_remains():
    images = np.ones((COUNT, SIDE, SIDE, 3), np.float32)
    result = np.asarray(compiled_cutout(jax.random.key(0), images, 4, 0.25))
    cut = np.any(result == 0, axis=(1, 2, 3))
    assert abs(cut.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / COUNT)
    np.testing.assert_array_equal(result[~cut], 1)


def test_a_cutout_larger_than_the_image_leaves_nothing():
    images = np.ones((COUNT, SIDE, SIDE, 3), np.float32)
    assert not np.any(compiled_cutout(jax.random.key(0), images, 4 * SIDE, 1.0))


def test_normalize_is_the_formula_in_float32_and_then_the_dtype():
    images = noise(3)
    wanted = ((images / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32)
    result = normalize(images, MEAN, STD)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, wanted, rtol=1e-6, atol=1e-6)
    half = normalize(images, MEAN, STD, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, result.astype(jnp.bfloat16))


def test_images_that_are_no_bytes_are_refused():
    with pytest.raises(ValueError, match="uint8, got float32"):
        normalize(jnp.ones((1, SIDE, SIDE, 3)), MEAN, STD)


def test_without_augmentation_a_batch_is_normalized_and_nothing_else():
    images = noise(5)
    result = augment_batch(jax.random.key(0), images, MEAN, STD, crop=0, flip=False)
    np.testing.assert_allclose(result, normalize(images, MEAN, STD), rtol=1e-6, atol=1e-6)


def augmented(images, key, **options):
    return augment_batch(key, images, MEAN, STD, crop=PADDING, cutout=3, **options)


def test_a_border_is_black_and_a_cutout_has_the_mean_color():
    result = augmented(np.full((16, SIDE, SIDE, 3), 255, np.uint8), jax.random.key(0))
    black, white = ((level - np.array(MEAN)) / STD for level in (0, 1))
    pixels = np.asarray(result).reshape(-1, 3)
    kinds = [np.all(np.abs(pixels - color) < 1e-6, axis=1) for color in (black, white, np.zeros(3))]
    assert all(kind.any() for kind in kinds)
    assert np.all(np.logical_or.reduce(kinds))


def test_a_batch_depends_on_its_key_alone():
    images, key = noise(16), jax.random.key(3)
    first = augmented(images, key)
    assert first.dtype == jnp.float32 and first.shape == images.shape
    np.testing.assert_array_equal(first, augmented(images, key))
    assert np.any(first != augmented(images, jax.random.key(4)))


def test_an_example_is_augmented_alike_in_a_smaller_batch_within_another_compiled_function_and_rounded():
    images, key = noise(16), jax.random.key(3)
    part = jax.jit(lambda images: augmented(images, key, dtype=jnp.bfloat16))(images[:5])
    assert part.dtype == jnp.bfloat16
    np.testing.assert_allclose(part.astype(jnp.float32), augmented(images, key)[:5], rtol=2**-8, atol=1e-3)


def test_a_batch_spread_over_devices_is_augmented_as_on_one_and_stays_spread():
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    images, key = noise(16), jax.random.key(3)
    spread = augmented(jax.device_put(images, sharding), key)
    np.testing.assert_array_equal(spread, augmented(images, key))
    assert spread.sharding.is_equivalent_to(sharding, spread.ndim)
