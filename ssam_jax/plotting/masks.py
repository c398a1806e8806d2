"""Masks over the course of a training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssam_jax.plotting import drawing
from ssam_jax.plotting.drawing import Axes, Figure


def plot_mask_by_layer(
    steps: Any, densities: Mapping[str, Any] | Sequence[Mapping[str, Any]], axes: Axes | None = None
) -> Figure:
    """Draw the share of each leaf that is perturbed, over the course of a training.

    In the loop, collect ``ssam_jax.mask_stats(opt_state).by_leaf`` every so often, and the step::

        steps.append(step)
        densities.append(ssam_jax.mask_stats(opt_state).by_leaf)

    Args:
      steps: shape (times,), ascending: the steps or epochs of the masks.
      densities: the dicts collected; or shares of shape (times,), from 0 to 1, by the leaf's path.
      axes: where to draw; None makes a figure, as high as the leaves need.

    Returns:
      The figure.

    Raises:
      TypeError: ``axes`` are not two-dimensional axes.
      ValueError: there are no leaves (dense SAM has no mask) or no steps, they do not ascend, not every dict
        has the same leaves, or shares differ in shape from ``steps`` or are not from 0 to 1.
    """
    times = drawing.array(steps)
    if times.ndim != 1 or not times.size or not (np.diff(times) > 0).all():
        raise ValueError(f"steps must be one or more ascending numbers, got {steps!r}.")
    shares = _shares(densities, times)
    axes = drawing.flat_axes(axes, figsize=(8, max(3, 1.5 + 0.16 * len(shares))))
    gaps = np.diff(times) if times.size > 1 else np.ones(1)
    between = (times[1:] + times[:-1]) / 2
    edges = np.concatenate([[times[0] - gaps[0] / 2], between, [times[-1] + gaps[-1] / 2]])
    rows = np.arange(len(shares) + 1) - 0.5
    cells = axes.pcolormesh(
        edges, rows, 100 * np.stack([*shares.values()]), vmin=0, vmax=100, cmap=drawing.COLORMAP
    )
    axes.set_yticks(range(len(shares)), list(shares), fontsize=7)
    axes.invert_yaxis()  # the first leaf at the top
    axes.set(xlabel="step")
    axes.figure.colorbar(cells, ax=axes, label="perturbed, % of the leaf")
    return drawing.figure_of(axes)


def _shares(densities: Any, times: np.ndarray) -> dict[str, np.ndarray]:
    """Return the shares by leaf, checked."""
    if not isinstance(densities, Mapping):
        rows = list(densities)
        for i, row in enumerate(rows):
            if row.keys() != rows[0].keys():
                odd = sorted(row.keys() ^ rows[0].keys())
                raise ValueError(
                    f"densities[{i}] must have the leaves of densities[0], but differs in {odd}."
                )
        densities = {leaf: [row[leaf] for row in rows] for leaf in (rows[0] if rows else ())}
    if not densities:
        raise ValueError("densities must hold at least one leaf, got none; dense SAM has no mask to draw.")
    found = {leaf: drawing.array(values) for leaf, values in densities.items()}
    for leaf, values in found.items():
        drawing.check_shape(f"densities[{leaf!r}]", values, times.shape)
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"densities[{leaf!r}] must be from 0 to 1, got {values}.")
    return found
