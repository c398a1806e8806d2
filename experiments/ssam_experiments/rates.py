"""Whether a curve falls as fast as ``log T / sqrt T``: a fit on its first part, a test on the rest."""

import math
from typing import Any, NamedTuple

import numpy as np

CHECKPOINTS = 100  # the numbers of steps T at which averages are kept, evenly spread on a log axis
ERRORS = 3  # standard errors over the seeds that count as chance, in the height of a curve and in its slope
STEEPNESS = 0.01  # smaller differences of slopes count as none: seeds can agree so well that errors are tiny


class Verdict(NamedTuple):
    """What the fit and its test say of a curve; the numbers are NaN if the curve is not finite.

    Attributes:
      constants: each seed's c, of shape (seeds,), fitted on the window.
      needed: the c that the mean over the seeds would need at the last T.
      slope: of the mean after the window, on log axes.
      slope_error: standard error of the slope.
      bound_slope: the slope of log T / sqrt T at the same T.
      excess: of the mean over the line after the window, relative to the line, where it comes nearest to
        what is allowed or furthest above it.
      allowed: tolerance and standard errors there.
    """

    constants: np.ndarray
    needed: float
    slope: float
    slope_error: float
    bound_slope: float
    excess: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the curve stays below its line and is as steep; False for one that is not finite."""
        steep = self.slope <= self.bound_slope + ERRORS * self.slope_error + STEEPNESS
        return bool(steep and self.excess <= self.allowed)


def checkpoints(steps: int) -> np.ndarray:
    """Return the numbers of steps T at which averages are kept. They start at 2: the bound is 0 at T = 1."""
    return np.unique(np.geomspace(2, steps, CHECKPOINTS).round().astype(np.int64))


def bound(at: np.ndarray) -> np.ndarray:
    """Return log T / sqrt T."""
    return np.log(at) / np.sqrt(at)


def judge(at: np.ndarray, averages: np.ndarray, window: tuple[float, float], tolerance: float) -> Verdict:
    """Fit ``c log T / sqrt T`` to curves on a window, and test whether their mean obeys it afterwards.

    The mean must stay below the line and be as steep. The first steps often fall faster, and can lift the
    line so far that a curve which has stopped falling takes long to reach it. c is the mean over the window
    of ``average / (log T / sqrt T)``, a least-squares fit in relative terms. Each seed has its own c, so the
    standard error of the excess is that of paired differences.

    Args:
      at: numbers of steps T of shape (checkpoints,), above 1.
      averages: the average of the squared gradient norm up to each T, of shape (checkpoints, seeds).
      window: first and last T of the fit; later ones are for the test.
      tolerance: by how much the mean may exceed its line, relative to it, besides three standard errors.

    Returns:
      A `Verdict`.

    Raises:
      ValueError: there are fewer than two seeds, or two T in the window or after it.
    """
    inside, after = (window[0] <= at) & (at <= window[1]), at > window[1]
    seeds = averages.shape[1]
    if seeds < 2 or min(inside.sum(), after.sum()) < 2:
        raise ValueError(
            f"averages must hold at least 2 seeds, and 2 numbers of steps in the window {window} and after"
            f" it; got {seeds} seeds, {inside.sum()} and {after.sum()} numbers of steps."
        )
    if not np.all(np.isfinite(averages)):
        return Verdict(np.full(seeds, np.nan), *[math.nan] * 6)
    ratios = averages / bound(at)[:, None]
    constants = ratios[inside].mean(axis=0)
    differences = (ratios[after] - constants) / constants.mean()
    excess = differences.mean(axis=1)
    allowed = tolerance + ERRORS * standard_error(differences)
    worst = np.argmax(excess - allowed)

    def slope(curve: np.ndarray) -> np.ndarray:
        return np.polyfit(np.log(at[after]), np.log(curve[after]), 1)[0]

    mean = averages.mean(axis=1)
    # Left out in turn, the seeds say how sure the slope of their mean is (the jackknife).
    slopes = np.array([slope((seeds * mean - one) / (seeds - 1)) for one in averages.T])
    error = (seeds - 1) * standard_error(slopes)
    line = slope(bound(at))
    return Verdict(
        constants, *map(float, (ratios[-1].mean(), slope(mean), error, line, excess[worst], allowed[worst]))
    )


def standard_error(values: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over the last axis, the seeds."""
    return values.std(axis=-1, ddof=1) / math.sqrt(values.shape[-1])


def paired_ratio(curve: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Return the ratio of two curves' mean c and its standard error; seeds share their start and batches."""
    above, below = np.array(curve["constants"]), np.array(other["constants"])
    ratio = above.mean() / below.mean()
    return float(ratio), float(standard_error(above - ratio * below) / below.mean())
