"""`empirical_fisher` against a loop over single examples."""

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_sharding import mesh_context

from ssam_jax import empirical_fisher

EXAMPLES = 7


def loss_fn(params, example):
    x, label = example
    hidden = jnp.tanh(jnp.einsum("i,ij->j", x, params["kernel"]) + params["bias"])
    return -jax.nn.log_softmax(hidden)[label]


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {"bias": jnp.array(rng.normal(size=3), dtype), "kernel": jnp.array(rng.normal(size=(4, 3)), dtype)}


def make_batch(examples=EXAMPLES, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return jnp.array(rng.normal(size=(examples, 4)), dtype), jnp.array(rng.integers(0, 3, examples))


def by_loop(params, batch):
    """Return the mean of the squares of each example's gradient, in float64."""
    gradient = jax.jit(jax.grad(loss_fn))
    grads = [gradient(params, example) for example in zip(*batch)]
    return jax.tree.map(lambda *g: np.mean(np.square(np.array(g, np.float64)), axis=0), *grads)


def fisher(params, batch, chunk_size):
    return jax.jit(lambda p, b: empirical_fisher(loss_fn, p, b, chunk_size=chunk_size))(params, batch)


def assert_close(tree, expected, rtol=1e-5):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-9), tree, expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, EXAMPLES, EXAMPLES + 1, 100])
def test_any_chunk_size_gives_what_a_loop_over_examples_gives(chunk_size):
    params, batch = make_params(), make_batch()
    assert_close(fisher(params, batch, chunk_size), by_loop(params, batch))


def test_it_is_the_mean_of_squares_not_the_square_of_the_mean():
    def loss(w, x):
        return w * x

    batch = jnp.array([1.0, -1.0, 3.0, -3.0])
    assert float(empirical_fisher(loss, jnp.float32(2.0), batch, chunk_size=3)) == 5.0


def test_a_single_example_is_enough():
    params, batch = make_params(), make_batch(1)
    assert_close(empirical_fisher(loss_fn, params, batch, chunk_size=4), by_loop(params, batch))


def test_half_precision_parameters_give_float32_squares():
    params = make_params(jnp.bfloat16)
    batch = make_batch(dtype=jnp.bfloat16)
    scores = fisher(params, batch, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(scores)} == {jnp.dtype(jnp.float32)}
    assert_close(scores, by_loop(params, batch), rtol=0.1)
    half = jax.tree.map(lambda s: s.astype(jnp.bfloat16).astype(jnp.float32), scores)
    assert any(bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(scores), jax.tree.leaves(half)))


def test_none_subtrees_of_parameters_pass_through():
    def loss(params, x):
        return params["w"] * x

    scores = empirical_fisher(loss, {"w": jnp.float32(1), "frozen": None}, jnp.array([2.0]), chunk_size=1)
    assert scores == {"w": 4.0, "frozen": None}


def test_memory_does_not_grow_with_the_number_of_examples():
    def temporary_bytes(examples):
        run = jax.jit(lambda p, b: empirical_fisher(loss_fn, p, b, chunk_size=8))
        memory = run.lower(make_params(), make_batch(examples)).compile().memory_analysis()
        return memory.temp_size_in_bytes

    few, many = temporary_bytes(32), temporary_bytes(8 * 32)
    gradients_of_a_chunk = 8 * 4 * (3 + 12)
    assert few > 0
    assert many - few < gradients_of_a_chunk


def test_a_chunk_is_no_larger_than_asked_for():
    seen = []

    def loss(w, x):
        seen.append(1)
        return w * x

    program = str(
        jax.make_jaxpr(lambda w, b: empirical_fisher(loss, w, b, chunk_size=4))(1.0, jnp.ones(1000))
    )
    assert len(seen) <= 2, "the loss is traced once for whole chunks and once for the rest"
    assert "f32[4]" in program
    assert program.count("f32[1000]") <= 3, "the batch itself, handed on to the loop"


@pytest.mark.parametrize(
    "chunk_size, error, message",
    [
        (0, ValueError, "chunk_size must be at least 1, got 0"),
        (-3, ValueError, "chunk_size must be at least 1, got -3"),
        (2.0, TypeError, r"chunk_size must be an int of at least 1, got 2\.0"),
        (True, TypeError, "chunk_size must be an int of at least 1, got True"),
        (None, TypeError, "chunk_size must be an int of at least 1, got None"),
    ],
)
def test_a_wrong_chunk_size_is_refused(chunk_size, error, message):
    with pytest.raises(error, match=message):
        empirical_fisher(loss_fn, make_params(), make_batch(), chunk_size=chunk_size)


@pytest.mark.parametrize(
    "batch, sizes",
    [
        ((np.ones((3, 4)), np.ones(2)), r"\[\(2,\), \(3,\)\]"),
        ((np.ones((3, 4)), np.float32(1)), r"\[\(\), \(3,\)\]"),
        (np.ones((0, 4)), r"\[\(0,\)\]"),
        ({}, r"\[\]"),
    ],
)
def test_a_batch_without_a_common_number_of_examples_is_refused(batch, sizes):
    message = "batch must hold arrays of shape .* that agree on the number of examples.*got leading sizes "
    with pytest.raises(ValueError, match=message + sizes):
        empirical_fisher(loss_fn, make_params(), batch, chunk_size=2)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_parameters_that_are_not_real_floats_are_refused_by_path(dtype):
    params = {"layer": {"w": jnp.ones(2, dtype)}, "ok": jnp.ones(2)}
    with pytest.raises(TypeError, match=r"params must hold real floating-point arrays.*'layer/w' is"):
        empirical_fisher(loss_fn, params, make_batch(), chunk_size=2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("data")], ids=["replicated", "sharded"])
def test_a_batch_spread_over_devices_stays_there_and_scores_lie_with_the_parameters(kind, spec):
    kernel = np.sin(np.arange(16 * 8, dtype=np.float32)).reshape(16, 8)
    images, labels = np.cos(np.arange(64 * 16, dtype=np.float32) ** 2).reshape(64, 16), np.arange(64) % 8

    def loss(params, example):
        image, label = example
        return -jax.nn.log_softmax(image @ params["kernel"])[label]

    expected = empirical_fisher(loss, {"kernel": kernel}, (images, labels), chunk_size=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = {"kernel": jax.device_put(kernel, NamedSharding(mesh, spec))}
    batch = jax.device_put((images, labels), NamedSharding(mesh, PartitionSpec("data")))
    scores = jax.jit(lambda params, batch: empirical_fisher(loss, params, batch, chunk_size=16))
    with mesh_context(mesh):
        program = scores.lower(params, batch).compile()
        found = program(params, batch)["kernel"]
    np.testing.assert_allclose(found, expected["kernel"], rtol=1e-5)
    assert found.sharding.is_equivalent_to(params["kernel"].sharding, 2)
    moved = hlo.communicated(program.as_text())
    assert moved, "nothing was spread"
    if spec == PartitionSpec():
        assert {name for name, _ in moved} == {"all-reduce"}  # of the scores
