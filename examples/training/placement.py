"""Where arrays lie: batches spread over the devices of a run, everything else on each of them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def replicated(devices: int) -> NamedSharding:
    """Return the sharding of what the first ``devices`` devices all hold."""
    return NamedSharding(_mesh(devices), PartitionSpec())


def spread(batch: Any, devices: int) -> Any:
    """Spread arrays of shape (examples, ...) over the devices by their examples. Traced."""
    if devices == 1:
        return batch
    return jax.lax.with_sharding_constraint(batch, NamedSharding(_mesh(devices), PartitionSpec("data")))


def _mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("data",))
