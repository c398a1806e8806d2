"""Time the steps of the rows in turn, on a quiet machine, and count their operations and their memory.

Rows are timed in groups, SGD among each, so that a ratio is of steps that were taken in turn. A group that is
in timing.json is not timed again.
"""

import json
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ssam_experiments.results.rows import SGD
from ssam_experiments.results.running import settings
from ssam_experiments.results.study import Study
from ssam_experiments.results.tuning import Task
from ssam_experiments.running import loop, preparation
from ssam_experiments.running.files import write_whole
from ssam_experiments.running.optimizers import Chosen

GROUP = 8  # rows that are timed in turn


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Return what is known about the time of each row's step."""
    path = folder / "timing.json"
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def time_rows(study: Study, tasks: list[Task]) -> None:
    """Time the rows that are not in timing.json yet; with no rounds, count their operations and memory."""
    rows = read(study.out)

    def lacks(name: str) -> bool:
        known = rows.get(name, {})
        timed = "step_seconds" in known and not known.get("earlier")
        return "flops" not in known or (study.timing_rounds > 0 and not timed)

    left = [task for task in tasks if task.name != SGD and lacks(task.name)]
    [sgd] = [task for task in tasks if task.name == SGD]
    for start in tqdm(range(0, len(left), GROUP), desc="timing", unit="group", disable=None):
        for name, new in time_group(study, [sgd, *left[start : start + GROUP]]).items():
            rows[name] = {**rows.get(name, {}), **new}
            if "step_seconds" in new:
                rows[name].pop("earlier", None)
        described = {"device": str(jax.devices()[0]), "jax": jax.__version__, "rounds": study.timing_rounds}
        write_whole(study.out / "timing.json", json.dumps({**described, "rows": rows}, indent=1))
        preparation.forget()


class Timed(NamedTuple):
    """A compiled step and its share of all steps; its counted operations and memory."""

    step: Any
    share: float
    flops: float
    temporary_bytes: int


def compiled_steps(study: Study, task: Task) -> list[Timed]:
    """Return the compiled steps of a row: that with the ascent, that without, or both."""
    config = settings(study, task, 1.0, 0)
    feed, programs = preparation.prepare(config)
    state, source = programs.init(0), next(iter(feed.batches(0, 0, 0)))
    chosen = Chosen(*map(np.float32, (config.lr, config.weight_decay, config.rho)))
    steps = config.epochs * feed.steps_per_epoch
    ascents = sum(loop.ascends(config, i // feed.steps_per_epoch, i) for i in range(steps))
    timed = []
    for ascent, share in ((True, ascents / steps), (False, 1 - ascents / steps)):
        if share:
            active = loop.perturbed_leaves(config, state) if ascent else None
            args = (state, programs.no_totals(), chosen, source)
            compiled: Any = programs.step.lower(*args, ascent=ascent, active=active).compile()
            step = _repeated(compiled, programs.init(0), args[1:])
            flops, memory = _flops(compiled), compiled.memory_analysis()
            timed.append(Timed(step, share, flops, memory.temp_size_in_bytes))
    return timed


def _flops(compiled: Any) -> float:
    """Return the operations that the compiler counts."""
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def _repeated(compiled: Any, state: Any, rest: tuple) -> Any:
    """Return a function that takes another step from where the last one ended."""
    carry = [state, rest[0]]

    def step() -> None:
        carry[:] = compiled(*carry, *rest[1:])
        jax.block_until_ready(carry)

    return step


def time_group(study: Study, tasks: list[Task]) -> dict[str, Any]:
    """Return by name the time of a step of each row, timed in turn, and that of SGD, the first of them."""
    steps = {task.name: compiled_steps(study, task) for task in tasks}
    times: dict[Any, list[float]] = {}
    for turn in range(study.timing_rounds + 1 if study.timing_rounds else 0):
        for name, several in steps.items():
            for i, one in enumerate(several):
                start = time.perf_counter()
                one.step()
                if turn:  # the first warms up
                    times.setdefault((name, i), []).append(time.perf_counter() - start)

    found: dict[str, Any] = {}
    for name, several in steps.items():
        found[name] = {"flops": sum(one.share * one.flops for one in several)}
        found[name]["temporary_bytes"] = max(one.temporary_bytes for one in several)
        if times:
            medians = [statistics.median(times[name, i]) for i in range(len(several))]
            found[name]["step_seconds"] = sum(one.share * m for one, m in zip(several, medians))
    sgd = found[tasks[0].name]
    ours = {f"sgd_{key.removeprefix('step_')}": sgd[key] for key in ("flops", "step_seconds") if key in sgd}
    return {name: {**one, **ours} for name, one in found.items()}
