"""One contract that every mask rule passes with every pattern it allows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import ssam_jax
from ssam_jax import NM, Structured, Unstructured

REFRESH = 7
STEPS = len(tiny.BATCHES)
SIZE = sum(leaf.size for leaf in jax.tree.leaves(tiny.PARAMS))

PATTERNS = {
    "global": Unstructured(0.5),
    "leaf": Unstructured(0.5, scope="leaf"),
    "tensor": Structured(0.5, unit="tensor"),
    "channel": Structured(0.5, unit="channel", axis=-1),
    "block": Structured(0.5, unit="block", axis=(-2, -1), block=(2, 2)),
    "nm": NM(2, 4),
}
# Of 52 parameters 26 are to be kept. A structured pattern may exceed them by a unit less one entry;
# N:M keeps the 4 biases whole and half of the 48 other entries.
KEPT = {
    "global": (26, 26),
    "leaf": (26, 26),
    "tensor": (26, 26 + 31),
    "channel": (26, 26 + 3),
    "block": (26, 26 + 3),
    "nm": (28, 28),
    "fixed": (20, 20),
}


BASES = {
    "adam": lambda: tiny.may_promote(optax.adam(1e-2)),
    "sgd": lambda: tiny.may_promote(optax.sgd(1e-1, momentum=0.9)),
    "lion": lambda: tiny.may_promote(optax.lion(1e-2)),
}


def fisher(pattern, seed):
    return ssam_jax.fisher_mask(pattern, refresh_every=REFRESH, seed=seed)


def dynamic(pattern, seed):
    return ssam_jax.dynamic_mask(pattern, refresh_every=REFRESH, total_steps=STEPS, seed=seed)


def random(pattern, seed):
    return ssam_jax.random_mask(pattern, refresh_every=REFRESH, seed=seed)


RULES = {
    **{("fisher", name): functools.partial(fisher, pattern) for name, pattern in PATTERNS.items()},
    **{("random", name): functools.partial(random, pattern) for name, pattern in PATTERNS.items()},
    **{
        ("dynamic", name): functools.partial(dynamic, PATTERNS[name])
        for name in ("global", "leaf", "channel", "block")
    },
    ("fixed", "fixed"): lambda seed: ssam_jax.fixed_mask(lambda path: path.startswith("first")),
    ("dense", "none"): lambda seed: None,
}
# Every rule and every pattern meets every optimizer.
CASES = [(*key, list(BASES)[i % 3]) for i, key in enumerate(RULES)]
# Every rule and every pattern meets vmap and scan; all pairs would take a quarter of a minute more.
SCANNED = {key for i, key in enumerate(RULES) if (i + i // 6) % 2 == 0} | {("dense", "none")}


@pytest.mark.parametrize(("rule", "pattern", "base"), CASES, ids=map(" ".join, CASES))
def test_every_rule_keeps_the_contract_with_every_pattern(rule, pattern, base):
    def make(seed):
        return optax.chain(ssam_jax.ssam(rho=0.1, mask=RULES[rule, pattern](seed)), BASES[base]())

    tx = make(0)
    init = jax.jit(lambda seed: make(seed).init(tiny.params()))
    check_abstract_init_agrees_with_the_real_one(tx, init(0))
    step = jax.jit(tiny.step_of(tx), donate_argnums=(0, 1))
    runs = [loop(step, init(seed)) for seed in (0, 1)]
    assert step._cache_size() == 1
    check_a_jitted_step_equals_a_plain_one(tx, runs[0])
    check_the_mask_keeps_its_size_and_changes_at_refreshes_alone(runs[0], pattern, traded=rule == "dynamic")
    if (rule, pattern) in SCANNED:
        check_a_vmapped_scan_equals_the_loops(tx, init, runs)


def loop(step, state):
    """Run the donating step over the batches; return what it was given and at last gave, on the host."""
    params, seen = tiny.params(), []
    before = tiny.spec((params, state))
    for batch in tiny.BATCHES:
        seen.append(on_host((params, state)))
        given = jax.tree.leaves((params, state))
        params, state = step(params, state, batch)
        assert all(leaf.is_deleted() for leaf in given), "a donated buffer was not reused"
        assert tiny.spec((params, state)) == before
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(on_host(params)))
    assert tiny.differ(params, tiny.PARAMS)
    return [*seen, on_host((params, state))]


def on_host(tree):
    return jax.tree.map(np.array, tree)


def check_abstract_init_agrees_with_the_real_one(tx, state):
    assert tiny.spec(jax.eval_shape(tx.init, tiny.PARAMS)) == tiny.spec(state)


def check_a_jitted_step_equals_a_plain_one(tx, run):
    before, after, batch = run[REFRESH - 1], run[REFRESH], tiny.BATCHES[REFRESH - 1]  # a refresh
    plain = tiny.step_of(tx)(*jax.tree.map(jnp.array, before), jnp.array(batch))
    tiny.assert_close(plain, after)


def check_the_mask_keeps_its_size_and_changes_at_refreshes_alone(run, pattern, traded):
    masks = [ssam_jax.get_mask(state) for _, state in run]
    if pattern == "none":
        assert masks == [None] * len(masks)
        return
    least, most = KEPT[pattern]
    assert all(least <= sum(kept_by_leaf(mask)) <= most for mask in masks)
    if traded:
        by_leaf = pattern != "global"  # traded over the whole tree
        counts = {tuple(kept_by_leaf(m)) if by_leaf else sum(kept_by_leaf(m)) for m in masks}
        assert len(counts) == 1
    changed = [i for i in range(1, len(masks)) if tiny.differ(masks[i - 1], masks[i])]
    refreshes = [] if pattern == "fixed" else [REFRESH, 2 * REFRESH]
    if pattern == "tensor":  # of three tensors the same may be chosen again
        assert set(changed) <= set(refreshes)
    else:
        assert changed == refreshes


def kept_by_leaf(mask):
    pairs = zip(jax.tree.leaves(mask), jax.tree.leaves(tiny.PARAMS))
    return [int(np.broadcast_to(m, p.shape).sum()) for m, p in pairs]


def check_a_vmapped_scan_equals_the_loops(tx, init, runs):
    step = tiny.step_of(tx)

    def train(params, state):
        def body(carry, batch):
            return step(*carry, batch), None

        return jax.lax.scan(body, (params, state), jnp.array(tiny.BATCHES))[0]

    states = jax.tree.map(lambda *x: jnp.stack(x), init(0), init(1))
    ends = jax.jit(jax.vmap(train, in_axes=(None, 0)))(tiny.params(), states)
    for i, run in enumerate(runs):
        tiny.assert_close(jax.tree.map(lambda x, i=i: x[i], ends), run[-1])


@pytest.mark.parametrize("base", BASES)
def test_a_chain_hands_the_gradient_at_the_perturbed_point_to_its_optimizer(base):
    rule = ssam_jax.fixed_mask(lambda path: path.startswith("first"))
    params, grad_fn = tiny.params(), tiny.grad_fn_of(tiny.BATCHES[0])
    grads, optimizer = grad_fn(params, 0), BASES[base]()
    tx = optax.chain(ssam_jax.ssam(rho=0.1, mask=rule), optimizer)
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    moved = jax.tree.map(lambda p, g: p + 0.1 / length * g, params["first"], grads["first"])
    descent = grad_fn({**params, "first": moved}, 0)
    tiny.assert_close(updates, optimizer.update(descent, optimizer.init(params), params)[0], atol=1e-6)


def test_scan_without_vmap_where_a_refresh_stays_a_conditional_equals_the_python_loop():
    tx = optax.chain(ssam_jax.ssam(rho=0.1, mask=RULES["dynamic", "channel"](0)), optax.sgd(0.1))
    step, start = tiny.step_of(tx), (tiny.params(), jax.jit(tx.init)(tiny.params()))
    scanned, _ = jax.jit(lambda c: jax.lax.scan(lambda c, b: (step(*c, b), None), c, tiny.BATCHES))(start)
    compiled = jax.jit(step)
    for batch in tiny.BATCHES:
        start = compiled(*start, batch)
    tiny.assert_close(scanned, start)


@pytest.mark.parametrize("rule", ["fisher", "random", "dynamic"])
def test_a_rule_starts_anew_after_its_state_was_donated(rule):
    tx = ssam_jax.ssam(rho=0.1, mask=RULES[rule, "channel"](0))
    state = tx.init(tiny.params())
    first = on_host(state)
    jax.jit(lambda s: jax.tree.map(lambda x: x, s), donate_argnums=0)(state)
    tiny.assert_same(on_host(tx.init(tiny.params())), first)


def test_a_fixed_mask_starts_anew_after_its_state_was_donated():
    mask = jax.tree.map(lambda p: jnp.array(p > 0), tiny.PARAMS)
    tx = ssam_jax.ssam(rho=0.1, mask=ssam_jax.fixed_mask(mask))
    jax.jit(lambda s: jax.tree.map(lambda x: x, s), donate_argnums=0)(tx.init(tiny.params()))
    tiny.assert_same(ssam_jax.get_mask(tx.init(tiny.params())), jax.tree.map(lambda p: p > 0, tiny.PARAMS))


def test_alternating_allows_the_donation_of_parameters_and_state_together():
    tx = ssam_jax.alternating(optax.sgd(0.1), rho=0.1)

    def step(params, state, batch):
        updates, state = tx.update(jax.grad(tiny.loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params = tiny.params()
    expected = step(tiny.params(), tx.init(tiny.params()), tiny.BATCHES[0])
    tiny.assert_close(
        jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params), tiny.BATCHES[0]), expected
    )


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (NM(2, 4), "cannot keep an N:M pattern: a trade would leave some groups with more than n"),
        (Structured(0.5, unit="tensor"), "cannot trade whole tensors: their sizes differ"),
    ],
    ids=["nm", "tensor"],
)
def test_dynamic_mask_refuses_what_it_cannot_trade_and_says_why(pattern, reason):
    with pytest.raises(ValueError, match=reason):
        dynamic(pattern, 0)


@pytest.mark.parametrize("rule", [fisher, random, dynamic])
def test_a_rule_refuses_what_is_no_pattern(rule):
    with pytest.raises(TypeError, match=r"pattern must be a Pattern such as Unstructured.*0\.5"):
        rule(0.5, 0)


def test_every_rule_and_every_pattern_is_scanned():
    assert {rule for rule, _ in SCANNED} == {rule for rule, _ in RULES}
    assert {pattern for _, pattern in SCANNED} == {pattern for _, pattern in RULES}


def test_every_allowed_combination_is_in_the_contract():
    allowed = {
        (rule.__name__, name)
        for rule in (fisher, random, dynamic)
        for name in PATTERNS
        if accepts(rule, name)
    }
    assert allowed == set(RULES) - {("fixed", "fixed"), ("dense", "none")}


def accepts(rule, pattern):
    try:
        rule(PATTERNS[pattern], 0)
    except ValueError:
        return False
    return True
