"""Metrics: JSON lines always, TensorBoard and Weights & Biases when asked."""

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable
from typing import Any

from ssam_experiments.config import Config
from ssam_experiments.running.files import append, read_rows, write_whole
from ssam_experiments.running.processes import is_first

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # what the flags need


class Tracker:
    """Writes a row of metrics for each epoch, and knows those of the epochs before; to be closed.

    In a process that is not the first it writes nothing.

    Attributes:
      rows: the metrics of each epoch so far.
    """

    def __init__(self, config: Config, *, last_epoch: int):
        self._path = config.out / "metrics.jsonl"
        self.rows = [row for row in read_rows(self._path, "epoch") if row["epoch"] <= last_epoch]
        self._writers: list[Callable[[dict[str, Any]], Any]] = []
        self._closers: list[Callable[[], Any]] = []
        self._writes = is_first()
        if not self._writes:
            return
        # What a killed run wrote after its last checkpoint will be written again.
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))
        if config.tensorboard:
            board = needed("tensorboard").SummaryWriter(str(config.out / "tensorboard"))
            self._writers.append(
                lambda row: [board.add_scalar(name, value, row["step"]) for name, value in row.items()]
            )
            self._closers.append(board.close)
        if config.wandb:
            settings = dataclasses.asdict(config) | {"out": str(config.out), "data": str(config.data)}
            name, folder = config.out.name, str(config.out.absolute())
            # The same folder is the same run; folders of one name are not.
            identity = hashlib.sha256(folder.encode()).hexdigest()[:16]
            run = needed("wandb").init(
                project="ssam_jax", name=name, id=identity, resume="allow", config=settings, dir=folder
            )
            self._writers.append(lambda row: run.log(row, step=row["step"]))
            self._closers.append(run.finish)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows.append(row)
        if not self._writes:
            return
        append(self._path, json.dumps(row) + "\n")
        scalars = {name: value for name, value in row.items() if not isinstance(value, dict)}
        for write in self._writers:
            write(scalars)

    def close(self) -> None:
        """Write what the writers still hold."""
        for close in self._closers:
            close()


def needed(flag: str) -> Any:
    """Import the module that a flag needs.

    Raises:
      ValueError: it is not there.
    """
    module = MODULES[flag]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"--{flag} needs {module}: pip install {module}.") from error
