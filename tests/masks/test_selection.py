"""`selection` against a stable sort, on one device and on eight."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import element_counts, operations
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from ssam_jax import NM, Structured, Unstructured
from ssam_jax.masks import rows, selection
from ssam_jax.masks.counts import Count
from ssam_jax.masks.shards import Here, Part

FLOATS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}
MANTISSA = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}
SHAPES = [(3,), (), (2, 4), (0, 2), (5,)]
SIZE = sum(math.prod(shape) for shape in SHAPES)


def special_bits(dtype):
    """Zeros, subnormals, ones, the largest, infinities and NaN of both signs, as bit patterns."""
    width, mantissa = FLOATS[dtype], MANTISSA[dtype]
    infinity = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    one = (infinity >> 1) & ~((1 << mantissa) - 1)
    positive = [0, 1, 2, (1 << mantissa) - 1, one, one + 1, infinity - 1, infinity, infinity + 1]
    return [bits | sign for sign in (0, 1 << (width - 1)) for bits in positive]


def from_bits(bits, dtype):
    return np.array(bits, f"uint{FLOATS[dtype]}").view(np.dtype(dtype))


def x64(enabled):
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    from jax.experimental import enable_x64

    return enable_x64(enabled)


def best_first(scores):
    """Return the flat indices by falling score: a stable sort with NaN last."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = np.asarray(scores).reshape(-1).astype(np.float64)
    nan = np.isnan(values)
    return np.lexsort((-np.where(nan, 0, values), nan))


def sorted_mask(scores, k):
    mask = np.zeros(np.size(scores), bool)
    mask[best_first(scores)[:k]] = True
    return mask


def cut(flat, shapes):
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(np.asarray(flat), ends), shapes)]


def joined(leaves):
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves])


def rows_of(shapes, width=rows.WIDTH):
    parts = [Part.of(tuple(shape), None) for shape in shapes]
    return rows.Rows(Here(parts, [], ()), parts, width)


def marked(keys, weights, budget, shared, width=rows.WIDTH):
    """Select among lists of keys, each of which has a row of the budget."""
    layout = rows_of([k.shape for k in keys], width)
    joined = jnp.where(layout.filled(), layout.joined(keys), 0)
    weighed = [w * jnp.sum(k != 0, dtype=jnp.int32) for w, k in zip(weights, keys)]
    candidates = budget.like(jnp.stack(weighed)[:, None])
    accounts = selection.Accounts(candidates.total() if shared else candidates, weights, budget, shared)
    return layout.parted(selection.largest(layout, joined, accounts), jnp.array(True))


def column(numbers, most=0):
    return Count.static([[number] for number in numbers], most)


@jax.jit
def largest_of_all(scores, k):
    keys = selection.comparable_keys(scores)
    return marked(keys, [1] * len(keys), Count(None, jnp.full((1, 1), k, jnp.int32)), True)


@jax.jit
def largest_of_each(scores, k):
    keys = selection.comparable_keys(scores)
    return marked(keys, [1] * len(keys), Count(None, k[:, None]), False)


@pytest.mark.parametrize("dtype", FLOATS)
def test_selection_is_a_stable_sort_of_the_special_values_for_every_k(dtype):
    flat = from_bits(np.resize(np.random.default_rng(0).permutation(special_bits(dtype)), SIZE), dtype)
    with x64(dtype == "float64"):
        for k in range(SIZE + 1):
            mask = largest_of_all(cut(flat, SHAPES), np.int32(k))
            np.testing.assert_array_equal(joined(mask), sorted_mask(flat, k), err_msg=f"k={k}")


@pytest.mark.parametrize("dtype", FLOATS)
@hypothesis.given(data=st.data(), k=st.integers(0, SIZE))
def test_selection_is_a_stable_sort_of_any_floats(dtype, data, k):
    entry = st.one_of(st.sampled_from(special_bits(dtype)), st.integers(0, 2 ** FLOATS[dtype] - 1))
    flat = from_bits(data.draw(st.lists(entry, min_size=SIZE, max_size=SIZE)), dtype)
    with x64(dtype == "float64"):
        mask = largest_of_all(cut(flat, SHAPES), np.int32(k))
    np.testing.assert_array_equal(joined(mask), sorted_mask(flat, k))


@pytest.mark.parametrize("k", [5, SIZE])
def test_the_global_pattern_is_a_stable_sort_in_tree_order(k):
    flat = np.random.default_rng(1).integers(-2, 3, SIZE).astype(np.float32)
    leaves = dict(zip("abcde", cut(flat, SHAPES)))
    mask = Unstructured(sparsity=1 - k / SIZE)(leaves)
    np.testing.assert_array_equal(joined(mask[name] for name in "abcde"), sorted_mask(flat, k))


@hypothesis.given(
    flat=st.lists(st.integers(0, 3), min_size=SIZE, max_size=SIZE),
    shares=st.lists(st.floats(0, 1), min_size=len(SHAPES), max_size=len(SHAPES)),
)
@hypothesis.settings(max_examples=60)
def test_separate_budgets_are_a_stable_sort_of_each_array(flat, shares):
    leaves = cut(np.array(flat, np.float32), SHAPES)
    budgets = [round(share * leaf.size) for share, leaf in zip(shares, leaves)]
    masks = largest_of_each(leaves, np.array(budgets, np.int32))
    for leaf, mask, k in zip(leaves, masks, budgets):
        np.testing.assert_array_equal(np.ravel(mask), sorted_mask(leaf, k))


def test_the_cut_of_a_tree_into_leaves_does_not_matter():
    flat = np.random.default_rng(2).integers(0, 4, SIZE).astype(np.float32)
    for k in (3, 9, 14):
        masks = [
            joined(largest_of_all(cut(flat, shapes), np.int32(k)))
            for shapes in (SHAPES, [(SIZE,)], [(1, 7), (2, 5)])
        ]
        np.testing.assert_array_equal(masks[0], masks[1])
        np.testing.assert_array_equal(masks[0], masks[2])


def test_leaves_of_float32_and_float64_compete_by_value():
    with x64(True):
        mask = Unstructured(0.5)(
            {"a": jnp.array([1.0, -5.0], jnp.float64), "b": jnp.array([2.0, 3.0], jnp.float32)}
        )
    assert [m.tolist() for m in mask.values()] == [[False, False], [True, True]]


def test_leaves_of_half_and_single_precision_compete_by_value():
    dtypes = (jnp.bfloat16, jnp.float16, jnp.float32)
    scores = [jnp.array(x, d) for x, d in zip(([1.0, 4.0], [2.0, 5.0], [3.0, 0.0]), dtypes)]
    mask = largest_of_all(scores, np.int32(3))
    assert [m.tolist() for m in mask] == [[False, True], [False, True], [True, False]]


def test_entries_of_key_zero_are_no_candidates():
    keys = [jnp.array([0, 7, 0, 5, 5, 0], jnp.uint32)]
    for k, expected in ((0, []), (1, [1]), (2, [1, 3]), (3, [1, 3, 4])):
        (mask,) = marked(keys, [1], column([k]), True)
        assert np.flatnonzero(mask).tolist() == expected


WEIGHTS = [3, 1, 5]


@jax.jit
def weighted(keys, budget):
    return marked(keys, WEIGHTS, Count(None, jnp.full((1, 1), budget)), True)


@hypothesis.given(
    flat=st.lists(st.integers(1, 4), min_size=9, max_size=9),
    budget=st.integers(0, 3 * 2 + 1 * 4 + 5 * 3),
)
@hypothesis.settings(max_examples=150)
def test_weighted_units_are_taken_best_first_until_the_budget_is_reached(flat, budget):
    keys = cut(np.array(flat, np.uint32), [(2,), (4,), (3,)])
    weights, expected, reached = np.repeat(WEIGHTS, [2, 4, 3]), np.zeros(9, bool), 0
    for i in best_first(flat):
        if reached < budget:
            expected[i] = True
            reached += weights[i]
    np.testing.assert_array_equal(joined(weighted(keys, np.int32(budget))), expected)


# Counts beyond int32.

BIG = st.integers(0, 2**45)


def limbs(numbers):
    return Count.static(numbers, 2**46)


def exact(count):
    return [int(h) * 2**16 + int(low) for h, low in zip(np.ravel(count.high), np.ravel(count.low))]


def in_normal_form(count):
    return bool(np.all((np.asarray(count.low) >= 0) & (np.asarray(count.low) < 2**16)))


@hypothesis.given(numbers=st.lists(st.tuples(BIG, BIG), min_size=4, max_size=4))
def test_counts_calculate_as_python_integers_do(numbers):
    a, b = ([pair[i] for pair in numbers] for i in (0, 1))
    x, y = limbs(a), limbs(b)
    assert exact(x) == a
    assert exact(x.minus(y)) == [max(0, i - j) for i, j in numbers]
    assert exact(x.minimum(y)) == [min(pair) for pair in numbers]
    assert x.at_least(y).tolist() == [i >= j for i, j in numbers]
    assert x.at_least(x).tolist() == [True] * 4
    assert all(in_normal_form(c) for c in (x, x.minus(y), x.minimum(y)))


@hypothesis.given(numbers=st.lists(st.integers(0, 2**43), min_size=5, max_size=5))
def test_counts_add_up_over_rows(numbers):
    count = limbs(numbers)
    assert exact(count.total()) == [sum(numbers)]


@pytest.mark.parametrize("value", [0, 1, 2**16 - 1, 2**16, 2**31 - 1])
def test_int32_counts_are_split_exactly(value):
    assert exact(Count.of(jnp.array([value], jnp.int32))) == [value]


@pytest.mark.parametrize(
    "value, expected", [(0.5, 0), (1.5, 2), (65535.5, 65536), (3.0 * 2**33, 3 * 2**33), (2.0**45, 2**45)]
)
def test_floats_are_rounded_to_counts(value, expected):
    count = limbs([0]).rounded(jnp.array([value], jnp.float32))
    assert exact(count) == [expected]
    assert float(count.as_float()[0]) == expected
    if value < 2**31:
        count = Count.static([0], 2**31 - 1).rounded(jnp.array([value], jnp.float32))
        assert count.high is None and count.low.tolist() == [expected]
        assert float(count.as_float()[0]) == expected


SMALL = st.integers(0, 2**29)


@hypothesis.given(numbers=st.lists(st.tuples(SMALL, SMALL), min_size=3, max_size=3))
def test_counts_within_int32_calculate_as_those_beyond(numbers):
    a, b = ([pair[i] for pair in numbers] for i in (0, 1))
    x, y = (Count.static(n, 2**31 - 1) for n in (a, b))
    assert x.high is None
    assert x.minus(y).low.tolist() == [max(0, i - j) for i, j in numbers]
    assert x.minimum(y).low.tolist() == [min(pair) for pair in numbers]
    assert x.at_least(y).tolist() == [i >= j for i, j in numbers]
    assert x.total().low.tolist() == [sum(a)]


def test_budgets_beyond_int32_are_met_exactly():
    weights = [2**30, 2**30, 2**29]
    keys = [jnp.array([k], jnp.uint32) for k in (5, 9, 7)]
    for budget, expected in ((2**30 + 2**29, [0, 1, 1]), (2**30 + 2**29 + 1, [1, 1, 1]), (2**30, [0, 1, 0])):
        mask = marked(keys, weights, column([budget], 2**46), True)
        assert [int(m[0]) for m in mask] == expected
    mask = marked(keys, weights, column([2**31 + 2**29], 2**46), True)
    assert [int(m[0]) for m in mask] == [1, 1, 1]


def test_an_array_too_large_to_count_is_refused():
    huge = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match="cannot count in a leaf of more than 2147483647 entries"):
        jax.eval_shape(Unstructured(0.5), huge)


# Groups.


@pytest.mark.parametrize(
    "n, m, axis", [(0, 3, -1), (1, 1, 0), (1, 2, 0), (2, 4, -1), (4, 4, 1), (2, 4, -3), (3, 5, 1)]
)
def test_groups_keep_what_a_stable_argsort_keeps(n, m, axis):
    shape = [2, 3, 1]
    shape[axis] = 2 * m
    select = jax.jit(NM(n, m, axis=axis))
    for seed, levels in enumerate((1, 2, 2, 3, 3, 1000, 1000)):
        scores = np.random.default_rng(seed).integers(0, levels, shape).astype(np.float32)
        ranked, kept = (np.moveaxis(x, axis, -1).reshape(-1, m) for x in (scores, np.asarray(select(scores))))
        rank = np.argsort(np.argsort(-ranked, axis=1, kind="stable"), axis=1)
        np.testing.assert_array_equal(kept, rank < n)


def test_groups_longer_than_a_row_are_rows(monkeypatch):
    monkeypatch.setattr(rows, "WIDTH", 4)
    scores = np.random.default_rng(0).permutation(12 * 2).reshape(2, 12).astype(np.float32)
    mask = np.asarray(NM(2, 6)(jnp.asarray(scores))).reshape(4, 6)
    for kept, row in zip(mask, scores.reshape(4, 6)):
        assert set(row[kept]) == set(sorted(row)[-2:])


def test_groups_rank_nan_lowest_and_infinity_highest():
    row = jnp.array([[jnp.nan, -jnp.inf, 0.0, jnp.inf, -0.0, 0.0, -1.0, jnp.nan]])
    assert NM(2, 4)(row).tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    assert NM(3, 4)(row).tolist() == [[0, 1, 1, 1, 1, 1, 1, 0]]


# Rows.


@pytest.mark.parametrize("width", [1, 4, 1024])
def test_rows_come_apart_into_the_arrays_they_were_joined_from(width):
    arrays = [jnp.asarray(np.random.default_rng(i).random(shape) < 0.5) for i, shape in enumerate(SHAPES)]
    layout = rows_of(SHAPES, width)
    joined = layout.joined(arrays)
    assert joined.shape == layout.shape and int(layout.filled().sum()) == SIZE
    for part, array in zip(layout.parted(joined, jnp.array(True)), arrays):
        np.testing.assert_array_equal(part, array)


@pytest.mark.parametrize("shapes", [SHAPES, [(1500,), (0,), (1,), (40, 50)]], ids=str)
def test_rows_are_added_up_by_array(shapes):
    layout = rows_of(shapes, width=4)
    values = np.random.default_rng(0).integers(0, 2**20, (layout.shape[0], 2, 3)).astype(np.int32)
    filled = np.asarray(layout.filled()).any(axis=1)
    values[~filled] = 0
    sums = layout.sums(jnp.asarray(values))
    ends = np.cumsum([-(-math.prod(shape) // 4) for shape in shapes])
    for found, part in zip(sums, np.split(values, ends)):
        np.testing.assert_array_equal(found, part.sum(axis=0))


# Cost.


def passes(monkeypatch, scores, k):
    """Select on the host and return how often the search read the data."""
    reads = []
    original = selection._count_at_least
    monkeypatch.setattr(selection, "_count_at_least", lambda *args: (reads.append(1), original(*args))[1])
    keys = selection.ordered_keys(jnp.asarray(scores))
    with jax.disable_jit():
        (mask,) = marked([keys], [1], column([k]), True)
    monkeypatch.undo()
    np.testing.assert_array_equal(mask, sorted_mask(scores, k))
    return len(reads)


def adversarial():
    """Data whose threshold is a tie that no pivot can split off, at many places between the extremes."""
    bits = np.random.default_rng(3).integers(0, 2**32, 1, dtype=np.uint32).view(np.float32)
    thresholds = [0.0, np.float32(1e-45), *bits[np.isfinite(bits)]]
    return [np.array([-np.inf, x, x, x, np.inf], np.float32) for x in thresholds]


def test_each_of_two_searches_reads_float32_data_at_most_eleven_times(monkeypatch):
    counted = [passes(monkeypatch, scores, k=2) for scores in adversarial()]
    assert max(counted) <= 22
    assert max(counted) > 11, "not adversarial: no ties were left"


def test_the_search_ends_as_soon_as_a_pivot_splits_off_the_budget(monkeypatch):
    assert passes(monkeypatch, np.array([-1.0, 1.0], np.float32), k=1) == 1
    assert passes(monkeypatch, np.arange(8, dtype=np.float32), k=8) <= 2


def compiled(pattern, scores):
    return jax.jit(pattern).lower(scores).compile()


SCORES = {"bias": (16,), "conv": (3, 3, 64, 16), "kernel": (96, 128)}
LAYOUTS = {
    "8": [PartitionSpec("i"), PartitionSpec(None, None, None, "i"), PartitionSpec("i")],
    "2x4": [PartitionSpec(), PartitionSpec(None, None, "i", "j"), PartitionSpec("j", "i")],
}


def scores_with_ties(seed=4):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 50, shape).astype(np.float32) for name, shape in SCORES.items()}


def sharded(scores, layout):
    shape, names = ((8,), ("i",)) if layout == "8" else ((2, 4), ("i", "j"))
    mesh = jax.make_mesh(shape, names)
    specs = LAYOUTS[layout]
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, spec))
        for (name, leaf), spec in zip(scores.items(), specs)
    }


def test_no_operation_is_larger_than_the_rows_of_the_scores_and_none_sorts():
    program = compiled(Unstructured(0.7), scores_with_ties()).as_text()
    assert max(element_counts(program)) == math.prod(rows_of(SCORES.values()).shape)
    assert not operations(program, "sort")
    assert not operations(program, "topk")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_selection_equals_that_on_one_device_and_moves_no_leaf(layout):
    assert jax.device_count() == 8
    scores = scores_with_ties()
    pattern = Unstructured(0.7)
    program = compiled(pattern, sharded(scores, layout))
    mask = program(sharded(scores, layout))
    flat = joined(scores[name] for name in sorted(scores))
    expected = sorted_mask(flat, round(0.3 * flat.size))
    np.testing.assert_array_equal(joined(mask[name] for name in sorted(mask)), expected)
    text = program.as_text()
    assert operations(text, "all-reduce") or operations(text, "all-gather"), "nothing was sharded"
    assert not operations(text, "sort")
    for name in ("all-gather", "all-to-all", "collective-permute"):
        assert not operations(text, name)
    assert len(operations(text, "all-reduce")) == 1, "counts of all leaves travel together"
    share = sum(map(math.prod, SCORES.values())) // 8
    assert max(element_counts(text)) <= share + len(SCORES) * rows.WIDTH


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 2, axis=-2), Structured(0.5, "channel")], ids=str)
def test_other_patterns_on_eight_devices_equal_those_on_one(pattern):
    scores = {name: leaf for name, leaf in scores_with_ties().items() if leaf.ndim > 1}
    scores = {name: leaf + np.arange(leaf.size).reshape(leaf.shape) / 1e4 for name, leaf in scores.items()}
    scores = {name: leaf.astype(np.float32) for name, leaf in scores.items()}
    scores = {"bias": np.zeros(16, np.float32), **scores}
    expected = jax.jit(pattern)(scores)
    mask = jax.jit(pattern)(sharded(scores, "2x4"))
    for name in scores:
        np.testing.assert_array_equal(mask[name], expected[name])
