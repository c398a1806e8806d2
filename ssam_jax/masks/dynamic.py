"""Masks from dynamic sparse training (SSAM-D): drop the flattest, grow others."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ssam_jax._base import checks, shardings
from ssam_jax.masks import packing, trading
from ssam_jax.masks.drawing import first_mask
from ssam_jax.masks.patterns import NM, Pattern, Structured, UnitPattern
from ssam_jax.masks.rule import (
    MaskRule,
    as_key,
    check_mask_state,
    check_packed,
    check_pattern,
    check_refresh_every,
    check_seed,
    key_data,
    renewed,
)
from ssam_jax.typing import Gradients, Mask, Params, Schedule

Criterion = Literal["gradient", "weight", "random"]


class DynamicState(NamedTuple):
    """State of `dynamic_mask`.

    Attributes:
      bits: the mask, its long leaves packed (``ssam_jax.masks.packing``): uint8, uint16 or uint32 words where
        bool would take a byte for each entry.
      churn: float32 scalar, the share of the perturbed entries that the last renewal brought in.
      key: uint32 key data, folded with the step where randomness is needed.
    """

    bits: Mask
    churn: jax.Array
    key: jax.Array

    @property
    def mask(self) -> Mask:
        """Bool pytree, True where the parameter is perturbed."""
        return packing.unpack(self.bits)


def dynamic_mask(
    pattern: Pattern,
    *,
    refresh_every: int,
    drop_fraction: float | Schedule = 0.5,
    total_steps: int | None = None,
    drop: Criterion = "gradient",
    grow: Criterion = "random",
    seed: int | jax.Array = 0,
    packed: bool = True,
) -> MaskRule:
    r"""Perturb a part of the parameters that is traded piece by piece (SSAM-D).

    At a refresh at step t (counted from 0), ``round(f(t) * active)`` of the perturbed entries are
    dropped, those with the smallest score, and as many are grown among those that were not perturbed
    before the drop. Density never changes. By default

    .. math:: f(t) = \frac{f_0}{2} \left(1 + \cos(\pi t / T_{end})\right)

    and 0 after T_end (arXiv 2306.17504). If fewer entries are idle than would be
    dropped, only so many are. Among equal scores the entry of lower index is kept, or grown.

    Args:
      pattern: `Unstructured`, traded over the whole tree or within each leaf by its scope; or
        `Structured` by channel or block, whose units are traded within each leaf.
      refresh_every: trade at the end of every so many steps.
      drop_fraction: f_0, 0 to 1, or an optax schedule for f itself, whose values below 0 and NaN count as
        0, and those above 1 as 1.
      total_steps: T_end, from which on nothing is traded. A schedule may do without.
      drop: the score by which to drop: ``"gradient"``, the magnitude of the descent gradient, the
        only one that is exact and whole in every form (the paper's choice: the flattest go);
        ``"weight"``, that of the parameter; or ``"random"``. A unit's score is the mean over it.
      grow: the score by which to grow, the largest first; the same choices.
      seed: seed of the first mask and of everything drawn later.
      packed: as for `fisher_mask`.

    Returns:
      A `MaskRule` with a `DynamicState`.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range, or the pattern cannot be traded at constant density.
    """
    units = _tradable(pattern)
    check_refresh_every(refresh_every)
    if refresh_every is None:
        raise ValueError("refresh_every must be an int: without refresh, use random_mask(pattern).")
    for name, value in (("drop", drop), ("grow", grow)):
        checks.choice(name, value, ("gradient", "weight", "random"))
    fraction = _drop_schedule(drop_fraction, total_steps)
    check_seed(seed)
    check_packed(packed)

    def traded(params: Params, key: jax.Array, mask: Mask, grads: Gradients, share: Any) -> Mask:
        scores = {"gradient": grads, "weight": params, "random": None}
        return trading.traded(units, mask, params, scores[drop], scores[grow], share, key)

    def init(params: Params) -> DynamicState:
        key = key_data(seed)
        return DynamicState(first_mask(pattern, key, params, packed), jnp.float32(0), key)

    def update(
        state: DynamicState,
        params: Params,
        ascent_grads: Any,
        descent_grads: Gradients,
        step: jax.Array,
        **extra: Any,
    ) -> DynamicState:
        del ascent_grads, extra
        check_mask_state(state, DynamicState, "dynamic_mask")

        def renew() -> Mask:
            key = jax.random.fold_in(as_key(state.key), step + 1)
            return shardings.computed_like(params, traded, key, state.mask, descent_grads, fraction(step))

        bits, churn = renewed(state, renew, step, refresh_every)
        return state._replace(bits=bits, churn=churn)

    return MaskRule(init, update)


def _drop_schedule(drop_fraction: Any, total_steps: Any) -> Callable[[jax.Array], jax.Array]:
    schedule = callable(drop_fraction)
    if schedule:
        checks.takes("drop_fraction", drop_fraction, "step")
    if schedule and total_steps is None:
        return lambda step: _fraction(drop_fraction(step))
    if isinstance(total_steps, bool) or not isinstance(total_steps, int):
        raise TypeError(
            "total_steps must be an int of at least 1; it can be left out only when drop_fraction is a"
            f" schedule. Got {total_steps!r}."
        )
    checks.integer("total_steps", total_steps)
    if schedule:
        return lambda step: jnp.where(step < total_steps, _fraction(drop_fraction(step)), 0)
    if isinstance(drop_fraction, bool) or not isinstance(drop_fraction, int | float):
        raise TypeError(f"drop_fraction must be a float from 0 to 1 or a schedule, got {drop_fraction!r}.")
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction must be from 0 to 1, got {drop_fraction!r}.")

    def cosine(step: jax.Array) -> jax.Array:
        progress = jnp.minimum(step.astype(jnp.float32) / total_steps, 1)
        return drop_fraction / 2 * (1 + jnp.cos(math.pi * progress))

    return cosine


def _fraction(value: Any) -> Any:
    """Return what a schedule for the drop fraction returned, or raise unless it is a real scalar."""
    if not checks.is_kind(value, jnp.floating, jnp.integer) or jnp.shape(value) != ():
        raise TypeError(f"drop_fraction, a schedule, must return a real scalar, got {value!r}.")
    return value


def _tradable(pattern: Any) -> UnitPattern:
    """Return the pattern, or raise if its parts cannot be traded at constant density."""
    check_pattern(pattern)
    if isinstance(pattern, NM):
        raise ValueError(
            "dynamic_mask cannot keep an N:M pattern: a trade would leave some groups with more than n"
            " entries. Use fisher_mask or random_mask, or Unstructured(sparsity) here."
        )
    if isinstance(pattern, Structured) and pattern.unit == "tensor":
        raise ValueError(
            "dynamic_mask cannot trade whole tensors: their sizes differ, so the density would"
            " change. Use unit='channel' or 'block' here, or fisher_mask."
        )
    if not isinstance(pattern, UnitPattern):
        raise TypeError(f"dynamic_mask takes Unstructured or Structured, got {pattern!r}.")
    return pattern
