"""The loop: epochs, metrics and checkpoints.

A run that was killed resumes and ends bit for bit the same, on the same devices and as many CPU cores.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import ssam_jax
from ssam_experiments.config import Config
from ssam_experiments.data.feeds import Feed
from ssam_experiments.running import checkpoints, files, locks, processes
from ssam_experiments.running.checkpoints import Position
from ssam_experiments.running.metrics import Tracker
from ssam_experiments.running.optimizers import Chosen, make_schedule
from ssam_experiments.running.preparation import ROUNDING, claim, prepare, recorded
from ssam_experiments.running.programs import Programs, Totals
from ssam_experiments.running.stopping import Stop, Stopped

LOOK_EVERY = 20  # steps between two looks at the loss, each of which waits for the device


class Pace:
    """How fast steps are, without those that compile, and a progress bar that leaves these out too.

    Attributes:
      bar: the progress bar of a run; it shows nothing off a terminal.
    """

    def __init__(self, bar: tqdm):
        self.bar = bar
        self._compiled: set[Hashable] = set()
        self.start()

    def start(self) -> None:
        """Begin to measure anew."""
        self._steps, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def step(self, take: Callable[[], Any], program: Hashable, before: Any) -> Any:
        """Return what a step returns. The first step of each ``program`` compiles and is not measured.

        Args:
          take: takes the step.
          program: what the compiled step depends on.
          before: arrays of the step before, to wait for before a step that compiles.
        """
        first = program not in self._compiled
        if first:
            jax.block_until_ready(before)
            if self._steps:  # else the time went into the first batch
                self._seconds += time.perf_counter() - self._since
            self.bar.set_postfix_str("compiling")
            self._compiled.add(program)
        result = take()
        if first:
            jax.block_until_ready(result)
            self.bar.set_postfix_str("", refresh=False)
            self.bar.unpause()
            self._since = time.perf_counter()
        else:
            self._steps += 1
        self.bar.update()
        return result

    def steps_per_second(self) -> float | None:
        """Return the speed since the start, None if every step compiled."""
        seconds = self._seconds + time.perf_counter() - self._since
        return self._steps / seconds if self._steps else None


def train(config: Config, stop: Stop | None = None) -> tuple[Any, list[dict[str, Any]]]:
    """Train, or resume training, and return the final state and the metrics of each epoch.

    Writes config.json, metrics.jsonl and checkpoints into ``config.out``. Each process writes to the
    checkpoints what its devices hold.

    Args:
      config: the settings.
      stop: asked after every step, and at every batch of an evaluation, whether to stop.

    Raises:
      Stopped: the run was to stop, and has saved how far it came.
      RunError: a checkpoint or another file cannot be read or written, or is damaged or another run's.
      FloatingPointError: the training loss or the state is not finite.
      FileNotFoundError, ValueError: as `prepare` and `claim`.
    """
    feed, programs = prepare(config)
    claim(config)
    steps, first = config.epochs * feed.steps_per_epoch, processes.is_first()
    with locks.releasing(config.out), _store(config, feed) as store:
        at = checkpoints.resume(store, programs.init(config.seed), programs.no_totals(), config.resume_from)
        save = functools.partial(checkpoints.save, store)

        def pause(at: Position) -> None:
            if stop is not None and stop.here():
                if at.step not in store.steps()[-1:]:
                    save(at)
                raise Stopped(stop.signum, at.step)

        bar = tqdm(
            total=steps,
            initial=at.step,
            unit="step",
            desc=config.out.name,
            smoothing=0.05,
            disable=None if first else True,  # None: off a terminal
        )
        tracker = Tracker(config, last_epoch=_epoch(feed, at))
        with bar, contextlib.closing(tracker):
            pace = Pace(bar)
            while (epoch := _epoch(feed, at)) < config.epochs:
                at, row = _train_epoch(config, feed, programs, at, pace, save, pause)
                checkpoints.check_finite(store, at)
                if (epoch + 1) % config.evaluate_every == 0 or at.step == steps:
                    row |= evaluate(config, feed, programs, at.state, functools.partial(pause, at))
                row |= _mask_metrics(config, at.state)
                at = Position(
                    at.step, _refresh(config, feed, programs, at.state, epoch), programs.no_totals()
                )
                tracker.write(row)
                if bar.disable and first:
                    print(describe(config, row), flush=True)
                if saves(config, epoch):
                    save(at)
    return at.state, tracker.rows


def describe(config: Config, row: dict[str, Any]) -> str:
    """Return the metrics of an epoch in a line, for a log."""
    parts = [f"epoch {row['epoch']} of {config.epochs}: training loss {row['train_loss']:.3f}"]
    for split, name in (("valid", "validation"), ("test", "test")):
        if f"{split}_accuracy" in row:
            parts.append(f"{name} accuracy {row[f'{split}_accuracy']:.1%}")
    if "images_per_second" in row:
        parts.append(f"{row['images_per_second']:.0f} images/s")
    return ", ".join(parts)


def load(folder: pathlib.Path, data: pathlib.Path | None = None) -> tuple[Config, Any]:
    """Return the settings of a run and the state in its last checkpoint, to be measured.

    They are for one device, whatever the run had, and for computing in float32.

    Args:
      folder: the run's, the ``--out`` of the trainer.
      data: folder of the data set, if it has moved since.

    Raises:
      FileNotFoundError: the data are missing.
      ValueError: the folder holds no run, or the run has no checkpoint that can be read.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no run: there is no {path}.")
    read = files.read_settings(path)
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in read.items()}
    if unknown := settings.keys() - {field.name for field in dataclasses.fields(Config)}:
        raise ValueError(
            f"{path} has settings that this version does not know: {', '.join(sorted(unknown))}."
        )
    where = data or (settings.get("data") and pathlib.Path(settings["data"]))
    settings |= ROUNDING | {"out": folder, "data": where, "precision": "float32"}
    config = Config(**settings)
    feed, programs = prepare(config)
    with _store(config, feed) as store:
        if not store.steps():
            raise ValueError(f"{folder} holds no checkpoint yet.")
        like = programs.init(config.seed), programs.no_totals()
        return config, checkpoints.resume(store, *like, but=("precision",)).state


def _store(config: Config, feed: Feed) -> contextlib.AbstractContextManager[checkpoints.Store]:
    settings = {k: v for k, v in recorded(config).items() if k not in ("data", *ROUNDING)}
    return checkpoints.opened(config.out / "checkpoints", settings, feed.facts)


def _epoch(feed: Feed, at: Position) -> int:
    """Return the epoch that a run is in, counted from 0: in the last one until its end was dealt with."""
    epoch, steps = divmod(at.step, feed.steps_per_epoch)
    return epoch - 1 if at.step and not steps and float(at.totals.examples) else epoch


def _train_epoch(
    config: Config,
    feed: Feed,
    programs: Programs,
    at: Position,
    pace: Pace,
    save: Callable[[Position], None],
    pause: Callable[[Position], None],
) -> tuple[Position, dict[str, Any]]:
    """Take the steps that are left of an epoch; return where they lead, and the epoch's metrics."""
    chosen = Chosen(*map(np.float32, (config.lr, config.weight_decay, config.rho)))
    epoch, leaves = _epoch(feed, at), perturbed_leaves(config, at.state)
    began, end = time.perf_counter(), (epoch + 1) * feed.steps_per_epoch
    pace.start()
    for source in feed.batches(config.seed, epoch, at.step - epoch * feed.steps_per_epoch):
        ascent = ascends(config, epoch, at.step)
        active = leaves if ascent else None
        step = functools.partial(
            programs.step, at.state, at.totals, chosen, source, ascent=ascent, active=active
        )
        at = Position(at.step + 1, *pace.step(step, (ascent, active), at.totals))
        if at.step % LOOK_EVERY == 0:
            loss, accuracy = _means(at.totals)
            shown = {"loss": f"{loss:.3f}", "accuracy": f"{accuracy:.1%}"}
            if speed := pace.steps_per_second():
                shown["images/s"] = f"{config.batch * speed:.0f}"
            pace.bar.set_postfix(shown)
        if config.checkpoint_every and at.step % config.checkpoint_every == 0 and at.step < end:
            save(at)
        pause(at)
    loss, accuracy = _means(at.totals)
    row = {
        "epoch": epoch + 1,
        "step": at.step,
        "lr": float(config.lr * make_schedule(config, feed.steps_per_epoch)(at.step - 1)),
        "train_loss": loss,
        "train_accuracy": accuracy,
        "seconds": time.perf_counter() - began,
    }
    if speed := pace.steps_per_second():
        row["images_per_second"] = config.batch * speed
    return at, row


def evaluate(
    config: Config, feed: Feed, programs: Programs, state: Any, pause: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return loss and accuracy on the test examples, and on the validation examples if there are any.

    Calls ``pause`` before each batch.
    """
    found = {}
    for split in ("valid", "test") if config.validation else ("test",):
        totals = programs.no_totals()
        for batch in feed.evaluation(split):
            pause()
            totals = jax.tree.map(jnp.add, totals, programs.evaluate(state, *batch))
        found[f"{split}_loss"], found[f"{split}_accuracy"] = _means(totals)
    return found


def saves(config: Config, epoch: int) -> bool:
    """Return whether a checkpoint is written at the end of an epoch, counted from 0."""
    return (epoch + 1) % config.checkpoint_epochs == 0 or epoch + 1 == config.epochs


def ascends(config: Config, epoch: int, step: int) -> bool:
    """Return whether a step takes two gradients: decided between compiled steps."""
    if config.method == "plain":
        return False
    if config.carrier == "carried":
        return epoch >= config.epochs - config.tail_epochs
    due = epoch >= config.ascent_from and step % config.ascent_every == 0
    return due and (config.ascent_chance == 1 or _drawn(config, step))


def _drawn(config: Config, step: int) -> bool:
    """Return whether a step is drawn to perturb, by the seed and the number of the step alone."""
    return np.random.default_rng((config.seed, step)).random() < config.ascent_chance


def perturbed_leaves(config: Config, state: Any) -> Any:
    """Return which tensors are perturbed, where that saves work, else None."""
    static = config.normalize == "masked" or config.form == "implicit"
    return ssam_jax.active_leaves(state.opt_state) if static and config.whole_tensors else None


def _refresh(config: Config, feed: Feed, programs: Programs, state: Any, epoch: int) -> Any:
    """Return the state, at the end of an epoch of refresh with a mask from per-example scores."""
    wanted = config.method == "ssam-f" and config.fisher == "per-example"
    if not wanted or (epoch + 1) % config.refresh_epochs or epoch + 1 < config.ascent_from:
        return state
    return programs.refresh(state, *feed.examples(config.seed, epoch, config.fisher_samples))


def _mask_metrics(config: Config, state: Any) -> dict[str, Any]:
    if not config.method.startswith("ssam"):
        return {}
    stats = jax.device_get(ssam_jax.mask_stats(state.opt_state))
    by_leaf = {path: float(share) for path, share in stats.by_leaf.items()}
    return {"density": float(stats.density), "density_by_leaf": by_leaf}


def _means(totals: Totals) -> tuple[float, float]:
    loss, correct, examples = map(float, totals)
    return loss / examples, correct / examples
