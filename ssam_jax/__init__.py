"""Sharpness-aware minimization for JAX: five factors on three carriers, as optax transformations."""

from ssam_jax import combine as combine
from ssam_jax.alternating import AlternatingState as AlternatingState
from ssam_jax.alternating import alternating as alternating
from ssam_jax.alternating import alternating_eval_params as alternating_eval_params
from ssam_jax.ascent import directions as directions
from ssam_jax.ascent import radii as radii
from ssam_jax.ascent.radii import RadiusRule as RadiusRule
from ssam_jax.carried import CarriedState as CarriedState
from ssam_jax.carried import carried as carried
from ssam_jax.carried import carried_eval_params as carried_eval_params
from ssam_jax.carried import carried_set_params as carried_set_params
from ssam_jax.combine import Combine as Combine
from ssam_jax.evaluation import eval_params as eval_params
from ssam_jax.masks.dynamic import dynamic_mask as dynamic_mask
from ssam_jax.masks.fisher import empirical_fisher as empirical_fisher
from ssam_jax.masks.fisher import fisher_mask as fisher_mask
from ssam_jax.masks.fixed import fixed_mask as fixed_mask
from ssam_jax.masks.fixed import random_mask as random_mask
from ssam_jax.masks.patterns import NM as NM
from ssam_jax.masks.patterns import Pattern as Pattern
from ssam_jax.masks.patterns import Structured as Structured
from ssam_jax.masks.patterns import Unstructured as Unstructured
from ssam_jax.masks.rule import MaskRule as MaskRule
from ssam_jax.masks.rule import MaskState as MaskState
from ssam_jax.sam import ssam as ssam
from ssam_jax.state import MaskStats as MaskStats
from ssam_jax.state import SsamState as SsamState
from ssam_jax.state import get_mask as get_mask
from ssam_jax.state import mask_stats as mask_stats
from ssam_jax.state import set_mask as set_mask
from ssam_jax.two_pass.active import FirstRow as FirstRow
from ssam_jax.two_pass.active import active_leaves as active_leaves
from ssam_jax.two_pass.passes import two_pass_value_and_grad as two_pass_value_and_grad
from ssam_jax.two_pass.planning.report import Part as Part
from ssam_jax.two_pass.planning.report import TwoPassReport as TwoPassReport
from ssam_jax.two_pass.planning.report import choose_active as choose_active
from ssam_jax.two_pass.planning.report import explain_two_pass as explain_two_pass
from ssam_jax.typing import TwoPassGradFn as TwoPassGradFn

__version__ = "0.1.0"
