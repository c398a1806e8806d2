"""What sharpness-aware training minimises, measured: rises of the loss, Hessian spectra, loss surfaces."""

from ssam_jax.sharpness.results import Eigenpairs as Eigenpairs
from ssam_jax.sharpness.results import Estimate as Estimate
from ssam_jax.sharpness.results import LossLine as LossLine
from ssam_jax.sharpness.results import LossPlane as LossPlane
from ssam_jax.sharpness.results import SpectralDensity as SpectralDensity
from ssam_jax.sharpness.results import WorstCase as WorstCase
