"""The parameters to evaluate with, whichever carrier holds them."""

import jax

from ssam_jax.alternating import AlternatingState, alternating_eval_params
from ssam_jax.carried import CarriedState, carried_eval_params
from ssam_jax.typing import Params, PyTree


def eval_params(opt_state: PyTree, params: Params) -> Params:
    """Return the parameters ``w``, to evaluate and save with, whichever carrier trains them.

    A loop that calls it may change between `ssam`, `alternating`, `carried` and no carrier at all.

    Args:
      opt_state: the state of an optimizer.
      params: the parameters that the trainer holds.

    Returns:
      A tree like ``params``: what `carried_eval_params` or `alternating_eval_params` returns, or ``params``.

    Raises:
      ValueError: there are several `carried` or `alternating` in ``opt_state``.
    """
    kinds = (CarriedState, AlternatingState)
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    if any(isinstance(node, CarriedState) for node in nodes):
        return carried_eval_params(opt_state, params)
    if any(isinstance(node, AlternatingState) for node in nodes):
        return alternating_eval_params(opt_state, params)
    return params
