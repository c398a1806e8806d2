"""Where arrays lie: batches are spread over the devices; the rest is on each device, or split up too."""

import collections
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SMALL = 1024  # entries below which an array is not worth splitting


def check(devices: int) -> None:
    """Raise ValueError unless there are enough devices, the same number in each process."""
    there = jax.devices()
    if devices > len(there):
        raise ValueError(f"--devices must be at most the {len(there)} there are, got {devices}.")
    if devices % jax.process_count():
        raise ValueError(
            f"--devices counts those of all processes and must be a multiple of the {jax.process_count()}"
            f" there are, got {devices}."
        )
    least = min(collections.Counter(device.process_index for device in there).values())
    if devices // jax.process_count() > least:
        raise ValueError(
            f"--devices must be at most {least} for each process, as many as each has, got {devices} for"
            f" {jax.process_count()}."
        )


def replicated(devices: int) -> NamedSharding:
    """Return the sharding of what ``devices`` devices all hold."""
    return NamedSharding(_mesh(devices), PartitionSpec())


def by_rows(devices: int) -> NamedSharding:
    """Return the sharding of batches: their rows, in order, over the devices of one process after another."""
    return NamedSharding(_mesh(devices), PartitionSpec("data"))


def split(shape: tuple[int, ...], devices: int) -> NamedSharding:
    """Return the sharding that splits the largest of the axes that can be split, the last of such.

    Every device holds all of an array with few entries, or without such an axis.
    """
    axes = [(size, axis) for axis, size in enumerate(shape) if size % devices == 0]
    if not axes or np.prod(shape) < SMALL:
        return replicated(devices)
    _, axis = max(axes)
    return NamedSharding(_mesh(devices), PartitionSpec(*[None] * axis, "data"))


def spread(batch: Any, devices: int) -> Any:
    """Spread arrays of shape (examples, ...) over the devices by their examples. Traced."""
    return batch if devices == 1 else jax.lax.with_sharding_constraint(batch, by_rows(devices))


def everywhere(tree: Any, devices: int) -> Any:
    """Put arrays, the same in every process, on every device, without asking whether they are the same."""
    place = replicated(devices)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x, x.shape), tree)


def joined(part: Any, devices: int) -> Any:
    """Return batches of which each process has the rows that its devices are to hold."""
    place = by_rows(devices)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), part)


def _mesh(devices: int) -> Mesh:
    """Return a mesh with the first devices of each process, one process after another."""
    each: dict[int, list[jax.Device]] = collections.defaultdict(list)
    for device in jax.devices():
        each[device.process_index].append(device)
    chosen = [each[process][: devices // len(each)] for process in sorted(each)]
    return Mesh(np.array(chosen).reshape(devices), ("data",))
