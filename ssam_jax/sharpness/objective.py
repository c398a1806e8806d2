"""What is measured: the mean of a loss over batches, and its derivatives."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ssam_jax._base import checks, shardings, trees
from ssam_jax.sharpness import convolutions
from ssam_jax.typing import Gradients, Params

PROGRAMS = 16
"""The number of compiled programs to keep of each kind, so that the same loss compiles once."""


class Objective(NamedTuple):
    """A loss, the parameters at which it is measured, and the batches.

    Attributes:
      loss_fn: ``loss_fn(params, batch) -> scalar``.
      params: float32 or float64, the one dtype for all leaves.
      batches: a batch whose arrays have a leading axis for the batches.
    """

    loss_fn: Callable[..., jax.Array]
    params: Params
    batches: Any


def objective(loss_fn: Any, params: Any, batches: Any) -> Objective:
    """Check and prepare the arguments of every measure: parameters in one wide dtype, batches stacked.

    Raises:
      TypeError: ``loss_fn`` is not a hashable callable or does not return a real scalar, ``params`` holds
        anything but real floats, or ``batches`` is not a list or another iterable of batches.
      ValueError: there are no parameters or no batches, or the batches differ in structure or shape.
    """
    checks.takes("loss_fn", loss_fn, "params", "batch")
    try:
        hash(loss_fn)
    except TypeError:
        raise TypeError(
            f"loss_fn must be hashable, because compiled programs are kept by it; got a"
            f" {type(loss_fn).__name__}. Wrap it: lambda params, batch: loss_fn(params, batch)."
        ) from None
    params = widened(params)
    if not any(leaf.size for leaf in jax.tree.leaves(params)):
        raise ValueError("params must hold at least one number, got a tree without any.")
    stacked = _stacked(batches)
    _check_scalar(loss_fn, params, stacked)
    return Objective(loss_fn, params, stacked)


def widened(params: Any) -> Params:
    """Return parameters as arrays of one dtype, float32, or float64 if any of them has it.

    Raises:
      TypeError: ``params`` holds anything but real floats.
    """
    trees.check_floating(params, "params")
    dtype = trees.wide_dtype(*jax.tree.leaves(params))
    return jax.tree.map(lambda p: jnp.asarray(p).astype(dtype), params)


def mean_loss(loss_fn: Callable[..., jax.Array], params: Params, batches: Any) -> jax.Array:
    """Return the mean of the loss over stacked batches, a scalar."""
    return _mean_over(loss_fn, batches, params)


def mean_value_and_grad(
    loss_fn: Callable[..., jax.Array], params: Params, batches: Any
) -> tuple[jax.Array, Gradients]:
    """Return the mean loss and its gradient."""
    return _mean_over(jax.value_and_grad(loss_fn), batches, params)


def mean_hessian_product(
    loss_fn: Callable[..., jax.Array], params: Params, vector: Params, batches: Any
) -> Params:
    """Return the Hessian of the mean loss times a vector: the derivative of the gradient along it."""

    def product(params: Params, vector: Params, batch: Any) -> Params:
        return jax.jvp(lambda p: jax.grad(loss_fn)(p, batch), (params,), (vector,))[1]

    return _mean_over(product, batches, params, vector)


def random_like(params: Params, key: jax.Array, draw: Callable[..., jax.Array]) -> Params:
    """Return a tree of ``draw(key, shape, dtype)``, which is the same on any number of devices."""
    leaves, tree = jax.tree.flatten(params)
    drawn = [
        shardings.alike(draw(jax.random.fold_in(key, i), p.shape, p.dtype), p) for i, p in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, drawn)


def count(batches: Any) -> int:
    """Return how many batches are stacked."""
    return int(jax.tree.leaves(batches)[0].shape[0])


def batch(batches: Any, i: int) -> Any:
    """Return one of several stacked batches, with an axis of length 1."""
    return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, i, i + 1), batches)


def _first(batches: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.index_in_dim(x, 0, keepdims=False), batches)


def _mean_over(fn: Callable[..., Any], batches: Any, *args: Any) -> Any:
    """Return the mean of ``fn(*args, batch)``, one batch at a time; equal weight to each."""
    ready = convolutions.loop_ready(fn)
    first = _first(batches)
    if count(batches) == 1:
        return ready(*args, first)

    def add(total: Any, batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, ready(*args, batch)), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(fn, *args, first))
    total, _ = jax.lax.scan(add, zeros, batches)
    return jax.tree.map(lambda t: t / count(batches), total)


def _stacked(batches: Any) -> Any:
    if (
        isinstance(batches, (tuple, dict, str))
        or hasattr(batches, "dtype")
        or not isinstance(batches, Iterable)
    ):
        raise TypeError(
            "batches must be a list, or another iterable, of batches as loss_fn(params, batch) takes them,"
            f" got a {type(batches).__name__}. For a single batch write [batch]."
        )
    batches = list(batches)
    if not batches or not jax.tree.leaves(batches[0]):
        raise ValueError("batches must hold at least one batch with at least one array, got none.")
    for i, other in enumerate(batches[1:], start=1):
        trees.check_same_shapes(other, batches[0], f"batches[{i}]", "batches[0]")
    places = jax.tree.map(_place_of_stack, batches[0])
    return jax.jit(_stack, out_shardings=places)(*batches)


def _stack(*batches: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


def _place_of_stack(leaf: Any) -> NamedSharding | None:
    placed = shardings.concrete(leaf)
    if not isinstance(placed, NamedSharding):
        return None
    return NamedSharding(placed.mesh, PartitionSpec(None, *placed.spec))


def _check_scalar(loss_fn: Callable[..., Any], params: Params, stacked: Any) -> None:
    like = jax.eval_shape(loss_fn, params, _first(stacked))
    if getattr(like, "shape", None) != () or not jnp.issubdtype(like.dtype, jnp.floating):
        raise TypeError(
            "loss_fn must return one real scalar, without aux, got"
            f" {jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', like)}."
        )
