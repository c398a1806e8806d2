"""Masks that read no gradient: chosen by hand, or at random."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ssam_jax._base import checks, trees
from ssam_jax.masks.fitting import check_bools, check_pattern
from ssam_jax.masks.patterns import Pattern, Unstructured
from ssam_jax.masks.rule import MaskRule, OnBits
from ssam_jax.typing import Mask, Params, PyTree


def fixed_mask(tree_or_predicate: Mask | Callable[[str], bool], *, packed: bool = True) -> MaskRule:
    """Perturb a part of the parameters that is chosen once, by hand.

    Args:
      tree_or_predicate: a pytree of bools or bool arrays, a prefix of the parameters' tree whose
        leaves broadcast against them; or a function of a parameter's path, such as
        ``"params/Dense_0/kernel"``, that returns whether to perturb it. "Norm layers only" is
        ``fixed_mask(lambda path: "norm" in path.lower())``.
      packed: as for `MaskRule`.

    Returns:
      A `MaskRule` whose mask only `set_mask` changes.

    Raises:
      TypeError: ``packed`` or a leaf of the tree is not a bool, or a predicate does not take one path; or at
        ``init``, a predicate's answer is not a bool.
      ValueError: at ``init``, the tree does not fit the parameters, or the predicate is true of none of them.
    """
    _check_choice(tree_or_predicate)

    def select(memory: PyTree, mask: Mask | None, params: Params, key: jax.Array, step: jax.Array) -> Mask:
        del memory, key, step
        if mask is not None:
            return mask
        if callable(tree_or_predicate):
            return _by_path(tree_or_predicate, params)
        return _spread(tree_or_predicate, params)

    return MaskRule(select=select, packed=packed)


def random_mask(
    pattern: Pattern, *, refresh_every: int | None = None, seed: int | jax.Array = 0, packed: bool = True
) -> MaskRule:
    """Perturb a random part of the parameters, for ablations.

    Args:
      pattern: the shape and size of the part.
      refresh_every: draw a new mask at the end of every so many steps; None keeps the first.
      seed: as for `MaskRule`.
      packed: as for `MaskRule`.

    Returns:
      A `MaskRule` without memory.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: ``refresh_every`` or ``seed`` is out of range.
    """
    check_pattern(pattern)

    def select(memory: PyTree, mask: Mask | None, params: Params, key: jax.Array, step: jax.Array) -> Mask:
        del memory, mask, step
        return pattern.random(key, params)

    selects = (
        OnBits(select, lambda memory, bits, params, key, step: pattern.drawn_bits(key, params, bits))
        if isinstance(pattern, Unstructured)
        else select
    )
    return MaskRule(select=selects, refresh_every=refresh_every, seed=seed, packed=packed, first=pattern)


def _check_choice(choice: Mask | Callable[[str], bool]) -> None:
    if isinstance(choice, Pattern):
        raise TypeError(
            f"fixed_mask takes a tree of bools or a function of a path, got {choice!r}, which needs scores:"
            " take fixed_mask(pattern(scores)), or random_mask(pattern)."
        )
    if callable(choice):
        checks.takes("predicate", choice, "path")
    else:
        check_bools(choice, "the mask")


def _by_path(predicate: Callable[[str], bool], params: Params) -> Mask:
    def answer(path: str, _: jax.Array) -> bool | jax.Array:
        found = predicate(path)
        if not checks.is_kind(found, jnp.bool_):
            raise TypeError(
                f"the predicate given to fixed_mask must return a bool, got {found!r} for {path!r}."
            )
        return found

    answers = trees.map_with_path(answer, params)
    if all(found is False for found in jax.tree.leaves(answers)):
        _refuse_nothing(params)
    return jax.tree.map(jnp.asarray, answers)


def _refuse_nothing(params: Params) -> None:
    paths = trees.leaf_paths(params)
    if paths:
        shown = ", ".join(map(repr, paths[:5])) + ", ..." * (len(paths) > 5)
        raise ValueError(
            "the predicate given to fixed_mask is False for every parameter, so that nothing would be"
            f" perturbed: the {len(paths)} paths are {shown:.300}. For a step without ascent, pass"
            " grad_fn=None or rho=0."
        )


def _spread(prefix: Mask, params: Params) -> Mask:
    """Return a copy of a tree of masks for every leaf below each of its own."""
    try:
        return jax.tree.map(lambda m, part: jax.tree.map(lambda _: jnp.array(m), part), prefix, params)
    except ValueError as error:
        raise ValueError(
            f"the tree given to fixed_mask must be a prefix of the parameters' tree: {error}"
        ) from None
