"""The manifest of a checkpoint: its step, its run and a checksum of each file, so that damage is seen.

The first line is the SHA-256 of the rest, which is JSON.
"""

import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from ssam_experiments.running.files import RunError, naming, sync, write_whole

NAME = "manifest.json"


class DamageError(RunError):
    """A checkpoint is not as it was written."""


class Manifest(NamedTuple):
    """What a checkpoint is.

    Attributes:
      step: optimizer steps taken.
      run: what must be the same where it resumes, see `fingerprint`.
      files: size in bytes and SHA-256 of each file, by its path within the checkpoint.
    """

    step: int
    run: dict[str, Any]
    files: dict[str, list[Any]]


def write(folder: pathlib.Path, step: int, run: dict[str, Any]) -> None:
    """Write the manifest of a folder, and return when all of it is on the disk.

    Raises:
      RunError: a file cannot be read, or the manifest cannot be written.
    """
    with naming(folder):
        files = {name: _measured(path, flush=True) for name, path in _files(folder)}
        for place, _, _ in os.walk(folder):
            sync(pathlib.Path(place))
    text = json.dumps(Manifest(step, run, files)._asdict())
    write_whole(folder / NAME, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def read(folder: pathlib.Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
      DamageError: it is missing or damaged.
      RunError: it may not be read.
    """
    path = folder / NAME
    try:
        with naming(path, "read"):
            data = path.read_bytes()
    except RunError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise DamageError(f"{path} is missing.") from error
        raise
    digest, _, text = data.partition(b"\n")
    if digest != hashlib.sha256(text).hexdigest().encode():
        raise DamageError(f"{path} is damaged.")
    return Manifest(**json.loads(text))


def verify(folder: pathlib.Path, manifest: Manifest) -> None:
    """Check that a checkpoint has its files, no others, and each as it was written.

    Raises:
      DamageError: it has not; the first file that differs is named.
      RunError: a file may not be read.
    """
    with naming(folder, "read"):
        there = dict(_files(folder))
        for name in sorted(manifest.files.keys() | there.keys()):
            if name not in there:
                raise DamageError(f"{folder / name} is missing.")
            if name not in manifest.files:
                raise DamageError(f"{there[name]} is no file of this checkpoint.")
            if not stat.S_ISREG(there[name].lstat().st_mode):
                raise DamageError(f"{there[name]} is no longer a file, but a link or a device.")
            size = there[name].stat().st_size
            if size != manifest.files[name][0]:
                raise DamageError(f"{there[name]} has {size} bytes, not {manifest.files[name][0]}.")
            if _measured(there[name]) != manifest.files[name]:
                raise DamageError(
                    f"{there[name]} is damaged: its checksum is not the one it was written with."
                )


def _files(folder: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """Yield all that is in a folder but folders and the manifest; links are not followed."""
    for place, folders, files in os.walk(folder, onerror=_raise):
        here = pathlib.Path(place)
        for path in [here / name for name in files] + [here / n for n in folders if (here / n).is_symlink()]:
            name = path.relative_to(folder).as_posix()
            if name != NAME:
                yield name, path


def _raise(error: OSError) -> None:
    raise error


def _measured(path: pathlib.Path, *, flush: bool = False) -> list[Any]:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]
