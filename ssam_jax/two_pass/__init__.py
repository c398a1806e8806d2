"""Two-pass gradients: both gradients of a step from one trace of the loss.

Behind the door: `passes` computes them, from a loss (`loss`) that `splitting` splits by data flow into what
depends on an active leaf (`active`) and what does not. `primitives` is the table of what is known about JAX's
primitives, `rows` keeps the rows of stacked leaves apart, ``implicit`` masks the first backward pass, and
``planning`` predicts costs and chooses leaves for a budget.
"""

from ssam_jax.two_pass.active import FirstRow, active_leaves
from ssam_jax.two_pass.passes import two_pass_value_and_grad
from ssam_jax.two_pass.planning.report import Part, TwoPassReport, choose_active, explain_two_pass

__all__ = [
    "FirstRow",
    "Part",
    "TwoPassReport",
    "active_leaves",
    "choose_active",
    "explain_two_pass",
    "two_pass_value_and_grad",
]
