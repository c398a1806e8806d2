"""A whole training step compiles once, leaks nothing, makes no NaN and moves nothing to or from the host."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import ssam_jax
from ssam_jax import NM, Structured, Unstructured

TWO_OF_FOUR, HALF = NM(2, 4), Unstructured(0.5)
TENSOR = Structured(0.5)
EVERY = 2  # steps to a refresh
RULES = {
    "dense": lambda: None,
    "fixed": lambda: ssam_jax.fixed_mask(lambda path: path != "first/bias"),
    "fisher": lambda: ssam_jax.fisher_mask(HALF, refresh_every=EVERY),
    "fisher n:m": lambda: ssam_jax.fisher_mask(TWO_OF_FOUR, refresh_every=EVERY),
    "set by hand": lambda: ssam_jax.fisher_mask(TENSOR, refresh_every=None),
    "random": lambda: ssam_jax.random_mask(TWO_OF_FOUR, refresh_every=EVERY),
    "dynamic": lambda: ssam_jax.dynamic_mask(HALF, refresh_every=EVERY, total_steps=9, grow="gradient"),
}


def plain(params, state, batch, active):
    del state, active
    grad_fn = tiny.grad_fn_of(batch)
    return grad_fn(params, 0), grad_fn


def fast(params, state, batch, active):
    del state
    _, grads, grad_fn = ssam_jax.two_pass_value_and_grad(tiny.loss)(params, batch, active=active)
    return grads, grad_fn


def implicit(params, state, batch, active):
    two_pass = ssam_jax.two_pass_value_and_grad(tiny.loss, form="implicit")
    mask = ssam_jax.get_mask(state)
    _, grads, grad_fn = two_pass(params, batch, active=active, mask=mask)
    return grads, grad_fn


def chained(**options):
    return lambda rule: optax.chain(ssam_jax.ssam(0.1, rule, **options), optax.sgd(0.1))


def alternating(rule):
    return ssam_jax.alternating(optax.sgd(0.1), 0.1, rule)


ROADS = {
    "plain": (chained(), plain),
    "a schedule": (chained(skip_zero_rho=True, adaptive=True), plain),
    "alternating": (alternating, plain),
    "two passes": (chained(normalize="masked"), fast),
    "implicit": (chained(), implicit),
}
CASES = [
    *(("plain", rule) for rule in RULES),
    ("a schedule", "random"),
    ("alternating", "fisher n:m"),
    ("two passes", "fixed"),
    ("two passes", "set by hand"),
    ("implicit", "fisher n:m"),
]


class Training:
    """A step, which compiles once for each ``active``, and how often the loss has been traced."""

    def __init__(self, road, rule):
        make, gradients = ROADS[road]
        self.tx, self.traces = make(RULES[rule]()), 0

        def step(params, state, batch, active):
            self.traces += 1
            grads, grad_fn = gradients(params, state, batch, active)
            extra = {} if road == "alternating" else {"grad_fn": grad_fn}
            updates, state = self.tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        self.plain = step
        self.init = jax.jit(self.tx.init)
        self.step = jax.jit(step, static_argnames="active", donate_argnums=(0, 1))

    def check_leaks(self, params, state, batch, active):
        """Trace a step where JAX looks for tracers that outlive it; elsewhere it would compile all anew."""
        with jax.checking_leaks():
            jax.eval_shape(functools.partial(self.plain, active=active), params, state, batch)
        self.traces = 0


def x64(enabled):
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    from jax.experimental import enable_x64

    return enable_x64(enabled)


# Compilations.


@pytest.fixture(scope="module")
def compilations():
    """Return the list to which each compilation, of a step or of a single operation, adds an entry."""
    seen = []

    def listen(event, duration, **extra):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.clear_event_listeners()


def test_a_transfer_is_noticed():
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        jax.jit(jnp.sum)(np.ones(3))


def test_a_compilation_is_noticed(compilations):
    before = len(compilations)
    jax.jit(lambda x: x * 3 + len(compilations))(jnp.ones(3)).block_until_ready()
    assert len(compilations) > before


def test_a_step_is_compiled_once_for_each_choice_of_active_leaves():
    training = Training("two passes", "fixed")
    params, state = tiny.params(), training.init(tiny.params())
    for active in [(False, False, True), (True, False, False), (False, False, True)]:
        params, state = training.step(params, state, tiny.BATCHES[0], active=active)
    assert training.traces == 2


# Guards.


@contextlib.contextmanager
def guarded(dtype):
    """Turn everything on that finds NaN, and ranks and dtypes that are made equal."""
    with (
        x64(dtype == np.float64),
        jax.debug_nans(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


WIDE = [("plain", "dynamic"), ("alternating", "fisher n:m"), ("implicit", "fisher n:m")]
GUARDED = [(*case, np.float32) for case in CASES] + [(*case, np.float64) for case in WIDE]


@pytest.mark.parametrize(("road", "rule", "dtype"), GUARDED)
def test_epochs_pass_every_guard_of_jax_and_compile_nothing_after_the_first(road, rule, dtype, compilations):
    with guarded(dtype):
        training, counted = Training(road, rule), []
        params = jax.tree.map(lambda p: jnp.array(p, dtype), tiny.PARAMS)
        batches = [jnp.array(batch, dtype) for batch in tiny.BATCHES[: 3 * EVERY]]
        state = training.init(params)
        active = ssam_jax.active_leaves(state)
        before, first = tiny.spec((params, state)), jax.tree.map(np.array, params)
        training.check_leaks(params, state, batches[0], active)
        for epoch in range(3):
            with jax.transfer_guard("disallow"):
                for batch in batches[EVERY * epoch : EVERY * (epoch + 1)]:
                    params, state = training.step(params, state, batch, active=active)
            if rule == "set by hand":  # the same mask anew, so that the active leaves stay
                state = ssam_jax.set_mask(state, ssam_jax.get_mask(state))
            assert ssam_jax.active_leaves(state) == active
            assert 0 < float(ssam_jax.mask_stats(state).density) <= 1
            counted.append(len(compilations))
        assert tiny.spec((params, state)) == before
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
        assert tiny.differ(params, first)
        assert training.traces == training.step._cache_size() == 1
        assert counted[0] == counted[1] == counted[2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "x64"])
def test_exact_scores_and_a_mask_from_them_pass_every_guard_of_jax(dtype):
    def loss(params, example):
        return tiny.loss(params, example[None])

    with guarded(dtype):
        params = jax.tree.map(lambda p: jnp.array(p, dtype), tiny.PARAMS)
        tx = chained()(RULES["set by hand"]())
        state, batch = jax.jit(tx.init)(params), jnp.array(tiny.BATCHES[0], dtype)

        @jax.jit
        def refresh(params, state, batch):
            scores = ssam_jax.empirical_fisher(loss, params, batch, chunk_size=2)
            state = ssam_jax.set_mask(state, TENSOR(scores))
            return state, ssam_jax.mask_stats(state)

        with jax.transfer_guard("disallow"):
            refreshed, stats = refresh(params, state, batch)
        assert tiny.spec(refreshed) == tiny.spec(state)
        assert stats.density >= 0.5


@pytest.mark.parametrize("road", ["plain", "alternating"])
def test_a_gradient_of_zero_makes_no_nan_on_the_way(road):
    """Norms, their derivatives and divisions are guarded, not mended afterwards."""
    training = Training(road, "fisher n:m")
    with jax.debug_nans(True):
        params = jax.tree.map(jnp.zeros_like, tiny.params())
        state = training.init(params)
        for _ in range(EVERY):
            params, state = training.step(params, state, jnp.zeros((3, 4)), active=None)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
