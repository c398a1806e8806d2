"""Several runs at once, by ``vmap`` over their seeds."""

from typing import Any

import jax
import jax.numpy as jnp


def axes_of_runs(state: Any) -> Any:
    """Return the axes for ``vmap`` of the state of several runs: 0, and None for step counters.

    With batched counters, the question "is it time to refresh the mask?" would be batched too. Then
    ``lax.cond`` becomes a select, and every step pays for a refresh.
    """
    return jax.tree.map(lambda leaf: None if leaf.shape == () and leaf.dtype == jnp.int32 else 0, state)
