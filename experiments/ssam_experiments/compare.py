"""Compare runs: ``python -m ssam_experiments.compare outputs/sgd outputs/sam outputs/ssam``.

Runs that differ only in their seed are averaged. The settings in which a run differs from the others are its
name.
"""

import dataclasses
import pathlib
import sys

import tyro

from ssam_experiments import report
from ssam_experiments.running.files import make_folder, naming, read_rows, read_settings, write_whole


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Print a table of several runs and draw their learning curves."""

    runs: tyro.conf.Positional[tuple[pathlib.Path, ...]]
    """Folders of runs, the --out of the trainer."""
    out: pathlib.Path = pathlib.Path("outputs/compare")
    """Folder for table.md and learning_curves.png."""


def grouped(folders: tuple[pathlib.Path, ...]) -> dict[str, list[report.Rows]]:
    """Return the metrics of the runs by the settings in which they differ.

    Raises:
      ValueError: a folder holds no run, or one without a single epoch.
    """
    groups: dict[str, list[report.Rows]] = {}
    settings = {}
    for folder in folders:
        path = folder / "config.json"
        if not path.exists():
            raise ValueError(f"{folder} holds no run: there is no {path}.")
        settings[folder] = read_settings(path)
    names = [name for name in next(iter(settings.values())) if name != "seed"]
    differing = [name for name in names if len({str(s.get(name)) for s in settings.values()}) > 1]
    for folder, values in settings.items():
        rows = [row for row in read_rows(folder / "metrics.jsonl") if "test_accuracy" in row]
        if not rows:
            raise ValueError(f"{folder} has no evaluated epoch yet.")
        label = ", ".join(f"{name} {values.get(name)}" for name in differing) or folder.name
        groups.setdefault(label, []).append(rows)
    return groups


def main(comparison: Comparison) -> None:
    """Print the table and save it with the picture."""
    if not comparison.runs:
        sys.exit("error: name the folder of at least one run.")
    try:
        groups = grouped(comparison.runs)
        text, picture = report.table(groups), comparison.out / "learning_curves.png"
        make_folder(comparison.out)
        write_whole(comparison.out / "table.md", text)
        with naming(picture):
            report.learning_curves(groups).savefig(picture, dpi=150)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(text)
    print(picture)


if __name__ == "__main__":
    main(tyro.cli(Comparison))
