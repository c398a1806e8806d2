"""Measures of what sharpness-aware training minimizes: rises of the loss, Hessian spectra, loss surfaces.

They take any ``loss_fn(params, batch)``, any pytree of parameters, and several batches. They need the extra
``sharpness``. docs/sharpness.md explains them.
"""

from ssam_jax.sharpness.hessian import hessian_eigenpairs as hessian_eigenpairs
from ssam_jax.sharpness.hessian import hessian_trace as hessian_trace
from ssam_jax.sharpness.hessian import spectral_density as spectral_density
from ssam_jax.sharpness.results import Eigenpairs as Eigenpairs
from ssam_jax.sharpness.results import Estimate as Estimate
from ssam_jax.sharpness.results import LossLine as LossLine
from ssam_jax.sharpness.results import LossPlane as LossPlane
from ssam_jax.sharpness.results import SpectralDensity as SpectralDensity
from ssam_jax.sharpness.results import WorstCase as WorstCase
from ssam_jax.sharpness.rises import average_rise as average_rise
from ssam_jax.sharpness.rises import worst_case_rise as worst_case_rise
from ssam_jax.sharpness.surface import filter_normalized_direction as filter_normalized_direction
from ssam_jax.sharpness.surface import loss_along as loss_along
from ssam_jax.sharpness.surface import loss_over as loss_over
