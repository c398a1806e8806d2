"""Functions of the parts of arrays that one device holds, without knowing how they are sharded.

On meshes with automatic axes only the compiler knows how an array is split. It is asked: while it divides
the program, it hands over the shardings and gets the program of a single device, in which arrays may be
joined and counted as on one device, and which says itself what is sent between devices.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from ssam_jax._base import shardings

Shape = tuple[int, ...]


class Lie(NamedTuple):
    """How an array that a function of parts is given, or returns, is to lie.

    Attributes:
      shape: of the whole array.
      like: the number of the input that it lies with, against which it broadcasts; None for one of its own.
      grain: along each axis, of how many entries a device must hold a multiple; None for any number.
    """

    shape: Shape
    like: int | None = None
    grain: Shape | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """Which part of an array each device holds; all are equally large.

    Attributes:
      whole: the shape of the array.
      local: that of a part.
      starts: of shape (devices, axes), the index of the first entry of each device's part.
    """

    whole: Shape
    local: Shape
    starts: np.ndarray

    @classmethod
    def of(cls, shape: Shape, sharding: NamedSharding | None) -> "Part":
        """Return how an array lies; all on one device if there is no sharding."""
        if sharding is None:
            return cls(shape, shape, np.zeros((1, len(shape)), np.int32))
        local = sharding.shard_shape(shape)
        sizes = sharding.mesh.shape
        places = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
        place = dict(zip(sizes, places))
        starts = np.zeros((places.shape[1], len(shape)), np.int32)
        for axis, names in enumerate(sharding.spec):
            for name in _as_tuple(names):
                starts[:, axis] = starts[:, axis] * sizes[name] + place[name]
        return cls(shape, local, starts * np.array(local, np.int32))

    def coarser(self, extents: Shape) -> "Part":
        """Return how an array with an entry for each tile of these extents lies."""
        extent = np.array(extents, np.int32)
        return Part(_tiles(self.whole, extents), _tiles(self.local, extents), self.starts // extent)

    def moved(self, axis: int) -> "Part":
        """Return how the array lies after one of its axes has become the last."""
        order = [i for i in range(len(self.whole)) if i != axis % len(self.whole)] + [axis]
        whole, local = (tuple(shape[i] for i in order) for shape in (self.whole, self.local))
        return Part(whole, local, self.starts[:, order])

    def first(self) -> np.ndarray:
        """Return for each device whether it is the first to hold its part, which others may hold as well."""
        _, firsts = np.unique(self.starts, axis=0, return_index=True)
        return np.isin(np.arange(len(self.starts)), firsts)


def _tiles(shape: Shape, extents: Shape) -> Shape:
    return tuple(-(-size // extent) for size, extent in zip(shape, extents))


class Here(NamedTuple):
    """What a function of parts may ask about the device that it runs on.

    Attributes:
      inputs: where the parts that it is given lie.
      outputs: where those that it returns lie.
      axes: the names of the mesh's axes; empty on a single device.
    """

    inputs: list[Part]
    outputs: list[Part]
    axes: tuple[str, ...]

    def total(self, x: jax.Array) -> jax.Array:
        """Return the sum over all devices, known to each."""
        return lax.psum(x, self.axes) if self.axes else x

    def mine(self, table: np.ndarray) -> Any:
        """Return the row of a table that is this device's."""
        if not self.axes:
            return jnp.asarray(table[0])
        return lax.dynamic_index_in_dim(jnp.asarray(table), lax.axis_index(self.axes), keepdims=False)


Local = Callable[..., list[jax.Array]]


def by_part(
    fn: Local,
    arrays: Sequence[jax.Array],
    inputs: Sequence[Lie],
    outputs: Sequence[Lie],
    *everywhere: jax.Array,
) -> list[jax.Array]:
    """Return ``fn(here, parts, *everywhere)``, arrays whose parts each device has computed from its own.

    Args:
      fn: given a `Here`, the parts of the arrays and the small ones that every device has, it returns the
        parts of the outputs. On a single device parts are whole.
      arrays: what is in parts. An array whose shards are not equal, or no multiple of the grain, is made
        whole along that axis.
      inputs: how they lie.
      outputs: how the results lie.
      *everywhere: small arrays.
    """

    def alone(*args: jax.Array) -> list[jax.Array]:
        here = Here([Part.of(x.shape, None) for x in inputs], [Part.of(x.shape, None) for x in outputs], ())
        return fn(here, list(args[: len(inputs)]), *args[len(inputs) :])

    if single() or _within_shard_map() or _undivided() or _op_by_op():
        return alone(*arrays, *everywhere)
    return _Divided(fn, alone, tuple(inputs), tuple(outputs), ()).call(*arrays, *map(_named, everywhere))


def single() -> bool:
    """Whether there is one device, on which every part is a whole."""
    return jax.device_count() == 1


def _op_by_op() -> bool:
    """Whether ``jax.disable_jit`` is in force, under which nothing is compiled, and so nothing divided."""
    disabled: bool = jax.config.jax_disable_jit  # type: ignore[attr-defined]
    return disabled


def _within_shard_map() -> bool:
    """Whether the code is one device's already, for some axes of the mesh at least."""
    return bool(getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ()))


def _undivided() -> bool:
    """Whether JAX is older than 0.7 and in a mesh, whose axes it would take for those of a single device."""
    return not hasattr(jax, "set_mesh") and not jax.sharding.get_abstract_mesh().empty


def _named(x: jax.Array) -> jax.Array:
    """Return an array whose sharding names the mesh, if there is one: the compiler asks for it."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


@dataclasses.dataclass(frozen=True)
class _Divided:
    """A function of parts as JAX's compiler takes it, under some levels of ``vmap``.

    Attributes:
      fn: the function of parts.
      alone: the function of whole arrays.
      inputs: how the arrays lie that it is given.
      outputs: how those lie that it returns.
      levels: for each ``vmap``, the innermost first, which arguments have an axis for it.
    """

    fn: Local
    alone: Callable[..., list[jax.Array]]
    inputs: tuple[Lie, ...]
    outputs: tuple[Lie, ...]
    levels: tuple[tuple[bool, ...], ...]

    def call(self, *args: jax.Array) -> list[jax.Array]:
        """Call it; the compiler divides it, and ``vmap`` maps it as a whole."""
        whole = jax.jit(lambda *args: tuple(self._mapped(self.alone)(*args)))  # which holds its constants
        divided = custom_partitioning(lambda *args: whole(*args))
        divided.def_partition(
            self._partition, infer_sharding_from_operands=self._infer, sharding_rule=self._rule
        )
        mappable = jax.custom_batching.custom_vmap(divided)

        def map_whole(size: int, batched: Any, *args: jax.Array) -> Any:
            del size
            outer = dataclasses.replace(self, levels=(*self.levels, tuple(batched)))
            results = tuple(outer.call(*args))
            return results, (True,) * len(results)

        mappable.def_vmap(map_whole)
        return list(mappable(*args))

    def _mapped(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        for batched in self.levels:
            fn = jax.vmap(fn, in_axes=tuple(0 if b else None for b in batched))
        return fn

    def _depths(self) -> list[int]:
        """Return how many leading axes of ``vmap`` each input has."""
        return [sum(level[i] for level in self.levels) for i in range(len(self.inputs))]

    def _places(self, mesh: Mesh, args: Any, results: Any) -> tuple[list[NamedSharding], list[NamedSharding]]:
        """Return how inputs and outputs lie, without the axes of ``vmap``."""
        inputs: list[NamedSharding] = []

        def place(lie: Lie, found: Any, lead: int) -> NamedSharding:
            if lie.like is None:
                return _fitting(mesh, getattr(found, "sharding", None), lie, lead)
            return shardings.part(inputs[lie.like], lie.shape, self.inputs[lie.like].shape)

        for lie, found, lead in zip(self.inputs, args, self._depths()):
            inputs.append(place(lie, found, lead))
        return inputs, [place(lie, r, len(self.levels)) for lie, r in zip(self.outputs, results)]

    def _partition(self, mesh: Mesh, args: Any, results: Any) -> Any:
        mesh = _known(mesh, results)
        inputs, outputs = self._places(mesh, args, results)
        here = Here(
            [Part.of(lie.shape, s) for lie, s in zip(self.inputs, inputs)],
            [Part.of(lie.shape, s) for lie, s in zip(self.outputs, outputs)],
            tuple(mesh.axis_names),
        )

        def local(*args: jax.Array) -> list[jax.Array]:
            return self.fn(here, list(args[: len(inputs)]), *args[len(inputs) :])

        def program(*args: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(self._mapped(local)(*args))

        taken = [_led(s, lead) for s, lead in zip(inputs, self._depths())]
        taken += [NamedSharding(mesh, PartitionSpec())] * (len(args) - len(taken))
        return mesh, program, tuple(_led(s, len(self.levels)) for s in outputs), tuple(taken)

    def _infer(self, mesh: Mesh, args: Any, results: Any) -> Any:
        """Say how results lie where the compiler does not use the rule (JAX before 0.7)."""
        _, outputs = self._places(_known(mesh, args), args, results)
        return tuple(_led(s, len(self.levels)) for s in outputs)

    def _rule(self, mesh: Any, args: Any, results: Any) -> SdyShardingRule:
        """Say which axes of inputs and outputs are split alike, by names of the axes."""
        del mesh
        names = (f"axis{i}" for i in range(10**6))
        taken: list[list[str]] = []

        def named(lie: Lie, rank: int) -> list[str]:
            own = [next(names) for _ in range(rank)]
            if lie.like is None:
                return own
            whole, known = self.inputs[lie.like].shape, taken[lie.like]
            for axis in range(1, len(lie.shape) + 1):
                if lie.shape[-axis] == whole[-axis]:
                    own[-axis] = known[-axis]
            return own

        for lie, arg in zip((*self.inputs, *[Lie(())] * len(args)), args):
            taken.append(named(lie, len(arg.shape)))
        returned = [named(lie, len(result.shape)) for lie, result in zip(self.outputs, results)]
        return SdyShardingRule(
            tuple(ArrayMapping(*axes) for axes in taken), tuple(ArrayMapping(*axes) for axes in returned)
        )


def _known(mesh: Mesh, arrays: Any) -> Mesh:
    """Return the mesh; one of all devices if nothing in the program names it, on which arrays are whole."""
    if not mesh.empty:
        return mesh
    devices = list(arrays[0].sharding.devices_indices_map(arrays[0].shape))
    return Mesh(np.array(devices), ("devices",))


def _fitting(mesh: Mesh, sharding: Sharding | None, lie: Lie, lead: int) -> NamedSharding:
    """Return a sharding without its leading axes, and without those along which parts would not be whole."""
    spec = tuple(sharding.spec)[lead:] if isinstance(sharding, NamedSharding) else ()
    fitting = []
    for names, size, unit in zip(spec, lie.shape, lie.grain or (1,) * len(lie.shape)):
        devices = math.prod(mesh.shape[name] for name in _as_tuple(names))
        fitting.append(names if size % (devices * unit) == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*fitting))


def _led(sharding: NamedSharding, lead: int) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*[None] * lead, *sharding.spec))


def _as_tuple(names: Any) -> tuple[str, ...]:
    return () if names is None else names if isinstance(names, tuple) else (names,)
