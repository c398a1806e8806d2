"""On a single device masks are selected as bits: the same masks as on several, which select bools."""

import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import ssam_jax
from ssam_jax import NM, Structured, Unstructured
from ssam_jax.masks import drawing, packing, shards

SHAPES = {
    "bias": (10,),
    "scale": (64,),
    "kernel": (3, 128),
    "tall": (256, 10),
    "conv": (3, 3, 5, 64),
    "none": (0, 64),
}
PATTERNS = {
    "global": Unstructured(0.7),
    "leaf": Unstructured(0.5, "leaf"),
    "channel": Structured(0.5, "channel"),
    "2:4": NM(2, 4, indivisible="whole"),
    "3:5 of inputs": NM(3, 5, axis=-2, indivisible="whole"),
}
RULES = {
    "fisher": functools.partial(ssam_jax.fisher_mask, refresh_every=2),
    "random": functools.partial(ssam_jax.random_mask, refresh_every=2),
    "dynamic": functools.partial(ssam_jax.dynamic_mask, refresh_every=2, total_steps=20),
    "dynamic by weight": functools.partial(
        ssam_jax.dynamic_mask, refresh_every=2, total_steps=20, drop="weight", grow="gradient"
    ),
}
CASES = [
    (rule, pattern, True)
    for rule in RULES
    for pattern in PATTERNS
    if not ("dynamic" in rule and ":" in pattern)
    and not (rule == "dynamic by weight" and pattern != "global")
]
CASES += [(rule, "global", False) for rule in ("fisher", "random", "dynamic")]


def run(rule, steps=2):
    """Return the states of some steps, jitted anew."""
    generator = np.random.default_rng(0)
    params = {name: jnp.asarray(generator.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
    # Scores of few values, so that ties are broken as well.
    slopes = {
        name: jnp.asarray(generator.integers(0, 4, shape), jnp.float32) for name, shape in SHAPES.items()
    }
    tx = optax.chain(ssam_jax.ssam(0.1, rule), optax.sgd(0.1))
    drawing._draw.clear_cache()  # which is by pattern; what a step compiles is by rule, and made anew

    @jax.jit
    def step(params, state):
        def grad_fn(p, i):
            return jax.tree.map(lambda x, s: s * jnp.sign(x), p, slopes)

        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    state, states = tx.init(params), []
    states.append(state)
    for _ in range(steps):
        params, state = step(params, state)
        states.append(state)
    return states


@pytest.mark.parametrize(("rule", "pattern", "packed"), CASES)
def test_masks_and_churn_are_those_of_several_devices(rule, pattern, packed, monkeypatch):
    several = run(RULES[rule](PATTERNS[pattern], packed=packed))
    monkeypatch.setattr(shards, "single", lambda: True)
    alone = run(RULES[rule](PATTERNS[pattern], packed=packed))
    drawing._draw.clear_cache()
    for a, b in zip(several, alone):
        tiny.assert_same(a[0].mask.bits, b[0].mask.bits)
        np.testing.assert_allclose(a[0].mask.churn, b[0].mask.churn, rtol=1e-6)
    assert tiny.differ(alone[0][0].mask.bits, alone[-1][0].mask.bits)


def test_rows_are_packed_and_unpacked_as_leaves_are():
    mask = jnp.asarray(np.random.default_rng(1).random((5, 128)) < 0.5)
    words = packing.pack_rows(mask)
    np.testing.assert_array_equal(words, packing.pack({"leaf": mask})["leaf"])
    np.testing.assert_array_equal(packing.unpack_rows(words), mask)


def test_churn_of_rows_is_exact_up_to_a_full_row():
    old, new = np.zeros((3, 1024), bool), np.zeros((3, 1024), bool)
    new[0], new[1, :512], old[1] = True, True, True
    found = packing.churn_of_rows(packing.pack_rows(jnp.asarray(old)), packing.pack_rows(jnp.asarray(new)))
    assert float(found) == np.float32(1024 / 1536)
    assert float(packing.churn_of_rows(*[packing.pack_rows(jnp.asarray(old[:1]))] * 2)) == 0


# Cost.


def kernels(mask, count):
    """Return the fusions of a compiled step, with this mask, of so many leaves."""
    params = {
        f"leaf{i}": jax.ShapeDtypeStruct((16, 16 + i, 64 * (1 + i % 2)), jnp.float32) for i in range(count)
    }
    tx = optax.chain(ssam_jax.ssam(0.1, mask), optax.sgd(0.1, momentum=0.9))

    def step(params, state):
        def grad_fn(params, i):
            return jax.grad(lambda p: sum(jnp.sum(jnp.square(x)) for x in p.values()))(params)

        return tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)

    lowered = jax.jit(step).lower(params, jax.eval_shape(tx.init, params))
    options = {
        "xla_cpu_use_fusion_emitters": True,
        "xla_backend_optimization_level": 3,
    }  # as outside of tests
    text = lowered.compile(options).as_text()
    return len(hlo.operations(text, "fusion"))


@pytest.mark.parametrize("pattern", ["global", "leaf"])
@pytest.mark.parametrize("rule", ["fisher", "random", "dynamic"])
def test_a_mask_adds_two_kernels_a_leaf_at_most(rule, pattern, monkeypatch):
    monkeypatch.setattr(shards, "single", lambda: True)
    made = RULES[rule](PATTERNS[pattern])
    growth = [kernels(mask, 8) - kernels(mask, 4) for mask in (made, None)]
    assert growth[0] - growth[1] <= 2 * 4
