"""`ssam_jax.ssam` beside its peers: `optax.contrib.sam`, and the optimizer without it."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ssam_jax
from ssam_jax import NM, fisher_mask, fixed_mask, ssam

BATCH = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
MASK = {"bias": np.array([True, False]), "kernel": np.arange(8).reshape(4, 2) % 3 == 0}


def make_params():
    return {"bias": jnp.array([0.3, -0.2]), "kernel": jnp.linspace(-1.0, 1.5, 8).reshape(4, 2)}


def loss_fn(params, batch):
    return jnp.sum(jnp.tanh(batch @ params["kernel"] + params["bias"][None] - 0.5) ** 2)


def grad_fn(params, i):
    return jax.grad(loss_fn)(params, BATCH)


def one_step(tx, params, state, **extra):
    updates, state = tx.update(grad_fn(params, 0), state, params, **extra)
    return optax.apply_updates(params, updates), state


def descent(tx, params=None, state=None, fn=grad_fn):
    params = make_params() if params is None else params
    state = tx.init(params) if state is None else state
    return tx.update(grad_fn(params, 0), state, params, grad_fn=fn)[0]


def points_seen(tx, params=None):
    """Return the parameters and the steps that grad_fn is called with."""
    seen = []

    def spy(p, i):
        seen.append((p, i))
        return grad_fn(p, i)

    descent(tx, params, fn=spy)
    return seen


def distance(a, b):
    return np.sqrt(sum(np.sum(np.square(a[name] - b[name])) for name in a))


def perturbation_norm(tx):
    point = points_seen(tx)[0][0]
    return distance(point, make_params())


def adversary(rho):
    return optax.chain(optax.contrib.normalize(), optax.sgd(rho))


# Peers.


@pytest.mark.parametrize("ascent_steps", [1, 2])
def test_dense_ssam_equals_optax_sam_step_for_step_with_the_same_grad_fn(ascent_steps):
    sgd = optax.sgd(0.2, momentum=0.9)
    ours = optax.chain(ssam(0.3, ascent_steps=ascent_steps), sgd)
    theirs = optax.contrib.sam(sgd, adversary(0.3), sync_period=ascent_steps + 1, opaque_mode=True)
    step = jax.jit(lambda tx, p, s: one_step(tx, p, s, grad_fn=grad_fn), static_argnums=0)
    runs = [(tx, make_params(), tx.init(make_params())) for tx in (ours, theirs)]
    for _ in range(8):
        runs = [(tx, *step(tx, params, state)) for tx, params, state in runs]
        chex.assert_trees_all_close(runs[0][1], runs[1][1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(runs[0][1]["kernel"], make_params()["kernel"])


def test_two_lines_turn_a_loop_with_optax_sam_into_one_with_ssam():
    def train(tx):
        params = make_params()
        state = tx.init(params)
        for _ in range(3):
            grads = grad_fn(params, 0)
            updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, updates)
        return params

    before = train(optax.contrib.sam(optax.sgd(0.1), adversary(0.3), opaque_mode=True))
    after = train(optax.chain(ssam(rho=0.3), optax.sgd(0.1)))
    chex.assert_trees_all_close(before, after, rtol=1e-5)


@pytest.mark.parametrize(
    ("rho", "extra"),
    [(0.0, {}), (0, {}), (np.float32(0), {}), (0.0, {"grad_fn": grad_fn}), (0.3, {"grad_fn": None})],
)
def test_a_static_rho_of_zero_and_a_grad_fn_of_none_are_the_base_optimizer_bit_for_bit(rho, extra):
    sgd = optax.sgd(0.2, momentum=0.9)
    tx = optax.chain(ssam(rho, fixed_mask(MASK)), sgd)
    params, other = make_params(), make_params()
    state, other_state = tx.init(params), sgd.init(params)
    for _ in range(3):
        params, state = one_step(tx, params, state, **extra)
        other, other_state = one_step(sgd, other, other_state)
        chex.assert_trees_all_equal(params, other)


def products(fn, *args):
    """Count the matrix products of a compiled function."""
    # Custom calls (to oneDNN) stand for products too.
    text = jax.jit(fn).lower(*args).compile().as_text()
    return sum(text.count(op) for op in (" dot(", " convolution(", " custom-call("))


def step_products(tx, **extra):
    params = make_params()
    return products(lambda p, s: one_step(tx, p, s, **extra), params, tx.init(params))


def test_a_full_step_costs_the_products_of_optax_sam_and_a_step_without_ascent_those_of_one_gradient():
    once = step_products(optax.sgd(0.1))
    assert once == products(grad_fn, make_params(), 0) >= 2
    assert step_products(optax.chain(ssam(0.0), optax.sgd(0.1))) == once
    assert step_products(optax.chain(ssam(0.3), optax.sgd(0.1)), grad_fn=None) == once
    full = step_products(optax.chain(ssam(0.3), optax.sgd(0.1)), grad_fn=grad_fn)
    sam = optax.contrib.sam(optax.sgd(0.1), adversary(0.3), opaque_mode=True)
    assert full == step_products(sam, grad_fn=grad_fn) == 2 * once


def test_scores_and_masks_go_on_being_refreshed_without_ascent():
    tx = ssam(0.3, fisher_mask(NM(1, 2), refresh_every=1, decay=0.0))
    params = make_params()
    state = tx.init(params)
    descents, state = tx.update(grad_fn(params, 0), state, params, grad_fn=None)
    wanted = NM(1, 2)(jax.tree.map(jnp.square, descents))
    chex.assert_trees_all_equal(ssam_jax.get_mask(state), wanted)
    assert int(state.step) == 1


def test_behind_the_optimizer_it_moves_downhill_and_returns_a_gradient_in_place_of_an_update():
    """What the guide says of the wrong order: that nothing in the arguments tells it from the right one."""
    params, grads = make_params(), grad_fn(make_params(), 0)
    updates = descent(optax.chain(optax.sgd(0.2, momentum=0.9), ssam(0.3)))
    length = distance(grads, jax.tree.map(jnp.zeros_like, grads))
    point = jax.tree.map(lambda p, g: p - 0.3 * g / length, params, grads)
    chex.assert_trees_all_close(updates, grad_fn(point, 0), rtol=1e-4)
    assert optax.tree_utils.tree_vdot(updates, grads) > 0
    assert optax.tree_utils.tree_vdot(descent(optax.chain(ssam(0.3), optax.sgd(0.2))), grads) < 0


# The radius.


def test_a_radius_may_be_any_scalar_and_all_kinds_agree():
    want = descent(ssam(0.3))
    for rho in (np.float32(0.3), np.float64(0.3), np.array(0.3), jnp.float32(0.3), lambda step: 0.3):
        chex.assert_trees_all_close(descent(ssam(rho)), want, rtol=1e-6)
    chex.assert_trees_all_equal(descent(ssam(1)), descent(ssam(1.0)))
    assert not np.allclose(want["kernel"], grad_fn(make_params(), 0)["kernel"], rtol=1e-3)


def test_a_radius_may_be_traced_and_vmapped():
    radii = jnp.array([0.0, 0.1, 0.3])
    got = jax.jit(jax.vmap(lambda rho: descent(ssam(rho))))(radii)
    for i, rho in enumerate([0.0, 0.1, 0.3]):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], got), descent(ssam(rho)), rtol=1e-4)


def test_a_schedule_sees_the_number_of_steps_taken():
    schedule = optax.polynomial_schedule(0.4, 0.1, power=2, transition_steps=4)
    tx, params = ssam(schedule), make_params()
    state = tx.init(params)
    for step in range(6):
        want = descent(ssam(float(schedule(step))), params)
        got, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        chex.assert_trees_all_close(got, want, rtol=1e-5)
        params = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, got))


def test_a_radius_passes_through_inject_hyperparams():
    tx = optax.inject_hyperparams(ssam)(rho=0.3)
    state = tx.init(make_params())
    chex.assert_trees_all_close(descent(tx, state=state), descent(ssam(0.3)), rtol=1e-6)
    state.hyperparams["rho"] = jnp.float32(0.1)
    chex.assert_trees_all_close(descent(tx, state=state), descent(ssam(0.1)), rtol=1e-6)


@pytest.mark.parametrize("skip", [False, True])
def test_skip_zero_rho_runs_grad_fn_only_where_a_traced_radius_is_not_zero(skip):
    calls = []

    def counted(params, i):
        jax.debug.callback(lambda: calls.append(i))
        return grad_fn(params, i)

    step = jax.jit(lambda rho: descent(ssam(rho, skip_zero_rho=skip), fn=counted))
    counts = []
    for rho in (0.0, 0.3, 0.0, 0.0, 0.3):
        got = step(jnp.float32(rho))
        jax.effects_barrier()
        counts.append(len(calls))
        chex.assert_trees_all_close(got, descent(ssam(rho)), rtol=1e-5)
    assert counts == ([0, 1, 1, 1, 2] if skip else [1, 2, 3, 4, 5])


# What grad_fn sees.


@pytest.mark.parametrize("adaptive", [False, True])
def test_entries_outside_the_mask_are_bitwise_unchanged_and_all_inside_move(adaptive):
    point, _ = points_seen(ssam(0.3, fixed_mask(MASK), adaptive=adaptive))[0]
    for name, old in make_params().items():
        np.testing.assert_array_equal(np.asarray(point[name] != old), MASK[name])


def test_the_perturbation_is_no_longer_than_rho_and_with_the_masked_norm_just_as_long():
    for rho in (0.01, 0.3, 2.0):
        assert perturbation_norm(ssam(rho)) == pytest.approx(rho, rel=1e-4)
        assert 0 < perturbation_norm(ssam(rho, fixed_mask(MASK))) < rho * 0.99
        masked = ssam(rho, fixed_mask(MASK), normalize="masked")
        assert perturbation_norm(masked) == pytest.approx(rho, rel=1e-4)


def test_grad_fn_is_called_once_a_step_with_the_index_from_zero():
    assert [i for _, i in points_seen(ssam(0.1))] == [0]
    assert [i for _, i in points_seen(ssam(0.1, ascent_steps=1))] == [0]
    assert [i for _, i in points_seen(ssam(0.1, ascent_steps=3))] == [0, 1, 2]


def test_each_ascent_step_is_rho_long_from_where_the_last_one_ended():
    points = [make_params(), *(p for p, _ in points_seen(ssam(0.2, ascent_steps=3)))]
    for a, b in itertools.pairwise(points):
        assert distance(a, b) == pytest.approx(0.2, rel=1e-4)


def test_what_grad_fn_returns_last_is_what_the_rest_of_the_chain_gets():
    marked = {"bias": jnp.full(2, 7.0), "kernel": jnp.full((4, 2), 8.0)}
    chex.assert_trees_all_equal(descent(ssam(0.2), fn=lambda p, i: marked), marked)


def test_running_statistics_come_from_the_clean_pass_only():
    def loss(params, mean):
        hidden = BATCH @ params["kernel"]
        new = 0.9 * mean + 0.1 * jnp.mean(hidden, axis=0)
        return jnp.sum(jnp.square(hidden - new[None] + params["bias"][None])), new

    @jax.jit
    def step(params, state, mean):
        grads, new = jax.grad(loss, has_aux=True)(params, mean)

        def fn(p, i):
            return jax.grad(loss, has_aux=True)(p, mean)[0]

        updates, state = tx.update(grads, state, params, grad_fn=fn)
        return optax.apply_updates(params, updates), state, new

    tx = optax.chain(ssam(0.5), optax.sgd(0.01))
    params, mean = make_params(), jnp.ones(2)
    state = tx.init(params)
    for _ in range(3):
        want = loss(params, mean)[1]
        params, state, mean = step(params, state, mean)
        np.testing.assert_allclose(mean, want, rtol=1e-5)


def test_unknown_extra_arguments_are_ignored_and_reach_the_mask_rule():
    got = {}

    def observe(memory, params, ascent_grads, descent_grads, step, **extra):
        got.update(extra)
        return memory

    rule = ssam_jax.MaskRule(None, observe, fixed_mask(MASK).select)
    tx, params = ssam(0.1, rule), make_params()
    tx.update(grad_fn(params, 0), tx.init(params), params, grad_fn=grad_fn, value=5, other="x")
    assert got == {"value": 5, "other": "x"}


def test_a_mask_rule_gets_both_gradients_and_its_new_mask_serves_the_next_step():
    got = []

    def observe(memory, params, ascent_grads, descent_grads, step, **extra):
        got.append((ascent_grads, descent_grads, int(step)))
        return memory

    def select(memory, mask, params, key, step):
        return jax.tree.map(jnp.asarray, MASK) if mask is None else jax.tree.map(jnp.logical_not, mask)

    rule = ssam_jax.MaskRule(None, observe, select, refresh_every=1)
    tx, params = ssam(0.1, rule), make_params()
    state, seen = tx.init(params), []
    for _ in range(2):

        def fn(p, i):
            return (seen.append(p), grad_fn(p, i))[1]

        out, state = tx.update(grad_fn(params, 0), state, params, grad_fn=fn)
        chex.assert_trees_all_equal(got[-1][0], grad_fn(params, 0))
        chex.assert_trees_all_equal(got[-1][1], out)
    assert [step for *_, step in got] == [0, 1]
    np.testing.assert_array_equal(seen[0]["kernel"] != params["kernel"], MASK["kernel"])
    np.testing.assert_array_equal(seen[1]["kernel"] != params["kernel"], ~MASK["kernel"])


@pytest.mark.parametrize(("partial", "form"), [(True, "explicit"), (False, "implicit"), (False, "explicit")])
def test_a_mask_rule_gets_no_ascent_gradient_that_is_not_complete(partial, form):
    class Gradient:
        def __init__(self):
            self.partial, self.form, self.ascent = partial, form, grad_fn

        def __call__(self, params, i):
            return grad_fn(params, i)

        def value_and_grad(self, params, i):
            raise NotImplementedError

    def observe(memory, params, ascent_grads, descent_grads, step):
        got.append(ascent_grads)
        return memory

    got, params = [], make_params()
    tx = ssam(0.1, ssam_jax.MaskRule(None, observe, fixed_mask(MASK).select), normalize="masked")
    tx.update(grad_fn(params, 0), tx.init(params), params, grad_fn=Gradient())
    assert (got[0] is None) == (partial or form == "implicit")


# Errors.


@pytest.mark.parametrize(
    ("error", "match", "rho", "options"),
    [
        (ValueError, "rho.*-0.1", -0.1, {}),
        (ValueError, "rho.*nan", float("nan"), {}),
        (ValueError, "rho.*inf", float("inf"), {}),
        (ValueError, "rho", np.float32(-1), {}),
        (TypeError, "rho.*True", True, {}),
        (TypeError, "rho.*'0.1'", "0.1", {}),
        (TypeError, "rho", None, {}),
        (TypeError, "rho", jnp.array(1j), {}),
        (ValueError, r"rho.*\(2,\)", jnp.ones(2), {}),
        (ValueError, r"rho.*\(2,\)", np.ones(2), {}),
        (TypeError, r"mask.*MaskRule.*NM", 0.1, {"mask": NM(2, 4)}),
        (TypeError, "mask.*MaskRule", 0.1, {"mask": MASK}),
        (ValueError, "normalize.*'l1'", 0.1, {"normalize": "l1"}),
        (TypeError, "adaptive.*1", 0.1, {"adaptive": 1}),
        (ValueError, "ascent_steps.*0", 0.1, {"ascent_steps": 0}),
        (TypeError, "ascent_steps.*2.0", 0.1, {"ascent_steps": 2.0}),
        (TypeError, "ascent_steps.*True", 0.1, {"ascent_steps": True}),
        (TypeError, "skip_zero_rho.*1", 0.1, {"skip_zero_rho": 1}),
        (TypeError, "direction.*'other'", 0.1, {"direction": "other"}),
        (TypeError, "combine.*'other'", 0.1, {"combine": "other"}),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused_by_name(error, match, rho, options):
    with pytest.raises(error, match=match):
        ssam(rho, **options)


def test_a_missing_grad_fn_is_an_error_that_says_how_to_pass_it():
    tx, params = ssam(0.1), make_params()
    with pytest.raises(TypeError, match=r"grad_fn=grad_fn.*alternating"):
        tx.update(grad_fn(params, 0), tx.init(params), params)


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_missing_parameters_are_an_error(rho):
    tx, params = ssam(rho), make_params()
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(grad_fn(params, 0), tx.init(params), grad_fn=grad_fn)


def test_a_grad_fn_that_returns_another_tree_is_refused_by_the_name_of_the_leaf():
    def bad_shape(p, i):
        return dict(grad_fn(p, i), kernel=jnp.ones((2, 4)))

    with pytest.raises(ValueError, match=r"grad_fn.*'kernel'.*\(4, 2\).*\(2, 4\)"):
        descent(ssam(0.1), fn=bad_shape)
    with pytest.raises(ValueError, match=r"grad_fn.*structure"):
        descent(ssam(0.1), fn=lambda p, i: {"kernel": p["kernel"]})
    with pytest.raises(ValueError, match=r"grad_fn.*structure"):
        descent(ssam(0.1), fn=lambda p, i: (1.0, grad_fn(p, i)))


def test_a_gradient_of_another_shape_than_the_parameters_is_refused():
    tx, params = ssam(0.1), make_params()
    with pytest.raises(ValueError, match=r"the gradient.*'bias'"):
        tx.update(dict(params, bias=jnp.ones(3)), tx.init(params), params, grad_fn=grad_fn)


def test_parameters_that_are_not_real_floats_are_refused_by_the_name_of_the_leaf():
    with pytest.raises(TypeError, match="'count' is int32"):
        ssam(0.1).init({"count": jnp.zeros(2, jnp.int32), "w": jnp.ones(2)})


def test_a_part_of_the_tree_as_under_optax_masked_is_refused():
    tx = optax.masked(ssam(0.1), {"bias": False, "kernel": True})
    with pytest.raises(ValueError, match=r"optax.masked.*fixed_mask"):
        tx.init(make_params())


def test_a_rule_whose_mask_does_not_fit_the_parameters_is_refused_at_init():
    with pytest.raises(ValueError, match="'kernel'"):
        ssam(0.1, fixed_mask(dict(MASK, kernel=np.ones((3, 2), bool)))).init(make_params())
