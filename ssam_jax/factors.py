"""The five factors of a step, checked once, and what the three carriers do with them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssam_jax._base import boxes, checks, shardings, trees
from ssam_jax.ascent import radii
from ssam_jax.ascent.ball import perturb
from ssam_jax.ascent.radii import RadiusRule
from ssam_jax.combine import DEFAULT, Combine
from ssam_jax.masks import rule as mask_rule
from ssam_jax.masks.fitting import OTHER_STATE, fitted
from ssam_jax.masks.rule import MaskRule, MaskState
from ssam_jax.state import SsamState
from ssam_jax.typing import Gradients, Mask, Normalize, Params, PyTree, Scalar, Schedule

ALONE = "Both must be the gradient alone, without loss or aux."
"""What to do about gradients that are no gradients."""


@dataclasses.dataclass(frozen=True)
class Factors:
    """Direction, mask, radius, ball and combine.

    Attributes:
      rho: the radius as the user gave it.
      mask: None perturbs everything.
      direction: None is the gradient.
      combine: None is the perturbed gradient.
      normalize: the ball's norm.
      adaptive: whether the ball is ASAM's.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range.
    """

    rho: Scalar | Schedule | RadiusRule
    mask: MaskRule | None = None
    direction: optax.GradientTransformation | None = None
    combine: Combine | None = None
    normalize: Normalize = "global"
    adaptive: bool = False

    def __post_init__(self) -> None:
        radii.check_rho(self.rho)
        if not isinstance(self.mask, MaskRule | None):
            raise TypeError(
                "mask must be None or a MaskRule such as fisher_mask(pattern, refresh_every=100) or"
                f" fixed_mask(tree), got {self.mask!r}."
            )
        if not isinstance(self.direction, optax.GradientTransformation | None):
            raise TypeError(
                "direction must be None, for the gradient, or an optax.GradientTransformation such as"
                f" optax.ema(0.9) or directions.friendly(), got {self.direction!r}."
            )
        if not isinstance(self.combine, Combine | None):
            raise TypeError(
                "combine must be None, for the perturbed gradient, or a Combine such as"
                f" combine.weighted(0.5), got {self.combine!r}."
            )
        checks.choice("normalize", self.normalize, ("global", "masked", "leaf"))
        checks.flag("adaptive", self.adaptive)

    @property
    def joined(self) -> Combine:
        """How the two gradients become one."""
        return DEFAULT if self.combine is None else self.combine

    @property
    def radius(self) -> RadiusRule:
        """The radius as a rule."""
        return radii.as_rule(self.rho)

    def init(self, params: Params) -> SsamState:
        """Return the state before the first step, its mask already made."""
        trees.check_not_partial(params)
        trees.check_floating(params, "params")
        sizes = [float(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(params)]
        state = SsamState(
            step=jnp.zeros((), jnp.int32),
            leaf_sizes=jnp.array(sizes, jnp.float32),
            mask=() if self.mask is None else mask_rule.init(self.mask, params),
            direction=() if self.direction is None else self.direction.init(params),
            radius=self.radius.init(params),
            combine=self.joined.init(params),
        )
        return self.unboxed(shardings.beside(state, params), params)

    def boxed(self, state: SsamState, params: Params) -> SsamState:
        """Return a state with all arrays in the boxes of their parameters, as the factors expect them."""
        if not boxes.any_in(params):
            return state
        mask, fields = state.mask, {"radius": self.radius.init, "combine": self.joined.init}
        if self.mask is not None and isinstance(mask, MaskState):
            mask = mask_rule.boxed(self.mask, mask, params)
        if self.direction is not None:
            fields["direction"] = self.direction.init
        made = {
            name: boxes.filled(jax.eval_shape(init, params), getattr(state, name))
            for name, init in fields.items()
        }
        return state._replace(mask=mask, **made)

    def unboxed(self, state: SsamState, params: Params) -> SsamState:
        """Return a state to keep: what has not the shape of its parameter lies outside of its box."""
        return boxes.outside(state, params)

    def uphill(
        self, state: SsamState, grads: Gradients, params: Params, **extra: Any
    ) -> tuple[Gradients, SsamState]:
        """Return the direction of this gradient and the state that has seen it."""
        if self.direction is None:
            return grads, state
        update = optax.with_extra_args_support(self.direction).update
        direction, new = update(grads, state.direction, params, **extra)
        trees.check_same_shapes(direction, grads, "what direction returns", "the gradient")
        return direction, state._replace(direction=new)

    def radius_of(
        self, state: SsamState, grads: Gradients, params: Params, **extra: Any
    ) -> tuple[Scalar, SsamState]:
        """Return the radius of this step and the state that has chosen it."""
        radius, new = self.radius.update(state.radius, grads, params, state.step, **extra)
        if isinstance(self.rho, RadiusRule):
            radii.check_radius(radius, "what the rule rho returns", "a float or a scalar array")
        return radius, state._replace(radius=new)

    def point(self, params: Params, direction: Gradients, radius: Scalar, mask: Mask | None) -> Params:
        """Return ``w + eps``."""
        return perturb(
            params, direction, rho=radius, mask=mask, normalize=self.normalize, adaptive=self.adaptive
        )

    def mask_of(self, state: SsamState, params: Params) -> Mask | None:
        """Return the mask of this step, or raise unless it fits the parameters."""
        if not isinstance(state.mask, MaskState):
            return None
        return fitted(state.mask.mask, params, OTHER_STATE)

    def advance(
        self,
        state: SsamState,
        params: Params,
        ascent_grads: Gradients | None,
        descent_grads: Gradients,
        *,
        when: bool | jax.Array = True,
        **extra: Any,
    ) -> SsamState:
        """Return the state after a step: the count one up, the mask rule told of the gradients.

        Where ``when`` is False, it is the state before.
        """
        mask = state.mask
        if self.mask is not None and isinstance(mask, MaskState):
            mask = mask_rule.update(
                self.mask, mask, params, ascent_grads, descent_grads, state.step, when=when, **extra
            )
        step = optax.safe_increment(state.step)
        return state._replace(step=step if when is True else jnp.where(when, step, state.step), mask=mask)

    def check(self, grads: Gradients, state: SsamState, params: Params | None) -> None:
        """Raise unless a step can start from this gradient, this state and these parameters."""
        if params is None:
            raise ValueError(
                "ssam needs the parameters: call tx.update(grads, state, params, grad_fn=grad_fn)."
            )
        trees.check_not_partial(params)
        trees.check_floating(params, "params")
        check_gradient(grads, params, "the gradient", "params")
        self._check_state(state, params)

    def check_wrapped(
        self, grads: Gradients, state: PyTree, kind: type[Any], kept: str, params: Params | None
    ) -> None:
        """Raise unless a step of a carrier that wraps an optimizer can start here.

        Args:
          grads: the gradient.
          state: what should be a state of this ``kind``, with a `SsamState` in its field ``ssam``.
          kind: the class of the carrier's states.
          kept: the name of its field that holds parameters.
          params: the parameters that the trainer holds.
        """
        if not isinstance(state, kind):
            carrier = kind.__name__.removesuffix("State").lower()
            raise TypeError(
                f"state must be the {kind.__name__} that this {carrier}'s init(params) returned, got"
                f" {type(state).__name__}. A checkpoint is restored into tx.init(params): see"
                " docs/guides/checkpoints.md."
            )
        self.check(grads, state.ssam, params)
        name = f"the {kept} in the state"
        trees.check_same_shapes(getattr(state, kept), params, name, "params", OTHER_STATE)

    def _check_state(self, state: SsamState, params: Params) -> None:
        if not isinstance(state, SsamState):
            raise TypeError(
                "state must be the SsamState that this ssam's init(params) returned, got"
                f" {type(state).__name__}. That of a chain goes to the chain's own update; and a checkpoint"
                " is restored into tx.init(params), since without it Orbax and Flax return plain dicts and"
                " lists: see docs/guides/checkpoints.md."
            )
        leaves, shape = len(jax.tree.leaves(params)), getattr(state.leaf_sizes, "shape", None)
        if shape != (leaves,):
            raise ValueError(
                f"state must be that of these parameters, of {leaves} leaves, got one whose leaf_sizes have"
                f" the shape {shape}. {OTHER_STATE}"
            )
        if (self.mask is None) != (not isinstance(state.mask, MaskState)):
            wanted, found = ("no mask", "one") if self.mask is None else ("a mask", "none")
            raise TypeError(
                f"state must hold {wanted}, as this ssam's init(params) makes it, got {found}. {OTHER_STATE}"
            )


def check_gradient(grads: Gradients, like: Params, name: str, like_name: str) -> Gradients:
    """Return ``grads`` in the structure of ``like``, or raise unless it is a gradient of such parameters."""
    grads = boxes.like(grads, like)
    trees.check_same_shapes(grads, like, name, like_name, ALONE)
    trees.check_floating(grads, name, "take it with jax.grad of a real loss of real parameters")
    return grads


def check_ascent_steps(ascent_steps: int | None) -> None:
    """Raise unless there may be so many ascent steps."""
    if ascent_steps is not None:
        checks.integer(
            "ascent_steps",
            ascent_steps,
            also=", or None for 1",
            remedy="; under optax.inject_hyperparams, name it in static_args to keep it an int",
        )


def check_optimizer(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that takes extra arguments, or raise unless it is one."""
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer must be an optax.GradientTransformation, got {optimizer!r}.")
    return optax.with_extra_args_support(optimizer)
