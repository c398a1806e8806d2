"""Which leaves are perturbed at all: a hashable tuple, known while tracing."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ssam_jax._base import trees
from ssam_jax.typing import Params


@dataclasses.dataclass(frozen=True, eq=False)
class FirstRow:
    """The first perturbed row of a stacked leaf: that row and all after it are perturbed.

    It equals the int it holds but no bool. Python holds ``1 == True``, and ``jit`` would take a static
    ``(1,)``, the rows from the second on, for a ``(True,)`` that it has compiled before.

    Attributes:
      row: at least 1; a leaf that is perturbed from row 0 on is ``True``.

    Raises:
      TypeError: ``row`` is not an int.
      ValueError: it is below 1.
    """

    row: int

    def __post_init__(self) -> None:
        if isinstance(self.row, bool) or not isinstance(self.row, int):
            raise TypeError(f"row must be an int of at least 1, got {self.row!r}.")
        if self.row < 1:
            raise ValueError(f"row must be at least 1, or the entry True for all rows, got {self.row}.")

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
    if active is None:
        return (True,) * len(jax.tree.leaves(params))
    chosen = zip(entries(active, params, "active"), trees.leaf_paths(params), jax.tree.leaves(params))
    return tuple(check_entry(*entry) for entry in chosen)


def entries(choice: Any, params: Params, name: str) -> Sequence[Any]:
    """Return the entries of a choice for each leaf: a tuple of them, or a tree like ``params``."""
    structure: Any = jax.tree.structure(params)
    if jax.tree.structure(choice) == structure:
        return jax.tree.leaves(choice)
    flat = isinstance(choice, (tuple, list))
    if flat and len(choice) == structure.num_leaves:
        return choice
    given = f"{len(choice)} entries" if flat else f"{choice!r}"
    raise ValueError(
        f"{name} must have one entry for each of the {structure.num_leaves} leaves of params: a tuple in"
        f" their order, as ssam_jax.active_leaves returns it, or a tree like params. Got {given}."
    )


def check_entry(entry: Any, path: str, leaf: Any, name: str = "active") -> bool | FirstRow:
    """Return an entry as a bool or a `FirstRow` of the leaf, or raise."""
    if isinstance(entry, (bool, np.bool_)):
        return bool(entry)
    try:
        row = operator.index(entry)
    except TypeError:
        raise TypeError(
            f"{name} must hold True, False or the first perturbed row, known while tracing; for the leaf"
            f" {path!r} it holds {entry!r}. Make {name} a static argument of jit."
        ) from None
    shape = jnp.shape(leaf)
    if not shape or not 0 <= row < shape[0]:
        raise ValueError(
            f"{name} names row {row} as the first perturbed one of the leaf {path!r}, whose shape is"
            f" {shape}; it must be True, False or from 0 to one less than the first dimension."
        )
    return FirstRow(row) if row else True
