"""Flax's boxes: nodes around one array that say how it is sharded (``nn.Partitioned``, ``nnx.Variable``).

What a box says holds for arrays of the parameter's shape alone. In the state of an optimizer all others lie
outside of it, or the usual recipes (``nn.get_partition_spec``, ``nnx.Optimizer``) would shard them as the
parameter.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ssam_jax._base import trees
from ssam_jax.typing import Params, PyTree

SHARDINGS = ("out_sharding", "optimizer_sharding", "sharding", "sharding_names")
"""Names of an ``nnx.Variable``'s metadata that shard it or its optimizer's state, in versions of Flax."""


def is_box(node: Any) -> bool:
    """Whether a node follows one of Flax's protocols: of ``AxisMetadata``, or of ``nnx.Variable``."""
    return hasattr(node, "replace_boxed") or hasattr(node, "get_metadata")


def any_in(tree: PyTree) -> bool:
    """Whether there is a box in a tree."""
    return any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box)))


def splits(node: Any) -> bool:
    """Whether a node is a box that names an axis of the mesh, or a logical one."""
    if hasattr(node, "get_partition_spec"):
        return any(axis is not None for axis in node.get_partition_spec())
    return is_box(node) and any(node.get_metadata().get(name) for name in SHARDINGS)


def without(tree: PyTree) -> PyTree:
    """Return a tree with arrays in place of boxes."""
    return jax.tree.map(_contents, tree, is_leaf=is_box)


def like(tree: PyTree, other: PyTree) -> PyTree:
    """Return a tree in the structure of another that differs from it in boxes alone, else as it is."""
    if trees.same_structure(tree, other) or not (any_in(tree) or any_in(other)):
        return tree
    return filled(other, tree) if trees.leaf_paths(tree) == trees.leaf_paths(other) else tree


def filled(boxed: PyTree, tree: PyTree) -> PyTree:
    """Return the arrays of a tree in the structure of another, if they are as many, else the tree."""
    structure: Any = jax.tree.structure(boxed)
    leaves = jax.tree.leaves(tree)
    return jax.tree.unflatten(structure, leaves) if len(leaves) == structure.num_leaves else tree


def outside(state: PyTree, params: Params) -> PyTree:
    """Return a state in which arrays that have not the shape of their parameter are outside of its box.

    Args:
      state: any pytree; those of its parts that have the structure of the parameters are looked at.
      params: what the state is for.
    """
    if not any_in(params):
        return state

    def is_like_params(node: Any) -> bool:
        return trees.same_structure(node, params)

    def fit(box: Any, param: Any) -> Any:
        shapes = [list(map(jnp.shape, jax.tree.leaves(node))) for node in (box, param)]
        return box if shapes[0] == shapes[1] else _contents(box)

    def fit_all(node: Any) -> Any:
        return jax.tree.map(fit, node, params, is_leaf=is_box) if is_like_params(node) else node

    return jax.tree.map(fit_all, state, is_leaf=is_like_params)


def _contents(node: Any) -> Any:
    """Return the array in a box; what is no box, or holds anything else, as it is."""
    leaves = jax.tree.leaves(node)
    if not is_box(node) or len(leaves) != 1:
        return node
    return jnp.asarray(node) if leaves[0] is node else leaves[0]  # a leaf in versions of Flax before 0.11
