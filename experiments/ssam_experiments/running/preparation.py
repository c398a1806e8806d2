"""Before a run: check the settings, join the processes, load the data, claim the folder."""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssam_experiments import models
from ssam_experiments.config import Config, check
from ssam_experiments.data import datasets
from ssam_experiments.data.feeds import Feed, MemoryFeed, StreamFeed
from ssam_experiments.running import choice, fingerprint, locks, placement, processes
from ssam_experiments.running.files import make_folder, naming, read_settings, write_whole
from ssam_experiments.running.metrics import MODULES, needed
from ssam_experiments.running.programs import Programs, make_programs

TRACED: dict[str, Any] = {
    "seed": 0,
    "rho": 1.0,
    "lr": 1.0,
    "weight_decay": 0.0,
}  # arguments of the compiled functions
IRRELEVANT: dict[str, Any] = {  # settings that do not change the course of a run
    "out": pathlib.Path(),
    "preset": "none",
    "workers": 1,
    "checkpoint_epochs": 1,
    "checkpoint_every": None,
    "resume_from": None,
    "evaluate_every": 1,
    "tensorboard": False,
    "wandb": False,
    "processes": 1,
    "process_id": 0,
    "coordinator": "",
    "heartbeat": 100,
}
ROUNDING: dict[str, Any] = {"devices": 1, "fsdp": False}  # settings that change it by rounding alone


class Prepared(NamedTuple):
    """What runs share if they differ in seed, radius, learning rate and weight decay only."""

    feed: Feed
    programs: Programs


def prepare(config: Config) -> Prepared:
    """Join the other processes, load the data, and make the functions of a run. Nothing is compiled yet.

    Like runs get the same objects, and so compile once.

    Raises:
      FileNotFoundError: the data are missing.
      ValueError: the settings do not fit one another, the data, the model or the devices, or a flag needs a
        module that is missing.
    """
    check(config)
    processes.start(config.coordinator, config.processes, config.process_id, config.heartbeat)

    def alone() -> Prepared:
        for flag in MODULES:
            if getattr(config, flag):
                needed(flag)
        place = config.data and config.data.absolute()  # what is kept is not another folder's
        prepared = _prepare(dataclasses.replace(config, **TRACED, **IRRELEVANT, data=place), config.workers)
        jax.eval_shape(prepared.programs.init, 0)  # the model, mask and optimizer fit
        return prepared

    shared = str(dataclasses.replace(config, process_id=0))
    return processes.together(alone, lambda prepared: f"{shared} {prepared.feed.facts}")


@functools.cache
def _prepare(config: Config, workers: int) -> Prepared:
    placement.check(config.devices)
    if config.dataset == "imagenet":
        feed: Feed = StreamFeed(config, workers)
    else:
        memory = (config.dataset, config.data, config.validation, config.limit, config.label_noise)
        feed = MemoryFeed(config, _load(*memory))
    model = models.make_model(
        config.model,
        classes=feed.classes,
        stem="imagenet" if config.dataset == "imagenet" else "cifar",
        dtype=jnp.dtype(config.precision),
        width=config.width,
    )
    return Prepared(feed, make_programs(config, model, feed))


def forget() -> None:
    """Let go of what `prepare` keeps for like runs: data and compiled functions."""
    _prepare.cache_clear()


@functools.cache
def _load(name: str, folder: pathlib.Path | None, validation: int, limit: int | None, noise: float) -> Any:
    return datasets.load(name, folder, validation=validation, limit=limit, label_noise=noise)


def claim(config: Config) -> None:
    """Lock the run's folder; write the settings to it, or check that the settings there are the same.

    The number of devices and processes may differ. The first process has the lock, for all of them, until
    `locks.release` or its end.

    Raises:
      ValueError: another trainer has the folder, the settings differ, or a process does not see the folder of
        the others.
    """
    path = config.out / "config.json"
    settings = recorded(config)

    def alone() -> None:
        locked = False
        if processes.is_first():
            make_folder(config.out)
            with naming(config.out / locks.NAME):
                locked = locks.hold(config.out)
        try:
            _claim(path, settings)
        except BaseException:
            if locked:
                locks.release(config.out)
            raise

    processes.together(alone, str)
    processes.together(lambda: _is_there(path), str)


def recorded(config: Config) -> dict[str, Any]:
    """Return the settings that change the course of a run, and where its data are, as plain values."""
    data = config.data and config.data.absolute()
    return fingerprint.plain(dataclasses.asdict(dataclasses.replace(config, **IRRELEVANT, data=data)))


def _claim(path: pathlib.Path, settings: dict[str, Any]) -> None:
    with naming(path, "read"):
        there = read_settings(path) if path.exists() else None
    known = choice.last_settings(path.parent / "checkpoints") if there is None else there
    if known is not None:
        other = fingerprint.other_settings(known, settings, but=("data", *ROUNDING))
        if other:
            raise ValueError(
                f"--out {path.parent} holds a run of other settings ({', '.join(other)}): name another"
                " folder."
            )
    if processes.is_first() and (there is None or there.get("data") != settings["data"]):
        moved = {"data": settings["data"]}  # the same data, or the checkpoints' fingerprint will tell
        text = json.dumps({**settings, **(known or {}), **moved}, indent=1)
        if there is not None:
            write_whole(path, text)
            return
        with naming(path):
            if locks.create(path, text):
                return
        _claim(path, settings)  # others were there first


def _is_there(path: pathlib.Path) -> None:
    if not path.exists():
        raise ValueError(f"--out {path.parent} must be one folder for all processes: here it is another.")
