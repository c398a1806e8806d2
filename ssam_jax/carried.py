"""`carried`: sharpness-aware training at the price of one gradient a step."""

from typing import Any, NamedTuple

import jax
import optax

from ssam_jax._base import trees
from ssam_jax.ascent import radii
from ssam_jax.ascent.radii import RadiusRule
from ssam_jax.factors import Factors, check_optimizer
from ssam_jax.masks.rule import MaskRule
from ssam_jax.state import SsamState, find, replace
from ssam_jax.typing import Gradients, Normalize, Params, PyTree, Scalar, Schedule


class CarriedState(NamedTuple):
    """State of `carried`.

    Attributes:
      center: the exact parameters ``w``, in their own dtypes.
      ssam: a `SsamState`.
      opt_state: the state of the wrapped optimizer.
    """

    center: Params
    ssam: SsamState
    opt_state: optax.OptState


def carried(
    optimizer: optax.GradientTransformation,
    rho: Scalar | Schedule | RadiusRule,
    mask: MaskRule | None = None,
    *,
    direction: optax.GradientTransformation | None = None,
    normalize: Normalize = "global",
    adaptive: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap an optimizer so that the parameters the trainer holds are ``w + eps``.

    A step gets the gradient g at the held parameters, takes the optimizer's step from ``w``, weight decay
    included, and perturbs the result for the next step:

    .. math:: w_{t+1} = w_t + \mathrm{optimizer}(g), \quad d = \mathrm{direction}(g), \quad
        p_{t+1} = w_{t+1} + \rho_{t+1} \, m \odot d / \|d\|

    with :math:`p_0 = w_0`. It costs one gradient, one that is one step old as an ascent direction. The exact
    ``w`` is in the state, so that nothing drifts. Evaluate, save and finish with `carried_eval_params`.

    **What you change between steps.** The next step starts from the ``w`` in the state: it does not see held
    parameters that you clip, average or load. Give new ones to the state with `carried_set_params`.

    Args:
      optimizer: any optax optimizer; extra arguments of ``update`` are passed on to it.
      rho: as for `ssam`; the first radius used is that of step 1.
      mask: as for `ssam`. The rule sees ``w``, None for ``ascent_grads``, and g.
      direction: as for `ssam`; None is g itself, the gradient of the last batch (S2-SAM, AsyncSAM).
        ``optax.chain(directions.base_momentum(), optax.scale(-1.0))`` is MSAM (arXiv 2401.12033).
      normalize: as for `ssam`.
      adaptive: as for `ssam`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a `CarriedState`.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range.

    >>> import jax, jax.numpy as jnp, optax
    >>> tx = carried(optax.sgd(0.5), rho=0.1)
    >>> params = jnp.array([3.0, 4.0])
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)  # the gradient of |w|^2 / 2
    >>> params = optax.apply_updates(params, updates)
    >>> params, carried_eval_params(state, params)
    (Array([1.56, 2.08], dtype=float32), Array([1.5, 2. ], dtype=float32))
    """
    factors = Factors(rho, mask, direction, None, normalize, adaptive)
    optimizer = check_optimizer(optimizer)
    never = radii.is_zero(rho)

    def init(params: Params) -> CarriedState:
        # A copy, so that parameters and state can be donated together.
        return CarriedState(jax.tree.map(trees.copied, params), factors.init(params), optimizer.init(params))

    def update(
        updates: Gradients, state: CarriedState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Gradients, CarriedState]:
        factors.check_wrapped(updates, state, CarriedState, "center", params)
        ssam = factors.boxed(state.ssam, params)
        step, opt_state = optimizer.update(updates, state.opt_state, state.center, **extra_args)
        center = optax.apply_updates(state.center, step)

        known = {**extra_args, "base_state": opt_state}
        uphill, ssam = factors.uphill(ssam, updates, state.center, **known)
        ssam = factors.advance(ssam, state.center, None, updates, **extra_args)
        radius, ssam = factors.radius_of(ssam, updates, center, **known)
        point = factors.point(center, uphill, radius, factors.mask_of(ssam, center))

        def move(u: jax.Array, w: jax.Array, p: jax.Array, new_w: jax.Array, new_p: jax.Array) -> jax.Array:
            # The step plus the new eps less the old: it loses nothing of a step that is far smaller than w.
            w, p, new_w, new_p = map(trees.widened, (w, p, new_w, new_p))
            return (u.astype(w.dtype) + ((new_p - new_w) - (p - w))).astype(u.dtype)

        # Without eps the step itself, which the compiler then treats as it does the base optimizer's.
        held = step if never else jax.tree.map(move, step, state.center, params, center, point)
        return held, CarriedState(center, factors.unboxed(ssam, params), opt_state)

    return optax.GradientTransformationExtraArgs(init, update)


def carried_eval_params(opt_state: PyTree, params: Params) -> Params:
    """Return the parameters ``w``, to evaluate, save and finish with.

    Args:
      opt_state: the state of an optimizer with one `carried` somewhere in it.
      params: the parameters that the trainer holds, ``w + eps``; only their structure is read.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: there is no `carried` in ``opt_state``, or more than one.
    """
    center = find(opt_state, CarriedState).center
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(center))


def carried_set_params(opt_state: PyTree, params: Params) -> PyTree:
    """Return ``opt_state`` with other parameters ``w``; hold the same ``params`` for the next step.

    Args:
      opt_state: as for `carried_eval_params`.
      params: the new parameters, of the structure, shapes and dtypes of the old.

    Raises:
      TypeError: a leaf has another dtype.
      ValueError: structure or shapes differ; or there is no `carried` in ``opt_state``, or more than one.
    """
    state = find(opt_state, CarriedState)
    trees.check_same_shapes(params, state.center, "params", "the parameters in the state")
    trees.check_same_dtypes(params, state.center, "params", "the parameters in the state")
    return replace(opt_state, state._replace(center=jax.tree.map(trees.copied, params)))
