"""The source of batches: a data set that lives on the device, or a stream from disk."""

import functools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from ssam_experiments.config import Config
from ssam_experiments.data.augment import augment_batch, normalize
from ssam_experiments.data.datasets import Dataset
from ssam_experiments.data.imagenet import Source, eval_batches, image_folder, parquet, train_batches
from ssam_experiments.data.readers import Arrays
from ssam_experiments.running import placement

EVAL_BATCH = 500
SAMPLED = 8  # images of a stream in its facts: to read all of them would take as long as an epoch
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, the usual constants
TRAINING, EXAMPLES = 2, 3  # purposes of a random order; 0 and 1 are initialization and dropout


class Feed(Protocol):
    """A data set in batches. Images are uint8 (batch, height, width, channels) until a step has them.

    Attributes:
      steps_per_epoch: in which the examples that do not fill a batch are left out.
      image_shape: height, width and channels.
      classes: number of classes.
      facts: what must be the same in all processes of a run.
    """

    steps_per_epoch: int
    image_shape: tuple[int, ...]
    classes: int
    facts: str

    def batches(self, seed: int, epoch: int, start: int) -> Iterator[Any]:
        """Yield a source for each step of an epoch, from step ``start`` on."""

    def fetch(self, key: jax.Array, source: Any) -> tuple[jax.Array, jax.Array]:
        """Return a step's images, augmented and normalized, and labels. Traced."""

    def prepare(self, images: jax.Array) -> jax.Array:
        """Return images normalized. Traced."""

    def examples(self, seed: int, epoch: int, count: int) -> tuple[Any, Any]:
        """Return ``count`` training images and labels, drawn without replacement."""

    def evaluation(self, split: str) -> Iterator[tuple[Any, Any, Any]]:
        """Yield images, labels and weights: 0 for the padding of the last batch."""


class MemoryFeed:
    """A data set whose training images live on the device; a step gathers and augments its batch."""

    def __init__(self, config: Config, dataset: Dataset):
        count = len(dataset.train.labels)
        if config.batch > count:
            raise ValueError(f"--batch must be at most the {count} training examples, got {config.batch}.")
        self._config, self._dataset = config, dataset
        self._train = placement.everywhere(dataset.train, config.devices)
        jit = functools.partial(jax.jit, out_shardings=placement.replicated(config.devices))
        self._order = jit(self._draw_order, static_argnames="purpose")
        self._take = jit(self._take_rows, static_argnames="count")
        self.steps_per_epoch = count // config.batch
        self.image_shape = dataset.train.images.shape[1:]
        self.classes = dataset.classes
        arrays = [*dataset.train, *(dataset.valid or ()), *dataset.test]
        self.facts = " ".join(str(zlib.crc32(np.ascontiguousarray(x).data)) for x in arrays)

    def _draw_order(self, seed: jax.Array, epoch: jax.Array, *, purpose: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), epoch)
        return jax.random.permutation(key, len(self._train.labels))

    def _take_rows(self, train: Arrays, order: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array]:
        return train.images[order[:count]], train.labels[order[:count]]

    def batches(self, seed: int, epoch: int, start: int) -> Iterator[Any]:
        """Yield the data set, the epoch's order, and the number of the step."""
        order = self._order(seed, epoch, purpose=TRAINING)
        for i in range(start, self.steps_per_epoch):
            yield self._train, order, np.int32(i)

    def fetch(self, key: jax.Array, source: Any) -> tuple[jax.Array, jax.Array]:
        """Gather and augment the rows of a step."""
        train, order, i = source
        rows = jax.lax.dynamic_slice_in_dim(order, i * self._config.batch, self._config.batch)
        augmented = self._config.augment and self._dataset.name != "digits"
        images = augment_batch(
            key,
            train.images[rows],
            self._dataset.mean,
            self._dataset.std,
            crop=4 if augmented else 0,
            flip=augmented,
            cutout=self.image_shape[0] // 2 if self._config.cutout else 0,
        )
        return images, train.labels[rows]

    def prepare(self, images: jax.Array) -> jax.Array:
        """Normalize."""
        return normalize(images, self._dataset.mean, self._dataset.std)

    def examples(self, seed: int, epoch: int, count: int) -> tuple[Any, Any]:
        """Return the first rows of an order of their own."""
        count = min(count, len(self._train.labels))
        return self._take(self._train, self._order(seed, epoch, purpose=EXAMPLES), count=count)

    def evaluation(self, split: str) -> Iterator[tuple[Any, Any, Any]]:
        """Yield batches of equal size of the split ``"valid"`` or ``"test"``."""
        arrays: Arrays = getattr(self._dataset, split)
        size = EVAL_BATCH // self._config.devices * self._config.devices
        for start in range(0, len(arrays.labels), size):
            images, labels = (x[start : start + size] for x in arrays)
            rest = size - len(labels)
            yield (
                np.pad(images, [(0, rest), *[(0, 0)] * 3]),
                np.pad(labels, (0, rest)),
                np.pad(np.ones(len(labels), np.float32), (0, rest)),
            )


class StreamFeed:
    """ImageNet and its like: read and cropped by worker processes while the device computes."""

    image_shape: tuple[int, ...] = (224, 224, 3)

    def __init__(self, config: Config, workers: int):
        if config.data is None:
            raise ValueError(f"--dataset {config.dataset} needs --data, its folder.")
        find: Callable[[Path, str], Source] = image_folder if (config.data / "train").is_dir() else parquet
        self._train, self._test = find(config.data, "train"), find(config.data, "validation")
        self._config, self._workers = config, workers
        self._part = jax.process_index(), jax.process_count()
        self.steps_per_epoch = len(self._train) // config.batch
        self.classes = self._train.classes
        self.facts = f"{self.classes} {_checksum(self._train)} {_checksum(self._test)}"

    def batches(self, seed: int, epoch: int, start: int) -> Iterator[Any]:
        """Yield images and labels, of which each process reads the rows of its own devices."""
        first = epoch * self.steps_per_epoch
        for batch in train_batches(
            self._train,
            batch=self._config.batch,
            steps=first + self.steps_per_epoch,
            start=first + start,
            seed=seed,
            workers=self._workers,
            part=self._part,
        ):
            yield placement.joined((batch["image"], batch["label"]), self._config.devices)

    def fetch(self, key: jax.Array, source: Any) -> tuple[jax.Array, jax.Array]:
        """Normalize, and cut out; crops and flips have been made."""
        images, labels = source
        cutout = self.image_shape[0] // 2 if self._config.cutout else 0
        return augment_batch(key, images, MEAN, STD, crop=0, flip=False, cutout=cutout), labels

    def prepare(self, images: jax.Array) -> jax.Array:
        """Normalize."""
        return normalize(images, MEAN, STD)

    def examples(self, seed: int, epoch: int, count: int) -> tuple[Any, Any]:
        """Return images that were cropped and flipped, as in training."""
        count = min(count, len(self._train))
        batch = next(train_batches(self._train, batch=count, steps=1, seed=(seed << 32) + epoch + 1))
        return batch["image"], batch["label"]

    def evaluation(self, split: str) -> Iterator[tuple[Any, Any, Any]]:
        """Yield the validation images, whatever the split: ImageNet's test labels are not public."""
        size, devices = self._config.batch, self._config.devices
        for batch in eval_batches(self._test, batch=size, workers=self._workers, part=self._part):
            yield placement.joined((batch["image"], batch["label"], batch["weight"]), devices)


def _checksum(source: Source) -> str:
    """Return the number of images and a checksum of some of them, the same wherever they are."""
    found = 0
    for index in np.linspace(0, len(source) - 1, min(SAMPLED, len(source)), dtype=int):
        data, label = source[int(index)]
        found = zlib.crc32(data + str(label).encode(), found)
    return f"{len(source)}:{found}"
