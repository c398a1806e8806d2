"""Arrays laid out over devices as the parameters they belong to.

What is known of a parameter's sharding depends on the context. A concrete array has a sharding. Under ``jit``
the type of an array has one on meshes with explicit axes. On meshes with automatic axes only the compiler
knows it, and can be told to shard two arrays alike.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import chex
import jax
import numpy as np
from jax.experimental.shard_alike import shard_alike
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

# Before JAX 0.7 these were experimental, under another name of the argument.
_home: Any = jax.sharding if hasattr(jax.sharding, "auto_axes") else import_module("jax.experimental.shard")
auto_axes, reshard = _home.auto_axes, _home.reshard
OUT = "out_sharding" if "out_sharding" in inspect.signature(auto_axes).parameters else "out_shardings"


def explicit(x: Any) -> NamedSharding | None:
    """Return the sharding in the type of an array or tracer, None without explicit mesh axes."""
    if not isinstance(x, jax.Array):
        return None
    sharding = jax.typeof(x).sharding
    return sharding if explicit_axes(sharding) else None


def explicit_axes(sharding: NamedSharding) -> tuple[str, ...]:
    """Return the names of the explicit axes of a sharding's mesh."""
    mesh = sharding.mesh
    return tuple(n for n, t in zip(mesh.axis_names, mesh.axis_types or ()) if t == AxisType.Explicit)


def concrete(x: Any) -> Sharding | None:
    """Return the sharding of an array that has been placed on devices, None for any other."""
    known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed
    return x.sharding if known else None


def alike(x: jax.Array, param: Any) -> jax.Array:
    """Return an array that broadcasts against a parameter, laid out as the parameter is.

    The array is replicated along axes where it has size 1. If it is smaller than the parameter, and only the
    compiler knows the parameter's sharding, it is left to the compiler.
    """
    placed = concrete(param)
    typed = explicit(param)
    if typed is not None and (placed is None or isinstance(x, jax.core.Tracer)):
        return reshard(x, part(typed, x.shape, param.shape))
    if placed is not None:
        return constrained(x, placed, param.shape)
    if isinstance(param, jax.core.Tracer) and x.shape == param.shape and jax.device_count() > 1:
        return shard_alike(x, param)[0]
    return x


def constrained(x: jax.Array, sharding: Sharding, shape: tuple[int, ...]) -> jax.Array:
    """Lay out an array as a concrete sharding lays out one of ``shape``, against which it broadcasts."""
    if not isinstance(sharding, NamedSharding):
        if x.shape != shape:  # other kinds of sharding fit one rank
            return x
        target = sharding
    else:
        target = part(sharding, x.shape, shape)
    if isinstance(x, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(x, target)
    return jax.device_put(x, target)


def part(sharding: NamedSharding, shape: tuple[int, ...], whole: tuple[int, ...]) -> NamedSharding:
    """Return a sharding of arrays of shape ``whole`` for one that broadcasts against them."""
    spec = (*sharding.spec, *[None] * (len(whole) - len(sharding.spec)))
    sizes = zip(spec[len(whole) - len(shape) :], shape, whole[len(whole) - len(shape) :])
    kept = [axes if size == full else None for axes, size, full in sizes]
    while kept and kept[-1] is None:  # as compiled programs write it, so that jit sees the same sharding
        kept.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def rows_together(x: jax.Array) -> jax.Array:
    """Return an array whose rows can be sliced: with the first axis replicated, if it is explicit."""
    typed = explicit(x)
    if typed is None or x.ndim == 0 or tuple(typed.spec)[:1] in ((), (None,)):
        return x
    return reshard(x, NamedSharding(typed.mesh, PartitionSpec(None, *typed.spec[1:])))


def typed_like(tree: Any, like: Any) -> Any:
    """Return a tree whose arrays have the shardings in the types of another tree's arrays, if any."""
    return jax.tree.map(lambda x, p: x if (t := explicit(p)) is None else reshard(x, t), tree, like)


def computed_like(params: chex.ArrayTree, fn: Callable[..., Any], *args: Any) -> Any:
    """Return ``fn(params, *args)``, a tree like ``params`` of arrays that broadcast against its leaves.

    The results are laid out as the leaves are. On a mesh with explicit axes ``fn`` is computed with automatic
    ones, so that it may reshape and draw freely.
    """
    leaves = jax.tree.leaves(params)
    typed = [explicit(leaf) for leaf in leaves]
    known = next((t for t in typed if t is not None), None)
    if known is None:
        return jax.tree.map(alike, fn(params, *args), params)
    whole = NamedSharding(known.mesh, PartitionSpec())

    def run(out: Any) -> Callable[..., Any]:
        return auto_axes(fn, axes=explicit_axes(known), **{OUT: out})

    shapes = jax.eval_shape(run(whole), *jax.tree.map(_without_sharding, (params, *args)))
    results, tree = jax.tree.flatten(shapes)
    out = [part(t or whole, x.shape, p.shape) for t, x, p in zip(typed, results, leaves)]
    return run(jax.tree.unflatten(tree, out))(params, *args)


def computed_everywhere(fn: Callable[..., Any], *args: Any) -> Any:
    """Return ``fn(*args)``, an array that every device has; on explicit axes computed as `computed_like`."""
    known = next((t for x in jax.tree.leaves(args) if (t := explicit(x)) is not None), None)
    if known is None:
        return fn(*args)
    whole = NamedSharding(known.mesh, PartitionSpec())
    return auto_axes(fn, axes=explicit_axes(known), **{OUT: whole})(*args)


def _without_sharding(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x


def zeros_like(param: Any, dtype: Any) -> jax.Array:
    """Return zeros of a parameter's shape and sharding."""
    zeros = jax.numpy.zeros_like(param, dtype)
    return zeros if concrete(param) is not None else alike(zeros, param)


def beside(tree: Any, params: chex.ArrayTree) -> Any:
    """Return a tree whose arrays without a place are copied to every device of the parameters' mesh.

    Otherwise the first step would move them there, and the second would compile again.
    """
    found = (concrete(leaf) for leaf in jax.tree.leaves(params))
    mesh = next((s.mesh for s in found if isinstance(s, NamedSharding)), None)
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x: Any) -> Any:
        if isinstance(x, jax.core.Tracer) or getattr(x, "committed", False):
            return x
        value = np.asarray(x)
        return jax.make_array_from_callback(value.shape, everywhere, lambda index: value[index])

    return jax.tree.map(place, tree)


def readable(x: jax.Array) -> jax.Array:
    """Return an array that this process can read completely, even if it lies on devices of several."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return x
    sharding: Any = x.sharding  # arrays of several processes lie on a mesh
    return jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(x)
