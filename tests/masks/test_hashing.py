"""Random bits by a counter: a permutation within a leaf, and masks that are uniform over seeds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssam_jax import NM, Pattern, Structured, Unstructured
from ssam_jax.masks import hashing

PARAMS = {"bias": np.zeros(40, np.float32), "kernel": np.zeros((8, 12), np.float32)}
SEEDS = 4000


def test_mixing_is_one_to_one():
    """Undo it step by step: each step of the mixer has an inverse."""
    x = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    y = np.asarray(hashing.mixed(jnp.asarray(x))).astype(np.uint64)
    for shift, factor in ((14, None), (15, 0x31848BAB), (11, 0xAC4C1B51), (17, 0xED5AD4BB)):
        if factor:
            y = y * pow(factor, -1, 2**32) % 2**32
        z = y
        for _ in range(32 // shift):
            z = y ^ (z >> np.uint64(shift))
        y = z
    np.testing.assert_array_equal(y, x)


def test_bits_within_a_leaf_all_differ_and_those_of_leaves_and_keys_have_nothing_in_common():
    index = jnp.arange(2**16, dtype=jnp.uint32)
    rows = []
    for seed in range(3):
        first, second = hashing.salts(jax.random.key_data(jax.random.key(seed)), 3)
        rows += [np.asarray(hashing.bits(index, a, b)) for a, b in zip(first, second)]
    assert all(len(np.unique(row)) == len(row) for row in rows)
    for i, a in enumerate(rows):
        for b in rows[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
            assert abs(np.mean(np.bitwise_count(a ^ b)) - 16) < 0.1


@functools.cache
def drawn(pattern):
    draw = jax.jit(jax.vmap(lambda seed: pattern.random(jax.random.key(seed), PARAMS)))
    return jax.tree.map(np.asarray, draw(jnp.arange(SEEDS)))


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_random_masks_are_uniform_by_position_and_by_leaf(share):
    mask = drawn(Unstructured(1 - share))
    flat = np.concatenate([m.reshape(SEEDS, -1) for m in mask.values()], axis=1)
    kept = round(share * flat.shape[1])
    assert (flat.sum(axis=1) == kept).all()
    density = kept / flat.shape[1]
    by_position = flat.mean(axis=0)
    assert np.abs(by_position - density).max() < 5 * np.sqrt(density * (1 - density) / SEEDS)
    # Entries of the first leaf: hypergeometric.
    size, part = flat.shape[1], 40
    mean = part * density
    variance = mean * (1 - density) * (size - part) / (size - 1)
    counts = mask["bias"].sum(axis=1)
    assert abs(counts.mean() - mean) < 5 * np.sqrt(variance / SEEDS)
    assert abs(counts.var() / variance - 1) < 0.15


def test_entries_are_drawn_as_if_by_lot_in_pairs():
    flat = np.concatenate([m.reshape(SEEDS, -1) for m in drawn(Unstructured(0.5)).values()], axis=1)
    together = (flat.T.astype(np.float64) @ flat) / SEEDS
    size = flat.shape[1]
    expected = 0.5 * (size / 2 - 1) / (size - 1)
    off = ~np.eye(size, dtype=bool)
    assert np.abs(together[off] - expected).max() < 6 * np.sqrt(0.25 * 0.75 / SEEDS)


@pytest.mark.parametrize("pattern", [NM(2, 4), Structured(0.5, "channel")], ids=str)
def test_random_groups_and_channels_are_uniform(pattern):
    kernel = drawn(pattern)["kernel"].mean(axis=0)
    assert np.abs(kernel - kernel.mean()).max() < 5 * np.sqrt(0.25 / SEEDS)


class Scores(Pattern):
    """Return the scores themselves, to see what a pattern of one's own is given."""

    def __call__(self, scores):
        return scores


def test_a_pattern_of_ones_own_is_given_uniform_scores():
    scores = Scores().random(jax.random.key(0), {"a": np.zeros((100, 100)), "b": np.zeros(10_000)})
    values = np.concatenate([np.ravel(x) for x in scores.values()])
    assert values.min() >= 0 and values.max() < 1
    assert np.abs(np.histogram(values, 20, (0, 1))[0] / 1000 - 1).max() < 0.15
