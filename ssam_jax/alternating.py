"""`alternating`: sharpness-aware training for loops that cannot pass ``grad_fn``."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssam_jax._base import shardings, trees
from ssam_jax.ascent.ball import Normalize, perturb
from ssam_jax.masks.rule import OTHER_STATE, MaskRule
from ssam_jax.sam import (
    advance,
    check_options,
    check_state,
    check_update,
    init_state,
    mask_in,
    radius_at,
)
from ssam_jax.state import SsamState
from ssam_jax.typing import Gradients, Params, Scalar, Schedule


class AlternatingState(NamedTuple):
    """State of `alternating`.

    Attributes:
      phase: int32 scalar, the ascent calls made since the last descent, 0 to ``ascent_steps``.
      anchor: the parameters ``w`` to descend from, as the first ascent call saw them.
      ssam: a `SsamState`, which counts the descents.
      opt_state: the state of the wrapped optimizer.
    """

    phase: jax.Array
    anchor: Params
    ssam: SsamState
    opt_state: optax.OptState


def alternating(
    optimizer: optax.GradientTransformation,
    rho: Scalar | Schedule,
    mask: MaskRule | None = None,
    *,
    normalize: Normalize = "global",
    adaptive: bool = False,
    ascent_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap a whole optimizer so that plain ``tx.update(grads, state, params)`` calls alternate.

    One call moves the parameters to ``w + eps`` (``ascent_steps`` calls do, if there are more), the
    next takes the optimizer's step from ``w`` with the gradient at ``w + eps``. The optimizer's state,
    schedules and weight decay advance on descent calls only. It is the equal of
    ``optax.contrib.sam`` in its default mode, and of `ssam` before ``optimizer`` in a chain.

    The trainer should pass the same batch to the calls of one round, or at least reckon with half
    as many steps. Evaluate after a descent call, when ``state.phase`` is 0: in between, the
    parameters are perturbed. A copy of the parameters is kept in the state.

    Args:
      optimizer: any optax optimizer; extra arguments of ``update`` are passed on to it.
      rho: as for `ssam`; a schedule sees the number of descents.
      mask: as for `ssam`. The rule gets None for ``ascent_grads``, which are gone by the descent.
      normalize: as for `ssam`.
      adaptive: as for `ssam`.
      ascent_steps: as for `ssam`: ascent calls before each descent call.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with an `AlternatingState`.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range.

    >>> import jax, jax.numpy as jnp, optax
    >>> tx = alternating(optax.sgd(0.5), rho=0.1)
    >>> params = jnp.array([3.0, 4.0])
    >>> state = tx.init(params)
    >>> for _ in range(2):  # ascent, descent
    ...     grads = jax.grad(lambda p: jnp.sum(p**2) / 2)(params)
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params
    Array([1.47, 1.96], dtype=float32)
    """
    check_options(rho, mask, normalize=normalize, adaptive=adaptive, ascent_steps=ascent_steps)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer must be an optax.GradientTransformation, got {optimizer!r}.")
    optimizer = optax.with_extra_args_support(optimizer)
    ascents = ascent_steps or 1

    def init(params: Params) -> AlternatingState:
        return AlternatingState(
            phase=shardings.beside(jnp.zeros((), jnp.int32), params),
            anchor=jax.tree.map(jnp.copy, params),  # so that both can be donated
            ssam=init_state(params, mask),
            opt_state=optimizer.init(params),
        )

    def update(
        updates: Gradients, state: AlternatingState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Gradients, AlternatingState]:
        check_update(updates, params)
        _check_state(state, params, mask)
        descend = state.phase == ascents
        anchor = trees.where(state.phase == 0, params, state.anchor)
        perturbed = perturb(
            params,
            updates,
            rho=radius_at(rho, state.ssam.step),
            mask=None if mask is None else mask_in(state.ssam, params),
            normalize=normalize,
            adaptive=adaptive,
        )
        step, opt_state = optimizer.update(updates, state.opt_state, anchor, **extra_args)

        def move(p: jax.Array, up: jax.Array, w: jax.Array, u: jax.Array) -> jax.Array:
            p32, up, w = map(trees.widened, (p, up, w))
            return jnp.where(descend, w - p32 + u.astype(w.dtype), up - p32).astype(u.dtype)

        new = AlternatingState(
            phase=jnp.where(descend, 0, state.phase + 1),
            anchor=anchor,
            ssam=jax.lax.cond(
                descend,
                lambda: advance(state.ssam, mask, anchor, None, updates, **extra_args),
                lambda: state.ssam,
            ),
            opt_state=trees.where(descend, opt_state, state.opt_state),
        )
        return jax.tree.map(move, params, perturbed, anchor, step), new

    return optax.GradientTransformationExtraArgs(init, update)


def _check_state(state: Any, params: Params, mask: MaskRule | None) -> None:
    if not isinstance(state, AlternatingState):
        raise TypeError(
            "state must be the AlternatingState that this alternating's init(params) returned, got"
            f" {type(state).__name__}. A checkpoint is restored into tx.init(params)."
        )
    trees.check_same_shapes(state.anchor, params, "the anchor in the state", "params", OTHER_STATE)
    check_state(state.ssam, params, mask)
