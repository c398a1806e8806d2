"""The loop: epochs, metrics, checkpoints; a run that was killed goes on bit for bit."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

import ssam_jax
from ssam_experiments import models
from ssam_experiments.config import Config, check
from ssam_experiments.data import datasets
from ssam_experiments.data.feeds import Feed, MemoryFeed, StreamFeed
from ssam_experiments.running import placement, processes
from ssam_experiments.running.metrics import MODULES, Tracker, needed, write_whole
from ssam_experiments.running.optimizers import Chosen, make_schedule
from ssam_experiments.running.programs import Programs, Totals, make_programs

LOOK_EVERY = 20  # steps between two looks at the loss, each of which waits for the device
TRACED = {"seed": 0, "rho": 1.0, "lr": 1.0, "weight_decay": 0.0}  # what the compiled functions take
BESIDE = {  # what does not change the course of a run
    "out": pathlib.Path(),
    "preset": "none",
    "workers": 1,
    "checkpoint_every": None,
    "evaluate_every": 1,
    "tensorboard": False,
    "wandb": False,
    "processes": 1,
    "process_id": 0,
    "coordinator": "",
    "heartbeat": 100,
}
ROUNDING = {"devices": 1, "fsdp": False}  # what changes it by rounding alone


class CheckpointError(ValueError):
    """A checkpoint is damaged, or is not one of this run."""


class Position(NamedTuple):
    """How far a run has come: what a checkpoint holds.

    Attributes:
      step: optimizer steps taken.
      state: a `ssam_jax.linen.TrainState`: parameters, optimizer with masks, statistics, key.
      totals: the metrics' sums since the epoch began.
    """

    step: int
    state: Any
    totals: Totals


class Prepared(NamedTuple):
    """What runs share that differ in seed, radius, learning rate and weight decay only."""

    feed: Feed
    programs: Programs


def prepare(config: Config) -> Prepared:
    """Join the other processes, load the data and make the functions that a run compiles, which are not yet.

    Like runs get the same objects, and compile once.

    Raises:
      FileNotFoundError: the data are not there.
      ValueError: the settings do not fit one another, the data, the model or the devices, or a module is
        not there that a flag needs.
    """
    check(config)
    processes.start(config.coordinator, config.processes, config.process_id, config.heartbeat)

    def alone() -> Prepared:
        for flag in MODULES:
            if getattr(config, flag):
                needed(flag)
        prepared = _prepare(dataclasses.replace(config, **TRACED, **BESIDE), config.workers)
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
    )
    return Prepared(feed, make_programs(config, model, feed))


@functools.cache
def _load(name: str, folder: pathlib.Path | None, validation: int, limit: int | None, noise: float) -> Any:
    return datasets.load(name, folder, validation=validation, limit=limit, label_noise=noise)


def claim(config: Config) -> None:
    """Write the settings to the run's folder, or see that those there are the same.

    The number of devices and processes may be another.

    Raises:
      ValueError: they are not the same, or there is a process that does not see the folder of the others.
    """
    path = config.out / "config.json"
    settings = dataclasses.asdict(dataclasses.replace(config, **BESIDE))
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    processes.together(lambda: _claim(path, _plain(settings), _plain(defaults)), str)
    processes.together(lambda: _is_there(path), str)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))


def _claim(path: pathlib.Path, settings: dict[str, Any], defaults: dict[str, Any]) -> None:
    if not path.exists():
        if processes.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(settings, indent=1))
        return
    there = defaults | json.loads(
        path.read_text()
    )  # settings that are younger than the run had their defaults
    other = [name for name, value in settings.items() if there[name] != value and name not in ROUNDING]
    if other:
        raise ValueError(
            f"--out {path.parent} holds a run of other settings ({', '.join(other)}): name another folder."
        )


def _is_there(path: pathlib.Path) -> None:
    if not path.exists():
        raise ValueError(f"--out {path.parent} must be one folder for all processes: here it is another.")


def train(config: Config) -> tuple[Any, list[dict[str, Any]]]:
    """Train, or go on with training, and return the final state and the metrics of each epoch.

    Writes config.json, metrics.jsonl and checkpoints into ``config.out``; to the checkpoints each process
    writes what its devices hold.

    Raises:
      CheckpointError: the last checkpoint cannot be read.
      FloatingPointError: the training loss is not finite.
      FileNotFoundError, ValueError: as `prepare` and `claim`.
    """
    feed, programs = prepare(config)
    claim(config)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    steps = config.epochs * feed.steps_per_epoch
    with ocp.CheckpointManager((config.out / "checkpoints").absolute(), options=options) as manager:
        at = _resume(manager, programs.init(config.seed), programs.no_totals())
        bar = tqdm(
            total=steps,
            initial=at.step,
            unit="step",
            desc=config.out.name,
            smoothing=0.05,
            disable=not processes.is_first(),
        )
        tracker = Tracker(config, last_epoch=at.step // feed.steps_per_epoch)
        with bar, contextlib.closing(tracker):
            while at.step < steps:
                epoch = at.step // feed.steps_per_epoch
                at, row = _train_epoch(config, feed, programs, at, bar, functools.partial(_save, manager))
                if (epoch + 1) % config.evaluate_every == 0 or at.step == steps:
                    row |= evaluate(config, feed, programs, at.state)
                row |= _mask_metrics(config, at.state)
                at = Position(at.step, _renew(config, feed, programs, at.state, epoch), programs.no_totals())
                tracker.write(row)
                _save(manager, at)
    return at.state, tracker.rows


def load(folder: pathlib.Path, data: pathlib.Path | None = None) -> tuple[Config, Any]:
    """Return the settings of a run and the state in its last checkpoint, to be measured.

    They are for one device, whatever the run had, and for computing in float32.

    Args:
      folder: the run's, the ``--out`` of train.py.
      data: folder of the data set, if it is no longer where it was.

    Raises:
      FileNotFoundError: the data are not there.
      ValueError: the folder holds no run, or one without a checkpoint that can be read.
    """
    path, checkpoints = folder / "config.json", folder / "checkpoints"
    if not path.exists():
        raise ValueError(f"{folder} holds no run: there is no {path}.")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}
    where = data or (settings["data"] and pathlib.Path(settings["data"]))
    settings |= ROUNDING | {"out": folder, "data": where, "precision": "float32"}
    config = Config(**settings)
    _, programs = prepare(config)
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(checkpoints.absolute(), options=options) as manager:
        if manager.latest_step() is None:
            raise ValueError(f"{folder} holds no checkpoint yet.")
        return config, _resume(manager, programs.init(config.seed), programs.no_totals()).state


def _train_epoch(
    config: Config,
    feed: Feed,
    programs: Programs,
    at: Position,
    bar: tqdm,
    save: Callable[[Position], None],
) -> tuple[Position, dict[str, Any]]:
    """Take the steps that are left of an epoch; return where they lead, and the epoch's metrics."""
    chosen = Chosen(*map(np.float32, (config.lr, config.weight_decay, config.rho)))
    (epoch, start), leaves = divmod(at.step, feed.steps_per_epoch), perturbed_leaves(config, at.state)
    began, first, end = time.perf_counter(), at.step, (epoch + 1) * feed.steps_per_epoch
    for source in feed.batches(config.seed, epoch, start):
        ascent = ascends(config, epoch, at.step)
        state, totals = programs.step(
            at.state, at.totals, chosen, source, ascent=ascent, active=leaves if ascent else None
        )
        at = Position(at.step + 1, state, totals)
        bar.update()
        if at.step % LOOK_EVERY == 0:
            loss, accuracy = _means(totals)
            rate = (at.step - first) * config.batch / (time.perf_counter() - began)
            bar.set_postfix({"loss": f"{loss:.3f}", "accuracy": f"{accuracy:.1%}", "images/s": f"{rate:.0f}"})
        if config.checkpoint_every and at.step % config.checkpoint_every == 0 and at.step < end:
            save(at)
    loss, accuracy = _means(at.totals)
    seconds = time.perf_counter() - began
    if not math.isfinite(loss):
        raise FloatingPointError(f"the training loss is {loss} in epoch {epoch + 1}: lower --lr or --rho.")
    return at, {
        "epoch": epoch + 1,
        "step": at.step,
        "lr": float(config.lr * make_schedule(config, feed.steps_per_epoch)(at.step - 1)),
        "train_loss": loss,
        "train_accuracy": accuracy,
        "seconds": seconds,
        "images_per_second": (at.step - first) * config.batch / seconds,
    }


def evaluate(config: Config, feed: Feed, programs: Programs, state: Any) -> dict[str, float]:
    """Return loss and accuracy on the test examples, and on the held out ones if there are."""
    found = {}
    for split in ("valid", "test") if config.validation else ("test",):
        totals = programs.no_totals()
        for batch in feed.evaluation(split):
            totals = jax.tree.map(jnp.add, totals, programs.evaluate(state, *batch))
        found[f"{split}_loss"], found[f"{split}_accuracy"] = _means(totals)
    return found


def ascends(config: Config, epoch: int, step: int) -> bool:
    """Return whether a step perturbs: decided between compiled steps."""
    return config.method != "plain" and epoch >= config.ascent_from and step % config.ascent_every == 0


def perturbed_leaves(config: Config, state: Any) -> Any:
    """Return which tensors are perturbed, where that saves work, else None."""
    static = config.normalize == "masked" or config.form == "implicit"
    return ssam_jax.active_leaves(state.opt_state) if static and config.whole_tensors else None


def _renew(config: Config, feed: Feed, programs: Programs, state: Any, epoch: int) -> Any:
    """Return the state with a mask from per-example scores, if the epoch is one of renewal."""
    wanted = config.method == "ssam-f" and config.fisher == "per-example"
    if not wanted or (epoch + 1) % config.refresh_epochs or epoch + 1 < config.ascent_from:
        return state
    return programs.renew(state, *feed.examples(config.seed, epoch, config.fisher_samples))


def _mask_metrics(config: Config, state: Any) -> dict[str, Any]:
    if not config.method.startswith("ssam"):
        return {}
    stats = jax.device_get(ssam_jax.mask_stats(state.opt_state))
    by_leaf = {path: float(share) for path, share in stats.by_leaf.items()}
    return {"density": float(stats.density), "density_by_leaf": by_leaf}


def _means(totals: Totals) -> tuple[float, float]:
    loss, correct, examples = map(float, totals)
    return loss / examples, correct / examples


def _save(manager: ocp.CheckpointManager, at: Position) -> None:
    manager.save(at.step, args=ocp.args.StandardSave({"state": at.state, "totals": at.totals}))


def _resume(manager: ocp.CheckpointManager, state: Any, totals: Totals) -> Position:
    """Return where the last checkpoint was taken, or the beginning."""
    step = manager.latest_step()
    if step is None:
        return Position(0, state, totals)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"state": state, "totals": totals})
    try:
        return Position(step, **manager.restore(step, args=ocp.args.StandardRestore(like)))
    except Exception as error:  # Orbax raises whatever it met, a plain Exception for a truncated file
        first = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(
            f"{manager.directory / str(step)} cannot be read as a checkpoint of this run: it is damaged or"
            f" another run's ({type(error).__name__}: {first}). Delete it to go on from the one before, if"
            " there is one, or name another --out."
        ) from error
