"""Names for the things that travel through the library."""

from typing import Any, Protocol, TypeAlias

import chex
import jax

Params: TypeAlias = chex.ArrayTree
"""Any pytree of floating-point arrays; ``None`` subtrees are allowed."""

Gradients: TypeAlias = chex.ArrayTree
"""A pytree with the structure and the shapes of the parameters."""

Scores: TypeAlias = chex.ArrayTree
"""A pytree of floating-point arrays; a larger entry is more worth perturbing."""

Mask: TypeAlias = chex.ArrayTree
"""A pytree of bool arrays that broadcast against the parameters; True is perturbed."""

Scalar: TypeAlias = float | jax.Array
"""A Python number or an array of shape ``()``."""


class GradFn(Protocol):
    """The protocol of ``optax.contrib.sam(opaque_mode=True)``."""

    def __call__(self, params: Params, step: int, /) -> Gradients:
        """Return the gradient at ``params``; ``step`` counts the ascent steps from 0."""


class Schedule(Protocol):
    """An optax schedule: the step, an int32 scalar, in; a scalar out."""

    def __call__(self, count: Any, /) -> Any:
        """Return the value at ``count``."""
