"""Which checkpoint a run resumes from: one that is intact, of this run, and of the step in its name."""

import pathlib
import re
import shutil
import sys
from collections.abc import Collection
from typing import Any

from ssam_experiments.running import fingerprint, integrity
from ssam_experiments.running.files import RunError, naming


class CheckpointError(RunError):
    """A checkpoint is damaged, is not one of this run, or cannot be written."""


def steps_in(folder: pathlib.Path) -> list[int]:
    """Return the steps that have a checkpoint, in order."""
    with naming(folder, "read"):
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name))


def last_settings(folder: pathlib.Path) -> dict[str, Any] | None:
    """Return the settings in the last checkpoint of a folder that has a manifest, None without one."""
    for step in reversed(steps_in(folder)):
        try:
            return integrity.read(folder / str(step)).run["settings"]
        except integrity.DamageError:
            continue
    return None


def choose(folder: pathlib.Path, run: dict[str, Any], wanted: int | None, but: Collection[str]) -> int:
    """Return the step to resume from, after its files were checked; -1 if there is none.

    Args:
      folder: of the checkpoints.
      run: the fingerprint of the run that is to resume.
      wanted: the step, where it is not the last. Later ones are set aside.
      but: settings that may differ.

    Raises:
      CheckpointError: the checkpoint is damaged, of another run, or not there.
    """
    steps = steps_in(folder)
    if wanted is not None and wanted not in steps:
        raise CheckpointError(
            f"--resume-from must be the step of a checkpoint in {folder}, got {wanted}; there are"
            f" {', '.join(map(str, steps)) or 'none'}."
        )
    for unfinished in sorted(folder.glob("*.unfinished")):
        last = f"step {steps[-1]} is the last" if steps else "there is none yet"
        print(f"{unfinished} is not a complete checkpoint: {last}.", file=sys.stderr)
    if not steps:
        return -1
    step = steps[-1] if wanted is None else wanted
    try:
        _check(folder, run, step, but)
    except integrity.DamageError as error:
        raise CheckpointError(f"{error} {_instead(folder, run, step, but)}") from error
    with naming(folder):
        for later in steps[steps.index(step) + 1 :]:
            _set_aside(folder / str(later))
    return step


def _check(folder: pathlib.Path, run: dict[str, Any], step: int, but: Collection[str]) -> None:
    """Raise DamageError or CheckpointError unless a checkpoint is intact and of this run."""
    path = folder / str(step)
    manifest = integrity.read(path)
    if manifest.step != step:
        raise integrity.DamageError(
            f"{path} is the checkpoint of step {manifest.step}, so its folder was renamed: give it its name"
            " back."
        )
    if other := fingerprint.difference(manifest.run, run, but):
        raise CheckpointError(
            f"{path} is the checkpoint of another run: {other}. Give the command, data and settings of JAX"
            " that it was made with, or name another --out."
        )
    integrity.verify(path, manifest)


def _instead(folder: pathlib.Path, run: dict[str, Any], step: int, but: Collection[str]) -> str:
    """Return what to do without a checkpoint that is damaged."""
    for earlier in reversed([s for s in steps_in(folder) if s < step]):
        try:
            _check(folder, run, earlier, but)
        except RunError:
            continue
        return (
            f"The checkpoint of step {earlier} is intact: add --resume-from {earlier}, once, which sets later"
            f" ones aside, or delete {folder / str(step)}."
        )
    return f"No earlier checkpoint is intact: name another --out, or delete {folder} to begin anew."


def _set_aside(path: pathlib.Path) -> None:
    place = path.with_name(f"{path.name}.aside")
    if place.exists():
        shutil.rmtree(place)
    path.rename(place)
