"""How long ``import ssam_jax`` takes beside ``import optax``, on which it stands.

Each import is timed inside a fresh interpreter; the interpreters take turns, so that what else the machine
does strikes all.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
from typing import Any

import suite

SEEDS = (0,)  # of Python's hashes
TIMED = False  # nothing runs on a device
MODULES = ("jax", "optax", "ssam_jax", "ssam_jax.linen", "ssam_jax.sharpness")
CODE = """
import time
start = time.perf_counter()
import {}
print(time.perf_counter() - start)
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """How much is measured."""

    rounds: int = 15
    """Fresh interpreters for each module; the first round fills the file system's cache and is left out."""


QUICK = Config(rounds=2)


def measure(config: Config) -> list[dict[str, Any]]:
    """Return the median seconds of each import."""
    times: dict[str, list[float]] = {module: [] for module in MODULES}
    environment = {**os.environ, "PYTHONHASHSEED": str(SEEDS[0])}
    for _ in range(config.rounds):
        for module in MODULES:
            command = [sys.executable, "-c", CODE.format(module)]
            text = subprocess.check_output(command, text=True, env=environment)
            times[module].append(float(text))
    return [{"module": name, "ms": 1e3 * statistics.median(t[1:])} for name, t in times.items()]


def tables(record: suite.Record) -> dict[str, str]:
    """Return the times, and what they are of those of optax."""
    rows = record["results"]
    optax = next(row["ms"] for row in rows if row["module"] == "optax")
    columns = {
        "import": (lambda row: f"`{row['module']}`", ""),
        "ms": ("ms", ".0f"),
        "/ optax": (suite.ratio(optax), ".2f"),
    }
    return {"modules": suite.markdown(rows, columns)}


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
