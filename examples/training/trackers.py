"""Metrics: JSON lines always, TensorBoard and Weights & Biases when asked."""

import dataclasses
import importlib
import json
import pathlib
from typing import Any

from training.config import Config


class Tracker:
    """Writes a row of metrics for each epoch, and knows those of the epochs before.

    Attributes:
      rows: the metrics of each epoch so far.
    """

    def __init__(self, config: Config, *, last_epoch: int):
        self._path = config.out / "metrics.jsonl"
        self.rows = [row for row in read_rows(self._path) if row["epoch"] <= last_epoch]
        # What a killed run wrote after its last checkpoint will be written again.
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._writers = []
        if config.tensorboard:
            board = needed("tensorboardX", "--tensorboard").SummaryWriter(str(config.out / "tensorboard"))
            self._writers.append(
                lambda row: [board.add_scalar(name, value, row["step"]) for name, value in row.items()]
            )
        if config.wandb:
            settings = dataclasses.asdict(config) | {"out": str(config.out), "data": str(config.data)}
            run = needed("wandb", "--wandb").init(
                project="ssam_jax", config=settings, dir=str(config.out), id=config.out.name, resume="allow"
            )
            self._writers.append(lambda row: run.log(row, step=row["step"]))

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        scalars = {name: value for name, value in row.items() if not isinstance(value, dict)}
        for write in self._writers:
            write(scalars)


def needed(module: str, flag: str) -> Any:
    """Import an optional module, or say what wants it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{flag} needs {module}: pip install {module}.") from error


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file of JSON lines; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write a file that is there as a whole or not at all, whenever the process is killed."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
