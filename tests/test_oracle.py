"""The library against `oracle`, which is the algorithm in plain NumPy, step by step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import ssam_jax
from ssam_jax import NM, Structured, Unstructured

STEPS, EVERY = 12, 3


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["kernel1"] + params["bias1"][None])
    logits = hidden @ params["kernel2"] + params["bias2"][None]
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(logits), axis=1))


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def full_mask(mask, params):
    """Return the mask that the library holds, broadcast to the parameters, as NumPy arrays."""
    return {name: np.broadcast_to(np.asarray(mask[name]), np.shape(params[name])) for name in params}


@functools.cache
def compiled(tx):
    """Compile a transformation of gradients, once for all optimizers it is chained with by hand."""

    @jax.jit
    def step(params, state, batch):
        def grad_fn(p, i):
            return jax.grad(loss_fn)(p, batch)

        return tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)

    return step


def without_drawing(tx, params, mask):
    """Return the state after ``tx.init`` but for the mask given: saves compiling the first draw."""
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(tx.init, params))
    shapes = ssam_jax.get_mask(blank)

    def like(m, old):
        return m[tuple(slice(None if n > 1 else 1) for n in old.shape)] if old.ndim else m.all()

    return ssam_jax.set_mask(blank, jax.tree.map(like, mask, shapes))


def library_steps(tx, optimizer, batches, mask):
    """Yield the parameters and the mask at the start and after every step.

    The start is the given mask or one that the library has drawn.
    """
    params = float32(oracle.make_params())
    state = tx.init(params) if mask == "drawn" else without_drawing(tx, params, mask)
    opt_state = optimizer.init(params)
    yield params, ssam_jax.get_mask(state)
    for batch in batches:
        grads, state = compiled(tx)(params, state, float32(batch))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        yield params, ssam_jax.get_mask(state)


def assert_same_run(tx, optimizers, rho=0.3, rule=None, mask="drawn", **options):
    """Compare a run with the oracle's from the same mask, by default the one the library draws."""
    start, batches = oracle.make_params(), oracle.make_batches(STEPS)
    run = library_steps(tx, optimizers[0], batches, mask)
    _, mask = next(run)
    mask = full_mask(jax.tree.map(lambda _: True, start) if mask is None else mask, start)
    masks = [mask]
    radius = rho if callable(rho) else lambda step: rho
    expected = oracle.train(start, batches, radius, optimizers[1], mask, rule, **options)
    for step, ((params, mask), (want, want_mask)) in enumerate(zip(run, expected, strict=True)):
        for name in oracle.ORDER:
            np.testing.assert_allclose(
                params[name], want[name], rtol=1e-4, atol=1e-5, err_msg=f"{name}, step {step}"
            )
        if mask is not None:
            masks.append(full_mask(mask, start))
            for name in oracle.ORDER:
                np.testing.assert_array_equal(masks[-1][name], want_mask[name], f"{name}, step {step}")
    if rule is not None:
        refreshed = [any((a[n] != b[n]).any() for n in oracle.ORDER) for a, b in itertools.pairwise(masks)]
        assert not any(r for step, r in enumerate(refreshed, 1) if step % EVERY)
        assert sum(refreshed) >= 2, "the masks must change for this test to mean anything"


SGD = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.3, momentum=0.9))
ADAM = optax.adam(0.03)


def jitted(tx):
    """Adam of optax relies on implicit promotion, which the tests turn off."""

    @jax.jit
    def update(updates, state, params):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


OPTIMIZERS = {
    "sgd": (jitted(SGD), oracle.sgd(0.3, 0.9, 0.01)),
    "adam": (jitted(ADAM), oracle.adam(0.03)),
}
PATTERNS = {
    "global": (Unstructured(0.5), oracle.unstructured(0.5)),
    "global 90 %": (Unstructured(0.9), oracle.unstructured(0.9)),
    "leaf": (Unstructured(0.6, scope="leaf"), oracle.unstructured(0.6, "leaf")),
    "tensor": (Structured(0.5), oracle.structured(0.5, oracle.by_tensor)),
    "output channel": (
        Structured(0.5, unit="channel", axis=-1),
        oracle.structured(0.5, oracle.by_channel(-1)),
    ),
    "input channel": (
        Structured(0.7, unit="channel", axis=-2),
        oracle.structured(0.7, oracle.by_channel(-2)),
    ),
    "block": (
        Structured(0.5, unit="block", axis=(-2, -1), block=(2, 4)),
        oracle.structured(0.5, oracle.by_block(2, 4)),
    ),
    "2:4": (NM(2, 4), oracle.n_of_m(2, 4, -1)),
    "1:4 along inputs": (NM(1, 4, axis=0), oracle.n_of_m(1, 4, 0)),
}
FORMS = {
    "as it comes": {},
    "masked norm": {"normalize": "masked"},
    "adaptive": {"adaptive": True},
    "adaptive, masked norm": {"adaptive": True, "normalize": "masked"},
    "two ascent steps": {"ascent_steps": 2},
    "three adaptive ascent steps": {"ascent_steps": 3, "adaptive": True, "normalize": "masked"},
}
TRADES = {
    "global": (*PATTERNS["global"], oracle.by_entry, False),
    "leaf": (*PATTERNS["leaf"], oracle.by_entry, True),
    "channel": (*PATTERNS["output channel"], oracle.by_channel(-1), True),
}


@pytest.fixture(params=OPTIMIZERS, name="optimizers")
def _optimizers(request):
    return OPTIMIZERS[request.param]


TRADING = {"refresh_every": EVERY, "drop_fraction": 0.7, "total_steps": 15}


@functools.cache
def fisher_ssam(pattern, form="as it comes"):
    mask = ssam_jax.fisher_mask(PATTERNS[pattern][0], refresh_every=EVERY, decay=0.8)
    return ssam_jax.ssam(0.3, mask, **FORMS[form])


@functools.cache
def dynamic_ssam(trade):
    return ssam_jax.ssam(0.3, ssam_jax.dynamic_mask(TRADES[trade][0], grow="gradient", **TRADING))


def fisher_rule(pattern):
    return oracle.fisher(PATTERNS[pattern][1], EVERY, 0.8)


def some_mask(pattern):
    return PATTERNS[pattern][1](oracle.make_params(seed=5))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_fisher_masks_of_every_pattern_follow_the_oracle(pattern, optimizers):
    tx = fisher_ssam(pattern)
    assert_same_run(tx, optimizers, rule=fisher_rule(pattern), mask=some_mask(pattern))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_step_follows_the_oracle(form, optimizers):
    tx = fisher_ssam("2:4", form)
    assert_same_run(tx, optimizers, rule=fisher_rule("2:4"), mask=some_mask("2:4"), **FORMS[form])


@pytest.mark.parametrize("trade", TRADES)
def test_dynamic_masks_follow_the_oracle(trade, optimizers):
    rule = oracle.dynamic(*TRADES[trade][2:], **TRADING)
    first = TRADES[trade][1](oracle.make_params(seed=5))
    assert_same_run(dynamic_ssam(trade), optimizers, rule=rule, mask=first)


def test_a_run_from_the_mask_that_the_library_draws_follows_the_oracle(optimizers):
    assert_same_run(fisher_ssam("2:4"), optimizers, rule=fisher_rule("2:4"))


def test_dense_sam_with_a_radius_schedule_follows_the_oracle(optimizers):
    tx = ssam_jax.ssam(optax.linear_schedule(0.5, 0.1, 8))
    assert_same_run(tx, optimizers, rho=lambda step: 0.5 - 0.4 * min(step / 8, 1))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_chain_and_alternating_calls_on_one_batch_follow_the_oracle(optimizer):
    base = {"sgd": SGD, "adam": ADAM}[optimizer]
    rule = ssam_jax.fisher_mask(PATTERNS["2:4"][0], refresh_every=EVERY, decay=0.8)
    alternating = ssam_jax.alternating(base, 0.3, rule)

    def two_calls(grads, state, params, *, grad_fn):
        with jax.numpy_dtype_promotion("standard"):
            up, state = alternating.update(grads, state, params)
            point = optax.apply_updates(params, up)
            down, state = alternating.update(grad_fn(point, 0), state, point)
        return jax.tree.map(jnp.add, up, down), state

    def chained(grads, state, params, *, grad_fn):
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(grads, state, params, grad_fn=grad_fn)

    chain = optax.chain(fisher_ssam("2:4"), base)
    for init, update in ((alternating.init, two_calls), (chain.init, chained)):
        tx = optax.GradientTransformationExtraArgs(init, update)
        optimizers = optax.identity(), OPTIMIZERS[optimizer][1]
        assert_same_run(tx, optimizers, rule=fisher_rule("2:4"), mask=some_mask("2:4"))


def test_the_empirical_fisher_is_the_mean_square_of_single_gradients():
    params, batch = oracle.make_params(), oracle.make_batches(1, size=7)[0]

    def single(p, example):
        return loss_fn(p, jax.tree.map(lambda x: x[None], example))

    got = ssam_jax.empirical_fisher(single, float32(params), float32(batch), chunk_size=3)
    want = oracle.empirical_fisher(params, batch)
    for name in oracle.ORDER:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-7)


def test_the_gradients_of_the_oracle_are_those_of_its_loss():
    params, batch = oracle.make_params(), oracle.make_batches(1)[0]
    grads = oracle.gradient(params, batch)
    for name in oracle.ORDER:
        for index in np.ndindex(*params[name].shape):
            moved = []
            for step in (1e-5, -1e-5):
                other = dict(params, **{name: params[name].copy()})
                other[name][index] += step
                moved.append(oracle.loss(other, batch))
            assert (moved[0] - moved[1]) / 2e-5 == pytest.approx(grads[name][index], abs=1e-8)


def test_the_oracle_keeps_what_was_worked_out_by_hand():
    scores = {"a": np.array([3.0, 1.0]), "b": np.array([[2.0, 2.0], [5.0, 0.0]])}
    assert_masks(oracle.unstructured(0.5)(scores), [1, 0], [[1, 0], [1, 0]])
    assert_masks(oracle.unstructured(0.5, "leaf")(scores), [1, 0], [[1, 0], [1, 0]])
    assert_masks(oracle.structured(0.5, oracle.by_tensor)(scores), [0, 0], [[1, 1], [1, 1]])
    assert_masks(oracle.structured(0.5, oracle.by_channel(-1))(scores), [1, 0], [[1, 0], [1, 0]])
    assert_masks(oracle.structured(0.5, oracle.by_channel(-2))(scores), [1, 1], [[0, 0], [1, 1]])
    assert_masks(oracle.structured(0.5, oracle.by_block(2, 1))(scores), [1, 1], [[1, 0], [1, 0]])
    assert_masks(oracle.n_of_m(1, 2, -1)(scores), [1, 1], [[1, 0], [1, 0]])
    assert_masks(oracle.n_of_m(1, 2, 0)(scores), [1, 1], [[0, 1], [1, 0]])


def test_the_oracle_trades_what_was_worked_out_by_hand():
    mask = {"a": np.array([True, True, False, False]), "b": np.array([True, False])}
    scores = {"a": np.array([1.0, 4.0, 9.0, 2.0]), "b": np.array([3.0, 8.0])}
    assert_masks(oracle.trade(mask, scores, oracle.by_entry, 1 / 3), [0, 1, 1, 0], [1, 0])
    assert_masks(oracle.trade(mask, scores, oracle.by_entry, 2 / 3), [0, 1, 1, 0], [0, 1])


def assert_masks(got, a, b):
    assert got["a"].astype(int).tolist() == a
    assert got["b"].astype(int).tolist() == b
