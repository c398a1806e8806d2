"""What files of data may hold. Strangers write them, and what is refused here has cost no memory and no time.

A bound is several times what the data sets of this package need.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

EXAMPLES = 2**17
"""Most examples of a split that is held in memory."""
STREAM_EXAMPLES = 2**24
"""Most examples of a split that is read from disk."""
FILE_BYTES = 2**28
"""Most bytes of a file that is read at once, and of what a gzip file holds."""
IMAGE_BYTES = 2**25
"""Most bytes of an encoded image."""
PIXELS = 2**26
"""Most pixels of an image; the largest of ImageNet has 61 million."""
SIDES = 100
"""Most times that an image may be longer than wide, or wider than long."""

_LONGEST, _END = 500, 150  # of a message, in characters


class DataError(ValueError):
    """A file is refused. The message is one line, whatever names and texts from the file are in it."""

    def __init__(self, text: str):
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """Return a text in printable characters, on one line, without its middle if it is long."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.strip()[:10_000])
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - _END]} ... {line[-_END:]}"


def is_present(path: Path) -> bool:
    """Whether there is a file, of any kind but a folder; `check_regular` says whether it can be read."""
    return path.exists() and not path.is_dir()


def check_regular(path: Path | str, status: os.stat_result | None = None) -> int:
    """Return the size of a file in bytes.

    Args:
      path: of the file; links are followed.
      status: of the file, if it is open.

    Raises:
      DataError: it is a folder, a pipe, a device or the like, which may block or never end.
      OSError: it is missing or may not be read.
    """
    status = status or os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a regular file.")
    return status.st_size


def read_regular(path: Path | str, limit: int = FILE_BYTES) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises:
      DataError: it is no regular file, is larger, or grows or shrinks while it is read.
      OSError: it is missing or cannot be read.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        size = check_regular(path, os.fstat(file.fileno()))
        if size > limit:
            raise DataError(f"{path} has {size} bytes; at most {limit} are read.")
        data = file.read(size + 1)
    if len(data) != size:
        raise DataError(f"{path} has {size} bytes, but not while it was read.")
    return data


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for someone to write to it


def check_labels(labels: np.ndarray | Sequence[object], classes: int, where: object) -> np.ndarray:
    """Return labels as int32.

    Args:
      labels: an array of integers, or a list in which anything may be.
      classes: their number; labels are below it.
      where: the file, for the message.

    Raises:
      DataError: a label is no integer, or no class.
    """
    if not isinstance(labels, np.ndarray):
        for place, label in enumerate(labels):
            if type(label) is not int:  # a bool is no label either
                kind = type(label).__name__
                text = f", {label!r}," if isinstance(label, str | float | bool) else ""
                raise DataError(f"Labels must be integers; label {place} of {where}{text} is of type {kind}.")
    if len(labels):
        low, high = min(labels), max(labels)
        if not 0 <= low <= high < classes:
            raise DataError(
                f"Labels must be from 0 to {classes - 1}; {where} has labels from {low} to {high}."
            )
    return np.asarray(labels, np.int32)
