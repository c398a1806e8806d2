"""Batches of ImageNet and its like, made by grain in threads or processes while the accelerator works.

A batch is a function of the source, the seed and the number of the step alone, not of the workers or threads
that make it, so a run may stop after any step and resume there.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from ssam_experiments.data.images import decode
from ssam_experiments.data.sources import ImageFolder, ParquetImages, Source, image_folder, parquet
from ssam_experiments.running.stopping import leave_to_the_trainer

__all__ = [
    "ImageFolder",
    "ParquetImages",
    "Source",
    "eval_batches",
    "image_folder",
    "parquet",
    "train_batches",
]

Example = dict[str, np.ndarray | np.generic]
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
ATTEMPTS = 10


def train_batches(
    source: Source,
    *,
    batch: int,
    steps: int,
    start: int = 0,
    seed: int = 0,
    image_size: int = 224,
    workers: int = 0,
    threads: int = 4,
    part: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches of steps ``start`` to ``steps - 1``, in an order that each epoch draws anew.

    An epoch is ``len(source) // batch`` steps; the images left over are others every time. Each image is
    cropped at random, to between 8 % and 100 % of its area and a ratio of sides from 3:4 to 4:3, resized
    (bilinear, antialiased) and flipped half of the time (Szegedy et al., arXiv:1409.4842, section 6; the
    details are torchvision's RandomResizedCrop).

    Args:
      source: from ``image_folder`` or ``parquet``.
      batch: images in a batch.
      steps: of the run.
      start: the first step to yield, above 0 if a run resumes.
      seed: of the order and of the crops.
      image_size: height and width of the images yielded.
      workers: processes that make batches; 0 makes them in this one. Since processes are spawned, they import
        the main script, which must start its work under ``if __name__ == "__main__"``. Batches come through
        shared memory: /dev/shm must have room for a few of each worker.
      threads: of each process. Each works on a batch of its own and may have another waiting.
      part: ``(i, n)`` for the i-th of the n equal parts of every batch, the only one that is read; the parts
        of a batch, one after another, are the batch.

    Yields:
      ``image``, uint8 of shape (batch / n, image_size, image_size, 3), and ``label``, int32 of shape
      (batch / n,).

    Raises:
      ValueError: an argument is out of range; or, in the course of it, an image cannot be decoded.
    """
    _check(source, batch, image_size, workers, threads, part)
    if not 0 <= start <= steps:
        raise ValueError(f"start must be from 0 to steps, {steps}; got {start}.")
    if batch > len(source):
        raise ValueError(f"A batch of {batch} is more than the {len(source)} images.")
    order_seed, crop_seed = map(int, np.random.SeedSequence(seed).generate_state(2))
    read = _Shuffled(source, batch * (len(source) // batch), order_seed)
    crop = functools.partial(_random_crop, size=image_size)
    examples = grain.MapDataset.range(steps * batch).map(read).random_map(crop, seed=crop_seed)
    return _iterate(_parts(examples, batch, part)[start:], workers, threads)


def eval_batches(
    source: Source,
    *,
    batch: int,
    image_size: int = 224,
    resize: int = 256,
    workers: int = 0,
    threads: int = 4,
    part: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """Yield all images once, in order: the shorter side resized (bilinear, antialiased), the center cropped.

    Args:
      source: from ``image_folder`` or ``parquet``.
      batch: images in a batch; the last one is filled up with black images of weight 0.
      image_size: height and width of the crop.
      resize: length of the shorter side before the crop.
      workers: processes that make batches, as in ``train_batches``.
      threads: of each process, likewise.
      part: as in ``train_batches``.

    Yields:
      ``image`` and ``label`` as in ``train_batches``, and ``weight``, float32 of shape (batch / n,), 1 or 0.

    Raises:
      ValueError: an argument is out of range; or, in the course of it, an image cannot be decoded.
    """
    _check(source, batch, image_size, workers, threads, part)
    if resize < image_size:
        raise ValueError(f"resize must be at least image_size, {image_size}; got {resize}.")
    steps = math.ceil(len(source) / batch)
    make = functools.partial(_eval_example, source, size=image_size, resize=resize)
    examples = grain.MapDataset.range(steps * batch).map(make)
    return _iterate(_parts(examples, batch, part), workers, threads)


def _parts(examples: grain.MapDataset, batch: int, part: tuple[int, int]) -> grain.MapDataset:
    """Return a part of every batch; what is random in an example knows its place among all of them."""
    i, n = part
    return examples.batch(batch // n)[i::n]


class _Shuffled:
    """Reads the image at a position in the sequence of all epochs, each of which has an order of its own."""

    def __init__(self, source: Source, per_epoch: int, seed: int):
        self._arguments = (source, per_epoch, seed)
        self._order = functools.lru_cache(maxsize=2)(self._draw)  # two, for threads may be an epoch apart

    def __reduce__(self) -> tuple[Any, ...]:
        return _Shuffled, self._arguments

    def _draw(self, epoch: int) -> np.ndarray:
        source, _, seed = self._arguments
        return source.order(np.random.default_rng((seed, epoch)))

    def __call__(self, position: int) -> tuple[Image.Image, int]:
        source, per_epoch, _ = self._arguments
        epoch, place = divmod(position, per_epoch)
        return _decoded(source, int(self._order(epoch)[place]))


def _decoded(source: Source, index: int) -> tuple[Image.Image, int]:
    data, label = source[index]
    return decode(data, source.where(index)), label


def _random_crop(example: tuple[Image.Image, int], rng: np.random.Generator, size: int) -> Example:
    image, label = example
    left, top, width, height = random_box(*image.size, rng)
    image = image.crop((left, top, left + width, top + height))  # not resize(box=...), which sees outside
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return {"image": np.array(image), "label": np.int32(label)}


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a random part of an image of this size.

    Its area is uniform and its ratio of sides log-uniform. If ten draws do not fit, it is the largest part
    in the middle with a ratio in range.
    """
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def _eval_example(source: Source, position: int, *, size: int, resize: int) -> Example:
    if position >= len(source):
        black = np.zeros((size, size, 3), np.uint8)
        return {"image": black, "label": np.int32(0), "weight": np.float32(0)}
    image, label = _decoded(source, position)
    short = min(image.size)
    width, height = (side * resize // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return {"image": np.array(image), "label": np.int32(label), "weight": np.float32(1)}


def _check(
    source: Source, batch: int, image_size: int, workers: int, threads: int, part: tuple[int, int]
) -> None:
    least = {
        "batch": (batch, 1),
        "image_size": (image_size, 1),
        "workers": (workers, 0),
        "threads": (threads, 1),
    }
    for name, (value, low) in least.items():
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}.")
    if not len(source):
        raise ValueError("The source has no images.")
    i, n = part
    if not 0 <= i < n or batch % n:
        raise ValueError(f"part must be (i, n), i below n and n a divisor of the batch, {batch}; got {part}.")


def _iterate(batches: grain.MapDataset, workers: int, threads: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches in order, as plain arrays; when the caller stops, so do the workers."""
    if not len(batches):
        return
    stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain 0.2.18 reads one of its own, parsed or not (its issue 1355)
        options = grain.MultiprocessingOptions(num_workers=workers)
        stream = stream.mp_prefetch(options, worker_init_fn=leave_to_the_trainer)
    iterator = iter(stream)
    try:
        for batch in iterator:  # arrays in shared memory, of a class of grain's own
            yield {name: np.asarray(value) for name, value in batch.items()}
    finally:
        iterator.close()
