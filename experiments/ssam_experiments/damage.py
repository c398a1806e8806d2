"""Damage to the files of a checkpoint, drawn at random, to try what notices it."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

Damage = Callable[[np.random.Generator, pathlib.Path, pathlib.Path], None]
"""Spoils a file: ``(generator, the file, a file of another checkpoint)``."""


def flip(rng: np.random.Generator, path: pathlib.Path, other: pathlib.Path) -> None:
    """Flip a bit."""
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def truncate(rng: np.random.Generator, path: pathlib.Path, other: pathlib.Path) -> None:
    """Cut off the end."""
    data = path.read_bytes()
    path.write_bytes(data[: rng.integers(len(data))])


def lengthen(rng: np.random.Generator, path: pathlib.Path, other: pathlib.Path) -> None:
    """Append bytes."""
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 100))))


def zero(rng: np.random.Generator, path: pathlib.Path, other: pathlib.Path) -> None:
    """Write zeros over a block."""
    data = bytearray(path.read_bytes())
    start, size = int(rng.integers(len(data))), 2 ** int(rng.integers(13))
    data[start : start + size] = bytes(len(data[start : start + size]))
    path.write_bytes(data)


def swap(rng: np.random.Generator, path: pathlib.Path, other: pathlib.Path) -> None:
    """Take the file of another checkpoint."""
    path.write_bytes(other.read_bytes())


def remove(rng: np.random.Generator, path: pathlib.Path, other: pathlib.Path) -> None:
    """Delete the file."""
    path.unlink()


DAMAGES: dict[str, Damage] = {d.__name__: d for d in (flip, truncate, lengthen, zero, swap, remove)}


def damage(
    rng: np.random.Generator, folder: pathlib.Path, other: pathlib.Path, kinds: Sequence[str] = ()
) -> tuple[str, pathlib.Path]:
    """Spoil one file of a checkpoint, or add one, and return how and which.

    Args:
      rng: draws the kind, the file and the place in it.
      folder: the checkpoint.
      other: another checkpoint, of the same run.
      kinds: the keys of `DAMAGES` to draw from, or ``"add"``; all if there are none.
    """
    names = list(kinds or (*DAMAGES, "add"))
    while True:
        kind, (path, foreign) = str(rng.choice(names)), (_any_file(rng, place) for place in (folder, other))
        if kind == "add":
            added = path.with_name(foreign.name)
            if added.exists():
                continue
            added.write_bytes(foreign.read_bytes())
            return kind, added
        before = path.read_bytes()
        if before:
            DAMAGES[kind](rng, path, foreign)
            if not path.exists() or path.read_bytes() != before:  # zeros over zeros are no damage
                return kind, path


def _any_file(rng: np.random.Generator, folder: pathlib.Path) -> pathlib.Path:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return files[rng.integers(len(files))]
