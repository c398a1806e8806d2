"""`alternating`: sharpness-aware training for loops that cannot pass ``grad_fn``."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssam_jax._base import shardings, trees
from ssam_jax.ascent.radii import RadiusRule
from ssam_jax.combine import Combine
from ssam_jax.factors import Factors, check_ascent_steps, check_optimizer
from ssam_jax.masks.rule import MaskRule
from ssam_jax.state import SsamState, find
from ssam_jax.typing import Gradients, Normalize, Params, PyTree, Scalar, Schedule


class AlternatingState(NamedTuple):
    """State of `alternating`.

    Attributes:
      phase: int32 scalar, the ascent calls made since the last descent, 0 to ``ascent_steps``.
      anchor: the parameters ``w`` to descend from, as the first ascent call saw them.
      radius: floating-point scalar, the radius of this round.
      grads: the gradient at ``w``, for a combine; ``()`` without one.
      ssam: a `SsamState`, which counts the descents.
      opt_state: the state of the wrapped optimizer.
    """

    phase: jax.Array
    anchor: Params
    radius: jax.Array
    grads: Gradients
    ssam: SsamState
    opt_state: optax.OptState


def alternating(
    optimizer: optax.GradientTransformation,
    rho: Scalar | Schedule | RadiusRule,
    mask: MaskRule | None = None,
    *,
    direction: optax.GradientTransformation | None = None,
    combine: Combine | None = None,
    normalize: Normalize = "global",
    adaptive: bool = False,
    ascent_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that plain ``tx.update(grads, state, params)`` calls alternate.

    One call moves the parameters to ``w + eps`` (``ascent_steps`` calls do, if there are more), the
    next takes the optimizer's step from ``w`` with the gradient at ``w + eps``. The optimizer's state,
    schedules and weight decay advance on descent calls only. It equals ``optax.contrib.sam`` in its default
    mode, and `ssam` before ``optimizer`` in a chain.

    The trainer should pass the same batch to the calls of one round, or count half as many steps. Evaluate
    with `alternating_eval_params`: between the calls of a round the parameters are perturbed. The state keeps
    a copy of the parameters.

    Args:
      optimizer: any optax optimizer; extra arguments of ``update`` are passed on to it.
      rho: as for `ssam`; a schedule sees the number of descents.
      mask: as for `ssam`. The rule gets None for ``ascent_grads`` where there is no ``combine``.
      direction: as for `ssam`; ``directions.base_momentum()`` too.
      combine: as for `ssam`. The state keeps the gradient at ``w`` for it.
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
    factors = Factors(rho, mask, direction, combine, normalize, adaptive)
    optimizer = check_optimizer(optimizer)
    check_ascent_steps(ascent_steps)
    ascents = ascent_steps or 1
    float_dtype = jnp.result_type(float)

    def init(params: Params) -> AlternatingState:
        state = factors.init(params)
        return AlternatingState(
            phase=shardings.beside(jnp.zeros((), jnp.int32), params),
            anchor=jax.tree.map(trees.copied, params),  # so that both can be donated
            radius=shardings.beside(jnp.zeros((), float_dtype), params),
            grads=()
            if combine is None
            else jax.tree.map(lambda p: shardings.zeros_like(p, jnp.result_type(p)), params),
            ssam=state,
            opt_state=optimizer.init(params),
        )

    def update(
        updates: Gradients, state: AlternatingState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Gradients, AlternatingState]:
        factors.check_wrapped(updates, state, AlternatingState, "anchor", params)
        state = state._replace(ssam=factors.boxed(state.ssam, params))
        starts, descends = state.phase == 0, state.phase == ascents
        anchor = trees.where(starts, params, state.anchor)

        # The ascent, which a descent call computes and throws away: cheaper than a conditional.
        known = {**extra_args, "base_state": state.opt_state}
        radius, chosen = factors.radius_of(state.ssam, updates, params, **known)
        radius = jnp.where(starts, jnp.asarray(radius, float_dtype), state.radius)
        uphill, chosen = factors.uphill(chosen, updates, params, **known)
        point = factors.point(params, uphill, radius, factors.mask_of(state.ssam, params))
        ssam = state.ssam._replace(
            direction=trees.where(starts, chosen.direction, state.ssam.direction),
            radius=trees.where(starts, chosen.radius, state.ssam.radius),
        )

        # The descent, likewise.
        grads, descent, joined, known_grads = (), updates, state.ssam.combine, None
        if combine is not None:
            descent, joined = _combined(combine, state, updates, anchor)
            joined = trees.where(descends, joined, state.ssam.combine)
            known_grads = state.grads
            grads = jax.tree.map(
                lambda g, old: jnp.where(starts, g.astype(old.dtype), old), updates, state.grads
            )
        step, opt_state = optimizer.update(descent, state.opt_state, anchor, **extra_args)
        ssam = ssam._replace(combine=joined)
        ssam = factors.advance(ssam, anchor, known_grads, descent, when=descends, **extra_args)

        def move(p: jax.Array, up: jax.Array, w: jax.Array, u: jax.Array) -> jax.Array:
            p, up, w = map(trees.widened, (p, up, w))
            return jnp.where(descends, w - p + u.astype(w.dtype), up - p).astype(u.dtype)

        new = AlternatingState(
            phase=jnp.where(descends, 0, state.phase + 1),
            anchor=anchor,
            radius=radius,
            grads=grads,
            ssam=factors.unboxed(ssam, params),
            opt_state=trees.where(descends, opt_state, state.opt_state),
        )
        return jax.tree.map(move, params, point, anchor, step), new

    return optax.GradientTransformationExtraArgs(init, update)


def alternating_eval_params(opt_state: PyTree, params: Params) -> Params:
    """Return the parameters ``w`` to evaluate and save with, in the middle of a round too.

    Args:
      opt_state: the state of an optimizer with one `alternating` somewhere in it.
      params: the parameters that the trainer holds, which are ``w`` after a descent and ``w + eps`` else.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: there is no `alternating` in ``opt_state``, or more than one.
    """
    state = find(opt_state, AlternatingState)
    anchor = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(state.anchor))
    return trees.where(state.phase == 0, params, anchor)


def _combined(
    combine: Combine, state: AlternatingState, perturbed: Gradients, params: Params
) -> tuple[Gradients, PyTree]:
    """Return what a descent call descends along, as if the round had no ascent where its radius is 0."""
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), state.grads, perturbed)
    return trees.where(
        state.radius == 0,
        combine.update(grads, None, state.ssam.combine, params),
        combine.update(grads, perturbed, state.ssam.combine, params),
    )
