"""Checks of masks and patterns."""

import jax
import jax.numpy as jnp

from ssam_jax._base import boxes, checks, trees
from ssam_jax.masks.patterns import Pattern
from ssam_jax.typing import Mask, Params

OTHER_STATE = (
    "The state is of another rule, of other options or of other parameters: make it anew with"
    " tx.init(params); set_mask can put an old mask into it. See docs/guides/checkpoints.md."
)
"""What to say about a state that does not fit."""


def check_pattern(pattern: Pattern) -> None:
    """Raise TypeError unless ``pattern`` is a hashable `Pattern`."""
    if not isinstance(pattern, Pattern):
        raise TypeError(
            "pattern must be a Pattern such as Unstructured(sparsity=0.5), Structured(...) or"
            f" NM(2, 4), got {pattern!r}."
        )
    if type(pattern).__hash__ is None:
        raise TypeError(f"pattern must be hashable (a frozen dataclass, for instance), got {pattern!r}.")


def fitted(mask: Mask, params: Params, remedy: str = "") -> Mask:
    """Return a mask in the boxes of ``params``, or raise unless it is one: bools that broadcast."""
    mask = boxes.like(mask, params)
    trees.check_same_structure(mask, params, "the mask", "the parameters", remedy)
    check_bools(mask, "the mask")
    for path, m, p in zip(trees.leaf_paths(params), jax.tree.leaves(mask), jax.tree.leaves(params)):
        if not _broadcasts(jnp.shape(m), jnp.shape(p)):
            raise ValueError(
                f"the mask's leaf {path!r} of shape {jnp.shape(m)} does not broadcast against {jnp.shape(p)},"
                f" the parameter's.{remedy and ' '}{remedy}"
            )
    return mask


def check_bools(mask: Mask, name: str) -> None:
    """Raise TypeError, naming the leaf, unless all leaves are bools or bool arrays."""
    for path, leaf in zip(trees.leaf_paths(mask), jax.tree.leaves(mask)):
        if not checks.is_kind(leaf, jnp.bool_):
            raise TypeError(
                f"{name} must be bool, but its leaf {path!r} is {checks.named(checks.kind(leaf))}; True"
                " means perturbed."
            )


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    padded = (1,) * (len(target) - len(shape)) + shape
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(padded, target))
