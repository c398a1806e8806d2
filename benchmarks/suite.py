"""How a benchmark is run, and what its file of results holds.

A benchmark is a script of this folder with

- ``Config``, a dataclass of its sizes, and ``QUICK``, small ones, to see that it works;
- ``SEEDS``, of the random data, and ``TIMED``, whether anything runs;
- ``measure(config)``, which returns numbers and names, for JSON;
- ``tables(record)``, which returns the Markdown of each of its tables by name, and if there are pictures
  ``plots(record)``, a description and a figure by name. They see the whole record, and measure nothing.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import flax
import jax
import jaxlib
import optax
import timing
import tyro

import ssam_jax

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BENCHMARKS = (
    "memory",
    "selection",
    "step",
    "algebra",
    "leaves",
    "scaling",
    "devices",
    "two_pass",
    "implicit",
    "curvature",
    "loading",
    "importing",
)

Record = dict[str, Any]
"""A file of results: ``settings``, ``command``, ``date``, ``seconds``, ``seeds``, ``limits``, ``results``."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a benchmark is run."""

    out: Path | None = None
    """Folder for the JSON file; without one, the tables are printed and nothing is kept."""
    again: bool = False
    """Measure even what is in the folder already, for the same sizes, code, versions and hardware."""
    quick: bool = False
    """Small sizes, to see that it works; the numbers mean nothing."""


def main(benchmark: ModuleType) -> None:
    """Run a benchmark from the command line and print its tables."""
    sizes = benchmark.QUICK if "--quick" in sys.argv else benchmark.Config()
    both = tyro.conf.OmitArgPrefixes[tuple[Options, type(sizes)]]
    options, config = tyro.cli(both, default=(Options(), sizes), description=benchmark.__doc__)
    record = run(benchmark, config, options)
    print("\n\n".join(benchmark.tables(record).values()))


def run(benchmark: ModuleType, config: Any, options: Options) -> Record:
    """Return the record of a benchmark: the one in the folder if it fits, otherwise a new one."""
    name = Path(benchmark.__file__ or "").stem
    settings = json.loads(json.dumps({"config": dataclasses.asdict(config), **setting()}))
    path = options.out / f"{name}.json" if options.out else None
    if path and path.exists() and not options.again:
        record = json.loads(path.read_text())
        if record["settings"] == settings:
            return record
    start = time.perf_counter()
    words = re.sub(r"--out[ =]\S+|--again", "", " ".join(sys.argv[1:])).split()
    record = {
        "settings": settings,
        "command": " ".join(["python", f"benchmarks/{name}.py", *words]),
        "date": datetime.date.today().isoformat(),
        "seeds": benchmark.SEEDS,
        "limits": timing.limits(quick=options.quick) if benchmark.TIMED else None,
        "results": benchmark.measure(config),
        "seconds": round(time.perf_counter() - start, 1),
    }
    record = json.loads(json.dumps(record))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(path)
    return record


def setting() -> dict[str, Any]:
    """Return versions, hardware and the code that was measured, without which no number means anything."""
    code = hashlib.sha256()
    for path in sorted([*Path(ssam_jax.__file__).parent.rglob("*.py"), *HERE.glob("*.py")]):
        code.update(path.read_bytes())
    return {
        "versions": {
            **{module.__name__: module.__version__ for module in (jax, jaxlib, optax, flax, ssam_jax)},
            "Python": platform.python_version(),
        },
        "hardware": {
            "platform": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "processor": _processor(),
            "cores": os.cpu_count(),
        },
        "code": code.hexdigest()[:16],
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.processor()} ({platform.machine()})"


def markdown(rows: list[Any], columns: dict[str, tuple[Any, str]]) -> str:
    """Return a Markdown table.

    Args:
      rows: whatever the columns read.
      columns: for each title, a key or a function of the row, and a format: empty for text, which
        stands on the left. A value that is None leaves its cell empty.
    """
    lines = [" | ".join(columns), " | ".join("---:" if spec else "---" for _, spec in columns.values())]
    for row in rows:
        cells = (_cell(what(row) if callable(what) else row[what], spec) for what, spec in columns.values())
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: Any, spec: str) -> str:
    return "" if value is None else format(value, spec)


def ratio(to: float, key: str = "ms") -> Callable[[dict[str, Any]], float]:
    """Return the column of the values of ``key`` relative to ``to``."""
    return lambda row: row[key] / to
