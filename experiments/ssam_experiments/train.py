"""Train a network, plain or sharpness-aware: ``python -m ssam_experiments.train --help``.

The paper's run on CIFAR-10 (arXiv 2306.17504)::

    python -m ssam_experiments.train --preset paper-cifar10-resnet18 --data path/to/cifar10
"""

import sys

from ssam_experiments.running import group

if __name__ == "__main__":  # what is loaded next takes seconds, in which a process may fail
    group.begin(sys.argv[1:])

import itertools
from typing import Any

import tyro

from ssam_experiments import report
from ssam_experiments.config import PRESETS, Config
from ssam_experiments.running import loop, preparation, processes
from ssam_experiments.running.files import naming
from ssam_experiments.running.stopping import Stopped


def parse(arguments: list[str]) -> Config:
    """Return the settings: those of ``--preset``, changed by the other flags."""
    names = [name for flag, name in itertools.pairwise(arguments) if flag == "--preset"]
    names += [flag.removeprefix("--preset=") for flag in arguments if flag.startswith("--preset=")]
    none = PRESETS["none"]  # also for a name that does not exist: tyro refuses it
    return tyro.cli(Config, args=arguments, default=PRESETS.get(names[-1], none) if names else none)


def main(arguments: list[str]) -> None:
    """Train, draw pictures, print where they are; say in a line why that cannot be.

    As a command it ends with 143 if SIGTERM stopped the run, and with 130 if SIGINT did, after a checkpoint.
    """
    try:
        with processes.all_or_none():
            code = run(arguments)
    except processes.EXPECTED as error:  # in the only process
        sys.exit(processes.said(error))
    if code:
        sys.exit(code)


def run(arguments: list[str]) -> int:
    """Do as `main` does, and return the exit code, unless something fails."""
    group.gather(arguments)
    config, stop = parse(arguments), group.STOP
    preparation.prepare(config)
    preparation.claim(config)
    code = 0
    try:
        _, rows = loop.train(config, stop)
    except Stopped as stopped:
        code = stopped.code
        if processes.is_first():
            sys.stderr.write(f"{stopped}\n")
    else:
        stop.over = True
        if processes.is_first():
            show(config, rows)
    processes.part()
    return code


def show(config: Config, rows: list[dict[str, Any]]) -> None:
    """Print a table of a run, draw its pictures and print where they are.

    Raises:
      ValueError: no epoch was recorded, or a picture cannot be written.
    """
    if not rows:
        raise ValueError(
            f"the run has ended, but {config.out / 'metrics.jsonl'} has none of its epochs to show."
        )
    print(report.table({config.out.name: [rows]}))
    with naming(config.out):
        pictures = report.draw_run(rows, config.out)
    print(*pictures, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
