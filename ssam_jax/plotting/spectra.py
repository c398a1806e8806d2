"""Spectra of Hessians."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from ssam_jax.plotting import drawing
from ssam_jax.plotting.drawing import Axes, Figure
from ssam_jax.sharpness.results import GRID_POINTS, SpectralDensity

REACH = 5  # widths to which a bell is drawn
ROUNDING = 1e-6  # of float32: a width below this share of the largest eigenvalue would fall between numbers


def plot_spectra(
    spectra: Mapping[str, SpectralDensity], axes: Axes | None = None, *, width: float | None = None
) -> Figure:
    """Draw the densities of the Hessian's eigenvalues of several runs in one plot.

    The density's axis is logarithmic and ends a little below the bell of the largest eigenvalue, which stands
    for a single parameter.

    Args:
      spectra: what `ssam_jax.sharpness.spectral_density` returned, by the run's name.
      axes: where to draw; None makes a figure.
      width: standard deviation of the Gaussian that stands for a node, in all runs, in units of the
        eigenvalues; None means a hundredth of the range of all nodes.

    Returns:
      The figure.

    Raises:
      TypeError: ``spectra`` is not a mapping to `SpectralDensity`, or ``axes`` are not two-dimensional axes.
      ValueError: ``spectra`` is empty, arrays differ in shape or are not finite, or ``width`` is not above 0.
    """
    drawing.check_mapping("spectra", spectra, SpectralDensity)
    weighed = {name: _nodes(name, spectrum) for name, spectrum in spectra.items()}
    nodes = np.concatenate([*weighed.values()])
    if width is None:
        width = max(float(np.ptp(nodes)) / 100, ROUNDING * float(np.abs(nodes).max())) or 1.0
    if not 0 < width < np.inf:
        raise ValueError(f"width must be finite and above 0, got {width}.")
    axes = drawing.flat_axes(axes)
    common = np.linspace(nodes.min() - REACH * width, nodes.max() + REACH * width, GRID_POINTS)
    lowest, highest = np.inf, 0.0
    for (name, spectrum), look in zip(spectra.items(), drawing.looks()):
        own = weighed[name][:, None] + width * np.linspace(-REACH, REACH, 21)
        grid = np.sort(np.append(common, own))  # narrow bells are not missed
        density = np.asarray(spectrum.density(jnp.asarray(grid), width))
        axes.plot(grid, density, label=name, **look)
        largest = spectrum.density(jnp.asarray(weighed[name].max())[None], width)
        lowest, highest = min(lowest, float(largest[0])), max(highest, float(density.max()))
    axes.set(yscale="log", ylim=(lowest / 3, highest * 3))
    axes.set(xlabel="eigenvalue of the Hessian, loss / parameter²", ylabel="density, parameter² / loss")
    return drawing.finished(axes, len(spectra))


def _nodes(name: str, spectrum: SpectralDensity) -> np.ndarray:
    """Return the nodes of a spectrum that stand for anything, checked."""
    nodes, weights = map(drawing.array, spectrum)
    drawing.check_shape(f"spectra[{name!r}].weights", weights, nodes.shape)
    if not (np.isfinite(nodes).all() and np.isfinite(weights).all() and (weights > 0).any()):
        raise ValueError(f"spectra[{name!r}] must hold finite nodes and weights, got {spectrum}.")
    return nodes[weights > 0]
