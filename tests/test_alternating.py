"""`ssam_jax.alternating` beside its peers: `optax.contrib.sam` and `ssam` before the optimizer."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ssam_jax
from ssam_jax import NM, MaskRule, Structured, alternating, dynamic_mask, fisher_mask, fixed_mask, ssam

BATCHES = jnp.sin(jnp.arange(6 * 3 * 4, dtype=jnp.float32)).reshape(6, 3, 4)
MASK = {"bias": np.array([True, False]), "kernel": np.arange(8).reshape(4, 2) % 3 == 0}
SCHEDULE = optax.piecewise_constant_schedule(0.05, {1: 0.5, 3: 0.5})


def relaxed(tx):
    """Let parts of optax rely on implicit promotion, which the tests turn off."""

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": relaxed(optax.adam(0.03)),
    "adamw": relaxed(optax.adamw(SCHEDULE, weight_decay=0.1)),
}


def make_params():
    return {"bias": jnp.array([0.3, -0.2]), "kernel": jnp.linspace(-1.0, 1.5, 8).reshape(4, 2)}


def grad(params, batch):
    def loss(p):
        return jnp.sum(jnp.tanh(batch @ p["kernel"] + p["bias"][None] - 0.5) ** 2)

    return jax.grad(loss)(params)


@functools.partial(jax.jit, static_argnums=0)
def call(tx, params, state, batch):
    updates, state = tx.update(grad(params, batch), state, params)
    return optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnums=0)
def chain_step(tx, params, state, batch):
    def grad_fn(p, i):
        return grad(p, batch)

    updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state


def one_round(tx, params, state, batch, ascents=1):
    for _ in range(ascents + 1):
        params, state = call(tx, params, state, batch)
    return params, state


def assert_close(a, b):
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-5)


# Peers.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dense_alternating_equals_optax_sam_call_for_call(name):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.3))
    ours = alternating(OPTIMIZERS[name], 0.3)
    theirs = relaxed(optax.contrib.sam(OPTIMIZERS[name], adversary))
    runs = [(tx, make_params(), tx.init(make_params())) for tx in (ours, theirs)]
    for batch in jnp.repeat(BATCHES, 2, axis=0):
        runs = [(tx, *call(tx, params, state, batch)) for tx, params, state in runs]
        assert_close(runs[0][1], runs[1][1])


RULES = {
    "fixed": fixed_mask(MASK),
    "fisher": fisher_mask(NM(1, 2), refresh_every=2, decay=0.5),
    "dynamic": dynamic_mask(
        Structured(0.5, unit="channel"), refresh_every=2, drop_fraction=0.9, total_steps=20, seed=1
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_masked_rounds_equal_the_steps_of_ssam_before_the_optimizer(rule):
    sgd = OPTIMIZERS["sgd"]
    assert_rounds_equal_steps(
        alternating(sgd, 0.3, RULES[rule]), optax.chain(ssam(0.3, RULES[rule]), sgd), changes=rule != "fixed"
    )


@pytest.mark.parametrize(
    "options",
    [{"ascent_steps": 2}, {"adaptive": True, "normalize": "masked"}],
    ids=["two ascents", "adaptive, masked norm"],
)
def test_rounds_with_options_equal_the_steps_of_ssam_before_the_optimizer(options):
    sgd, mask = OPTIMIZERS["adamw"], RULES["fixed"]
    assert_rounds_equal_steps(
        alternating(sgd, 0.3, mask, **options),
        optax.chain(ssam(0.3, mask, **options), sgd),
        ascents=options.get("ascent_steps", 1),
    )


def test_a_radius_schedule_sees_the_number_of_descents():
    rho, sgd = optax.linear_schedule(0.5, 0.1, 4), OPTIMIZERS["sgd"]
    assert_rounds_equal_steps(alternating(sgd, rho), optax.chain(ssam(rho), sgd))


def assert_rounds_equal_steps(tx, chain, ascents=1, *, changes=False):
    params = other = make_params()
    state, chain_state = tx.init(params), chain.init(params)
    first = ssam_jax.get_mask(state)
    changed = False
    for batch in BATCHES:
        params, state = one_round(tx, params, state, batch, ascents)
        other, chain_state = chain_step(chain, other, chain_state, batch)
        assert_close(params, other)
        mask = ssam_jax.get_mask(state)
        chex.assert_trees_all_equal(mask, ssam_jax.get_mask(chain_state))
        if changes:
            changed |= any((a != b).any() for a, b in zip(jax.tree.leaves(mask), jax.tree.leaves(first)))
    assert changed == changes


# What each call does.


def test_an_ascent_call_moves_to_the_perturbed_point_and_a_descent_call_steps_from_the_anchor():
    tx, params = alternating(optax.sgd(0.1), 0.3, fixed_mask(MASK)), make_params()
    point, state = call(tx, params, tx.init(params), BATCHES[0])
    for name in params:
        np.testing.assert_array_equal(np.asarray(point[name] != params[name]), MASK[name])
    chex.assert_trees_all_equal(state.anchor, params)
    end, state = call(tx, point, state, BATCHES[0])
    want = jax.tree.map(lambda w, g: w - 0.1 * g, params, grad(point, BATCHES[0]))
    assert_close(end, want)
    assert int(state.phase) == 0


def test_the_optimizer_advances_on_descent_calls_only():
    tx, params = alternating(OPTIMIZERS["adamw"], 0.3, ascent_steps=2), make_params()
    state = tx.init(params)
    for number, batch in enumerate(jnp.repeat(BATCHES[:2], 3, axis=0)):
        before = state
        params, state = call(tx, params, state, batch)
        descents = (number + 1) // 3
        assert int(state.ssam.step) == descents
        assert int(state.opt_state[0].count) == descents
        assert int(state.phase) == (number + 1) % 3
        if (number + 1) % 3:
            chex.assert_trees_all_equal(state.opt_state, before.opt_state)
            chex.assert_trees_all_equal(state.ssam, before.ssam)


def test_scores_are_gathered_on_descent_calls_only():
    tx, params = alternating(optax.sgd(0.1), 0.3, RULES["fisher"]), make_params()
    point, state = call(tx, params, tx.init(params), BATCHES[0])
    assert not np.any(state.ssam.mask.memory["kernel"])
    _, state = call(tx, point, state, BATCHES[0])
    want = jax.tree.map(lambda g: 0.5 * g**2, grad(point, BATCHES[0]))
    assert_close(state.ssam.mask.memory, want)


def test_weight_decay_acts_on_the_anchor():
    decay = optax.chain(optax.add_decayed_weights(0.5), optax.scale(-1.0))
    tx, params = alternating(decay, 0.3), make_params()
    point, state = call(tx, params, tx.init(params), BATCHES[0])
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, state, point)
    assert_close(optax.apply_updates(point, updates), jax.tree.map(lambda w: 0.5 * w, params))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_on_an_ascent_call_leaves_no_trace(bad):
    tx, params = alternating(OPTIMIZERS["adam"], 0.3, RULES["fisher"]), make_params()
    state = tx.init(params)
    broken = jax.tree.map(lambda p: jnp.full_like(p, bad), params)
    updates, after = tx.update(broken, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    end, after = call(tx, params, after, BATCHES[0])
    plain = OPTIMIZERS["adam"]
    want, want_state = call(plain, params, plain.init(params), BATCHES[0])
    assert_close(end, want)
    assert_close(after.opt_state, want_state)
    chex.assert_tree_all_finite(after.ssam.mask.memory)


# Compilation and containers.


def test_all_calls_share_one_compilation():
    tx, params = alternating(OPTIMIZERS["adamw"], 0.3, RULES["fisher"]), make_params()
    traces = []

    @jax.jit
    def step(params, state, batch):
        traces.append(1)
        updates, state = tx.update(grad(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in BATCHES:
        params, state = step(params, state, batch)
    assert len(traces) == 1


def test_calls_run_under_scan():
    tx, params = alternating(OPTIMIZERS["sgd"], 0.3, RULES["fisher"]), make_params()
    batches = jnp.repeat(BATCHES, 2, axis=0)
    scanned, _ = jax.jit(
        lambda p, s: jax.lax.scan(lambda carry, batch: (call(tx, *carry, batch), None), (p, s), batches)
    )(params, tx.init(params))
    looped, state = params, tx.init(params)
    for batch in batches:
        looped, state = call(tx, looped, state, batch)
    assert_close(scanned[0], looped)
    chex.assert_trees_all_equal(ssam_jax.get_mask(scanned[1]), ssam_jax.get_mask(state))


def test_bfloat16_parameters_and_the_state_keep_their_dtypes_and_return_near_the_anchor():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
    tx = alternating(optax.sgd(0.0, momentum=0.9), 0.3, RULES["fisher"])
    state = tx.init(params)
    end, after = one_round(tx, params, state, BATCHES[0].astype(jnp.bfloat16))
    chex.assert_trees_all_equal_shapes_and_dtypes((end, after), (params, state))
    for name in params:  # p + (w - p) rounds once to bfloat16
        np.testing.assert_allclose(np.float32(end[name]), np.float32(params[name]), atol=2**-7)


def test_the_mask_is_found_replaced_and_described_inside_a_chain():
    tx = optax.chain(alternating(optax.sgd(0.1), 0.3, fixed_mask(MASK)))
    params = make_params()
    state = tx.init(params)
    chex.assert_trees_all_equal(ssam_jax.get_mask(state), jax.tree.map(jnp.asarray, MASK))
    assert float(ssam_jax.mask_stats(state).density) == pytest.approx(4 / 10)
    state = ssam_jax.set_mask(state, {"bias": jnp.array(False), "kernel": jnp.array(True)})
    assert ssam_jax.active_leaves(state) == (False, True)
    point, _ = call(tx, params, state, BATCHES[0])
    np.testing.assert_array_equal(point["bias"], params["bias"])
    assert np.all(point["kernel"] != params["kernel"])


def test_a_flax_train_state_needs_no_change():
    train_state = pytest.importorskip("flax.training.train_state")
    rule, sgd = RULES["fisher"], OPTIMIZERS["sgd"]
    state = train_state.TrainState.create(apply_fn=None, params=make_params(), tx=alternating(sgd, 0.3, rule))
    chain = optax.chain(ssam(0.3, rule), sgd)
    params, chain_state = make_params(), chain.init(make_params())
    step = jax.jit(lambda state, batch: state.apply_gradients(grads=grad(state.params, batch)))
    for batch in BATCHES[:3]:
        state = step(step(state, batch), batch)
        params, chain_state = chain_step(chain, params, chain_state, batch)
        assert_close(state.params, params)
    chex.assert_trees_all_equal(ssam_jax.get_mask(state.opt_state), ssam_jax.get_mask(chain_state))


def test_extra_arguments_reach_the_wrapped_optimizer_and_the_mask_rule():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(value)
        return updates, state

    def observe(memory, *args, value, **extra):
        seen.append(value)
        return memory

    optimizer = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    rule = ssam_jax.MaskRule(None, observe, fixed_mask(MASK).select)
    tx, params = alternating(optimizer, 0.1, rule), make_params()
    tx.update(params, tx.init(params), params, value=5)
    assert seen and set(seen) == {5}
    assert len(seen) == 2


def test_an_optimizer_without_extra_arguments_may_be_given_some():
    plain = optax.GradientTransformation(lambda params: optax.EmptyState(), lambda u, s, params=None: (u, s))
    tx, params = alternating(plain, 0.1), make_params()
    updates, _ = tx.update(params, tx.init(params), params, value=5)
    assert np.all(updates["kernel"] != 0)


# Errors.


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (TypeError, "optimizer.*0.1", (0.1, 0.1), {}),
        (TypeError, "optimizer", (optax.sgd, 0.1), {}),
        (ValueError, "rho.*-1", (optax.sgd(0.1), -1), {}),
        (TypeError, "rho.*'x'", (optax.sgd(0.1), "x"), {}),
        (TypeError, "mask.*MaskRule", (optax.sgd(0.1), 0.1, NM(2, 4)), {}),
        (ValueError, "normalize.*'l2'", (optax.sgd(0.1), 0.1), {"normalize": "l2"}),
        (TypeError, "adaptive", (optax.sgd(0.1), 0.1), {"adaptive": 0}),
        (ValueError, "ascent_steps.*0", (optax.sgd(0.1), 0.1), {"ascent_steps": 0}),
        (TypeError, "ascent_steps.*1.5", (optax.sgd(0.1), 0.1), {"ascent_steps": 1.5}),
        (TypeError, "skip_zero_rho", (optax.sgd(0.1), 0.1), {"skip_zero_rho": True}),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused_by_name(error, match, args, options):
    with pytest.raises(error, match=match):
        alternating(*args, **options)


def test_missing_parameters_and_gradients_of_another_shape_are_errors():
    tx, params = alternating(optax.sgd(0.1), 0.1), make_params()
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state)
    with pytest.raises(ValueError, match=r"the gradient.*'bias'"):
        tx.update(dict(params, bias=jnp.ones(3)), state, params)


def test_the_mask_rule_is_told_the_parameters_at_w_and_of_no_ascent_gradient():
    def observe(memory, params, ascent_grads, descent_grads, step, **extra):
        assert ascent_grads is None
        return params

    def select(memory, mask, params, key, step):
        return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)

    tx = alternating(optax.sgd(0.1), 0.3, MaskRule(lambda params: params, observe, select))
    start = make_params()
    params, state = call(tx, start, tx.init(start), BATCHES[0])
    assert not np.array_equal(params["kernel"], start["kernel"])
    _, state = call(tx, params, state, BATCHES[0])
    chex.assert_trees_all_equal(state.ssam.mask.memory, start)
