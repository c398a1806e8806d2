"""Make the runs of a study, one after another, and keep what each came to."""

import dataclasses
import json
import shutil
import time
from typing import Any

import numpy as np

from ssam_experiments.config import Config
from ssam_experiments.results.study import PRIVATE, Study, shared
from ssam_experiments.results.tuning import Run, Task, identity
from ssam_experiments.running import loop, preparation
from ssam_experiments.running.files import read_rows, write_whole

RHO_OF_NONE = 1.0  # what runs.jsonl has for a row without a radius


def settings(study: Study, task: Task, rho: float, seed: int) -> Config:
    """Return the trainer's settings of one run."""
    common = shared(study, task.setting, task.epochs)
    del common["sharpness_rho"]
    slug = "".join(c if c.isalnum() else "-" for c in f"{task.setting}-{common['epochs']}-{task.name}")
    config = Config(
        dataset="cifar10",
        data=study.data,
        augment=False,
        evaluate_every=common["epochs"],
        checkpoint_epochs=common["epochs"],  # a run is as soon made again as its checkpoints are written
        rho=rho,
        seed=seed,
        out=study.out / "runs" / slug / f"rho-{rho:g}-seed-{seed}",
        **common,
    )
    return dataclasses.replace(config, **PRIVATE.get(task.setting, {}), **task.row.changes)


def train(study: Study, task: Task, run: Run) -> dict[str, Any]:
    """Make a run, add its line to runs.jsonl, and return it."""
    config = settings(study, task, run.rho, run.seed)
    result: dict[str, Any]
    began, worked = time.perf_counter(), time.process_time()
    try:
        state, rows = loop.train(config)
    except FloatingPointError:
        result = {"diverged": True, "valid_accuracy": 0.0}
    else:
        result = {"diverged": False, **rows[-1], **sharpness(study, config, state)}
    result.pop("density_by_leaf", None)
    result |= {"wall_seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
    # Last, for a run's final learning rate is not the study's.
    result |= {"setting": task.setting, "rho": run.rho, "seed": run.seed, **identity(study, task)}
    path = study.out / "runs.jsonl"
    write_whole(path, "".join(json.dumps(line) + "\n" for line in [*read_rows(path), result]))
    shutil.rmtree(config.out, ignore_errors=True)  # its checkpoints are of no more use
    return result


def sharpness(study: Study, config: Config, state: Any) -> dict[str, float]:
    """Return by how much the loss on training examples rises along its gradient, statistics at rest."""
    feed, programs = preparation.prepare(config)
    here, there = programs.rise(state, *feed.examples(0, 0, 2048), np.float32(study.sharpness_rho))
    return {"sharpness": float(there - here)}
