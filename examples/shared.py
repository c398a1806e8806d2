"""What several examples do alike."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Rule = tuple[Callable[[Any], Any], Sequence[str]]
"""Whether a value is in range, and the names of the settings that have to be."""


def check_ranges(config: Any, rules: Mapping[str, Rule]) -> None:
    """Raise ValueError, naming the setting, unless all are in range; keys say what the range is."""
    for wanted, (holds, names) in rules.items():
        for name in names:
            if not holds(getattr(config, name)):
                raise ValueError(f"{name} must be {wanted}, got {getattr(config, name)}.")


def axes_of_runs(state: Any) -> Any:
    """Return the axes for ``vmap`` of the state of several runs: 0, and None for step counters.

    Were the counters batched, "is it time to renew the mask?" would be too, ``lax.cond`` would become a
    select, and every step would pay for a renewal.
    """
    return jax.tree.map(lambda leaf: None if leaf.shape == () and leaf.dtype == jnp.int32 else 0, state)
