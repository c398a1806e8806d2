"""`ssam` inside and beside optax's own wrappers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax.training import dynamic_scale as flax_dynamic_scale

import ssam_jax
from ssam_jax import NM, MaskRule

FIRST = ssam_jax.fixed_mask(lambda path: path.startswith("first"))
SECOND = jax.tree.map(lambda p: np.zeros(p.shape, bool), tiny.PARAMS) | {
    "second": {"kernel": np.ones((4, 8), bool)}
}


@pytest.fixture(autouse=True)
def _optax_may_promote():
    """Several of optax's wrappers multiply bools and floats, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def ssam(mask=FIRST, rho=0.1):
    return ssam_jax.ssam(rho=rho, mask=mask)


def full_mask():
    """Return a rule whose mask has the parameters' shapes, so that any mask can be set."""
    return ssam_jax.fisher_mask(NM(2, 4), refresh_every=None)


def start(tx):
    return tiny.params(), tx.init(tiny.params())


def descent(params, batch, rho=0.1):
    """Return the gradient that a chain after `ssam` with the mask FIRST must see."""
    grads = jax.grad(tiny.loss)(params, batch)
    length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    moved = jax.tree.map(lambda p, g: p + rho / length * g, params["first"], grads["first"])
    return jax.grad(tiny.loss)({**params, "first": moved}, batch)


def gradient_out(tx, state):
    """Return the updates of a chain that ends in ``sgd(1)``, made positive."""
    params, batch = tiny.params(), tiny.BATCHES[0]
    grad_fn = tiny.grad_fn_of(batch)
    updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
    return jax.tree.map(jnp.negative, updates), state


# inject_hyperparams


def test_inject_hyperparams_takes_rho_and_a_mask_rule():
    tx = optax.chain(optax.inject_hyperparams(ssam_jax.ssam)(rho=0.1, mask=FIRST), optax.sgd(1.0))
    grads, _ = gradient_out(tx, tx.init(tiny.params()))
    tiny.assert_close(grads, descent(tiny.params(), tiny.BATCHES[0]))


def test_a_changed_hyperparameter_takes_effect_without_a_new_compilation():
    tx = optax.inject_hyperparams(ssam_jax.ssam)(rho=0.1, mask=FIRST)
    out = jax.jit(
        lambda state: gradient_out(optax.chain(tx, optax.sgd(1.0)), (state, (optax.EmptyState(),) * 2))
    )
    state = tx.init(tiny.params())
    for rho in (0.1, 0.7, 0.0):
        state.hyperparams["rho"] = jnp.asarray(rho)
        tiny.assert_close(out(state)[0], descent(tiny.params(), tiny.BATCHES[0], rho))
    assert out._cache_size() == 1


def test_inject_hyperparams_takes_a_schedule_for_rho():
    tx = optax.inject_hyperparams(ssam_jax.ssam)(rho=optax.linear_schedule(0.0, 0.4, 2), mask=FIRST)
    tx = optax.chain(tx, optax.sgd(1.0))
    state = tx.init(tiny.params())
    for rho in (0.0, 0.2, 0.4):
        grads, state = gradient_out(tx, state)
        tiny.assert_close(grads, descent(tiny.params(), tiny.BATCHES[0], rho))
        assert float(state[0].hyperparams["rho"]) == pytest.approx(rho)


def test_inject_hyperparams_needs_ascent_steps_among_its_static_args():
    with pytest.raises(TypeError, match=r"ascent_steps must be an int of at least 1.*name it in static_args"):
        optax.inject_hyperparams(ssam_jax.ssam)(rho=0.1, mask=FIRST, ascent_steps=2).init(tiny.params())


def test_inject_hyperparams_with_static_ascent_steps_equals_plain_ssam():
    injected = optax.inject_hyperparams(ssam_jax.ssam, static_args="ascent_steps")(
        rho=0.1, mask=FIRST, ascent_steps=2
    )
    plain = ssam_jax.ssam(rho=0.1, mask=FIRST, ascent_steps=2)
    (a, _), (b, _) = (gradient_out(tx, tx.init(tiny.params())) for tx in (injected, plain))
    tiny.assert_close(a, b)
    assert tiny.differ(a, jax.tree.map(jnp.negative, descent(tiny.params(), tiny.BATCHES[0])))


# MultiSteps


def multi_steps_run(tx, params, state):
    """Take three micro-steps; ``grad_fn`` is that of all three batches."""
    seen = []

    def grad_fn(params, i):
        jax.debug.callback(lambda: seen.append(i), ordered=False)
        return jax.grad(lambda p: sum(tiny.loss(p, b) for b in tiny.BATCHES[:3]) / 3)(params)

    start, counts = params, []
    for batch in tiny.BATCHES[:3]:
        updates, state = tx.update(jax.grad(tiny.loss)(start, batch), state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
        jax.effects_barrier()
        counts.append(len(seen))
    return params, state, counts


def test_multi_steps_around_the_chain_equals_one_step_on_the_whole_batch():
    tx = optax.MultiSteps(optax.chain(ssam(), optax.sgd(0.1)), every_k_schedule=3)
    params, state, counts = multi_steps_run(tx, *start(tx))
    assert counts == [1, 2, 3]  # MultiSteps calls its optimizer every time and throws two results away
    tiny.assert_close(
        params,
        tiny.step_of(optax.chain(ssam(), optax.sgd(0.1)))(
            *start(optax.chain(ssam(), optax.sgd(0.1))), tiny.BATCHES[:3].reshape(9, 4)
        )[0],
    )
    assert int(state.inner_opt_state[0].step) == 1


def test_multi_steps_after_ssam_averages_the_descent_gradients_of_the_micro_batches():
    tx = optax.chain(ssam(), optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation())
    params, state = start(tx)
    for batch in tiny.BATCHES[:3]:
        params, state = tiny.step_of(tx)(params, state, batch)
    each = [descent(tiny.params(), batch) for batch in tiny.BATCHES[:3]]
    expected = jax.tree.map(lambda p, *g: p - 0.1 * sum(g) / 3, tiny.params(), *each)
    tiny.assert_close(params, expected)
    assert int(state[0].step) == 3


def test_multi_steps_refreshes_the_mask_by_optimizer_steps():
    rule = ssam_jax.random_mask(NM(2, 4), refresh_every=2)
    tx = optax.MultiSteps(optax.chain(ssam(rule), optax.sgd(0.1)), every_k_schedule=2)
    params, state = start(tx)
    masks, step = [ssam_jax.get_mask(state)], jax.jit(tiny.step_of(tx))
    for batch in tiny.BATCHES[:8]:
        params, state = step(params, state, batch)
        masks.append(ssam_jax.get_mask(state))
    assert [i for i in range(1, 9) if tiny.differ(masks[i - 1], masks[i])] == [4, 8]


# apply_if_finite


def test_apply_if_finite_leaves_everything_as_it_was_and_training_goes_on():
    rule = ssam_jax.fisher_mask(NM(2, 4), refresh_every=1)
    tx = optax.apply_if_finite(optax.chain(ssam(rule), optax.adam(1e-2)), max_consecutive_errors=3)
    step = jax.jit(tiny.step_of(tx))
    params, state = step(*start(tx), tiny.BATCHES[0])
    rejected, after = step(params, state, np.full((3, 4), np.nan, np.float32))
    tiny.assert_same(rejected, params)
    tiny.assert_same(after.inner_state, state.inner_state)
    assert not after.last_finite
    tiny.assert_same(
        (lambda p, s: (p, s.inner_state))(*step(rejected, after, tiny.BATCHES[1])),
        (lambda p, s: (p, s.inner_state))(*step(params, state, tiny.BATCHES[1])),
    )


# lookahead


def test_ssam_inside_lookahead_says_to_use_alternating():
    tx = optax.lookahead(optax.chain(ssam(), optax.sgd(0.1)), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(tiny.params())
    grads = tiny.grad_fn_of(tiny.BATCHES[0])(params.fast, 0)
    with pytest.raises(TypeError, match=r"drops extra arguments needs ssam_jax\.alternating"):
        tx.update(grads, tx.init(params), params)


def test_alternating_inside_lookahead_takes_sharpness_aware_steps():
    tx = optax.lookahead(ssam_jax.alternating(optax.sgd(0.1), 0.1, FIRST), sync_period=4, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(tiny.params())
    state, expected = tx.init(params), tiny.params()
    for batch in tiny.BATCHES[:2]:
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, expected, descent(expected, batch))
        for _ in range(2):
            grads = jax.grad(tiny.loss)(params.fast, batch)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    middle = jax.tree.map(lambda slow, fast: slow + 0.5 * (fast - slow), tiny.params(), expected)
    tiny.assert_close(params.slow, middle)
    tiny.assert_close(params.fast, middle)


class Slow(NamedTuple):
    inner: optax.OptState
    slow: optax.Params


def pulled(inner, strength):
    """A wrapper in the way of lookahead that passes extra arguments on."""

    def update(updates, state, params=None, **extra):
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        pulled = jax.tree.map(lambda u, p, s: u + strength * (s - p - u), updates, params, state.slow)
        return pulled, Slow(inner_state, state.slow)

    return optax.GradientTransformationExtraArgs(lambda p: Slow(inner.init(p), p), update)


def test_a_lookahead_that_passes_extra_arguments_on_takes_ssam():
    tx = pulled(optax.chain(ssam(), optax.sgd(0.1)), 0.5)
    params, _ = tiny.step_of(tx)(*start(tx), tiny.BATCHES[0])
    gradient = descent(tiny.params(), tiny.BATCHES[0])
    tiny.assert_close(params, jax.tree.map(lambda p, g: p - 0.05 * g, tiny.params(), gradient))


# schedule_free


def test_the_first_step_of_schedule_free_around_ssam_is_known_by_hand():
    tx = optax.contrib.schedule_free(optax.chain(ssam(), optax.sgd(0.1)), learning_rate=0.1, b1=0.9)
    params, state = tiny.step_of(tx)(*start(tx), tiny.BATCHES[0])
    gradient = descent(tiny.params(), tiny.BATCHES[0])
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, tiny.params(), gradient)
    tiny.assert_close(params, stepped)  # x = z after one step
    tiny.assert_close(optax.contrib.schedule_free_eval_params(state, params), stepped)


# masked and multi_transform


@pytest.mark.parametrize("dense", [False, True])
def test_ssam_inside_masked_names_fixed_mask(dense):
    tx = optax.masked(ssam(None if dense else FIRST), {"first": True, "second": False})
    with pytest.raises(ValueError, match=r"inside optax\.masked.*fixed_mask"):
        tiny.step_of(tx)(*start(tx), tiny.BATCHES[0])


def test_ssam_inside_multi_transform_names_fixed_mask():
    tx = optax.multi_transform({"a": ssam(), "b": optax.identity()}, {"first": "a", "second": "b"})
    with pytest.raises(ValueError, match=r"optax\.multi_transform.*fixed_mask"):
        tiny.step_of(tx)(*start(tx), tiny.BATCHES[0])


def test_alternating_inside_masked_names_fixed_mask():
    tx = optax.masked(ssam_jax.alternating(optax.sgd(0.1), 0.1), {"first": True, "second": False})
    with pytest.raises(ValueError, match="fixed_mask"):
        tx.init(tiny.params())


def test_ssam_before_masked_weight_decay_decays_the_unperturbed_parameters():
    decay = optax.masked(optax.add_decayed_weights(0.5), {"first": False, "second": True})
    tx = optax.chain(ssam(), decay, optax.sgd(1.0))
    grads, _ = gradient_out(tx, tx.init(tiny.params()))
    expected = descent(tiny.params(), tiny.BATCHES[0])
    expected["second"] = {"kernel": expected["second"]["kernel"] + 0.5 * tiny.PARAMS["second"]["kernel"]}
    tiny.assert_close(grads, expected)


# extra arguments


def listening():
    """A custom rule that adds up an extra argument, ``loss``."""

    def observe(total, params, ascent_grads, descent_grads, step, *, loss, **extra):
        assert set(extra) == {"value", "colour"}
        return total + loss

    def select(total, mask, params, key, step):
        return jax.tree.map(lambda _: jnp.array(True), params)

    return MaskRule(lambda params: jnp.zeros(()), observe, select)


def test_unknown_extra_arguments_reach_the_mask_rule_and_the_neighbours():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, accumulation_size=1)
    tx = optax.chain(ssam(listening()), optax.sgd(0.1), plateau)
    params, state = start(tx)
    step = tiny.step_of(tx, value=jnp.float32(2), loss=jnp.float32(3), colour="red")
    for batch in tiny.BATCHES[:4]:
        params, state = step(params, state, batch)
    assert float(state[0].mask.memory) == 12
    assert float(state[2].best_value) == 2
    assert float(state[2].scale) < 1  # no progress was seen


def test_alternating_passes_extra_arguments_to_the_mask_rule_and_the_optimizer():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, accumulation_size=1)
    tx = ssam_jax.alternating(optax.chain(optax.sgd(0.1), plateau), 0.1, listening())
    params, state = start(tx)
    for batch in tiny.BATCHES[:4]:
        grads = jax.grad(tiny.loss)(params, batch)
        extra = {"value": jnp.float32(2), "loss": jnp.float32(3), "colour": "red"}
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
    assert float(state.ssam.mask.memory) == 6  # two descents
    assert float(state.opt_state[1].best_value) == 2


# solvers that take extra arguments


def backtracking(**options):
    return optax.scale_by_backtracking_linesearch(9, **options)


SOLVERS = {
    "backtracking": lambda: optax.chain(optax.sgd(1.0), backtracking(store_grad=True)),
    "zoom": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(9)),
    "lbfgs": lambda: optax.lbfgs(linesearch=backtracking()),
    "polyak": optax.polyak_sgd,
    "momo": optax.contrib.momo,
    "plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
}


def named(params, batch, grad_fn):
    """The loss, with a parameter for what the line searches would refuse else."""
    return tiny.loss(params, batch)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_that_take_extra_arguments_follow_ssam(name):
    solver, params, batch = SOLVERS[name](), tiny.params(), tiny.BATCHES[0]
    tx = optax.chain(ssam(), solver)
    value, grad = jax.value_and_grad(tiny.loss)(params, batch)
    known = {"value": value, "grad": grad, "batch": batch}
    expected, _ = solver.update(
        descent(params, batch), solver.init(params), params, value_fn=tiny.loss, **known
    )
    assert tiny.differ(expected, jax.tree.map(jnp.zeros_like, params))
    given = [{"value_fn": tiny.loss}]
    if name == "backtracking":
        given.append({"value_fn": named, "grad_fn": tiny.grad_fn_of(batch)})
    for extra in given:
        updates, _ = tx.update(grad, tx.init(params), params, **known, **extra)
        tiny.assert_close(updates, expected)


def test_a_value_and_gradient_that_a_line_search_has_stored_start_the_next_step():
    tx = optax.chain(ssam(rho=0.01), SOLVERS["backtracking"]())
    params, state = start(tx)
    value_and_grad, losses = optax.value_and_grad_from_state(tiny.loss), []
    for _ in range(3):
        known = {"batch": tiny.BATCHES[0]}
        value, grad = value_and_grad(params, state=state, **known)
        losses.append(float(value))
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=tiny.loss, **known)
        params = optax.apply_updates(params, updates)
    tiny.assert_close(optax.tree_utils.tree_get(state, "grad"), tiny.grad_fn_of(tiny.BATCHES[0])(params, 0))
    assert losses[0] > losses[1] > losses[2]


def test_a_value_fn_that_is_no_function_is_refused_and_a_grad_fn_of_none_goes_first():
    tx, grads = ssam(), tiny.grad_fn_of(tiny.BATCHES[0])(tiny.params(), 0)
    with pytest.raises(TypeError, match=r"value_fn must be a function value_fn\(params, ...\).*got 3"):
        tx.update(grads, tx.init(tiny.params()), tiny.params(), value_fn=3)
    updates, _ = tx.update(grads, tx.init(tiny.params()), tiny.params(), value_fn=3, grad_fn=None)
    tiny.assert_same(updates, grads)


# reading and replacing the mask

WRAPPERS = {
    "chain": lambda tx: tx,
    "nested chain": lambda tx: optax.chain(optax.chain(optax.identity(), tx), optax.identity()),
    "named_chain": lambda tx: optax.named_chain(("sam", tx), ("rest", optax.identity())),
    "multi_steps": lambda tx: optax.MultiSteps(tx, every_k_schedule=1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=2),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, learning_rate=1.0, b1=1.0),
    "pulled": lambda tx: pulled(tx, 0.0),
}


def wrapped(name):
    if name == "inject_hyperparams":
        tx = optax.inject_hyperparams(ssam_jax.ssam)(rho=0.1, mask=full_mask())
        return optax.chain(tx, optax.sgd(1.0))
    return WRAPPERS[name](optax.chain(ssam(full_mask()), optax.sgd(1.0)))


@pytest.mark.parametrize("name", [*WRAPPERS, "inject_hyperparams"])
def test_the_mask_can_be_read_and_replaced_inside(name):
    tx = wrapped(name)
    params, state = start(tx)
    assert float(ssam_jax.mask_stats(state).density) == pytest.approx(28 / 52)
    fitting = {**SECOND, "first": {"bias": np.array(False), "kernel": SECOND["first"]["kernel"]}}
    changed = ssam_jax.set_mask(state, fitting)
    assert tiny.spec(changed) == tiny.spec(state)
    tiny.assert_same(ssam_jax.get_mask(changed), fitting)
    assert ssam_jax.active_leaves(changed) == (False, False, True)
    assert float(ssam_jax.mask_stats(changed).density) == pytest.approx(32 / 52)
    new, _ = tiny.step_of(tx)(params, changed, tiny.BATCHES[0])
    grads = jax.grad(tiny.loss)(params, tiny.BATCHES[0])
    length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    moved = params["second"]["kernel"] + 0.1 / length * grads["second"]["kernel"]
    expected = jax.grad(tiny.loss)({**params, "second": {"kernel": moved}}, tiny.BATCHES[0])
    tiny.assert_close(jax.tree.map(jnp.subtract, params, new), expected, atol=1e-5)


def test_the_mask_can_be_read_and_replaced_inside_lookahead():
    tx = optax.lookahead(ssam_jax.alternating(optax.sgd(0.1), 0.1, FIRST), sync_period=2, slow_step_size=0.5)
    state = tx.init(optax.LookaheadParams.init_synced(tiny.params()))
    assert ssam_jax.active_leaves(state) == (True, True, False)
    state = ssam_jax.set_mask(state, jax.tree.map(lambda _: np.array(False), tiny.PARAMS))
    assert ssam_jax.active_leaves(state) == (False, False, False)
    assert float(ssam_jax.mask_stats(state).density) == 0


# tree_map_params

MAPPED = {
    "fisher": lambda: ssam_jax.fisher_mask(NM(2, 4), refresh_every=2),
    "dynamic": lambda: ssam_jax.dynamic_mask(ssam_jax.Unstructured(0.5), refresh_every=2, total_steps=9),
    "random": lambda: ssam_jax.random_mask(NM(2, 4)),
    "fixed by path": lambda: FIRST,
    "fixed by tree": lambda: ssam_jax.fixed_mask(SECOND),
    "dense": lambda: None,
}


@pytest.mark.parametrize("rule", MAPPED)
def test_tree_map_params_maps_what_is_shaped_like_the_parameters(rule):
    tx = optax.chain(ssam(MAPPED[rule]()), optax.adam(1e-2))
    state = tx.init(tiny.params())
    mapped = optax.tree_utils.tree_map_params(
        tx, lambda _: "parameter", state, transform_non_params=lambda _: "other"
    )
    names = jax.tree.map(lambda _: "parameter", tiny.PARAMS)
    assert mapped[1][0].mu == names
    assert mapped[0].step == mapped[0].leaf_sizes == "other"
    if rule != "dense":
        assert mapped[0].mask.bits == mapped[0].mask.churn == "other"  # masks have shapes of their own
    if rule == "fisher":
        assert mapped[0].mask.memory == names


def test_tree_map_params_reaches_the_anchor_of_alternating():
    tx = ssam_jax.alternating(optax.sgd(0.1), 0.1, FIRST)
    mapped = optax.tree_map_params(tx, lambda _: "parameter", tx.init(tiny.params()))
    assert mapped.anchor == jax.tree.map(lambda _: "parameter", tiny.PARAMS)


# A gradient that is not finite in the second pass alone.


def overflowing(params, i):
    return jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), params)


@pytest.mark.parametrize(
    "factors", [{}, {"combine": ssam_jax.combine.gsam(0.1)}, {"mask": FIRST}], ids=["plain", "gsam", "mask"]
)
def test_apply_if_finite_behind_ssam_skips_a_step_whose_second_gradient_overflows(factors):
    tx = optax.chain(ssam_jax.ssam(0.1, **factors), optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 3))
    params = tiny.params()
    state, grads = tx.init(params), tiny.grad_fn_of(tiny.BATCHES[0])(params, 0)
    updates, after = tx.update(grads, state, params, grad_fn=overflowing)
    tiny.assert_same(optax.apply_updates(params, updates), params)
    assert int(after[1].notfinite_count) == 1
    tiny.assert_same(after[1].inner_state, state[1].inner_state)


@pytest.mark.parametrize("factors", [{}, {"combine": ssam_jax.combine.gsam(0.1)}], ids=["plain", "gsam"])
def test_apply_if_finite_inside_alternating_returns_to_w_when_the_descent_overflows(factors):
    tx = ssam_jax.alternating(optax.apply_if_finite(optax.sgd(0.1), 3), 0.1, **factors)
    params = tiny.params()
    grads = tiny.grad_fn_of(tiny.BATCHES[0])(params, 0)
    updates, state = tx.update(grads, tx.init(params), params)
    held = optax.apply_updates(params, updates)
    assert tiny.differ(held, params)
    updates, state = tx.update(overflowing(held, 0), state, held)
    tiny.assert_close(optax.apply_updates(held, updates), params, rtol=1e-6, atol=1e-7)
    assert int(state.phase) == 0


def test_a_dynamic_scale_of_flax_with_an_overflow_in_the_second_pass_leaves_the_parameters():
    scale = flax_dynamic_scale.DynamicScale(scale=jnp.float32(2.0**8))
    params, tx = tiny.params(), optax.chain(ssam_jax.ssam(0.1), optax.sgd(0.1))
    state = tx.init(params)
    _, finite, _, grads = scale.value_and_grad(tiny.loss)(params, tiny.BATCHES[0])
    updates, _ = tx.update(grads, state, params, grad_fn=overflowing)
    fine = finite & jnp.all(jnp.array([jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates)]))
    moved = jax.tree.map(
        lambda new, old: jnp.where(fine, new, old), optax.apply_updates(params, updates), params
    )
    assert bool(finite) and not bool(fine)
    tiny.assert_same(moved, params)
