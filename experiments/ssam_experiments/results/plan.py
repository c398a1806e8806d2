"""The parts of the study, in the order in which they run: the most telling rows first."""

from typing import Any

from ssam_experiments.results import rows as all_rows
from ssam_experiments.results.rows import SAM, SGD, counted, make_rows, make_width_rows
from ssam_experiments.results.running import settings
from ssam_experiments.results.study import Study, shared
from ssam_experiments.results.tuning import Found, Known, Task, look, mean

STAGES = ("rows", "seeds", "when-not", "equal-time", "vit", "widths", "resnet18")
CHEAPEST = 1.105  # gradients a step of the rows with more seeds, every tenth of 345 steps among them
SMALL = (0.025, 0.05, 0.1)
WIDTHS = {8: "width 8", 16: "width 16", 32: "resnet6", 64: "width 64"}
WHEN_NOT = ("resnet6", "clean labels", "3 epochs", "single epoch")


def tasks(study: Study, stage: str, known: Known, times: dict[str, Any]) -> list[Task]:
    """Return the tasks of a stage, those that depend on results as far as they are known."""
    if stage == "rows":
        return [task._replace(seeds=study.seeds) for task in main_tasks(study)]
    if stage == "seeds":
        return [task for task in main_tasks(study) if task.seeds > study.seeds]
    if stage == "when-not":
        changes: dict[str, dict[str, Any]] = {SGD: {}, SAM: {"radii": SMALL}}
        return [
            Task(setting, name, make_rows(epochs(study, setting))[name]._replace(**changed), study.seeds)
            for setting in WHEN_NOT[1:]
            for name, changed in changes.items()
        ]
    if stage == "equal-time":
        return equal_time(study, known, times)
    if stage == "vit":
        return _some(study, "vit", all_rows.VIT_ROWS)
    if stage == "resnet18":
        return _some(study, "resnet18", all_rows.RESNET18_ROWS)
    return [
        Task(setting, name, row, study.seeds)
        for setting in WIDTHS.values()
        for name, row in make_width_rows().items()
    ]


def epochs(study: Study, setting: str) -> int:
    """Return the epochs of a setting."""
    return shared(study, setting)["epochs"]


def _some(study: Study, setting: str, names: tuple[str, ...]) -> list[Task]:
    rows = make_rows(epochs(study, setting))
    return [Task(setting, name, rows[name], study.seeds) for name in names]


def main_tasks(study: Study) -> list[Task]:
    """Return the rows of the table, each with all the seeds that it is to have."""
    rows = make_rows(study.epochs)
    found = []
    for name, row in rows.items():
        five = name in all_rows.FIVE or cost(study, name) <= CHEAPEST
        found.append(Task("resnet6", name, row, study.more_seeds if five else study.seeds))
    return [t for t in found if t.name in (SGD, SAM) or not study.rows or t.name in study.rows]


def cost(study: Study, name: str) -> float:
    """Return the gradients of a full batch that a step of a row takes."""
    return counted(settings(study, Task("resnet6", name, make_rows(study.epochs)[name], 1), 1.0, 0))


def price(study: Study, name: str, times: dict[str, Any]) -> float:
    """Return the counted operations of a step by those of SGD; the gradients that it takes if not counted."""
    known = times.get(name, {})
    return known["flops"] / known["sgd_flops"] if "flops" in known else cost(study, name)


def measured(name: str, times: dict[str, Any]) -> float | None:
    """Return the time of a step by that of SGD, None if it was not timed."""
    known = times.get(name, {})
    return known["step_seconds"] / known["sgd_seconds"] if "step_seconds" in known else None


def ratio(study: Study, name: str, times: dict[str, Any]) -> float:
    """Return the time of a step by that of SGD, and its price if it was not timed."""
    return measured(name, times) or price(study, name, times)


def equal_time(study: Study, known: Known, times: dict[str, Any]) -> list[Task]:
    """Return SGD, SAM and the rows of the front with the epochs that SAM's time allows, and half of it."""
    budget = study.epochs * ratio(study, SAM, times)
    rows = main_tasks(study)
    best = front({task.name: look(study, task, known) for task in rows}, study, times)
    found = []
    for share in (1.0, 0.5):
        for task in rows:
            if task.name in (SGD, SAM, *best):
                n = round(share * budget / ratio(study, task.name, times))
                if n != study.epochs:
                    row = make_rows(n)[task.name]
                    found.append(Task("resnet6", task.name, row, study.seeds, n))
    return found


def front(found: dict[str, Found], study: Study, times: dict[str, Any]) -> list[str]:
    """Return the rows, cheapest first, that no other beats in both time and mean accuracy.

    Only rows that are tuned and have the study's least number of seeds take part.
    """
    points = {
        name: (ratio(study, name, times), reached)
        for name, one in found.items()
        if one.tuned and len(one.runs) >= study.seeds and (reached := mean(one)) is not None
    }
    best: list[str] = []
    for name in sorted(points, key=lambda n: (points[n][0], -points[n][1])):
        if not best or points[name][1] > points[best[-1]][1]:
            best.append(name)
    return best
