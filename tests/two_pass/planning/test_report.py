"""The report on a choice of leaves, and the best choice for a budget."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planned_losses import BLOCKS, LOSSES, ROWS, SQUARES, STACKED, blocks, mlp, scanned, shape

from ssam_jax._base import tracing
from ssam_jax.two_pass.active import FirstRow
from ssam_jax.two_pass.planning import costs
from ssam_jax.two_pass.planning.report import choose_active, explain_two_pass


def scores_of(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.random(leaf.shape), params)


def total(scores, active):
    parts = [
        leaf[entry.row :].sum() if isinstance(entry, FirstRow) else leaf.sum() * entry
        for leaf, entry in zip(jax.tree.leaves(scores), active)
    ]
    return sum(parts)


def choices(rows):
    options = [[False, True, *map(FirstRow, range(1, n))] for n in rows]
    return itertools.product(*options)


@pytest.mark.parametrize("budget", [1, 1.1, 1.25, 1.6, 2])
@pytest.mark.parametrize("name", ["convolutional", "checkpoint", "scan", "unrolled", "attention", "cond"])
def test_the_choice_is_the_best_of_all(name, budget):
    loss, params, x = LOSSES[name]
    scores = scores_of(params)
    counted = costs.count(tracing.trace(loss, params, x))
    affordable = [active for active in choices(counted.rows) if counted.relative(active) <= budget]
    chosen = choose_active(loss, params, x, scores=scores, budget=budget)
    assert counted.relative(chosen) <= budget
    assert total(scores, chosen) == pytest.approx(max(total(scores, active) for active in affordable))


def test_of_equal_scores_the_cheaper_is_chosen():
    scores = {"a": 1.0, "b": 1.0, "c": 1.0}
    assert choose_active(mlp, SQUARES, ROWS, scores=scores, budget=1.25) == (False, False, True)


def test_leaves_without_a_score_are_not_chosen():
    scores = {"a": 0.0, "b": 1.0, "c": 0.0}
    assert choose_active(mlp, SQUARES, ROWS, scores=scores, budget=2) == (False, True, False)


def test_rows_are_chosen_from_one_on():
    scores = jax.tree.map(lambda leaf: np.zeros(leaf.shape), STACKED)
    scores["layers"]["out"][2] = 1.0
    expected = (False, False, False, FirstRow(2))
    assert choose_active(scanned, STACKED, ROWS, scores=scores, budget=1.6) == expected


def test_scores_of_another_shape_are_shared_by_the_rows():
    scores = {"embed": 0.0, "head": 0.0, "layers": {"in": 0.0, "out": 4.0}}
    chosen = choose_active(scanned, STACKED, ROWS, scores=scores, budget=1.3)
    assert chosen == (False, False, False, FirstRow(3))


def test_scores_may_be_jax_arrays_of_low_precision():
    scores = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.bfloat16), SQUARES)
    assert choose_active(mlp, SQUARES, ROWS, scores=scores) == (False, False, True)


def test_a_loss_with_aux_is_chosen_for_like_one_without():
    with_aux = lambda params, x: (mlp(params, x), {"logits": x @ params["a"], "name": "mlp"})  # noqa: E731
    scores = scores_of(SQUARES)
    expected = choose_active(mlp, SQUARES, ROWS, scores=scores)
    assert choose_active(with_aux, SQUARES, ROWS, scores=scores) == expected


@pytest.mark.parametrize("budget", [0.9, float("nan"), float("inf")])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match="budget must be finite and at least 1"):
        choose_active(mlp, SQUARES, ROWS, scores=scores_of(SQUARES), budget=budget)


@pytest.mark.parametrize("budget", ["1.5", True, None])
def test_a_budget_that_is_no_number_is_refused(budget):
    with pytest.raises(TypeError, match="budget must be a number"):
        choose_active(mlp, SQUARES, ROWS, scores=scores_of(SQUARES), budget=budget)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_scores_out_of_range_are_refused_by_the_name_of_their_leaf(bad):
    scores = {**scores_of(SQUARES), "b": np.array([1.0, bad])}
    with pytest.raises(ValueError, match="scores must be finite and not negative, but the leaf 'b'"):
        choose_active(mlp, SQUARES, ROWS, scores=scores)


def test_scores_of_another_structure_are_refused():
    with pytest.raises(ValueError, match="scores must have the tree structure of params"):
        choose_active(mlp, SQUARES, ROWS, scores={"a": 1.0})


def test_scores_that_are_traced_are_refused():
    def traced(scores):
        choose_active(mlp, SQUARES, ROWS, scores=scores)

    with pytest.raises(TypeError, match="the leaf 'a' is traced"):
        jax.jit(traced)(jax.tree.map(np.float32, {"a": 1, "b": 1, "c": 1}))


def test_a_report_divides_the_forward_pass_in_two():
    report = explain_two_pass(mlp, SQUARES, ROWS, active=(False, False, True))
    product = 2 * 8 * 32 * 32
    assert report.prefix.flops == 2 * product
    assert report.suffix.flops == product
    assert report.prefix.equations == 4  # two products, two tanh
    # a product reads 8x32 and 32x32 and writes 8x32, tanh reads and writes 8x32
    assert report.prefix.bytes == 2 * 4 * (4 * 8 * 32 + 32 * 32)
    assert report.relative_to_sgd == 1.25
    assert report.relative_to_sam == 0.625
    assert report.whole == report.unknown == ()


def test_a_report_without_a_choice_is_on_plain_sam():
    report = explain_two_pass(mlp, SQUARES, ROWS)
    assert report.prefix.equations == 0
    assert report.relative_to_sam == 1


def test_keyword_arguments_reach_the_loss_as_in_a_call_of_it():
    def loss(params, rows, *, scale, deep):
        return mlp(params, rows) * scale if deep else jnp.sum(params["a"])

    given, active = {"scale": shape(), "deep": True}, (False, False, True)
    plain = explain_two_pass(mlp, SQUARES, ROWS, active=active)
    for args, rows in (((ROWS,), {}), ((), {"rows": ROWS})):
        report = explain_two_pass(loss, SQUARES, *args, active=active, **rows, **given)
        assert (report.prefix, report.suffix.flops) == (plain.prefix, plain.suffix.flops)
        scores = dict.fromkeys(SQUARES, 1.0)
        assert choose_active(loss, SQUARES, *args, scores=scores, budget=1.25, **rows, **given) == active


def test_a_report_prints_as_a_table():
    report = explain_two_pass(mlp, SQUARES, ROWS, active=(False, False, True))
    assert str(report).splitlines() == [
        "forward pass       equations       Gflop          MB",
        "prefix, once               4   3.277e-05     0.01638",
        "suffix, twice              4   1.638e-05     0.01127",
        "a step costs 1.25 of SGD's, 0.62 of SAM's",
    ]


def test_a_report_says_what_is_not_split():
    loss, params, x = LOSSES["cond"]
    report = explain_two_pass(loss, params, x, active=(False, True, False))
    (listed,) = report.whole
    assert listed.startswith("cond at ")
    assert f"not split: {listed}" in str(report)


def test_a_report_follows_a_checkpoint_that_is_cut():
    active = (False, False, False, True, False, True, True)  # the second layer of the third block
    report = explain_two_pass(blocks, BLOCKS, ROWS, active=active)
    assert report.whole == ()
    assert report.prefix.flops > 0 < report.suffix.flops
    total = explain_two_pass(blocks, BLOCKS, ROWS).suffix.flops
    assert report.prefix.flops + report.suffix.flops == total


def test_a_report_follows_rows():
    report = explain_two_pass(scanned, STACKED, ROWS, active=(False, True, FirstRow(3), FirstRow(3)))
    layer = 2 * 2 * 8 * 32 * 64
    assert report.prefix.flops == 3 * layer + 2 * 8 * 32 * 32
    assert report.suffix.flops == layer + 2 * 8 * 32 * 16


def test_a_report_on_a_loss_with_side_effects_says_why_it_costs_what_sam_costs():
    def loss(params, x):
        jax.debug.print("{}", x[0, 0])
        return mlp(params, x)

    report = explain_two_pass(loss, SQUARES, ROWS, active=(False, False, True))
    assert report.relative_to_sgd == 2
    assert report.prefix == (0, 0.0, 0.0)
    assert report.side_effect in str(report) and "test_report.py" in report.side_effect


def transformer(params, x):
    def layer(x, p):
        h = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)) * p["scale"][None, None]
        q, k, v = (h @ p[name] for name in "qkv")
        x = x + jax.nn.softmax(q @ k.mT) @ v @ p["o"]
        return x + jax.nn.gelu(x @ p["up"]) @ p["down"], None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    return jnp.mean((x @ params["head"]) ** 2)


def test_a_transformer_of_48_layers_takes_well_under_a_second():
    layers = {name: shape(48, 64, 64) for name in "qkvo"} | {"scale": shape(48, 64)}
    layers |= {"up": shape(48, 64, 256), "down": shape(48, 256, 64)}
    params = {"layers": layers, "head": shape(64, 100)}
    scores = scores_of(params)
    start = time.process_time()
    chosen = choose_active(transformer, params, shape(2, 16, 64), scores=scores, budget=1.25)
    assert time.process_time() - start < 5  # 0.3 s on a quiet machine
    counted = costs.count(tracing.trace(transformer, params, shape(2, 16, 64)))
    assert 1.24 < counted.relative(chosen) <= 1.25
