"""Arrays kept as ranges of rows, of which only some depend on an active leaf.

A leaf that stacks layers may be active from some row on. Its rows then travel through the program apart, as
`Rows`, for as long as the equations leave them apart, up to the ``scan`` or the slice that takes them
layer by layer. An equation that mixes rows gets the complete array, which depends on an active leaf.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from ssam_jax._base import tracing
from ssam_jax.two_pass import primitives
from ssam_jax.two_pass.primitives import Trait


@dataclass(frozen=True)
class Moving:
    """A value that depends on an active leaf; one that does not travels without a wrapper."""

    value: tracing.Value


@dataclass(frozen=True)
class Rows:
    """An array kept as consecutive blocks of its rows, at least two, each a `Moving` or a plain array."""

    blocks: tuple["Marked", ...]

    @property
    def bounds(self) -> list[int]:
        """The first row of each block, and the number of rows."""
        return [0, *itertools.accumulate(plain(block).shape[0] for block in self.blocks)]

    def between(self, start: int, stop: int) -> "Marked":
        """Return some of the rows: a part of one block, or else again `Rows`."""
        found = []
        for block, (first, end) in zip(self.blocks, itertools.pairwise(self.bounds)):
            low, high = max(start, first), min(stop, end)
            if low < high:
                found.append(take(block, low - first, high - first))
        return stack(found)


Marked: TypeAlias = Moving | Rows | Any
"""A value with its mark: `Moving`, `Rows`, or a plain array that depends on no active leaf."""


def mark(values: Sequence[tracing.Value], moving: bool) -> list[Marked]:
    """Return values, each as one that depends on an active leaf if ``moving``."""
    return [Moving(value) for value in values] if moving else list(values)


def moves(value: Marked) -> bool:
    """Whether any of a value depends on an active leaf."""
    return isinstance(value, Moving) or (isinstance(value, Rows) and any(map(moves, value.blocks)))


def plain(value: Marked) -> tracing.Value:
    """Return the complete array without its marks."""
    if isinstance(value, Moving):
        return value.value
    return concatenate([plain(block) for block in value.blocks]) if isinstance(value, Rows) else value


def stack(blocks: Sequence[Marked]) -> Marked:
    """Return blocks of rows as one value."""
    return blocks[0] if len(blocks) == 1 else Rows(tuple(blocks))


def concatenate(arrays: Sequence[tracing.Value]) -> tracing.Value:
    """Return the array of all rows."""
    return arrays[0] if len(arrays) == 1 else jax.lax.concatenate(arrays, 0)


def take(value: Marked, start: int, stop: int) -> Marked:
    """Return some rows of a value; all of one that is broadcast over the rows."""
    if isinstance(value, Rows):
        return value.between(start, stop)
    array = plain(value)
    if jnp.ndim(array) == 0 or array.shape[0] == 1 or (start, stop) == (0, array.shape[0]):
        return value
    return mark([jax.lax.slice_in_dim(array, start, stop)], moves(value))[0]


def compute(eqn: tracing.Equation, operands: Sequence[Marked]) -> Marked | None:
    """Compute an equation on `Rows` block by block; None if it mixes rows."""
    if eqn.primitive.name == "slice" and isinstance(operands[0], Rows):
        return _slice(eqn, operands[0])
    blocks: list[Marked] = []
    # A block of the result ends wherever a block of an operand does.
    for start, stop in itertools.pairwise(_bounds(operands)):
        params = params_for_rows(eqn, stop - start)
        if params is None:
            return None
        current = [take(x, start, stop) for x in operands]
        blocks += mark(tracing.bind(eqn, [plain(x) for x in current], **params), any(map(moves, current)))
    return stack(blocks)


def scan(eqn: tracing.Equation, operands: Sequence[Marked]) -> list[Marked]:
    """Compute a ``scan`` as one scan for each range of rows of what it scans over.

    The carry of one scan starts the next, so that it depends on an active leaf only from the first range
    that does.
    """
    n_consts, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry = operands[:n_consts], operands[n_consts : n_consts + n_carry]
    xs = operands[n_consts + n_carry :]
    ranges = list(itertools.pairwise(_bounds(xs) or [0, eqn.params["length"]]))
    ys = []
    for start, stop in reversed(ranges) if eqn.params["reverse"] else ranges:
        current = [*consts, *carry, *(take(x, start, stop) for x in xs)]
        results = tracing.bind(eqn, [plain(x) for x in current], length=stop - start)
        marked = mark(results, any(map(moves, current)))
        carry = marked[:n_carry]
        ys.append(marked[n_carry:])
    if eqn.params["reverse"]:
        ys.reverse()
    return [*carry, *(stack(blocks) for blocks in zip(*ys))]


def _bounds(values: Sequence[Marked]) -> list[int]:
    return sorted({row for x in values if isinstance(x, Rows) for row in x.bounds})


def params_for_rows(eqn: tracing.Equation, rows: int) -> dict[str, Any] | None:
    """Return what changes in an equation computed on fewer rows; None if it does not keep rows apart.

    It keeps them apart if row i of the result depends on row i of each operand alone.
    """
    if primitives.has(eqn, Trait.ELEMENTWISE):
        return {}
    params, source = eqn.params, tracing.shape(eqn.invars[0]) if eqn.invars else ()
    match eqn.primitive.name:
        case "transpose" if params["permutation"][0] == 0:
            return {}
        case "squeeze" if 0 not in params["dimensions"]:
            return {}
        case "reshape" if params["dimensions"] is None and params["new_sizes"][:1] == source[:1]:
            return {"new_sizes": (rows, *params["new_sizes"][1:])}
        case "reshard" if tuple(params["dst_sharding"].spec)[:1] in ((), (None,)):
            return {}
        case "broadcast_in_dim" if params["broadcast_dimensions"][:1] == (0,) and (
            params["shape"][0] == source[0]
        ):
            return {"shape": (rows, *params["shape"][1:])}
    return None


def _slice(eqn: tracing.Equation, rows: Rows) -> Marked | None:
    """Return a slice of `Rows`, such as the one layer that an unrolled loop has come to."""
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    if eqn.params["strides"] is not None or start[0] == limit[0]:
        return None
    picked = rows.between(start[0], limit[0])
    blocks: list[Marked] = []
    for block in picked.blocks if isinstance(picked, Rows) else (picked,):
        limits = (plain(block).shape[0], *limit[1:])
        result = tracing.bind(eqn, [plain(block)], start_indices=(0, *start[1:]), limit_indices=limits)
        blocks += mark(result, moves(block))
    return stack(blocks)
