"""Masks from dynamic sparse training (SSAM-D): drop the flattest, grow others."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from ssam_jax._base import checks, shardings, trees
from ssam_jax.masks import trading
from ssam_jax.masks.fitting import check_pattern
from ssam_jax.masks.patterns import NM, Pattern, Structured, UnitPattern, Unstructured
from ssam_jax.masks.rule import MaskRule, OnBits
from ssam_jax.typing import Gradients, Mask, Params, PyTree, Scalar, Schedule, Scores

Criterion: TypeAlias = (
    Literal["gradient", "weight", "random"] | Callable[[Params, Gradients | None, Gradients], Scores]
)
"""The score by which entries are dropped or grown, by name or as a function of your own."""


def dynamic_mask(
    pattern: Pattern,
    *,
    refresh_every: int,
    drop_fraction: float | Schedule = 0.5,
    total_steps: int | None = None,
    drop: Criterion = "gradient",
    grow: Criterion = "random",
    score: Literal["descent", "ascent"] = "descent",
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
      drop: the score by which to drop: ``"gradient"``, the magnitude of the gradient (the paper's choice: the
        flattest go); ``"weight"``, that of the parameter; ``"random"``; or a function
        ``(params, ascent_grads, descent_grads) -> scores`` of your own, ranked by their magnitude, whose
        ``ascent_grads`` are None where `MaskRule` says so. A unit's score is the mean over it.
      grow: the score by which to grow, the largest first; the same choices.
      score: which gradient ``"gradient"`` means: ``"descent"``, at ``w + eps``, the only one that is exact
        and complete in every form; or ``"ascent"``, at ``w``, as the authors' code has it. Neither `carried`
        nor `alternating` without a ``combine`` keeps the latter, and two-pass gradients with ``active`` or of
        the implicit form are not all of it.
      seed: seed of the first mask and of everything drawn later, as for `MaskRule`.
      packed: as for `MaskRule`.

    Returns:
      A `MaskRule` without memory. With ``score="ascent"`` its ``observe`` raises ValueError where there is no
      ascent gradient.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range, the pattern cannot be traded at constant density, or ``score``
        is ``"ascent"`` and neither ``drop`` nor ``grow`` is ``"gradient"``.
    """
    units = _tradable(pattern)
    if refresh_every is None:
        raise ValueError("refresh_every must be an int: without refresh, use random_mask(pattern).")
    _check_criteria(drop, grow, score)
    fraction = _drop_schedule(drop_fraction, total_steps)

    def observe(
        memory: PyTree,
        params: Params,
        ascent_grads: Gradients | None,
        descent_grads: Gradients,
        step: jax.Array,
        **extra: Any,
    ) -> PyTree:
        del memory, params, step, extra
        if score == "ascent" and ascent_grads is None:
            raise ValueError(_NO_ASCENT)
        gradient = ascent_grads if score == "ascent" else descent_grads
        return gradient, *((ascent_grads, descent_grads) if callable(drop) or callable(grow) else ())

    def select(grads: PyTree, mask: Mask | None, params: Params, key: jax.Array, step: jax.Array) -> Mask:
        return shardings.computed_like(params, traded, key, mask, grads, fraction(step))

    def bits(
        grads: PyTree, bits: Mask, params: Params, key: jax.Array, step: jax.Array
    ) -> tuple[Mask, jax.Array]:
        share = jnp.asarray(fraction(step))
        return trading.traded_bits(units, bits, params, *scores(params, grads), share, key)

    def traded(params: Params, key: jax.Array, mask: Mask, grads: PyTree, share: jax.Array) -> Mask:
        return trading.traded(units, mask, params, *scores(params, grads), share, key)

    def scores(params: Params, grads: PyTree) -> tuple[Scores | None, Scores | None]:
        known = {"gradient": grads[0], "weight": params, "random": None}
        dropped, grown = (
            _scores(name, by, params, *grads[1:]) if callable(by) else known[by]
            for name, by in (("drop", drop), ("grow", grow))
        )
        return dropped, grown

    selects = OnBits(select, bits) if isinstance(units, Unstructured) else select
    return MaskRule(
        None,
        observe,
        selects,
        refresh_every,
        seed=seed,
        packed=packed,
        keeps_memory=False,
        first=pattern,
    )


_NO_ASCENT = (
    "dynamic_mask(score='ascent') needs the complete gradient at w on every step, and there is none: carried"
    " keeps none, alternating keeps it for a combine (combine=ssam_jax.combine.replace() changes no step),"
    " and two_pass_value_and_grad computes a part of it with active or form='implicit'. Use ssam with a"
    " grad_fn of complete gradients, or score='descent'."
)


def _check_criteria(drop: Criterion, grow: Criterion, score: str) -> None:
    names = ("gradient", "weight", "random")
    for name, value in (("drop", drop), ("grow", grow)):
        if callable(value):
            checks.takes(name, value, "params", "ascent_grads", "descent_grads")
        else:
            checks.choice(name, value, names, also=", or a function of (params, ascent_grads, descent_grads)")
    checks.choice("score", score, ("descent", "ascent"))
    if score == "ascent" and "gradient" not in (drop, grow):
        raise ValueError(
            "score='ascent' says which gradient 'gradient' means: give drop='gradient' or grow='gradient',"
            f" got drop={drop!r:.60} and grow={grow!r:.60}."
        )


def _scores(name: str, function: Callable[..., Scores], params: Params, *grads: PyTree) -> Scores:
    """Return the scores of a function of the user's, or raise unless they are such."""
    scores = function(params, *grads)
    trees.check_same_shapes(scores, params, f"what {name} returns", "params")
    trees.check_floating(scores, f"what {name} returns", "return a score for each entry")
    return scores


def _drop_schedule(drop_fraction: float | Schedule, total_steps: int | None) -> Schedule:
    if callable(drop_fraction):
        checks.takes("drop_fraction", drop_fraction, "step")
        if total_steps is None:
            return lambda step: _fraction(drop_fraction(step))
    checks.integer(
        "total_steps",
        total_steps,
        remedy="; it can be left out only when drop_fraction is a schedule",
    )
    assert total_steps is not None
    if callable(drop_fraction):
        return lambda step: jnp.where(step < total_steps, _fraction(drop_fraction(step)), 0)
    checks.number("drop_fraction", drop_fraction, low=0, high=1, also=" or a schedule")

    def cosine(step: jax.Array) -> jax.Array:
        progress = jnp.minimum(step.astype(jnp.float32) / total_steps, 1)
        return drop_fraction / 2 * (1 + jnp.cos(math.pi * progress))

    return cosine


def _fraction(value: Scalar) -> Scalar:
    """Return what a schedule for the drop fraction returned, or raise unless it is a real scalar."""
    if not checks.is_kind(value, jnp.floating, jnp.integer) or jnp.shape(value) != ():
        raise TypeError(f"drop_fraction, a schedule, must return a real scalar, got {value!r}.")
    return value


def _tradable(pattern: Pattern) -> UnitPattern:
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
