"""Trees as vectors, on which matfree's algorithms work, without gathering what is spread over devices.

A vector is a tree's entries one after another. Where the leaves lie on a mesh, each device concatenates the
blocks that it holds, and the vector is split over all devices. If several devices hold copies of a leaf, each
takes a part of it. Zeros fill parts of unequal length. The map keeps lengths and angles, so that eigenvalues
and traces are those of the tree.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssam_jax._base import shardings
from ssam_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the entries of a tree lie in a vector. Hashable, as the key of a compiled program.

    Attributes:
      tree: the structure.
      shapes: of each leaf.
      mesh: the devices over which the vector is split; None for a vector in one piece.
      specs: how each leaf lies on the mesh.
    """

    tree: Any
    shapes: tuple[tuple[int, ...], ...]
    mesh: Mesh | None = None
    specs: tuple[PartitionSpec, ...] = ()

    @property
    def size(self) -> int:
        """Entries of the tree; the vector has more where zeros fill it up."""
        return sum(map(math.prod, self.shapes))

    def vector(self, tree: Any) -> jax.Array:
        """Return the vector of a tree of one dtype, of shape (at least `size`,)."""
        leaves = jax.tree.leaves(tree)
        if self.mesh is None:
            return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
        return self._mapped(self._own_part, self.specs, self._split)(*leaves)

    def as_tree(self, vector: jax.Array) -> Params:
        """Return the tree of a vector, each leaf laid out as it was."""
        if self.mesh is None:
            leaves, start = [], 0
            for shape in self.shapes:
                end = start + math.prod(shape)
                leaves.append(vector[start:end].reshape(shape))
                start = end
        else:
            leaves = self._mapped(self._own_blocks, self._split, self.specs)(vector)
        return jax.tree.unflatten(self.tree, leaves)

    @property
    def _split(self) -> PartitionSpec:
        assert self.mesh is not None
        return PartitionSpec(self.mesh.axis_names)

    def _mapped(self, fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        current = jax.sharding.get_abstract_mesh()  # set where axes are explicit
        mesh = self.mesh if current.empty else None
        return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def compiled(self, fn: Callable[..., Any], out: Callable[[Any], Any]) -> Callable[..., Any]:
        """Return ``jit(fn)``, on a mesh with explicit axes computed with automatic ones, as matfree needs.

        Args:
          fn: a function of trees of arrays.
          out: from a tree of the parameters' specs to the specs of what ``fn`` returns.
        """
        if self.mesh is None or not (axes := _explicit_axes(self.mesh)):
            return jax.jit(fn)
        specs = out(jax.tree.unflatten(self.tree, self.specs))
        mesh = self.mesh.abstract_mesh
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        return jax.jit(shardings.auto_axes(fn, axes=axes, **{shardings.OUT: places}))

    def _own_part(self, *blocks: jax.Array) -> jax.Array:
        """Return a device's part of the vector, from its block of each leaf."""
        parts = []
        for block, holders in zip(blocks, self._holders()):
            flat, copies = jnp.ravel(block), self._devices(holders)
            if copies > 1:
                length = -(-flat.size // copies)
                flat = jnp.pad(flat, (0, length * copies - flat.size))
                flat = jax.lax.dynamic_slice_in_dim(flat, jax.lax.axis_index(holders) * length, length)
            parts.append(flat)
        return jnp.concatenate(parts)

    def _own_blocks(self, part: jax.Array) -> tuple[jax.Array, ...]:
        """Return a device's block of each leaf, from its part of the vector."""
        blocks, start = [], 0
        for shape, spec, holders in zip(self.shapes, self.specs, self._holders()):
            mine = self._block(shape, spec)
            size, copies = math.prod(mine), self._devices(holders)
            length = -(-size // copies)
            flat = part[start : start + length]
            if copies > 1 and size:
                flat = jax.lax.all_gather(flat, holders, tiled=True)[:size]
            blocks.append(flat.reshape(mine))
            start += length
        return tuple(blocks)

    def _holders(self) -> list[tuple[str, ...]]:
        """Return for each leaf the mesh axes over which it is copied."""
        assert self.mesh is not None
        used = [{axis for part in spec for axis in _axes(part)} for spec in self.specs]
        return [tuple(axis for axis in self.mesh.axis_names if axis not in axes) for axes in used]

    def _block(self, shape: tuple[int, ...], spec: PartitionSpec) -> tuple[int, ...]:
        parts = [*spec, *[None] * (len(shape) - len(spec))]
        return tuple(size // self._devices(_axes(part)) for size, part in zip(shape, parts))

    def _devices(self, axes: tuple[str, ...]) -> int:
        assert self.mesh is not None
        return math.prod(self.mesh.shape[axis] for axis in axes)


def layout_of(params: Params) -> Layout:
    """Return the layout of parameters' vectors: over the mesh on which they lie, if they lie on one."""
    leaves, tree = jax.tree.flatten(params)
    layout = Layout(tree, tuple(jnp.shape(leaf) for leaf in leaves))
    placed = [shardings.concrete(leaf) for leaf in leaves]
    meshes: set[Any] = {s.mesh for s in placed if isinstance(s, NamedSharding)}
    if len(meshes) != 1 or not all(s is None or isinstance(s, NamedSharding) for s in placed):
        return layout
    specs = tuple(s.spec if isinstance(s, NamedSharding) else PartitionSpec() for s in placed)
    [mesh] = meshes
    return layout if mesh.size == 1 else dataclasses.replace(layout, mesh=mesh, specs=specs)


def _explicit_axes(mesh: Mesh) -> tuple[str, ...]:
    return shardings.explicit_axes(NamedSharding(mesh, PartitionSpec()))


def _axes(part: Any) -> tuple[str, ...]:
    """Return the mesh axes that an entry of a PartitionSpec names."""
    if part is None:
        return ()
    return part if isinstance(part, tuple) else (part,)
