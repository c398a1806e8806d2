"""Masks as bits: nothing is lost, leaves describe themselves, and a sharded leaf stays where it is."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

import ssam_jax
from ssam_jax import NM, Structured, Unstructured
from ssam_jax.masks import packing

SHAPES = {
    (): 1,
    (0, 64): 8,
    (63,): 1,
    (64,): 8,
    (96,): 1,  # twelve words, which eight devices would not divide
    (100, 10): 1,
    (128, 10): 16,
    (64, 64): 8,
    (4096, 192): 8,
    (4096, 100): 16,
    (192, 4096): 8,
    (3, 3, 64, 128): 8,
    (256, 256, 3, 3): 32,
}


def random_mask(shape, seed=0):
    return jnp.array(np.random.default_rng(seed).random(shape) < 0.5)


@pytest.mark.parametrize(("shape", "bits"), SHAPES.items(), ids=str)
def test_words_run_along_the_last_axis_that_is_divided(shape, bits):
    mask = random_mask(shape)
    packed = packing.pack({"leaf": mask})["leaf"]
    assert packing.word_bits(shape) == bits
    assert packed.dtype == (jnp.bool_ if bits == 1 else jnp.dtype(f"uint{bits}"))
    assert packed.ndim == mask.ndim and packed.nbytes == mask.nbytes // (1 if bits == 1 else 8)
    np.testing.assert_array_equal(packing.unpack({"leaf": packed})["leaf"], mask)


def test_a_bit_is_where_the_documentation_says():
    mask = jnp.zeros((128, 2), jnp.bool_).at[16 * 3 + 5, 1].set(True)
    packed = packing.pack(mask)
    assert packed.shape == (8, 2) and packed.dtype == jnp.uint16
    np.testing.assert_array_equal(
        packed, np.zeros((8, 2), int) + (np.indices((8, 2)) == [[[3]], [[1]]]).all(0) * 32
    )


def test_a_batch_of_packed_masks_is_unpacked_as_each_of_them():
    masks = jnp.stack([random_mask((512, 10), seed) for seed in range(3)])
    packed = jax.vmap(packing.pack)(masks)
    np.testing.assert_array_equal(packing.unpack(packed), masks)
    np.testing.assert_array_equal(packing.pack_like(masks, packed), packed)


@pytest.mark.parametrize("mode", ["auto", "explicit"])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [((64,), ("d",)), ((64, 64), ("d",)), ((64, 64), (None, "d")), ((128, 10), ("d",))],
    ids=str,
)
def test_a_sharded_mask_is_packed_and_unpacked_where_it_lies(mode, shape, spec):
    kind = {"auto": jax.sharding.AxisType.Auto, "explicit": jax.sharding.AxisType.Explicit}[mode]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    spec = PartitionSpec(*spec, *[None] * (len(shape) - len(spec)))
    mask = jax.device_put(random_mask(shape), NamedSharding(mesh, spec))
    round_trip = jax.jit(lambda m: (packed := packing.pack(m), packing.unpack(packed)))
    packed, unpacked = round_trip(mask)
    for leaf in (packed, unpacked):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    np.testing.assert_array_equal(unpacked, mask)
    text = round_trip.lower(mask).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))


def test_a_leaf_whose_words_explicit_axes_would_split_stays_bool():
    mesh = jax.sharding.AbstractMesh((16,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.ShapeDtypeStruct((64,), jnp.bool_, sharding=NamedSharding(mesh, PartitionSpec("d")))
    whole = jax.ShapeDtypeStruct((128,), jnp.bool_, sharding=spread.sharding)
    packed = jax.eval_shape(packing.pack, {"split": spread, "whole": whole})
    assert (packed["split"].dtype, packed["split"].shape) == (jnp.bool_, (64,))
    assert (packed["whole"].dtype, packed["whole"].shape) == (jnp.uint8, (16,))


PARAMS = {
    "bias": np.linspace(-1, 1, 64, dtype=np.float32),
    "kernel": np.sin(np.arange(128 * 64, dtype=np.float32) ** 2).reshape(128, 64),
    "stacked": np.cos(np.arange(2 * 256 * 10, dtype=np.float32) ** 2).reshape(2, 256, 10),
}
SIZE = sum(leaf.size for leaf in PARAMS.values())
HALF = Unstructured(0.5)
RULES = {
    "fisher": functools.partial(ssam_jax.fisher_mask, HALF, refresh_every=2),
    "fisher, 2:4": functools.partial(ssam_jax.fisher_mask, NM(2, 4, indivisible="whole"), refresh_every=2),
    "set": functools.partial(ssam_jax.fisher_mask, HALF, refresh_every=None),
    "dynamic": functools.partial(ssam_jax.dynamic_mask, HALF, refresh_every=2, total_steps=8),
    "dynamic, blocks": functools.partial(
        ssam_jax.dynamic_mask, Structured(0.5, "block", block=(2,)), refresh_every=2, total_steps=8
    ),
    "random": functools.partial(ssam_jax.random_mask, HALF, refresh_every=2),
    "fixed": functools.partial(ssam_jax.fixed_mask, jax.tree.map(lambda p: p > 0, PARAMS)),
}


def grad_fn(params, i):
    return jax.tree.map(lambda p, start: jnp.sin(3 * p) + jnp.array(start), params, PARAMS)


@pytest.mark.parametrize("rule", RULES)
def test_a_packed_state_has_the_masks_and_takes_the_steps_of_one_that_is_not(rule):
    ends = []
    for packed in (True, False):
        tx = ssam_jax.ssam(0.1, RULES[rule](packed=packed))

        @jax.jit
        def step(params, state, tx=tx):
            updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates)), state

        params, state = jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS)
        before = tiny.spec(state)
        masks = [ssam_jax.get_mask(state)]
        for _ in range(4):
            params, state = step(params, state)
            masks.append(ssam_jax.get_mask(state))
        assert tiny.spec(state) == before and step._cache_size() == 1
        ends.append((params, masks, ssam_jax.mask_stats(state), ssam_jax.active_leaves(state)))
        kept = state.mask._replace(memory=())
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state._replace(mask=kept)))
        whole = sum(m.size for m in jax.tree.leaves(masks[0]))
        assert size <= (whole / 8 if packed else whole) + 64
    tiny.assert_same(*ends)
    changes = [tiny.differ(a, b) for a, b in itertools.pairwise(masks)]
    assert changes == ([False] * 4 if rule in ("set", "fixed") else [False, True, False, True])


def test_a_mask_that_is_set_is_packed_as_the_one_before():
    tx = ssam_jax.ssam(0.1, RULES["set"]())
    state, mask = tx.init(PARAMS), jax.tree.map(lambda p: jnp.array(p > 0.3), PARAMS)
    for set_mask in (ssam_jax.set_mask, jax.jit(ssam_jax.set_mask)):
        new = set_mask(state, mask)
        assert tiny.spec(new) == tiny.spec(state)
        tiny.assert_same(ssam_jax.get_mask(new), mask)
        tiny.assert_same(jax.jit(ssam_jax.get_mask)(new), mask)


def test_a_batch_of_states_is_read_at_once():
    def init(seed):
        return ssam_jax.ssam(0.1, RULES["dynamic"](seed=seed)).init(PARAMS)

    states = jax.jit(jax.vmap(init))(jnp.arange(3))
    for seed, mask in enumerate(ssam_jax.get_mask(states)["stacked"]):
        np.testing.assert_array_equal(mask, ssam_jax.get_mask(init(seed))["stacked"])


@pytest.mark.parametrize("rule", RULES)
def test_packed_must_be_a_bool(rule):
    with pytest.raises(TypeError, match="packed must be a bool, got 1"):
        RULES[rule](packed=1)
