"""Readers of data sets of small images; each returns the training and the test examples.

Both have ``labels``, and ``take(rows)``, which returns some of them as `Arrays`.
"""

import math
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ssam_experiments.data import cifar_batches, images, parquet
from ssam_experiments.data.bounds import EXAMPLES, DataError, check_labels, is_present, read_regular

DIGITS_TEST = 500


class Arrays(NamedTuple):
    """Examples.

    Attributes:
      images: uint8 of shape (examples, height, width, channels).
      labels: int32 of shape (examples,).
    """

    images: np.ndarray
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> "Arrays":
        """Return the examples with the given numbers."""
        return Arrays(self.images[rows], self.labels[rows])


class _Cifar(NamedTuple):
    """What the official batches of a data set are called, and the labels there and in Parquet files."""

    classes: int
    folder: str
    train: tuple[str, ...]
    test: str
    label_key: str
    label_columns: tuple[str, ...]


CIFAR = {
    10: _Cifar(
        10,
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "labels",
        ("label", "labels"),
    ),
    100: _Cifar(100, "cifar-100-python", ("train",), "test", "fine_labels", ("fine_label", "label")),
}


def read_digits() -> tuple[Arrays, Arrays]:
    """Return scikit-learn's digits, 8 x 8, their 17 shades of gray spread over 0 to 255."""
    from sklearn.datasets import load_digits  # slow to import, and for this data set alone
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels.astype(np.int32), test_size=DIGITS_TEST, stratify=labels, random_state=0
    )
    return Arrays(train_x, train_y), Arrays(test_x, test_y)


def read_fashion_mnist(folder: Path) -> tuple[Arrays, Arrays]:
    """Return Fashion-MNIST, 28 x 28, from the four idx files, gzipped or not."""
    parts = []
    for split in ("train", "t10k"):
        image_file, label_file = (
            _find_idx(folder, f"{split}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")
        )
        pixels, labels = _read_idx(image_file, (28, 28)), _read_idx(label_file, ())
        if len(pixels) != len(labels):
            raise DataError(f"{image_file} has {len(pixels)} images, but {label_file} {len(labels)} labels.")
        parts.append(Arrays(pixels[..., None], check_labels(labels, 10, label_file)))
    return parts[0], parts[1]


def _find_idx(folder: Path, name: str) -> Path:
    places = [folder, folder / "raw", folder / "FashionMNIST" / "raw"]
    for file in (place / (name + end) for place in places for end in ("", ".gz")):
        if is_present(file):
            return file
    raise FileNotFoundError(
        f"{name} or {name}.gz of Fashion-MNIST is not in {folder}, nor in its raw or FashionMNIST/raw."
    )


def _read_idx(path: Path, item: tuple[int, ...]) -> np.ndarray:
    """Return an array of bytes, with items of a known shape, from a file, gzipped or not.

    Before the values come the type, 8, the rank, and the sizes, big-endian.
    """
    rank = 1 + len(item)
    start = 4 + 4 * rank
    data = read_regular(path)
    if path.suffix == ".gz":
        data = _unzip(data, start + EXAMPLES * math.prod(item), path)
    if len(data) < start or data[:4] != bytes([0, 0, 8, rank]):
        raise DataError(f"{path} does not start as an idx file of bytes in {rank} dimensions does.")
    shape = tuple(np.frombuffer(data, ">u4", rank, offset=4).tolist())
    if shape[1:] != item:
        raise DataError(f"Images must be 28 x 28; those of {path} are {shape[1:]}.")
    _check_count(shape[0], path)
    if len(data) - start != math.prod(shape):
        raise DataError(
            f"{path} has {len(data) - start} values, not the {math.prod(shape)} of shape {shape}."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _unzip(data: bytes, most: int, path: Path) -> bytes:
    """Return what a gzip file holds, if that is at most so many bytes."""
    machine = zlib.decompressobj(wbits=31)  # with gzip's header and checksum
    try:
        unzipped = machine.decompress(data, most + 1)
    except zlib.error as error:
        raise DataError(f"{path} is not a complete gzip file: {error}") from None
    if len(unzipped) > most:
        raise DataError(f"{path} unzips to more than {most} bytes.")
    if not machine.eof or machine.unused_data.strip(b"\0"):
        raise DataError(f"{path} is not a complete gzip file, of one part.")
    return unzipped


def _check_count(count: int, where: object) -> None:
    if count > EXAMPLES:
        raise DataError(f"{where} has {count} examples; at most {EXAMPLES} are read.")


class EncodedCifar:
    """CIFAR in Parquet files: the labels are read, and images are decoded when they are taken.

    Attributes:
      labels: of all examples, int32.
    """

    def __init__(self, paths: Sequence[Path], names: _Cifar):
        self._files = [parquet.ImageFile(path, names.label_columns) for path in paths]
        _check_count(sum(sum(file.sizes) for file in self._files), f"{paths[0]}, or it with those like it,")
        labels = [check_labels(file.read_labels(), names.classes, file.path) for file in self._files]
        self.labels = np.concatenate(labels)
        self._title = f"decoding CIFAR-{names.classes}"

    def take(self, rows: np.ndarray) -> Arrays:
        """Decode the examples with the given numbers, in threads; a bar shows if it lasts.

        Raises:
          ValueError: an image cannot be decoded, or a file is damaged.
        """
        pixels, order = np.empty((len(rows), 32, 32, 3), np.uint8), np.argsort(rows, kind="stable")

        def read(file: parquet.ImageFile, group: int, start: int, places: np.ndarray) -> int:
            wanted = rows[places] - start  # within the row group
            for place, row, data in zip(places, wanted, file.read_group(group, wanted)[0]):
                where = f"{file.path}, row {row} of row group {group}"
                pixels[place] = np.asarray(images.decode(data, where, (32, 32)))
            return len(places)

        work, start = [], 0
        for file in self._files:
            for group, size in enumerate(file.sizes):
                first, end = np.searchsorted(rows[order], (start, start + size))
                if first < end:
                    work.append((file, group, start, order[first:end]))
                start += size
        bar = tqdm(total=len(rows), desc=self._title, unit=" images", delay=2, disable=None)
        # Decoding needs the interpreter little, so threads help.
        with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
            for count in pool.map(lambda task: read(*task), work):
                bar.update(count)
        return Arrays(pixels, self.labels[rows])


Examples = Arrays | EncodedCifar


def read_cifar(folder: Path, classes: int) -> tuple[Examples, Examples]:
    """Return CIFAR-10 or CIFAR-100, 32 x 32 in color, from Parquet files or the official batches."""
    names = CIFAR[classes]
    subfolders = ("data", "plain_text", f"cifar{classes}")
    train, test = (parquet.find_shards(folder, split, subfolders) for split in ("train", "test"))
    if train and test:
        parts = EncodedCifar(train, names), EncodedCifar(test, names)
        if classes == 100 and max(parts[0].labels, default=99) < 20:  # a column label may be anything
            raise DataError(f"Labels in {folder} are all below 20: they are not CIFAR-100's fine classes.")
        return parts
    for place in (folder, folder / names.folder):
        if all(is_present(place / name) for name in (names.train[0], names.test)):
            return _read_batches(place, names.train, names), _read_batches(place, (names.test,), names)
    raise FileNotFoundError(
        f"CIFAR-{classes} is not in {folder}. Looked for train-*.parquet and test-*.parquet there and in its"
        f" {', '.join(subfolders)}, and for the official Python batches, {', '.join(names.train)} and"
        f" {names.test}, there and in its {names.folder}."
    )


def _read_batches(folder: Path, files: Sequence[str], names: _Cifar) -> Arrays:
    missing = [name for name in files if not is_present(folder / name)]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)} of CIFAR-{names.classes} is not in {folder}.")
    parts = [cifar_batches.read_batch(folder / name, names.label_key, names.classes) for name in files]
    pixels, labels = zip(*parts)
    return Arrays(np.concatenate(pixels), np.concatenate(labels))
