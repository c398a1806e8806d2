"""Flax NNX: what each pass uses and leaves behind, and that Flax's styles take plain optax's steps."""

import functools
import inspect

import flax_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx

import ssam_jax
import ssam_jax.nnx
from ssam_jax import NM
from ssam_jax.linen import TrainState

BATCH = nets.BATCHES[0]
X = jnp.ones((2, 16))


def loss_fn(model, images, labels):
    return nets.cross_entropy(model(images), labels)


def pure(model, kind=nnx.Param):
    """Return variables of a model as a dict of arrays."""
    return nnx.to_pure_dict(nnx.state(model, kind))


class Linear(nnx.Module):
    """A linear layer behind dropout, that counts its calls."""

    def __init__(self, features=1, rate=0.5):
        self.dropout = nnx.Dropout(rate, rngs=nnx.Rngs(dropout=7))
        self.kernel = nnx.Param(jnp.array(nets.wave(16, features)))
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls.copy_from(nnx.BatchStat(self.calls[...] + 1))
        return self.dropout(x) @ self.kernel[...]


class Perceptron(nnx.Module):
    def __init__(self):
        self.body = Linear(16, rate=0.0)
        self.head = Linear(rate=0.0)

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(x)))


def total(model, x):
    return jnp.sum(model(x))


def square(model, x):
    return jnp.sum(model(x) ** 2)


def perceptron_by_hand(params, x):
    return jnp.sum((jnp.tanh(x @ params["body"]["kernel"]) @ params["head"]["kernel"]) ** 2)


def optimizer_of(model, *links, wrt=nnx.Param):
    return ssam_jax.nnx.Optimizer(model, optax.chain(*links, optax.sgd(0.1)), wrt=wrt)


def step_by_hand(params, grads, grad_fn, *links):
    tx = optax.chain(*links, optax.sgd(0.1))
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates)


# What a pass uses, and what it leaves


def test_the_loss_and_the_state_afterwards_are_those_of_one_clean_pass():
    model, other = nets.nnx_net(rate=0.0), nets.nnx_net(rate=0.0)

    @nnx.jit
    def step(model, images, labels):
        loss, grads, grad_fn = ssam_jax.nnx.two_pass_value_and_grad(loss_fn)(model, images, labels)
        optimizer_of(model, ssam_jax.ssam(0.1)).update(model, grads, grad_fn=grad_fn)
        return loss

    clean = nnx.jit(loss_fn)
    tiny.assert_close(step(model, *BATCH), clean(other, *BATCH), rtol=1e-6)
    tiny.assert_same(pure(model, nnx.BatchStat), pure(other, nnx.BatchStat))
    assert tiny.differ(pure(model), pure(other))
    clean(other, *BATCH)
    assert tiny.differ(pure(model, nnx.BatchStat), pure(other, nnx.BatchStat)), "twice is something else"


def test_both_passes_drop_the_same_units_and_the_next_step_others():
    model, two_pass = Linear(), ssam_jax.nnx.two_pass_value_and_grad(total)
    _, first, grad_fn = two_pass(model, X)
    tiny.assert_same(grad_fn(jax.tree.map(jnp.negative, first), 0), first)
    _, second, _ = two_pass(model, X)
    assert tiny.differ(first, second)
    assert [*map(int, jax.tree.leaves(nnx.state(model, (nnx.BatchStat, nnx.RngCount))))] == [2, 2]


def test_modules_among_the_arguments_are_updated_by_the_clean_pass_too():
    def loss(model, x, rngs, others, train):
        assert train is True
        others["metric"].update(values=jnp.float32(1))
        assert others["part"] is model.dropout
        return jnp.sum(nnx.Dropout(0.5)(model(x) - others["teacher"](x), rngs=rngs)), others["name"]

    model, teacher, rngs, metric = Linear(), Linear(), nnx.Rngs(dropout=1), nnx.metrics.Average()
    others = {"metric": metric, "part": model.dropout, "teacher": teacher, "name": "a string"}
    args = (jnp.ones((16, 16)), rngs, others, True)
    (_, aux), first, grad_fn = ssam_jax.nnx.two_pass_value_and_grad(loss, has_aux=True)(model, *args)
    tiny.assert_same(grad_fn(jax.tree.map(jnp.negative, first), 0), first)
    assert (aux, list(nnx.to_pure_dict(first))) == ("a string", ["kernel"])
    counts = jax.tree.leaves((nnx.state(rngs, nnx.RngCount), nnx.state(model, nnx.RngCount)))
    assert counts == [1, 1]
    assert metric.count[...] == model.calls[...] == teacher.calls[...] == 1
    _, second, _ = ssam_jax.nnx.two_pass_value_and_grad(loss, has_aux=True)(model, *args)
    assert tiny.differ(first, second)


def test_a_loss_with_a_side_effect_leaves_the_same_and_uses_the_same():
    def loss(model, x):
        jax.debug.callback(lambda: None)
        return total(model, x)

    model, other = Linear(), Linear()
    with pytest.warns(UserWarning, match="the loss has a side effect"):
        _, grads, grad_fn = ssam_jax.nnx.two_pass_value_and_grad(loss)(model, X)
    tiny.assert_same(grads, ssam_jax.nnx.two_pass_value_and_grad(total)(other, X)[1])
    tiny.assert_same(grad_fn(nnx.state(model, nnx.Param), 0), grads)
    assert model.calls[...] == 1


def test_aux_and_loss_elsewhere_can_be_had():
    def loss(model, x):
        y = model(x)
        return jnp.sum(y), y

    model = Linear(rate=0.0)
    (value, aux), grads, grad_fn = ssam_jax.nnx.two_pass_value_and_grad(loss, has_aux=True)(model, X)
    tiny.assert_same((aux, value), (X @ model.kernel[...], jnp.sum(aux)))
    (there, aux), again = grad_fn.value_and_grad(jax.tree.map(jnp.negative, nnx.state(model, nnx.Param)), 0)
    tiny.assert_same((there, aux, again), (-value, -X @ model.kernel[...], grads))


# Steps


@pytest.mark.parametrize("name", ["Fisher mask", "the head alone, twice"])
def test_linen_nnx_and_plain_optax_take_equal_steps(name):
    tx, model = nets.chain(name), nets.nnx_net(rate=0.0)
    expected = nets.train_by_hand(
        tx,
        lambda params, stats, i, *batch: nets.loss_by_hand(params, stats, *batch),
        nets.BATCHES,
        nets.params(),
        nets.stats(),
    )

    @nets.quick_jit
    def linen_step(state, batch):
        def loss_fn(apply, images, labels):
            return nets.cross_entropy(apply(images), labels), None

        passes = state.value_and_grad(loss_fn, *batch, active=active)
        fields = {"grads": passes.grads, "grad_fn": passes.grad_fn, "batch_stats": passes.batch_stats}
        return state.apply_gradients(**fields)

    @functools.partial(nnx.jit, static_argnames="active")
    def nnx_step(model, optimizer, batch, active):
        _, grads, grad_fn = ssam_jax.nnx.two_pass_value_and_grad(loss_fn)(model, *batch, active=active)
        optimizer.update(model, grads, grad_fn=grad_fn)

    create = nets.quick_jit(functools.partial(TrainState.create, apply_fn=nets.LinenNet(0.0).apply, tx=tx))
    state = create(params=nets.params(), batch_stats=nets.stats())
    optimizer = nnx.jit(lambda model: ssam_jax.nnx.Optimizer(model, tx, wrt=nnx.Param))(model)
    active = ssam_jax.active_leaves(state)
    assert active == ((False, True, True, False, False) if "head" in name else (True,) * 5)
    assert ssam_jax.active_leaves(optimizer.opt_state) == active
    for batch in nets.BATCHES:
        state = linen_step(state, batch)
        nnx_step(model, optimizer, batch, active=active)
    tiny.assert_close((state.params, state.batch_stats), expected, rtol=1e-5, atol=1e-6)
    tiny.assert_close((pure(model), pure(model, nnx.BatchStat)), expected, rtol=1e-5, atol=1e-6)
    masks = arrays_of(ssam_jax.get_mask(optimizer.opt_state)), jax.tree.leaves(ssam_jax.get_mask(state))
    tiny.assert_same(*masks)


def arrays_of(tree):
    """Return the arrays of a tree that may hold variables."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [leaf[...] for leaf in leaves]


def test_steps_are_traced_once_in_donated_memory():
    traced = []

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer, x):
        traced.append(x)
        loss, grads, grad_fn = ssam_jax.nnx.two_pass_value_and_grad(square)(model, x)
        optimizer.update(model, grads, grad_fn=grad_fn)
        return loss

    model = Linear()
    optimizer = optimizer_of(model, ssam_jax.ssam(0.1))
    losses = [float(step(model, optimizer, X / 16)) for _ in range(3)]
    assert len(set(losses)) == 3
    assert len(traced) == 1
    assert optimizer.step[...] == 3


def test_the_optimizer_of_flax_takes_the_same_step():
    keeps_model = "model" not in inspect.signature(nnx.Optimizer.update).parameters  # before flax 0.11
    ours, stock = Linear(), Linear()
    for model, kind in ((ours, ssam_jax.nnx.Optimizer), (stock, nnx.Optimizer)):
        optimizer = kind(model, optax.chain(ssam_jax.ssam(0.1), optax.sgd(0.1)), wrt=nnx.Param)
        _, grads, grad_fn = ssam_jax.nnx.two_pass_value_and_grad(square)(model, X)
        args = (grads,) if kind is nnx.Optimizer and keeps_model else (model, grads)
        optimizer.update(*args, grad_fn=grad_fn)
    tiny.assert_same(pure(ours), pure(stock))
    assert tiny.differ(pure(ours), pure(Linear()))


def test_without_the_ascent_and_without_ssam_the_step_is_the_base_optimizers():
    models = [Linear(rate=0.0) for _ in range(4)]
    before = pure(models[0])
    expected = step_by_hand(before, jax.grad(lambda p: jnp.sum((X @ p["kernel"]) ** 2))(before), None)
    sgd, ssam = (), (ssam_jax.ssam(0.1),)
    for model, links, given in zip(models, (sgd, sgd, ssam, ssam), ("grad_fn", None, None, "grad_fn")):
        _, grads, grad_fn = ssam_jax.nnx.two_pass_value_and_grad(square)(model, X)
        optimizer_of(model, *links).update(model, grads, grad_fn=given and grad_fn)
    for model in models[:3]:
        tiny.assert_close(pure(model), expected, rtol=1e-6)
    assert tiny.differ(pure(models[3]), expected)


def test_a_missing_grad_fn_gives_the_sentence_of_ssam():
    model = Linear()
    grads = nnx.grad(total)(model, X)
    with pytest.raises(TypeError, match="ssam needs a gradient function"):
        optimizer_of(model, ssam_jax.ssam(0.1)).update(model, grads)


def test_the_ascent_gradient_is_that_of_the_active_leaves():
    model, two_pass = Perceptron(), ssam_jax.nnx.two_pass_value_and_grad(square)
    _, grads, grad_fn = two_pass(model, X, active=(False, True))
    body, head = jax.tree.leaves(grads)
    assert jnp.any(head) and not jnp.any(body)
    assert jnp.any(jax.tree.leaves(grad_fn(nnx.state(model, nnx.Param), 0))[0])


def test_only_what_wrt_selects_is_differentiated_and_moved():
    model, head = Perceptron(), nnx.PathContains("head")
    wrt = nnx.All(nnx.Param, head)
    before = pure(model)
    _, grads, grad_fn = ssam_jax.nnx.two_pass_value_and_grad(square, wrt=wrt)(model, X)
    optimizer_of(model, ssam_jax.ssam(0.1), wrt=wrt).update(model, grads, grad_fn=grad_fn)

    def gradient(params, _):
        return jax.grad(lambda params: perceptron_by_hand({**before, **params}, X))(params)

    assert list(nnx.to_pure_dict(grads)) == ["head"]
    chosen = {"head": before["head"]}
    expected = {**before, **step_by_hand(chosen, gradient(chosen, 0), gradient, ssam_jax.ssam(0.1))}
    tiny.assert_close(pure(model), expected, rtol=1e-5)


def test_the_ascent_gradient_may_come_from_a_part_of_the_batch():
    x, model = nets.wave(8, 16), Perceptron()
    two_pass, copy = ssam_jax.nnx.two_pass_value_and_grad(square), nnx.clone(model)
    before = pure(copy)
    _, grads, _ = two_pass(model, x[:4])
    _, _, grad_fn = two_pass(copy, x)
    optimizer_of(model, ssam_jax.ssam(0.1)).update(model, grads, grad_fn=grad_fn)
    gradient = jax.grad(perceptron_by_hand)
    expected = step_by_hand(before, gradient(before, x[:4]), lambda p, i: gradient(p, x), ssam_jax.ssam(0.1))
    tiny.assert_close(pure(model), expected, rtol=1e-5, atol=1e-6)
    assert model.head.calls[...] == 1


# Masks


def test_masks_go_by_the_paths_of_the_variables_and_are_replaced_in_place():
    seen = []
    rule = ssam_jax.fixed_mask(lambda path: seen.append(path) or path == "head/kernel")
    model = Perceptron()
    optimizer = optimizer_of(model, ssam_jax.ssam(0.1, rule, normalize="masked"))
    assert seen == ["body/kernel", "head/kernel"]
    assert ssam_jax.active_leaves(optimizer.opt_state) == (False, True)
    assert ssam_jax.mask_stats(optimizer.opt_state).by_leaf == {"body/kernel": 0, "head/kernel": 1}
    for jit in (lambda fn: fn, nnx.jit):
        mask = jax.tree.map(jnp.logical_not, pure_mask(optimizer))
        jit(ssam_jax.nnx.set_mask)(optimizer, mask)
        tiny.assert_same(pure_mask(optimizer), mask)


def pure_mask(optimizer):
    body, head = arrays_of(ssam_jax.get_mask(optimizer.opt_state))
    return {"body": {"kernel": body}, "head": {"kernel": head}}


def test_a_mask_that_does_not_fit_is_refused():
    optimizer = optimizer_of(Perceptron(), ssam_jax.ssam(0.1, ssam_jax.fixed_mask(lambda path: True)))
    with pytest.raises(TypeError, match="mask must be bool, but its leaf 'body/kernel'"):
        ssam_jax.nnx.set_mask(optimizer, jax.tree.map(jnp.float32, pure_mask(optimizer)))
    with pytest.raises(ValueError, match="mask must have the tree structure of the present mask"):
        ssam_jax.nnx.set_mask(optimizer, pure_mask(optimizer)["head"])
    with pytest.raises(ValueError, match="this ssam is dense"):
        ssam_jax.nnx.set_mask(optimizer_of(Perceptron(), ssam_jax.ssam(0.1)), pure_mask(optimizer))


def test_keyword_arguments_reach_the_loss_and_modules_among_them_are_updated():
    def loss(model, x, scale, teacher, half=False):
        return scale * jnp.sum((model(x) - 2 * teacher(x)) ** 2) / (2 if half else 1)

    model, teacher = Perceptron(), Perceptron()
    two_pass = ssam_jax.nnx.two_pass_value_and_grad(loss)
    value, grads, grad_fn = two_pass(model, X, scale=jnp.float32(3), teacher=teacher, half=True)
    plain = nnx.value_and_grad(loss)(Perceptron(), X, jnp.float32(3), Perceptron(), True)
    tiny.assert_close((value, nnx.to_pure_dict(grads)), (plain[0], nnx.to_pure_dict(plain[1])))
    assert teacher.head.calls[...] == 1
    assert isinstance(grad_fn, ssam_jax.TwoPassGradFn)


def test_the_implicit_form_takes_the_mask_of_the_optimizer():
    mask = {"body": {"kernel": np.array(True)}, "head": {"kernel": np.arange(16).reshape(16, 1) % 3 > 0}}
    model, x = Perceptron(), jnp.array(nets.wave(4, 16))
    before, rule = pure(model), ssam_jax.fisher_mask(NM(2, 4, axis=0), refresh_every=None)
    optimizer = optimizer_of(model, ssam_jax.ssam(0.1, rule))
    ssam_jax.nnx.set_mask(optimizer, mask)

    @nnx.jit
    def step(model, optimizer, x):
        two_pass = ssam_jax.nnx.two_pass_value_and_grad(square, form="implicit")
        _, grads, grad_fn = two_pass(model, x, mask=ssam_jax.get_mask(optimizer.opt_state))
        optimizer.update(model, grads, grad_fn=grad_fn)
        return grads

    grads = nnx.to_pure_dict(step(model, optimizer, x))
    by_hand = ssam_jax.two_pass_value_and_grad(perceptron_by_hand, form="implicit")
    _, expected, grad_fn = by_hand(before, x, mask=mask)
    tiny.assert_close(grads, expected)
    assert tiny.differ(grads["body"], jax.grad(perceptron_by_hand)(before, x)["body"])
    ssam = ssam_jax.ssam(0.1, ssam_jax.fixed_mask(mask))
    tiny.assert_close(pure(model), step_by_hand(before, expected, grad_fn, ssam))


# Mistakes


def test_arguments_that_are_of_no_use_are_refused_at_once():
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        ssam_jax.nnx.two_pass_value_and_grad(None)
    with pytest.raises(ValueError, match="form must be 'explicit' or 'implicit', got 'both'"):
        ssam_jax.nnx.two_pass_value_and_grad(total, form="both")
    with pytest.raises(TypeError, match="has_aux must be a bool, got 1"):
        ssam_jax.nnx.two_pass_value_and_grad(total, has_aux=1)


def test_a_loss_that_returns_no_pair_is_refused():
    with pytest.raises(TypeError, match=r"loss_fn must return a pair \(loss, aux\)"):
        ssam_jax.nnx.two_pass_value_and_grad(total, has_aux=True)(Linear(), X)


def test_a_filter_that_selects_nothing_is_refused():
    with pytest.raises(ValueError, match=r"wrt must select variables of the model, got .*LoRAParam"):
        ssam_jax.nnx.two_pass_value_and_grad(total, wrt=nnx.LoRAParam)(Linear(), X)


def test_a_loss_may_make_variables_and_must_take_them_away():
    def loss(model, x):
        model.sown = nnx.Intermediate(x)
        return total(model, x)

    def popping_loss(model, x):
        value = loss(model, x)
        return value, jax.tree.leaves(nnx.pop(model, nnx.Intermediate))

    with pytest.raises(ValueError, match=r"but 0/sown came or went\. Take .* with nnx\.pop"):
        ssam_jax.nnx.two_pass_value_and_grad(loss)(Linear(), X)
    (_, aux), _, _ = ssam_jax.nnx.two_pass_value_and_grad(popping_loss, has_aux=True)(Linear(), X)
    tiny.assert_same(aux, [X])


def test_a_natural_grad_fn_that_returns_boxes_is_taken():
    model, x = Perceptron(), jnp.array(nets.wave(4, 16))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def grad_fn(point, i):
        return nnx.grad(square)(nnx.merge(graphdef, point, rest), x)

    plain = nnx.to_pure_dict(params)
    tx = ssam_jax.ssam(0.1)

    def of_plain(point, i):
        return grad_fn(_filled_state(params, point), i)

    updates, _ = tx.update(nnx.to_pure_dict(grad_fn(params, 0)), tx.init(plain), plain, grad_fn=of_plain)
    expected, _ = tx.update(
        nnx.to_pure_dict(grad_fn(params, 0)),
        tx.init(plain),
        plain,
        grad_fn=lambda p, i: nnx.to_pure_dict(of_plain(p, i)),
    )
    tiny.assert_close(updates, expected)


def _filled_state(params, point):
    state = jax.tree.map(lambda x: x, params)
    nnx.replace_by_pure_dict(state, point)
    return state
