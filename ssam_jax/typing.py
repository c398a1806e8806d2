"""Names for the things that travel through the library."""

from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import chex
import jax

Params: TypeAlias = Any
"""A pytree of real floating-point arrays; ``None`` subtrees are allowed."""

Gradients: TypeAlias = Any
"""A pytree with the structure and the shapes of the parameters."""

Scores: TypeAlias = Any
"""A pytree of floating-point arrays; a larger entry is more worth perturbing."""

Mask: TypeAlias = Any
"""A pytree of bool arrays that broadcast against the parameters; True is perturbed."""

PyTree: TypeAlias = Any
"""Any pytree, such as a batch, aux, or the state of an optimizer."""

Scalar: TypeAlias = chex.Numeric
"""A number of Python or NumPy, or an array of shape ``()``."""

Form: TypeAlias = Literal["explicit", "implicit"]
"""Whether the perturbation is masked, or the backward pass that finds it."""

Normalize: TypeAlias = Literal["global", "masked", "leaf"]
"""The norm that the radius bounds, of the direction, of the masked direction, or of each leaf."""


class GradFn(Protocol):
    """The protocol of ``optax.contrib.sam(opaque_mode=True)``."""

    def __call__(self, params: Params, step: int, /) -> Gradients:
        """Return the gradient at ``params``; ``step`` counts the ascent steps from 0."""


@runtime_checkable
class TwoPassGradFn(Protocol):
    """A gradient function that knows how it was made, as `two_pass_value_and_grad` returns it.

    Its gradients are complete and exact in both forms. Only the active leaves of ``params`` are read; the
    others are those that the clean pass had.

    Attributes:
      partial: whether the ascent gradient that came with it is zero outside the active leaves, so that
        only ``normalize="masked"`` fits it.
      form: ``"explicit"``, or ``"implicit"`` if that ascent gradient comes from a masked backward pass, so
        that the perturbation itself is not masked.
    """

    partial: bool
    form: Form

    def __call__(self, params: Params, step: int = 0, /) -> Gradients:
        """Return the complete gradient at ``params``."""

    def value_and_grad(self, params: Params, step: int, /) -> tuple[Any, Gradients]:
        """Return the loss at ``params``, or ``(loss, aux)``, and the complete gradient."""

    def ascent(self, params: Params, step: int, /) -> Gradients:
        """Return the gradient of the active leaves, zero elsewhere, for a further ascent step."""


class Schedule(Protocol):
    """An optax schedule: the step, an int32 scalar, in; a scalar out."""

    def __call__(self, count: jax.Array, /) -> jax.typing.ArrayLike:
        """Return the value at ``count``."""
