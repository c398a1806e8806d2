"""Sharded parameters: masks lie where the parameters lie, and nothing of their size moves."""

import contextlib
import os

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_contract as contract
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ssam_jax
from ssam_jax import NM, Structured, Unstructured, two_pass_value_and_grad
from ssam_jax._base import shardings
from ssam_jax.masks import packing, rows
from ssam_jax.masks import rule as masks
from ssam_jax.two_pass.active import FirstRow

P = PartitionSpec

PARAMS = {
    "bias": np.sin(np.arange(1, 17, dtype=np.float32)),
    "kernel": np.cos(np.arange(1, 16 * 64 + 1, dtype=np.float32)).reshape(
        16, 64
    ),  # so long that it is packed
}
GRADS = jax.tree.map(lambda p: np.sin(100 * p), PARAMS)
SHARD = 16 * 64 // 8
SMALL = 64
"""Entries that may travel: one score for each channel of the kernel."""

# Data and FSDP axes; an FSDP and a tensor axis.
LAYOUTS = {
    "1": ((1,), ("fsdp",), {"bias": P("fsdp"), "kernel": P("fsdp")}),
    "2": ((2,), ("fsdp",), {"bias": P(), "kernel": P(None, "fsdp")}),
    "4": ((4,), ("fsdp",), {"bias": P("fsdp"), "kernel": P("fsdp")}),
    "8": ((8,), ("fsdp",), {"bias": P("fsdp"), "kernel": P("fsdp")}),
    "2x4": ((2, 4), ("fsdp", "tensor"), {"bias": P("tensor"), "kernel": P("fsdp", "tensor")}),
}
RULES = {key: rule for key, rule in contract.RULES.items() if key[0] not in ("dense", "fixed")}
RULES["fixed", "fixed"] = lambda seed: ssam_jax.fixed_mask(lambda path: path == "kernel")


def mesh_of(layout, kind=AxisType.Auto):
    sizes, names, _ = LAYOUTS[layout]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def mesh_context(mesh):
    """Enter a mesh with explicit axes, as JAX wants it; others need no context."""
    if AxisType.Explicit not in mesh.axis_types:
        return contextlib.nullcontext()
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)


def sharded(tree, layout, kind=AxisType.Auto):
    mesh = mesh_of(layout, kind)
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, LAYOUTS[layout][2])


def part_of(spec, shape, whole):
    """Return the part of a spec for an array that broadcasts, or is packed, as a tuple of full rank."""
    full = (*spec, *[None] * (len(whole) - len(spec)))[len(whole) - len(shape) :]
    return tuple(
        None if n == 1 < m else axis for axis, n, m in zip(full, shape, whole[len(whole) - len(shape) :])
    )


def check_lies_with(tree, params):
    """Assert that every array lies as its parameter does, along the axes that they share."""
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        param = params[path[-1].key]
        spec = P(*part_of(param.sharding.spec, x.shape, param.shape))
        assert x.sharding.is_equivalent_to(NamedSharding(param.sharding.mesh, spec), x.ndim), (
            path,
            x.sharding,
        )


# Every rule with every pattern: one compiled program for each layout refreshes them all.


def before_refresh(rule):
    """Return a state whose mask is a chequerboard of 2 x 2 tiles, which every pattern can trade."""
    state = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(lambda: masks.init(rule, PARAMS))
    )
    tiles = {
        name: sum(i // 2 for i in np.indices(m.shape)) % 2 == 0 if m.shape else np.array(True)
        for name, m in state.mask.items()
    }
    return state._replace(bits=packing.pack_like(jax.tree.map(jnp.array, tiles), state.bits))


def placed(state, params):
    """Return a state whose masks and scores lie with the parameters."""
    mesh = params["kernel"].sharding.mesh

    def place(path, x):
        param = params[path[-1].key] if isinstance(path[-1], jax.tree_util.DictKey) else None
        spec = P() if param is None else P(*part_of(param.sharding.spec, x.shape, param.shape))
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, state)


def refreshed(layout, keys, kind=AxisType.Auto):
    """Return the updates and states of some rules after a step with a refresh, and the program's text.

    The gradient is made entry by entry, so that what is sent between devices is sent by the library.
    """
    rules = {key: RULES[key](0) for key in keys}
    params, grads = sharded(PARAMS, layout, kind), sharded(GRADS, layout, kind)

    def step(states, params, grads):
        def grad_fn(point, i):
            return jax.tree.map(lambda g, p: g * (1 + jnp.sin(p)), grads, point)

        found = {}
        for key, state in states.items():
            sizes = jnp.array([p.size for p in jax.tree.leaves(params)], jnp.float32)
            state = ssam_jax.SsamState(jnp.int32(contract.REFRESH - 1), sizes, state, (), (), ())
            tx = ssam_jax.ssam(0.1, rules[key])
            updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
            found[key] = updates, state.mask
        return found

    states = {key: placed(before_refresh(rule), params) for key, rule in rules.items()}
    with mesh_context(mesh_of(layout, kind)):
        program = jax.jit(step).lower(states, params, grads).compile()
        return program(states, params, grads), program.as_text()


@pytest.fixture(scope="module")
def on_one_device():
    return refreshed("1", list(RULES))[0]


KEYS = list(RULES)
SHARDED = [layout for layout in LAYOUTS if layout != "1"]
# Compiling is what costs: each rule with its pattern is refreshed on one of the layouts in turn, and
# on all of them if this is set.
EVERY = "SSAM_JAX_TEST_EVERY_LAYOUT" in os.environ
CASES = [(layout, KEYS if EVERY else KEYS[i::4], AxisType.Auto) for i, layout in enumerate(SHARDED)]
CASES += [("2x4", KEYS if EVERY else [k for k in KEYS if k[0] == "fisher"], AxisType.Explicit)]


@pytest.mark.parametrize(("layout", "keys", "kind"), CASES, ids=[f"{c[0]} {c[2].name}" for c in CASES])
def test_a_step_with_a_refresh_is_that_of_one_device_and_moves_scalars_alone(
    layout, keys, kind, on_one_device
):
    found, text = refreshed(layout, keys, kind)
    for key in keys:
        tiny.assert_close(found[key], on_one_device[key], rtol=1e-6)  # bits of masks and keys exactly
        for tree in (found[key][0], found[key][1].mask):
            check_lies_with(tree, sharded(PARAMS, layout, kind))
    moved = hlo.communicated(text)
    assert moved, "nothing was sharded"
    if kind == AxisType.Explicit and not hasattr(jax, "set_mesh"):
        return  # before JAX 0.7 the compiler divides such a program as it likes
    assert len(moved) <= 6 * len(keys)
    assert max(size for _, size in moved) <= SMALL < SHARD


# From init on.


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        (RULES["fisher", "global"](0), AxisType.Auto),
        (RULES["random", "channel"](0), AxisType.Explicit),
        (ssam_jax.fixed_mask(jax.tree.map(lambda p: p > 0, PARAMS)), AxisType.Auto),
        (ssam_jax.fixed_mask(jax.tree.map(lambda p: p > 0, PARAMS)), AxisType.Explicit),
    ],
    ids=["fisher global", "random channel explicit", "fixed", "fixed explicit"],
)
def test_the_first_mask_lies_with_the_parameters_and_is_that_of_one_device(rule, kind):
    tx, params = ssam_jax.ssam(0.1, rule), sharded(PARAMS, "2x4", kind)
    expected = tx.init(PARAMS)
    with mesh_context(mesh_of("2x4", kind)):
        states = [tx.init(params), jax.jit(tx.init)(params)]
    for state in states:
        tiny.assert_same(state, expected)
        check_lies_with(state.mask.mask, params)
        check_lies_with(state.mask.memory or {}, params)
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {8}


def abstract(params):
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)


def test_drawing_the_first_mask_moves_nothing_and_makes_nothing_whole():
    tx, params = ssam_jax.ssam(0.1, RULES["fisher", "global"](0)), sharded(PARAMS, "8")
    program = jax.jit(tx.init).lower(abstract(params)).compile()
    assert not hlo.communicated(program.as_text())
    assert max(hlo.element_counts(program.as_text())) <= len(PARAMS) * max(SHARD, rows.WIDTH)
    for tree in (program.output_shardings.mask.bits, program.output_shardings.mask.memory):
        assert all(s.is_equivalent_to(params[name].sharding, params[name].ndim) for name, s in tree.items())


def test_abstract_init_takes_any_shardings():
    tx = optax.chain(ssam_jax.ssam(0.1, RULES["fisher", "nm"](0)), optax.sgd(0.1, momentum=0.9))
    mesh, params = mesh_of("2x4"), sharded(PARAMS, "2x4")
    shapes = jax.eval_shape(tx.init, abstract(params))
    wanted = jax.tree.map(lambda x: NamedSharding(mesh, P("tensor", "fsdp") if x.ndim == 2 else P()), shapes)
    state = jax.jit(tx.init, out_shardings=wanted)(params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted))
    tiny.assert_same(state, tx.init(PARAMS))


# Steps.


def loss(params, batch):
    hidden = jnp.tanh(batch + params["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["kernel"] - 1))


BATCHES = np.sin(np.arange(3 * 8 * 16, dtype=np.float32) ** 2).reshape(3, 8, 16)


def step_of(tx):
    def step(params, state, batch):
        def grad_fn(params, i):
            return jax.grad(loss)(params, batch)

        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step


def sam_by_hand(params, trace, batch):
    grads = jax.grad(loss)(params, batch)
    length = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    grads = jax.grad(loss)(jax.tree.map(lambda p, g: p + 0.1 / length * g, params, grads), batch)
    trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, grads)
    return jax.tree.map(lambda p, t: p - 0.1 * t, params, trace), trace


def large(text):
    """Return what of at least a shard's size is sent between devices."""
    return sorted((name, size) for name, size in hlo.communicated(text) if size > SMALL)


def rule_of(rule, pattern):
    if rule == "dynamic":
        return ssam_jax.dynamic_mask(pattern, refresh_every=2, total_steps=10)
    return ssam_jax.fisher_mask(pattern, refresh_every=2)


@pytest.mark.parametrize(
    ("layout", "rule", "pattern"),
    [
        ("8", "fisher", Unstructured(0.5)),
        ("2x4", "dynamic", Structured(0.5, "channel")),
        ("2x4", "fisher", NM(2, 4)),
    ],
    ids=str,
)
def test_steps_are_those_of_one_device_and_move_what_the_loss_moves(layout, rule, pattern):
    tx = optax.chain(ssam_jax.ssam(0.1, rule_of(rule, pattern)), optax.sgd(0.1, momentum=0.9))
    expected = ends(step_of(tx), *jax.tree.map(jnp.array, (PARAMS, tx.init(PARAMS))), BATCHES)[0]
    params = sharded(PARAMS, layout)
    mesh = params["kernel"].sharding.mesh
    batches = jax.device_put(BATCHES, NamedSharding(mesh, P(None, "fsdp")))
    by_hand = jax.jit(sam_by_hand).lower(params, params, batches[0]).compile()
    (moved, state), text = ends(step_of(tx), params, tx.init(params), batches)
    tiny.assert_close((moved, state), expected)
    for tree in (moved, ssam_jax.get_mask(state), state[1][0].trace):
        check_lies_with(tree, sharded(PARAMS, layout))
    assert large(text) == large(by_hand.as_text())


def ends(step, params, state, batches):
    """Return where some donating steps lead, compiled once, and the program's text."""
    # A function of its own: jit counts what it has compiled by function.
    compiled = jax.jit(lambda *args: step(*args), donate_argnums=(0, 1))
    text = compiled.lower(params, state, batches[0]).compile().as_text()
    for batch in batches:
        params, state = compiled(params, state, batch)
    assert compiled._cache_size() == 1, "the shardings of a step's results are not those it was given"
    return (params, state), text


def test_alternating_and_a_replaced_mask_keep_their_places():
    tx = ssam_jax.alternating(optax.sgd(0.1), 0.1, rule_of("fisher", Unstructured(0.5, scope="leaf")))
    chosen = jax.tree.map(lambda p: p > 0.5, PARAMS)
    batches = np.repeat(BATCHES[:2], 2, axis=0)  # ascent and descent, the second of which refreshes the mask

    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    def run(params, batches):
        state = ssam_jax.set_mask(tx.init(params), chosen)
        tiny.assert_same(ssam_jax.get_mask(state), chosen)
        check = check_lies_with if len(params["kernel"].sharding.device_set) > 1 else lambda *_: None
        check(ssam_jax.get_mask(state), params)
        under_jit = jax.jit(lambda s: ssam_jax.set_mask(s, chosen))(state)
        check(ssam_jax.get_mask(under_jit), params)
        return ends(step, params, state, batches)[0]

    expected = run(jax.tree.map(jnp.array, PARAMS), BATCHES[[0, 0, 1, 1]])
    end, state = run(sharded(PARAMS, "8"), batches)
    tiny.assert_close((end, state), expected)
    assert tiny.differ(ssam_jax.get_mask(state), chosen)
    for tree in (end, state.anchor, ssam_jax.get_mask(state)):
        check_lies_with(tree, sharded(PARAMS, "8"))


def test_seeds_can_be_mapped_over_sharded_parameters():
    def init(seed):
        return ssam_jax.ssam(0.1, ssam_jax.random_mask(NM(2, 4), seed=seed)).init(params)

    params = sharded(PARAMS, "2x4")
    states = jax.jit(jax.vmap(init))(jnp.arange(2))
    params = PARAMS
    tiny.assert_same(jax.tree.map(lambda x: x[1], states), init(1))


# What does not divide, and layers.


def on_eight(x, spec, kind=AxisType.Auto):
    return jax.device_put(x, NamedSharding(jax.make_mesh((8,), ("i",), axis_types=(kind,)), spec))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_groups_and_blocks_that_straddle_devices_are_those_of_one_device(kind):
    scores = np.sin(np.arange(256, dtype=np.float32)).reshape(16, 16)
    for pattern, spec in ((NM(2, 4), P(None, "i")), (Structured(0.5, "block", block=(4, 4)), P("i"))):
        x = on_eight(scores, spec, kind)  # two entries on each device
        mask = jax.jit(pattern)(x)
        np.testing.assert_array_equal(mask, jax.jit(pattern)(scores))
        if kind == AxisType.Explicit:
            assert mask.sharding.is_equivalent_to(x.sharding, 2)


def test_an_axis_that_the_mesh_does_not_divide_is_padded_by_the_compiler_or_refused_by_jax():
    scores = np.sin(np.arange(70, dtype=np.float32)).reshape(10, 7)
    uneven = NamedSharding(jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,)), P("i"))
    with pytest.raises(ValueError, match=r"divi(de|sible)"):
        jax.device_put(scores, uneven)

    def select(scores):
        return Unstructured(0.5)(jax.lax.with_sharding_constraint(scores, uneven))

    everywhere = NamedSharding(uneven.mesh, P())
    np.testing.assert_array_equal(
        jax.jit(select, out_shardings=everywhere)(scores), jax.jit(Unstructured(0.5))(scores)
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_layers_of_a_sharded_stack_are_chosen_along_its_first_axis(kind):
    weights = np.linspace(1, 2, 8, dtype=np.float32)[:, None, None] * np.ones((8, 4, 8), np.float32)
    params = {
        "by layer": on_eight(weights, P("i"), kind),
        "within": on_eight(-weights, P(None, None, "i"), kind),
    }
    mask = jax.jit(Structured(0.5, "channel", axis=0))(params)
    assert np.ravel(mask["by layer"]).all() and not np.ravel(mask["within"]).any()
    if kind == AxisType.Explicit:
        check_lies_with(mask, params)
    tx = ssam_jax.ssam(0.1, ssam_jax.fixed_mask(mask))
    check_lies_with(ssam_jax.get_mask(tx.init(params)), params)
    half = {"by layer": weights > 1.5, "within": np.zeros((8, 1, 1), bool)}
    state = ssam_jax.ssam(0.1, ssam_jax.fixed_mask(half)).init(params)
    assert ssam_jax.active_leaves(tx.init(params)) == (True, False)
    assert ssam_jax.active_leaves(state) == (FirstRow(4), False)


@pytest.mark.parametrize("row", [3, 4])
def test_rows_of_an_explicitly_sharded_stack_can_be_active(row):
    params = {
        "head": np.ones(4, np.float32),
        "stack": np.sin(np.arange(8 * 4 * 4, dtype=np.float32)).reshape(8, 4, 4),
    }
    x = np.cos(np.arange(12, dtype=np.float32)).reshape(3, 4)
    specs = {"head": P(), "stack": P("i")}
    spread = {name: on_eight(p, specs[name], AxisType.Explicit) for name, p in params.items()}
    mesh = spread["stack"].sharding.mesh

    def passes(params, x, whole):
        def loss_fn(params, x):
            layers = whole(params["stack"])  # JAX scans over no sharded axis
            return jnp.mean(
                (jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, layers)[0] @ params["head"]) ** 2
            )

        value, grads, grad_fn = two_pass_value_and_grad(loss_fn)(params, x, active=(True, FirstRow(row)))
        return value, grads, grad_fn(params, 0)

    expected = jax.jit(lambda p, x: passes(p, x, lambda w: w))(params, x)

    def whole(stack):
        return shardings.reshard(stack, NamedSharding(jax.typeof(stack).sharding.mesh, P()))

    with mesh_context(mesh):
        actual = jax.jit(lambda p, x: passes(p, x, whole))(spread, on_eight(x, P(), AxisType.Explicit))
    tiny.assert_close(actual, expected)
    for grads in actual[1:]:
        check_lies_with(grads, spread)
    assert not np.asarray(actual[1]["stack"])[:row].any()
    assert np.asarray(actual[2]["stack"]).all()
