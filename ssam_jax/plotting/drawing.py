"""What all pictures share: colors, line styles, axes, and checks of arguments."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

try:
    from matplotlib.axes import Axes as Axes
    from matplotlib.colors import LogNorm as LogNorm
    from matplotlib.colors import Normalize as Normalize
    from matplotlib.figure import Figure as Figure
    from matplotlib.ticker import LogLocator as LogLocator
    from matplotlib.ticker import MaxNLocator as MaxNLocator
    from mpl_toolkits.mplot3d import Axes3D as Axes3D
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ssam_jax.plotting needs matplotlib: pip install '.[plots]' in a clone of ssam_jax.", name=error.name
    ) from None

COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
"""Okabe and Ito's palette without its yellow, which is faint on white."""

STYLES = ("-", "--", "-.", ":")
"""Their number has no divisor in common with that of the colors, so that 28 lines all differ."""

COLORMAP = "viridis"


def looks() -> Iterator[dict[str, Any]]:
    """Yield a color and a style for each line."""
    for color, style in zip(itertools.cycle(COLORS), itertools.cycle(STYLES)):
        yield {"color": color, "linestyle": style}


def flat_axes(axes: Any, figsize: tuple[float, float] = (7, 4.5)) -> Axes:
    """Return the axes, or those of a new figure; refuse any that have a third dimension."""
    if axes is None:
        return Figure(figsize=figsize, layout="constrained").add_subplot()
    if not isinstance(axes, Axes) or isinstance(axes, Axes3D):
        raise TypeError(f"axes must be two-dimensional Axes of matplotlib, got {type(axes).__name__}.")
    return axes


def finished(axes: Axes, lines: int) -> Figure:
    """Add a grid, and a legend if there is more than one line; return the figure."""
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)
    if lines > 1:
        axes.legend(frameon=False)
    return figure_of(axes)


def figure_of(axes: Axes) -> Figure:
    """Return the figure that holds axes, directly or in a subfigure."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def labelled(name: str, unit: str) -> str:
    """Return an axis label."""
    return f"{name}, {unit}" if unit else name


def array(values: Any) -> np.ndarray:
    """Return values as float64, on the host."""
    return np.asarray(values, np.float64)


def check_mapping(name: str, values: Any, kind: type) -> None:
    """Raise, naming the argument, unless it is a mapping that holds at least one value, all of a kind."""
    if not isinstance(values, Mapping):
        wanted = f"a mapping from each run's name to its {kind.__name__}"
        raise TypeError(f"{name} must be {wanted}, got {type(values).__name__}.")
    if not values:
        raise ValueError(f"{name} must hold at least one {kind.__name__}, got none.")
    for key, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}[{key!r}] must be a {kind.__name__}, got {type(value).__name__}.")


def check_shape(name: str, values: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError, naming the argument, unless it has the shape."""
    if np.shape(values) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {np.shape(values)}.")
