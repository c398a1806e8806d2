"""The measures of sharpness on parameters spread over eight devices: the same numbers, and no gather."""

import contextlib
import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssam_jax import sharpness
from ssam_jax.sharpness import hessian, objective
from ssam_jax.sharpness.vectors import layout_of

P = PartitionSpec
PARAMS = {
    "b": np.sin(np.arange(64, dtype=np.float32)),
    "w1": np.cos(np.arange(16 * 64, dtype=np.float32)).reshape(16, 64),
    "w2": np.sin(np.arange(48 * 32, dtype=np.float32) ** 2).reshape(48, 32),
}
SPECS = {"b": P("t"), "w1": P(None, "t"), "w2": P(("f", "t"))}
BATCHES = [np.sin(np.arange(8 * 16, dtype=np.float32) * i).reshape(8, 16) for i in (1, 2)]
DEPTH = 6


def loss(params, batch):
    hidden = jnp.tanh(batch @ params["w1"] + params["b"][None])
    return jnp.mean(jnp.square(hidden)) + jnp.mean(params["w2"] ** 4)


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("f", "t"), axis_types=(kind,) * 2)


def spread(kind, specs=SPECS):
    mesh = mesh_of(kind)
    return jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), PARAMS, specs)


@contextlib.contextmanager
def everything_on(kind):
    """Yield parameters and batches on eight devices, in the context that their mesh needs."""
    mesh = mesh_of(kind)
    context = contextlib.nullcontext()
    if kind == AxisType.Explicit:
        context = jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)
    with context:
        yield spread(kind), [jax.device_put(b, NamedSharding(mesh, P("f"))) for b in BATCHES]


MEASURES = {
    "worst case": functools.partial(sharpness.worst_case_rise, rho=0.1, steps=2),
    "average": functools.partial(sharpness.average_rise, sigma=0.1, samples=2),
    "eigenpairs": functools.partial(sharpness.hessian_eigenpairs, k=2, depth=DEPTH),
    "trace": functools.partial(sharpness.hessian_trace, probes=2),
    "density": functools.partial(sharpness.spectral_density, probes=1, depth=DEPTH),
}


@functools.cache
def on_one_device(name):
    return MEASURES[name](loss, PARAMS, BATCHES, progress=False)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", MEASURES)
def test_eight_devices_measure_what_one_does(name, kind):
    with everything_on(kind) as (params, batches):
        found = MEASURES[name](loss, params, batches, progress=False)
    expected = on_one_device(name)
    tiny.assert_close(jax.device_get(found), jax.device_get(expected), rtol=2e-3, atol=1e-4)
    if name == "worst case":
        assert found.params["w2"].sharding.is_equivalent_to(params["w2"].sharding, 2)
    if name == "eigenpairs":
        rows = NamedSharding(params["w1"].sharding.mesh, P(None, *SPECS["w1"]))
        assert found.vectors["w1"].sharding.is_equivalent_to(rows, 3)


def test_lanczos_gathers_nothing_that_is_spread():
    with everything_on(AxisType.Auto) as (params, batches):
        measured = objective.objective(loss, params, batches)
        layout = layout_of(measured.params)
        program = hessian._eigenpairs_program(loss, layout, 1, DEPTH, False)
        text = program.lower(measured.params, measured.batches, jax.random.key(0)).compile().as_text()
    block = 16 * 64 // 4  # of w1, which a device holds and another one has a copy of
    assert max(size for _, size in hlo.communicated(text)) <= block
    assert max(hlo.element_counts(text)) <= DEPTH * layout.size / 8 + DEPTH


@pytest.mark.parametrize(
    "specs",
    [
        SPECS,
        {"b": P(), "w1": P("t", "f"), "w2": P(None, "t")},
        {"b": P(("t", "f")), "w1": P(), "w2": P("f")},
    ],
    ids=str,
)
def test_a_vector_has_the_entries_of_its_tree_once(specs):
    params = spread(AxisType.Auto, specs)
    layout = layout_of(params)
    vector = jax.jit(layout.vector)(params)
    assert {s.data.size for s in vector.addressable_shards} == {vector.size // 8}
    entries = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(PARAMS)])
    kept = np.asarray(vector)
    np.testing.assert_array_equal(np.sort(kept[kept != 0]), np.sort(entries[entries != 0]))
    back = jax.jit(layout.as_tree)(vector)
    tiny.assert_same(jax.device_get(back), PARAMS)
    for name, leaf in back.items():
        assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)


def test_parts_that_do_not_divide_evenly_are_filled_up():
    tree = {
        "a": np.arange(1.0, 6.0, dtype=np.float32),
        "none": None,
        "scalar": np.float32(7),
        "z": np.ones((0, 3)),
    }
    mesh = mesh_of(AxisType.Auto)
    params = jax.tree.map(
        lambda x: jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(mesh, P())), tree
    )
    layout = layout_of(params)
    vector = jax.jit(layout.vector)(params)
    assert layout.size == 6 and vector.shape == (16,)
    np.testing.assert_allclose(jnp.sum(vector), 22)
    tiny.assert_same(jax.jit(layout.as_tree)(vector), jax.tree.map(jnp.asarray, params))
