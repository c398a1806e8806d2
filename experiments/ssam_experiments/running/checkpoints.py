"""Checkpoints: write and read how far a run has come."""

from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from ssam_experiments.running.programs import Totals


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


def save(manager: ocp.CheckpointManager, at: Position) -> None:
    """Write a checkpoint; each process writes the part that it holds."""
    manager.save(at.step, args=ocp.args.StandardSave({"state": at.state, "totals": at.totals}))


def resume(manager: ocp.CheckpointManager, state: Any, totals: Totals) -> Position:
    """Return the position of the last checkpoint, or of the beginning if there is none.

    Raises:
      CheckpointError: the last checkpoint cannot be read.
    """
    step = manager.latest_step()
    if step is None:
        return Position(0, state, totals)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"state": state, "totals": totals})
    try:
        return Position(step, **manager.restore(step, args=ocp.args.StandardRestore(like)))
    except Exception as error:  # Orbax raises anything, a plain Exception for a truncated file
        first = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(
            f"{manager.directory / str(step)} cannot be read as a checkpoint of this run: it is damaged or"
            f" another run's ({type(error).__name__}: {first}). Delete it to resume from the one before, if"
            " there is one, or name another --out."
        ) from error
