"""Both passes from one trace equal two plain gradients, whatever the loss is made of, for less work."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from counting import contraction_flops
from tiny import assert_close, assert_same, differ

from ssam_jax import (
    FirstRow,
    Structured,
    TwoPassGradFn,
    Unstructured,
    active_leaves,
    fisher_mask,
    fixed_mask,
    get_mask,
    random_mask,
    ssam,
    two_pass_value_and_grad,
)

# Compiled without optimisations: nothing here runs twice, and bfloat16 is rounded where the program says so.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False},
)
WIDTH = 8


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / shape[-1] ** 0.5


def make_params(layers=4):
    return {
        "body": normal(0, layers, WIDTH, WIDTH),
        "embed": normal(1, 5, WIDTH),
        "head": normal(2, WIDTH, 3),
        "mid": normal(3, WIDTH, WIDTH),
        "shift": normal(4, layers, WIDTH),
    }


BATCH = (normal(9, 6, 5), jnp.arange(6) % 3)


def bias(b):
    return b[None]


def norm(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def layer(x, kernel, shift):
    return x + jax.nn.relu(norm(x) @ kernel + bias(shift))


def scanned(x, params, one=layer, **options):
    return jax.lax.scan(
        lambda x, p: (one(x, *p), jnp.sum(x)), x, (params["body"], params["shift"]), **options
    )


def head(x, params):
    return jnp.tanh(norm(x) @ params["mid"]) @ params["head"]


def plain_loss(params, images, labels):
    x, _ = scanned(images @ params["embed"], params)
    return cross_entropy(head(x, params), labels)


def jitted_loss(params, images, labels):
    return jax.jit(plain_loss)(params, images, labels)


def remat_loss(params, images, labels):
    x, sums = scanned(images @ params["embed"], params, jax.checkpoint(layer))
    logits = jax.checkpoint(head)(x, params)
    return cross_entropy(logits, labels) + 1e-3 * jnp.sum(sums)


def whole_remat_loss(params, images, labels):
    return jax.checkpoint(plain_loss, policy=jax.checkpoint_policies.dots_saveable)(params, images, labels)


def nested_remat_loss(params, images, labels):
    block = jax.checkpoint(lambda x, p: jax.checkpoint(head)(jax.jit(norm)(x @ p["mid"]), p))
    x, _ = scanned(images @ params["embed"], params)
    return cross_entropy(block(x, params), labels)


def reverse_loss(params, images, labels):
    x, _ = scanned(images @ params["embed"], params, reverse=True)
    return cross_entropy(head(x, params), labels)


def cast_loss(params, images, labels):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    stacked = {"body": 0.5 * half["body"].reshape(-1, WIDTH // 2, 2, WIDTH), "shift": half["shift"]}
    stacked["body"] = jnp.swapaxes(stacked["body"], 1, 2).swapaxes(2, 1).reshape(-1, WIDTH, WIDTH)
    x, _ = scanned(images.astype(jnp.bfloat16) @ half["embed"], stacked, unroll=2)
    return cross_entropy(head(x, half).astype(jnp.float32), labels)


def unrolled_loss(params, images, labels):
    x = images @ params["embed"]
    for i in range(params["body"].shape[0]):
        x = layer(x, params["body"][i], params["shift"][i])
    return cross_entropy(head(x, params), labels)


def indexed_loss(params, images, labels):
    """The rows reach the layers by a traced index, so that they cannot be told apart."""

    def one(i, x):
        return layer(x, params["body"][i], params["shift"][i])

    x = jax.lax.fori_loop(0, params["body"].shape[0], one, images @ params["embed"])
    return cross_entropy(head(x, params), labels)


def cond_loss(params, images, labels):
    x = images @ params["embed"]
    x = jax.lax.cond(jnp.sum(x) > 0, lambda x: x @ params["mid"], lambda x: jnp.sin(x) @ params["body"][0], x)
    return cross_entropy(head(x, params), labels) + jnp.sum(params["shift"] ** 2)


def while_loss(params, images, labels):
    steps = jax.lax.while_loop(lambda n: n < 3, lambda n: n + 1, jnp.sum(labels) * 0)
    return plain_loss(params, images * steps.astype(jnp.float32), labels)


@jax.custom_jvp
def rounded(x):
    return jnp.round(x * 8) / 8


rounded.defjvp(lambda primals, tangents: (rounded(*primals), 3 * tangents[0]))


@jax.custom_vjp
def product(x, kernel):
    return x @ kernel


product.defvjp(lambda x, k: (x @ k, (x, k)), lambda res, ct: (2 * ct @ res[1].T, 3 * res[0].T @ ct))


def custom_loss(params, images, labels):
    x = rounded(images @ params["embed"])
    x = product(product(x, rounded(params["mid"])), params["body"][1])
    return cross_entropy(rounded(x @ params["head"]), labels) + jnp.sum(params["shift"] ** 2)


def microbatch_loss(params, images, labels):
    def one(total, batch):
        return total + plain_loss(params, *batch), None

    batches = (images.reshape(3, 2, 5), labels.reshape(3, 2))
    return jax.lax.scan(one, 0.0, batches)[0]


def reused_loss(params, images, labels):
    """Every leaf is used on both sides of the line."""
    x, _ = scanned(images @ params["embed"], params)
    y, _ = scanned(norm(x) @ params["mid"], params)
    penalty = sum(jnp.sum(jnp.sin(p)) for p in jax.tree.leaves(params))
    return cross_entropy(head(x + y, params), labels) + 1e-2 * penalty


def shared_subexpressions_loss(params, images, labels):
    """The same traced function twice, so that its equations and variables come twice."""
    block = jax.jit(jax.checkpoint(lambda x, k: norm(x @ k)))
    x = images @ params["embed"]
    for name in ("mid", "mid"):
        x = block(x, params[name])
    x = block(x, params["body"][0])
    return cross_entropy(x @ params["head"], labels) + jnp.sum(params["shift"] ** 2)


def mapped_loss(params, images, labels):
    """One kernel is broadcast over the rows of another."""
    body = jax.vmap(lambda kernel: jnp.tanh(kernel * params["mid"]))(params["body"])
    x, _ = scanned(images @ params["embed"], dict(params, body=body))
    return cross_entropy(x @ params["head"], labels)


LOSSES = [
    plain_loss,
    jitted_loss,
    remat_loss,
    whole_remat_loss,
    nested_remat_loss,
    reverse_loss,
    cast_loss,
    unrolled_loss,
    indexed_loss,
    cond_loss,
    while_loss,
    custom_loss,
    microbatch_loss,
    reused_loss,
    shared_subexpressions_loss,
    mapped_loss,
]

# In the order of the leaves: body, embed, head, mid, shift.
ALL, NONE = (True,) * 5, (False,) * 5
HEAD = (False, False, True, False, False)
TAIL = (FirstRow(3), False, True, True, FirstRow(2))
SCATTERED = (FirstRow(1), FirstRow(2), False, FirstRow(4), True)


def keep(grads, active):
    """Return gradients with zeros where the leaves, or rows, are not active."""
    leaves, tree = jax.tree.flatten(grads)
    kept = []
    for entry, leaf in zip(active, leaves):
        first = entry.row if isinstance(entry, FirstRow) else 0 if entry else leaf.shape[0]
        rows = np.arange(leaf.shape[0]).reshape(-1, *[1] * (leaf.ndim - 1))
        kept.append(jnp.where(rows >= first, leaf, 0))
    return tree.unflatten(kept)


def separate_passes(loss, params, point, active, *args):
    value, grads = jax.value_and_grad(loss)(params, *args)
    return value, keep(grads, active), jax.grad(loss)(point, *args)


def shared_passes(loss, params, point, active, *args):
    value, grads, grad_fn = two_pass_value_and_grad(loss)(params, *args, active=active)
    return value, grads, grad_fn(point, 0)


def nearby(params, active):
    """Return parameters that differ in the active leaves and rows alone."""
    return jax.tree.map(jnp.add, params, keep(jax.tree.map(lambda p: 0.1 * jnp.cos(p), params), active))


def assert_equal_to_rounding(actual, expected):
    """Assert equality to 1e-6 of the largest entry of each leaf."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1e-3, float(jnp.max(jnp.abs(b)))))


@functools.cache
def gradient_of(loss):
    """Compile one plain gradient of a loss, for both passes and whatever is active."""
    return quick_jit(jax.value_and_grad(loss))


@functools.cache
def both_ways(loss, active):
    params = make_params()
    point = nearby(params, active)
    fast = quick_jit(functools.partial(shared_passes, loss), static_argnums=2)(params, point, active, *BATCH)
    value, grads = gradient_of(loss)(params, *BATCH)
    _, descent = gradient_of(loss)(point, *BATCH)
    return fast, (value, keep(grads, active), descent)


CASES = [
    *((loss, TAIL) for loss in LOSSES),
    *((loss, SCATTERED) for loss in (remat_loss, reverse_loss, unrolled_loss)),
    *((loss, HEAD) for loss in (jitted_loss, nested_remat_loss)),
    (whole_remat_loss, ALL),
]
NAMES = {TAIL: "tail", SCATTERED: "scattered", HEAD: "head", ALL: "all"}


@pytest.mark.parametrize(("loss", "active"), CASES, ids=[f"{f.__name__}-{NAMES[a]}" for f, a in CASES])
def test_both_passes_equal_two_plain_ones(loss, active):
    assert_equal_to_rounding(*both_ways(loss, active))


@pytest.mark.parametrize("loss", [microbatch_loss, indexed_loss])
def test_both_passes_equal_two_plain_ones_bit_for_bit_where_the_compiler_orders_sums_alike(loss):
    assert_same(*both_ways(loss, TAIL))


def products(fn, *args, static=()):
    """Count the matrix products that a compiled function holds, those of a loop once."""
    text = jax.jit(fn, static_argnums=static).lower(*args).compile().as_text()
    return sum(text.count(op) for op in (" dot(", " custom-call("))


def mlp(params, images, labels):
    x = images @ params["embed"]
    for i in range(3):
        x = jax.nn.relu(norm(x) @ params["body"][i])
    return cross_entropy(x @ params["head"], labels)


def mlp_params():
    return {name: leaf for name, leaf in make_params().items() if name in ("body", "embed", "head")}


@pytest.mark.parametrize(
    ("active", "extra"),
    [
        ((False, False, False), 0),
        ((False, False, True), 2),  # forward again, and the weight gradient of the ascent
        ((FirstRow(2), False, True), 5),  # and for the last layer, with its input's gradient in between
        ((FirstRow(2), False, False), 4),
        ((True, True, True), 14),  # a second gradient
    ],
    ids=["none", "head", "last layer and head", "last layer", "all"],
)
def test_a_step_has_the_products_of_one_gradient_and_those_the_active_leaves_need_again(active, extra):
    params = mlp_params()
    once = products(jax.grad(mlp), params, *BATCH)
    both = products(functools.partial(shared_passes, mlp), params, params, active, *BATCH, static=2)
    assert (once, both - once) == (14, extra)


def test_a_norm_does_not_make_the_forward_pass_happen_twice_as_it_does_when_left_to_the_compiler():
    params, active = mlp_params(), (False, False, True)
    point = nearby(params, active)
    left = products(functools.partial(separate_passes, mlp), params, point, active, *BATCH, static=2)
    ours = products(functools.partial(shared_passes, mlp), params, point, active, *BATCH, static=2)
    assert ours < left


def aux_loss(params, images, labels, train):
    assert train is True, "a Python bool stays one"
    logits = head(images @ params["embed"], params)
    statistics = {"mean": images.mean(0), "count": labels.sum(), "none": None}
    return cross_entropy(logits, labels), (logits, statistics, "a string", 3, params["body"])


def test_value_and_aux_are_the_clean_pass_and_those_of_the_descent_pass_can_be_had():
    params = make_params()
    point = nearby(params, HEAD)

    @functools.partial(jax.jit, static_argnums=0)
    def both(active):
        value, _, grad_fn = two_pass_value_and_grad(aux_loss, has_aux=True)(
            params, *BATCH, True, active=active
        )
        (descent, descent_aux), grads = grad_fn.value_and_grad(point, 0)
        assert value[1][2:4] == descent_aux[2:4] == ("a string", 3)
        return value[0], value[1][:2], descent, descent_aux[:2], grads

    value, aux, descent, descent_aux, grads = both(HEAD)
    plain = jax.value_and_grad(aux_loss, has_aux=True)
    for at, got in ((params, (value, aux)), (point, (descent, descent_aux))):
        expected = jax.jit(lambda at: aux_loss(at, *BATCH, True)[1][:2])(at)
        assert_close(got[1], expected)
        np.testing.assert_allclose(got[0], plain(at, *BATCH, True)[0][0], rtol=1e-6)
    assert_close(grads, plain(point, *BATCH, True)[1])


def train(tx, loss, active, steps=3):
    two_pass = two_pass_value_and_grad(loss)

    @functools.partial(quick_jit, static_argnums=2)
    def step(params, state, active):
        _, grads, grad_fn = two_pass(params, *BATCH, active=active)
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    params = mlp_params()
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state, active_leaves(state) if active is None else active)
    return params


def train_plainly(tx, loss, steps=3):
    @quick_jit
    def step(params, state):
        def grad_fn(p, i):
            return jax.grad(loss)(p, *BATCH)

        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    params = mlp_params()
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


STACKED = {"body": np.array([False, False, True, True]).reshape(4, 1, 1), "embed": False, "head": True}


@pytest.mark.parametrize(
    "options",
    [{}, {"adaptive": True}, {"ascent_steps": 3}, {"skip_zero_rho": True}],
    ids=["plain", "asam", "three steps", "skip"],
)
def test_training_by_two_pass_gradients_is_training_by_two_gradients(options):
    tx = optax.chain(ssam(0.3, fixed_mask(STACKED), normalize="masked", **options), optax.sgd(0.5))
    fast = train(tx, mlp, None)
    assert_close(fast, train_plainly(tx, mlp))
    assert differ(fast, train_plainly(optax.sgd(0.5), mlp))


def test_active_leaves_names_the_first_row_of_a_stacked_leaf_masked_by_layer():
    def active(mask, params):
        return active_leaves(ssam(0.1, fixed_mask(mask)).init(params))

    params = mlp_params()
    assert active(STACKED, params) == (FirstRow(2), False, True)
    assert hash(active(STACKED, params)) != hash((True, False, True))
    rows = np.zeros((4, WIDTH, WIDTH), bool)
    rows[1:] = True
    assert active(dict(STACKED, body=rows), params) == (FirstRow(1), False, True)
    rows[2] = False
    assert active(dict(STACKED, body=rows), params) == (FirstRow(1), False, True)
    rows[3, 0, 0] = False  # a row of both kinds: no mask by layer
    assert active(dict(STACKED, body=rows), params) == (True, False, True)
    assert active_leaves(ssam(0.1).init(params)) == (True, True, True)
    by_layer = Structured(0.5, unit="channel", axis=0)
    scores = {"w": jnp.array([0.0, 1.0, 3.0, 2.0])[:, None] * jnp.ones((4, 2))}
    tx = ssam(0.1, fixed_mask(by_layer(scores)))
    assert active_leaves(tx.init(scores)) == (2,)


def test_jit_keeps_the_first_row_and_a_whole_leaf_apart():
    traced = []
    f = jax.jit(lambda active, x: traced.append(active) or x, static_argnums=0)
    for active in ((True,), (FirstRow(1),), (True,), (FirstRow(1),)):
        f(active, 1.0)
    assert traced == [(True,), (FirstRow(1),)]
    whole = True
    assert FirstRow(2) == 2 == FirstRow(2) != FirstRow(1) != whole != FirstRow(1)


def test_a_mask_that_has_changed_since_perturbs_fewer_leaves():
    tx = optax.chain(ssam(0.3, random_mask(Structured(0.5)), normalize="masked"), optax.sgd(0.5))
    none = (False, False, False)
    assert_close(train(tx, mlp, none), train_plainly(optax.sgd(0.5), mlp))


@pytest.mark.parametrize("rho", [0.0, jnp.float32(0)], ids=["static", "array"])
def test_a_rho_of_zero_takes_the_whole_gradient_and_not_that_of_the_active_leaves(rho):
    tx = optax.chain(ssam(rho, fixed_mask(STACKED), normalize="masked", skip_zero_rho=True), optax.sgd(0.5))
    assert_close(train(tx, mlp, None), train_plainly(optax.sgd(0.5), mlp))


def test_fisher_scores_come_from_whole_gradients():
    """Every leaf gets a score, the inactive ones too, or the mask could never move to them."""
    rule = fisher_mask(Structured(0.5), refresh_every=1, decay=0.0)
    tx = ssam(0.3, rule, normalize="masked")
    params = mlp_params()
    state = tx.init(params)

    @quick_jit
    def step(params, state):
        _, grads, grad_fn = two_pass_value_and_grad(mlp)(params, *BATCH, active=(False, False, True))
        return tx.update(grads, state, params, grad_fn=grad_fn)

    descent, state = step(params, state)
    assert_close(get_mask(state), Structured(0.5)(jax.tree.map(jnp.square, descent)))
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(descent))


def test_a_partial_gradient_under_another_normalisation_is_refused_in_a_sentence():
    params = mlp_params()
    _, grads, grad_fn = two_pass_value_and_grad(mlp)(params, *BATCH, active=(False, False, True))
    tx = ssam(0.1, fixed_mask(STACKED))
    with pytest.raises(ValueError, match=r"active leaves alone.*normalize='masked'.*'global'"):
        tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    _, grads, grad_fn = two_pass_value_and_grad(mlp)(params, *BATCH)
    tx.update(grads, tx.init(params), params, grad_fn=grad_fn)


LAST_ROWS_AND_HEAD = (FirstRow(2), False, True)


def one_step(params):
    value, grads, grad_fn = two_pass_value_and_grad(mlp)(params, *BATCH, active=LAST_ROWS_AND_HEAD)
    return value, grad_fn(jax.tree.map(lambda p, g: p + 0.1 * g, params, grads), 0)


def test_arguments_that_are_no_jax_arrays_stay_what_they_are():
    def loss(params, images, labels, options):
        assert isinstance(options["columns"], np.ndarray) and options["names"].dtype.kind == "U"
        columns = {str(name): int(i) for name, i in zip(options["names"], options["columns"])}
        return mlp(params, images, labels) + params["head"][0, columns["last"]]

    options = {"names": np.array(["first", "last"]), "columns": np.array([0, 2])}
    value, grads, _ = two_pass_value_and_grad(loss)(mlp_params(), *BATCH, options)
    assert_close((value, grads), jax.value_and_grad(loss)(mlp_params(), *BATCH, options))


def with_options(params, images, /, labels, *, mask_out=None, scale=1.0, params_too=False):
    x = images if mask_out is None else images * mask_out["rows"]
    return scale * mlp(params, x, labels) + (jnp.sum(params["head"] ** 2) if params_too else 0.0)


def test_keyword_arguments_reach_the_loss_as_they_do_under_value_and_grad():
    images, labels = BATCH
    options = {"mask_out": {"rows": jnp.arange(6.0)[:, None]}, "scale": jnp.float32(2), "params_too": True}
    params = mlp_params()
    point = nearby(params, LAST_ROWS_AND_HEAD)

    @quick_jit
    def passes(params, images, labels, arrays):
        two_pass = two_pass_value_and_grad(with_options)
        value, grads, grad_fn = two_pass(
            params, images, labels=labels, active=LAST_ROWS_AND_HEAD, **arrays, params_too=True
        )
        return value, grads, grad_fn(point, 0)

    arrays = {name: options[name] for name in ("mask_out", "scale")}
    plain = jax.value_and_grad(with_options)
    value, grads = plain(params, images, labels=labels, **options)
    expected = value, keep(grads, LAST_ROWS_AND_HEAD), plain(point, images, labels=labels, **options)[1]
    assert_equal_to_rounding(passes(params, images, labels, arrays), expected)


def test_keyword_arguments_reach_a_loss_with_side_effects_too():
    def loss(params, x, *, labels):
        return printing(params, x, labels)

    with pytest.warns(UserWarning, match="side effect"):
        value, grads, _ = two_pass_value_and_grad(loss)(mlp_params(), x=BATCH[0], labels=BATCH[1])
    assert_close((value, grads), jax.value_and_grad(mlp)(mlp_params(), *BATCH))


def test_a_loss_has_any_names_but_those_of_the_two_passes():
    """Such as names that the library uses inside."""

    def loss(weights, *, params, args, has_aux):
        return jnp.sum(weights * params) * (args if has_aux else 0)

    value, grads, _ = two_pass_value_and_grad(loss)(
        jnp.ones(3), params=jnp.arange(3.0), args=2.0, has_aux=True
    )
    assert_same((value, grads), (jnp.float32(6), 2 * jnp.arange(3.0)))


def test_it_works_under_vmap():
    params = mlp_params()
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    many = quick_jit(jax.vmap(one_step))(stacked)
    single = quick_jit(one_step)
    for i, scale in enumerate((1, 2)):
        one = single(optax.tree.scale(scale, params))
        assert_equal_to_rounding(jax.tree.map(operator.itemgetter(i), many), one)


def test_it_works_in_a_scan_over_steps():
    def body(params, _):
        value, grads = one_step(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    after, values = quick_jit(lambda params: jax.lax.scan(body, params, None, length=3))(mlp_params())
    expected, step = mlp_params(), quick_jit(body)
    for value in values:
        expected, again = step(expected, None)
        np.testing.assert_allclose(value, again, rtol=1e-5)
    assert_close(after, expected)


def test_its_value_can_be_differentiated():
    def value(scale):
        return two_pass_value_and_grad(mlp)(mlp_params(), BATCH[0] * scale, BATCH[1])[0]

    direct = quick_jit(jax.grad(lambda scale: mlp(mlp_params(), BATCH[0] * scale, BATCH[1])))(1.0)
    np.testing.assert_allclose(quick_jit(jax.grad(value))(1.0), direct, rtol=1e-5)


def test_it_works_in_shard_map_with_collectives_in_the_loss():
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    spec = jax.sharding.PartitionSpec("data")
    params, active = mlp_params(), (False, False, True)

    def loss(params, images, labels):
        return jax.lax.pmean(mlp(params, images, labels), "data")

    def run(passes):
        def local(images, labels):
            value, grads, descent = passes(loss, params, params, active, images, labels)
            return value, jax.lax.pmean((grads, descent), "data")

        specs = {"mesh": mesh, "in_specs": (spec, spec), "out_specs": jax.sharding.PartitionSpec()}
        return quick_jit(jax.shard_map(local, **specs))(*BATCH)

    assert_equal_to_rounding(run(shared_passes), run(separate_passes))


def printing(params, images, labels):
    jax.debug.print("{x}", x=params["head"][0, 0])
    return mlp(params, images, labels)


def test_a_side_effect_takes_two_complete_passes_with_a_warning_that_says_where(capfd):
    params, active = mlp_params(), (FirstRow(2), False, True)
    with pytest.warns(UserWarning, match=r"debug_\w+ at .*test_passes.py.*printing"):
        actual = shared_passes(printing, params, params, active, *BATCH)
    jax.effects_barrier()
    assert len(capfd.readouterr().out.splitlines()) == 2
    assert_equal_to_rounding(actual, separate_passes(mlp, params, params, active, *BATCH))


def test_a_ref_takes_two_complete_passes_too():
    if not hasattr(jax, "new_ref"):
        pytest.skip("this jax has no refs")

    def loss(params, images, labels):
        total = jax.new_ref(jnp.zeros(()))
        total[...] += mlp(params, images, labels)
        return total[...]

    params, active = mlp_params(), (False, False, True)
    with pytest.warns(UserWarning, match="side effect"):
        actual = shared_passes(loss, params, params, active, *BATCH)
    assert_equal_to_rounding(actual, separate_passes(mlp, params, params, active, *BATCH))


def test_a_pure_callback_before_the_active_leaves_is_called_once():
    calls = []

    def count(x):
        calls.append(1)
        return np.asarray(x)

    def loss(params, images, labels):
        images = jax.pure_callback(count, jax.ShapeDtypeStruct(images.shape, images.dtype), images)
        return mlp(params, images, labels)

    params = mlp_params()
    passes = jax.jit(functools.partial(shared_passes, loss), static_argnums=2)
    jax.block_until_ready(passes(params, params, (False, False, True), *BATCH))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "match", "active"),
    [
        (ValueError, r"active.*3 leaves.*2 entries", (True, False)),
        (ValueError, r"active.*3 leaves.*'all'", "all"),
        (TypeError, r"active.*'body'.*static", (jnp.array(True), True, True)),
        (TypeError, r"active.*'body'.*1.5", (1.5, True, True)),
        (ValueError, r"active.*row 4.*'body'.*\(4, 8, 8\)", (4, True, True)),
        (ValueError, r"active.*row -1.*'embed'", (True, -1, True)),
    ],
    ids=range(6),
)
def test_an_active_that_does_not_fit_is_refused_by_name(error, match, active):
    with pytest.raises(error, match=match):
        two_pass_value_and_grad(mlp)(mlp_params(), *BATCH, active=active)


def test_active_may_be_a_tree_or_numpy_bools_or_plain_rows():
    params = mlp_params()
    point = nearby(params, (FirstRow(2), False, True))
    expected = shared_passes(mlp, params, point, (FirstRow(2), False, True), *BATCH)
    for active in ({"body": 2, "embed": False, "head": True}, [np.int64(2), np.False_, np.True_]):
        assert_same(shared_passes(mlp, params, point, active, *BATCH), expected)


@pytest.mark.parametrize(
    ("error", "match", "loss", "options"),
    [
        (TypeError, "loss_fn.*None", None, {}),
        (TypeError, "has_aux.*1", mlp, {"has_aux": 1}),
        (TypeError, "strict.*'no'", mlp, {"strict": "no"}),
        (ValueError, "form.*'dense'", mlp, {"form": "dense"}),
        (TypeError, r"\(loss, aux\)", mlp, {"has_aux": True}),
        (TypeError, "int32", lambda p, x, y: y[0], {}),
        (TypeError, "complex64", lambda p, x, y: jax.lax.complex(x[0, 0], x[0, 0]), {}),
        (TypeError, "0.5", lambda p, x, y: 0.5, {}),
        (TypeError, "real floating-point scalar", aux_loss, {}),
        (ValueError, r"scalar.*\(6,\)", lambda p, x, y: x.sum(1), {}),
    ],
    ids=range(10),
)
def test_a_loss_or_an_option_that_makes_no_sense_is_refused_by_name(error, match, loss, options):
    args = (*BATCH, True) if loss is aux_loss else BATCH
    params = make_params() if loss is aux_loss else mlp_params()
    with pytest.raises(error, match=match):
        two_pass_value_and_grad(loss, **options)(params, *args)


def test_parameters_that_are_no_floats_are_refused_by_the_name_of_the_leaf():
    with pytest.raises(TypeError, match="'steps' is int32"):
        two_pass_value_and_grad(mlp)(dict(mlp_params(), steps=jnp.zeros((), jnp.int32)), *BATCH)


def test_an_empty_tree_an_unused_leaf_and_a_loss_without_parameters():
    two_pass = two_pass_value_and_grad(lambda params, x: jnp.sum(x))
    value, grads, grad_fn = two_pass({}, jnp.ones(3))
    assert (value, grads, grad_fn({}, 0)) == (3, {}, {})
    params = {"unused": jnp.ones((2, 2), jnp.bfloat16), "empty": jnp.zeros((0, 3))}
    for active in (None, (True, False), (False, True)):
        value, grads, grad_fn = two_pass(params, jnp.ones(3), active=active)
        assert_same((grads, grad_fn(params, 0)), (jax.tree.map(jnp.zeros_like, params),) * 2)


def test_what_is_not_finite_stays_what_it_is():
    params = mlp_params()
    images = BATCH[0].at[0, 0].set(jnp.nan)
    args = (params, params, (False, False, True), images, BATCH[1])
    actual, expected = (
        quick_jit(functools.partial(passes, mlp), static_argnums=2)(*args)
        for passes in (shared_passes, separate_passes)
    )
    assert jnp.isnan(actual[0])
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_the_gradient_function_is_documented_and_says_what_it_is():
    params = mlp_params()
    for active, partial in (
        (None, False),
        ((True,) * 3, False),
        ((True, True, False), True),
        ((1, True, True), True),
    ):
        grad_fn = two_pass_value_and_grad(mlp)(params, *BATCH, active=active)[2]
        assert isinstance(grad_fn, TwoPassGradFn)
        assert (grad_fn.partial, grad_fn.form) == (partial, "explicit")
        chex.assert_trees_all_equal_shapes_and_dtypes(grad_fn.ascent(params, 0), params)


def test_unstructured_masks_go_with_two_pass_gradients_too():
    rule = fixed_mask(Unstructured(0.5)(jax.tree.map(jnp.abs, mlp_params())))
    tx = optax.chain(ssam(0.3, rule), optax.sgd(0.5))
    assert_close(train(tx, mlp, (True, True, True)), train_plainly(tx, mlp))


# What the implicit form adds to the engine; that its gradients are right is tested in test_implicit.py.

MASK = {
    "body": (np.arange(WIDTH) % 2 == 0).reshape(1, 1, WIDTH),
    "embed": np.ones((5, WIDTH), bool),
    "head": np.arange(3) < 2,  # of fewer dimensions than the leaf
}


def implicit_passes(loss, params, point, active, mask, *args):
    two_pass = two_pass_value_and_grad(loss, form="implicit")
    value, grads, grad_fn = two_pass(params, *args, active=active, mask=mask)
    return value, grads, grad_fn(point, 0)


def implicit(loss, active, mask):
    """Compile both passes with a mask whose values are known, or of traced arrays."""
    params = mlp_params()
    point = nearby(params, LAST_ROWS_AND_HEAD)
    if isinstance(mask, tuple):
        passes = quick_jit(functools.partial(implicit_passes, loss), static_argnums=(2, 3))
    else:
        passes = quick_jit(functools.partial(implicit_passes, loss), static_argnums=2)
    return passes(params, point, active, mask, *BATCH)


def test_the_implicit_form_and_active_leaves_go_together():
    every = implicit(mlp, (True,) * 3, MASK)
    some = implicit(mlp, LAST_ROWS_AND_HEAD, MASK)
    assert_equal_to_rounding(some, (every[0], keep(every[1], LAST_ROWS_AND_HEAD), every[2]))
    exact = quick_jit(jax.grad(mlp))(nearby(mlp_params(), LAST_ROWS_AND_HEAD), *BATCH)
    assert_equal_to_rounding(every[2], exact)


def test_a_mask_by_row_known_while_compiling_equals_the_same_as_arrays():
    rows = np.repeat(np.arange(4) >= 1, WIDTH * WIDTH).reshape(4, WIDTH, WIDTH)
    arrays = {"body": rows, "embed": np.array(True), "head": np.array([[True]])}
    expected = implicit(mlp, (True,) * 3, arrays)
    with pytest.warns(UserWarning, match="cut every path from the loss to 'embed'"):
        actual = implicit(mlp, (True,) * 3, (FirstRow(1), True, True))
    assert_equal_to_rounding(actual, expected)


def test_a_side_effect_takes_two_complete_passes_in_the_implicit_form_too():
    expected = implicit(mlp, LAST_ROWS_AND_HEAD, MASK)
    with pytest.warns(UserWarning, match="side effect"):
        actual = implicit(printing, LAST_ROWS_AND_HEAD, MASK)
    assert_equal_to_rounding(actual, expected)
    with (
        pytest.warns(UserWarning, match="side effect"),
        pytest.warns(UserWarning, match="cut every path from the loss to 'embed'"),
    ):
        implicit(printing, (True,) * 3, (False, True, True))


def implicit_step(tx, mask, params, state):
    two_pass = two_pass_value_and_grad(mlp, form="implicit")
    _, grads, grad_fn = two_pass(params, *BATCH, mask=mask)
    descent, _ = tx.update(grads, state, params, grad_fn=grad_fn)
    return grads, descent


@pytest.mark.parametrize("steps", [1, 2])
def test_ssam_leaves_the_perturbation_whole_in_the_implicit_form(steps):
    params = mlp_params()
    tx = ssam(0.3, fixed_mask(MASK), ascent_steps=steps)
    state = tx.init(params)
    mask = get_mask(state)
    grads, descent = quick_jit(functools.partial(implicit_step, tx))(mask, params, state)

    def expected(params, grads):
        point = params
        for i in range(steps):
            scale = 0.3 / optax.tree.norm(grads)
            point = jax.tree.map(lambda p, g: p + scale * g, point, grads)  # noqa: B023
            if i < steps - 1:
                two_pass = two_pass_value_and_grad(mlp, form="implicit")
                grads = two_pass(point, *BATCH, mask=mask)[1]
        return jax.grad(mlp)(point, *BATCH)

    assert_close(descent, quick_jit(expected)(params, grads))
    exact = quick_jit(jax.grad(mlp))(params, *BATCH)
    assert float(jnp.max(jnp.abs(grads["embed"] - exact["embed"]))) > 0.05, "masked, and it shows"


@pytest.mark.parametrize("rho", [0.0, jnp.float32(0)], ids=["static", "array"])
def test_a_rho_of_zero_takes_the_exact_gradient_and_not_the_masked_one(rho):
    params = mlp_params()
    tx = ssam(rho, fixed_mask(MASK), skip_zero_rho=True)
    state = tx.init(params)
    _, descent = quick_jit(functools.partial(implicit_step, tx))(get_mask(state), params, state)
    assert_close(descent, quick_jit(jax.grad(mlp))(params, *BATCH))


def test_the_form_of_the_gradients_decides_whether_the_perturbation_is_masked():
    params, tx = mlp_params(), ssam(0.1, fixed_mask(MASK))
    for form in ("explicit", "implicit"):
        options, seen = {"mask": MASK} if form == "implicit" else {}, []
        _, grads, grad_fn = two_pass_value_and_grad(mlp, form=form)(params, *BATCH, **options)

        class Spy:
            partial, form, ascent = grad_fn.partial, grad_fn.form, staticmethod(grad_fn.ascent)
            value_and_grad = staticmethod(grad_fn.value_and_grad)

            def __call__(self, point, step=0, grad_fn=grad_fn, seen=seen):
                seen.append(point)
                return grad_fn(point, step)

        tx.update(grads, tx.init(params), params, grad_fn=Spy())
        moved = jax.tree.map(lambda p, q: np.asarray(p != q), params, seen[0])
        expected = {"explicit": lambda g, m: (g != 0) & m, "implicit": lambda g, m: g != 0}[form]
        for name in params:
            assert (moved[name] <= expected(np.asarray(grads[name]), np.asarray(MASK[name]))).all()
        everything = sum(int((np.asarray(g) != 0).sum()) for g in jax.tree.leaves(grads))
        assert (sum(m.sum() for m in moved.values()) == everything) == (form == "implicit")


@pytest.mark.parametrize(
    ("error", "match", "form", "mask"),
    [
        (ValueError, "mask is for form='implicit'", "explicit", MASK),
        (ValueError, "needs mask.*get_mask", "implicit", None),
        (ValueError, "mask.*3 leaves.*2 entries", "implicit", (True, False)),
        (TypeError, "'head' is float32", "implicit", dict(MASK, head=np.float32(1))),
        (ValueError, r"'head' of shape \(2,\).*\(8, 3\)", "implicit", dict(MASK, head=np.ones(2, bool))),
        (ValueError, r"'head' of shape \(1, 8, 3\)", "implicit", dict(MASK, head=np.ones((1, 8, 3), bool))),
        (ValueError, "mask names row 9.*'body'", "implicit", (9, True, True)),
        (TypeError, "mask.*'head'.*None", "implicit", [True, True, "no"]),
    ],
    ids=range(8),
)
def test_a_mask_that_does_not_fit_is_refused_by_name(error, match, form, mask):
    with pytest.raises(error, match=match.replace("None", "'no'")):
        two_pass_value_and_grad(mlp, form=form)(mlp_params(), *BATCH, mask=mask)


def test_an_ascent_on_a_part_of_the_batch_costs_that_part():
    """Two calls: the compiler drops what is not used of either."""
    params, images, labels = mlp_params(), jnp.tile(BATCH[0], (4, 1)), jnp.tile(BATCH[1], 4)
    two_pass = two_pass_value_and_grad(mlp)

    def passes(params, share):
        rows = int(share * len(images))
        value, grads, _ = two_pass(params, images[:rows], labels[:rows])
        _, _, grad_fn = two_pass(params, images, labels)
        return value, grad_fn(jax.tree.map(jnp.add, params, grads), 0)

    once = contraction_flops(jax.grad(mlp), params, images, labels)
    for share in (1 / 4, 1 / 2):
        cost = contraction_flops(functools.partial(passes, share=share), params)
        assert cost / once == pytest.approx(1 + share)


def hidden(params, images):
    return norm(images @ params["embed"])


def infinite_aux_loss(params, images, labels):
    """What aux reads has an infinite derivative, and comes before the active leaves."""
    x = hidden(params, images)
    root = jnp.sqrt(jnp.abs(params["embed"] * 0))
    frozen = jax.lax.stop_gradient(root.sum())
    return cross_entropy(x @ params["head"] + frozen, labels), {"root": root, "product": x @ x.T}


@pytest.mark.parametrize("name", ["aux", "stop_gradient"])
def test_what_the_loss_does_not_differentiate_gets_no_cotangent_of_zeros(name):
    params = mlp_params()

    def loss(params, *batch):
        value, aux = infinite_aux_loss(params, *batch)
        return (value, aux) if name == "aux" else value

    def gradient(params):
        two_pass = two_pass_value_and_grad(loss, has_aux=name == "aux")
        return two_pass(params, *BATCH, active=(False, False, True))[2](params, 0)

    def plain(params):
        grads = jax.grad(loss, has_aux=name == "aux")(params, *BATCH)
        return grads[0] if name == "aux" else grads

    expected = quick_jit(plain)(params)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(expected))
    assert_equal_to_rounding(quick_jit(gradient)(params), expected)
    assert products(gradient, params) == products(plain, params)


FIXED = {
    "stop_gradient": jax.lax.stop_gradient,
    "stop_gradient in a conditional": lambda a: jax.lax.cond(a[0, 0] > 0, jax.lax.stop_gradient, jnp.sign, a),
    "stop_gradient in a checkpoint": jax.checkpoint(lambda a: jax.lax.stop_gradient(2 * a)),
    "a function that is constant almost everywhere": jnp.sign,
}


@pytest.mark.parametrize("name", FIXED)
def test_an_operand_that_has_no_derivative_stays_the_fixed_operand_of_a_linear_call(name):
    params = {"a": np.array([[0.5, 1.0], [-1.0, 2.0]]), "b": np.ones((3, 2)), "c": np.full((2, 2), 0.3)}
    params, x = jax.tree.map(np.float32, params), np.ones((4, 3), np.float32)

    def loss(params, x):
        fixed = FIXED[name](params["a"] + params["a"])
        rule = jax.custom_derivatives.linear_call
        h = rule(lambda m, h: h @ m, lambda m, g: g @ m.T, fixed, x @ params["b"])
        return jnp.sum(jnp.tanh(h @ params["c"]))

    def both(params):
        _, ascent, grad_fn = two_pass_value_and_grad(loss)(params, x, active=(False, True, True))
        return ascent, grad_fn(params, 0)

    (ascent, descent), expected = quick_jit(lambda params: (both(params), jax.grad(loss)(params, x)))(params)
    assert_equal_to_rounding(descent, expected)
    assert_equal_to_rounding(ascent, {**expected, "a": jnp.zeros((2, 2))})
    jax.eval_shape(jax.grad(lambda params: jnp.sum(both(params)[1]["b"])), params)


def test_a_checkpoint_with_a_choice_for_each_operand_is_cut_too():
    block = jax.checkpoint(lambda x, a, b: jnp.tanh(x @ a) @ b, prevent_cse=(True, False, True))

    def loss(params, images, labels):
        return cross_entropy(block(images @ params["embed"], params["body"][0], params["head"]), labels)

    params, active = mlp_params(), (False, False, True)
    args = (params, nearby(params, active), active, *BATCH)
    expected = quick_jit(functools.partial(separate_passes, loss), static_argnums=2)(*args)
    assert_equal_to_rounding(
        quick_jit(functools.partial(shared_passes, loss), static_argnums=2)(*args), expected
    )


def test_parameters_of_other_shapes_are_refused_by_grad_fn():
    params = mlp_params()
    grad_fn = two_pass_value_and_grad(mlp)(params, *BATCH, active=(False, False, True))[2]
    with pytest.raises(ValueError, match=r"argument of grad_fn.*'head'.*\(8, 3\)"):
        grad_fn(dict(params, head=jnp.ones((8, 2))), 0)
    with pytest.raises(ValueError, match=r"argument of grad_fn.*structure"):
        grad_fn({"head": params["head"]}, 0)


def test_it_traces_the_loss_once_leaks_nothing_and_moves_nothing_to_the_host():
    traces = []

    def loss(params, images, labels):
        traces.append(1)
        return jnp.sum((images @ params["embed"] @ params["head"]) ** 2), images

    @functools.partial(quick_jit, static_argnums=1)
    def step(params, active, *batch):
        _, grads, grad_fn = two_pass_value_and_grad(loss, has_aux=True)(params, *batch, active=active)
        return grad_fn(jax.tree.map(jnp.add, params, grads), 0)

    args = (mlp_params(), (False, False, True), *BATCH)
    with jax.checking_leaks():
        step(*args)
    with jax.transfer_guard("disallow"):
        step(*args)
    assert len(traces) == 1
