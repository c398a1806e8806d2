"""Two passes from one trace of the loss: equal to two whole passes, for fewer operations, on real models.

Operations are those of matrix products and convolutions, relative to one gradient, which is what a
step of SGD computes. Two whole passes are 2.00.
"""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from counting import program_flops
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ssam_jax import FirstRow, choose_active, explain_two_pass, two_pass_value_and_grad

LENGTH = 0.1  # of the ascent step, along the gradient as it is


def compiled(fn, *args):
    """Compile a function; without the optimisations that are of no use in a single run, and slow."""
    options = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
    return jax.jit(fn).lower(*args).compile(options)


def run(fn, *args):
    """Return the results of a function and the operations that it takes when compiled."""
    executable = compiled(fn, *args)
    return executable(*args), program_flops(executable.as_text())


def shared(problem, active):
    """Return both passes as the library computes them: value and gradient of one and of the other."""

    def passes(params, *args):
        two_pass = two_pass_value_and_grad(problem.loss_fn, has_aux=problem.has_aux)
        value, grads, grad_fn = two_pass(params, *args, active=active)
        return (value, grads), grad_fn.value_and_grad(ascended(params, grads), 0)

    return passes


def whole(problem, mask, params, *args):
    """Return the same from two whole passes."""
    both = jax.value_and_grad(problem.loss_fn, has_aux=problem.has_aux)
    value, grads = both(params, *args)
    grads = jax.tree.map(lambda g, m: jnp.where(m, g, jnp.zeros_like(g)), grads, mask)
    return (value, grads), both(ascended(params, grads), *args)


def ascended(params, grads):
    return jax.tree.map(lambda p, g: p + jnp.asarray(LENGTH, p.dtype) * g, params, grads)


def mask_of(problem, active):
    mask = networks.mask_of(problem.params, active)
    return jax.tree.map(lambda m, p: np.broadcast_to(m, p.shape), mask, problem.params)


def assert_equal(actual, expected, tolerance=1e-6):
    """Assert that both passes' values and gradients are equal but for rounding.

    That is to ``tolerance`` times the largest entry of a tree, and to ten times that of each leaf's own.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a_tree, b_tree in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]]):
        pairs = list(zip(map(as_float64, jax.tree.leaves(a_tree)), map(as_float64, jax.tree.leaves(b_tree))))
        largest = max((np.abs(b).max(initial=0) for _, b in pairs), default=0)
        for a, b in pairs:
            bound = tolerance * min(largest, 10 * np.abs(b).max(initial=0))
            np.testing.assert_allclose(a, b, rtol=0, atol=bound)
    assert [x.dtype for x in jax.tree.leaves(actual)] == [x.dtype for x in jax.tree.leaves(expected)]


def as_float64(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, np.float64)


# Networks


NETWORKS = {
    "ResNet": functools.partial(networks.resnet, widths=(8, 12)),
    "NNX": networks.nnx_convnet,
    "ViT": networks.vit,
    "scanned": functools.partial(networks.scanned_transformer, width=32, vocabulary=8),
    "scanned, remat": functools.partial(networks.scanned_transformer, width=32, vocabulary=8, remat=True),
}


@functools.cache
def network(name):
    """Return a problem, its two whole passes compiled for any mask, and the operations of a gradient."""
    problem = NETWORKS[name]()
    mask = mask_of(problem, problem.last(0))
    passes = compiled(functools.partial(whole, problem), mask, problem.params, *problem.args)
    return problem, passes, program_flops(passes.as_text()) / 2


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize(
    ("name", "parts", "cost"),
    [
        ("ResNet", 1, 1.00),
        ("ResNet", 2, 1.16),
        ("ResNet", 3, 1.45),
        ("NNX", 2, 1.02),
        ("ViT", 2, 1.25),
        ("scanned", 1, 1.00),
        ("scanned", 2, 1.25),
        ("scanned, remat", 2, 1.25),
    ],
)
def test_the_last_parts_of_a_network_take_both_passes_for_their_share_of_the_work(name, parts, cost):
    problem, passes, gradient = network(name)
    active = problem.last(parts)
    actual, operations = run(shared(problem, active), problem.params, *problem.args)
    expected = passes(mask_of(problem, active), problem.params, *problem.args)
    assert_equal(actual, expected)
    assert round(operations / gradient, 2) <= cost
    predicted = explain_two_pass(problem.loss_fn, problem.params, *problem.args, active=active)
    assert predicted.relative_to_sgd == pytest.approx(operations / gradient, rel=0.05)


# Ways to run them


@pytest.mark.usefixtures("relaxed_promotion")
def test_bfloat16_layers_stay_what_they_are():
    problem = networks.resnet(widths=(8,), dtype=jnp.bfloat16)
    active = problem.last(2)
    actual, operations = run(shared(problem, active), problem.params, *problem.args)
    mask = mask_of(problem, active)
    expected, both = run(functools.partial(whole, problem), mask, problem.params, *problem.args)
    assert_equal(actual, expected, tolerance=2**-7)  # a unit of bfloat16; jax 0.10 gives equal bits
    assert operations < 0.8 * both


@pytest.mark.usefixtures("relaxed_promotion")
def test_seeds_are_mapped_over():
    problem = networks.nnx_convnet()
    active = problem.last(2)
    params = jax.tree.map(lambda p: jnp.stack([p, p * 1.5, -p]), problem.params)
    axes = (0, *[None] * len(problem.args))
    actual, operations = run(jax.vmap(shared(problem, active), axes), params, *problem.args)
    mask = mask_of(problem, active)
    naive = jax.vmap(functools.partial(whole, problem), (None, *axes))
    expected, both = run(naive, mask, params, *problem.args)
    assert_equal(actual, expected)
    assert operations < 0.51 * both


TO_SPREAD = {"width": 8, "layers": 3, "length": 8, "batch": 8}


@functools.cache
def on_one_device(active):
    problem = networks.scanned_transformer(**TO_SPREAD)
    return run(shared(problem, active), problem.params, *problem.args)[0]


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "model": 4}], ids=["data", "data and model"])
def test_eight_devices_share_batch_and_parameters(axes):
    problem = networks.scanned_transformer(**TO_SPREAD)
    active = problem.last(2)
    mesh = Mesh(np.array(jax.devices()).reshape(tuple(axes.values())), tuple(axes))

    def spread(leaf):
        fits = "model" in axes and leaf.ndim and leaf.shape[-1] % axes["model"] == 0
        return jax.device_put(
            leaf, NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "model") if fits else P())
        )

    params = jax.tree.map(spread, problem.params)
    tokens = jax.device_put(problem.args[0], NamedSharding(mesh, P("data")))
    actual, operations = run(shared(problem, active), params, tokens)
    naive = functools.partial(whole, problem)
    expected, both = run(naive, mask_of(problem, active), params, tokens)
    assert_equal(actual, expected, tolerance=1e-5)
    assert operations < 0.75 * both
    assert_equal(actual, on_one_device(active), tolerance=1e-5)


@pytest.mark.usefixtures("relaxed_promotion")
def test_the_most_that_a_budget_buys_is_the_last_layers_and_costs_what_was_said():
    problem, _, gradient = network("scanned")
    sizes = jax.tree.map(lambda p: np.ones(p.shape), problem.params)
    active = choose_active(problem.loss_fn, problem.params, *problem.args, scores=sizes, budget=1.3)
    rows = {entry for entry in active if isinstance(entry, FirstRow)}
    assert FirstRow(3) in rows
    _, operations = run(shared(problem, active), problem.params, *problem.args)
    assert 1.25 < operations / gradient < 1.3 * 1.05
