"""Mask rules: when a mask is refreshed, from which scores, and what is traded."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import strategies as st

from ssam_jax import (
    NM,
    MaskRule,
    Pattern,
    Structured,
    Unstructured,
    alternating,
    carried,
    combine,
    dynamic_mask,
    fisher_mask,
    fixed_mask,
    random_mask,
    ssam,
)
from ssam_jax._base import rounding
from ssam_jax.masks import rule as masks
from ssam_jax.masks.packing import churn

HALF = Unstructured(0.5)
PARAMS = {"bias": jnp.arange(4.0), "kernel": -jnp.arange(12.0).reshape(3, 4)}


class Positive(Pattern):
    """Keeps what is above zero: a pattern that costs no compilation."""

    def __call__(self, scores):
        return jax.tree.map(lambda s: s > 0, scores)


def like(tree, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape, scale=scale), p.dtype), tree)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def run(rule, grads, params=PARAMS):
    """Return the states after each step."""
    state, states = masks.init(rule, params), []
    update = jax.jit(lambda state, g, t: masks.update(rule, state, params, g, g, t))
    for t, g in enumerate(grads):
        state = update(state, g, jnp.int32(t))
        states.append(state)
    return states


# Fisher.


def test_fisher_scores_are_the_running_mean_of_squared_gradients():
    grads = [like(PARAMS, seed) for seed in range(5)]
    expected = np.zeros(16)
    for state, g in zip(run(fisher_mask(Positive(), refresh_every=2, decay=0.8), grads), grads):
        expected = 0.8 * expected + 0.2 * flat(g).astype(np.float64) ** 2
        np.testing.assert_allclose(flat(state.memory), expected, rtol=1e-5)


def test_fisher_refreshes_the_mask_at_the_end_of_every_kth_step():
    rule = fisher_mask(HALF, refresh_every=3, decay=0.5)
    before, grads = masks.init(rule, PARAMS), [like(PARAMS, seed) for seed in range(7)]
    refreshes = []
    for t, state in enumerate(run(rule, grads)):
        if (t + 1) % 3 == 0:
            best = np.argsort(-flat(state.memory), kind="stable")[:8]
            assert set(np.flatnonzero(flat(state.mask))) == set(best)
            came = flat(state.mask) & ~flat(before.mask)
            assert float(state.churn) == came.sum() / 8
            refreshes.append(t)
        else:
            np.testing.assert_array_equal(flat(state.mask), flat(before.mask))
            assert state.churn == before.churn
        before = state
    assert refreshes == [2, 5]


def test_a_step_uses_the_mask_made_at_the_end_of_the_step_before():
    rule = fisher_mask(Unstructured(0.75), refresh_every=1, decay=0.0)
    tx = ssam(1.0, rule)

    @jax.jit
    def step(state, descent):
        seen = []

        def grad_fn(params, i):
            seen.append(params)
            return descent

        _, state = tx.update(jnp.ones(4), state, jnp.zeros(4), grad_fn=grad_fn)
        return seen[0], state

    state = tx.init(jnp.zeros(4))
    for steep in (2, 0, 3):
        used = np.asarray(state.mask.mask)
        point, state = step(state, jnp.zeros(4).at[steep].set(5.0))
        np.testing.assert_allclose(point, np.where(used, 0.5, 0.0), rtol=1e-6)
        assert np.flatnonzero(state.mask.mask).tolist() == [steep]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradient_entries_that_are_not_finite_leave_the_mean(bad):
    rule = fisher_mask(Positive(), refresh_every=9, decay=0.5)
    good = {"bias": jnp.full(4, 2.0), "kernel": jnp.full((3, 4), 2.0)}
    spoilt = {"bias": good["bias"].at[1].set(bad), "kernel": good["kernel"]}
    states = run(rule, [good, spoilt])
    assert states[0].memory["bias"].tolist() == [2.0] * 4
    assert states[1].memory["bias"].tolist() == [3.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_accumulators_have_the_dtype_asked_for_and_are_computed_in_float32(dtype):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    rule = fisher_mask(Positive(), refresh_every=9, decay=0.9, accumulator_dtype=dtype)
    grads = [like(params, seed) for seed in range(3)]
    expected = np.zeros(16, np.float32)
    for state, g in zip(run(rule, grads, params), grads):
        assert {leaf.dtype for leaf in jax.tree.leaves(state.memory)} == {jnp.dtype(dtype)}
        mean = 0.9 * expected + 0.1 * flat(g).astype(np.float32) ** 2
        expected = mean.astype(dtype).astype(np.float32)
        np.testing.assert_allclose(flat(state.memory).astype(np.float32), expected, rtol=1e-2)


@pytest.mark.parametrize("decay", [0.95, 0.998])
def test_means_in_bfloat16_do_not_stall(decay):
    """Beside float32: on a constant gradient, after a fall to a thousandth in size, and on a noisy one."""
    params = jnp.zeros(256)
    steep = np.random.default_rng(0).normal(size=256).astype(np.float32)
    rules = [
        fisher_mask(Positive(), refresh_every=9, decay=decay, accumulator_dtype=dtype)
        for dtype in (jnp.float32, jnp.bfloat16)
    ]

    @jax.jit
    def means(memories, start, size, roughness):
        def observe(memories, step):
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (256,))
            grads = size * steep * (1 + roughness * noise)
            seen = [rule.observe(m, params, None, grads, step) for rule, m in zip(rules, memories)]
            return seen, seen[1].astype(jnp.float32) / seen[0]

        memories, ratios = jax.lax.scan(observe, memories, start + jnp.arange(4000))
        return memories, jnp.mean(ratios[3000:]), jnp.max(jnp.abs(ratios[-1] - 1))

    memories = [rule.init(params) for rule in rules]
    for start, (size, roughness) in enumerate([(1.0, 0.0), (0.03, 0.0), (1.0, 1.0)]):
        memories, ratio, worst = means(memories, 4000 * start, size, roughness)
        np.testing.assert_allclose(ratio, 1, atol=0.03)
        assert worst < (0.15 if roughness else 0.05)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, 3.39e38, np.nan])
def test_a_number_rounded_by_turns_is_right_on_average_and_stays_finite(value):
    x = jnp.float32(value) * jnp.float32(1 + 2**-9)  # a quarter of the way to the next
    each = [float(rounding.rounded(x, jnp.bfloat16, jnp.int32(i))) for i in range(1, 101)]
    largest = float(jnp.finfo(jnp.bfloat16).max)
    np.testing.assert_allclose(np.mean(each), min(float(x), largest), rtol=1e-4)
    assert len(set(each)) == (2 if 0 < value < largest else 1) or np.isnan(value)


def test_without_refresh_fisher_keeps_no_accumulators_and_never_changes():
    rule = fisher_mask(HALF, refresh_every=None)
    state = masks.init(rule, PARAMS)
    assert state.memory == ()
    assert flat(state.mask).sum() == 8
    tiny.assert_same(masks.update(rule, state, PARAMS, None, PARAMS, jnp.int32(0)), state)


# Dynamic.

KINDS = {
    "global": HALF,
    "leaf": Unstructured(0.5, "leaf"),
    "channel": Structured(0.4, "channel"),
    "block": Structured(0.4, "block", block=(3, 2), indivisible="whole"),
}
END = 8


@functools.cache
def trader(kind, drop, grow):
    rule = dynamic_mask(
        KINDS[kind], refresh_every=2, total_steps=END, drop=drop, grow=grow, drop_fraction=0.9
    )
    return jax.jit(lambda mask, grads, step: masks.update(rule, *start(rule, mask), None, grads, step))


def start(rule, mask):
    return jax.eval_shape(lambda: masks.init(rule, PARAMS))._replace(
        bits=mask, churn=jnp.float32(0), key=KEY
    ), PARAMS


KEY = jax.random.key_data(jax.random.key(5))


def units(kind, tree):
    """Return each account's scores by unit: the whole tree, or each leaf."""
    leaves = [np.asarray(leaf) for leaf in (tree["bias"], tree["kernel"])]
    if kind == "global":
        return [flat(tree)]
    if kind == "channel":
        return [leaves[0], leaves[1].mean(axis=0)]
    if kind == "block":
        return [leaves[0].mean(keepdims=True), leaves[1].reshape(3, 2, 2).mean(axis=(0, 2))]
    return [leaf.reshape(-1) for leaf in leaves]


def draw_mask(kind, rng):
    if kind == "channel":
        return {"bias": jnp.asarray(rng.random(4) < 0.6), "kernel": jnp.asarray(rng.random((1, 4)) < 0.6)}
    if kind == "block":
        halves = np.repeat(rng.random(2) < 0.6, 2)[None].repeat(3, axis=0)
        return {"bias": jnp.asarray(rng.random() < 0.6), "kernel": jnp.asarray(halves)}
    return {"bias": jnp.asarray(rng.random(4) < 0.6), "kernel": jnp.asarray(rng.random((3, 4)) < 0.6)}


def unit_mask(kind, mask):
    if kind == "global":
        return [flat(mask)]
    if kind == "block":
        return [np.asarray(mask["bias"])[None], np.asarray(mask["kernel"])[0, ::2]]
    return [np.ravel(mask["bias"]), np.ravel(mask["kernel"])]


def trade_size(step, active, inactive):
    fraction = 0.9 / 2 * (1 + np.cos(np.pi * min(step / END, 1)))
    hypothesis.assume(abs(fraction * active % 1 - 0.5) > 1e-3)
    return min(round(fraction * active), inactive)


@pytest.mark.parametrize(
    "kind, drop, grow",
    [
        ("global", "gradient", "random"),
        ("global", "weight", "gradient"),
        ("leaf", "gradient", "weight"),
        ("leaf", "random", "gradient"),
        ("channel", "gradient", "gradient"),
        ("block", "gradient", "weight"),
    ],
)
@hypothesis.given(step=st.integers(0, END // 2 + 1).map(lambda i: 2 * i + 1), seed=st.integers(0, 999))
def test_a_trade_drops_the_lowest_grows_the_highest_and_keeps_the_density(kind, drop, grow, step, seed):
    rng = np.random.default_rng(seed)
    grads, mask = like(PARAMS, seed), draw_mask(kind, rng)
    state = trader(kind, drop, grow)(mask, grads, jnp.int32(step))
    scores = {"gradient": jax.tree.map(jnp.abs, grads), "weight": jax.tree.map(jnp.abs, PARAMS)}
    old, new = unit_mask(kind, mask), unit_mask(kind, state.mask)
    for i, (before, after) in enumerate(zip(old, new)):
        count = trade_size(step, before.sum(), (~before).sum())
        dropped, grown = np.flatnonzero(before & ~after), np.flatnonzero(after & ~before)
        assert len(dropped) == len(grown) == count
        if drop in scores:
            score = units(kind, scores[drop])[i]
            order = sorted(np.flatnonzero(before), key=lambda j: (score[j], -j))
            assert set(dropped) == set(order[:count])
        if grow in scores:
            score = units(kind, scores[grow])[i]
            order = sorted(np.flatnonzero(~before), key=lambda j: (-score[j], j))
            assert set(grown) == set(order[:count])


def perturbed(params, ascent_grads, descent_grads):
    """|w + eps|, by which the authors' code drops for "weight"; a mask would not change the active ones."""
    return jax.tree.map(lambda p, g: p + 3.0 * g, params, ascent_grads)


@pytest.mark.parametrize(
    "drop, grow, score, to_keep, to_grow",
    [
        ("gradient", "gradient", "descent", "descent", "descent"),
        ("gradient", "gradient", "ascent", "ascent", "ascent"),
        (perturbed, "gradient", "ascent", "point", "ascent"),
        ("weight", lambda params, ascent, descent: descent, "descent", "weight", "descent"),
    ],
)
def test_a_score_is_of_either_gradient_or_a_function_of_both(drop, grow, score, to_keep, to_grow):
    ascent, descent = like(PARAMS, 1), like(PARAMS, 2)
    sizes = {"ascent": ascent, "descent": descent, "weight": PARAMS, "point": perturbed(PARAMS, ascent, None)}
    sizes = {name: abs(flat(tree)) for name, tree in sizes.items()}
    mask = jax.tree.map(lambda p: jnp.arange(p.size).reshape(p.shape) % 2 == 0, PARAMS)
    rule = dynamic_mask(
        HALF, refresh_every=1, drop_fraction=lambda step: 0.5, drop=drop, grow=grow, score=score
    )
    update = jax.jit(lambda mask: masks.update(rule, *start(rule, mask), ascent, descent, jnp.int32(0)))
    after = flat(update(mask).mask)
    before = flat(mask)
    count = round(before.sum() / 2)
    active = sorted(np.flatnonzero(before), key=lambda i: -sizes[to_keep][i])
    idle = sorted(np.flatnonzero(~before), key=lambda i: -sizes[to_grow][i])
    assert set(np.flatnonzero(after)) == {*active[: len(active) - count], *idle[:count]}


def test_scores_of_the_ascent_gradient_need_one():
    rule = dynamic_mask(HALF, refresh_every=1, total_steps=9, score="ascent")
    tx, grads = carried(optax.sgd(0.1), 0.1, rule), PARAMS
    with pytest.raises(
        ValueError, match=r"needs the complete gradient at w.*combine=ssam_jax.combine.replace"
    ):
        tx.update(grads, tx.init(PARAMS), PARAMS)
    tx = alternating(optax.sgd(0.1), 0.1, rule, combine=combine.replace())
    jax.eval_shape(tx.update, grads, tx.init(PARAMS), PARAMS)


def test_random_growth_differs_from_step_to_step_and_is_repeatable():
    mask = draw_mask("global", np.random.default_rng(0))
    grads = like(PARAMS, 0)
    trade = trader("global", "gradient", "random")
    once, again, later = (flat(trade(mask, grads, jnp.int32(t)).mask) for t in (1, 1, 3))
    np.testing.assert_array_equal(once, again)
    assert (once != later).any()


def test_between_refreshes_and_from_the_end_on_nothing_is_traded():
    mask = draw_mask("global", np.random.default_rng(0))
    trade = trader("global", "gradient", "random")
    for step in (0, 2, 4, END, END + 1, END + 3):
        np.testing.assert_array_equal(flat(trade(mask, like(PARAMS, 1), jnp.int32(step)).mask), flat(mask))
    assert float(trade(mask, like(PARAMS, 1), jnp.int32(END + 1)).churn) == 0


@pytest.mark.parametrize("total_steps", [None, 2])
def test_a_schedule_gives_the_fraction_itself_until_the_end(total_steps):
    def schedule(step):
        return jnp.array([0.5, 0.25, 0.125])[step]

    rule = dynamic_mask(HALF, refresh_every=1, drop_fraction=schedule, total_steps=total_steps)
    states = [masks.init(rule, PARAMS), *run(rule, [like(PARAMS, seed) for seed in range(3)])]
    changes = [(flat(a.mask) & ~flat(b.mask)).sum() for a, b in itertools.pairwise(states)]
    assert changes == [4, 2, 0 if total_steps else 1]
    np.testing.assert_allclose([s.churn for s in states], [0, *(c / 8 for c in changes)])


def test_dynamic_masks_of_trees_without_leaves_stay_empty():
    rule = dynamic_mask(HALF, refresh_every=1, total_steps=2)
    state = masks.init(rule, {"a": None})
    assert masks.update(rule, state, {"a": None}, None, {"a": None}, jnp.int32(0)).mask == {"a": None}


# Random and fixed.


def test_a_random_mask_is_drawn_anew_on_refresh_alone():
    rule = random_mask(HALF, refresh_every=2, seed=3)
    seen = [flat(state.mask) for state in run(rule, [PARAMS] * 4)]
    first = flat(masks.init(rule, PARAMS).mask)
    np.testing.assert_array_equal(seen[0], first)
    np.testing.assert_array_equal(seen[1], seen[2])
    assert (seen[0] != seen[1]).any() and (seen[2] != seen[3]).any()
    assert {int(mask.sum()) for mask in seen} == {8}


def test_a_random_mask_without_refresh_stays():
    rule = random_mask(HALF)
    for state in run(rule, [PARAMS] * 2):
        np.testing.assert_array_equal(flat(state.mask), flat(masks.init(rule, PARAMS).mask))


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: random_mask(HALF, seed=seed),
        lambda seed: fisher_mask(HALF, refresh_every=1, seed=seed),
        lambda seed: dynamic_mask(HALF, refresh_every=1, total_steps=9, seed=seed),
    ],
    ids=["random", "fisher", "dynamic"],
)
def test_seeds_may_be_traced_and_each_gives_its_own_mask(make):
    drawn = jax.jit(jax.vmap(lambda seed: masks.init(make(seed), PARAMS).mask))(jnp.arange(4))
    rows = np.concatenate([np.reshape(leaf, (4, -1)) for leaf in jax.tree.leaves(drawn)], axis=1)
    assert (rows.sum(axis=1) == 8).all()
    assert len({row.tobytes() for row in rows}) == 4
    np.testing.assert_array_equal(rows[2], flat(jax.jit(lambda: masks.init(make(2), PARAMS).mask)()))


def test_a_fixed_mask_may_be_a_tree_a_prefix_or_a_predicate():
    params = {"block": PARAMS, "head": PARAMS}
    bias_only = {"bias": jnp.array(True), "kernel": jnp.array(False)}
    tree = masks.init(fixed_mask({"block": bias_only, "head": bias_only}), params).mask
    by_path = masks.init(fixed_mask(lambda path: path.endswith("/bias")), params).mask
    prefix = fixed_mask({"block": True, "head": {"bias": np.array([True] * 4), "kernel": False}})
    assert tree == by_path == {"block": bias_only, "head": bias_only}
    mask = masks.init(prefix, params).mask
    assert bool(mask["block"]["kernel"]) and bool(mask["block"]["bias"])
    assert mask["head"]["bias"].tolist() == [True] * 4 and not mask["head"]["kernel"]


def test_a_fixed_mask_sees_full_paths_and_is_never_refreshed():
    seen = []
    rule = fixed_mask(lambda path: not seen.append(path))
    state = masks.init(rule, {"a": [jnp.ones(1), {"b": jnp.ones(1)}], "none": None})
    assert seen == ["a/0", "a/1/b"]
    tiny.assert_same(masks.update(rule, state, None, None, None, 0, anything=1), state)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        ({"bias": True}, ValueError, "the tree given to fixed_mask must be a prefix of the parameters' tree"),
        ({"bias": 1, "kernel": True}, TypeError, "the mask must be bool, but its leaf 'bias' is int32"),
        (lambda path: 1.0, TypeError, "must return a bool, got 1.0 for 'bias'"),
        (
            {"bias": np.ones(3, bool), "kernel": True},
            ValueError,
            r"the mask's leaf 'bias' of shape \(3,\) does not broadcast against \(4,\)",
        ),
        (
            {"bias": np.ones((1, 4), bool), "kernel": True},
            ValueError,
            r"the mask's leaf 'bias' of shape \(1, 4\) does not broadcast against \(4,\)",
        ),
    ],
)
def test_a_fixed_mask_that_does_not_fit_is_refused_by_path(mask, error, message):
    with pytest.raises(error, match=message):
        masks.init(fixed_mask(mask), PARAMS)


@pytest.mark.parametrize("answer", [None, "yes"])
def test_a_predicate_that_does_not_answer_with_a_bool_is_a_type_error(answer):
    with pytest.raises(TypeError, match="the predicate given to fixed_mask must return a bool, got"):
        masks.init(fixed_mask(lambda path: answer), PARAMS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: random_mask(Positive()),
        lambda: dynamic_mask(HALF, refresh_every=9, total_steps=9),
        lambda: fixed_mask({"bias": jnp.ones(4, bool), "kernel": jnp.array(True)}),
        lambda: fixed_mask(jnp.array(True)),
    ],
    ids=["random", "dynamic", "fixed tree", "fixed prefix"],
)
def test_a_state_can_be_donated_and_made_again(make):
    rule = make()
    donate = jax.jit(lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0)
    first = donate(masks.init(rule, PARAMS))
    again = donate(masks.init(rule, PARAMS))
    np.testing.assert_array_equal(flat(first.mask), flat(again.mask))


# A rule of one's own.


def test_a_user_may_write_a_rule():
    seen, points = [], []

    def observe(memory, params, ascent_grads, descent_grads, step, **extra):
        assert ascent_grads is grads and extra == {"value": 7}
        return memory + descent_grads

    def select(memory, mask, params, key, step):
        seen.append((memory, mask, step))
        return jnp.array(True) if mask is None else jnp.logical_not(mask)

    grads = jnp.array([3.0, 4.0])
    tx = ssam(1.0, MaskRule(lambda params: jnp.zeros(2), observe, select, 1))
    state = tx.init(grads)
    assert seen[0][1] is None and int(seen[0][2]) == 0
    for _ in range(2):

        def grad_fn(p, i):
            return (points.append(p.tolist()), grads)[1]

        _, state = tx.update(grads, state, jnp.zeros(2), grad_fn=grad_fn, value=7)
    np.testing.assert_allclose(points, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    assert state.mask.memory.tolist() == [6.0, 8.0]


def test_the_largest_weights_take_a_rule_of_one_line():
    rule = MaskRule(select=lambda memory, mask, params, key, step: HALF(jax.tree.map(jnp.abs, params)))
    mask = masks.init(rule, {"w": jnp.array([1.0, -4.0, 3.0, 2.0])}).mask
    assert mask["w"].tolist() == [False, True, True, False]


def test_a_rule_that_keeps_no_memory_sees_what_it_observed_in_the_same_step_alone():
    seen = []

    def observe(memory, params, ascent_grads, descent_grads, step, **extra):
        assert memory == ()
        return descent_grads

    def select(memory, mask, params, key, step):
        seen.append(memory)
        return jnp.ones(2, bool)

    rule = MaskRule(None, observe, select, 1, keeps_memory=False)
    state = masks.init(rule, jnp.zeros(2))
    for _ in range(2):
        state = masks.update(rule, state, jnp.zeros(2), None, jnp.ones(2), jnp.int32(0))
        assert state.memory == ()
    assert seen[0] == () and all(jnp.shape(memory) == (2,) for memory in seen[1:])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, TypeError, "select must be a function, got None"),
        ({"select": 1}, TypeError, "select must be a function, got 1"),
        ({"select": len, "init": 1}, TypeError, "init must be a function or None, got 1"),
        ({"select": len, "observe": 1}, TypeError, "observe must be a function or None, got 1"),
        ({"select": len, "packed": 1}, TypeError, "packed must be a bool, got 1"),
        ({"select": len, "keeps_memory": 1}, TypeError, "keeps_memory must be a bool, got 1"),
        ({"select": len, "refresh_every": 0}, ValueError, "refresh_every must be at least 1, or None, got 0"),
        ({"select": len, "seed": "x"}, TypeError, "seed must be an integer, got 'x'"),
    ],
)
def test_a_rule_that_cannot_be_one_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        MaskRule(**options)


def test_a_predicate_that_is_true_of_nothing_is_refused_with_some_paths():
    with pytest.raises(ValueError, match=r"False for every parameter.*the 2 paths are 'bias', 'kernel'"):
        masks.init(fixed_mask(lambda path: "norm" in path), PARAMS)


def test_churn_is_the_share_of_new_entries():
    old = {"a": jnp.array([True, False, True]), "b": jnp.array(False)}
    new = {"a": jnp.array([False, True, True]), "b": jnp.array(True)}
    assert float(churn(old, new)) == pytest.approx(2 / 3)
    assert float(churn(old, jax.tree.map(jnp.zeros_like, old))) == 0
    assert float(churn({}, {})) == 0


# Refusals.

RULES = {
    "random": random_mask,
    "fisher": lambda pattern, **options: fisher_mask(pattern, **{"refresh_every": 1, **options}),
    "dynamic": lambda pattern, **options: dynamic_mask(
        pattern, **{"refresh_every": 1, "total_steps": 9, **options}
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"refresh_every": 0}, ValueError, "refresh_every must be at least 1, or None, got 0"),
        ({"refresh_every": -1}, ValueError, "refresh_every must be at least 1, or None, got -1"),
        (
            {"refresh_every": 2.0},
            TypeError,
            r"refresh_every must be an int of at least 1, or None, got 2\.0",
        ),
        (
            {"refresh_every": True},
            TypeError,
            "refresh_every must be an int of at least 1, or None, got True",
        ),
        ({"seed": 1.5}, TypeError, r"seed must be an integer, got 1\.5"),
        ({"seed": True}, TypeError, "seed must be an integer, got True"),
        ({"seed": np.array([1])}, TypeError, "seed must be an integer, got array"),
    ],
)
def test_every_rule_refuses_options_out_of_range(rule, options, error, message):
    with pytest.raises(error, match=message):
        RULES[rule](HALF, **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pattern", [0.5, None, "unstructured", len], ids=str)
def test_every_rule_refuses_what_is_no_pattern(rule, pattern):
    with pytest.raises(TypeError, match=r"pattern must be a Pattern such as Unstructured\(sparsity=0.5\)"):
        RULES[rule](pattern)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, float("nan")])
def test_fisher_refuses_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="decay must be from 0 to below 1, got"):
        RULES["fisher"](HALF, decay=decay)


@pytest.mark.parametrize("dtype", [jnp.int32, bool, jnp.complex64, jnp.float16, None])
def test_fisher_refuses_accumulators_that_would_overflow_or_are_no_floats(dtype):
    with pytest.raises(ValueError, match="accumulator_dtype must be float32, bfloat16 or float64, got"):
        RULES["fisher"](HALF, accumulator_dtype=dtype)


@pytest.mark.parametrize(
    "pattern, error, message",
    [
        (NM(2, 4), ValueError, "dynamic_mask cannot keep an N:M pattern: a trade would leave some groups"),
        (Structured(0.5), ValueError, "dynamic_mask cannot trade whole tensors: their sizes differ"),
        (Positive(), TypeError, "dynamic_mask takes Unstructured or Structured, got"),
    ],
)
def test_dynamic_refuses_patterns_that_cannot_be_traded(pattern, error, message):
    with pytest.raises(error, match=message):
        RULES["dynamic"](pattern)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"refresh_every": None}, ValueError, "refresh_every must be an int: without refresh, use random"),
        (
            {"drop": "loss"},
            ValueError,
            "drop must be 'gradient', 'weight' or 'random', or a function of .*'loss'",
        ),
        (
            {"grow": None},
            ValueError,
            "grow must be 'gradient', 'weight' or 'random', or a function of .*None",
        ),
        ({"total_steps": None}, TypeError, "total_steps must be an int of at least 1; .*got None"),
        ({"total_steps": 1e3}, TypeError, r"total_steps must be an int of at least 1; .*got 1000\.0"),
        ({"total_steps": True}, TypeError, "total_steps must be an int of at least 1; .*got True"),
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1, got 0"),
        ({"drop_fraction": 1.1}, ValueError, r"drop_fraction must be from 0 to 1, got 1\.1"),
        ({"drop_fraction": -0.1}, ValueError, r"drop_fraction must be from 0 to 1, got -0\.1"),
        ({"drop_fraction": "half"}, TypeError, "drop_fraction must be a float from 0 to 1 or a schedule"),
        ({"drop_fraction": True}, TypeError, "drop_fraction must be a float from 0 to 1 or a schedule"),
    ],
)
def test_dynamic_refuses_options_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        RULES["dynamic"](HALF, **options)


def test_a_pattern_that_cannot_be_hashed_is_refused():
    class Mutable(Positive):
        __hash__ = None

    with pytest.raises(TypeError, match="pattern must be hashable"):
        random_mask(Mutable())


def test_a_first_mask_needs_no_common_device_of_the_parameters():
    first, second = jax.devices()[:2]
    params = {"a": jax.device_put(jnp.ones((2, 4)), first), "b": jax.device_put(jnp.ones((2, 4)), second)}
    mask = masks.init(random_mask(NM(1, 2)), params).mask
    assert [int(leaf.sum()) for leaf in jax.tree.leaves(mask)] == [4, 4]
    assert [leaf.devices() for leaf in jax.tree.leaves(mask)] == [{first}, {second}]
