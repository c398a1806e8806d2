"""The predicted operations are those of the compiled step."""

import functools

import jax
import jax.numpy as jnp
import pytest
from counting import contraction_flops
from jax import lax
from planned_losses import BLOCKS, KERNELS, LOSSES, ROWS, SQUARES, STACKED, mlp, scanned, shape, with_metrics

from ssam_jax._base import tracing
from ssam_jax.two_pass.active import FirstRow
from ssam_jax.two_pass.loss import trace_loss
from ssam_jax.two_pass.passes import two_pass_value_and_grad
from ssam_jax.two_pass.planning import costs

TOLERANCE = 0.05

# The compiler merges what a checkpoint outside of a loop computes again, unless it is told not to.
UNMERGED = ("checkpoint", "checkpoint that saves products")


def count(loss, params, x):
    return costs.count(trace_loss(loss, params, x, has_aux=loss is with_metrics).traced)


def some(params, *names):
    """Return the choice of the leaves in whose paths one of the names stands."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    return tuple(any(f"'{name}'" in path for name in names) for path in paths)


@functools.cache
def compiled_sgd(name):
    loss, params, x = LOSSES[name]
    has_aux = loss is with_metrics
    return contraction_flops(jax.value_and_grad(loss, has_aux=has_aux), params, x, merge=name not in UNMERGED)


def compiled_step(name, active):
    loss, params, x = LOSSES[name]
    two_pass = two_pass_value_and_grad(loss, has_aux=loss is with_metrics)

    def step(params, x):
        value, grads, grad_fn = two_pass(params, x, active=active)
        elsewhere = jax.tree.map(lambda w, g: w + 0.1 * g, params, grads)
        return value, grads, grad_fn(elsewhere, 0)

    return contraction_flops(step, params, x, merge=name not in UNMERGED)


@pytest.mark.parametrize("name", LOSSES)
def test_an_sgd_step_is_predicted_exactly(name):
    assert count(*LOSSES[name]).sgd == compiled_sgd(name)


STEPS = [
    ("mlp", some(SQUARES, "a")),
    ("mlp", some(SQUARES, "b")),
    ("mlp", some(SQUARES, "a", "c")),
    ("convolutional", some(KERNELS, "b")),
    ("convolutional", some(KERNELS, "c", "d")),
    ("checkpoint", some(BLOCKS, "two")),
    ("checkpoint", (False, False, False, False, False, True, False)),
    ("checkpoint that saves products", some(BLOCKS, "three")),
    ("scan", some(STACKED, "head")),
    ("scan", some(STACKED, "embed")),
    ("scan", some(STACKED, "out")),
    ("scan", (False, True, FirstRow(2), FirstRow(2))),
    ("scan", (False, True, FirstRow(3), FirstRow(3))),
    ("scan", (False, False, FirstRow(3), FirstRow(1))),
    ("scan of checkpoints", some(STACKED, "in")),
    ("scan of checkpoints", (False, True, FirstRow(2), FirstRow(2))),
    ("scan of checkpoints", (False, True, FirstRow(3), FirstRow(3))),
    ("unrolled", (False, True, FirstRow(3), FirstRow(2))),
    ("custom rules", some(SQUARES, "b")),
    ("custom rules", some(SQUARES, "c")),
    ("cond", some(SQUARES, "b")),
    ("microbatches", some(SQUARES, "c")),
    ("attention", (False, True, False, False)),
    ("attention", (True, False, False, True)),
    ("stop_gradient", some(SQUARES, "b")),
    ("aux", some(SQUARES, "b")),
    ("aux", some(SQUARES, "c")),
]


def step_id(name, active):
    return f"{name}, " + " ".join(str(getattr(entry, "row", "x" if entry else "-")) for entry in active)


@pytest.mark.parametrize(("name", "active"), STEPS, ids=[step_id(*step) for step in STEPS])
def test_a_two_pass_step_is_predicted_within_five_percent(name, active):
    predicted = count(*LOSSES[name]).relative(active)
    assert predicted == pytest.approx(compiled_step(name, active) / compiled_sgd(name), rel=TOLERANCE)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"aux", "stop_gradient"}))
def test_all_leaves_cost_two_steps_and_none_costs_one(name):
    counted = count(*LOSSES[name])
    everything = (True,) * len(counted.rows)
    assert counted.relative(everything) == 2
    assert counted.relative((False,) * len(counted.rows)) == 1


@pytest.mark.parametrize("name", ["scan", "unrolled", "scan of checkpoints"])
def test_more_rows_never_cost_less(name):
    counted = count(*LOSSES[name])
    rows = [counted.relative((False, False, entry, entry)) for entry in (FirstRow(3), FirstRow(2), True)]
    assert rows == sorted(rows) and rows[0] < rows[-1]


def test_leaves_that_are_scanned_over_have_a_bit_for_each_row():
    assert count(*LOSSES["scan"]).rows == (1, 1, 4, 4)
    assert count(*LOSSES["mlp"]).rows == (1, 1, 1)


def test_rows_are_followed_through_operations_that_keep_them_apart():
    def loss(params, x):
        layers = {name: leaf.astype(jnp.float32) * 0.5 for name, leaf in params["layers"].items()}
        layers["out"] = layers["out"].mT.mT
        return scanned({**params, "layers": layers}, x)

    plain, cast = count(*LOSSES["scan"]), count(loss, STACKED, ROWS)
    active = (False, True, FirstRow(2), FirstRow(3))
    assert cast.relative(active) == plain.relative(active)


def test_a_scan_in_reverse_runs_through_its_last_rows_first():
    def loss(params, x):
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"], reverse=True)
        return jnp.sum(x**2)

    counted = count(loss, {"w": shape(4, 32, 32)}, ROWS)
    assert counted.relative((FirstRow(3),)) > 1.7


def test_what_is_not_known_is_listed():
    def loss(params, x):
        seen = lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ lax.stop_gradient(x), x)
        return jnp.sum(lax.stop_gradient(seen) @ params["w"])

    (listed,) = count(loss, {"w": shape(8, 8)}, shape(8, 8)).opaque
    assert listed.startswith("while at ") and "test_costs.py" in listed
    assert count(*LOSSES["mlp"]).opaque == ()


def test_a_loss_with_side_effects_costs_a_whole_step_more_for_any_leaf():
    def loss(params, x):
        jax.debug.print("{}", x[0, 0])
        return mlp(params, x)

    assert count(loss, SQUARES, ROWS).relative((False, False, True)) == 2


def test_a_loss_without_products_costs_two_for_any_leaf():
    counted = count(lambda params, x: jnp.sum(params["w"] * x), {"w": shape(8, 32)}, ROWS)
    assert counted.relative((True,)) == 2
    assert counted.relative((False,)) == 1


def test_the_equations_of_a_nested_jit_count_like_any_others():
    def nested(params, x):
        return jax.jit(mlp)(params, x)

    traced = tracing.trace(nested, SQUARES, ROWS)
    assert costs.count(traced) == count(mlp, SQUARES, ROWS)
