"""Outside jit: each program is compiled once, however often a step is taken, and memory does not grow."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import ssam_jax
from ssam_jax import NM, Structured, Unstructured, combine, directions, radii

PATTERNS = {
    "global": Unstructured(0.5),
    "leaf": Unstructured(0.5, scope="leaf"),
    "tensor": Structured(0.5),
    "channel": Structured(0.5, unit="channel", axis=-1),
    "2:4": NM(2, 4),
}
EVERY = {"refresh_every": 3}
RULES = {
    **{f"fisher {n}": (lambda p=p: ssam_jax.fisher_mask(p, **EVERY)) for n, p in PATTERNS.items()},
    "random": lambda: ssam_jax.random_mask(PATTERNS["global"], **EVERY),
    "dynamic": lambda: ssam_jax.dynamic_mask(PATTERNS["global"], total_steps=99, **EVERY),
    "fixed": lambda: ssam_jax.fixed_mask(lambda path: path.startswith("first")),
    "dense": lambda: None,
}
SGD = optax.sgd(0.1, momentum=0.9)
CARRIERS = {
    "ssam": lambda rule: optax.chain(ssam_jax.ssam(0.1, rule), SGD),
    "alternating": lambda rule: ssam_jax.alternating(SGD, 0.1, rule),
    "carried": lambda rule: ssam_jax.carried(SGD, 0.1, rule),
}
FACTORS = {
    "F-SAM": {"direction": directions.friendly()},
    "noise": {"direction": directions.noise(0)},
    "LookSAM": {"rho": radii.every(3, 0.1), "combine": combine.looksam(0.5), "skip_zero_rho": True},
    "AE-SAM": {"rho": radii.adaptive_gate(0.1, 20)},
}


@pytest.fixture
def compiled():
    """Return a list that grows by one for every program that is compiled."""
    seen, active = [], [True]

    def listen(event, duration, **extra):
        if active[0] and event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    active[0] = False


def steps(tx, state, params, count):
    for batch in tiny.BATCHES[:count]:
        grad_fn = tiny.grad_fn_of(batch)
        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    ("carrier", "rule"),
    [("ssam", rule) for rule in RULES]
    + [(carrier, rule) for carrier in ("alternating", "carried") for rule in ("fisher global", "dynamic")],
)
def test_eager_steps_compile_what_the_first_refresh_compiles_and_no_more(compiled, carrier, rule):
    tx = CARRIERS[carrier](RULES[rule]())
    params, state = steps(tx, tx.init(tiny.params()), tiny.params(), 6)
    before = len(compiled)
    steps(tx, state, params, 20)
    assert len(compiled) == before


@pytest.mark.parametrize("factors", FACTORS)
def test_eager_steps_of_the_other_factors_compile_once(compiled, factors):
    tx = optax.chain(ssam_jax.ssam(**{"rho": 0.1, **FACTORS[factors]}), SGD)
    params, state = steps(tx, tx.init(tiny.params()), tiny.params(), 6)
    before = len(compiled)
    steps(tx, state, params, 20)
    assert len(compiled) == before


def test_memory_does_not_grow_over_200_eager_steps():
    tx = CARRIERS["ssam"](RULES["fisher global"]())
    params, state = steps(tx, tx.init(tiny.params()), tiny.params(), 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10):
        params, state = steps(tx, state, params, 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20e3  # kilobytes


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_called_eagerly_compiles_once(compiled, pattern):
    scores = jax.tree.map(np.square, tiny.PARAMS)
    PATTERNS[pattern](scores)
    before = len(compiled)
    for i in range(20):
        PATTERNS[pattern](jax.tree.map(lambda s, i=i: jnp.asarray(s + i), scores))
    assert len(compiled) - before <= 2  # the additions here


def test_the_empirical_fisher_called_eagerly_compiles_once(compiled):
    def loss(params, example):
        return tiny.loss(params, example[None])

    ssam_jax.empirical_fisher(loss, tiny.params(), jnp.asarray(tiny.BATCHES[0]), chunk_size=2)
    before = len(compiled)
    for batch in tiny.BATCHES:
        ssam_jax.empirical_fisher(loss, tiny.params(), jnp.asarray(batch), chunk_size=2)
    assert len(compiled) == before
