"""Time the data side of training: augmentation on the device, decoding CIFAR, streaming ImageNet.

Run ``python benchmarks/loading.py``; ``--help`` lists the sizes. All images are made up, of the size and
about the smoothness of the real ones, and written to a temporary folder.
"""

import dataclasses
import functools
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import suite
from PIL import Image
from suite import Record, markdown
from timing import medians

from ssam_experiments.data import datasets, imagenet
from ssam_experiments.data.augment import augment_batch, normalize

SEEDS = (0, 1)
TIMED = True


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the measurements."""

    batch: int = 128
    """Images in a batch for augmentation."""
    repeats: int = 100
    """Timed calls of each augmentation; the median counts."""
    cifar: int = 5_000
    """Images in the Parquet files of CIFAR's size."""
    images: int = 512
    """Images of 400 x 350 pixels for the streams."""
    stream_batch: int = 32
    """Images in a batch of a stream."""
    rounds: int = 3
    """How often the streams take turns; the median counts."""
    seconds: float = 1.5
    """How long to draw from a stream in a round."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of worker processes to compare."""


QUICK = Config(8, 2, 100, 16, 4, 1, 0.1, (0,))


def augmentation(config: Config) -> dict[str, float]:
    """Time, in milliseconds, the augmentation of batches of CIFAR's size, already on the device."""
    shape = (config.batch, 32, 32, 3)
    images = jax.random.bits(jax.random.key(0), shape, jnp.uint8)
    mean, std, key = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), jax.random.key(1)
    augment = functools.partial(augment_batch, key, images, mean, std)
    plain = jax.jit(normalize)
    return medians(
        {
            "normalize alone": lambda: plain(images, mean, std),
            "crop, flip, normalize": augment,
            "the same and cutout of 16": lambda: augment(cutout=16),
            "the same in bfloat16": lambda: augment(cutout=16, dtype=jnp.bfloat16),
        },
        config.repeats,
    )


def made_up(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return noise with the detail of a photograph: coarse, and a little of it fine."""
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray(np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str) -> bytes:
    """Return the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path: Path, column: str, images: list[bytes], classes: int, rows_in_group: int) -> None:
    """Write a file in the layout of the Hugging Face hub."""
    labels = [i % classes for i in range(len(images))]
    table = pa.table({column: [{"bytes": image, "path": None} for image in images], "label": labels})
    pq.write_table(table, path, row_group_size=rows_in_group)


def decoding(config: Config, folder: Path) -> dict[str, float]:
    """Time the reading of CIFAR from Parquet files of PNG images."""
    rng = np.random.default_rng(0)
    images = [encoded(made_up(rng, 32, 32), "PNG") for _ in range(config.cifar)]
    for split, part in (("train", images), ("test", images[:1000])):
        write_parquet(folder / f"{split}-00000-of-00001.parquet", "img", part, 10, 1000)
    start = time.perf_counter()
    data = datasets.load("cifar10", folder)
    seconds = time.perf_counter() - start
    count = len(data.train.labels) + len(data.test.labels)
    return {"images": count, "seconds": seconds}


def rate(batches: Iterator[dict[str, np.ndarray]], config: Config) -> float:
    """Return images per second, once the batches that wait in buffers have been taken."""
    for _ in range(2 * max(1, *config.workers) + 8):
        next(batches)
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < config.seconds:
        next(batches)
        count += config.stream_batch
    return count / passed


def streaming(config: Config, folder: Path) -> dict[str, Any]:
    """Time the stream of training batches, from files and from Parquet, by the number of workers."""
    rng = np.random.default_rng(0)
    images = [encoded(made_up(rng, 400, 350), "JPEG") for _ in range(config.images)]
    write_parquet(folder / "train-00000-of-00001.parquet", "image", images, 10, 100)
    for i, image in enumerate(images):
        place = folder / "train" / str(i % 10)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.JPEG").write_bytes(image)
    sources = {
        "folder": imagenet.image_folder(folder, "train"),
        "Parquet": imagenet.parquet(folder, "train", classes=10),
    }
    streams, first, rates = {}, {}, {}
    for key in itertools.product(sources, config.workers):
        batches = imagenet.train_batches(
            sources[key[0]], batch=config.stream_batch, steps=10**6, workers=key[1]
        )
        start = time.perf_counter()
        next(batches)
        streams[key], first[key], rates[key] = batches, time.perf_counter() - start, []
    for _ in range(config.rounds):  # a stream whose turn it is not fills its buffers and then waits
        for key, batches in streams.items():
            rates[key].append(rate(batches, config))
    rows = []
    for key, batches in streams.items():
        batches.close()
        row = {"source": key[0], "workers": key[1], "first_s": first[key]}
        rows.append({**row, "rate": float(np.median(rates[key]))})
    return {"bytes": sum(map(len, images)) / len(images), "rows": rows}


def measure(config: Config) -> dict[str, Any]:
    """Return the rates of all three."""
    with tempfile.TemporaryDirectory() as cifar, tempfile.TemporaryDirectory() as photographs:
        return {
            "batch": config.batch,
            "augmentation": augmentation(config),
            "decoding": decoding(config, Path(cifar)),
            "streaming": streaming(config, Path(photographs)),
        }


def tables(record: Record) -> dict[str, str]:
    """Return the tables of augmentation, decoding and streaming."""
    found, bandwidth = record["results"], record["limits"]["bandwidth"]
    batch, decoded, streamed = found["batch"], found["decoding"], found["streaming"]
    limit = 1e3 * batch * 32 * 32 * 3 * 5 / bandwidth  # bytes in, float32 out
    augmenting = {
        "step": (0, ""),
        "median, ms": (1, ".2f"),
        "images/s": (lambda row: 1e3 * batch / row[1], ",.0f"),
        "limit, ms": (lambda row: limit, ".2f"),
        "ratio": (lambda row: row[1] / limit, ".1f"),
    }
    streams = {
        "source": ("source", ""),
        "workers": ("workers", "d"),
        "first batch after, s": ("first_s", ".1f"),
        "images/s": ("rate", ",.0f"),
    }
    decoding = {
        "seconds": ("seconds", ".1f"),
        "images/s": (lambda row: row["images"] / row["seconds"], ",.0f"),
    }
    return {
        "augmentation": f"Augmenting {batch} images of 32 x 32\n\n"
        + markdown(list(found["augmentation"].items()), augmenting),
        "decoding": f"Loading {decoded['images']:,} images of 32 x 32 from Parquet files\n\n"
        + markdown([decoded], decoding),
        "streaming": "Streaming crops of 224 x 224 from JPEG images of 400 x 350,"
        f" {streamed['bytes'] / 1000:.0f} kB\n\n" + markdown(streamed["rows"], streams),
    }


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
