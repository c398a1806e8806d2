"""`ssam` on trees and in chains that hypothesis makes up: what must hold, holds for all of them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import event, given, settings
from hypothesis import strategies as st

import ssam_jax
from ssam_jax import NM, Structured, Unstructured

EXAMPLES = 10  # each compiles a step
SHAPES = [(), (0,), (1,), (4,), (1, 4), (4, 1), (2, 4), (0, 4)]
DTYPES = [jnp.float32, jnp.float16, jnp.bfloat16]

# Trees.


@st.composite
def leaves(draw):
    """Draw a parameter of a few shapes and values, so that little is compiled."""
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    start = draw(st.sampled_from([-2.0, 0.0, 0.5]))
    return jnp.asarray(start + np.arange(math.prod(shape)).reshape(shape) / 8, dtype)


def containers(children):
    names = st.sampled_from(["kernel", "bias", "norm", "0"])
    lists = st.lists(children, max_size=3)
    return st.one_of(lists, lists.map(tuple), st.dictionaries(names, children, max_size=3))


# A tree that is None as a whole stands for parameters that were not given.
TREES = st.recursive(st.one_of(leaves(), st.none()), containers, max_leaves=5).filter(lambda x: x is not None)

# Masks, and how many entries of a tree each perturbs at least and at most.


def sizes(params):
    return [int(leaf.size) for leaf in jax.tree.leaves(params)]


def half_of_all(params):
    return [round(0.5 * sum(sizes(params)))] * 2


def half_of_each(params):
    return [sum(round(0.5 * size) for size in sizes(params))] * 2


def one_unit_more_at_most(params):
    columns = [
        size // max(1, (leaf.shape or (1,))[-1]) for size, leaf in zip(sizes(params), leaves_of(params))
    ]
    units = [max(1, column) for column, size in zip(columns, sizes(params)) if size]
    least = half_of_all(params)[0]
    return [least, least + max(units, default=1) - 1]


def groups(params):
    whole = sum(leaf.size for leaf in leaves_of(params) if leaf.ndim < 2 or leaf.shape[-1] % 4)
    return [whole + (sum(sizes(params)) - whole) // 2] * 2


def leaves_of(params):
    return jax.tree.leaves(params)


TWO_OF_FOUR = NM(2, 4, indivisible="whole")
CHANNEL = Structured(0.5, "channel")
RULES = {
    "dense": (lambda: None, lambda params: [sum(sizes(params))] * 2),
    "fixed": (lambda: ssam_jax.fixed_mask(lambda path: True), lambda params: [sum(sizes(params))] * 2),
    "fisher": (lambda: ssam_jax.fisher_mask(TWO_OF_FOUR, refresh_every=1), groups),
    "random": (lambda: ssam_jax.random_mask(TWO_OF_FOUR, refresh_every=1), groups),
    "fisher of all": (lambda: ssam_jax.fisher_mask(Unstructured(0.5), refresh_every=2), half_of_all),
    "random by channel": (lambda: ssam_jax.random_mask(CHANNEL, refresh_every=2), one_unit_more_at_most),
    "dynamic": (
        lambda: ssam_jax.dynamic_mask(Unstructured(0.5, "leaf"), refresh_every=1, total_steps=9),
        half_of_each,
    ),
}

# Chains.


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def injected(rule, **options):
    return optax.inject_hyperparams(ssam_jax.ssam)(rho=0.1, mask=rule, **options)


def chained(*rest, around=lambda tx: tx):
    return lambda rule, **options: around(optax.chain(ssam_jax.ssam(0.1, rule, **options), *rest))


SGD = optax.sgd(0.1, momentum=0.9)
CHAINS = {
    "sgd": chained(SGD),
    "clip, adam": chained(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale(-0.01)),
    "decay": chained(optax.add_decayed_weights(0.1), optax.scale_by_adam(), optax.scale(-0.01)),
    "masked decay": chained(optax.masked(optax.add_decayed_weights(0.1), matrices), SGD),
    "multi steps": chained(SGD, around=lambda tx: optax.MultiSteps(tx, every_k_schedule=2)),
    "if finite": chained(SGD, around=lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=3)),
    "named": lambda rule, **options: optax.named_chain(
        ("sam", ssam_jax.ssam(0.1, rule, **options)), ("sgd", SGD)
    ),
    "injected": lambda rule, **options: optax.chain(injected(rule, **options), SGD),
    "alternating": lambda rule, **options: ssam_jax.alternating(SGD, 0.1, rule, **options),
}
OPTIONS = [{}, {"normalize": "masked"}, {"adaptive": True}]

# What is wrong with the first gradient.

HARM = {
    "nothing": lambda g: g,
    "zeros": jnp.zeros_like,
    "nan": lambda g: jnp.full_like(g, jnp.nan),
    "one inf": lambda g: jnp.where(jnp.arange(g.size).reshape(g.shape) == 0, jnp.inf, g).astype(g.dtype),
}


def step_of(tx):
    """Return a step whose gradients are finite whatever the one that comes first is."""

    def step(params, state, grads):
        grad_fn = lambda point, i: jax.tree.map(jnp.cos, point)  # noqa: E731
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step


def kept(state, params):
    mask = ssam_jax.get_mask(state)
    if mask is None:
        return sum(sizes(params))
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(mask), leaves_of(params))
    return sum(int(np.broadcast_to(np.asarray(m), p.shape).sum()) for m, p in pairs)


def finite(tree):
    return all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(tree))


@pytest.fixture(autouse=True)
def _optax_may_promote():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@given(
    params=TREES,
    rule=st.sampled_from(list(RULES)),
    chain=st.sampled_from(list(CHAINS)),
    options=st.sampled_from(OPTIONS),
    harm=st.sampled_from(list(HARM)),
)
@settings(max_examples=EXAMPLES)
def test_a_tree_of_any_kind_in_a_chain_of_any_kind_trains(params, rule, chain, options, harm):
    event(f"{chain}, {rule}")
    make, allowed = RULES[rule]
    tx = CHAINS[chain](make(), **options)
    state = tx.init(params)
    before, (least, most) = tiny.spec((params, state)), allowed(params)
    assert tiny.spec(jax.eval_shape(tx.init, params)) == tiny.spec(state)
    assert least <= kept(state, params) <= most
    plain, step = step_of(tx), jax.jit(step_of(tx))
    point, counts = params, []
    for i in range(4):
        grads = jax.tree.map(jnp.cos, point)
        grads = grads if i else jax.tree.map(HARM[harm], grads)
        if i == 1:
            check_equal_without_jit(plain(point, state, grads), step(point, state, grads))
        point, state = step(point, state, grads)
        assert tiny.spec((point, state)) == before
        assert finite(point)
        counts.append(kept(state, params))
    assert finite(state)
    assert step._cache_size() == 1
    assert all(least <= count <= most for count in counts)
    assert 0 <= float(ssam_jax.mask_stats(state).density) <= 1


def check_equal_without_jit(plain, compiled):
    """Assert that parameters are equal but for the rounding of half precision, and counters exactly."""
    assert tiny.spec(plain) == tiny.spec(compiled)
    tiny.assert_close(
        *(jax.tree.map(lambda x: x.astype(jnp.float32), p) for p, _ in (plain, compiled)), 0.03, 0.03
    )
    counters = functools.partial(jax.tree.map, lambda x: x if x.dtype == jnp.int32 else None)
    tiny.assert_same(counters(plain[1]), counters(compiled[1]))
