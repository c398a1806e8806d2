"""The loss around the parameters: along lines, and on a plane."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssam_jax.plotting import drawing
from ssam_jax.plotting.drawing import Axes, Axes3D, Figure, LogLocator, LogNorm, MaxNLocator, Normalize
from ssam_jax.sharpness.results import LossLine, LossPlane

ROUND = [1, 2, 5, 10]  # what ticks are multiples of
NOT_FINITE = "#D9D9D9"
EXTEND = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
"""Matplotlib's names for a scale with losses below it and above it."""


def plot_loss_along(lines: Mapping[str, LossLine], axes: Axes | None = None, *, unit: str = "") -> Figure:
    """Draw the loss along lines through the parameters of several runs.

    A loss that is not finite is a gap in its line, and a cross at the upper edge.

    Args:
      lines: what `ssam_jax.sharpness.loss_along` returned, by the run's name.
      axes: where to draw; None makes a figure.
      unit: of the loss, such as ``"nats"``.

    Returns:
      The figure.

    Raises:
      TypeError: ``lines`` is not a mapping to `LossLine`, or ``axes`` are not two-dimensional axes.
      ValueError: ``lines`` is empty, or a line's arrays differ in shape.
    """
    drawing.check_mapping("lines", lines, LossLine)
    for name, line in lines.items():
        drawing.check_shape(f"lines[{name!r}].losses", line.losses, (np.size(line.offsets),))
    axes = drawing.flat_axes(axes)
    for (name, line), look in zip(lines.items(), drawing.looks()):
        order = np.argsort(line.offsets)
        offsets, losses = drawing.array(line.offsets)[order], drawing.array(line.losses)[order]
        lost = ~np.isfinite(losses)
        axes.plot(offsets, np.where(lost, np.nan, losses), label=name, **look)
        if lost.any():
            edge = axes.get_xaxis_transform()
            axes.plot(
                offsets[lost], np.ones(lost.sum()), "x", color=look["color"], transform=edge, clip_on=False
            )
    axes.set(xlabel="offset, multiples of the direction", ylabel=drawing.labelled("loss", unit))
    return drawing.finished(axes, len(lines))


def plot_loss_contours(
    plane: LossPlane,
    axes: Axes | None = None,
    *,
    levels: int | Sequence[float] = 16,
    vmin: float | None = None,
    vmax: float | None = None,
    log: bool = False,
    colorbar: bool = True,
    unit: str = "",
) -> Figure:
    """Draw the loss on a plane through the parameters as contours, with a cross at the parameters.

    Several planes share one scale if they are given the same ``vmin`` and ``vmax``, as from `loss_range`.
    Losses beyond the scale have the color of its end, and the color bar then ends in an arrow. Losses that
    are not finite are gray.

    Args:
      plane: what `ssam_jax.sharpness.loss_over` returned.
      axes: where to draw; None makes a figure.
      levels: the number of bands in the scale; or, without ``vmin`` and ``vmax``, their edges.
      vmin: the lower end of the scale; None is the lowest finite loss.
      vmax: the upper end; None is the highest finite loss.
      log: whether the scale is logarithmic, which shows flat and steep planes side by side.
      colorbar: whether to draw one next to the axes.
      unit: of the loss, such as ``"nats"``.

    Returns:
      The figure.

    Raises:
      TypeError: ``plane`` is not a `LossPlane`, or ``axes`` are not two-dimensional axes.
      ValueError: the arrays do not fit one another, no loss is finite, ``levels``, ``vmin`` and ``vmax`` are
        out of range, or a logarithmic scale does not begin above 0.
    """
    x, y, losses = _plane(plane)
    edges = _edges(levels, losses, vmin, vmax, log)
    axes = drawing.flat_axes(axes)
    axes.set_facecolor(NOT_FINITE)
    beyond = bool(np.nanmin(losses) < edges[0]), bool(np.nanmax(losses) > edges[-1])
    norm = (LogNorm if log else Normalize)(edges[0], edges[-1])
    bands = axes.contourf(x, y, losses, edges, cmap=drawing.COLORMAP, norm=norm, extend=EXTEND[beyond])
    axes.contour(x, y, losses, edges, colors="black", linewidths=0.4, alpha=0.6)
    if min(x) <= 0 <= max(x) and min(y) <= 0 <= max(y):
        axes.plot(0, 0, marker="P", color="white", markeredgecolor="black", markersize=9)
    axes.set(xlabel="multiples of the first direction", ylabel="multiples of the second direction")
    if colorbar:
        ticks = _ticks(edges, log) if np.ndim(levels) == 0 else edges
        axes.figure.colorbar(bands, ax=axes, label=drawing.labelled("loss", unit), ticks=ticks, format="%g")
    return drawing.figure_of(axes)


def plot_loss_surface(
    plane: LossPlane,
    axes: Axes3D | None = None,
    *,
    vmin: float | None = None,
    vmax: float | None = None,
    unit: str = "",
) -> Figure:
    """Draw the loss on a plane through the parameters as a surface in three dimensions.

    Several planes share one scale if they are given the same ``vmin`` and ``vmax``, as from `loss_range`.
    Beyond the scale the surface is cut off flat; where the loss is not finite there is none.

    Args:
      plane: what `ssam_jax.sharpness.loss_over` returned.
      axes: where to draw, made with ``projection="3d"``; None makes a figure.
      vmin: the lower end of the vertical axis and of the colors; None is the lowest finite loss.
      vmax: the upper end; None is the highest finite loss.
      unit: of the loss, such as ``"nats"``.

    Returns:
      The figure.

    Raises:
      TypeError: ``plane`` is not a `LossPlane`, or ``axes`` are not three-dimensional.
      ValueError: the arrays do not fit one another, no loss is finite, or ``vmin`` and ``vmax`` are out of
        range.
    """
    x, y, losses = _plane(plane)
    low, high = _ends(losses, vmin, vmax)
    if axes is None:
        axes = Figure(figsize=(6, 5), layout="constrained").add_subplot(projection="3d")
    if not isinstance(axes, Axes3D):
        raise TypeError(f"axes must be made with projection='3d', got {type(axes).__name__}.")
    scale = {"vmin": low, "vmax": high, "cmap": drawing.COLORMAP}
    mesh = {"rcount": len(y), "ccount": len(x), "edgecolor": "#00000040", "linewidth": 0.2}
    axes.plot_surface(*np.meshgrid(x, y), np.clip(losses, low, high), **scale, **mesh)
    axes.set(xlabel="first direction", ylabel="second direction", zlim=(low, high))
    axes.set_zlabel(drawing.labelled("loss", unit))
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(4, steps=ROUND))
    axes.set_box_aspect(None, zoom=0.85)  # labels are not laid out, and would be cut off
    return drawing.figure_of(axes)


def loss_range(planes: Mapping[str, LossPlane]) -> tuple[float, float]:
    """Return the lowest and the highest finite loss of several planes, as a common scale.

    Raises:
      TypeError: ``planes`` is not a mapping to `LossPlane`.
      ValueError: ``planes`` is empty, the arrays of one do not fit one another, or hold no finite loss.
    """
    drawing.check_mapping("planes", planes, LossPlane)
    losses = [_plane(plane)[2].ravel() for plane in planes.values()]
    return _ends(np.concatenate(losses), None, None)


def _plane(plane: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a plane's arrays, checked; what is not finite is NaN."""
    if not isinstance(plane, LossPlane):
        raise TypeError(f"plane must be a LossPlane, got {type(plane).__name__}.")
    x, y, losses = map(drawing.array, plane)
    for name, values in (("x", x), ("y", y)):
        if values.ndim != 1 or len(values) < 2 or not (np.diff(values) > 0).all():
            raise ValueError(f"plane.{name} must be two or more ascending numbers, got {values}.")
    drawing.check_shape("plane.losses", losses, (len(y), len(x)))
    finite = np.isfinite(losses)
    if not finite.any():
        raise ValueError("plane.losses must hold a finite loss, got none.")
    return x, y, np.where(finite, losses, np.nan)


def _ends(losses: np.ndarray, vmin: float | None, vmax: float | None) -> tuple[float, float]:
    """Return the ends of the scale of losses: those given, or the lowest and the highest of them."""
    low = float(np.nanmin(losses)) if vmin is None else vmin
    high = float(np.nanmax(losses)) if vmax is None else vmax
    if vmin is None and vmax is None and low == high:  # a plane that is level
        apart = 0.25 * abs(low) or 0.5
        return low - apart, high + apart
    if not -np.inf < low < high < np.inf:
        raise ValueError(f"vmin must be below vmax, and both finite, got {low} and {high}.")
    return low, high


def _edges(
    levels: int | Sequence[float], losses: np.ndarray, vmin: float | None, vmax: float | None, log: bool
) -> np.ndarray:
    """Return the ascending edges of the bands of a contour plot."""
    if np.ndim(levels) == 0:
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
            raise ValueError(f"levels must be an int of at least 1, or the edges of bands, got {levels!r}.")
        ends = _ends(losses, vmin, vmax)
        edges = np.geomspace(*ends, levels + 1) if log and ends[0] > 0 else np.linspace(*ends, levels + 1)
    elif vmin is not None or vmax is not None:
        raise ValueError("levels must be an int where vmin or vmax is given: edges have ends of their own.")
    else:
        edges = drawing.array(levels)
    if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"levels must hold two or more ascending numbers, got {levels!r}.")
    if log and edges[0] <= 0:
        raise ValueError(f"log needs a scale that begins above 0, got one from {edges[0]}.")
    return edges


def _ticks(edges: np.ndarray, log: bool) -> list[float]:
    """Return round numbers between the ends of a scale."""
    locator = LogLocator(subs=ROUND[:-1]) if log else MaxNLocator(7, steps=ROUND)
    return [tick for tick in locator.tick_values(edges[0], edges[-1]) if edges[0] <= tick <= edges[-1]]
