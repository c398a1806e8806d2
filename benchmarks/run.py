"""Run the benchmarks, each in a process of its own, and write the tables of docs/performance.md.

Run ``python benchmarks/run.py``, or ``make bench``. Results go to ``benchmarks/results``, those of other
devices than CPUs to a folder there that is named after the platform. What is there already for the same
sizes, code, versions and hardware is kept, so that a run which was killed goes on.
"""

import dataclasses
import subprocess
import sys
import time
from typing import Literal

import render
import tyro
from suite import BENCHMARKS, HERE, RESULTS
from tqdm import tqdm

BACKEND = "import jax; print(jax.default_backend())"  # a process of its own: this one is to hold no device


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run, and how."""

    only: tuple[Literal[BENCHMARKS], ...] = BENCHMARKS
    """Which benchmarks."""
    quick: bool = False
    """Small sizes, to see that all of it works: results go to outputs/benchmarks, and no page is written."""
    again: bool = False
    """Measure even what is there already."""


def main(options: Options) -> None:
    """Run what is wanted, then write the page."""
    folder = HERE.parent / "outputs" / "benchmarks" if options.quick else RESULTS
    platform = subprocess.check_output([sys.executable, "-c", BACKEND], text=True).strip()
    out = folder if platform == "cpu" else folder / platform
    flags = [f"--{flag}" for flag in ("quick", "again") if getattr(options, flag)]
    start = time.perf_counter()
    for name in tqdm(options.only, unit="benchmark", disable=None):
        tqdm.write(f"\n{name}\n")
        subprocess.run([sys.executable, HERE / f"{name}.py", "--out", out, *flags], check=True)
    tqdm.write(f"\n{time.perf_counter() - start:.0f} seconds in all; results are in {out}")
    if not options.quick:
        render.main(render.Options())


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
