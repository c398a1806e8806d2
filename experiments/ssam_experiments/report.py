"""Tables and pictures of finished runs."""

import pathlib
import statistics
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

COLORS = (
    "#000000",
    "#E69F00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#999999",
)  # Okabe, Ito
STYLES = ("-", "--", ":")


def table(runs: dict[str, list[Rows]]) -> str:
    """Return a Markdown table: a line for each name, mean and standard deviation over its runs."""
    lines = [
        "| run | seeds | epochs | training loss | test accuracy, % | images/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, several in runs.items():
        last = [rows[-1] for rows in several]
        speed = statistics.median(row["images_per_second"] for rows in several for row in rows)
        lines.append(
            f"| {name} | {len(several)} | {last[0]['epoch']} | {spread([r['train_loss'] for r in last], 3)}"
            f" | {spread([100 * r['test_accuracy'] for r in last], 1)} | {speed:.0f} |"
        )
    return "\n".join(lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Return mean and sample standard deviation, or the value if it is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def draw_curves(axes: Axes, runs: dict[str, list[Rows]], metric: str, scale: float) -> None:
    """Draw a metric against the epoch: the mean of the runs of a name, a band of a standard deviation."""
    for i, (name, several) in enumerate(runs.items()):
        rows = [[row for row in rows if metric in row] for rows in several]
        epochs = [row["epoch"] for row in rows[0]]
        values = scale * np.array([[row[metric] for row in rows[: len(epochs)]] for rows in rows])
        mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0
        color, style = COLORS[i % len(COLORS)], STYLES[i // len(COLORS) % len(STYLES)]
        axes.plot(epochs, mean, style, color=color, label=name, marker="." if len(epochs) == 1 else None)
        axes.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)


def learning_curves(runs: dict[str, list[Rows]]) -> Figure:
    """Return training loss and test accuracy against the epoch."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, runs, "train_loss", 1)
    left.set(xlabel="epoch", ylabel="training loss, nats", yscale="log")
    draw_curves(right, runs, "test_accuracy", 100)
    right.set(xlabel="epoch", ylabel="test accuracy, %")
    if len(runs) > 1:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def mask_density(rows: Rows) -> Figure:
    """Return the share of each parameter tensor that the mask perturbs, against the epoch."""
    leaves = list(rows[0]["density_by_leaf"])
    shares = 100 * np.array([[row["density_by_leaf"][leaf] for row in rows] for leaf in leaves])
    figure = Figure(figsize=(8, 1.5 + 0.16 * len(leaves)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        shares, aspect="auto", vmin=0, vmax=100, cmap="cividis", interpolation="nearest",
        extent=(0.5, len(rows) + 0.5, len(leaves) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_yticks(range(len(leaves)), leaves, fontsize=7)
    axes.set(xlabel="epoch", title="Where the mask perturbs")
    figure.colorbar(image, label="perturbed, % of the tensor")
    return figure


def draw_run(rows: Rows, folder: pathlib.Path) -> list[pathlib.Path]:
    """Save the pictures of a run into its folder and return their paths."""
    figures = {"learning_curves.png": learning_curves({folder.name: [rows]})}
    if "density_by_leaf" in rows[0]:
        figures["mask_density.png"] = mask_density(rows)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in figures]


def mean_std(values: Any) -> tuple[float, float]:
    """Return mean and sample standard deviation over the seeds (0 for a single seed)."""
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std(ddof=1)) if values.size > 1 else 0.0
