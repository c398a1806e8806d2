"""Sparse SAM trains models of every library: all it asks for is a tree of arrays."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ssam_jax

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)
X = np.sin(np.arange(1, 8 * 4 + 1, dtype=np.float32) ** 2).reshape(8, 4)
Y = (X.sum(axis=1, keepdims=True) > 0).astype(np.float32)
WIDTH = 8


def dictionary():
    first, second = jax.random.split(KEY)
    params = {
        "first": {"b": jnp.zeros(WIDTH), "w": jax.random.normal(first, (4, WIDTH)) / 2},
        "second": {"b": jnp.zeros(1), "w": jax.random.normal(second, (WIDTH, 1)) / 2},
    }

    def apply(params, x):
        for name in ("first", "second"):
            x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
        return x

    return params, apply


def equinox():
    model = eqx.nn.MLP(4, 1, WIDTH, 1, final_activation=jnp.tanh, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


def haiku():
    net = hk.without_apply_rng(
        hk.transform(lambda x: jnp.tanh(hk.nets.MLP([WIDTH, 1], activation=jnp.tanh)(x)))
    )
    return net.init(KEY, X), net.apply


def linen():
    net = nn.Sequential([nn.Dense(WIDTH), jnp.tanh, nn.Dense(1), jnp.tanh])
    return net.init(KEY, X), net.apply


def split_nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(4, WIDTH, rngs=rngs), jnp.tanh, nnx.Linear(WIDTH, 1, rngs=rngs), jnp.tanh
    )
    graph, params = nnx.split(model)
    return params, lambda params, x: nnx.merge(graph, params)(x)


@pytest.mark.parametrize("library", [dictionary, equinox, haiku, linen, split_nnx])
def test_a_model_of_any_library_trains_with_half_of_its_parameters_perturbed(library):
    params, apply = library()
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert size == 4 * WIDTH + WIDTH + WIDTH + 1

    def loss_fn(params):
        return jnp.mean((apply(params, X) - Y) ** 2)

    two_pass = ssam_jax.two_pass_value_and_grad(loss_fn)
    rule = ssam_jax.fisher_mask(ssam_jax.NM(1, 2, axis=0, indivisible="whole"), refresh_every=5)
    tx = optax.chain(ssam_jax.ssam(0.05, rule), optax.sgd(0.5))

    @jax.jit
    def step(params, state):
        loss, grads, grad_fn = two_pass(params)
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state, loss

    state, losses = jax.jit(tx.init)(params), []
    first_mask, structure = jax.tree.leaves(ssam_jax.get_mask(state)), jax.tree.structure(params)
    for _ in range(20):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    last_mask = jax.tree.leaves(ssam_jax.get_mask(state))
    assert losses[-1] < 0.5 * losses[0]
    assert jax.tree.structure(params) == structure
    grouped = [leaf for leaf in last_mask if leaf.ndim == 2]  # the others are perturbed whole
    assert grouped and all((leaf[::2] ^ leaf[1::2]).all() for leaf in grouped)
    assert any((a != b).any() for a, b in zip(first_mask, last_mask))


def test_paths_of_an_equinox_model_choose_what_is_perturbed():
    params, _ = equinox()
    state = ssam_jax.ssam(0.1, ssam_jax.fixed_mask(lambda path: path.endswith("weight"))).init(params)
    shares = {path: float(share) for path, share in ssam_jax.mask_stats(state).by_leaf.items()}
    assert {path.rpartition("/")[2]: share for path, share in shares.items()} == {"weight": 1, "bias": 0}
    assert len(shares) == 4
