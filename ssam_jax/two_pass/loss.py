"""A loss, traced, and what it returns made again from the results of its equations."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ssam_jax._base import checks, tracing
from ssam_jax.typing import Params


class TracedLoss(NamedTuple):
    """A traced loss and how to make its value and aux again.

    Attributes:
      traced: its equations; the first result is the loss, the others the arrays of aux.
      rebuild: from the results to what ``loss_fn`` returns.
    """

    traced: tracing.Traced
    rebuild: Callable[[Sequence[Any]], Any]


def trace_loss(loss_fn: Callable[..., Any], params: Params, *args: Any, has_aux: bool) -> TracedLoss:
    """Trace ``loss_fn(params, *args)``, or raise unless it returns what it should."""
    static: list[Any] = []
    aux: Any = None

    def flat(params: Params, *args: Any) -> list[Any]:
        nonlocal aux
        value = loss_fn(params, *args)
        leaves: list[Any] = []
        if has_aux:
            value, rest = checks.loss_and_aux(value)
            leaves, aux = jax.tree.flatten(rest)
            static[:] = [_ARRAY if _is_array(leaf) else leaf for leaf in leaves]
        checks.loss(value)
        return [value, *filter(_is_array, leaves)]

    traced = tracing.trace(flat, params, *args)

    def rebuild(results: Sequence[Any]) -> Any:
        value, *arrays = results
        if not has_aux:
            return value
        remaining = iter(arrays)
        leaves = [next(remaining) if leaf is _ARRAY else leaf for leaf in static]
        return value, jax.tree.unflatten(aux, leaves)

    return TracedLoss(traced, rebuild)


_ARRAY = object()


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))
