"""Flax Linen's train state: what each pass uses and leaves behind, and that its steps equal those by hand.

Steps with masks are compared in test_nnx.py, where the same network runs in both of Flax's styles.
"""

import functools

import flax
import flax.linen as nn
import flax_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

import ssam_jax
from ssam_jax.linen import TrainState

KEY = jax.random.key(7)
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "whole"])
BATCH = nets.BATCHES[0]
X = jnp.ones((2, 16))


def create(model, params, tx=None, **fields):
    tx = nets.chain() if tx is None else tx
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx, **fields)


def net_state(tx=None, rate=0.5):
    return create(nets.LinenNet(rate), nets.params(), tx, batch_stats=nets.stats(), dropout_key=KEY)


def loss_fn(apply, images, labels):
    logits = apply(images, train=True)
    return nets.cross_entropy(logits, labels), logits


def step(state, batch, **options):
    passes = state.value_and_grad(loss_fn, *batch, **options)
    fields = {"grads": passes.grads, "grad_fn": passes.grad_fn, "batch_stats": passes.batch_stats}
    return state.apply_gradients(**fields), passes


def loss_by_hand(params, stats, i, images, labels):
    variables, rngs = {"params": params, "batch_stats": stats}, {"dropout": jax.random.fold_in(KEY, i)}
    logits, new = nets.LinenNet().apply(variables, images, rngs=rngs, mutable=["batch_stats"])
    return nets.cross_entropy(logits, labels), new["batch_stats"]


# What a pass uses, and what it leaves


@SHARED
def test_loss_aux_and_batch_statistics_are_those_of_one_clean_pass(shared):
    @nets.quick_jit
    def passes(state, batch):
        after, passes = step(state, batch, shared=shared)
        return passes.value, passes.batch_stats, passes.aux, after.batch_stats

    clean = nets.quick_jit(loss_by_hand)
    value, stats, logits, kept = passes(net_state(), BATCH)
    once = clean(nets.params(), nets.stats(), 0, *BATCH)
    tiny.assert_same((value, stats), once)
    tiny.assert_same(kept, stats)
    tiny.assert_close(nets.cross_entropy(logits, BATCH[1]), value, rtol=1e-6)
    assert tiny.differ(clean(nets.params(), stats, 0, *BATCH)[1], stats), "twice is something else"


class Drop(nn.Module):
    """Drops inputs: the gradient of the kernel shows which, and depends on nothing else."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, use_bias=False)(nn.Dropout(0.5, deterministic=False)(x))


def drop_state(**fields):
    return create(Drop(), {"Dense_0": {"kernel": jnp.ones((16, 1))}}, optax.sgd(0.1), **fields)


def drop_loss(apply, x):
    return jnp.sum(apply(x)), None


@SHARED
def test_both_passes_drop_the_same_units_and_the_next_step_others(shared):
    state = drop_state(dropout_key=KEY)
    first = state.value_and_grad(drop_loss, X, shared=shared)
    tiny.assert_same(first.grad_fn(jax.tree.map(jnp.negative, state.params), 0), first.grads)
    second = state.apply_gradients(grads=first.grads).value_and_grad(drop_loss, X, shared=shared)
    assert tiny.differ(second.grads, first.grads)


def test_two_calls_of_apply_drop_different_units_in_both_passes_alike():
    def difference(apply, x):
        return jnp.sum(apply(x) - apply(x)), None

    state = drop_state(dropout_key=KEY)
    passes = state.value_and_grad(difference, X)
    assert tiny.differ(passes.grads, jax.tree.map(jnp.zeros_like, passes.grads))
    tiny.assert_same(passes.grad_fn(jax.tree.map(jnp.negative, state.params), 0), passes.grads)


def test_two_calls_of_apply_pass_the_statistics_on_and_one_in_evaluation_mode_leaves_them():
    images, labels = BATCH

    @nets.quick_jit
    def stats(state, *views):
        def loss(apply, images):
            loss = apply(images, train=False).sum()
            return loss + sum(apply(view).sum() for view in views), None

        return state.value_and_grad(loss, images).batch_stats

    state = net_state(rate=0.0)
    tiny.assert_same(stats(state), state.batch_stats)
    expected = state.batch_stats
    for view in (images, images + 1):
        expected = nets.loss_by_hand(state.params, expected, view, labels)[1]
    tiny.assert_close(stats(state, images, images + 1), expected, rtol=1e-6)


@pytest.mark.parametrize("none", [None, {}])
def test_a_model_without_statistics_and_dropout_needs_neither(none):
    state = create(nn.Dense(1), {"kernel": jnp.ones((16, 1)), "bias": jnp.zeros(1)}, batch_stats=none)
    passes = state.value_and_grad(lambda apply, x: (jnp.sum(apply(x)), {"a string": "stays"}), X)
    assert passes.batch_stats == none
    assert passes.aux == {"a string": "stays"}
    assert state.apply_gradients(grads=passes.grads, grad_fn=passes.grad_fn).step == 1


def test_apply_takes_what_the_models_apply_takes():
    class Noisy(nn.Module):
        def setup(self):
            self.drop = Drop()

        def noise(self, x):
            return self.drop(x + jax.random.normal(self.make_rng("noise"), x.shape))

    state = create(Noisy(), {"drop": drop_state().params}, dropout_key=KEY)

    def loss(apply, x, noise):
        return jnp.sum(apply(x, method="noise", rngs={"noise": noise})), None

    a, b, c = (state.value_and_grad(loss, X, jax.random.key(seed), shared=False).value for seed in (0, 0, 1))
    assert a == b != c


@SHARED
def test_keyword_arguments_reach_the_loss(shared):
    def loss(apply, x, *, scale, kind):
        return jnp.mean(apply(x) ** 2) * scale["factor"], kind

    state, scale = linear_state(nets.chain()), {"factor": jnp.float32(3)}
    passes = state.value_and_grad(loss, x=X, shared=shared, scale=scale, kind="kept")
    plain = linear_passes(state)
    assert passes.aux == "kept"
    point = jax.tree.map(jnp.negative, state.params)
    for found, expected in ((passes.grads, plain.grads), (passes.grad_fn(point, 0), plain.grad_fn(point, 0))):
        tiny.assert_close(found, jax.tree.map(lambda g: 3 * g, expected), rtol=1e-6)


# Collections


class Sows(nn.Module):
    """BatchNorm, a codebook of its own, a sown loss, and a sub-module to capture."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, use_scale=False, use_bias=False, name="norm")(x)
        codes = self.variable("codebook", "codes", jnp.zeros, 3)
        if train:
            codes.value = codes.value + jnp.mean(x) + jnp.mean(nn.Dense(3, name="head")(x))
        self.sow("losses", "square", jnp.sum(x**2))
        return nn.Dense(1, name="out")(x) + codes.value[:1][None]


def sowing_state(**fields):
    model, x = Sows(), nets.wave(4, 3)
    variables = jax.jit(model.init)(KEY, x)
    collections = {"batch_stats": variables["batch_stats"], "variables": {"codebook": variables["codebook"]}}
    return create(model, variables["params"], **{**collections, **fields}), x


@SHARED
def test_collections_are_those_of_the_clean_pass_and_the_next_step_starts_from_them(shared):
    state, x = sowing_state()

    @nets.quick_jit
    def sam(state, x):
        passes = state.value_and_grad(lambda apply, x: (jnp.mean(apply(x)), None), x, shared=shared)
        fields = {"batch_stats": passes.batch_stats, "variables": passes.variables}
        return state.apply_gradients(grads=passes.grads, grad_fn=passes.grad_fn, **fields)

    @nets.quick_jit
    def clean(state, x):
        variables = {"params": state.params, "batch_stats": state.batch_stats, **state.variables}
        return state.apply_fn(variables, x, mutable=["batch_stats", "codebook"])[1]

    for _ in range(2):
        expected = clean(state, x)
        state = sam(state, x)
        tiny.assert_close({"batch_stats": state.batch_stats, **state.variables}, dict(expected), rtol=1e-6)


# What is asked of apply, and the collections that it returns then; None: the output alone.
ASKED = [
    ({"mutable": ["losses"]}, {"losses"}),
    ({"mutable": "losses"}, {"losses"}),
    ({"mutable": ["batch_stats", "losses"]}, {"batch_stats", "losses"}),
    ({"mutable": ["codebook"], "capture_intermediates": True}, {"codebook", "intermediates"}),
    ({"capture_intermediates": True}, {"intermediates"}),
    ({"mutable": flax.core.DenyList(["losses", "params"])}, {"batch_stats", "codebook"}),
    ({"mutable": True}, {"batch_stats", "codebook", "losses", "params"}),
    ({"mutable": []}, set()),
    ({"mutable": False}, None),
    ({}, None),
]


def test_apply_returns_what_flax_returns_and_keeps_what_the_state_holds():
    state, x = sowing_state()
    held = {"batch_stats": state.batch_stats, **state.variables}
    every = {"mutable": [*held, "losses", "params"], "capture_intermediates": True}
    output, collections = state.apply_fn({"params": state.params, **held}, x, **every)
    for asked, found in ASKED:

        def loss(apply, x, asked=asked, found=found):
            given = apply(x, **asked)
            output, new = (given, None) if found is None else given
            return jnp.mean(output), (output, new)

        _, (after, (value, new)) = state.pure_loss(loss)(state.params, x)
        tiny.assert_same(value, output)
        tiny.assert_same(new, None if found is None else {name: collections[name] for name in found})
        tiny.assert_same(after, {name: collections[name] for name in held})


def test_a_sown_loss_has_a_gradient_in_both_passes():
    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, name="norm")(x)
            x = nn.Dense(1, use_bias=False, name="out")(x)
            self.sow("losses", "square", jnp.sum(x**2))
            return x

    model, x = Sowing(), nets.wave(4, 3)
    variables = jax.jit(model.init)(KEY, x)
    state = create(model, variables["params"], batch_stats=variables["batch_stats"])

    def loss(apply, x):
        _, new = apply(x, mutable=["losses"])
        return sum(jax.tree.leaves(new["losses"])), new["losses"]

    def by_hand(params):
        rest = {"batch_stats": state.batch_stats}
        _, new = state.apply_fn({"params": params, **rest}, x, mutable=["losses", "batch_stats"])
        return sum(jax.tree.leaves(new["losses"]))

    passes = state.value_and_grad(loss, x)
    tiny.assert_close(passes.grads, jax.grad(by_hand)(state.params))
    point = jax.tree.map(lambda p: 2 * p, state.params)
    tiny.assert_close(passes.grad_fn(point, 0), jax.grad(by_hand)(point))


@pytest.mark.parametrize("variables", [[], {"params": {}}, {"batch_stats": {}, "codes": {}}], ids=str)
def test_variables_that_are_no_other_collections_are_refused(variables):
    state = linear_state(nets.chain(), variables=variables)
    with pytest.raises(
        ValueError, match=r"variables must be None or a dict .* fields params and batch_stats"
    ):
        state.value_and_grad(loss_fn, X)


def test_a_subclass_may_have_fields_without_a_default_and_collections_of_its_own():
    class WithMetrics(TrainState):
        metrics: dict

        def apply_gradients(self, *, grads, **kwargs):
            counted = {"steps": self.metrics["steps"] + 1}
            return super().apply_gradients(grads=grads, metrics=counted, **kwargs)

    class Nested(WithMetrics):
        batch_stats: dict  # required, as in Flax's guide
        name: str = flax.struct.field(pytree_node=False)

    params = {"kernel": jnp.ones((16, 1)), "bias": jnp.ones(1)}
    given = {"apply_fn": nn.Dense(1).apply, "params": params, "tx": nets.chain()}
    with pytest.raises(TypeError, match="metrics"):
        WithMetrics.create(**given)
    state = Nested.create(**given, metrics={"steps": 0}, batch_stats={}, name="a name")
    after, _ = jax.jit(square_step)(state, X)
    assert isinstance(after, Nested) and (int(after.metrics["steps"]), after.name) == (1, "a name")
    plain, _ = jax.jit(square_step)(linear_state(nets.chain()), X)
    tiny.assert_same(after.params, plain.params)


@pytest.mark.parametrize("rngs", [None, jax.random.key(1), {"params": jax.random.key(1)}], ids=type)
def test_apply_takes_rngs_as_flax_does(rngs):
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            noise = jax.random.normal(self.make_rng("params"), x.shape) if rngs is not None else 0.0
            return Drop(name="drop")(x + noise)

    state = create(Noisy(), {"drop": drop_state().params}, dropout_key=KEY)
    value = state.pure_loss(lambda apply, x: (jnp.sum(apply(x, rngs=rngs)), None))(state.params, X)[0]
    streams = {"dropout": jax.random.fold_in(KEY, 0)} | (
        {"params": jax.random.key(1)} if rngs is not None else {}
    )
    assert value == jnp.sum(state.apply_fn({"params": state.params}, X, rngs=streams))


# Steps


def test_steps_equal_those_of_a_loop_written_by_hand():
    expected = nets.train_by_hand(nets.chain(), loss_by_hand, nets.BATCHES, nets.params(), nets.stats())
    for shared in (True, False):
        state = net_state()
        jitted = nets.quick_jit(lambda state, batch: step(state, batch, shared=shared)[0])  # noqa: B023
        for batch in nets.BATCHES:
            state = jitted(state, batch)
        tiny.assert_close((state.params, state.batch_stats), expected, rtol=1e-6, atol=1e-7)
        assert int(state.step) == 3


def square_step(state, x):
    passes = state.value_and_grad(lambda apply, x: (jnp.sum(apply(x) ** 2), None), x)
    return state.apply_gradients(grads=passes.grads, grad_fn=passes.grad_fn), passes.value


def test_steps_are_traced_once_in_donated_memory_and_equal_those_of_a_scan():
    def start():
        return create(Drop(), {"Dense_0": {"kernel": jnp.ones((16, 1))}}, dropout_key=jnp.copy(KEY))

    traced = []

    @functools.partial(nets.quick_jit, donate_argnums=0)
    def donating_step(state, x):
        traced.append(x)
        return square_step(state, x)

    state, batches = start(), jnp.stack([X, -X, 2 * X])
    for x in batches:
        state, value = donating_step(state, x)
    scanned, values = nets.quick_jit(lambda state: jax.lax.scan(square_step, state, batches))(start())
    assert len(traced) == 1
    tiny.assert_close((state.params, value), (scanned.params, values[-1]), rtol=1e-6)
    assert int(scanned.step) == 3


def linear_state(tx, **fields):
    return create(nn.Dense(1), {"kernel": jnp.ones((16, 1)), "bias": jnp.ones(1)}, tx, **fields)


def linear_passes(state):
    return state.value_and_grad(lambda apply, x: (jnp.mean(apply(x) ** 2), None), X)


def test_without_the_ascent_and_without_ssam_the_step_is_the_base_optimizers():
    base = linear_state(optax.scale(-0.1))  # takes no extra arguments
    passes = linear_passes(base)
    plain = train_state.TrainState.apply_gradients(base, grads=passes.grads)
    for given in ({}, {"grad_fn": None}, {"grad_fn": passes.grad_fn}):
        tiny.assert_same(base.apply_gradients(grads=passes.grads, **given).params, plain.params)
    ssam = linear_state(optax.chain(ssam_jax.ssam(0.1), optax.sgd(0.1)))
    tiny.assert_same(ssam.apply_gradients(grads=passes.grads, grad_fn=None).params, plain.params)
    with_ascent = ssam.apply_gradients(grads=passes.grads, grad_fn=passes.grad_fn)
    assert tiny.differ(with_ascent.params, plain.params)


def test_a_missing_grad_fn_gives_the_sentence_of_ssam():
    state = linear_state(nets.chain())
    with pytest.raises(TypeError, match="ssam needs a gradient function"):
        state.apply_gradients(grads=state.params)


def test_a_step_replaces_fields_and_keeps_the_transformation():
    state = linear_state(nets.chain(), batch_stats=1)
    after = state.apply_gradients(grads=state.params, grad_fn=None, batch_stats=2)
    assert (after.batch_stats, after.tx) == (2, state.tx)
    other = optax.sgd(0.1)
    assert state.apply_gradients(grads=state.params, grad_fn=None, tx=other).tx is other


def test_parameters_that_flax_overwrites_with_their_gradient_are_overwritten():
    params = {"params": {"kernel": jnp.ones(2)}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(2)}}
    state = create(nn.Dense(1), params, optax.sgd(0.5))
    grads = jax.tree.map(lambda p: 3 * p, params)
    expected = {"params": {"kernel": -0.5 * jnp.ones(2)}, OVERWRITE_WITH_GRADIENT: {"scale": 3 * jnp.ones(2)}}
    tiny.assert_same(state.apply_gradients(grads=grads).params, expected)

    def scaled(variables, x):
        scale = variables[OVERWRITE_WITH_GRADIENT]["scale"]
        return jnp.sum(variables["params"]["kernel"] ** 2 * scale * x)

    tx = optax.chain(ssam_jax.ssam(0.1), optax.sgd(0.5))
    state = TrainState.create(apply_fn=scaled, params=params, tx=tx)
    passes = state.value_and_grad(lambda apply, x: (apply(x), None), jnp.float32(1))
    after = state.apply_gradients(grads=passes.grads, grad_fn=passes.grad_fn)
    tiny.assert_close(after.params["params"]["kernel"], 1 - (1 + 0.1 / np.sqrt(2)) * jnp.ones(2))
    tiny.assert_same(after.params[OVERWRITE_WITH_GRADIENT]["scale"], jnp.ones(2))


def test_the_ascent_gradient_is_that_of_the_active_leaves():
    state = linear_state(nets.chain())
    partial = state.value_and_grad(lambda apply, x: (jnp.sum(apply(x) ** 2), None), X, active=(True, False))
    zeros = jax.tree.map(jnp.zeros_like, partial.grads)
    tiny.assert_same(partial.grads["kernel"], zeros["kernel"])
    assert tiny.differ(partial.grads["bias"], zeros["bias"])
    assert tiny.differ(partial.grad_fn(state.params, 0)["kernel"], zeros["kernel"])


def test_the_ascent_gradient_may_come_from_a_part_of_the_batch():
    def loss(apply, x):
        return jnp.sum(apply(x) ** 3), None

    def gradient(params, x):
        return jax.grad(lambda params: jnp.sum((x @ params["kernel"] + params["bias"][None]) ** 3))(params)

    state, x = linear_state(nets.chain()), nets.wave(8, 16)
    part, whole = state.value_and_grad(loss, x[:4]), state.value_and_grad(loss, x)
    after = state.apply_gradients(grads=part.grads, grad_fn=whole.grad_fn)
    start, grads, grad_fn = (
        (state.opt_state, state.params),
        gradient(state.params, x[:4]),
        lambda p, i: gradient(p, x),
    )
    updates, _ = state.tx.update(grads, *start, grad_fn=grad_fn)
    tiny.assert_close(after.params, optax.apply_updates(state.params, updates), rtol=1e-6)


def test_the_implicit_form_masks_the_first_pass_alone():
    x, kernel = nets.wave(3, 4), nets.wave(4, 4, step=0.5)
    mask = np.arange(16).reshape(4, 4) % 3 > 0
    tx = optax.chain(ssam_jax.ssam(0.1, ssam_jax.fixed_mask({"kernel": mask})), optax.sgd(0.1))
    state = create(nn.Dense(4, use_bias=False), {"kernel": jnp.array(kernel)}, tx)

    def loss(apply, x):
        return jnp.sum(apply(jnp.tanh(apply(x)))), None

    def gradient(kernel, mask):
        hidden = np.tanh(x @ kernel)
        inner = np.ones((3, 4)) @ (kernel * mask).T * (1 - hidden**2)
        return {"kernel": hidden.T @ np.ones((3, 4), np.float32) + x.T @ inner.astype(np.float32)}

    passes = state.value_and_grad(loss, x, mask=ssam_jax.get_mask(state), form="implicit")
    tiny.assert_close(passes.grads, gradient(kernel, mask))
    tiny.assert_close(passes.grad_fn(state.params, 0), gradient(kernel, True))
    after = state.apply_gradients(grads=passes.grads, grad_fn=passes.grad_fn)
    ascent = gradient(kernel, mask)["kernel"]
    point = kernel + 0.1 * ascent / np.linalg.norm(ascent)
    tiny.assert_close(after.params["kernel"], kernel - 0.1 * gradient(point, True)["kernel"])


# Mistakes


@SHARED
@pytest.mark.parametrize("returned", [lambda loss: loss, lambda loss: (loss, 1, 2)], ids=["loss", "three"])
def test_a_loss_that_returns_no_pair_is_refused(returned, shared):
    state = linear_state(nets.chain())
    with pytest.raises(TypeError, match=r"loss_fn must return a pair \(loss, aux\)"):
        state.value_and_grad(lambda apply, x: returned(jnp.sum(apply(x))), X, shared=shared)


@pytest.mark.parametrize("options", [{"active": (True, True)}, {"mask": (True, True)}, {"form": "implicit"}])
def test_whole_gradients_take_no_options_of_shared_passes(options):
    with pytest.raises(ValueError, match=r"need shared=True: .* Got active="):
        linear_state(nets.chain()).value_and_grad(loss_fn, X, shared=False, **options)


def test_dropout_without_a_key_gives_the_error_of_flax():
    with pytest.raises(flax.errors.InvalidRngError, match='"dropout"'):
        drop_state().value_and_grad(drop_loss, X)
