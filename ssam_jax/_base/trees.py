"""Pytree helpers that every other module may use; they know nothing of masks or SAM."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from ssam_jax._base import checks
from ssam_jax.typing import PyTree


def leaf_paths(tree: PyTree) -> list[str]:
    """Return the path of each leaf, such as ``"params/Dense_0/kernel"``, in flattening order."""
    return [path_name(path) for path, _ in tree_flatten_with_path(tree)[0]]


def path_name(path: tuple[Any, ...]) -> str:
    """Return a key path as one string, its parts joined by ``/``.

    A last attribute ``value`` is left out: it is the array in one of Flax's boxes (``nnx.Variable``,
    ``nn.Partitioned``), and the name is the box's.
    """
    return keystr(path[:-1] if _is_boxed(path) else path, simple=True, separator="/")


def _is_boxed(path: tuple[Any, ...]) -> bool:
    return len(path) > 1 and path[-1] == GetAttrKey("value")


def map_with_path(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> Any:
    """Map ``fn(path, leaf, *leaves)`` over trees of one structure, with the path as a string."""
    return jax.tree_util.tree_map_with_path(lambda p, *leaves: fn(path_name(p), *leaves), tree, *rest)


SPLIT = "split the other leaves off first, for instance with equinox.partition or nnx.split"
"""What to do about parameters that are not real floats."""


def check_floating(tree: PyTree, name: str, remedy: str = SPLIT) -> None:
    """Raise TypeError, naming the leaf, unless every leaf is a real floating-point array."""
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if not checks.is_kind(leaf, jnp.floating):
            raise TypeError(
                f"{name} must hold real floating-point arrays, but the leaf {path_name(path)!r} is"
                f" {checks.named(checks.kind(leaf))}; {remedy}."
            )


def check_not_partial(tree: PyTree) -> None:
    """Raise ValueError if optax.masked or optax.multi_transform has taken leaves out of ``tree``."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            "ssam sees only a part of the parameters here, as inside optax.masked or"
            " optax.multi_transform, and grad_fn needs all of them. Put ssam outside, first in the"
            " chain, and choose the leaves to perturb with"
            " ssam(..., mask=ssam_jax.fixed_mask(predicate)) instead: see docs/guides/groups.md."
        )


def is_placeholder(params: PyTree) -> bool:
    """Whether it stands for parameters where ``optax.tree_map_params`` calls ``init`` to find them."""
    return isinstance(params, _PLACEHOLDER)


def _placeholder() -> type:
    seen: list[PyTree] = []
    optax.tree_map_params(lambda params: seen.append(params) or params, lambda leaf: leaf, ())  # type: ignore[func-returns-value]
    return type(seen[0])


_PLACEHOLDER = _placeholder()


def check_same_structure(tree: PyTree, like: PyTree, name: str, like_name: str, remedy: str = "") -> None:
    """Raise ValueError, naming the first path that differs, unless both trees have one structure."""
    if not same_structure(tree, like):
        path, expected, found = _first_difference(tree, like)
        raise ValueError(
            f"{name} must have the tree structure of {like_name}: at {path} expected {expected}, got"
            f" {found}.{remedy and ' '}{remedy}"
        )


def same_structure(tree: PyTree, like: PyTree) -> bool:
    """Whether two trees have one structure."""
    structure: Any = jax.tree.structure(tree)
    return structure == jax.tree.structure(like)


def _first_difference(tree: PyTree, like: PyTree, path: tuple[Any, ...] = ()) -> tuple[str, str, str]:
    """Return where two trees first differ in structure, what the second has there, and what the first."""
    ours, theirs = _children(tree), _children(like)
    if ours is not None and theirs is not None and type(tree) is type(like):
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            if key not in ours:
                return _shown((*path, key)), _described(theirs[key]), "nothing"
            if key not in theirs:
                return _shown((*path, key)), "nothing", _described(ours[key])
            if not same_structure(ours[key], theirs[key]):
                return _first_difference(ours[key], theirs[key], (*path, key))
        return _shown(path), f"{_described(like)} with other static data", _described(tree)
    return _shown(path), _described(like), _described(tree)


def _children(node: PyTree) -> dict[Any, PyTree] | None:
    """Return the children of a node by their keys; None for a leaf."""
    if jax.tree_util.all_leaves([node]):
        return None
    return {
        path[0]: child for path, child in tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    }


def _shown(path: tuple[Any, ...]) -> str:
    """Return a path for a message, its middle left out if it is long."""
    name = keystr(path, simple=True, separator="/")
    return (repr(name) if len(name) <= 120 else f"{name[:50]!r}...{name[-50:]!r}") if path else "the top"


def _described(node: PyTree) -> str:
    """Return what stands somewhere in a tree, in a few words."""
    children = _children(node)
    if children is None:
        shape = getattr(node, "shape", None)
        return f"a {type(node).__name__:.60}" if shape is None else f"an array of shape {shape}"
    if node is None:
        return "None"
    keys = ", ".join(keystr((key,), simple=True) for key in children)
    return f"a {type(node).__name__:.60} of {len(children)}" + f" ({keys:.60})" * bool(children)


def check_same_shapes(tree: PyTree, like: PyTree, name: str, like_name: str, remedy: str = "") -> None:
    """Raise ValueError, naming the first leaf that differs, unless structure and shapes agree."""
    check_same_structure(tree, like, name, like_name, remedy)
    for path, leaf, other in zip(leaf_paths(like), jax.tree.leaves(tree), jax.tree.leaves(like)):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"{name} must have the shapes of {like_name}: the leaf {path!r} should be"
                f" {jnp.shape(other)}, got {jnp.shape(leaf)}.{remedy and ' '}{remedy}"
            )


def check_same_dtypes(tree: PyTree, like: PyTree, name: str, like_name: str) -> None:
    """Raise TypeError, naming the first leaf that differs, unless trees of one structure agree in dtypes."""
    for path, leaf, other in zip(leaf_paths(like), jax.tree.leaves(tree), jax.tree.leaves(like)):
        found, expected = checks.kind(leaf), checks.kind(other)
        if found != expected:
            raise TypeError(
                f"{name} must have the dtypes of {like_name}: the leaf {path!r} should be"
                f" {checks.named(expected)}, got {checks.named(found)}."
            )


def wide_dtype(*arrays: Any) -> Any:
    """Return the dtype to compute in: float32, or float64 if any of the arrays has it."""
    return jnp.float64 if any(jnp.result_type(x) == jnp.float64 for x in arrays) else jnp.float32


def widened(x: jax.Array) -> jax.Array:
    """Return ``x``, an array or a number of Python's, in float32, or in float64 if that is what it is."""
    return jnp.asarray(x, wide_dtype(x))


def global_norm(tree: PyTree) -> jax.Array:
    """Return the l2 norm over all leaves, a scalar accumulated in float32 whatever their dtypes.

    With a float64 leaf it is accumulated in float64. An empty tree has norm 0. Float32 has the squares of
    sizes from 1e-19 to 1e19: outside of these the norm is 0 or infinite.
    """
    leaves = jax.tree.leaves(tree)
    dtype = wide_dtype(*leaves)
    squares = (jnp.sum(jnp.square(leaf.astype(dtype))) for leaf in leaves)
    return safe_sqrt(sum(squares, start=jnp.zeros((), dtype)))


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Return the square root, whose derivative at 0 is 0 here and not infinite."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def copied(x: jax.Array) -> jax.Array:
    """Return a copy of an array; the shape of one (``jax.ShapeDtypeStruct``) as it is."""
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.copy(x)


def where(condition: bool | jax.Array, if_true: PyTree, if_false: PyTree) -> PyTree:
    """Choose between two trees of one structure by a scalar bool, without control flow."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)
