"""`get_mask`, `set_mask`, `active_leaves` and `mask_stats`; what the state weighs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import ssam_jax
from ssam_jax import NM, Structured, Unstructured

PARAMS = {"a": np.zeros((2, 4), np.float32), "b": np.zeros(2, np.float32)}
FULL = {"a": np.array([[1, 0, 0, 1], [0, 0, 1, 0]], bool), "b": np.array([0, 1], bool)}
NONE = {"a": np.zeros((2, 4), bool), "b": np.zeros(2, bool)}
ALL = {"a": np.ones((2, 4), bool), "b": np.ones(2, bool)}
BY_COLUMN = {"a": np.array([[True, False, False, True]]), "b": np.array([False, True])}
BY_TENSOR = {"a": np.array(True), "b": np.array(False)}


def settable(pattern):
    return ssam_jax.fisher_mask(pattern, refresh_every=None)


def state_with(mask, params=PARAMS):
    return chain(ssam_jax.fixed_mask(mask)).init(params)


def chain(rule):
    return optax.chain(ssam_jax.ssam(rho=1.0, mask=rule), optax.sgd(1.0))


# mask_stats


@pytest.mark.parametrize(
    ("mask", "density", "a", "b"),
    [
        (FULL, 0.4, 3 / 8, 1 / 2),
        (NONE, 0.0, 0.0, 0.0),
        (ALL, 1.0, 1.0, 1.0),
        (BY_COLUMN, 0.5, 1 / 2, 1 / 2),
        (BY_TENSOR, 0.8, 1.0, 0.0),
        ({"a": np.array([[True], [False]]), "b": np.array(True)}, 0.6, 1 / 2, 1.0),
        ({"a": FULL["a"], "b": np.array(False)}, 0.3, 3 / 8, 0.0),
    ],
    ids=["full", "none", "all", "column", "tensor", "row", "scalar beside full"],
)
def test_densities_are_those_counted_by_hand(mask, density, a, b):
    stats = ssam_jax.mask_stats(state_with(mask))
    assert float(stats.density) == pytest.approx(density)
    assert {k: float(v) for k, v in stats.by_leaf.items()} == pytest.approx({"a": a, "b": b})
    assert float(stats.churn) == 0


def test_leaves_are_named_by_their_paths():
    state = state_with({"x": True}, {"x": {"y": np.zeros(3, np.float32), "z": [np.zeros(2, np.float32)]}})
    assert list(ssam_jax.mask_stats(state).by_leaf) == ["x/y", "x/z/0"]


def test_dense_sam_has_density_one_and_no_mask():
    state = chain(None).init(PARAMS)
    stats = ssam_jax.mask_stats(state)
    assert (float(stats.density), stats.by_leaf, float(stats.churn)) == (1.0, {}, 0.0)
    assert ssam_jax.get_mask(state) is None
    assert ssam_jax.active_leaves(state) == (True, True)


def test_stats_are_the_same_under_jit():
    state = state_with(FULL)
    tiny.assert_same(jax.jit(ssam_jax.mask_stats)(state), ssam_jax.mask_stats(state))


def test_churn_is_the_share_of_the_new_mask_that_was_not_in_the_old():
    state = ssam_jax.set_mask(state_with(FULL), {"a": ~FULL["a"], "b": FULL["b"]})
    assert float(ssam_jax.mask_stats(state).churn) == pytest.approx(5 / 6)
    state = ssam_jax.set_mask(state, {"a": ~FULL["a"], "b": FULL["b"]})
    assert float(ssam_jax.mask_stats(state).churn) == 0
    assert float(ssam_jax.mask_stats(ssam_jax.set_mask(state, NONE)).churn) == 0
    assert float(ssam_jax.mask_stats(ssam_jax.set_mask(ssam_jax.set_mask(state, NONE), ALL)).churn) == 1


def test_churn_of_a_refresh_is_counted_in_the_loop():
    tx = chain(ssam_jax.random_mask(NM(1, 2), refresh_every=1))
    params, state = {"w": jnp.ones((4, 8))}, tx.init({"w": jnp.ones((4, 8))})
    _, new = tx.update(params, state, params, grad_fn=lambda p, i: p)
    old_mask, new_mask = (np.asarray(ssam_jax.get_mask(s)["w"]) for s in (state, new))
    came = (new_mask & ~old_mask).sum()
    assert 0 < came < 16
    assert float(ssam_jax.mask_stats(new).churn) == pytest.approx(came / 16)


def test_churn_is_counted_for_a_rule_of_one_s_own_too():
    def select(memory, mask, params, key, step):
        return jax.tree.map(jnp.asarray, FULL if mask is None else ALL)

    tx = chain(ssam_jax.MaskRule(select=select, refresh_every=1))
    params = jax.tree.map(jnp.ones_like, PARAMS)
    with jax.debug_nans(True):
        _, state = tx.update(params, tx.init(params), params, grad_fn=lambda p, i: p)
        stats = ssam_jax.mask_stats(state)
    assert float(stats.churn) == pytest.approx(6 / 10)
    assert float(ssam_jax.mask_stats(ssam_jax.set_mask(tx.init(PARAMS), FULL)).density) == pytest.approx(0.4)


# get_mask and set_mask


def test_the_mask_that_is_set_is_the_one_that_is_read():
    state = state_with(ALL)
    tiny.assert_same(ssam_jax.get_mask(ssam_jax.set_mask(state, FULL)), FULL)
    tiny.assert_same(ssam_jax.get_mask(state), ALL)  # nothing is changed in place


def test_set_mask_changes_nothing_but_the_mask_and_its_churn():
    tx = optax.chain(ssam_jax.ssam(1.0, ssam_jax.random_mask(NM(1, 2))), optax.adam(1.0))
    state = tx.init(PARAMS)
    fitting = {"a": FULL["a"], "b": np.array(True)}
    changed = ssam_jax.set_mask(state, fitting)
    kept = changed[0].mask._replace(bits=state[0].mask.bits, churn=state[0].mask.churn)
    tiny.assert_same((changed[0]._replace(mask=kept), changed[1]), state)


def test_set_mask_works_under_jit():
    state = state_with(ALL)
    tiny.assert_same(jax.jit(ssam_jax.set_mask)(state, FULL), ssam_jax.set_mask(state, FULL))


def test_python_bools_are_broadcast_to_the_present_mask():
    state = ssam_jax.set_mask(state_with(ALL), {"a": False, "b": True})
    tiny.assert_same(ssam_jax.get_mask(state), {"a": NONE["a"], "b": ALL["b"]})


@pytest.mark.parametrize(
    ("structured", "expected"),
    [
        (BY_COLUMN, {"a": np.array([[1, 0, 0, 1]] * 2, bool), "b": np.array([0, 1], bool)}),
        (BY_TENSOR, {"a": ALL["a"], "b": NONE["b"]}),
    ],
    ids=["column", "tensor"],
)
def test_a_structured_mask_is_broadcast_to_a_full_size_one(structured, expected):
    state = ssam_jax.set_mask(state_with(ALL), structured)
    tiny.assert_same(ssam_jax.get_mask(state), expected)


@pytest.mark.parametrize("nested", [False, True], ids=["chain", "train state"])
def test_the_state_may_be_nested_in_anything(nested):
    state = {"opt": [state_with(ALL)], "step": jnp.int32(3)} if nested else state_with(ALL)
    changed = ssam_jax.set_mask(state, FULL)
    assert tiny.spec(changed) == tiny.spec(state)
    tiny.assert_same(ssam_jax.get_mask(changed), FULL)


def test_alternating_is_found_too():
    state = ssam_jax.alternating(optax.sgd(0.1), 0.1, ssam_jax.fixed_mask(ALL)).init(PARAMS)
    tiny.assert_same(ssam_jax.get_mask(ssam_jax.set_mask(state, FULL)), FULL)


def test_the_next_step_uses_the_mask_that_was_set_and_does_not_compile_again():
    tx = chain(ssam_jax.fixed_mask(ALL))
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 2.0), PARAMS)

    @jax.jit
    def perturbation(state, params):  # the descent gradient is what the parameters moved by
        grad_fn = lambda point, i: jax.tree.map(jnp.subtract, point, params)  # noqa: E731
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return jax.tree.map(jnp.negative, updates), state

    params = jax.tree.map(jnp.array, PARAMS)
    state = tx.init(params)
    for mask in (ALL, FULL, NONE, FULL):
        moved, state = perturbation(ssam_jax.set_mask(state, mask), params)
        tiny.assert_close(moved, jax.tree.map(lambda m: m.astype(np.float32) / np.sqrt(10), mask), rtol=1e-6)
    assert perturbation._cache_size() == 1


def test_the_mask_of_a_pattern_can_be_set():
    pattern = Structured(0.5, unit="channel", axis=-1)
    scores = {"a": jnp.array([[3.0, 0, 0, 2], [3, 0, 0, 2]]), "b": jnp.array([0.0, 1])}
    state = ssam_jax.set_mask(chain(settable(pattern)).init(PARAMS), pattern(scores))
    tiny.assert_same(ssam_jax.get_mask(state), {**BY_COLUMN, "b": np.array([False, True])})


# active_leaves


@pytest.mark.parametrize(
    ("mask", "active"),
    [(FULL, (True, True)), (NONE, (False, False)), (BY_TENSOR, (True, False))],
    ids=["full", "none", "tensor"],
)
def test_active_leaves_are_those_with_any_perturbed_entry(mask, active):
    found = ssam_jax.active_leaves(state_with(mask))
    assert found == active
    assert all(type(a) is bool for a in found)
    assert hash(found) == hash(active)


def test_active_leaves_under_jit_says_where_to_call_it():
    with pytest.raises(ValueError, match=r"not known under jit. Call it between steps"):
        jax.jit(lambda state: jnp.array(ssam_jax.active_leaves(state)))(state_with(FULL))


# errors

READERS = [
    ssam_jax.get_mask,
    ssam_jax.active_leaves,
    ssam_jax.mask_stats,
    lambda state: ssam_jax.set_mask(state, FULL),
]


@pytest.mark.parametrize("read", READERS, ids=["get_mask", "active_leaves", "mask_stats", "set_mask"])
def test_a_state_without_ssam_or_with_two_is_refused(read):
    with pytest.raises(ValueError, match="exactly one ssam, alternating or carried, found 0 in a tuple"):
        read(optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="exactly one ssam, alternating or carried, found 2 in a list"):
        read([state_with(ALL), state_with(ALL)])


def test_dense_sam_has_no_mask_to_replace():
    with pytest.raises(ValueError, match=r"no mask to replace.*dense \(mask=None\).*refresh_every=None"):
        ssam_jax.set_mask(chain(None).init(PARAMS), FULL)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"a": FULL["a"]}, ValueError, "mask must have the tree structure of the present mask"),
        ([FULL["a"], FULL["b"]], ValueError, "mask must have the tree structure of the present mask"),
        ({**FULL, "b": np.ones(2, np.float32)}, TypeError, "must be bool, but its leaf 'b' is float32"),
        ({**FULL, "b": np.ones(2, np.int32)}, TypeError, "must be bool, but its leaf 'b' is int32"),
        (
            {**FULL, "b": np.ones(3, bool)},
            ValueError,
            r"leaf 'b' of shape \(3,\) does not broadcast to the present mask's \(2,\)",
        ),
        ({**FULL, "b": np.ones((1, 2), bool)}, ValueError, "leaf 'b' of shape .* does not broadcast"),
    ],
    ids=["missing", "list", "float", "int", "size", "rank"],
)
def test_a_mask_that_does_not_fit_is_refused_by_its_leaf(mask, error, message):
    with pytest.raises(error, match=message):
        ssam_jax.set_mask(state_with(ALL), mask)


def test_a_full_size_mask_does_not_fit_a_structured_state():
    state = chain(settable(NM(2, 4))).init(PARAMS)
    with pytest.raises(ValueError, match=r"'b' of shape \(2,\) .*\(\); the rule's pattern decides"):
        ssam_jax.set_mask(state, FULL)


# what the state weighs

BIG = {
    f"layer{i}": {"kernel": np.zeros((64, 32), np.float32), "bias": np.zeros(32, np.float32)} for i in "ab"
}
SIZE, LEAVES = 2 * (64 * 32 + 32), 4
OVERHEAD = 16 + 4 * LEAVES  # the step, churn and key; a size for each leaf


def weight(rule):
    """Return the bytes of the state, scores left out."""
    state = jax.eval_shape(ssam_jax.ssam(0.1, rule).init, BIG)
    if rule is not None:
        state = state._replace(mask=state.mask._replace(memory=()))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def rules(pattern):
    yield ssam_jax.fisher_mask(pattern, refresh_every=2)
    yield ssam_jax.fisher_mask(pattern, refresh_every=None)
    yield ssam_jax.random_mask(pattern, refresh_every=2)
    if isinstance(pattern, Unstructured) or pattern == Structured(0.5, unit="channel", axis=-1):
        yield ssam_jax.dynamic_mask(pattern, refresh_every=2, total_steps=9)


@pytest.mark.parametrize(
    ("pattern", "bytes_of_masks"),
    [
        (Unstructured(0.5), SIZE),
        (Unstructured(0.5, scope="leaf"), SIZE),
        (NM(2, 4), 2 * 64 * 32 + 2),
        (Structured(0.5, unit="block", axis=(-2, -1), block=(8, 8), indivisible="whole"), 2 * 64 * 32 + 2),
        (Structured(0.5, unit="tensor"), LEAVES),
        (Structured(0.5, unit="channel", axis=-1), 4 * 32),
    ],
    ids=["global", "leaf", "nm", "block", "tensor", "channel"],
)
def test_a_state_holds_one_byte_an_entry_of_its_mask_and_no_more(pattern, bytes_of_masks):
    for rule in rules(pattern):
        assert bytes_of_masks <= weight(rule) <= bytes_of_masks + OVERHEAD


def test_dense_sam_and_a_predicate_cost_a_few_bytes_a_leaf():
    assert weight(None) <= OVERHEAD
    assert weight(ssam_jax.fixed_mask(lambda path: "bias" in path)) <= LEAVES + OVERHEAD


def test_scores_are_kept_only_where_they_are_needed():
    with_refresh = ssam_jax.fisher_mask(NM(2, 4), refresh_every=2, accumulator_dtype=jnp.bfloat16)
    scores = jax.eval_shape(with_refresh.init, BIG)
    assert sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(scores)) == 2 * SIZE
    assert settable(NM(2, 4)).init is None


def test_stats_of_a_state_with_the_axis_of_vmap_are_refused_but_work_under_vmap():
    tx = ssam_jax.ssam(0.1, ssam_jax.random_mask(ssam_jax.NM(1, 2)))
    state = jax.vmap(tx.init)({"kernel": jnp.ones((3, 2, 4))})
    with pytest.raises(ValueError, match="mask_stats reads the state of one run"):
        ssam_jax.mask_stats(state)
    with pytest.raises(ValueError, match="active_leaves reads the state of one run"):
        ssam_jax.active_leaves(state)
    assert jax.vmap(ssam_jax.mask_stats)(state).density.tolist() == [0.5, 0.5, 0.5]
