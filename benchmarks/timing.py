"""Side-by-side timing on a noisy machine, and where it was done."""

import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jaxlib
import numpy as np
import optax


def medians(candidates: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return each candidate's median time in milliseconds.

    The candidates take turns, so that whatever else the machine does falls on all of them alike.
    Each is called twice before, to compile and to warm up.
    """
    for candidate in candidates.values():
        jax.block_until_ready(candidate())
        jax.block_until_ready(candidate())
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(candidate())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def print_table(times: Mapping[str, float], reference: str) -> None:
    """Print a Markdown table of times and of their ratios to the reference's."""
    print(f"| candidate | median, ms | ratio to {reference} |\n| --- | ---: | ---: |")
    for name, value in times.items():
        print(f"| {name} | {value:.2f} | {value / times[reference]:.2f} |")


def print_setting() -> None:
    """Print versions and hardware, without which no number means anything."""
    device = jax.devices()[0]
    print(
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, optax {optax.__version__},"
        f" Python {platform.python_version()}; {jax.device_count()} x {device.device_kind}"
        f" ({platform.machine()})\n"
    )
