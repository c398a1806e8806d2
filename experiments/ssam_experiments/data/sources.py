"""Images too many for memory, read from disk one by one: folders of files, and Parquet files."""

import dataclasses
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ssam_experiments.data.bounds import IMAGE_BYTES, STREAM_EXAMPLES, DataError, read_regular
from ssam_experiments.data.parquet import ImageFile, find_shards

SPLITS = {"train": ("train",), "validation": ("validation", "val")}  # and what folders and files call them
ENDINGS = (".jpeg", ".jpg", ".png")
CACHE_BYTES = 2**32
"""Most bytes of images that a process keeps of Parquet files."""


class Source(Protocol):
    """Encoded images, readable in any order and from any thread, that can be pickled."""

    @property
    def classes(self) -> int:
        """The number of classes; labels are below it."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """Return an encoded image and its label."""

    def where(self, index: int) -> str:
        """Return how to find an image, for messages."""

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Return all indices in a random order, one in which they can be read fast."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder:
    """A folder for each class, a file for each image.

    Attributes:
      folder: that of the split.
      names: of the classes, in the order of their labels.
      files: names of the files as bytes, which by the million take less memory than paths.
      labels: of the files.
    """

    folder: Path
    names: tuple[str, ...]
    files: np.ndarray
    labels: np.ndarray

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return read_regular(self.where(index), IMAGE_BYTES), int(self.labels[index])

    def where(self, index: int) -> str:
        """Return the path of an image."""
        return os.path.join(self.folder, self.names[self.labels[index]], os.fsdecode(self.files[index]))

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Return a random permutation."""
        return rng.permutation(len(self))


def image_folder(folder: str | Path, split: str) -> ImageFolder:
    """Find the images ``<folder>/train/<class>/*`` or ``<folder>/val/<class>/*``.

    Args:
      folder: with a folder ``train`` and, for validation, ``val`` or ``validation``. Classes are numbered in
        the order of their names in ``train``, for both splits.
      split: ``"train"`` or ``"validation"``.

    Raises:
      FileNotFoundError: a folder is missing, or there are no images.
      ValueError: the split is unknown, or ``train`` lacks one of its classes.
    """
    place, train = (_subfolder(Path(folder), s) for s in (split, "train"))
    names, own = _class_names(train), _class_names(place)
    if unknown := sorted(set(own) - set(names)):
        raise DataError(f"{place} has classes that {train} has not: {', '.join(unknown[:5])}.")
    files: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if name in own:
            found = sorted(n for n in os.listdir(place / name) if n.lower().endswith(ENDINGS) and n[0] != ".")
            files += map(os.fsencode, found)
            labels += [label] * len(found)
    if not files:
        raise FileNotFoundError(f"No images ({', '.join(ENDINGS)}) in folders of classes in {place}.")
    return ImageFolder(place, names, np.array(files), np.array(labels, np.int32))


def _subfolder(folder: Path, split: str) -> Path:
    for name in _names(split):
        if (folder / name).is_dir():
            return folder / name
    raise FileNotFoundError(f"There is no folder {' or '.join(_names(split))} in {folder}.")


def _class_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")))


def _names(split: str) -> tuple[str, ...]:
    if split not in SPLITS:
        raise ValueError(f"split must be {' or '.join(SPLITS)}, got {split!r}.")
    return SPLITS[split]


class ParquetImages:
    """Rows of Parquet files. A read returns an entire row group, and the last few stay in memory.

    To read a row is to read its row group, about a hundred images, so a permutation of all rows would read a
    hundred times too much. Instead the order is random in two steps: that of the row groups, and that of the
    rows within a window, which is as many row groups as it takes to have ``window`` images.

    Attributes:
      classes: number of classes; a label must be below it.
    """

    def __init__(self, paths: Sequence[Path], classes: int, window: int):
        self.classes = classes
        self._arguments = (paths, classes, window)
        self._files = [ImageFile(path, ("label",)) for path in paths]
        if (total := sum(sum(file.sizes) for file in self._files)) > STREAM_EXAMPLES:
            raise DataError(f"{paths[0].parent} has {total} images; at most {STREAM_EXAMPLES} are read.")
        self._groups = [(file, i) for file in self._files for i in range(len(file.sizes))]
        self._sizes = np.array([file.sizes[i] for file, i in self._groups], np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._window = window
        self._room = 2 * (1 + window * len(self._groups) // max(1, len(self)))  # row groups of two windows
        self._cache: OrderedDict[int, tuple[list[bytes | None], np.ndarray]] = OrderedDict()
        self._cached = 0  # bytes of images
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ParquetImages, self._arguments  # a copy opens the files anew

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        group, row = self._find(index)
        images, labels = self._read(group)
        image = images[row]
        if image is None or not 0 <= labels[row] < self.classes:
            raise DataError(
                f"{self.where(index)} must have an image and a label below {self.classes}; its label is"
                f" {labels[row]}."
            )
        return image, int(labels[row])

    def where(self, index: int) -> str:
        """Return the file, the row group and the row of an image."""
        group, row = self._find(index)
        file, i = self._groups[group]
        return f"{file.path}, row {row} of row group {i}"

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Return a random order of the row groups, their rows mixed within windows."""
        groups = rng.permutation(len(self._groups))
        sizes = self._sizes[groups]
        ends = np.cumsum(sizes)
        rows = np.arange(len(self)) + np.repeat(self._starts[groups] - (ends - sizes), sizes)
        windows = np.repeat((ends - sizes) // self._window, sizes)
        return rows[np.lexsort((rng.random(len(self)), windows))]

    def _find(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return group, int(index - self._starts[group])

    def _read(self, group: int) -> tuple[list[bytes | None], np.ndarray]:
        """Read a row group, or take it from the cache, which has room for those of two windows."""
        with self._lock:  # threads that wait here would for the most part want the same row group
            if group not in self._cache:
                file, i = self._groups[group]
                self._cache[group] = images, _ = file.read_group(i)
                self._cached += _bytes(images)
                while len(self._cache) > 1 and (len(self._cache) > self._room or self._cached > CACHE_BYTES):
                    self._cached -= _bytes(self._cache.popitem(last=False)[1][0])
            self._cache.move_to_end(group)
            return self._cache[group]


def _bytes(images: list[bytes | None]) -> int:
    return sum(len(image) for image in images if image)


def parquet(folder: str | Path, split: str, *, classes: int = 1000, window: int = 2048) -> ParquetImages:
    """Find the Parquet files ``train-*.parquet`` or ``validation-*.parquet``, in a folder or its ``data``.

    They are as on the Hugging Face hub: a column ``image`` of ``struct<bytes, path>`` and integers ``label``.

    Args:
      folder: where the files are.
      split: ``"train"`` or ``"validation"``.
      classes: number of classes.
      window: number of images among which the order is random; a process keeps about twice as many, encoded.

    Raises:
      FileNotFoundError: there are no such files, or fewer than their names say.
      ValueError: the split is unknown, ``window`` is below 1, or a file is damaged or lacks a column.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}.")
    for name in _names(split):
        if paths := find_shards(Path(folder), name, ("data",)):
            return ParquetImages(paths, classes, window)
    wanted = " or ".join(f"{name}-*.parquet" for name in _names(split))
    raise FileNotFoundError(f"There are no files {wanted} in {folder} or in its data.")
