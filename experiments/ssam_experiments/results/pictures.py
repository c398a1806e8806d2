"""The pictures of docs/results.md: few names, large letters, readable on a phone."""

import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from ssam_experiments import report
from ssam_experiments.report import COLORS
from ssam_experiments.results import plan
from ssam_experiments.results.rows import LAYERWISE, SAM, SGD
from ssam_experiments.results.study import Study
from ssam_experiments.results.tables import usable
from ssam_experiments.results.tuning import Found, Known, accuracies, look

NAMED = 8  # points with a name, at most
FAVORITES = (SGD, SAM, "carried, norm layers", "every 5th, eighth batch", "SSAM-F 50%", "MSAM", "norm layers")
GREY = "#BBBBBB"
LARGE = 12
WIDTH = 1.5  # of a name on the axis of costs, a factor


def _point(study: Study, name: str, found: Found, times: dict[str, Any]) -> tuple[float, float, float]:
    return plan.ratio(study, name, times), *report.mean_std(accuracies(found))


def named(points: dict[str, Any], front: list[str]) -> list[str]:
    """Return the points to name: the ends and the front first, then those that readers look for."""
    wanted = dict.fromkeys([SGD, SAM, *front, *FAVORITES])
    return [name for name in wanted if name in points][:NAMED]


def pareto(study: Study, known: Known, times: dict[str, Any]) -> Figure:
    """Return accuracy against cost: the front and a few rows by name, the rest grey."""
    found = usable(study, known)
    points = {name: _point(study, name, one, times) for name, one in found.items()}
    front = plan.front(found, study, times)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    shown = named(points, front)
    for name, point in points.items():
        if name not in shown:
            axes.plot(*point[:2], "o", color=GREY, markersize=5)
    line = [[points[name][i] for name in front] for i in (0, 1)]
    axes.plot(*line, color=COLORS[5], linewidth=1.5, zorder=1)
    for name in shown:
        x, y, error = points[name]
        color = COLORS[5] if name in front else COLORS[2]
        axes.errorbar(x, y, yerr=error, fmt="o", color=color, ecolor=GREY, capsize=2, markersize=7)
    axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * WIDTH)  # room for names
    axes.xaxis.set_major_locator(FixedLocator([1, 1.1, 1.25, 1.5, 2, 3]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    _finish(axes, "time of a step / SGD's" if _all_timed(points, times) else "cost of a step / SGD's")
    axes.set_ylabel("test accuracy, %", fontsize=LARGE)
    _names(axes, {name: points[name][:2] for name in shown})
    return figure


def _all_timed(points: dict[str, Any], times: dict[str, Any]) -> bool:
    return all(plan.measured(name, times) is not None for name in points)


def _names(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Write a name at the right of each point, as near as there is neither another name nor a point."""
    low, high = axes.get_ylim()
    gap = (high - low) / 22
    taken: list[tuple[float, float]] = []  # where names begin
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        others = [point for other, point in points.items() if other != name and x < point[0] < x * WIDTH]
        near = [at for start, at in taken if 1 / WIDTH < start / x < WIDTH] + [at for _, at in others]
        shifts = sorted((k * gap / 2 for k in range(-24, 25)), key=abs)
        at = next((y + s for s in shifts if all(abs(y + s - other) >= 0.9 * gap for other in near)), y)
        taken.append((x, at))
        axes.annotate(
            name, (x, y), xytext=(x * 1.03, at), fontsize=LARGE - 1, va="center",
            arrowprops=None if at == y else {"arrowstyle": "-", "color": GREY, "linewidth": 0.7},
        )  # fmt: skip


def _finish(axes: Axes, xlabel: str) -> None:
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=LARGE - 1)
    axes.set_xlabel(xlabel, fontsize=LARGE)
    axes.spines[["top", "right"]].set_visible(False)


def over_time(study: Study, known: Known, times: dict[str, Any]) -> Figure:
    """Return accuracy against the time of training: each point is a training with a schedule of its own."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    every = {task.name: task for task in plan.main_tasks(study)}
    equal = plan.equal_time(study, known, times)
    names = list(dict.fromkeys(task.name for task in equal))[: len(COLORS)]
    for i, name in enumerate(names):
        points = []
        for task in (every[name], *(task for task in equal if task.name == name)):
            values = accuracies(look(study, task, known))
            if values:
                cost = (task.epochs or study.epochs) * plan.ratio(study, name, times) / study.epochs
                points.append((cost, *report.mean_std(values)))
        if points:
            x, y, error = zip(*sorted(points))
            axes.errorbar(x, y, yerr=error, fmt="o-", color=COLORS[i], capsize=2, label=name)
    _finish(axes, "time of training / SGD's for 15 epochs")
    axes.set_ylabel("test accuracy, %", fontsize=LARGE)
    if axes.containers:
        axes.legend(frameon=False, fontsize=LARGE - 2, loc="best")
    return figure


def radii(study: Study, known: Known, times: dict[str, Any]) -> Figure:
    """Return, for each family, what a radius other than the best costs in validation accuracy."""
    del times
    families: dict[str, dict[str, dict[float, float]]] = {}
    for task in plan.main_tasks(study):
        tried = look(study, task, known).tried
        if len(tried) > 2:
            families.setdefault(task.row.family, {})[task.name] = tried
    figure = Figure(figsize=(7, 2.4 * len(families) / 2 + 2), layout="constrained")
    panels = figure.subplots(
        max(1, (len(families) + 1) // 2), 2, sharex=True, sharey=True, squeeze=False
    ).ravel()
    for axes, (family, rows) in zip(panels, families.items()):
        by_factor: dict[float, list[float]] = {}
        for tried in rows.values():
            best = max(tried, key=tried.__getitem__)
            lost = sorted((rho / best, 100 * (value - tried[best])) for rho, value in tried.items())
            axes.plot(*zip(*lost), "-", color=GREY, linewidth=1)
            for factor, value in lost:
                by_factor.setdefault(round(factor, 4), []).append(value)
        medians = sorted((f, statistics.median(values)) for f, values in by_factor.items() if len(values) > 1)
        if medians:
            axes.plot(*zip(*medians), "o-", color=COLORS[2], linewidth=2)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_title(f"{family} ({len(rows)})", fontsize=LARGE)
        _finish(axes, "")
    panels[0].set_ylim(-8, 0.5)
    for axes in panels[len(families) :]:
        axes.axis("off")
    figure.supxlabel("rho / the best rho of the row", fontsize=LARGE)
    figure.supylabel("validation points below the best", fontsize=LARGE)
    return figure


def width_radii(study: Study, known: Known, times: dict[str, Any]) -> Figure:
    """Return validation accuracy against the radius by the network's width, for SAM and layerwise SAM."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    panels = dict(zip((SAM, LAYERWISE), figure.subplots(1, 2, sharey=True)))
    tasks = plan.tasks(study, "widths", known, times)
    by_setting = {setting: width for width, setting in plan.WIDTHS.items()}
    for task in tasks:
        tried, width = look(study, task, known).tried, by_setting[task.setting]
        if tried:
            color, axes = COLORS[list(plan.WIDTHS).index(width) + 1], panels[task.name]
            x, y = zip(*sorted((rho, 100 * value) for rho, value in tried.items()))
            axes.plot(x, y, "o-", color=color, label=str(width), markersize=4)
            axes.plot(x[y.index(max(y))], max(y), "*", color=color, markersize=14)
    for name, axes in panels.items():
        axes.set_xscale("log")
        axes.set_title(name, fontsize=LARGE)
        _finish(axes, "rho")
    panels[SAM].set_ylabel("validation accuracy, %", fontsize=LARGE)
    if panels[SAM].lines:
        panels[SAM].legend(title="width", frameon=False, fontsize=LARGE - 2)
    return figure


PICTURES = {"pareto": pareto, "over_time": over_time, "radii": radii, "width_radii": width_radii}
"""By the name of the file in docs/images."""
