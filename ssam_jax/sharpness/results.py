"""The results of the measures of sharpness: arrays, and how to read them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssam_jax.typing import Params

GRID_POINTS = 1024
"""Points of a grid over the spectrum."""

TINY = 1e-12
"""The least width of a grid or a bell: a spectrum of one value has a range of 0."""


class Estimate(NamedTuple):
    """A mean over random samples, with its standard error.

    Attributes:
      mean: scalar, in the units of the samples.
      standard_error: scalar, the standard deviation of the samples over the root of their number; NaN for
        a single sample.
      samples: shape (samples,), the samples themselves.
    """

    mean: jax.Array
    standard_error: jax.Array
    samples: jax.Array


def estimate(samples: Sequence[jax.Array]) -> Estimate:
    """Return the estimate of scalar samples."""
    values = jnp.stack(samples)
    n = values.size
    error = jnp.std(values, ddof=1) / n**0.5 if n > 1 else jnp.full_like(values[0], jnp.nan)
    return Estimate(jnp.mean(values), error, values)


class WorstCase(NamedTuple):
    """The loss at parameters and at the worst point found near them.

    Attributes:
      rise: scalar, how much higher the loss is there, in its own units; a lower bound on the rise
        in the ball.
      loss: scalar, the loss at the parameters.
      params: the worst point, shaped like the parameters; None where each batch has its own.
    """

    rise: jax.Array
    loss: jax.Array
    params: Params | None


class Eigenpairs(NamedTuple):
    """The largest eigenvalues of a Hessian, and their eigenvectors.

    Attributes:
      values: shape (k,), the largest first, in units of the loss over those of the parameters squared.
      vectors: a tree like the parameters with a leading axis of k; each vector, over all leaves, of length 1.
      residuals: shape (k,), ``||H v - value * v||``: an eigenvalue is at most this far from each value.
    """

    values: jax.Array
    vectors: Params
    residuals: jax.Array


class SpectralDensity(NamedTuple):
    """The eigenvalues of a Hessian as a density: nodes and weights of a quadrature for each random probe.

    Attributes:
      nodes: shape (probes, depth), estimates of eigenvalues, ascending.
      weights: shape (probes, depth), the share of the spectrum that each node stands for; each row sums to 1.
    """

    nodes: jax.Array
    weights: jax.Array

    def grid(self, points: int = GRID_POINTS, margin: float = 0.05) -> jax.Array:
        """Return evenly spaced values, shape (points,), from below the lowest node to above the highest.

        Args:
          points: the number of values.
          margin: the width to add on either side, as a share of the nodes' range.
        """
        low, high = jnp.min(self.nodes), jnp.max(self.nodes)
        extra = margin * jnp.maximum(high - low, TINY)
        return jnp.linspace(low - extra, high + extra, points)

    def density(self, grid: jax.Array, width: float | jax.Array | None = None) -> jax.Array:
        """Return the density at the values of ``grid``, each node widened to a Gaussian.

        Args:
          grid: shape (points,), eigenvalues, as from `grid`.
          width: the Gaussian's standard deviation, in units of the eigenvalues; None means a hundredth of
            the range of the nodes.

        Returns:
          Shape (points,), per unit of the eigenvalues; it integrates to 1 over all of them.
        """
        if width is None:
            width = (jnp.max(self.nodes) - jnp.min(self.nodes)) / 100
        width = jnp.maximum(jnp.asarray(width, self.nodes.dtype), TINY)
        bells = jax.scipy.stats.norm.pdf(grid[:, None, None], self.nodes[None], width)
        return jnp.sum(bells * self.weights[None], axis=(1, 2)) / self.nodes.shape[0]


class LossLine(NamedTuple):
    """The loss along a line through the parameters.

    Attributes:
      offsets: shape (points,), how far along the direction, in multiples of it; the parameters are at 0.
      losses: shape (points,).
    """

    offsets: jax.Array
    losses: jax.Array


class LossPlane(NamedTuple):
    """The loss on a plane through the parameters.

    Attributes:
      x: shape (columns,), multiples of the first direction; the parameters are at (0, 0).
      y: shape (rows,), multiples of the second direction.
      losses: shape (rows, columns).
    """

    x: jax.Array
    y: jax.Array
    losses: jax.Array
