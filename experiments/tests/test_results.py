"""The study tunes each row on validation examples alone, repeats nothing, and reports what it found."""

import dataclasses
import json
import pathlib

import pytest

from ssam_experiments.config import Config, check
from ssam_experiments.results import __main__ as command
from ssam_experiments.results import page, pictures, plan, running, tables, timing
from ssam_experiments.results.claims import claims
from ssam_experiments.results.rows import CHEAP, RESNET18_ROWS, VIT_ROWS, Row, make_rows
from ssam_experiments.results.spellings import SPELLINGS, spelling
from ssam_experiments.results.study import DOCS, SETTINGS, Study, shared
from ssam_experiments.results.tuning import Run, Task, identity, look, next_radius, next_run
from ssam_experiments.running import loop
from ssam_experiments.running.files import read_rows

STUDY = Study(data=pathlib.Path("/nowhere"))
KEPT = dataclasses.replace(STUDY, out=DOCS / "results")
SAM = Task("resnet6", "SAM", Row({"method": "sam"}), 3)


def ran(task, rho, seed, valid=0.5, test=0.5, study=STUDY):
    """Return what runs.jsonl has for a run."""
    result = {"valid_accuracy": valid, "test_accuracy": test, "sharpness": 0.1, "diverged": False}
    return {**result, "rho": rho, "seed": seed, **identity(study, task)}


def carried_out(task, accuracy):
    """Make the runs that a task asks for until it asks for none, and return them in order."""
    known = []
    while (run := next_run(STUDY, task, known)) is not None:
        known.append(ran(task, *run, valid=accuracy(run.rho)))
    return [(one["rho"], one["seed"]) for one in known], known


@pytest.mark.parametrize(
    ("best", "tried"),
    [(0.1, {0.05, 0.1, 0.2}), (0.4, {0.05, 0.1, 0.2, 0.4, 0.8}), (0.02, {0.0125, 0.025, 0.05, 0.1, 0.2})],
)
def test_the_radius_is_the_best_on_validation_examples_and_is_sought_past_the_ends(best, tried):
    runs, known = carried_out(SAM, lambda rho: 1 - abs(rho - best))
    found = look(STUDY, SAM, known)
    assert found.tried.keys() == tried and abs(found.rho - best) < 0.01 and found.tuned and not found.missing
    assert {seed for _, seed in runs[:-2]} == {0} and runs[-2:] == [(found.rho, 1), (found.rho, 2)]


def test_five_radii_are_tried_at_most():
    tried = {0.1: 0.1, 0.2: 0.2, 0.4: 0.4, 0.8: 0.5}
    assert next_radius(tried, (0.1, 0.2, 0.4)) == 1.6
    assert next_radius({**tried, 1.6: 0.6}, (0.1, 0.2, 0.4)) is None


def test_a_row_without_a_radius_is_not_tuned():
    sgd = Task("resnet6", "SGD", Row({}, ()), 3)
    runs, known = carried_out(sgd, lambda rho: 0.5)
    assert runs == [(1.0, seed) for seed in range(3)] and look(STUDY, sgd, known).rho is None


def test_other_epochs_have_the_radius_of_the_table_and_wait_for_it():
    longer = SAM._replace(epochs=29)
    assert next_run(STUDY, longer, []) is None
    _, known = carried_out(SAM, lambda rho: 1 - abs(rho - 0.1))
    assert next_run(STUDY, longer, known) == Run(0.1, 0)
    known.append(ran(longer, 0.1, 0))
    assert next_run(STUDY, longer, known) == Run(0.1, 1) and look(STUDY, SAM, known).missing == 0


def test_a_run_from_before_a_setting_existed_had_its_default():
    old = ran(SAM, 0.1, 0)
    del old["model"], old["optimizer"], old["width"]
    assert look(STUDY, SAM, [old]).tried == {0.1: 0.5}
    for other in ("vit", "width 8", "clean labels"):
        assert look(STUDY, SAM._replace(setting=other), [old]).tried == {}
    assert look(dataclasses.replace(STUDY, lr=0.2), SAM, [old]).tried == {}


def test_a_run_is_made_once_and_one_that_diverges_is_kept(monkeypatch, tmp_path):
    study, trainings = dataclasses.replace(STUDY, out=tmp_path, rows=("SAM",), stages=("rows",)), []

    def train(config):
        trainings.append((config.method, config.rho, config.seed))
        if config.rho == 0.2:
            raise FloatingPointError
        return None, [{"test_accuracy": 0.5, "valid_accuracy": config.rho, "lr": 0.0, "density_by_leaf": {}}]

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(running, "sharpness", lambda *args: {"sharpness": 0.1})
    command.main(study)
    sgd, sam = [("plain", 1.0, seed) for seed in range(3)], [("sam", 0.1, seed) for seed in (1, 2)]
    assert trainings == [*sgd, *(("sam", rho, 0) for rho in (0.05, 0.1, 0.2)), *sam]
    kept = read_rows(tmp_path / "runs.jsonl")
    assert len(kept) == 8 and kept[5]["diverged"] and kept[0]["lr"] == study.lr
    command.main(study)
    assert len(trainings) == 8


def test_every_row_s_settings_go_together_and_name_all_that_the_tables_are_to_have():
    for stage in plan.STAGES:
        tasks = plan.tasks(STUDY, stage, read_rows(KEPT.out / "runs.jsonl"), {})
        for task in tasks:
            check(running.settings(STUDY, task, 0.1, 0))
        assert len({running.settings(STUDY, task, 0.1, 0).out for task in tasks}) == len(tasks) > 0
    rows = make_rows(STUDY.epochs)
    assert {*CHEAP, *VIT_ROWS, *RESNET18_ROWS, *pictures.FAVORITES, *SPELLINGS} <= rows.keys()
    wanted = ["ASAM", "F-SAM", "VaSSO", "GSAM", "WSAM", "2-step SAM", "AE-SAM", "SS-SAM 50%", "last block"]
    assert {*wanted, *(f"SSAM-{kind} {s}%" for kind in "FD" for s in (50, 80, 90, 95))} <= rows.keys()


def test_cheap_rows_have_more_seeds_than_dear_ones():
    seeds = {task.name: task.seeds for task in plan.main_tasks(STUDY)}
    assert {seeds[name] for name in ("SGD", "SAM", "SSAM-F 50%", "carried", "every 10th step")} == {5}
    assert {seeds[name] for name in ("ASAM", "LookSAM 5", "eighth batch")} == {3}


def test_a_setting_changes_what_all_rows_share():
    assert shared(STUDY, "vit")["optimizer"] == "adamw" and shared(STUDY, "resnet6")["model"] == "resnet6"
    assert shared(STUDY, "single epoch")["epochs"] == 1 and shared(STUDY, "resnet6", 29)["epochs"] == 29
    assert set(tables.TITLES) == set(plan.WHEN_NOT) and set(plan.WIDTHS.values()) <= set(SETTINGS)


def two_rows(tmp_path):
    """Return a study of SGD and SAM that have run, their runs and times."""
    study = dataclasses.replace(STUDY, out=tmp_path, rows=("SAM",), more_seeds=3)
    sgd, sam = plan.main_tasks(study)
    known = [ran(sgd, 1.0, seed, test=test) for seed, test in enumerate((0.4, 0.5, 0.45))]
    known += [ran(sam, rho, 0, valid, test=0.6) for rho, valid in ((0.05, 0.1), (0.1, 0.6), (0.2, 0.3))]
    known += [ran(sam, 0.1, seed, 0.6, test=0.6) for seed in (1, 2)]
    times = {"SAM": {"step_seconds": 0.3, "sgd_seconds": 0.2, "flops": 19, "sgd_flops": 10}}
    return study, known, {**times, "SGD": {"step_seconds": 0.2, "sgd_seconds": 0.2, "temporary_bytes": 3e6}}


def test_the_tables_show_means_ratios_and_what_is_missing(tmp_path):
    study, known, times = two_rows(tmp_path)
    text = tables.methods(study, known, times)
    assert "| SGD |  | 45.0 ± 5.0 (3) | 1.000 | 1.00 | 3 | 0.100 ± 0.000 |" in text
    assert "| SAM | 0.1 | 60.0 ± 0.0 (3) | 1.900 | 1.50 |  | 0.100 ± 0.000 |" in text
    assert "| SAM | 0.1 | 60.0 ± 0.0 (2); 1 of 3 seeds missing |" in tables.methods(study, known[:-1], times)
    assert "rho is not tuned to the end, 2 of 3 seeds" in tables.methods(study, known[:5], times)
    known[-1]["diverged"] = True
    assert "60.0 ± 0.0, 1 diverged (3)" in tables.methods(study, known, times)


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_can_be_made_of_what_has_run(name, tmp_path):
    study, known, times = two_rows(tmp_path)
    for some in (known, known[:3], []):
        assert tables.TABLES[name](study, some, times if some else {})


def test_a_claim_is_held_within_a_standard_deviation_of_sam():
    rows = {task.name: task for task in plan.main_tasks(STUDY)}
    known = [ran(rows["SGD"], 1.0, seed, test=0.3) for seed in range(3)]
    for name, task in rows.items():
        if "SAM" in name:
            tests = (0.38, 0.4, 0.42) if name == "SAM" else (0.35,) if name == "SSAM-D 95%" else (0.39,)
            known += [ran(task, task.row.radii[0], seed, test=test) for seed, test in enumerate(tests)]
    text = claims(STUDY, known, {})
    assert "held: SSAM-F 50% 39.0, SSAM-D 50% 39.0; SAM 40.0 ± 2.0" in text
    assert "not by SSAM-D 95%: SSAM-F 80% 39.0" in text and "not held by every row: sharpness 0.10" in text


def test_a_budget_takes_the_best_row_within_it(tmp_path):
    study, known, times = two_rows(tmp_path)
    *_, last = tables.budgets(study, known, times).splitlines()
    assert last == "| 2.10 | `ssam(0.1)` | 60.0 ± 0.0 (3) | 1.900 | 1.50 |"
    assert "ssam(0.1)" not in tables.budgets(study, known[:-1], times)
    gsam = plan.main_tasks(dataclasses.replace(study, rows=("GSAM",)))[-1]
    others = [ran(gsam, rho, 0, valid, test=0.7) for rho, valid in ((0.05, 0.1), (0.1, 0.7), (0.2, 0.3))]
    others += [ran(gsam, 0.1, seed, 0.7, test=0.7) for seed in (1, 2)]
    both, sam = dataclasses.replace(study, rows=("SAM", "GSAM")), {**times["SAM"], "flops": 12}
    for flops, spelled in ((11, {"gsam"}), (19, {"ssam(0.1)", "gsam"})):
        both_times = {**times, "SAM": sam, "GSAM": {**sam, "flops": flops}}
        text = tables.budgets(both, known + others, both_times)
        assert {name for name in ("ssam(0.1)", "gsam") if name in text} == spelled


def test_the_front_is_of_rows_that_no_other_beats_in_both(tmp_path):
    study, known, times = two_rows(tmp_path)
    found = tables.usable(study, known)
    assert plan.front(found, study, times) == ["SGD", "SAM"]
    assert plan.front(found | {"GSAM": found["SGD"]}, study, times) == ["SGD", "SAM"]
    assert plan.front({"SGD": found["SGD"], "SAM": found["SGD"]}, study, times) == ["SGD"]
    equal = {(task.name, task.epochs) for task in plan.equal_time(study, known, times)}
    assert equal == {("SGD", 22), ("SGD", 11), ("SAM", 8)}


def test_eight_points_of_the_front_s_picture_have_names_at_most(tmp_path):
    study, known, times = two_rows(tmp_path)
    axes = pictures.pareto(study, known, times).axes[0]
    assert {text.get_text() for text in axes.texts} == {"SGD", "SAM"}
    points = dict.fromkeys(make_rows(15))
    assert len(pictures.named(points, list(points)[5:9])) == pictures.NAMED
    assert {"SGD", "SAM", *list(points)[5:9]} <= {*pictures.named(points, list(points)[5:9])}


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_every_picture_can_be_drawn_of_what_has_run(name, tmp_path):
    study, known, times = two_rows(tmp_path)
    for some in (known, known[:3], []):
        pictures.PICTURES[name](study, some, times).savefig(tmp_path / "picture.png", dpi=30)


def test_steps_with_and_without_the_ascent_are_timed_by_their_shares(
    monkeypatch, tmp_path, relaxed_promotion
):
    def small(study, task, rho, seed):
        return Config(model="mlp", limit=64, batch=16, epochs=2, rho=rho, seed=seed, **task.row.changes)

    monkeypatch.setattr(timing, "settings", small)
    study = dataclasses.replace(STUDY, out=tmp_path, timing_rounds=0)
    sam = Task("resnet6", "SAM", Row({"method": "sam", "ascent_every": 4}), 3)
    tasks = [Task("resnet6", "SGD", Row({}, ()), 3), sam]
    made = {task.name: timing.compiled_steps(study, task) for task in tasks}
    assert [step.share for step in made["SAM"]] == [0.25, 0.75]
    monkeypatch.setattr(timing, "compiled_steps", lambda study, task: made[task.name])
    timing.time_rows(study, tasks)
    counted = timing.read(tmp_path)["SAM"]
    assert 1.1 < counted["flops"] / counted["sgd_flops"] < 1.4 and "step_seconds" not in counted
    timing.time_rows(dataclasses.replace(study, timing_rounds=2), tasks)
    found = timing.read(tmp_path)
    assert all(one["step_seconds"] > 0 and one["temporary_bytes"] > 0 for one in found.values())
    assert found["SAM"]["sgd_seconds"] == found["SGD"]["step_seconds"]
    timing.time_rows(dataclasses.replace(study, timing_rounds=3), tasks)
    assert timing.read(tmp_path) == found


@pytest.mark.parametrize("name", page.PAGES)
def test_the_pages_show_the_tables_of_the_results_that_are_kept_with_them(name):
    text = (DOCS / name).read_text()
    assert page.BLOCK.search(text) and page.rendered(text, KEPT) == text


def test_the_digest_is_that_of_the_runs_and_every_picture_is_on_the_page():
    kept = json.loads((KEPT.out / "results.json").read_text())
    assert kept == json.loads(json.dumps(page.digest(KEPT)))
    text = (DOCS / "results.md").read_text()
    assert all(f"(images/{name}.png)" in text for name in pictures.PICTURES)
    shown = {found[2] for name in page.PAGES for found in page.BLOCK.finditer((DOCS / name).read_text())}
    assert shown == set(tables.TABLES)


def test_a_row_or_stage_that_does_not_exist_is_refused():
    with pytest.raises(SystemExit, match=r"error: --rows must be of SGD, SAM.*; got nonsense"):
        command.main(dataclasses.replace(STUDY, rows=("nonsense",)))
    with pytest.raises(SystemExit, match=r"error: --stages must be of rows, seeds.*; got nonsense"):
        command.main(dataclasses.replace(STUDY, stages=("nonsense",)))


def test_a_spelling_has_the_radius_that_was_best():
    assert spelling("every 5th step", 0.8) == "`ssam(radii.every(5, 0.8))`"
    assert (
        spelling("SGD", None) == "the optimizer alone" and spelling("of no spelling", 0.1) == "of no spelling"
    )
