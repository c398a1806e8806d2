"""Which leaves are perturbed at all: a hashable tuple, known while tracing."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from ssam_jax import trees
from ssam_jax.typing import Params


@dataclasses.dataclass(frozen=True, eq=False)
class FirstRow:
    """The first perturbed row of a stacked leaf: that row and all after it are perturbed.

    It equals the int it holds but no bool. Python holds ``1 == True``, and ``jit`` would take a static
    ``(1,)``, the rows from the second on, for a ``(True,)`` that it has compiled before.

    Attributes:
      row: at least 1; a leaf that is perturbed from row 0 on is ``True``.
    """

    row: int

    def __index__(self) -> int:
        return self.row

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FirstRow):
            return self.row == other.row
        return isinstance(other, int) and not isinstance(other, bool) and self.row == other

    def __hash__(self) -> int:
        return hash(self.row)


Active: TypeAlias = tuple[bool | FirstRow, ...]
"""For each leaf, in flattening order: all of it, none of it, or its rows from one on."""


def check_active(active: Any, params: Params) -> Active:
    """Return ``active`` as a tuple with one entry for each leaf of ``params``, or raise.

    Args:
      active: None (everything), or a sequence, or a tree of the structure of ``params``, of True,
        False and, for the first perturbed row of a stacked leaf, an int.
      params: pytree of arrays.

    Raises:
      TypeError: an entry is neither a bool nor an int, such as an array, whose value ``jit`` hides.
      ValueError: the number of entries is not that of the leaves, or a row is not in its leaf.
    """
    leaves = jax.tree.leaves(params)
    if active is None:
        return (True,) * len(leaves)
    structure: Any = jax.tree.structure(params)
    if jax.tree.structure(active) == structure:
        entries: Sequence[Any] = jax.tree.leaves(active)
    elif isinstance(active, (tuple, list)) and len(active) == len(leaves):
        entries = active
    else:
        flat = isinstance(active, (tuple, list))
        given = f"{len(active)} entries" if flat else f"{active!r}"
        raise ValueError(
            f"active must have one entry for each of the {len(leaves)} leaves of params, as"
            f" ssam_jax.active_leaves returns it, got {given}."
        )
    return tuple(map(_check_entry, entries, trees.leaf_paths(params), leaves))


def _check_entry(entry: Any, path: str, leaf: Any) -> bool | FirstRow:
    if isinstance(entry, bool) or type(entry).__name__ == "bool":
        return bool(entry)
    try:
        row = operator.index(entry)
    except TypeError:
        raise TypeError(
            f"active must hold True, False or the first perturbed row, known while tracing; for the leaf"
            f" {path!r} it holds {entry!r}. Make active a static argument of jit."
        ) from None
    shape = jnp.shape(leaf)
    if not shape or not 0 <= row < shape[0]:
        raise ValueError(
            f"active names row {row} as the first perturbed one of the leaf {path!r}, whose shape is"
            f" {shape}; it must be True, False or from 0 to one less than the first dimension."
        )
    return FirstRow(row) if row else True
