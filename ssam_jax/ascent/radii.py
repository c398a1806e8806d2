"""Radii: how far a step ascends, and on which steps; 0 means not on this one."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ssam_jax._base import checks, trees
from ssam_jax.typing import Gradients, Params, PyTree, Scalar, Schedule

__all__ = ["GateState", "RadiusRule", "adaptive_gate", "bernoulli", "every"]

LARGEST_RADIUS = float(np.finfo(np.float32).max)
"""The largest that is finite in the dtype of norms."""


class UpdateRadius(Protocol):
    """The second function of a `RadiusRule`."""

    def __call__(
        self, state: PyTree, grads: Gradients, params: Params, step: jax.Array, **extra: Any
    ) -> tuple[Scalar, PyTree]:
        """Return the radius of this step and the next state."""


class RadiusRule(NamedTuple):
    """A radius that depends on more than the step: a pair of pure functions.

    Attributes:
      init: ``init(params) -> state``, a pytree of arrays.
      update: ``update(state, grads, params, step, **extra) -> (radius, state)``, called every step with the
        gradient at ``params``, ``step`` an int32 scalar that counts from 0, and the extra arguments of
        ``tx.update``. The radius is a scalar of at least 0.
    """

    init: Callable[[Params], PyTree]
    update: UpdateRadius


def every(k: int, rho: Scalar | Schedule, start: int = 0) -> Schedule:
    """Return a schedule that ascends on every k-th step.

    Args:
      k: steps from one ascent to the next, at least 1.
      rho: the radius of the steps that ascend, or a schedule for it. The rarer the ascent, the larger the
        best radius.
      start: the first step that ascends, at least 0. ``every(1, rho, start)`` is late SAM.

    Returns:
      An optax schedule, ``rho`` where ``step >= start`` and ``(step - start) % k == 0``, else 0.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range.

    >>> schedule = every(5, 0.1)
    >>> [round(float(schedule(step)), 3) for step in (0, 1, 5)]
    [0.1, 0.0, 0.1]
    """
    checks.integer("k", k)
    checks.integer("start", start, low=0)
    check_rho(rho)

    def schedule(count: jax.Array) -> jax.Array:
        due = (jnp.asarray(count) >= start) & ((jnp.asarray(count) - start) % k == 0)
        return jnp.where(due, radius_at(rho, count), 0)

    return schedule


def bernoulli(p: float, rho: Scalar | Schedule, seed: int = 0) -> Schedule:
    """Return a schedule that ascends on each step with a probability (SS-SAM, RST).

    Args:
      p: probability of an ascent, 0 to 1.
      rho: the radius of the steps that ascend, or a schedule for it.
      seed: of the draws, which depend on it and the step alone, on any number of devices.

    Returns:
      An optax schedule, ``rho`` or 0.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range.

    References:
      Zhao et al., `SS-SAM <https://arxiv.org/abs/2203.09962>`_; Zhao et al., `Randomized Sharpness-Aware
      Training <https://arxiv.org/abs/2203.09962>`_.
    """
    checks.number("p", p, low=0, high=1)
    check_rho(rho)
    checks.seed(seed)

    def schedule(count: jax.Array) -> jax.Array:
        drawn = jax.random.bernoulli(jax.random.fold_in(jax.random.key(seed), count), p)
        return jnp.where(drawn, radius_at(rho, count), 0)

    return schedule


class GateState(NamedTuple):
    """State of `adaptive_gate`.

    Attributes:
      mean: float32 scalar, the running mean of the squared gradient norm.
      deviation: float32 scalar, the root of its running variance.
    """

    mean: jax.Array
    deviation: jax.Array


def adaptive_gate(
    rho: Scalar | Schedule,
    total_steps: int,
    *,
    decay: float = 0.9,
    start: float = 1.0,
    end: float = -1.0,
) -> RadiusRule:
    r"""Return a rule that ascends where the gradient is large (AE-SAM).

    .. math:: \|g_t\|^2 \ge \mu_t + c_t \sigma_t

    with the running mean and variance :math:`\mu_t = \delta \mu_{t-1} + (1 - \delta) \|g_t\|^2` and
    :math:`\sigma_t^2 = \delta \sigma_{t-1}^2 + (1 - \delta) (\|g_t\|^2 - \mu_t)^2`, and c going linearly from
    ``start`` to ``end``.

    Args:
      rho: the radius of the steps that ascend, or a schedule for it.
      total_steps: the step from which on c is ``end``.
      decay: delta, 0 to below 1.
      start: c of the first step.
      end: c of the last step.

    Returns:
      A `RadiusRule` with a `GateState`.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range.

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, eqs. 2 to 4.
    """
    check_rho(rho)
    checks.integer("total_steps", total_steps)
    checks.number("decay", decay, low=0, high=1, below=True)
    for name, value in (("start", start), ("end", end)):
        checks.number(name, value, low=-LARGEST_RADIUS, high=LARGEST_RADIUS)

    def init(params: Params) -> GateState:
        dtype = trees.wide_dtype(*jax.tree.leaves(params))
        return GateState(jnp.zeros((), dtype), jnp.zeros((), dtype))

    def update(
        state: GateState, grads: Gradients, params: Params, step: jax.Array, **extra: Any
    ) -> tuple[Scalar, GateState]:
        del params, extra
        square = jnp.square(trees.global_norm(grads)).astype(state.mean.dtype)
        mean = decay * state.mean + (1 - decay) * square
        # The root of the running variance, without the fourth powers of gradients, which overflow soon.
        deviation = jnp.hypot(decay**0.5 * state.deviation, (1 - decay) ** 0.5 * (square - mean))
        progress = jnp.minimum(step.astype(mean.dtype) / total_steps, 1)
        bar = mean + (start + (end - start) * progress) * deviation
        known = jnp.isfinite(square)  # a gradient that is not finite leaves the means as they are
        new = trees.where(known, GateState(mean, deviation), state)
        return jnp.where(square >= bar, radius_at(rho, step), 0), new

    return RadiusRule(init, update)


def as_rule(rho: Scalar | Schedule | RadiusRule) -> RadiusRule:
    """Return a radius as a rule; a number and a schedule keep no state."""
    if isinstance(rho, RadiusRule):
        return rho
    return RadiusRule(
        lambda params: (), lambda state, grads, params, step, **extra: (radius_at(rho, step), state)
    )


def radius_at(rho: Scalar | Schedule, step: jax.Array) -> Scalar:
    """Return rho, or what it is at a step; raise unless it is a radius, if its value is known."""
    if not callable(rho):
        return rho
    radius = rho(step)
    check_radius(radius, "what the schedule rho returns", "a float or a scalar array")
    return radius


def is_static(rho: Scalar | Schedule | RadiusRule) -> bool:
    """Whether ``rho`` is a number of Python's or NumPy's, whose value is known while tracing."""
    if isinstance(rho, np.ndarray):
        return rho.ndim == 0 and checks.is_kind(rho, jnp.floating, jnp.integer)
    return isinstance(rho, int | float | np.integer | np.floating) and not isinstance(rho, bool)


def known(radius: Scalar) -> float | None:
    """Return the value of a radius; None if it is traced, or lies on other processes."""
    if not isinstance(radius, jax.Array):
        return radius
    if isinstance(radius, jax.core.Tracer) or not radius.is_fully_addressable:
        return None
    return jax.device_get(radius)


def is_zero(radius: Scalar | Schedule | RadiusRule, *, read: bool = False) -> bool:
    """Whether a radius is known to be 0; an array is looked at if it may be read."""
    value = known(radius) if read or is_static(radius) else None
    return value is not None and value == 0


def check_rho(rho: Scalar | Schedule | RadiusRule) -> None:
    """Raise unless ``rho`` may be a radius, a schedule for it, or a rule."""
    if isinstance(rho, RadiusRule):
        checks.takes("rho.init", rho.init, "params")
        checks.takes("rho.update", rho.update, "state", "grads", "params", "step")
    elif callable(rho):
        checks.takes("rho", rho, "step")
    else:
        check_radius(rho, "rho", "a float, a scalar array, an optax schedule or a RadiusRule")


def check_radius(rho: Scalar, name: str, kinds: str) -> None:
    """Raise unless ``rho`` is a real scalar; and finite and not negative, if it is known."""
    array = hasattr(rho, "dtype") and checks.is_kind(rho, jnp.floating, jnp.integer)
    if not (is_static(rho) or array):
        raise TypeError(f"{name} must be {kinds}, got {rho!r}.")
    if jnp.shape(rho) != ():
        raise ValueError(f"{name} must be a scalar, got an array of shape {jnp.shape(rho)}.")
    value = known(rho)
    if value is not None and not 0 <= value <= LARGEST_RADIUS:
        raise ValueError(f"{name} must be finite and at least 0, got {rho!r}.")
