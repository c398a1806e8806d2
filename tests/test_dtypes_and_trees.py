"""Half precision, trees of every kind, and gradients that are zero or not finite."""

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import ssam_jax
from ssam_jax import NM, Structured, Unstructured

HALF = [jnp.bfloat16, jnp.float16]
MIXED = {"a": jnp.bfloat16, "b": jnp.float16, "c": jnp.float32}


def sgd_step(tx, params, grads, descent=None):
    """Take one step; return the updates, the state and where the second gradient was taken."""
    points = []

    def grad_fn(point, i):
        points.append(point)
        return grads if descent is None else descent

    updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    return updates, state, points[0]


def cast(dtypes, shape=(2, 4)):
    return {name: jnp.linspace(-1, 1, 8, dtype=dtype).reshape(shape) for name, dtype in dtypes.items()}


# dtypes


@pytest.mark.parametrize("dtypes", [{"a": HALF[0]}, {"a": HALF[1]}, MIXED], ids=["bf16", "fp16", "mixed"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_updates_perturbed_parameters_and_state_keep_their_dtypes(dtypes, adaptive):
    rule = ssam_jax.fisher_mask(NM(2, 4), refresh_every=1)
    tx = ssam_jax.ssam(rho=0.5, mask=rule, adaptive=adaptive)
    params = cast(dtypes)
    updates, state, point = sgd_step(tx, params, jax.tree.map(jnp.ones_like, params))
    assert tiny.spec(updates) == tiny.spec(params)
    assert tiny.spec(point) == tiny.spec(params)
    assert tiny.differ(point, params)
    assert tiny.spec(state) == tiny.spec(tx.init(params))
    assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(state.mask.memory))


@pytest.mark.parametrize("skip_zero_rho", [False, True])
def test_a_traced_radius_of_another_dtype_changes_no_dtype(skip_zero_rho):
    params = cast(MIXED)

    def point_and_updates(rho):
        tx = ssam_jax.ssam(rho=rho, skip_zero_rho=skip_zero_rho)
        return tx.update(params, tx.init(params), params, grad_fn=lambda p, i: p)[0]

    for dtype in (jnp.bfloat16, jnp.float32):
        assert tiny.spec(jax.eval_shape(point_and_updates, jnp.asarray(0.1, dtype))) == tiny.spec(params)


def test_alternating_keeps_the_dtypes_of_a_mixed_tree():
    tx = ssam_jax.alternating(optax.sgd(0.1), 0.5, ssam_jax.fixed_mask(all_true(MIXED)))
    params = cast(MIXED)
    state = tx.init(params)
    before = tiny.spec((params, state))
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        assert tiny.spec(updates) == tiny.spec(params)
        params = optax.apply_updates(params, updates)
        assert tiny.spec((params, state)) == before


def all_true(tree):
    return jax.tree.map(lambda _: True, tree)


def test_a_descent_gradient_of_another_dtype_is_accepted():
    params = cast({"a": jnp.bfloat16})
    wide = {"a": jnp.ones((2, 4), jnp.float32)}
    updates, state, _ = sgd_step(ssam_jax.ssam(0.1, ssam_jax.fixed_mask(all_true(params))), params, wide)
    assert updates["a"].dtype == jnp.float32
    assert int(state.step) == 1


@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
def test_the_norm_of_a_half_precision_tree_is_accumulated_in_float32(dtype):
    size = 4096  # a running sum of ones in bfloat16 ends at 256, in float16 at 2048
    params = {"w": jnp.zeros((size,), dtype)}
    _, _, point = sgd_step(ssam_jax.ssam(rho=64.0), params, {"w": jnp.ones((size,), dtype)})
    np.testing.assert_array_equal(np.asarray(point["w"], np.float32), np.ones(size, np.float32))


def test_a_float16_gradient_whose_square_overflows_float16_is_used():
    params = {"w": jnp.zeros((4,), jnp.float16)}
    _, _, point = sgd_step(ssam_jax.ssam(rho=1.0), params, {"w": jnp.full((4,), 1000, jnp.float16)})
    np.testing.assert_array_equal(np.asarray(point["w"]), np.full(4, 0.5, np.float16))


def test_fisher_scores_of_half_precision_gradients_are_squared_in_float32():
    rule = ssam_jax.fisher_mask(NM(1, 2), refresh_every=9, decay=0.0)
    params = {"w": jnp.zeros((2, 2), jnp.float16)}
    _, state, _ = sgd_step(ssam_jax.ssam(0.1, rule), params, {"w": jnp.full((2, 2), 1000, jnp.float16)})
    np.testing.assert_array_equal(state.mask.memory["w"], np.full((2, 2), 1e6, np.float32))


def test_an_accumulator_dtype_is_kept():
    rule = ssam_jax.fisher_mask(NM(1, 2), refresh_every=1, accumulator_dtype=jnp.bfloat16)
    params = {"w": jnp.ones((2, 2), jnp.float32)}
    _, state, _ = sgd_step(ssam_jax.ssam(0.1, rule), params, params)
    assert state.mask.memory["w"].dtype == jnp.bfloat16


# trees


class Point(NamedTuple):
    x: jax.Array
    y: jax.Array


def ones(*shape):
    return jnp.ones(shape, jnp.float32)


TREES = {
    "bare array": ones(2, 4),
    "bare scalar": ones(),
    "scalars": {"a": ones(), "b": ones(2, 4)},
    "empty leaves": {"a": ones(0), "b": ones(2, 4), "c": ones(4, 0), "d": ones(0, 4)},
    "none": {"a": None, "b": ones(2, 4), "c": {"d": None}},
    "tuple": (ones(2, 4), (ones(4), ones())),
    "list": [ones(2, 4), [ones(4)]],
    "named tuple": Point(ones(4), ones(2, 4)),
    "frozen dict": flax.core.FrozenDict({"a": {"b": ones(2, 4)}, "c": ones(4)}),
    "empty dict": {},
    "only empty leaves": {"a": ones(0), "b": ones(0, 4)},
}
RULES = {
    "dense": lambda: None,
    "fixed": lambda: ssam_jax.fixed_mask(lambda path: True),
    "fisher nm": lambda: ssam_jax.fisher_mask(NM(2, 4), refresh_every=1),
}
SEARCHING = {
    "random global": lambda: ssam_jax.random_mask(Unstructured(0.5), refresh_every=1),
    "fisher tensor": lambda: ssam_jax.fisher_mask(Structured(0.5, unit="tensor"), refresh_every=1),
    "dynamic channel": lambda: ssam_jax.dynamic_mask(
        Structured(0.5, unit="channel", axis=-1), refresh_every=1, total_steps=9
    ),
}
# Searching rules compile slowly: they get the trees on which a search could stumble.
TREE_CASES = [(t, r) for t in TREES for r in RULES] + [
    (t, r) for t in ("bare scalar", "empty leaves", "empty dict", "only empty leaves") for r in SEARCHING
]


@pytest.mark.parametrize(("tree", "rule"), TREE_CASES)
def test_a_tree_of_any_kind_takes_a_step(tree, rule):
    params, make = TREES[tree], {**RULES, **SEARCHING}[rule]
    tx = optax.chain(ssam_jax.ssam(rho=0.1, mask=make()), optax.sgd(0.5))

    @jax.jit
    def step(params):
        grads = jax.tree.map(jnp.ones_like, params)
        state = tx.init(params)
        updates, new = tx.update(
            grads, state, params, grad_fn=lambda p, i: jax.tree.map(lambda x: jnp.full_like(x, 2), p)
        )
        return optax.apply_updates(params, updates), state, new, ssam_jax.mask_stats(new)

    moved, before, after, stats = step(params)
    tiny.assert_same(moved, jax.tree.map(jnp.zeros_like, params))
    assert tiny.spec(before) == tiny.spec(after)
    assert 0 <= float(stats.density) <= 1
    if rule != "dense":
        assert jax.tree.structure(ssam_jax.get_mask(after)) == jax.tree.structure(params)


def test_a_parameter_in_a_box_of_flax_goes_by_the_name_of_the_box():
    def box(x):
        return flax.linen.Partitioned(x, names=(None,) * x.ndim)

    params = {"layer": {"bias": box(ones(4)), "kernel": box(ones(2, 4)), "value": ones(4)}, "value": ones()}
    names = ["layer/bias", "layer/kernel", "layer/value", "value"]
    assert ssam_jax._base.trees.leaf_paths(params) == names
    tx = ssam_jax.ssam(0.1, ssam_jax.fixed_mask(lambda path: path == "layer/bias"))
    assert ssam_jax.active_leaves(tx.init(params)) == (True, False, False, False)


@pytest.mark.parametrize("tree", TREES)
def test_alternating_takes_a_tree_of_any_kind(tree):
    params = TREES[tree]
    tx = ssam_jax.alternating(optax.sgd(0.5), 0.1, ssam_jax.fixed_mask(lambda path: True))
    state, moved = tx.init(params), params
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(lambda p: jnp.full_like(p, 2), params), state, moved)
        moved = optax.apply_updates(moved, updates)
    tiny.assert_close(moved, jax.tree.map(jnp.zeros_like, params), atol=1e-6)
    assert int(state.ssam.step) == 1


def test_a_bare_scalar_is_moved_by_the_radius():
    tx = ssam_jax.ssam(rho=0.1)
    updates, _ = tx.update(jnp.float32(2), tx.init(jnp.float32(1)), jnp.float32(1), grad_fn=lambda p, i: p)
    assert float(updates) == pytest.approx(1.1)


# zero and non-finite gradients

BAD = {
    "zero": np.zeros(4, np.float32),
    "nan": np.array([1, np.nan, 1, 1], np.float32),
    "inf": np.array([1, np.inf, 1, 1], np.float32),
    "-inf": np.array([1, -np.inf, 1, 1], np.float32),
    "overflow": np.full(4, 2e38, np.float32),
    "underflow": np.full(4, 1e-30, np.float32),
}


@pytest.mark.parametrize("normalize", ["global", "masked"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("bad", BAD)
def test_an_unusable_ascent_gradient_perturbs_nothing(bad, adaptive, normalize):
    params = {"a": jnp.arange(4, dtype=jnp.float32), "b": jnp.ones((2, 2), jnp.float32)}
    grads = {"a": jnp.array(BAD[bad]), "b": jnp.zeros((2, 2), jnp.float32)}
    descent = jax.tree.map(jnp.ones_like, params)
    mask = ssam_jax.fixed_mask(lambda path: True)
    tx = ssam_jax.ssam(0.1, mask, normalize=normalize, adaptive=adaptive)
    updates, _, point = sgd_step(tx, params, grads, descent)
    tiny.assert_same(point, params)
    tiny.assert_same(updates, descent)


def test_a_masked_gradient_of_zero_perturbs_nothing():
    params = {"a": jnp.ones(4), "b": jnp.ones(4)}
    grads = {"a": jnp.zeros(4), "b": jnp.ones(4)}
    tx = ssam_jax.ssam(0.1, ssam_jax.fixed_mask({"a": True, "b": False}), normalize="masked")
    tiny.assert_same(sgd_step(tx, params, grads)[2], params)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_non_finite_entry_outside_the_mask_perturbs_nothing(bad):
    params = {"a": jnp.ones(4), "b": jnp.ones(4)}
    grads = {"a": jnp.ones(4), "b": jnp.array(BAD[bad])}
    tx = ssam_jax.ssam(0.1, ssam_jax.fixed_mask({"a": True, "b": False}))
    tiny.assert_same(sgd_step(tx, params, grads)[2], params)


@pytest.mark.parametrize("bad", BAD)
def test_parameters_stay_finite_under_alternating_when_the_descent_gradient_is(bad):
    params = {"a": jnp.ones(4)}
    tx = ssam_jax.alternating(optax.sgd(0.5), 0.1)
    updates, state = tx.update({"a": jnp.array(BAD[bad])}, tx.init(params), params)
    point = optax.apply_updates(params, updates)
    tiny.assert_same(point, params)
    updates, _ = tx.update({"a": jnp.ones(4)}, state, point)
    tiny.assert_same(optax.apply_updates(point, updates), {"a": jnp.full(4, 0.5)})


@pytest.mark.parametrize("bad", BAD)
def test_fisher_scores_stay_finite_and_masks_keep_their_size(bad):
    rule = ssam_jax.fisher_mask(NM(2, 4), refresh_every=1, decay=0.5)
    params = {"a": jnp.ones((1, 4)), "b": jnp.ones((1, 4))}
    grads = {"a": jnp.array(BAD[bad])[None], "b": jnp.full((1, 4), 2, jnp.float32)}
    _, state, _ = sgd_step(ssam_jax.ssam(0.1, rule), params, grads)
    scores = state.mask.memory
    assert all(np.isfinite(s).all() for s in jax.tree.leaves(scores))
    np.testing.assert_array_equal(scores["b"], np.full((1, 4), 2, np.float32))
    assert [int(m.sum()) for m in jax.tree.leaves(state.mask.mask)] == [2, 2]


def test_fisher_scores_take_no_part_of_a_non_finite_entry_and_all_of_the_others():
    rule = ssam_jax.fisher_mask(NM(1, 4), refresh_every=9, decay=0.5)
    params = {"w": jnp.ones((1, 4))}
    _, state, _ = sgd_step(ssam_jax.ssam(0.1, rule), params, {"w": jnp.array([[np.nan, np.inf, 2e38, 4.0]])})
    np.testing.assert_array_equal(state.mask.memory["w"], [[0, 0, 0, 8]])


@pytest.mark.parametrize("bad", ["zero", "nan"])
def test_a_dynamic_mask_keeps_its_size_under_a_bad_gradient(bad):
    rule = ssam_jax.dynamic_mask(Unstructured(0.5), refresh_every=1, total_steps=9, grow="gradient")
    params = {"a": jnp.ones(4)}
    _, state, _ = sgd_step(ssam_jax.ssam(0.1, rule), params, {"a": jnp.array(BAD[bad])})
    assert int(state.mask.mask["a"].sum()) == 2


# what is refused


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [(jnp.arange(3), "int32"), (jnp.ones(3, jnp.complex64), "complex64"), (jnp.ones(3, bool), "bool")],
)
def test_a_leaf_that_is_no_real_float_is_refused_by_its_path(leaf, dtype):
    params = {"model": {"good": jnp.ones(2), "bad": [jnp.ones(2), leaf]}}
    for tx in (ssam_jax.ssam(0.1), ssam_jax.alternating(optax.sgd(0.1), 0.1)):
        with pytest.raises(
            TypeError, match=f"params must hold real floating-point.*'model/bad/1' is {dtype}"
        ):
            tx.init(params)


@pytest.mark.parametrize("leaf", [jnp.arange(3), jnp.ones(3, jnp.complex64)])
def test_scores_that_are_no_real_floats_are_refused_by_their_path(leaf):
    with pytest.raises(TypeError, match=r"scores must hold real floating-point .*'w/0'"):
        Unstructured(0.5)({"w": [leaf]})


def test_a_gradient_of_another_shape_or_structure_is_refused_by_its_path():
    params = {"a": jnp.ones(4), "b": {"c": jnp.ones((2, 2))}}
    tx = ssam_jax.ssam(0.1)
    state = tx.init(params)
    wrong = {"a": jnp.ones(4), "b": {"c": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r"the gradient must have the shapes of params: the leaf 'b/c'"):
        tx.update(wrong, state, params, grad_fn=lambda p, i: p)
    with pytest.raises(ValueError, match=r"what grad_fn returns must have the shapes .*'b/c'"):
        tx.update(params, state, params, grad_fn=lambda p, i: wrong)
    with pytest.raises(ValueError, match="the gradient must have the tree structure of params"):
        tx.update({"a": jnp.ones(4)}, state, params, grad_fn=lambda p, i: p)


def test_a_message_about_structure_names_the_first_path_in_few_words_whatever_the_tree():
    params = {f"layer_{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for i in range(120)}
    grads = {**params, "layer_77": {"kernel": params["layer_77"]["kernel"]}}
    tx = ssam_jax.ssam(0.1)
    with pytest.raises(
        ValueError, match=r"at 'layer_77/bias' expected an array of shape \(2,\), got nothing"
    ) as e:
        tx.update(grads, tx.init(params), params, grad_fn=lambda p, i: p)
    assert len(str(e.value)) < 600
    deep = {"block": [params, (params,)]}
    for other in ({"block": [params, [params]]}, [params], {"block": None}, {**deep, "more": 1.0}, 3.0):
        with pytest.raises(ValueError, match=r"expected .* got ") as e:
            tx.update(other, tx.init(deep), deep, grad_fn=lambda p, i: p)
        assert len(str(e.value)) < 600


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.chain(ssam_jax.ssam(0.1), optax.sgd(0.1)),
        lambda: optax.chain(ssam_jax.ssam(0.1, adaptive=True, normalize="leaf"), optax.sgd(0.1)),
        lambda: optax.chain(
            ssam_jax.ssam(0.1, ssam_jax.fisher_mask(Unstructured(0.5), refresh_every=1)), optax.sgd(0.1)
        ),
        lambda: optax.chain(ssam_jax.ssam(0.1, combine=ssam_jax.combine.looksam(0.5)), optax.sgd(0.1)),
        lambda: ssam_jax.alternating(optax.sgd(0.1), 0.1, combine=ssam_jax.combine.gsam(0.5)),
        lambda: ssam_jax.carried(optax.sgd(0.1), 0.1, direction=ssam_jax.directions.friendly()),
    ],
    ids=["sam", "asam by leaf", "fisher", "looksam", "alternating", "carried"],
)
def test_numbers_of_python_are_parameters_as_they_are_for_optax(make):
    def loss(params):
        return (params["slope"] * 3.0 - 1.0) ** 2 + params["bias"] ** 2

    ends = []
    for params in ({"slope": 2.0, "bias": 0.5}, {"slope": jnp.float32(2.0), "bias": jnp.float32(0.5)}):
        tx = make()
        state = tx.init(params)
        for _ in range(3):
            grad_fn = lambda p, i: jax.grad(loss)(p)  # noqa: E731
            updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    tiny.assert_close(*ends)
