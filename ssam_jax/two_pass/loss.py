"""A loss as a traced program, and what it returns rebuilt from the program's results."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ssam_jax._base import checks, tracing
from ssam_jax.typing import Params, PyTree


class TracedLoss(NamedTuple):
    """A traced loss and how to rebuild its value and aux.

    Attributes:
      traced: its equations; the first result is the loss, the others are the arrays of aux.
      rebuild: from the results to what ``loss_fn`` returns.
    """

    traced: tracing.Traced
    rebuild: Callable[[Sequence[tracing.Value]], PyTree]


def trace_loss(loss_fn: Callable[..., PyTree], params: Params, *args: PyTree, has_aux: bool) -> TracedLoss:
    """Trace ``loss_fn(params, *args)``, or raise unless it returns what it should.

    Leaves of aux that are not arrays, such as strings, are not traced: `TracedLoss.rebuild` puts them back.
    """
    static: list[object] = []
    aux = jax.tree.structure(())

    def flat(params: Params, *args: PyTree) -> list[jax.Array]:
        nonlocal aux
        value = loss_fn(params, *args)
        leaves: list[PyTree] = []
        if has_aux:
            value, rest = checks.loss_and_aux(value)
            leaves, aux = jax.tree.flatten(rest)
            static[:] = [_ARRAY if _is_array(leaf) else leaf for leaf in leaves]
        checks.loss(value)
        return [value, *filter(_is_array, leaves)]

    traced = tracing.trace(flat, params, *args)

    def rebuild(results: Sequence[tracing.Value]) -> PyTree:
        value, *arrays = results
        if not has_aux:
            return value
        remaining = iter(arrays)
        leaves = [next(remaining) if leaf is _ARRAY else leaf for leaf in static]
        return value, jax.tree.unflatten(aux, leaves)

    return TracedLoss(traced, rebuild)


_ARRAY = object()


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))
