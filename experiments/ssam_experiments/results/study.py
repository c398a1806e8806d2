"""What a study is: its settings, and the networks and data that it compares on."""

import dataclasses
import pathlib
from typing import Any

DOCS = pathlib.Path(__file__).parents[3] / "docs"


@dataclasses.dataclass(frozen=True)
class Study:
    """Compare every way of doing SAM on a small network and a part of CIFAR-10, every row tuned alone.

    Give the same command again to resume: a run that is in runs.jsonl is not repeated.
    """

    data: pathlib.Path = pathlib.Path("cifar10")
    """Folder of CIFAR-10."""
    out: pathlib.Path = pathlib.Path("outputs/results")
    """Folder for runs.jsonl, timing.json and the runs' own folders. To extend the published study, copy
    docs/results/runs.jsonl there first."""
    seeds: int = 3
    """Runs of each row at its best radius."""
    more_seeds: int = 5
    """The same for SGD, SAM, SSAM at 50 % and every row that counts at most 1.1 gradients a step."""
    epochs: int = 15
    """Passes over the training examples."""
    limit: int = 3000
    """Training examples."""
    validation: int = 2000
    """Held out examples that choose the radius."""
    label_noise: float = 0.3
    """Share of the training examples with a wrong label."""
    lr: float = 0.1
    """Peak learning rate of every row."""
    weight_decay: float = 5e-4
    """Weight decay of every row."""
    fisher_samples: int = 256
    """Training examples of which SSAM-F computes the Fisher information, once an epoch."""
    sharpness_rho: float = 0.1
    """Radius at which the final sharpness is measured, the same for every row."""
    timing_rounds: int = 15
    """Rounds in which the rows' steps are timed in turn."""
    rows: tuple[str, ...] = ()
    """Names of the rows to run; all if none is given."""
    stages: tuple[str, ...] = ("rows", "seeds", "when-not", "equal-time", "vit", "widths")
    """Parts of the study to run, in this order. resnet18 is one more, for a GPU."""
    timing_only: bool = False
    """Time the steps, on a quiet machine, and run nothing."""
    render_only: bool = False
    """Write the page, the guide and the pictures from what has run, and run nothing."""
    docs: pathlib.Path = DOCS
    """Folder of results.md, of guides/choosing.md and of images/, which --render-only writes."""


SETTINGS: dict[str, dict[str, Any]] = {
    "resnet6": {},
    "vit": {
        "model": "vit-tiny",
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.05,
        "label_noise": 0.0,
    },
    "clean labels": {"label_noise": 0.0},
    "3 epochs": {"epochs": 3},
    "single epoch": {"epochs": 1, "limit": 45_000, "label_noise": 0.0},
    **{f"width {width}": {"width": width} for width in (8, 16, 64)},  # resnet6 itself is 32 wide
    "resnet18": {"model": "resnet18", "epochs": 30, "limit": 45_000, "label_noise": 0.0},
}
"""What a network and its data change of the settings of a study."""

PRIVATE: dict[str, dict[str, Any]] = {
    "resnet18": {"augment": True, "precision": "bfloat16"},
}
"""What they change of the trainer's settings besides."""

SHARED = {  # what tells the runs of one row apart, and what it was in a run that does not say
    "epochs": None,
    "limit": None,
    "validation": None,
    "label_noise": None,
    "lr": None,
    "weight_decay": None,
    "fisher_samples": None,
    "sharpness_rho": None,
    "model": "resnet6",
    "optimizer": "sgd",
    "width": None,
}


def shared(study: Study, setting: str, epochs: int | None = None) -> dict[str, Any]:
    """Return the settings that all rows share, such as a run in runs.jsonl has them.

    Args:
      study: the study.
      setting: a key of `SETTINGS`.
      epochs: in place of those of the setting.
    """
    found = {key: getattr(study, key, default) for key, default in SHARED.items()} | SETTINGS[setting]
    return found | ({} if epochs is None else {"epochs": epochs})
