"""`carried`: one gradient a step, the exact parameters in the state, and every trainer that optax knows."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny
from flax import nnx
from flax.training import train_state
from jax.sharding import NamedSharding, PartitionSpec

import ssam_jax
import ssam_jax.linen
import ssam_jax.nnx
from ssam_jax import NM, Unstructured, carried, carried_eval_params, directions

STEPS = 5
HALF = ssam_jax.random_mask(
    Unstructured(0.5)
)  # a refresh adds up its counts as products, of no weight of the network
FISHER = ssam_jax.fisher_mask(Unstructured(0.5), refresh_every=2)


def base():
    return optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9))


def run(tx, params=None, steps=STEPS, grad=None):
    """Take jitted steps with the gradient where the parameters are; return parameters and state."""
    params = tiny.params() if params is None else params
    grad = jax.grad(tiny.loss) if grad is None else grad

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(grad(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in tiny.BATCHES[:steps]:
        params, state = step(params, state, jnp.asarray(batch, jax.tree.leaves(params)[0].dtype))
    return params, state


@pytest.fixture(scope="module")
def trained():
    return run(carried(base(), 0.1, FISHER))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rho", [0, lambda step: jnp.zeros(())], ids=["static", "schedule"])
@pytest.mark.parametrize("optimizer", [base, lambda: tiny.may_promote(optax.adam(0.01))], ids=["sgd", "adam"])
def test_with_a_radius_of_zero_it_is_the_base_optimizer_bit_for_bit(dtype, rho, optimizer):
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), tiny.PARAMS)
    held, state = run(carried(optimizer(), rho), params)
    expected, base_state = run(optimizer(), params)
    tiny.assert_same(held, expected)
    tiny.assert_same(carried_eval_params(state, held), expected)
    tiny.assert_same(state.opt_state, base_state)


def test_the_center_steps_as_the_base_optimizer_does_on_the_same_gradients():
    seen = []

    def grad(params, batch):
        return jax.grad(tiny.loss)(params, batch)

    tx, optimizer = carried(base(), 0.1, FISHER), base()
    params, state = tiny.params(), tx.init(tiny.params())
    center, base_state = tiny.params(), optimizer.init(tiny.params())
    for batch in tiny.BATCHES[:STEPS]:
        grads = grad(params, batch)
        seen.append(grads)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, base_state = optimizer.update(grads, base_state, center)  # decay is of w, not of w + eps
        center = optax.apply_updates(center, updates)
        tiny.assert_same(carried_eval_params(state, params), center)
        moved = jax.tree.map(lambda p, w: p - w, params, center)
        assert float(optax.tree.norm(moved)) == pytest.approx(
            0.1 * np.sqrt(masked_share(grads, ssam_jax.get_mask(state))), rel=1e-3
        )


def masked_share(grads, mask):
    """Return the share of the squared norm of a gradient that lies under a mask."""
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(mask)))
    return sum(np.sum(np.square(g) * np.asarray(m)) for g, m in pairs) / sum(
        np.sum(np.square(g)) for g, _ in pairs
    )


def test_2000_steps_in_bfloat16_drift_no_further_than_the_base_optimizer_alone():
    target = {"w": jnp.sin(jnp.arange(64.0))}

    def grad(params):
        return jax.tree.map(lambda p, t: (p.astype(jnp.float32) - t).astype(p.dtype), params, target)

    def end(tx, dtype):
        params = {"w": jnp.zeros(64, dtype)}

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(grad(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=2000)
        return ssam_jax.eval_params(state, params)["w"].astype(jnp.float32)

    def error(make):
        return float(jnp.max(jnp.abs(end(make(), jnp.bfloat16) - end(make(), jnp.float32))))

    def alone():
        return optax.sgd(0.01, momentum=0.9)

    assert error(lambda: carried(alone(), 1e-3)) <= 1.5 * error(alone) + 2**-8


def products(tx):
    """Count the matrix products in the compiled step of an optimizer."""
    params = tiny.params()

    def step(params, state, batch):
        updates, state = tx.update(jax.grad(tiny.loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    text = jax.jit(step).lower(params, tx.init(params), tiny.BATCHES[0]).compile().as_text()
    return len(re.findall(r" (?:dot|convolution)\(", text)) + text.count("__onednn$matmul")


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": HALF}, {"direction": directions.base_momentum()}],
    ids=["", "mask", "momentum"],
)
def test_a_compiled_step_has_the_products_of_the_base_optimizer_s(options):
    assert products(carried(base(), 0.1, **options)) == products(base()) > 0


def size(state):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def test_the_state_holds_one_more_tree_and_none_for_the_direction():
    params = tiny.params()
    alone = size(base().init(params)) + size(params)
    few = 4 * (3 + len(jax.tree.leaves(params)))
    for direction in (None, directions.base_momentum()):
        state = jax.eval_shape(carried(base(), 0.1, direction=direction).init, params)
        assert size(state) <= alone + few


def test_msam_ascends_against_the_momentum_and_plain_momentum_along_it():
    for sign in (-1.0, 1.0):
        direction = optax.chain(directions.base_momentum(), optax.scale(sign))
        params, state = run(carried(optax.sgd(0.1, momentum=0.9), 0.1, direction=direction))
        eps = jax.tree.map(lambda p, w: p - w, params, carried_eval_params(state, params))
        momentum = state.opt_state[0].trace
        dot = sum(float(jnp.vdot(e, m)) for e, m in zip(*map(jax.tree.leaves, (eps, momentum))))
        assert dot == pytest.approx(sign * 0.1 * float(optax.tree.norm(momentum)), rel=1e-3)


# Edits.


def test_edits_of_the_held_parameters_are_not_seen_and_carried_set_params_gives_them_to_the_state(trained):
    params, state = trained
    tx = carried(base(), 0.1, FISHER)
    grads = jax.grad(tiny.loss)(params, tiny.BATCHES[0])
    clipped = jax.tree.map(lambda p: jnp.clip(p, -0.1, 0.1), params)
    _, after = tx.update(grads, state, clipped)
    _, expected = tx.update(grads, state, params)
    tiny.assert_same(after.center, expected.center)  # not seen

    told = ssam_jax.carried_set_params((state, "other"), clipped)
    assert told[1] == "other"
    tiny.assert_same(carried_eval_params(told, clipped), clipped)
    updates, after = tx.update(grads, told[0], clipped)
    step, _ = base().update(grads, state.opt_state, clipped)
    tiny.assert_same(after.center, optax.apply_updates(clipped, step))
    held = optax.apply_updates(clipped, updates)
    moved = jax.tree.map(lambda p, w: p - w, held, after.center)
    assert 0 < float(optax.tree.norm(moved)) <= 0.1 + 1e-6


def test_the_last_part_of_a_training_may_take_ssam_with_the_state_of_the_base_optimizer(trained):
    params, state = trained
    tx = optax.chain(ssam_jax.ssam(0.1), base())
    params, state = carried_eval_params(state, params), (ssam_jax.ssam(0.1).init(params), state.opt_state)
    grad_fn = tiny.grad_fn_of(tiny.BATCHES[0])
    updates, after = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
    descent, _ = ssam_jax.ssam(0.1).update(grad_fn(params, 0), state[0], params, grad_fn=grad_fn)
    expected, _ = base().update(descent, trained[1].opt_state, params)
    tiny.assert_same(updates, expected)
    assert jax.tree.structure(after) == jax.tree.structure(state)


# Trainers.


def test_a_train_state_of_flax_needs_no_change_and_ours_evaluates_at_w():
    model, x = nn.Dense(3), jnp.sin(jnp.arange(8.0)).reshape(2, 4)
    params = model.init(jax.random.key(0), x)["params"]

    def loss(params):
        return jnp.sum(jnp.square(model.apply({"params": params}, x) - 1))

    ends = []
    for kind in (train_state.TrainState, ssam_jax.linen.TrainState):
        state = kind.create(apply_fn=model.apply, params=params, tx=carried(base(), 0.1))
        step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
        for _ in range(3):
            state = step(state)
        ends.append(state)
    tiny.assert_same(ends[0].params, ends[1].params)
    tiny.assert_same(ends[1].eval_params, carried_eval_params(ends[1].opt_state, ends[1].params))
    assert tiny.differ(ends[1].eval_params, ends[1].params)


def test_an_optimizer_of_nnx_needs_no_change_and_eval_model_is_at_w():
    model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.sin(jnp.arange(8.0)).reshape(2, 4)
    optimizer = ssam_jax.nnx.Optimizer(model, carried(base(), 0.1), wrt=nnx.Param)

    def loss(model, x):
        return jnp.sum(jnp.square(model(x) - 1))

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(loss)(model, x))

    for _ in range(3):
        step(model, optimizer, x)
    clean = ssam_jax.nnx.eval_model(model, optimizer)
    held, at_w = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (model, clean))
    moved = jax.tree.map(lambda p, w: p - w, held, at_w)
    assert float(optax.tree.norm(moved)) == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(TypeError, match="optimizer must be an nnx"):
        ssam_jax.nnx.eval_model(model, None)


def test_multi_steps_around_it_steps_on_the_mean_gradient(relaxed_promotion):
    tx = optax.MultiSteps(carried(base(), 0.1), 2)
    params, state = run(tx, steps=4)
    means = []
    inner, inner_params = carried(base(), 0.1), tiny.params()
    inner_state = inner.init(inner_params)
    for i in (0, 2):
        grads = [jax.grad(tiny.loss)(inner_params, batch) for batch in tiny.BATCHES[i : i + 2]]
        means.append(jax.tree.map(lambda a, b: (a + b) / 2, *grads))
        updates, inner_state = inner.update(means[-1], inner_state, inner_params)
        inner_params = optax.apply_updates(inner_params, updates)
    tiny.assert_close(params, inner_params)
    tiny.assert_close(carried_eval_params(state, params), inner_state.center)


def test_apply_if_finite_around_it_skips_a_step_and_leaves_w_and_eps():
    tx = optax.apply_if_finite(carried(base(), 0.1), 5)
    params, state = run(tx)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    updates, after = tx.update(bad, state, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    tiny.assert_same(after.inner_state, state.inner_state)


def test_a_scaled_loss_with_the_gradient_unscaled_takes_the_same_steps(trained):
    def grad(params, batch):
        scaled = jax.grad(lambda p: 2.0**10 * tiny.loss(p, batch))(params)
        return jax.tree.map(lambda g: g / 2.0**10, scaled)

    tiny.assert_same(run(carried(base(), 0.1, FISHER), grad=grad), trained)


def test_scan_takes_the_steps_of_the_loop(trained):
    tx = carried(base(), 0.1, FISHER)

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(tiny.loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (tiny.params(), tx.init(tiny.params()))
    end, _ = jax.jit(lambda start: jax.lax.scan(step, start, jnp.array(tiny.BATCHES[:STEPS])))(start)
    tiny.assert_close(end, trained)


def test_sharded_parameters_keep_their_sharding_and_take_the_same_steps(trained):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = jax.tree.map(lambda p: jax.device_put(p, NamedSharding(mesh, PartitionSpec("x"))), tiny.params())
    held, state = run(carried(base(), 0.1, FISHER), params)
    tiny.assert_close((held, state), trained)
    for p, w, start in zip(*map(jax.tree.leaves, (held, state.center, params))):
        assert p.sharding.is_equivalent_to(start.sharding, p.ndim)
        assert w.sharding.is_equivalent_to(start.sharding, p.ndim)


def test_a_checkpoint_resumes_exactly(tmp_path, trained):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", trained)
        checkpointer.wait_until_finished()
        blank = jax.tree.map(jnp.zeros_like, trained)
        tiny.assert_same(checkpointer.restore(tmp_path / "state", blank), trained)


def test_parameters_and_state_may_be_donated_together():
    tx = carried(base(), 0.1, ssam_jax.random_mask(NM(2, 4)))

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(tiny.loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    expected = step(tiny.params(), tx.init(tiny.params()), tiny.BATCHES[0])
    params = tiny.params()
    tiny.assert_close(donating(params, tx.init(params), tiny.BATCHES[0]), expected)


def test_eval_params_serves_every_carrier_and_none():
    params = tiny.params()
    grads = jax.grad(tiny.loss)(params, tiny.BATCHES[0])
    assert ssam_jax.eval_params(optax.sgd(0.1).init(params), params) is params
    assert ssam_jax.eval_params(ssam_jax.ssam(0.1).init(params), params) is params
    tx = optax.chain(optax.clip(1.0), ssam_jax.alternating(optax.sgd(0.1), 0.1))
    updates, state = tx.update(grads, tx.init(params), params)
    held = optax.apply_updates(params, updates)
    tiny.assert_same(ssam_jax.eval_params(state, held), params)  # in the middle of a round
    tiny.assert_same(ssam_jax.alternating_eval_params(state, held), params)
    updates, state = tx.update(grads, state, held)
    held = optax.apply_updates(held, updates)
    tiny.assert_same(ssam_jax.eval_params(state, held), held)
