"""Pictures of what `ssam_jax.sharpness` measures, and of masks over time.

Each function draws on the axes it is given, or on a new figure, and returns the figure: save it by
``figure.savefig("name.png")``; in a notebook it shows itself. Nothing of pyplot's state is touched.
Colours are Okabe and Ito's and viridis, which colour-blind readers tell apart; line styles differ too.
"""

from ssam_jax.plotting.losses import loss_range as loss_range
from ssam_jax.plotting.losses import plot_loss_along as plot_loss_along
from ssam_jax.plotting.losses import plot_loss_contours as plot_loss_contours
from ssam_jax.plotting.losses import plot_loss_surface as plot_loss_surface
from ssam_jax.plotting.masks import plot_mask_by_layer as plot_mask_by_layer
from ssam_jax.plotting.spectra import plot_spectra as plot_spectra
