"""Patterns: masks written out by hand, counts over many shapes, and every refusal."""

import dataclasses
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from ssam_jax import NM, Pattern, Structured, Unstructured
from ssam_jax.masks import selection, shards, units
from ssam_jax.masks.rows import Rows
from ssam_jax.masks.shards import Here, Part

CHANNEL = Structured(0.5, "channel")
BLOCK = Structured(0.5, "block", block=(2, 2))
PATTERNS = [Unstructured(0.5), Unstructured(0.25, "leaf"), Structured(0.5), CHANNEL, BLOCK, NM(1, 2)]


def lists(mask):
    return jax.tree.map(lambda leaf: leaf.astype(int).tolist(), mask)


def arrays(tree):
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), tree, is_leaf=lambda x: isinstance(x, list))


def full(mask, like):
    return jax.tree.map(lambda m, p: np.broadcast_to(np.asarray(m), p.shape), mask, like)


def kept(mask, like):
    return sum(int(leaf.sum()) for leaf in jax.tree.leaves(full(mask, like)))


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture
def host_selection(monkeypatch):
    """Select on the host by a loop: nothing to compile, so that many shapes can be tried."""

    def largest(layout, keys, accounts, second=None):
        assert second is None and accounts.budget.high is None
        goals, flat = np.ravel(accounts.budget.low), np.ravel(keys)
        owner = np.repeat(layout._owner, layout.shape[1])
        reached, mask = [0] * len(goals), np.zeros(flat.size, bool)
        for i in np.lexsort((np.arange(flat.size), -flat.astype(np.int64))):
            account = 0 if accounts.shared else owner[i]
            if flat[i] and reached[account] < goals[account]:
                mask[i] = True
                reached[account] += accounts.weights[owner[i]]
        return jnp.asarray(mask.reshape(keys.shape))

    monkeypatch.setattr(selection, "largest", largest)
    monkeypatch.setattr(shards, "_within_shard_map", lambda: True)  # on a device of its own
    with jax.disable_jit():
        yield


# By hand.

TREE = arrays({"a": [[4.0, 1.0], [6.0, 2.0]], "b": [5.0, 3.0, 7.0, 0.0]})


def test_unstructured_global_keeps_the_largest_of_the_whole_tree():
    assert lists(Unstructured(0.5)(TREE)) == {"a": [[1, 0], [1, 0]], "b": [1, 0, 1, 0]}
    assert lists(Unstructured(0.875)(TREE)) == {"a": [[0, 0], [0, 0]], "b": [0, 0, 1, 0]}


def test_unstructured_by_leaf_gives_each_leaf_its_density():
    scores = arrays({"a": [[9.0, 8.0], [7.0, 6.0]], "b": [1.0, 2.0]})
    assert lists(Unstructured(0.5, "leaf")(scores)) == {"a": [[1, 1], [0, 0]], "b": [0, 1]}


def test_equal_scores_are_kept_in_tree_order():
    scores = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2)), "c": jnp.ones(1)}
    assert lists(Unstructured(0.5)(scores)) == {"a": [1, 1, 1], "b": [[0, 0], [0, 0]], "c": [1]}


def test_more_zeros_than_dropped_entries_still_give_the_exact_count():
    scores = {"a": jnp.zeros(6).at[4].set(1.0)}
    assert lists(Unstructured(0.5)(scores)) == {"a": [1, 1, 0, 0, 1, 0]}


def test_structured_by_tensor_keeps_the_best_means_until_the_target_is_reached():
    scores = arrays({"a": [3.0, 3.0], "b": [[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]], "c": [2.0, 2.0]})
    assert lists(Structured(0.8)(scores)) == {"a": 1, "b": 0, "c": 0}
    assert lists(Structured(0.7)(scores)) == {"a": 1, "b": 0, "c": 1}
    assert lists(Structured(0.5)(scores)) == {"a": 1, "b": 1, "c": 1}


def test_structured_by_channel_ranks_slices_along_the_axis():
    scores = arrays([[[1.0, 5.0, 3.0], [1.0, 5.0, 4.0]]])
    assert lists(Structured(0.6, "channel")(scores)) == [[[0, 1, 0]]]
    assert lists(Structured(0.5, "channel", axis=-2)(scores)) == [[[0], [1]]]
    assert lists(Structured(0.5, "channel", axis=0)(scores)) == 1


def test_a_leaf_without_the_axis_is_one_unit():
    scores = arrays({"bias": [9.0, 9.0], "kernel": [[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]})
    mask = Structured(0.5, "channel", axis=-2)(scores)
    assert lists(mask) == {"bias": 1, "kernel": [[0], [1], [0]]}


def test_structured_by_block_ranks_tiles():
    scores = arrays([[[1.0, 1.0, 4.0, 0.0], [1.0, 1.0, 4.0, 0.0]]])
    assert lists(Structured(0.5, "block", block=(2, 2))(scores)) == [[[0, 0, 1, 1], [0, 0, 1, 1]]]
    row = Structured(0.5, "block", axis=1, block=2)(scores)
    assert lists(row) == [[[1, 0, 1, 0], [1, 0, 1, 0]]]


def test_n_of_m_ranks_groups_along_each_axis():
    scores = jnp.array([[1.0, 4.0, 3.0, 2.0], [5.0, 0.0, 7.0, 6.0]])
    assert lists(NM(2, 4)(scores)) == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert lists(NM(1, 2)(scores)) == [[0, 1, 1, 0], [1, 0, 1, 0]]
    assert lists(NM(1, 2, axis=0)(scores)) == [[0, 1, 0, 0], [1, 0, 1, 1]]
    assert lists(NM(1, 2, axis=-2)(scores)) == lists(NM(1, 2, axis=0)(scores))


def test_n_of_m_perturbs_biases_and_scalars_whole():
    assert lists(NM(1, 2)({"bias": jnp.ones(3), "scale": jnp.float32(1)})) == {"bias": 1, "scale": 1}


@pytest.mark.parametrize("axis", range(-4, 4))
def test_n_of_m_of_a_conv_kernel_lands_on_the_weights_it_ranked(axis):
    # The known trap: a mask made on a transposed view and reshaped back is right in number, not in place.
    shape = (4, 8, 4, 8)
    scores = np.random.default_rng(0).permutation(math.prod(shape)).reshape(shape).astype(np.float32)
    mask = np.asarray(NM(2, 4, axis=axis)(jnp.asarray(scores)))
    groups, rows = (np.moveaxis(x, axis, -1).reshape(-1, 4) for x in (mask, scores))
    for group, row in zip(groups, rows):
        assert set(row[group]) == set(sorted(row)[-2:])


def test_nan_scores_are_kept_last():
    scores = [jnp.array([jnp.nan, -jnp.inf, 1.0, jnp.nan])]
    assert lists(Unstructured(0.5)(scores)) == [[0, 1, 1, 0]]
    assert lists(Structured(0.5)([scores[0], jnp.zeros(4)])) == [0, 1]


def test_numpy_scores_are_as_good_as_jax_ones():
    scores = {"a": np.array([3.0, 1.0], np.float32), "b": np.array([2.0, 0.0], np.float32)}
    assert lists(Unstructured(0.5)(scores)) == {"a": [1, 0], "b": [1, 0]}


# Counts.

SPARSITIES = st.one_of(st.floats(0, 1), st.sampled_from([0, 1, 0.5, 0.9, 0.99]))
# Few shapes, so that little is compiled: of every rank to three, empty, odd, and divisible by blocks.
SHAPES = st.lists(
    st.sampled_from([(), (0,), (1,), (3,), (2, 4), (4, 3), (3, 0), (2, 2, 4), (3, 1, 2)]), max_size=4
)


def draw_scores(shapes, seed, levels=5):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.integers(0, levels, shape).astype(np.float32)) for shape in shapes]


@hypothesis.given(shapes=SHAPES, sparsity=SPARSITIES, seed=st.integers(0, 9))
def test_unstructured_keeps_exactly_the_rounded_share(host_selection, shapes, sparsity, seed):
    scores = draw_scores(shapes, seed)
    assert kept(Unstructured(sparsity)(scores), scores) == round((1 - sparsity) * size(scores))
    for mask, leaf in zip(Unstructured(sparsity, "leaf")(scores), scores):
        assert int(mask.sum()) == round((1 - sparsity) * leaf.size)


def units_of(pattern, leaf):
    """Return the ids of the units of a leaf, laid out by hand."""
    ids = np.zeros(leaf.shape, int)
    if pattern.unit == "channel" and -leaf.ndim <= pattern.axis < leaf.ndim:
        ids += np.moveaxis(np.indices(leaf.shape)[pattern.axis], 0, 0)
    if pattern.unit == "block" and leaf.ndim >= 2 and not any(n % 2 for n in leaf.shape[-2:]):
        index = np.indices(leaf.shape)
        for axis, place in enumerate(index):
            ids = ids * 10 + (place // 2 if axis >= leaf.ndim - 2 else place)
    return ids


@pytest.mark.parametrize("unit", ["tensor", "channel-1", "channel0", "block"])
@hypothesis.given(shapes=SHAPES, sparsity=SPARSITIES, seed=st.integers(0, 9))
def test_structured_reaches_the_target_and_would_miss_it_without_the_last_unit(
    host_selection, unit, shapes, sparsity, seed
):
    pattern = {
        "tensor": Structured(sparsity),
        "channel-1": Structured(sparsity, "channel", axis=-1),
        "channel0": Structured(sparsity, "channel", axis=0),
        "block": Structured(sparsity, "block", block=(2, 2), indivisible="whole"),
    }[unit]
    scores = draw_scores(shapes, seed)
    mask = full(pattern(scores), scores)
    target, total, means = round((1 - sparsity) * size(scores)), 0, []
    for leaf, m in zip(map(np.asarray, scores), mask):
        ids = units_of(pattern, leaf)
        for i in np.unique(ids):
            whole = m[ids == i]
            assert whole.all() or not whole.any(), "a unit was split"
            means.append((leaf[ids == i].mean(), bool(whole[0]), whole.size))
            total += whole.sum()
    chosen = [unit for unit in means if unit[1]]
    assert total >= target
    if chosen:
        worst = min(mean for mean, *_ in chosen)
        assert total - max(n for mean, _, n in chosen if mean == worst) < target
        assert all(mean <= worst for mean, is_kept, _ in means if not is_kept)


@hypothesis.given(
    m=st.integers(1, 5),
    n=st.integers(0, 5),
    outer=st.lists(st.integers(0, 3), min_size=1, max_size=2),
    where=st.integers(0, 2),
    groups=st.integers(0, 3),
)
@hypothesis.settings(max_examples=10)
def test_n_of_m_keeps_exactly_n_in_every_group(m, n, outer, where, groups):
    hypothesis.assume(n <= m)
    axis = min(where, len(outer))
    shape = (*outer[:axis], groups * m, *outer[axis:])
    with jax.disable_jit():
        mask = np.asarray(NM(n, m, axis=axis)(draw_scores([shape], 0)[0]))
    assert mask.shape == shape
    assert (np.moveaxis(mask, axis, -1).reshape(-1, m).sum(axis=1) == n).all()


@pytest.mark.parametrize(
    "pattern, count",
    [
        (Unstructured(0.3), 38),
        (Unstructured(1.0, "leaf"), 0),
        (Unstructured(0), 54),
        (Structured(1), 0),
        (Structured(0.0, "channel"), 54),
        (NM(0, 2), 6),
        (NM(2, 2), 54),
    ],
)
def test_counts_are_exact_through_the_real_selection(pattern, count):
    scores = {"bias": jnp.ones(6), "kernel": jnp.zeros((4, 6)), "deep": jnp.ones((2, 3, 4))}
    assert kept(pattern(scores), scores) == count


# Odd trees.

ODD = {
    "none": None,
    "scalar": jnp.float32(2),
    "empty": jnp.zeros((0, 4)),
    "kernel": jnp.ones((4, 4)),
    "list": [],
}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_scalars_empty_leaves_and_none_subtrees_are_accepted(pattern, host_selection):
    for mask in (pattern(ODD), pattern.random(jax.random.key(0), ODD)):
        assert jax.tree.structure(mask) == jax.tree.structure(ODD)
        assert all(leaf.dtype == bool for leaf in jax.tree.leaves(mask))
        full(mask, ODD)


def test_the_real_selection_accepts_scalars_and_empty_leaves():
    assert lists(Unstructured(0.9)(ODD) | {"kernel": jnp.array(0)})["scalar"] == 1
    assert kept(Unstructured(0.5, "leaf")(ODD), ODD) == 8


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("tree", [{}, None, {"a": None}, [()]], ids=str)
def test_trees_without_leaves_give_themselves(pattern, tree):
    assert pattern(tree) == tree
    assert pattern.random(jax.random.key(0), tree) == tree


# Values.


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_are_frozen_hashable_values(pattern):
    copy = dataclasses.replace(pattern)
    assert copy == pattern and hash(copy) == hash(pattern) and copy is not pattern
    assert eval(repr(pattern)) == pattern
    name = dataclasses.fields(pattern)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(pattern, name, 0)


def test_patterns_of_other_settings_differ():
    assert Unstructured(0.5) != Unstructured(0.5, "leaf")
    assert NM(2, 4) != NM(2, 4, axis=-2)


@pytest.mark.parametrize(
    "pattern, shape", [(Structured(0.5), ()), (CHANNEL, (1, 4)), (BLOCK, (4, 4)), (Unstructured(0.5), (4, 4))]
)
def test_masks_are_as_small_as_their_units_allow(pattern, shape, host_selection):
    assert pattern({"kernel": jnp.ones((4, 4))})["kernel"].shape == shape


def test_block_masks_are_expanded_and_collapsed_without_loss():
    pattern = Structured(0.5, "block", axis=(0, -1), block=(2, 3))
    shape = (4, 2, 9)
    unit, part = pattern.units_of(shape), Part.of(shape, None)
    assert unit.shape == (2, 2, 3) and unit.mask == shape and unit.size == 6
    chosen = jnp.asarray(np.random.default_rng(0).random(unit.shape) < 0.5)
    rows = Rows(Here([part], [], ()), [part.coarser(unit.extents)])
    (mask,) = units.expanded(rows, rows.joined([chosen]), jnp.zeros((1, 1), jnp.uint32), [unit])
    np.testing.assert_array_equal(mask, np.kron(chosen, np.ones((2, 1, 3), bool)))
    np.testing.assert_array_equal(units.collapsed(mask, unit, unit.shape), chosen)


def test_block_scores_are_means_over_tiles():
    scores = np.random.default_rng(0).normal(size=(4, 2, 9)).astype(np.float32)
    means = mean_of_units(Structured(0.5, "block", axis=(0, -1), block=(2, 3)), jnp.asarray(scores))
    expected = scores.reshape(2, 2, 2, 3, 3).mean(axis=(1, 4))
    np.testing.assert_allclose(means, expected, rtol=1e-5)


def mean_of_units(pattern, leaf):
    here = Here([Part.of(leaf.shape, None)], [], ())
    return units.means(here, [leaf], [pattern.units_of(leaf.shape)])[0]


def test_means_of_half_precision_scores_are_taken_in_float32():
    leaf = jnp.ones((4096, 2), jnp.bfloat16)
    assert mean_of_units(CHANNEL, leaf).dtype == jnp.float32
    assert mean_of_units(CHANNEL, leaf).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
def test_indivisible_leaves_can_be_one_unit(shape, host_selection):
    leaf = {"w": jnp.ones(shape)}
    assert lists(Structured(0.4, "block", block=2, indivisible="whole")(leaf)) == {"w": 1}
    assert lists(NM(2, 4, indivisible="whole")(leaf)) == {"w": 1}


# Random masks.


@pytest.mark.parametrize("pattern", [Unstructured(0.3), CHANNEL, NM(1, 2)], ids=str)
def test_random_masks_obey_the_pattern_and_follow_the_key(pattern):
    params = {"bias": jnp.zeros(8), "kernel": jnp.zeros((16, 8))}
    draw = jax.jit(pattern.random)
    one, same, other = (full(draw(jax.random.key(i), params), params) for i in (0, 0, 1))
    differs = [bool((a != b).any()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other))]
    assert any(differs)
    jax.tree.map(np.testing.assert_array_equal, one, same)
    if isinstance(pattern, NM):
        assert (one["kernel"].reshape(-1, 2).sum(axis=1) == 1).all()
    elif pattern == CHANNEL:
        assert 68 <= kept(one, params) < 68 + 16
        assert (one["kernel"] == one["kernel"][:1]).all()
    else:
        assert kept(one, params) == round(0.7 * 136)


def test_random_masks_are_the_same_on_eight_devices():
    params = {"bias": jnp.zeros(8), "kernel": jnp.zeros((16, 8))}
    mesh = jax.make_mesh((8,), ("i",))
    layout = NamedSharding(mesh, PartitionSpec("i"))
    draw = Unstructured(0.3).random
    expected = jax.jit(draw)(jax.random.key(3), params)
    mask = jax.jit(draw, out_shardings=layout)(jax.random.key(3), params)
    assert mask["kernel"].sharding.is_equivalent_to(layout, 2)
    jax.tree.map(np.testing.assert_array_equal, mask, expected)


def test_random_masks_read_shapes_alone(host_selection):
    params = {"w": jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)}
    assert int(Unstructured(0.5).random(jax.random.key(0), params)["w"].sum()) == 8


class Everything(Pattern):
    def __call__(self, scores):
        return jax.tree.map(lambda s: s >= 0, scores)


# What the guide on moving says of the authors' second repository.


def test_the_authors_n_of_m_of_a_dense_layer_is_ours_along_the_inputs():
    scores = np.random.default_rng(0).random((8, 12)).astype(np.float32)  # theirs: (outputs, inputs)
    theirs = np.zeros(scores.shape, bool)
    for row, start in itertools.product(range(8), range(0, 12, 4)):
        theirs[row, start + np.argsort(scores[row, start : start + 4])[2:]] = True
    kernel = jnp.asarray(scores.T)  # Flax's: (inputs, outputs)
    np.testing.assert_array_equal(NM(2, 4, axis=0)(kernel), theirs.T)
    assert (np.asarray(NM(2, 4)(kernel)) != theirs.T).any()


@pytest.mark.parametrize("pattern", [Unstructured, Structured])
@pytest.mark.parametrize("s", [0.05, 0.5, 0.7])
def test_the_authors_number_of_kept_entries_has_a_spelling(host_selection, pattern, s):
    scores = {"1": np.arange(3, dtype=np.float32), "2": 10 + np.arange(8, dtype=np.float32)}
    budget = int((1 - s) * 11)
    mask = pattern(1 - budget / 11)(scores)
    if pattern is Unstructured:
        assert kept(mask, scores) == budget
    else:
        best, found = sorted(scores, key=lambda name: -int(name)), 0
        while found < budget:
            found += scores[best.pop(0)].size
        assert kept(mask, scores) == found


def test_a_pattern_of_ones_own_gets_random_masks_for_free():
    mask = Everything().random(jax.random.key(0), {"w": jnp.zeros((2, 2))})
    assert lists(mask) == {"w": [[1, 1], [1, 1]]}


# Refusals.


@pytest.mark.parametrize("make", [Unstructured, Structured], ids=lambda make: make.__name__)
@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), float("inf"), 50])
def test_a_sparsity_out_of_range_is_refused(make, sparsity):
    with pytest.raises(ValueError, match="sparsity, the share NOT perturbed, must be from 0 to 1, got"):
        make(sparsity)


@pytest.mark.parametrize("sparsity", [True, "0.5", None, [0.5]])
def test_a_sparsity_that_is_no_number_is_refused(sparsity):
    with pytest.raises(TypeError, match="sparsity must be a float from 0 to 1, got"):
        Unstructured(sparsity)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"unit": "row"}, "unit must be 'tensor', 'channel' or 'block', got 'row'"),
        ({"indivisible": "pad"}, "indivisible must be 'error' or 'whole', got 'pad'"),
        ({"axis": 0}, "axis must be None when unit is 'tensor', got 0"),
        ({"block": 2}, "block must be given when unit is 'block', and only then, got 2"),
        ({"unit": "block"}, "block must be given when unit is 'block', and only then, got None"),
        ({"unit": "channel", "axis": (0, 1)}, r"axis must be an int when unit is 'channel', got \(0, 1\)"),
        ({"unit": "block", "block": 2.0}, r"block must be an int or a tuple of them, got 2\.0"),
        ({"unit": "block", "block": 2, "axis": "last"}, "axis must be an int or a tuple of them, got 'last'"),
        ({"unit": "block", "block": [2, 2]}, r"block must be an int or a tuple of them, got \[2, 2\]"),
        ({"unit": "block", "block": (2, 2), "axis": 0}, "axis and block must name as many axes as extents"),
        ({"unit": "block", "block": 0}, "block must hold at least 1 entry along each axis, got 0"),
        ({"unit": "block", "block": ()}, r"block must hold at least 1 entry along each axis, got \(\)"),
    ],
)
def test_structured_refuses_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Structured(0.5, **arguments)


def test_unstructured_refuses_an_unknown_scope():
    with pytest.raises(ValueError, match="scope must be 'global' or 'leaf', got 'tree'"):
        Unstructured(0.5, "tree")


@pytest.mark.parametrize("n, m", [(-1, 4), (5, 4), (0, 0), (1, -1)])
def test_n_of_m_refuses_impossible_groups(n, m):
    with pytest.raises(ValueError, match=f"n and m must satisfy 0 <= n <= m and m >= 1, got n={n}, m={m}"):
        NM(n, m)


@pytest.mark.parametrize(
    "arguments, name", [((2.0, 4), "n"), ((2, "4"), "m"), ((2, 4, None), "axis"), ((True, 4), "n")]
)
def test_n_of_m_refuses_what_is_no_integer(arguments, name):
    with pytest.raises(TypeError, match=f"{name} must be an int, got"):
        NM(*arguments)


def test_n_of_m_refuses_an_unknown_treatment_of_misfits():
    with pytest.raises(ValueError, match="indivisible must be 'error' or 'whole', got 'pad'"):
        NM(2, 4, indivisible="pad")


MISFIT = {"block_0": {"kernel": np.ones((2, 6), np.float32)}}


@pytest.mark.parametrize(
    "pattern, message",
    [
        (
            NM(2, 4),
            "its axis -1 of size 6 is not divisible by m=4; choose another axis, or indivisible='whole'",
        ),
        (NM(1, 2, axis=2), "it has no axis 2"),
        (
            Structured(0.5, "block", block=4),
            "its axis -1 of size 6 is not divisible by block=4; choose another block, or indivisible='whole'",
        ),
    ],
    ids=str,
)
def test_a_misfit_names_the_leaf(pattern, message):
    message = f"the pattern does not fit the leaf 'block_0/kernel': {message}."
    for call in (lambda: pattern(MISFIT), lambda: pattern.random(jax.random.key(0), MISFIT)):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_scores_that_are_no_real_floats_are_refused_by_path(pattern):
    with pytest.raises(TypeError, match=r"scores must hold real floating-point arrays.*leaf 'a/b' is int32"):
        pattern({"a": {"b": jnp.ones((2, 2), jnp.int32)}})


def test_a_pattern_without_a_call_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Pattern()
