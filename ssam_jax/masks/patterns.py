"""Sparsity patterns: small frozen values that turn scores into a mask of an exact size.

``pattern(scores)`` takes a pytree of floats and returns a pytree of bool arrays, True where the
parameter is perturbed, whose leaves broadcast against the scores. Larger scores are kept, NaN
counts as the lowest, and ties go to the earlier leaf and the lower row-major index.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ssam_jax._base import checks, shardings, trees
from ssam_jax.masks import groups, hashing, packing, units
from ssam_jax.masks.units import Units
from ssam_jax.typing import Mask, Params, Scores


class Pattern(abc.ABC):
    """What a mask rule needs of a pattern; subclass it and write ``__call__`` for one of your own."""

    @abc.abstractmethod
    def __call__(self, scores: Scores) -> Mask:
        """Return the mask that keeps the largest scores."""

    def random(self, key: jax.Array, params: Params) -> Mask:
        """Return a random mask that obeys the pattern.

        Args:
          key: a typed PRNG key.
          params: the tree to make a mask for; only shapes and shardings are read.

        Raises:
          TypeError: ``key`` is not a typed PRNG key, or an array of several.
        """
        check_key(key)

        def draw(params: Params, key: jax.Array) -> Scores:
            leaves, treedef = jax.tree.flatten(params)
            return jax.tree.unflatten(treedef, hashing.uniform(key, [jnp.shape(leaf) for leaf in leaves]))

        return self(shardings.computed_like(params, draw, key))


class CompiledPattern(Pattern):
    """A pattern that is compiled once for trees of some shapes, also where the caller uses no ``jit``."""

    def __call__(self, scores: Scores) -> Mask:
        _check_scores(scores)
        scores = jax.tree.map(jnp.asarray, scores)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(scores)):
            return shardings.computed_like(scores, self._best)
        return jax.tree.map(shardings.alike, _best(self, scores), scores)

    def random(self, key: jax.Array, params: Params) -> Mask:
        """Return a random mask in which every unit is as likely as any other of its size."""
        check_key(key)
        return shardings.computed_like(params, self._any, key)

    def random_bits(self, key: jax.Array, params: Params, *, packed: bool) -> Mask:
        """Return a random mask, packed if asked for; on a single device."""
        mask = self._any(params, key, packed=packed)
        return packing.pack(mask) if packed else mask

    @abc.abstractmethod
    def _best(self, scores: Scores) -> Mask:
        """Return the mask that keeps the largest scores."""

    @abc.abstractmethod
    def _any(self, params: Params, key: jax.Array, *, packed: bool = False) -> Mask:
        """Return a random mask, if asked for with those leaves packed that are along their last axis."""


@functools.partial(jax.jit, static_argnums=0)
def _best(pattern: CompiledPattern, scores: Scores) -> Mask:
    return shardings.computed_like(scores, pattern._best)


class UnitPattern(CompiledPattern):
    """A pattern that keeps or leaves units (entries, slices, blocks or tensors) to reach a density.

    A unit's score is the mean over its entries. Every unit of one leaf has the same size.
    """

    sparsity: float

    def _best(self, scores: Scores) -> Mask:
        leaves, treedef = jax.tree.flatten(scores)
        found = units.best(leaves, self.units(scores), self.sparsity, shared=self.shared)
        return jax.tree.unflatten(treedef, found)

    def _any(self, params: Params, key: jax.Array, *, packed: bool = False) -> Mask:
        found = units.drawn(key, self.units(params), self.sparsity, shared=self.shared, packed=packed)
        return jax.tree.unflatten(jax.tree.structure(params), found)

    def units(self, params: Params) -> list[Units]:
        """Return how the entries of each leaf form units."""
        return _on_each_leaf(lambda leaf: self.units_of(jnp.shape(leaf)), params)

    @property
    def shared(self) -> bool:
        """Whether the leaves compete for one budget."""
        return True

    @abc.abstractmethod
    def units_of(self, shape: tuple[int, ...]) -> Units:
        """Return how the entries of a leaf of a shape form units."""


@dataclasses.dataclass(frozen=True)
class Unstructured(UnitPattern):
    """Keep single entries: exactly ``round((1 - sparsity) * size)`` of them, halves to even.

    Attributes:
      sparsity: the share of entries that are NOT perturbed, 0 to 1.
      scope: ``"global"`` ranks the complete tree at once, as the paper does (arXiv 2306.17504);
        ``"leaf"`` gives every leaf the same density.

    >>> import jax.numpy as jnp
    >>> Unstructured(sparsity=0.5)({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 0.0])})
    {'a': Array([ True, False], dtype=bool), 'b': Array([ True, False], dtype=bool)}
    """

    sparsity: float
    scope: Literal["global", "leaf"] = "global"

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        checks.choice("scope", self.scope, ("global", "leaf"))

    @property
    def shared(self) -> bool:
        return self.scope == "global"

    def units_of(self, shape: tuple[int, ...]) -> Units:
        return Units(shape, (1,) * len(shape), shape)

    def drawn_bits(self, key: jax.Array, params: Params, bits: Mask) -> tuple[Mask, jax.Array]:
        """Return a random mask, packed as another one is, and its churn; on a single device."""
        old = jax.tree.leaves(bits)
        new, churn = units.drawn_entries(key, old, self.units(params), self.sparsity, shared=self.shared)
        return jax.tree.unflatten(jax.tree.structure(bits), new), churn

    def largest_bits(self, scores: Scores, bits: Mask) -> tuple[Mask, jax.Array]:
        """Return the mask that keeps the largest scores, packed as another one is, and its churn.

        On a single device.
        """
        leaves, old = jax.tree.leaves(scores), jax.tree.leaves(bits)
        new, churn = units.best_entries(leaves, old, self.units(scores), self.sparsity, shared=self.shared)
        return jax.tree.unflatten(jax.tree.structure(bits), new), churn


@dataclasses.dataclass(frozen=True)
class Structured(UnitPattern):
    """Keep complete units, best mean score first, until the kept entries reach the target density.

    All leaves compete. The unit with which ``round((1 - sparsity) * size)`` kept entries are reached
    is kept too, so the density is never below ``1 - sparsity``.

    Attributes:
      sparsity: the share of entries that are NOT perturbed, 0 to 1.
      unit: ``"tensor"``: a complete leaf, its mask a scalar. ``"channel"``: a slice at one index of
        ``axis``, its mask one value for each index, of shape (1, .., size, .., 1). ``"block"``: a
        tile, its mask as large as the leaf.
      axis: the axis (channel), or the axis or axes (block), that index the units. A leaf without
        such an axis (a bias, where axis is -2) is one unit. Not for tensors.
      block: the tile's extent along each of ``axis``. Other axes are covered by one entry each.
      indivisible: what becomes of a leaf whose axis ``block`` does not divide: ``"error"``, or
        ``"whole"`` to make the leaf one unit.

    >>> import jax.numpy as jnp
    >>> scores = {"bias": jnp.array([1.0, 9.0]), "kernel": jnp.array([[3.0, 4.0], [5.0, 0.0]])}
    >>> Structured(sparsity=0.5, unit="tensor")(scores)
    {'bias': Array(True, dtype=bool), 'kernel': Array(True, dtype=bool)}
    >>> Structured(sparsity=0.5, unit="channel", axis=-1)(scores)["kernel"]
    Array([[ True, False]], dtype=bool)
    """

    sparsity: float
    unit: Literal["tensor", "channel", "block"] = "tensor"
    axis: int | tuple[int, ...] | None = None
    block: int | tuple[int, ...] | None = None
    indivisible: Literal["error", "whole"] = "error"

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        checks.choice("unit", self.unit, ("tensor", "channel", "block"))
        checks.choice("indivisible", self.indivisible, ("error", "whole"))
        if self.unit == "tensor" and self.axis is not None:
            raise ValueError(f"axis must be None when unit is 'tensor', got {self.axis!r}.")
        if (self.unit == "block") != (self.block is not None):
            raise ValueError(f"block must be given when unit is 'block', and only then, got {self.block!r}.")
        if self.unit == "channel" and not isinstance(self.axis, int | None):
            raise ValueError(f"axis must be an int when unit is 'channel', got {self.axis!r}.")
        for name, values in (("axis", self._axes), ("block", self._blocks)):
            if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
                raise ValueError(f"{name} must be an int or a tuple of them, got {getattr(self, name)!r}.")
        if self.unit == "block":
            if len(self._axes) != len(self._blocks):
                raise ValueError(
                    "axis and block must name as many axes as extents,"
                    f" got axis={self.axis!r} and block={self.block!r}."
                )
            if min(self._blocks, default=0) < 1:
                raise ValueError(f"block must hold at least 1 entry along each axis, got {self.block!r}.")

    @property
    def _axes(self) -> tuple[int, ...]:
        if self.unit == "tensor":
            return ()
        axis = self.axis
        if axis is None:  # the last axis or axes: output channels of a Flax kernel
            axis = tuple(range(-len(self._blocks), 0)) if self.unit == "block" else -1
        return axis if isinstance(axis, tuple) else (axis,)

    @property
    def _blocks(self) -> tuple[int, ...]:
        block = 1 if self.block is None else self.block
        return block if isinstance(block, tuple) else (block,)

    def _extents(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return how far a unit reaches along each axis of a leaf."""
        rank = len(shape)
        if self.unit == "tensor" or any(not -rank <= axis < rank for axis in self._axes):
            return shape
        if len({axis % rank for axis in self._axes}) < len(self._axes):
            raise _MisfitError(f"axis={self.axis} names an axis of its {rank} twice")
        extents = list(shape if self.unit == "channel" else (1,) * rank)
        for axis, extent in zip(self._axes, self._blocks):
            extents[axis] = extent
            if shape[axis] % extent:
                if self.indivisible == "whole":
                    return shape
                raise _MisfitError(
                    f"its axis {axis} of size {shape[axis]} is not divisible by block={extent};"
                    " choose another block, or indivisible='whole'"
                )
        return tuple(extents)

    def units_of(self, shape: tuple[int, ...]) -> Units:
        if 0 in shape:
            return Units(shape, (1,) * len(shape), shape)
        extents = self._extents(shape)
        if extents == shape:  # one unit: a scalar, whatever the rank
            return Units(shape, extents, ())
        found = Units(shape, extents, shape)
        return found if self.unit == "block" else found._replace(mask=found.shape)


@dataclasses.dataclass(frozen=True)
class NM(CompiledPattern):
    """Keep exactly the ``n`` largest of every ``m`` consecutive entries along an axis.

    Leaves of rank below 2 (biases, norm scales) are perturbed completely: their mask is a scalar True.

    Attributes:
      n: entries kept in each group, 0 to ``m``.
      m: entries in a group.
      axis: the axis that is grouped. The last one, a Flax kernel's outputs, is the contraction axis
        of the backward product that is to become sparse, for Dense and Conv kernels alike.
      indivisible: what becomes of a leaf whose axis ``m`` does not divide (a head of 10 classes):
        ``"error"``, or ``"whole"`` to perturb the leaf whole, as a bias is.

    >>> import jax.numpy as jnp
    >>> NM(2, 4)(jnp.array([[1.0, 4.0, 3.0, 2.0]]))
    Array([[False,  True,  True, False]], dtype=bool)
    """

    n: int
    m: int
    axis: int = -1
    indivisible: Literal["error", "whole"] = "error"

    def __post_init__(self) -> None:
        for name in ("n", "m", "axis"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}.")
        if self.m < 1 or not 0 <= self.n <= self.m:
            raise ValueError(f"n and m must satisfy 0 <= n <= m and m >= 1, got n={self.n}, m={self.m}.")
        checks.choice("indivisible", self.indivisible, ("error", "whole"))

    def _best(self, scores: Scores) -> Mask:
        leaves, treedef = jax.tree.flatten(scores)
        grouped = _on_each_leaf(lambda leaf: self._groups(leaf.shape), scores)
        found = groups.best(leaves, grouped, self.n, self.m, self.axis)
        return jax.tree.unflatten(treedef, found)

    def _any(self, params: Params, key: jax.Array, *, packed: bool = False) -> Mask:
        leaves, treedef = jax.tree.flatten(params)
        grouped = _on_each_leaf(lambda leaf: self._groups(jnp.shape(leaf)), params)
        shapes = [jnp.shape(leaf) for leaf in leaves]
        found = groups.drawn(key, shapes, grouped, self.n, self.m, self.axis, packed=packed)
        return jax.tree.unflatten(treedef, found)

    def _groups(self, shape: tuple[int, ...]) -> bool:
        """Return whether a leaf is grouped, and not perturbed completely."""
        if len(shape) < 2:
            return False
        if not -len(shape) <= self.axis < len(shape):
            raise _MisfitError(f"it has no axis {self.axis}")
        if shape[self.axis] % self.m:
            if self.indivisible == "whole":
                return False
            raise _MisfitError(
                f"its axis {self.axis} of size {shape[self.axis]} is not divisible by m={self.m};"
                " choose another axis, or indivisible='whole'"
            )
        return True


class _MisfitError(ValueError):
    """A pattern does not fit a leaf; says why, but not which."""


def _on_each_leaf(fn: Callable[[Any], Any], tree: Any) -> list[Any]:
    """Return ``fn(leaf)`` for every leaf; an error names the leaf that the pattern does not fit."""
    results = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        try:
            results.append(fn(leaf))
        except _MisfitError as error:
            name = trees.path_name(path)
            raise ValueError(f"the pattern does not fit the leaf {name!r}: {error}.") from None
    return results


def _check_sparsity(sparsity: Any) -> None:
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise TypeError(f"sparsity must be a float from 0 to 1, got {sparsity!r}.")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity, the share NOT perturbed, must be from 0 to 1, got {sparsity!r}.")


def _check_scores(scores: Any) -> None:
    trees.check_floating(scores, "scores")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(scores)):
        raise TypeError(
            "scores must hold arrays, got shapes alone (jax.ShapeDtypeStruct): take pattern.random(key,"
            " params), which reads no more of params, or jax.eval_shape(pattern, scores)."
        )


def check_key(key: Any) -> None:
    """Raise TypeError unless ``key`` is a single typed PRNG key."""
    if not jnp.issubdtype(getattr(key, "dtype", jnp.bool_), jax.dtypes.prng_key) or key.shape:
        got = f"{checks.named(checks.kind(key))} of shape {key.shape}" if hasattr(key, "dtype") else repr(key)
        raise TypeError(
            "key must be one typed PRNG key, as jax.random.key(seed) makes it (and"
            f" jax.random.wrap_key_data of an old one), got {got}."
        )
