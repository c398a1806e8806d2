"""The rate of convergence: what the check catches, what the script writes, what the page says."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from ssam_experiments import convergence, rates
from ssam_experiments.convergence import Config
from ssam_experiments.rates import judge

ROOT = pathlib.Path(__file__).parents[2]
AT = rates.checkpoints(100_000)
WINDOW = (1000, 10_000)


def curves(fall, spread=0.1):
    """Return a curve for each of 8 seeds, each a multiple of one that falls as told."""
    return fall(AT)[:, None] * np.linspace(1 - spread, 1 + spread, 8)


@pytest.mark.parametrize("fall", [lambda t: t**-0.3, lambda t: 1 / np.log(t), lambda t: 0.0 * t + 1])
def test_a_curve_slower_than_the_bound_is_found(fall):
    verdict = judge(AT, curves(fall), WINDOW, 0.05)
    assert not verdict.holds
    assert verdict.slope > verdict.bound_slope


@pytest.mark.parametrize("fall", [rates.bound, lambda t: t**-0.5, lambda t: 1 / t])
def test_a_curve_as_fast_as_the_bound_or_faster_passes(fall):
    verdict = judge(AT, curves(fall), WINDOW, 0.05)
    assert verdict.holds
    assert verdict.slope <= verdict.bound_slope + 1e-9


def test_a_rise_at_the_very_end_is_found():
    late = curves(rates.bound)
    late[-1] *= 1.2
    assert not judge(AT, late, WINDOW, 0.05).holds


def test_a_floor_is_found_before_it_crosses_a_line_that_the_start_has_lifted():
    verdict = judge(AT, curves(lambda t: 1000 / t + 0.1), WINDOW, 0.05)
    assert verdict.excess < verdict.allowed
    assert not verdict.holds


def test_the_constant_and_the_slope_are_those_of_the_curve():
    verdict = judge(AT, curves(lambda t: 3 * rates.bound(t)), WINDOW, 0.0)
    np.testing.assert_allclose(verdict.constants.mean(), 3, rtol=1e-12)
    np.testing.assert_allclose(verdict.needed, 3, rtol=1e-12)
    np.testing.assert_allclose(judge(AT, curves(lambda t: t**-0.5), WINDOW, 0.05).slope, -0.5, atol=1e-12)


def test_doubt_about_the_mean_is_allowed_for_and_no_more():
    """Seeds that disagree by ± 20 % at the end, on average 10 % above: 3 standard errors are 23 %."""
    doubtful = curves(rates.bound, spread=0)
    late = WINDOW[1] < AT
    doubtful[late] *= 1.1 + 0.2 * np.array([1, -1] * 4)
    verdict = judge(AT, doubtful, WINDOW, 0.05)
    assert verdict.holds
    np.testing.assert_allclose(verdict.excess, 0.1, atol=1e-12)
    np.testing.assert_allclose(verdict.allowed, 0.05 + 3 * 0.2 / np.sqrt(7), atol=1e-12)
    doubtful[late] *= 1.4
    assert not judge(AT, doubtful, WINDOW, 0.05).holds


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_curve_that_is_not_finite_does_not_pass(bad):
    broken = curves(rates.bound)
    broken[-1, 3] = bad
    assert not judge(AT, broken, WINDOW, 0.05).holds


def test_too_few_numbers_to_judge_are_refused():
    with pytest.raises(ValueError, match="at least 2 seeds"):
        judge(AT, curves(rates.bound)[:, :1], WINDOW, 0.05)
    with pytest.raises(ValueError, match="2 numbers of steps in the window"):
        judge(AT, curves(rates.bound), (100_000, 100_000), 0.05)


def run_script(out, *options):
    command = [sys.executable, "-W", "error", "-m", "ssam_experiments.convergence", "--out", out, *options]
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=quick)


def test_the_script_prints_a_table_draws_a_picture_and_passes(tmp_path):
    options = ["--seeds", "4", "--steps", "1000", "--sparsities", "0.5", "--problems", "network"]
    result = run_script(tmp_path, *options)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^\| network \| (.*?) \| .* yes \|$", result.stdout, flags=re.M)
    assert rows == ["SGD", "SAM", "SSAM-F 50%", "SSAM-D 50%"]
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    assert convergence.table(results) in result.stdout
    assert results["at"][-1] == results["config"]["steps"] == 1000
    assert all(len(curve["constants"]) == 4 for curve in results["curves"]["network"].values())


def test_the_script_fails_and_names_the_curves_if_the_learning_rate_stays(tmp_path):
    options = ["--seeds", "16", "--steps", "4000", "--sparsities", "--problems", "network"]
    result = run_script(tmp_path, *options, "--lr-decay", "0", "--fit", "0.1", "0.4")
    assert result.returncode == 1
    for name in ("SGD", "SAM"):
        assert f"network, {name}: falls slower than log T / sqrt T" in result.stderr
    assert result.stdout.count("**no**") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 1}, "seeds must be at least 2, got 1"),
        ({"steps": 99}, "steps must be at least 100, got 99"),
        ({"problems": ("maze",)}, 'problems must be one or both of "matrix" and "network"'),
        ({"sparsities": (0.5, 1.0)}, "sparsities must be at most 4 different numbers above 0 and below 1"),
        ({"lr": float("inf")}, "lr must be finite and above 0, got inf"),
        ({"rho_decay": 1.5}, "rho_decay must be from 0 to 1, got 1.5"),
        ({"fit": (0.1, 0.1)}, "fit must be two shares of the steps"),
    ],
    ids=range(7),
)
def test_a_setting_out_of_range_is_refused_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        convergence.main(Config(**change))


def test_the_gradient_that_is_averaged_is_the_exact_one_at_the_iterates():
    """The first entry, before any step, against a loop over the examples in numpy."""
    config = Config(seeds=2, steps=100)
    problem, method = convergence.make_problem("matrix"), convergence.make_methods(config)["SAM"]
    inputs = convergence.draw(config, problem)
    squares = convergence.make_run(config, problem, method)(*inputs)
    assert squares.shape == (100, 2)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in problem.shapes.items()}
    target = -np.asarray(problem.errors(zeros), np.float64).reshape(16, 12) / 2
    for seed in range(2):
        left, right = (np.asarray(inputs[1][name][seed], np.float64) for name in ("left", "right"))
        slope = 4 * (left @ right - target) / target.size
        expected = np.sum((slope @ right.T) ** 2) + np.sum((left.T @ slope) ** 2)
        np.testing.assert_allclose(squares[0, seed], expected, rtol=1e-4)


def test_the_page_shows_the_table_and_the_settings_of_the_run_that_is_kept():
    kept = json.loads((ROOT / "docs" / "results" / "convergence.json").read_text())
    page = (ROOT / "docs" / "convergence.md").read_text()
    assert convergence.table(kept) in page
    assert convergence.growth(kept) in page
    assert convergence.slower(kept) == []
    for curves in kept["curves"].values():
        assert f"{curves['SAM']['last']:.5f} against {curves['SAM']['average'][-1]:.5f}" in page
    settings = {**kept["config"], "out": Config.out}
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    assert Config(**settings) == Config()
    for name, version in kept["versions"].items():
        assert f"{name} {version}".lower() in page.lower()
