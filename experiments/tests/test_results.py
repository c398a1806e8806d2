"""The study tunes each row on validation examples alone, repeats nothing, and reports what it found."""

import dataclasses
import json
import pathlib

import pytest

from ssam_experiments import results
from ssam_experiments.config import Config, check
from ssam_experiments.results import Row, Study
from ssam_experiments.running import loop

STUDY = Study(data=pathlib.Path("/nowhere"), seeds=3)


def pretend(monkeypatch, accuracy):
    """Let a run's validation accuracy be a function of its radius; return the runs as they are made."""
    made = []

    def trained(study, row, name, rho, seed):
        made.append((rho, seed))
        return {"valid_accuracy": accuracy(rho), "test_accuracy": 1 - accuracy(rho), "diverged": False}

    monkeypatch.setattr(results, "trained", trained)
    return made


@pytest.mark.parametrize(
    ("best", "tried"),
    [(0.1, {0.05, 0.1, 0.2}), (0.4, {0.05, 0.1, 0.2, 0.4}), (0.03, {0.025, 0.05, 0.1, 0.2})],
)
def test_the_radius_is_the_best_on_validation_examples_and_is_sought_past_the_ends(monkeypatch, best, tried):
    made = pretend(monkeypatch, lambda rho: 1 - abs(rho - best))
    found = results.tuned(STUDY, Row({"method": "sam"}), "SAM")
    assert found["tried"].keys() == tried and abs(found["rho"] - best) < 0.01
    assert made[-3:] == [(found["rho"], seed) for seed in range(3)]
    assert {seed for _, seed in made[:-3]} == {0}


def test_a_row_without_a_radius_is_not_tuned(monkeypatch):
    made = pretend(monkeypatch, lambda rho: 0.5)
    assert results.tuned(STUDY, Row({}, ()), "SGD")["rho"] is None
    assert {rho for rho, _ in made} == {1.0}


def test_a_run_is_made_once_and_one_of_another_study_is_another(monkeypatch, tmp_path):
    study, trainings = dataclasses.replace(STUDY, out=tmp_path), []

    def train(config):
        trainings.append(config)
        if config.rho > 1:
            raise FloatingPointError
        return None, [{"test_accuracy": 0.5, "valid_accuracy": 0.5, "lr": 0.0, "density_by_leaf": {}}]

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(results, "sharpness", lambda *args: {"sharpness": 0.1})
    row = Row({"method": "sam"})
    first = results.trained(study, row, "SAM", 0.1, 0)
    assert results.trained(study, row, "SAM", 0.1, 0) == first and len(trainings) == 1
    assert results.trained(study, row, "SAM", 2.0, 0)["diverged"]
    results.trained(dataclasses.replace(study, epochs=7), row, "SAM", 0.1, 0)
    assert [config.epochs for config in trainings] == [15, 15, 7]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3


def test_every_row_s_settings_go_together_and_name_all_that_the_table_is_to_have():
    rows = results.make_rows(STUDY.epochs)
    for name, row in rows.items():
        check(results.settings(STUDY, row, name, 0.1, 0))
    assert len({results.settings(STUDY, row, name, 0.1, 0).out for name, row in rows.items()}) == len(rows)
    wanted = ["SGD", "SAM", *(f"SSAM-{kind} {s}%" for kind in "FD" for s in (50, 80, 90, 95)), "last block"]
    assert {*wanted, "SSAM-F 2:4, implicit", "quarter batch", "every 10th step", "last third"} <= rows.keys()


def test_the_table_and_the_picture_show_means_ratios_and_the_front(tmp_path):
    def row(accuracies, seconds, rho):
        runs = [{"test_accuracy": a, "sharpness": 0.1, "diverged": False} for a in accuracies]
        return {"runs": runs, "rho": rho, "step_seconds": seconds, "temporary_bytes": 3_000_000}

    found = {"SGD": row([0.4, 0.5], 0.1, None), "SAM": row([0.6, 0.6], 0.2, 0.1), "bad": row([0.3], 0.3, 0.1)}
    found["SAM"]["runs"].append({"diverged": True})
    text = results.table(found)
    assert "| SGD |  | 45.0 ± 7.1 | 1.00 | 3 | 0.100 ± 0.000 |" in text
    assert "| SAM | 0.1 | 60.0 ± 0.0, 1 of 3 diverged | 2.00 | 3 |" in text
    found["lost"] = {**found["SAM"], "runs": [{"diverged": True}]}
    assert "| lost | 0.1 | all diverged | 2.00 | 3 |  |" in results.table(found)
    line = results.pareto(found).axes[0].lines[-1]
    assert list(line.get_xdata()) == pytest.approx([1, 2]) and list(line.get_ydata()) == pytest.approx(
        [45, 60]
    )


def test_steps_with_and_without_the_ascent_are_timed_by_their_shares(
    monkeypatch, tmp_path, relaxed_promotion
):
    def small(study, row, name, rho, seed):
        return Config(
            model="mlp", limit=64, batch=16, epochs=2, rho=rho, seed=seed, out=tmp_path, **row.changes
        )

    monkeypatch.setattr(results, "settings", small)
    rows = {"SGD": Row({}, ()), "SAM": Row({"method": "sam", "ascent_every": 4})}
    assert [step.share for step in results.compiled_steps(STUDY, rows["SAM"], "SAM")] == [0.25, 0.75]
    found = {name: {"rho": 0.1} for name in rows}
    results.time_steps(dataclasses.replace(STUDY, timing_rounds=2), rows, found)
    assert all(r["step_seconds"] > 0 and r["temporary_bytes"] > 0 for r in found.values())


def test_the_page_shows_the_table_of_the_results_that_are_kept_with_it():
    docs = pathlib.Path(__file__).parents[2] / "docs"
    kept = json.loads((docs / "results" / "results.json").read_text())["rows"]
    assert results.table(kept) in (docs / "results.md").read_text()
    runs = [json.loads(line) for line in (docs / "results" / "runs.jsonl").read_text().splitlines()]
    assert all(one in runs for row in kept.values() for one in row["runs"])


def test_a_row_that_does_not_exist_is_refused():
    with pytest.raises(SystemExit, match=r"error: --rows must be of SGD, SAM.*; got nonsense"):
        results.main(dataclasses.replace(STUDY, rows=("nonsense",)))
