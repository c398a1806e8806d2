"""What the paper says about sparse SAM (arXiv 2306.17504), next to what came out here."""

import statistics
from typing import Any

from ssam_experiments.results import plan
from ssam_experiments.results.formatting import markdown, values_of
from ssam_experiments.results.rows import SAM, SGD
from ssam_experiments.results.study import Study
from ssam_experiments.results.tuning import Found, Known, accuracies, look

HALF = ("SSAM-F 50%", "SSAM-D 50%")
SPARSE = tuple(f"SSAM-{kind} {share}%" for share in (80, 90, 95) for kind in "FD")
SEMI = ("SSAM-F 2:4", "SSAM-F 2:4, implicit")
STRUCTURED = ("SSAM-F structured 50%", "SSAM-F structured 50%, implicit", "last block", "norm layers")


def claims(study: Study, known: Known, times: dict[str, Any]) -> str:
    """Return the table of the paper's claims."""
    found = {task.name: look(study, task, known) for task in plan.main_tasks(study)}
    if not all(name in found and accuracies(found[name]) for name in (SGD, SAM, *HALF, *SPARSE, *SEMI)):
        return "Not all of the rows have run."
    sam = accuracies(found[SAM])
    bar = statistics.mean(sam) - statistics.stdev(sam)

    def compared(names: tuple[str, ...]) -> str:
        below = [name for name in names if statistics.mean(accuracies(found[name])) < bar]
        verdict = "held" if not below else f"not by {', '.join(below)}"
        return f"{verdict}: {_listed(found, names)}; SAM {values_of(found[SAM])}"

    rises = {name: _rise(one) for name, one in found.items() if accuracies(one)}
    others = [rise for name, rise in rises.items() if name != SGD]
    flat = "held for every row" if max(others) < rises[SGD] else "not held by every row"
    timed = {name: plan.measured(name, times) for name in (*HALF, *SEMI, *STRUCTURED, SAM)}
    ratios = "; ".join(f"{name} {ratio:.2f}" for name, ratio in timed.items() if ratio)
    return markdown(
        ["claim", "here"],
        [
            ["50 % sparsity keeps or betters SAM's accuracy", compared(HALF)],
            ["80 to 95 % degrades gracefully", compared(SPARSE)],
            [
                "SSAM flattens the landscape",
                f"{flat}: sharpness {min(others):.2f} to {max(others):.2f}, SGD {rises[SGD]:.2f}",
            ],
            ["N:M masks cost no accuracy", compared(SEMI)],
            ["sparse masks save time", f"only masks of complete tensors do; time / SGD: {ratios}"],
        ],
        left=2,
    )


def _listed(found: dict[str, Found], names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {values_of(found[name])}" for name in names)


def _rise(found: Found) -> float:
    return statistics.mean(one["sharpness"] for one in found.runs if not one["diverged"])
