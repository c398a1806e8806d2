"""The masks of the implicit form, leaf by leaf, and the facts that they make of the parameters."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ssam_jax._base import boxes, trees
from ssam_jax.two_pass.active import Active, FirstRow, check_entry, entries
from ssam_jax.two_pass.implicit.weights import Fact, weight_fact
from ssam_jax.two_pass.splitting import Piece
from ssam_jax.typing import Form, Mask, Params

LeafMask: TypeAlias = bool | FirstRow | np.ndarray | jax.Array
"""The mask of a leaf: all or none of it, its rows from one on, or a bool array of the leaf's rank."""


def check_mask(mask: Mask | Active | None, params: Params, form: Form) -> list[LeafMask] | None:
    """Return the implicit form's mask leaf by leaf, None for the explicit form, or raise.

    Raises:
      TypeError: a leaf of ``mask`` is not bool.
      ValueError: ``mask`` does not fit ``params``, is missing, or is given to the explicit form.
    """
    if form == "explicit":
        if mask is not None:
            raise ValueError(
                "mask is for form='implicit', got one in form='explicit', where ssam masks the perturbation;"
                " active says which leaves are perturbed at all."
            )
        return None
    if mask is None:
        raise ValueError("form='implicit' needs mask, such as get_mask(opt_state); got None.")
    leaves = zip(
        entries(boxes.like(mask, params), params, "mask"), trees.leaf_paths(params), jax.tree.leaves(params)
    )
    return [_check_leaf(*leaf) for leaf in leaves]


def _check_leaf(entry: Any, path: str, leaf: jax.Array) -> LeafMask:
    if not hasattr(entry, "dtype"):
        return check_entry(entry, path, leaf, "mask")
    if entry.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, but its leaf {path!r} is {entry.dtype}.")
    shape = jnp.shape(leaf)
    try:
        fits = jnp.broadcast_shapes(entry.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask must broadcast against params, but its leaf {path!r} of shape {entry.shape} does not"
            f" broadcast to {shape}."
        )
    return entry.reshape((1,) * (len(shape) - entry.ndim) + entry.shape)


def first_rows(masks: Sequence[LeafMask] | None) -> list[Active]:
    """Return the rows from which masks start, as a choice of leaves; no choice in the explicit form."""
    return [tuple(isinstance(mask, FirstRow) and mask for mask in masks)] if masks else []


def facts_about(
    pieces: Sequence[Piece], params: Params, masks: Sequence[LeafMask] | None
) -> list[Fact | None]:
    """Return the facts about the pieces of the parameters: None for each in the explicit form."""
    if masks is None:
        return [None] * len(pieces)
    leaves, paths = jax.tree.leaves(params), trees.leaf_paths(params)
    facts: list[Fact | None] = []
    for piece in pieces:
        mask, leaf = masks[piece.leaf], leaves[piece.leaf]
        if isinstance(mask, FirstRow):
            mask = (np.arange(leaf.shape[0]) >= mask.row).reshape(-1, *[1] * (leaf.ndim - 1))
        if not isinstance(mask, bool) and mask.ndim and mask.shape[0] > 1 and piece.rows is not None:
            mask = mask[slice(*piece.rows)]
        facts.append(weight_fact(paths[piece.leaf], mask))
    return facts
