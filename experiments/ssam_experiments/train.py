"""Train a network, plain or sharpness-aware: ``python -m ssam_experiments.train --help``.

The paper's run on CIFAR-10 (arXiv 2306.17504)::

    python -m ssam_experiments.train --preset paper-cifar10-resnet18 --data path/to/cifar10
"""

import itertools
import sys

import tyro

from ssam_experiments import report
from ssam_experiments.config import PRESETS, Config
from ssam_experiments.running import loop, preparation, processes
from ssam_experiments.running.files import RunError, naming


def parse(arguments: list[str]) -> Config:
    """Return the settings: those of ``--preset``, changed by the other flags."""
    names = [name for flag, name in itertools.pairwise(arguments) if flag == "--preset"]
    names += [flag.removeprefix("--preset=") for flag in arguments if flag.startswith("--preset=")]
    return tyro.cli(Config, args=arguments, default=PRESETS.get(names[-1] if names else "none"))


def main(arguments: list[str]) -> None:
    """Train, draw pictures, print where they are."""
    config = parse(arguments)
    try:
        preparation.prepare(config)
        preparation.claim(config)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    try:
        with processes.all_or_none():
            try:
                _, rows = loop.train(config)
            except FloatingPointError as error:  # in all processes alike
                sys.exit(f"error: {error}")
    except RunError as error:
        sys.exit(f"error: {error}")
    if not processes.is_first():
        return
    if not rows:
        sys.exit(
            f"error: the run has ended, but {config.out / 'metrics.jsonl'} has none of its epochs to show."
        )
    print(report.table({config.out.name: [rows]}))
    try:
        with naming(config.out):
            pictures = report.draw_run(rows, config.out)
    except RunError as error:
        sys.exit(f"error: {error}")
    print(*pictures, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
