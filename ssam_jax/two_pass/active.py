"""Which leaves are perturbed at all: a hashable tuple, known while tracing."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ssam_jax._base import shardings, trees
from ssam_jax.masks.rule import MaskState
from ssam_jax.state import find_single
from ssam_jax.typing import Params, PyTree


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
"""A value for each leaf, in flattening order, which is all of it, none of it, or its rows from one on."""


def active_leaves(opt_state: PyTree) -> Active:
    """Return for each leaf, in flattening order, whether any of it is perturbed.

    For a leaf of two dimensions or more whose mask is all True or all False in every row, such as
    the stacked layers of a scan masked by layer, and whose first row is not perturbed, it is the
    `FirstRow` that is. The tuple is hashable, to be a static argument of ``jit``. It reads the mask's
    values: call it between steps.

    Args:
      opt_state: as for `get_mask`.

    Raises:
      TypeError: ``opt_state`` holds shapes in place of arrays.
      ValueError: called under ``jit``, or there is no `ssam` in ``opt_state``, or more than one.
    """
    state = find_single(opt_state, "active_leaves")
    if not isinstance(state.mask, MaskState):
        return (True,) * state.leaf_sizes.shape[0]
    leaves = jax.tree.leaves(state.mask.mask)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError(
            "active_leaves reads the mask's values, which are not known under jit. Call it between"
            " steps and pass the tuple on as a static argument: see docs/two_pass.md."
        )
    found = [(_by_row(jnp.any, leaf), _by_row(jnp.all, leaf)) for leaf in leaves]
    rows = jax.device_get(jax.tree.map(shardings.readable, found))
    return tuple(_activity(some, whole) for some, whole in rows)


def _by_row(reduce: Callable[..., jax.Array], mask: jax.Array) -> jax.Array:
    """Reduce a mask to one value a row; one of fewer than two dimensions to a single value."""
    return reduce(mask, axis=tuple(range(1, mask.ndim))) if mask.ndim > 1 else reduce(mask)[None]


def _activity(some: np.ndarray, whole: np.ndarray) -> bool | FirstRow:
    if not some.any():
        return False
    first = int(some.argmax())
    return FirstRow(first) if first and (some == whole).all() else True


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
