"""The rows of the study: every way of doing SAM, as the trainer spells it."""

from typing import Any, NamedTuple

from ssam_experiments.config import Config
from ssam_experiments.running import loop

SGD = "SGD"
SAM = "SAM"
LAST = "^(stage_2|head)/"
NORMS = "(^|/)norm"


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      changes: what it changes of the trainer's settings.
      radii: the radii to try first; none for a row without a radius.
      family: what it is drawn with.
    """

    changes: dict[str, Any]
    radii: tuple[float, ...] = (0.05, 0.1, 0.2)
    family: str = "SAM"


CHEAP = (  # in the order in which they run
    "carried",
    "carried, norm layers",
    "MSAM",
    "every 5th, eighth batch",
    "every 20th, half batch",
    "every 10th, quarter batch",
    "carried, SSAM-F 50%",
    "carried, SSAM-D 50%",
    "carried, SAM in the last third",
    "LookSAM 5",
    "LookSAM 10",
)
FIRST = (SGD, SAM, *CHEAP)
FIVE = (SGD, SAM, "SSAM-F 50%", "SSAM-D 50%")
"""Rows with more seeds, whatever they cost."""


def make_rows(epochs: int) -> dict[str, Row]:
    """Return the rows by name, in the order in which they run."""
    rows = _sam(epochs) | _masked(epochs) | _rare(epochs) | _carried(epochs)
    return {name: rows[name] for name in (*FIRST, *(name for name in rows if name not in FIRST))}


SAM_METHOD = {"method": "sam"}
FISHER, DYNAMIC = {"method": "ssam-f"}, {"method": "ssam-d"}
LAST_BLOCK = {"method": "ssam-fixed", "perturb": LAST, "normalize": "masked"}
NORM_LAYERS = {**LAST_BLOCK, "perturb": NORMS}
SPARSE, SPARSEST, RARE, RAREST = (0.1, 0.2, 0.4), (0.2, 0.4, 0.8), (0.4, 0.8, 1.6), (0.8, 1.6, 3.2)


def _sam(epochs: int) -> dict[str, Row]:
    """Return the rows with two gradients on every step and no mask."""
    del epochs
    return {
        SGD: Row({}, (), "SGD"),
        SAM: Row(SAM_METHOD),
        "F-SAM": Row({**SAM_METHOD, "direction": "friendly"}),
        "VaSSO": Row({**SAM_METHOD, "direction": "ema", "direction_decay": 0.6}),
        "GSAM": Row({**SAM_METHOD, "combine": "gsam", "combine_weight": 0.4}),
        "WSAM": Row({**SAM_METHOD, "combine": "weighted", "combine_weight": 1.5}),
        "ASAM": Row({**SAM_METHOD, "adaptive": True}, (0.5, 1.0, 2.0)),
        "2-step SAM": Row({**SAM_METHOD, "ascent_steps": 2}),
        "quarter batch": Row({**SAM_METHOD, "ascent_fraction": 0.25}, family="part of the batch"),
        "eighth batch": Row({**SAM_METHOD, "ascent_fraction": 0.125}, family="part of the batch"),
    }


def _masked(epochs: int) -> dict[str, Row]:
    """Return the rows with a mask on every step."""
    structured = {**FISHER, "pattern": "structured", "refresh_epochs": max(1, epochs // 3)}
    channels = {"pattern": "structured", "unit": "channel"}
    radii = {0.5: SPARSE, 0.8: SPARSE, 0.9: SPARSEST, 0.95: SPARSEST}
    rows = {
        **{f"SSAM-F {s:.0%}": Row({**FISHER, "sparsity": s}, radii[s]) for s in radii},
        **{f"SSAM-D {s:.0%}": Row({**DYNAMIC, "sparsity": s}, radii[s]) for s in radii},
        "SSAM-F 2:4": Row({**FISHER, "pattern": "n:m"}, SPARSE),
        "SSAM-F 2:4, implicit": Row({**FISHER, "pattern": "n:m", "form": "implicit"}),
        "SSAM-F structured 50%": Row({**structured, "normalize": "masked"}),
        "SSAM-F structured 50%, implicit": Row({**structured, "form": "implicit"}),
        "SSAM-D channels 50%": Row({**DYNAMIC, **channels}, SPARSE),
        "last block": Row(LAST_BLOCK),
        "norm layers": Row(NORM_LAYERS, SPARSE),
    }
    return {name: row._replace(family="a mask") for name, row in rows.items()}


def _rare(epochs: int) -> dict[str, Row]:
    """Return the rows that perturb on some steps only."""
    late = {**SAM_METHOD, "ascent_from": epochs - epochs // 3}

    def every(k: int, part: float = 1.0) -> dict[str, Any]:
        return {"ascent_every": k, "ascent_fraction": part}

    look = {**SAM_METHOD, "combine": "looksam", "combine_weight": 0.7}
    rows = {
        "every 5th, eighth batch": Row({**SAM_METHOD, **every(5, 0.125)}, RARE),
        "every 20th, half batch": Row({**SAM_METHOD, **every(20, 0.5)}, RARE),
        "every 10th, quarter batch": Row({**SAM_METHOD, **every(10, 0.25)}, RARE),
        "LookSAM 5": Row({**look, **every(5)}, SPARSE),
        "LookSAM 10": Row({**look, **every(10)}, SPARSE),
        "AE-SAM": Row({**SAM_METHOD, "ascent_gate": True}, SPARSE),
        "SS-SAM 50%": Row({**SAM_METHOD, "ascent_chance": 0.5}, SPARSE),
        "norm layers, every 5th": Row({**NORM_LAYERS, **every(5)}, RAREST),
        "norm layers, every 10th": Row({**NORM_LAYERS, **every(10)}, RAREST),
        "LookSAM 10, quarter batch": Row({**look, **every(10, 0.25)}, SPARSEST),
        "every 5th step": Row({**SAM_METHOD, **every(5)}, RARE),
        "every 20th step": Row({**SAM_METHOD, **every(20)}, RARE),
        "every 5th, SSAM-F 50%": Row({**FISHER, **every(5)}, RARE),
        "last third": Row(late),
        "every 4th step": Row({**SAM_METHOD, "ascent_every": 4}),
        "every 10th step": Row({**SAM_METHOD, "ascent_every": 10}, SPARSE),
        "every 4th, quarter batch": Row({**SAM_METHOD, **every(4, 0.25)}),
        "last third, quarter batch": Row({**late, "ascent_fraction": 0.25}),
        "every 3rd, last block": Row({**LAST_BLOCK, "ascent_every": 3}),
    }
    return {name: row._replace(family="some of the steps") for name, row in rows.items()}


def _carried(epochs: int) -> dict[str, Row]:
    """Return the rows with one gradient a step."""
    carried = {**SAM_METHOD, "carrier": "carried"}
    rows = {
        "carried": Row(carried, SPARSE),
        "carried, norm layers": Row({**NORM_LAYERS, "carrier": "carried"}, RARE),
        "MSAM": Row({**carried, "direction": "against-momentum"}, RAREST),
        "carried, SSAM-F 50%": Row({**carried, **FISHER}, SPARSEST),
        "carried, SSAM-D 50%": Row({**carried, **DYNAMIC}, SPARSEST),
        "carried, SAM in the last third": Row({**carried, "tail_epochs": epochs // 3}, SPARSE),
        "carried, ASAM, norm layers": Row(
            {**NORM_LAYERS, "carrier": "carried", "adaptive": True}, (1.0, 2.0, 4.0)
        ),
        "carried F-SAM, norm layers": Row(
            {**NORM_LAYERS, "carrier": "carried", "direction": "friendly"}, RARE
        ),
        "carried momentum": Row({**carried, "direction": "momentum"}),
    }
    return {name: row._replace(family="carried") for name, row in rows.items()}


VIT_ROWS = (
    SGD, SAM, "carried", "carried, norm layers", "MSAM", "every 5th, eighth batch",
    "every 10th, quarter batch", "LookSAM 5", "SSAM-F 50%", "SSAM-D 50%", "norm layers", "last third",
)  # fmt: skip
RESNET18_ROWS = (
    SGD, SAM, "SSAM-F 50%", "SSAM-D 50%", "carried", "LookSAM 5", "every 5th, eighth batch",
)  # fmt: skip
LAYERWISE = "SAM, layerwise"


def make_width_rows() -> dict[str, Row]:
    """Return SAM and SAM scaled layer by layer, each tried at more radii than a row of the table."""
    scaled = {**SAM_METHOD, "direction": "layerwise"}
    return {
        SAM: Row(SAM_METHOD, (0.025, 0.05, 0.1, 0.2, 0.4)),
        LAYERWISE: Row(scaled, (0.005, 0.01, 0.02, 0.04, 0.08)),
    }


def counted(config: Config, steps_per_epoch: int = 23) -> float:
    """Return the gradients of a batch that a step takes, averaged over a run; a mask saves nothing here."""
    steps = config.epochs * steps_per_epoch
    ascents = sum(loop.ascends(config, i // steps_per_epoch, i) for i in range(steps)) / steps
    return 1 + ascents * config.ascent_fraction * config.ascent_steps
