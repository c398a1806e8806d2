"""Sharpness-aware minimization for JAX: five factors on three carriers, as optax transformations."""

from ssam_jax import combine
from ssam_jax.alternating import AlternatingState, alternating, alternating_eval_params
from ssam_jax.ascent import directions, radii
from ssam_jax.ascent.radii import RadiusRule
from ssam_jax.carried import CarriedState, carried, carried_eval_params, carried_set_params
from ssam_jax.combine import Combine
from ssam_jax.evaluation import eval_params
from ssam_jax.masks.dynamic import dynamic_mask
from ssam_jax.masks.fisher import empirical_fisher, fisher_mask
from ssam_jax.masks.fixed import fixed_mask, random_mask
from ssam_jax.masks.patterns import NM, Pattern, Structured, Unstructured
from ssam_jax.masks.rule import MaskRule, MaskState
from ssam_jax.sam import ssam
from ssam_jax.state import MaskStats, SsamState, get_mask, mask_stats, set_mask
from ssam_jax.two_pass import (
    FirstRow,
    Part,
    TwoPassReport,
    active_leaves,
    choose_active,
    explain_two_pass,
    two_pass_value_and_grad,
)
from ssam_jax.typing import TwoPassGradFn

__all__ = [
    # Carriers, and the parameters to evaluate with.
    "ssam",
    "alternating",
    "alternating_eval_params",
    "carried",
    "carried_eval_params",
    "carried_set_params",
    "eval_params",
    "SsamState",
    "AlternatingState",
    "CarriedState",
    # Factors: direction, mask, radius, combine.
    "directions",
    "MaskRule",
    "MaskState",
    "fisher_mask",
    "dynamic_mask",
    "random_mask",
    "fixed_mask",
    "Pattern",
    "Unstructured",
    "Structured",
    "NM",
    "empirical_fisher",
    "radii",
    "RadiusRule",
    "combine",
    "Combine",
    # Masks in a state.
    "get_mask",
    "set_mask",
    "mask_stats",
    "MaskStats",
    # Two-pass gradients.
    "two_pass_value_and_grad",
    "TwoPassGradFn",
    "FirstRow",
    "active_leaves",
    "choose_active",
    "explain_two_pass",
    "Part",
    "TwoPassReport",
]

__version__ = "0.2.0"
