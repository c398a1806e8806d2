"""Data sets of small images, held in memory: digits, Fashion-MNIST, CIFAR-10 and CIFAR-100."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from ssam_experiments.data import readers
from ssam_experiments.data.readers import Arrays, Examples


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, split up.

    Attributes:
      name: as given to ``load``.
      train: in random order; these labels alone can be noisy.
      valid: examples set aside from the training examples, or None.
      test: in the order of the files.
      classes: number of classes.
      mean: of each channel of the training images, where 1 is white.
      std: likewise, the standard deviation; 1 for a channel that never varies.
    """

    name: str
    train: Arrays
    valid: Arrays | None
    test: Arrays
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


NAMES = ("digits", "fashion-mnist", "cifar10", "cifar100")


def load(
    name: str,
    folder: str | Path | None = None,
    *,
    validation: int = 0,
    limit: int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Read a data set and split it.

    The training examples are put in a random order; the last ``validation`` of them are set aside (not
    stratified by class), and of the others the first ``limit`` are kept. Hence runs that differ in ``limit``
    have the same validation examples, and those with fewer training examples have a part of those with more.

    Args:
      name: ``"digits"`` (scikit-learn's; 1297 for training and 500 for testing, stratified, always the same),
        ``"fashion-mnist"``, ``"cifar10"`` or ``"cifar100"`` (the 100 fine classes).
      folder: where the files are; not used for digits. Fashion-MNIST: the four idx files, gzipped or not.
        CIFAR: Parquet files as on the Hugging Face hub, or the official Python batches.
      validation: number of training examples to set aside.
      limit: number of training examples to keep, or None for all.
      label_noise: share of the training examples kept whose label is replaced by another class, drawn at
        random; the number of them is exact, rounded. Validation and test labels stay as they are.
      seed: of the split and of the noise. It belongs to the data, not to a run: runs to be compared share it.

    Raises:
      FileNotFoundError: the folder or a file is missing.
      ValueError: an argument is out of range, or a file is damaged, not what its name says, or larger than
        ``bounds`` allow.
      pickle.UnpicklingError: an official batch asks for code that such files do not contain.
    """
    if name not in NAMES:
        raise ValueError(f"The data set must be one of {', '.join(NAMES)}, got {name!r}.")
    if not 0 <= label_noise < 1:
        raise ValueError(f"label_noise must be from 0 to below 1, got {label_noise}.")
    train, test = _read(name, folder)
    if not (len(train.labels) and len(test.labels)):
        raise ValueError(f"{name} in {folder} has no examples for training, or none for testing.")
    classes, total = 100 if name == "cifar100" else 10, len(train.labels)
    if not 0 <= validation < total:
        raise ValueError(
            f"validation must be from 0 to below {total}, the training examples; got {validation}."
        )
    if limit is not None and not 1 <= limit <= total - validation:
        raise ValueError(
            f"limit must be from 1 to {total - validation}, the training examples less those for validation;"
            f" got {limit}."
        )
    split_seed, noise_seed = np.random.SeedSequence(seed).spawn(2)
    order = np.random.default_rng(split_seed).permutation(total)
    rest, aside = order[: total - validation][:limit], order[total - validation :]
    images, labels = train.take(np.concatenate([rest, aside]))  # no others are decoded
    count = len(rest)
    noisy = _noisy(labels[:count], classes, label_noise, np.random.default_rng(noise_seed))
    return Dataset(
        name,
        Arrays(images[:count], noisy),
        Arrays(images[count:], labels[count:]) if validation else None,
        test.take(np.arange(len(test.labels))),
        classes,
        *_statistics(images[:count]),
    )


def _read(name: str, folder: str | Path | None) -> tuple[Examples, Examples]:
    if name == "digits":
        return readers.read_digits()
    if folder is None or not Path(folder).is_dir():
        raise FileNotFoundError(f"{name} needs the folder where its files are; there is no folder {folder}.")
    if name == "fashion-mnist":
        return readers.read_fashion_mnist(Path(folder))
    return readers.read_cifar(Path(folder), 100 if name == "cifar100" else 10)


def _noisy(labels: np.ndarray, classes: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return int32 labels, an exact share of them wrong."""
    wrong = rng.permutation(len(labels))[: round(share * len(labels))]
    labels = labels.copy()
    labels[wrong] = (labels[wrong] + rng.integers(1, classes, wrong.size)) % classes
    return labels


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of each channel, exact but for their rounding to float32."""
    total = squares = np.zeros(images.shape[-1], np.int64)
    for start in range(0, len(images), 1000):  # in parts, for 8 bytes a pixel are many
        part = images[start : start + 1000].astype(np.int64)
        total, squares = total + part.sum((0, 1, 2)), squares + (part * part).sum((0, 1, 2))
    n = math.prod(images.shape[:-1])
    # Python's integers, which do not overflow; n**2 times the variance
    variances = [n * int(q) - int(t) ** 2 for t, q in zip(total, squares)]
    mean = tuple(float(np.float32(int(t) / (255 * n))) for t in total)
    return mean, tuple(float(np.float32(math.sqrt(v) / (255 * n))) if v else 1.0 for v in variances)
