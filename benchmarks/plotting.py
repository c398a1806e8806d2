"""The look of the benchmarks' pictures: colours that a colour-blind reader tells apart, and markers too."""

from typing import Any

from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe, Ito
MARKERS = ("o", "s", "^", "D", "v", "P")
LIMIT = "#666666"


def figure(width: float = 7.0, height: float = 4.0) -> tuple[Figure, Any]:
    """Return a figure of a size in inches, and its only axes."""
    made = Figure((width, height), dpi=150, layout="constrained")
    axes = made.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes
