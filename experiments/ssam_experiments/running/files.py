"""The files of a run: written so that a crash leaves the old or the new one, and refused by name."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_FOLDER = {errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class RunError(ValueError):
    """A file of a run cannot be written or read, or is not as the run wrote it."""


@contextlib.contextmanager
def naming(path: pathlib.Path, doing: str = "written") -> Iterator[None]:
    """Raise RunError, which names the file and the remedy, for an OSError of what is inside.

    Args:
      path: what to name if the error names no file itself.
      doing: what could not be done, ``"written"`` or ``"read"``.
    """
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else path
        reason = error.strerror or str(error)
        raise RunError(f"{named} cannot be {doing}: {reason}. {remedy(error.errno, doing)}") from error


def remedy(code: int | None, doing: str) -> str:
    """Return what to do about an error of the operating system."""
    if code in FULL:
        return "Free some space, and give the same command again: it resumes from the last checkpoint."
    if code in FORBIDDEN:
        wanted = "read and write there" if doing == "written" else "read it"
        return f"Give this user the right to {wanted}, or name another --out; nothing is damaged."
    if code in NO_FOLDER:
        return "A folder must be there, or nothing: move that file or link away, or name another --out."
    return "See to the disk or the mount, and give the same command again."


def make_folder(path: pathlib.Path) -> None:
    """Make a folder and those around it, where they are missing.

    Raises:
      RunError: there is a file of that name, a link to nothing, or no right to write.
    """
    with naming(path):
        path.mkdir(parents=True, exist_ok=True)


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write a file that is complete or as before, whenever the process is killed or the power fails.

    Raises:
      RunError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    with naming(path):
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync(path.parent)


def append(path: pathlib.Path, text: str) -> None:
    """Add to the end of a file, and return when it is on the disk.

    Raises:
      RunError: it cannot be written.
    """
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: pathlib.Path) -> None:
    """Return when a file, or the names in a folder, are on the disk. Some mounts cannot tell of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """Return the settings in a run's config.json.

    Raises:
      RunError: the file cannot be read, or is damaged.
    """
    with naming(path, "read"):
        data = path.read_bytes()
    with contextlib.suppress(ValueError):
        settings = json.loads(data)
        if isinstance(settings, dict):
            return settings
    raise RunError(
        f"{path} is damaged: it does not hold settings. Delete it and give the trainer's command again: the"
        " checkpoints hold the settings too."
    )


def read_rows(path: pathlib.Path, *names: str) -> list[dict[str, Any]]:
    """Return the complete lines of a file of JSON lines; none if there is no file.

    Args:
      path: the file.
      names: what each line must have a value for.

    Raises:
      RunError: the file cannot be read, or a line is damaged.
    """
    rows: list[dict[str, Any]] = []
    with naming(path, "read"):
        if not path.exists():
            return rows
        lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            continue
        row = None
        with contextlib.suppress(ValueError):
            row = json.loads(line)
        if not isinstance(row, dict) or not row.keys() >= set(names):
            raise RunError(
                f"{path} is damaged in line {number}, {line[:40]!r}. Delete that line and give the same"
                " command again: only what the line said is lost."
            )
        rows.append(row)
    return rows
