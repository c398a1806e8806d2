"""What to run next, decided from what has run: radii by validation accuracy, then seeds."""

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from ssam_experiments.results.rows import Row
from ssam_experiments.results.study import SHARED, Study, shared

WIDEST = 5  # values of the radius tried at most
Known = list[dict[str, Any]]


class Task(NamedTuple):
    """A row to run on a setting: tune it, and train it with some seeds.

    Attributes:
      setting: a key of `ssam_experiments.results.study.SETTINGS`.
      name: of the row.
      row: the row.
      seeds: runs at its best radius.
      epochs: other epochs than the setting's, which have the radius of those; None for the same.
    """

    setting: str
    name: str
    row: Row
    seeds: int
    epochs: int | None = None


class Run(NamedTuple):
    """A training run of a task."""

    rho: float
    seed: int


class Found(NamedTuple):
    """What is known about a task.

    Attributes:
      rho: the best radius so far; None for a row without, or before the first run.
      tried: validation accuracy of seed 0 by radius.
      runs: those at the best radius that have run, by seed.
      tuned: whether the best radius is inside of those tried, or as many were tried as are at most.
      missing: runs that the task lacks, as far as is known.
    """

    rho: float | None
    tried: dict[float, float]
    runs: Known
    tuned: bool
    missing: int


def identity(study: Study, task: Task) -> dict[str, Any]:
    """Return what the runs of a task have in common, radius and seed aside."""
    return {"row": task.name, **shared(study, task.setting, task.epochs)}


def matching(known: Iterable[dict[str, Any]], wanted: dict[str, Any]) -> Known:
    """Return the runs that are as wanted; a run from before a setting existed had its default."""
    return [one for one in known if all(one.get(k, SHARED.get(k)) == v for k, v in wanted.items())]


def next_radius(tried: dict[float, float], radii: tuple[float, ...]) -> float | None:
    """Return the radius to try next, None if the best is inside of those tried or they are many enough."""
    for rho in radii:
        if rho not in tried:
            return rho
    best = max(tried, key=tried.__getitem__)
    if len(tried) >= max(WIDEST, len(radii)) or best not in (min(tried), max(tried)):
        return None
    return best / 2 if best == min(tried) else best * 2


def look(study: Study, task: Task, known: Known) -> Found:
    """Return what is known about a task."""
    return _look(study, task, known)[0]


def next_run(study: Study, task: Task, known: Known) -> Run | None:
    """Return the run of a task to make next, None if there is none."""
    return _look(study, task, known)[1]


def _look(study: Study, task: Task, known: Known) -> tuple[Found, Run | None]:
    mine = matching(known, identity(study, task))
    if not task.row.radii:
        return _seeded(task, mine, 1.0, {}, None)
    if task.epochs is not None:
        base = look(study, task._replace(epochs=None), known)
        if base.rho is None:
            return Found(None, {}, [], False, task.seeds), None
        return _seeded(task, mine, base.rho, base.tried, None)
    tried = {one["rho"]: one["valid_accuracy"] for one in mine if one["seed"] == 0}
    following = next_radius(tried, task.row.radii)
    if not tried:
        return Found(None, {}, [], False, len(task.row.radii) + task.seeds - 1), Run(task.row.radii[0], 0)
    best = max(tried, key=tried.__getitem__)
    return _seeded(task, mine, best, tried, following)


def _seeded(
    task: Task, mine: Known, rho: float, tried: dict[float, float], following: float | None
) -> tuple[Found, Run | None]:
    """Return what is known about a task of a known radius, and the run to make next."""
    runs = sorted((one for one in mine if one["rho"] == rho), key=lambda one: one["seed"])
    runs = [one for one in runs if one["seed"] < task.seeds]
    lacking = sorted(set(range(task.seeds)) - {one["seed"] for one in runs})
    untried = sum(r not in tried for r in task.row.radii) if task.epochs is None else 0
    missing = len(lacking) + max(untried, int(following is not None))
    found = Found(rho if task.row.radii else None, tried, runs, following is None, missing)
    if following is not None:
        return found, Run(following, 0)
    return found, Run(rho, lacking[0]) if lacking else None


def accuracies(found: Found) -> list[float]:
    """Return the test accuracies, in %, of the runs that did not diverge."""
    return [100 * one["test_accuracy"] for one in found.runs if not one["diverged"]]


def mean(found: Found) -> float | None:
    """Return their mean, None if there is none."""
    values = accuracies(found)
    return statistics.mean(values) if values else None
