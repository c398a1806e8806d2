"""Checkpoints: how far a run has come, written so that damage, another run's and NaN do not pass.

A checkpoint is a folder ``checkpoints/<step>`` with the arrays, as Orbax writes them, and a manifest (see
`integrity`). It is made under the name ``<step>.unfinished``, synced, and renamed, so a folder that has its
name is complete, whenever the process was killed or the power failed.
"""

import contextlib
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ssam_experiments.running import fingerprint, integrity, processes
from ssam_experiments.running.choice import CheckpointError, choose, steps_in
from ssam_experiments.running.files import FORBIDDEN, FULL, make_folder, naming, remedy, sync
from ssam_experiments.running.programs import Totals

KEEP = 2  # checkpoints
ARRAYS = "arrays"  # the folder that Orbax writes


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


class Store(NamedTuple):
    """Where the checkpoints of a run are, and which run it is.

    Attributes:
      folder: of the checkpoints.
      settings: those that change the course of the run, see `fingerprint.of`.
      data: what tells its data from others.
      orbax: reads and writes the arrays.
    """

    folder: pathlib.Path
    settings: dict[str, Any]
    data: str
    orbax: ocp.Checkpointer

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in order."""
        return steps_in(self.folder)


@contextlib.contextmanager
def opened(folder: pathlib.Path, settings: dict[str, Any], data: str) -> Iterator[Store]:
    """Yield the checkpoints of a run; the arguments are `Store`'s attributes."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
        yield Store(folder, settings, data, orbax)


def save(store: Store, at: Position) -> None:
    """Write a checkpoint; each process writes the part that it holds. The last two are kept.

    It replaces one of the same step.

    Raises:
      FloatingPointError: something in it is not finite; nothing is written.
      CheckpointError: it cannot be written; those before are as they were.
    """
    check_finite(store, at)
    tree = {"state": at.state, "totals": at.totals}
    unfinished = store.folder / f"{at.step}.unfinished"
    processes.together(lambda: _make_room(store, unfinished) if processes.is_first() else None, str)
    try:
        with _quiet():
            store.orbax.save((unfinished / ARRAYS).absolute(), args=ocp.args.StandardSave(tree))
    except Exception as error:  # Orbax raises anything
        raise CheckpointError(_cannot_be_written(unfinished, error)) from error
    run = fingerprint.of(store.settings, store.data, tree)
    processes.together(lambda: _finish(store, at.step, run) if processes.is_first() else None, str)


def check_finite(store: Store, at: Position) -> None:
    """Check that a position is worth a checkpoint.

    Raises:
      FloatingPointError: a number in it is NaN or infinite, in this process or another.
    """
    bad = _not_finite(at)
    if not np.any(multihost_utils.process_allgather(np.array(bool(bad)))):
        return
    last = "there is no checkpoint yet"
    if steps := store.steps():
        last = f"the last checkpoint, of step {steps[-1]}, is finite and stays"
    raise FloatingPointError(
        f"{bad or 'an array of another process'} is not finite at step {at.step}; {last}. Lower --lr or"
        " --rho, or raise --warmup, and name another --out: in this one the run would end here again."
    )


def resume(
    store: Store, state: Any, totals: Totals, step: int | None = None, but: Collection[str] = ()
) -> Position:
    """Return the position of a checkpoint, or of the beginning if there is none.

    Args:
      store: the run.
      state: arrays, or shapes and dtypes with shardings, as those to be read.
      totals: likewise.
      step: the checkpoint's step, where it is not the last. Later ones are set aside.
      but: settings that may differ from those of the checkpoint.

    Raises:
      CheckpointError: the checkpoint is damaged, of another run, or not there.
    """
    tree = {"state": state, "totals": totals}
    run = fingerprint.of(store.settings, store.data, tree)

    def choice() -> int:
        return choose(store.folder, run, step, but) if processes.is_first() else -1

    found = int(multihost_utils.broadcast_one_to_all(np.int32(processes.together(choice, lambda _: ""))))
    if found < 0:
        return Position(0, state, totals)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    path = store.folder / str(found)
    try:
        with _quiet():
            read = store.orbax.restore((path / ARRAYS).absolute(), args=ocp.args.StandardRestore(like))
    except Exception as error:  # Orbax raises anything
        raise CheckpointError(
            f"{path} cannot be read, though its files are as they were written ({_first_line(error)}). See"
            " whether there is enough memory, and whether Orbax is the version that wrote it."
        ) from error
    return Position(found, **read)


def _make_room(store: Store, unfinished: pathlib.Path) -> None:
    """Make the folder to write to, and delete what killed runs have left."""
    make_folder(store.folder)
    with naming(unfinished):
        for path in store.folder.glob("*.unfinished"):
            shutil.rmtree(path)
        unfinished.mkdir()


def _finish(store: Store, step: int, run: dict[str, Any]) -> None:
    """Turn what Orbax has written into a checkpoint, then delete those that it replaces."""
    unfinished, old = store.folder / f"{step}.unfinished", []
    with naming(unfinished):
        integrity.write(unfinished, step, run)
        if step in store.steps():
            old.append(_retired(store, step))
        unfinished.rename(store.folder / str(step))
        sync(store.folder)
        for path in old + [_retired(store, earlier) for earlier in store.steps()[:-KEEP]]:
            shutil.rmtree(path)


def _retired(store: Store, step: int) -> pathlib.Path:
    """Rename a checkpoint, so that what is left of it if this process ends is not taken for one."""
    return (store.folder / str(step)).rename(store.folder / f"{step}.old.unfinished")


def _not_finite(at: Position) -> str | None:
    """Return what is not finite in the part that this process holds, None if all is."""
    for path, leaf in jax.tree_util.tree_leaves_with_path({"loss": at.totals.loss, "state": at.state}):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0 and not np.isfinite(np.asarray(shard.data)).all():
                return "the training loss" if path[0].key == "loss" else jax.tree_util.keystr(path[1:])
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from printing the traces of exceptions that it raises as well.

    If it raises one, threads that still write find its event loop closed, and tasks of the loop fail unasked
    for, even after this is left.
    """
    logger, tasks, hook = logging.getLogger("absl"), logging.getLogger("asyncio"), sys.unraisablehook
    level, level_of_tasks = logger.level, tasks.level

    def ignore_closed_loops(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":
            hook(what)

    logger.setLevel(logging.CRITICAL)
    tasks.setLevel(logging.CRITICAL)
    sys.unraisablehook = ignore_closed_loops
    try:
        yield
    finally:
        logger.setLevel(level)
    tasks.setLevel(level_of_tasks)
    sys.unraisablehook = hook


def _cannot_be_written(path: pathlib.Path, error: Exception) -> str:
    """Return what is wrong and what to do, from an error of Orbax, in which the system's is text."""
    for code in (*FULL, *FORBIDDEN):
        if os.strerror(code) in str(error) or f"os_error_code='{code}'" in str(error):
            return f"{path} cannot be written: {os.strerror(code)}. {remedy(code, 'written')}"
    return f"{path} cannot be written ({_first_line(error)}). {remedy(None, 'written')}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
