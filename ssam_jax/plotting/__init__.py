"""Pictures of what `ssam_jax.sharpness` measures, and of masks over time.

Each function draws on the given axes, or on a new figure, and returns the figure. Save it with
``figure.savefig("name.png")``; a notebook shows it. No function touches pyplot's state.
Colors are Okabe and Ito's and viridis, which color-blind readers can distinguish; line styles differ too.
"""

from ssam_jax.plotting.losses import loss_range as loss_range
from ssam_jax.plotting.losses import plot_loss_along as plot_loss_along
from ssam_jax.plotting.losses import plot_loss_contours as plot_loss_contours
from ssam_jax.plotting.losses import plot_loss_surface as plot_loss_surface
from ssam_jax.plotting.masks import plot_mask_by_layer as plot_mask_by_layer
from ssam_jax.plotting.spectra import plot_spectra as plot_spectra
