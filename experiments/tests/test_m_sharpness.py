"""Each device perturbs by its own part of the batch: the step, its cost, and the study."""

import functools
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ssam_jax
from ssam_experiments.m_sharpness import AXIS, Config, main, per_device_step, synchronized_step, varying
from ssam_jax import NM, Unstructured, dynamic_mask, fisher_mask, fixed_mask
from ssam_jax.masks import rule as masks

RHO, LR = 0.3, 0.2
STEPS, BATCH = 3, 16
BATCHES = np.sin(np.arange(1, STEPS * BATCH * 4 + 1, dtype=np.float32) ** 2).reshape(STEPS, BATCH, 4)
RULES = {
    "fisher": fisher_mask(Unstructured(0.5), refresh_every=2, decay=0.5),
    "dynamic": dynamic_mask(Unstructured(0.5), refresh_every=2, total_steps=9, grow="gradient"),
    "fixed": fixed_mask(lambda path: path == "first"),
    "fisher 2:4": fisher_mask(NM(2, 4), refresh_every=1, decay=0.5),
}
EVERYWHERE, BY_EXAMPLE, IN_STEPS = PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(None, AXIS)
PARAMS = {"first": tiny.PARAMS["first"]["kernel"], "second": tiny.PARAMS["second"]["kernel"]}
SIZE = sum(leaf.size for leaf in PARAMS.values())
CHURN = 2  # entries that a refresh reduces: what came, and what is perturbed


def loss(params, batch):
    return jnp.mean(jnp.square(jnp.tanh(batch @ params["first"]) @ params["second"] - 1))


def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]), (AXIS,))


def optimizer(rule, **options):
    return optax.chain(ssam_jax.ssam(RHO, rule, **options), optax.sgd(LR))


def steps_of(step):
    """Return ``steps(params, state, batches)``, which scans."""

    def steps(params, state, batches):
        def body(carry, batch):
            *carry, loss = step(*carry, batch)
            return tuple(carry), loss

        (params, state), losses = jax.lax.scan(body, (params, state), batches)
        return params, state, losses

    return steps


def mapped(step, devices, batch_spec=IN_STEPS):
    """Return a step, or a scan of steps, mapped over devices, with the check of what is replicated on."""
    specs = {"in_specs": (EVERYWHERE, EVERYWHERE, batch_spec), "out_specs": EVERYWHERE}
    return jax.shard_map(step, mesh=mesh_of(devices), **specs)


@functools.cache
def refresh_of(name):
    rule = RULES[name]
    return jax.jit(lambda state, params, mean, step: masks.update(rule, state, params, None, mean, step))


@functools.cache
def loop_over_parts(name, parts, ascent_steps=1):
    """Take the steps by hand, one part of the batch after the other, on one device."""
    gradient, refresh = jax.jit(jax.grad(loss)), refresh_of(name)
    params = jax.tree.map(jnp.array, PARAMS)
    state = masks.init(RULES[name], params)
    for number, batch in enumerate(BATCHES):
        descents = []
        for part in np.split(batch, parts):
            point = params
            for _ in range(ascent_steps):
                grads = gradient(point, part)
                norm = math.sqrt(sum(float((np.asarray(g) ** 2).sum()) for g in jax.tree.leaves(grads)))
                eps = jax.tree.map(
                    lambda g, m, norm=norm: RHO / norm * np.where(m, g, np.float32(0)), grads, state.mask
                )
                point = jax.tree.map(jnp.add, point, eps)
            descents.append(gradient(point, part))
        mean = jax.tree.map(lambda *grads: jnp.mean(jnp.stack(grads), axis=0), *descents)
        state = refresh(state, params, mean, jnp.int32(number))
        params = jax.tree.map(lambda p, g: p - LR * g, params, mean)
    return params, state


@pytest.mark.parametrize(
    ("name", "devices", "ascent_steps"),
    [(name, devices, 1) for name in ("fisher", "dynamic", "fixed") for devices in (2, 8)]
    + [("fisher 2:4", 2, 2)],
)
def test_steps_per_device_equal_a_loop_over_the_parts_and_masks_are_the_same_everywhere(
    name, devices, ascent_steps
):
    params, tx = jax.tree.map(jnp.array, PARAMS), optimizer(RULES[name], ascent_steps=ascent_steps)
    steps = steps_of(per_device_step(loss, tx))
    params, state, _ = jax.jit(mapped(steps, devices))(params, tx.init(params), jnp.asarray(BATCHES))

    expected, rule_state = loop_over_parts(name, devices, ascent_steps)
    tiny.assert_close(params, expected)
    tiny.assert_close(state[0].mask, rule_state)
    for leaf in jax.tree.leaves((params, state)):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == devices
        assert all(copy.tobytes() == copies[0].tobytes() for copy in copies)


def test_the_ordinary_program_synchronizes_and_does_another_step():
    tx = optimizer(RULES["fisher 2:4"])
    steps = steps_of(synchronized_step(loss, tx))
    params = jax.tree.map(jnp.array, PARAMS)
    batches = jax.device_put(BATCHES, NamedSharding(mesh_of(8), PartitionSpec(None, AXIS)))
    everywhere = NamedSharding(mesh_of(8), EVERYWHERE)
    spread, state, _ = jax.jit(steps, out_shardings=everywhere)(params, tx.init(params), batches)
    expected, rule_state = loop_over_parts("fisher 2:4", 1)
    tiny.assert_close(spread, expected)
    tiny.assert_close(state[0].mask, rule_state)
    own, _ = loop_over_parts("fisher 2:4", 8)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), spread, own))) > 1e-3


def all_reduced(fn, *args):
    """Return how many entries a compiled program's all-reduces hold, and its other collectives."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    shapes = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    dims = [dims for shape in shapes for dims in re.findall(r"\w+\[([\d,]*)\]", shape)]
    others = re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
    return sum(math.prod(map(int, filter(None, d.split(",")))) for d in dims), others


def test_a_step_per_device_reduces_one_gradient_and_a_synchronized_step_two():
    """The one entry more is the loss; in the ordinary program a refresh adds up the counts of the churn."""
    tx, params = optimizer(RULES["fisher 2:4"]), jax.tree.map(jnp.array, PARAMS)
    everywhere, by_example = (NamedSharding(mesh_of(8), spec) for spec in (EVERYWHERE, BY_EXAMPLE))
    args = (*jax.device_put((params, tx.init(params)), everywhere), jax.device_put(BATCHES[0], by_example))
    own = mapped(per_device_step(loss, tx), 8, BY_EXAMPLE)
    assert all_reduced(own, *args) == (SIZE + 1, [])
    assert all_reduced(synchronized_step(loss, tx), *args) == (2 * SIZE + 1 + CHURN, [])


def test_a_state_that_is_not_the_same_everywhere_is_refused():
    """The check of shard_map finds a forgotten average, and a mask rule that reads the ascent gradient."""
    params = jax.tree.map(jnp.array, PARAMS)

    def forgetful(tx):
        def step(params, state, part):
            grads = jax.grad(loss)(varying(params, AXIS), part)
            updates, state = tx.update(grads, state, params, grad_fn=lambda p, i: jax.grad(loss)(p, part))
            return optax.apply_updates(params, updates), state, 0

        return step

    def observe(memory, params, ascent_grads, descent_grads, step, **extra):
        return jax.tree.map(lambda g: g > 0, ascent_grads)

    def select(memory, mask, params, key, step):
        return memory

    init = functools.partial(jax.tree.map, lambda p: jnp.ones(p.shape, bool))
    curious = optimizer(ssam_jax.MaskRule(init, observe, select, refresh_every=1))
    plain = optimizer(None)
    for tx, step in ((plain, forgetful(plain)), (curious, per_device_step(loss, curious))):
        with pytest.raises((ValueError, TypeError), match=r"out_specs|manual axis types do not match"):
            jax.eval_shape(mapped(step, 2, BY_EXAMPLE), params, tx.init(params), BATCHES[0])


def test_an_undeclared_copy_would_synchronize_the_ascent_gradient_unasked():
    """Why the pattern needs `varying`: without it the ascent gradient is the sum over the devices."""

    def gradients(params, part):
        own = jax.grad(loss)(varying(params, AXIS), part)
        return jax.lax.pmean(own, AXIS), jax.grad(loss)(params, part)

    specs = {"in_specs": (EVERYWHERE, BY_EXAMPLE), "out_specs": EVERYWHERE}
    mean, unasked = jax.jit(jax.shard_map(gradients, mesh=mesh_of(4), **specs))(
        jax.tree.map(jnp.array, PARAMS), BATCHES[0]
    )
    tiny.assert_close(unasked, jax.tree.map(lambda g: 4 * g, mean))


def stacked_loss(params, x):
    def layer(h, kernel):
        return jnp.tanh(h @ kernel), None

    hidden, _ = jax.lax.scan(layer, x @ params["embed"], params["layers"])
    return jnp.mean(jnp.square(hidden @ params["head"] - 1))


def stacked_params():
    key = jax.random.key(0)
    shapes = {"embed": (4, 8), "head": (8, 3), "layers": (4, 8, 8)}
    return {
        name: 0.4 * jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def plain_step(loss_fn, tx, average, own=lambda params: params, ascent_steps=1):
    """Return a step of one part written with jax.grad."""

    def step(params, state, part):
        loss, grads = jax.value_and_grad(loss_fn)(own(params), part)

        def grad_fn(params, i):
            grads = jax.grad(loss_fn)(params, part)
            return average(grads) if i + 1 == ascent_steps else grads

        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state, average(loss)

    return step


@pytest.mark.parametrize("ascent_steps", [1, 2])
def test_two_pass_gradients_per_device_equal_two_gradients_and_reduces_one(ascent_steps):
    rows = np.arange(4)[:, None, None] >= 2
    rule = fixed_mask({"embed": False, "head": True, "layers": rows})
    tx, params = optimizer(rule, normalize="masked", ascent_steps=ascent_steps), stacked_params()
    state = tx.init(params)
    active = ssam_jax.active_leaves(state)
    assert active == (False, True, ssam_jax.FirstRow(2))
    average, own = functools.partial(jax.lax.pmean, axis_name=AXIS), functools.partial(varying, axis=AXIS)
    fast = mapped(per_device_step(stacked_loss, tx, active=active), 2, BY_EXAMPLE)
    plain = mapped(plain_step(stacked_loss, tx, average, own, ascent_steps), 2, BY_EXAMPLE)
    for actual, expected in zip(*(jax.jit(step)(params, state, BATCHES[0]) for step in (fast, plain))):
        tiny.assert_close(actual, expected)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert all_reduced(fast, params, state, BATCHES[0]) == (size + 1, [])


def test_parts_of_any_size_are_a_vmap_of_the_step_in_the_ordinary_program():
    """8 parts on one device, and on 2 devices, which then reduce one gradient."""
    tx, params, parts = (
        optimizer(RULES["fisher 2:4"]),
        jax.tree.map(jnp.array, PARAMS),
        BATCHES.reshape(STEPS, 8, 2, 4),
    )
    one_part = plain_step(loss, tx, functools.partial(jax.lax.pmean, axis_name="part"))
    step = jax.vmap(one_part, in_axes=(None, None, 0), out_axes=None, axis_name="part")
    after, state, _ = jax.jit(steps_of(step))(params, tx.init(params), jnp.asarray(parts))
    expected, rule_state = loop_over_parts("fisher 2:4", 8)
    tiny.assert_close(after, expected)
    tiny.assert_close(state[0].mask, rule_state)

    everywhere, by_part = (NamedSharding(mesh_of(2), spec) for spec in (EVERYWHERE, BY_EXAMPLE))
    args = (*jax.device_put((params, tx.init(params)), everywhere), jax.device_put(parts[0], by_part))
    assert all_reduced(step, *args) == (SIZE + 1 + CHURN, [])


def test_an_ascent_on_a_part_of_each_device_s_rows_moves_no_row():
    """The mean over the first rows of every device, and the whole batch for the descent."""
    tx, params, devices = optimizer(RULES["fixed"]), jax.tree.map(jnp.array, PARAMS), 4

    def step(params, state, batch):
        part = batch.reshape(devices, -1, 4)[:, :2].reshape(-1, 4)
        grad_fn = lambda params, i: jax.grad(loss)(params, batch)  # noqa: E731
        updates, state = tx.update(jax.grad(loss)(params, part), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    everywhere, by_example = (NamedSharding(mesh_of(devices), spec) for spec in (EVERYWHERE, BY_EXAMPLE))
    state = tx.init(params)
    args = (*jax.device_put((params, state), everywhere), jax.device_put(BATCHES[0], by_example))
    assert all_reduced(step, *args) == (2 * SIZE, [])

    after, _ = jax.jit(step)(*args)
    rows = BATCHES[0][[0, 1, 4, 5, 8, 9, 12, 13]]
    grads = jax.grad(loss)(params, rows)
    norm = math.sqrt(sum(float((np.asarray(g) ** 2).sum()) for g in jax.tree.leaves(grads)))
    point = {**params, "first": params["first"] + RHO / norm * grads["first"]}
    descent = jax.grad(loss)(point, BATCHES[0])
    tiny.assert_close(after, jax.tree.map(lambda p, g: p - LR * g, params, descent))


COMMAND = [sys.executable, "-W", "error", "-m", "ssam_experiments.m_sharpness"]


def test_the_study_makes_its_devices_and_prints_a_table():
    options = ["--devices", "4", "--epochs", "1", "--seeds", "1", "--width", "8", "--rhos", "0.1"]
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    quick["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", quick.get("XLA_FLAGS", ""))
    result = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=300, env=quick)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^\| (\w.*?) \| (.*?) \|.*\|$", result.stdout, flags=re.M)
    assert dict(rows[1:]) == {
        "SGD": "",
        "SAM, synchronized": "64",
        "SAM, per device": "16",
        "SSAM Fisher 2:4, synchronized": "64",
        "SSAM Fisher 2:4, per device": "16",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": 0}, "devices must be at least 1, got 0"),
        ({"batch": 60}, "batch must be a multiple of devices, 8"),
        ({"rhos": (0.1, 0.0)}, "rhos must hold finite numbers above 0"),
        ({"noise": 1.0}, "noise must be from 0 to below 1"),
    ],
    ids=range(4),
)
def test_the_study_refuses_a_bad_setting_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        main(Config(**change))
