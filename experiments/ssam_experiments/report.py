"""Tables and pictures of finished runs."""

import pathlib
import statistics
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

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
ACCURACIES = {"valid_accuracy": "validation accuracy, %", "test_accuracy": "test accuracy, %"}


def table(runs: dict[str, list[Rows]]) -> str:
    """Return a Markdown table: a line for each name, mean and standard deviation over its runs.

    Images per second are the median over the epochs. Validation accuracy has a column if any run has it.
    """
    splits = [split for split in ACCURACIES if _has(runs, split)]
    titles = ["run", "seeds", "epochs", "training loss", *(ACCURACIES[s] for s in splits), "images/s"]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    for name, several in runs.items():
        last = [rows[-1] for rows in several]
        speeds = [row["images_per_second"] for rows in several for row in rows if "images_per_second" in row]
        cells = [name, str(len(several)), str(last[0]["epoch"]), spread([r["train_loss"] for r in last], 3)]
        for split in splits:
            values = [100 * row[split] for row in last if split in row]
            cells.append(spread(values, 1) if values else "")
        cells.append(f"{statistics.median(speeds):.0f}" if speeds else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _has(runs: dict[str, list[Rows]], metric: str) -> bool:
    return any(metric in row for several in runs.values() for rows in several for row in rows)


def spread(values: list[float], digits: int) -> str:
    """Return mean and sample standard deviation, or the value if it is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def draw_curves(axes: Axes, runs: dict[str, list[Rows]], metric: str, scale: float) -> None:
    """Draw a metric against the epoch: the mean of the runs of a name, a band of a standard deviation."""
    for i, (name, several) in enumerate(runs.items()):
        rows = [[row for row in rows if metric in row] for rows in several]
        if not all(rows):
            continue
        epochs = [row["epoch"] for row in rows[0]][: min(map(len, rows))]
        values = scale * np.array([[row[metric] for row in one[: len(epochs)]] for one in rows])
        mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0
        color, style = COLORS[i % len(COLORS)], STYLES[i // len(COLORS) % len(STYLES)]
        axes.plot(epochs, mean, style, color=color, label=name, marker="." if len(epochs) == 1 else None)
        axes.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def learning_curves(runs: dict[str, list[Rows]]) -> Figure:
    """Return training loss and test accuracy against the epoch, and validation accuracy if any run has it."""
    splits = [split for split in ACCURACIES if _has(runs, split)]
    figure = Figure(figsize=(5 + 5 * len(splits), 4.5), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(splits), squeeze=False)[0]
    draw_curves(left, runs, "train_loss", 1)
    left.set(xlabel="epoch", ylabel="training loss, nats")
    _scale_losses(left, [row["train_loss"] for several in runs.values() for rows in several for row in rows])
    for axes, split in zip(others, splits):
        draw_curves(axes, runs, split, 100)
        axes.set(xlabel="epoch", ylabel=ACCURACIES[split])
    if len(runs) > 1:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _scale_losses(axes: Axes, losses: list[float]) -> None:
    """Make the axis logarithmic if losses span a decade, with plain numbers on it in any case."""
    if min(losses) <= 0 or max(losses) < 10 * min(losses):
        return
    axes.set_yscale("log")
    steps = (1.0, 2.0, 5.0) if max(losses) < 1000 * min(losses) else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
