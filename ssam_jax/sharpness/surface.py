"""The loss along a line and over a plane through the parameters."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssam_jax._base import trees
from ssam_jax.sharpness import objective as obj
from ssam_jax.sharpness import progress as bars
from ssam_jax.sharpness.arguments import offsets_of, seed_of
from ssam_jax.sharpness.results import LossLine, LossPlane
from ssam_jax.typing import Params


def filter_normalized_direction(params: Params, seed: int = 0, *, axis: int = -1) -> Params:
    """Return a random direction whose filters are as long as those of the parameters.

    The loss of a network with normalization layers does not change when a filter is scaled. So a unit of a
    plain direction means something else for each network, and a unit of this direction means the same.

    Args:
      params: pytree of floating-point arrays.
      seed: seed of the Gaussian draw, which is the same on any number of devices.
      axis: the axis of a leaf that counts its filters: -1 for Flax's and Haiku's kernels of every kind, 0 for
        Equinox's and PyTorch's. The entries at one index of it are a filter, or a neuron's weights.

    Returns:
      A tree of the structure and shapes of ``params``, float32 or float64. Leaves of fewer than two
      dimensions, biases and scales of normalization layers, are 0, as in the paper.

    Raises:
      TypeError: ``params`` holds anything but real floats, or ``seed`` or ``axis`` is not an int.
      ValueError: a leaf of two dimensions or more has no such axis.

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_,
      section 4.
    """
    params, seed = obj.widened(params), seed_of(seed)
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"axis must be an int, got {axis!r}.")
    for path, leaf in zip(trees.leaf_paths(params), jax.tree.leaves(params)):
        if jnp.ndim(leaf) > 1 and not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
            raise ValueError(
                f"axis must be an axis of every leaf of two dimensions or more, but {path!r} of shape"
                f" {jnp.shape(leaf)} has no axis {axis}."
            )
    return _direction(params, seed, axis=axis)


@functools.partial(jax.jit, static_argnames="axis")
def _direction(params: Params, seed: Any, *, axis: int) -> Params:
    def scaled(d: jax.Array, p: jax.Array) -> jax.Array:
        if p.ndim < 2:
            return jnp.zeros_like(p)
        others = tuple(i for i in range(p.ndim) if i != axis % p.ndim)
        length = jnp.sqrt(jnp.sum(jnp.square(d), axis=others, keepdims=True))
        wanted = jnp.sqrt(jnp.sum(jnp.square(p), axis=others, keepdims=True))
        return d * (wanted / jnp.where(length > 0, length, 1))

    return jax.tree.map(scaled, obj.random_like(params, jax.random.key(seed), jax.random.normal), params)


def loss_along(
    loss_fn: Callable[..., jax.Array],
    params: Params,
    batches: Any,
    direction: Params,
    offsets: Any,
    *,
    progress: bool = True,
) -> LossLine:
    """Return the loss along a line through the parameters.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``, in evaluation mode.
      params: pytree of floating-point arrays; half-precision ones are widened to float32.
      batches: a list of batches of equal shapes; the loss is their mean.
      direction: shaped like ``params``, such as from `filter_normalized_direction`, an eigenvector, or the
        difference between two solutions.
      offsets: shape (points,), distances along the direction, in multiples of it.
      progress: whether to show a bar that counts the points.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: the direction does not fit the parameters, or the offsets are not finite numbers in one row.
    """
    measured = obj.objective(loss_fn, params, batches)
    moved = _fitted(direction, measured.params, "direction")
    offsets = offsets_of("offsets", offsets)
    losses = _evaluate(measured, (moved,), offsets[:, None], progress)
    return LossLine(jnp.asarray(offsets), losses)


def loss_over(
    loss_fn: Callable[..., jax.Array],
    params: Params,
    batches: Any,
    directions: Sequence[Params],
    x: Any,
    y: Any,
    *,
    progress: bool = True,
) -> LossPlane:
    """Return the loss on a plane through the parameters.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``, in evaluation mode.
      params: pytree of floating-point arrays; half-precision ones are widened to float32.
      batches: a list of batches of equal shapes; the loss is their mean.
      directions: two trees shaped like ``params``.
      x: shape (columns,), multiples of the first direction.
      y: shape (rows,), multiples of the second.
      progress: whether to show a bar that counts the points.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: there are not two directions, one does not fit the parameters, or ``x`` or ``y`` are not
        finite numbers in one row.
    """
    measured = obj.objective(loss_fn, params, batches)
    if not isinstance(directions, (list, tuple)) or len(directions) != 2:
        raise ValueError(f"directions must be two trees like params, got a {type(directions).__name__}.")
    moved = tuple(_fitted(d, measured.params, f"directions[{i}]") for i, d in enumerate(directions))
    x, y = offsets_of("x", x), offsets_of("y", y)
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    losses = _evaluate(measured, moved, points, progress).reshape(len(y), len(x))
    return LossPlane(jnp.asarray(x), jnp.asarray(y), losses)


def _evaluate(
    measured: obj.Objective, directions: tuple[Params, ...], points: np.ndarray, progress: bool
) -> jax.Array:
    """Return the loss at each row of ``points``, multiples of the directions."""
    run, losses = _point_program(measured.loss_fn), []
    with bars.bar(len(points), "Loss surface", "point", progress) as advance:
        for point in points:
            losses.append(jax.block_until_ready(run(measured.params, directions, point, measured.batches)))
            advance()
    return jnp.stack(losses)


@functools.lru_cache(maxsize=obj.PROGRAMS)
def _point_program(loss_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def run(params: Params, directions: tuple[Params, ...], point: jax.Array, batches: Any) -> jax.Array:
        def moved(p: jax.Array, *along: jax.Array) -> jax.Array:
            return sum((c.astype(p.dtype) * d for c, d in zip(point, along)), start=p)

        return obj.mean_loss(loss_fn, jax.tree.map(moved, params, *directions), batches)

    return jax.jit(run)


def _fitted(direction: Any, params: Params, name: str) -> Params:
    trees.check_floating(direction, name)
    trees.check_same_shapes(direction, params, name, "params")
    return jax.tree.map(lambda d, p: jnp.asarray(d).astype(p.dtype), direction, params)
