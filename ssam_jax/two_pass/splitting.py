"""Split a traced loss by data flow: what depends on an active leaf, and what does not.

First `unfold` rewrites the equations so that the line can be drawn finely: nested ``jit`` is
inlined, a ``checkpoint`` block of which only a part depends on an active leaf becomes two, and a
``scan`` over stacked parameters, active from some row on, becomes one scan for each range of rows.
Then `split` draws it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssam_jax._base import shardings, tracing
from ssam_jax.two_pass import primitives
from ssam_jax.two_pass.active import Active, FirstRow
from ssam_jax.two_pass.primitives import Trait


class Piece(NamedTuple):
    """A range of rows of a leaf, or all of it.

    Attributes:
      leaf: the leaf's number, in flattening order.
      rows: first row and the one after the last; None for the whole leaf.
      active: whether it is perturbed.
    """

    leaf: int
    rows: tuple[int, int] | None
    active: bool

    def of(self, array: Any) -> Any:
        """Return this piece of an array shaped like the leaf."""
        if self.rows is None:
            return array
        return jax.lax.slice_in_dim(shardings.rows_together(array), *self.rows)


class Halves(NamedTuple):
    """A program split in two.

    Attributes:
      prefix: the equations that depend on no active input. It takes the constants and the other
        inputs and returns the cut: whatever of these, and of its results, the suffix reads.
      suffix: the equations that depend on an active input. It takes the active inputs and the cut,
        and returns what the whole program does.
      cut: the variables that ``prefix`` returns.
    """

    prefix: tracing.Equations
    suffix: tracing.Equations
    cut: list[Any]


def pieces(leaves: Sequence[Any], *choices: Active) -> list[Piece]:
    """Return the pieces that ``choices`` cut the leaves into, active where the first choice says so."""
    found = []
    for i, (leaf, *entries) in enumerate(zip(leaves, *choices)):
        first = entries[0]
        cuts = sorted({entry.row for entry in entries if isinstance(entry, FirstRow)})
        if not cuts:
            found.append(Piece(i, None, bool(first)))
            continue
        for rows in itertools.pairwise([0, *cuts, leaf.shape[0]]):
            active = rows[0] >= first.row if isinstance(first, FirstRow) else bool(first)
            found.append(Piece(i, rows, active))
    return found


def join(cuts: Sequence[Piece], values: Sequence[Any]) -> list[Any]:
    """Return the leaves that the values of all pieces, in order, make up."""
    grouped = itertools.groupby(zip(cuts, values), key=lambda pair: pair[0].leaf)
    return [_concatenated([value for _, value in group]) for _, group in grouped]


def unfold(
    traced: tracing.Traced, cuts: Sequence[Piece], values: Sequence[Any]
) -> tuple[tracing.Equations, Sequence[Any]]:
    """Return the equations of a loss as a program of the pieces and of ``traced.args``, unfolded.

    Args:
      traced: the loss.
      cuts: all pieces of all leaves, in order.
      values: their values.

    Returns:
      The equations and the values of their constants.
    """

    def program(values: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        marked = [Moving(value) if cut.active else value for cut, value in zip(cuts, values)]
        grouped = itertools.groupby(zip(cuts, marked), key=lambda pair: pair[0].leaf)
        leaves = [_stacked([value for _, value in group]) for _, group in grouped]
        results = tracing.interpret(traced.jaxpr, traced.consts, [*leaves, *args], _unfold)
        return [_plain(result) for result in results]

    return tracing.retrace(program, list(values), list(traced.args))


def split(jaxpr: tracing.Equations, active: Sequence[bool]) -> Halves:
    """Draw the line between the equations that depend on an active input and the others.

    Args:
      jaxpr: the program.
      active: for each of its inputs, whether it is active.
    """
    moving = {var for var, is_active in zip(jaxpr.invars, active) if is_active}
    before, after = [], []
    for eqn in jaxpr.eqns:
        if any(var in moving for var in tracing.variables(eqn.invars)):
            after.append(eqn)
            moving.update(eqn.outvars)
        else:
            before.append(eqn)
    read = itertools.chain(*(eqn.invars for eqn in after), jaxpr.outvars)
    cut = [var for var in dict.fromkeys(tracing.variables(read)) if var not in moving]
    known = [var for var, is_active in zip(jaxpr.invars, active) if not is_active]
    inputs = [var for var, is_active in zip(jaxpr.invars, active) if is_active]
    return Halves(
        prefix=tracing.sub_jaxpr(jaxpr, [*jaxpr.constvars, *known], cut, before),
        suffix=tracing.sub_jaxpr(jaxpr, [*inputs, *cut], jaxpr.outvars, after),
        cut=cut,
    )


def carries_gradient(jaxpr: tracing.Equations, inputs: Sequence[Any]) -> list[bool]:
    """Return for each of the ``inputs`` whether a gradient may flow to it from the first result.

    A value that only aux or a ``stop_gradient`` reads must not get a cotangent of zeros: times an
    infinite derivative it is NaN, and computing with it costs what computing with any other does.
    """
    found = set(tracing.variables(jaxpr.outvars[:1]))
    for eqn in reversed(jaxpr.eqns):
        if not primitives.has(eqn, Trait.CONSTANT) and any(var in found for var in eqn.outvars):
            found.update(tracing.variables(eqn.invars))
    return [var in found and tracing.is_inexact(var) for var in inputs]


@dataclass(frozen=True)
class Moving:
    """A value that depends on an active leaf; one that does not travels without a wrapper."""

    value: Any


@dataclass(frozen=True)
class Rows:
    """An array kept as consecutive ranges of its rows, each with or without the wrapper."""

    parts: tuple[Any, ...]

    @property
    def bounds(self) -> list[int]:
        """The first row of each part, and the number of rows."""
        return [0, *itertools.accumulate(_plain(part).shape[0] for part in self.parts)]

    def between(self, start: int, stop: int) -> Any:
        """Return some of the rows: a part of one of the parts, or else again `Rows`."""
        found = []
        for part, (first, end) in zip(self.parts, itertools.pairwise(self.bounds)):
            low, high = max(start, first), min(stop, end)
            if low < high:
                found.append(_rows(part, low - first, high - first))
        return _stacked(found)


def _unfold(eqn: tracing.Equation, operands: list[Any]) -> list[Any]:
    """Compute an equation on marked values, its own structure opened up where that helps."""
    moving = [isinstance(operand, Moving) for operand in operands]
    by_rows = any(isinstance(operand, Rows) for operand in operands)
    mixed = by_rows or (any(moving) and not all(moving))
    body = tracing.inlined_body(eqn)
    if mixed and body is not None:
        return tracing.interpret(body.jaxpr, body.consts, operands, _unfold)
    if mixed and primitives.has(eqn, Trait.CHECKPOINT):
        return _unfold_checkpoint(eqn, operands)
    if by_rows and eqn.primitive.name == "scan":
        return _unfold_scan(eqn, operands)
    if by_rows and (result := _row_by_row(eqn, operands)) is not None:
        return [result]
    return _marked(tracing.apply(eqn, [_plain(x) for x in operands]), any(map(_moves, operands)))


def _unfold_checkpoint(eqn: tracing.Equation, operands: list[Any]) -> list[Any]:
    """Cut a ``checkpoint`` block in two: each half is recomputed in its own backward pass."""
    flat, tree = jax.tree.flatten(
        [list(x.parts) if isinstance(x, Rows) else x for x in operands],
        is_leaf=lambda x: isinstance(x, Moving),
    )

    def program(*values: Any) -> list[Any]:
        marked = [Moving(value) if _moves(x) else value for x, value in zip(flat, values)]
        rebuilt = [_stacked(x) if isinstance(x, list) else x for x in jax.tree.unflatten(tree, marked)]
        return [_plain(x) for x in tracing.interpret(eqn.params["jaxpr"], (), rebuilt, _unfold)]

    values = [_plain(x) for x in flat]
    jaxpr, consts = tracing.retrace(program, *values)
    prevent_cse = bool(np.any(eqn.params["prevent_cse"]))  # it may be one for each operand
    active = [_moves(x) for x in flat]
    prefix, suffix, cut = split(jaxpr, active)
    known = [*consts, *(value for value, is_active in zip(values, active) if not is_active)]
    available: dict[Any, Any] = dict(zip(prefix.invars, known))
    computed = [var for var in cut if var not in available]
    if computed:
        block = prefix.replace(outvars=computed)
        available.update(zip(computed, tracing.bind(eqn, known, jaxpr=block, prevent_cse=prevent_cse)))
    inputs = [value for value, is_active in zip(values, active) if is_active]
    inputs += [available[var] for var in cut]
    results = tracing.bind(eqn, inputs, jaxpr=suffix, prevent_cse=prevent_cse)
    moved = tracing.depends(jaxpr, [var for var, is_active in zip(jaxpr.invars, active) if is_active])
    return [
        Moving(result) if moves else result if tracing.is_literal(atom) else available[atom]
        for result, moves, atom in zip(results, moved, jaxpr.outvars)
    ]


def _unfold_scan(eqn: tracing.Equation, operands: list[Any]) -> list[Any]:
    """Emit a scan once for each range of rows of what it scans over."""
    n_consts, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry = operands[:n_consts], operands[n_consts : n_consts + n_carry]
    xs = operands[n_consts + n_carry :]
    bounds = sorted({row for x in xs if isinstance(x, Rows) for row in x.bounds}) or [0, eqn.params["length"]]
    ranges = list(itertools.pairwise(bounds))
    ys = []
    for start, stop in reversed(ranges) if eqn.params["reverse"] else ranges:
        current = [*consts, *carry, *(_rows(x, start, stop) for x in xs)]
        results = tracing.bind(eqn, [_plain(x) for x in current], length=stop - start)
        marked = _marked(results, any(map(_moves, current)))
        carry = marked[:n_carry]
        ys.append(marked[n_carry:])
    if eqn.params["reverse"]:
        ys.reverse()
    return [*carry, *(_stacked(list(parts)) for parts in zip(*ys))]


def _row_by_row(eqn: tracing.Equation, operands: list[Any]) -> Any:
    """Compute an equation on `Rows` and keep them apart, or return None if it mixes rows."""
    if eqn.primitive.name == "slice":
        return _sliced(eqn, operands[0])
    bounds = sorted({row for x in operands if isinstance(x, Rows) for row in x.bounds})
    parts = []
    for start, stop in itertools.pairwise(bounds):
        params = params_for_rows(eqn, stop - start)
        if params is None:
            return None
        current = [_rows(x, start, stop) for x in operands]
        results = tracing.bind(eqn, [_plain(x) for x in current], **params)
        parts += _marked(results, any(map(_moves, current)))
    return _stacked(parts)


def params_for_rows(eqn: tracing.Equation, rows: int) -> dict[str, Any] | None:
    """Return what changes in an equation computed on fewer rows; None if rows do not stay apart."""
    if primitives.has(eqn, Trait.ELEMENTWISE):
        return {}
    params, source = eqn.params, tracing.shape(eqn.invars[0])
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


def _sliced(eqn: tracing.Equation, rows: Rows) -> Any:
    """Return a slice of `Rows`, such as the one layer that a loop has come to."""
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    if eqn.params["strides"] is not None or start[0] == limit[0]:
        return None
    picked = rows.between(start[0], limit[0])
    parts = []
    for part in picked.parts if isinstance(picked, Rows) else (picked,):
        limits = (_plain(part).shape[0], *limit[1:])
        result = tracing.bind(eqn, [_plain(part)], start_indices=(0, *start[1:]), limit_indices=limits)
        parts += _marked(result, _moves(part))
    return _stacked(parts)


def _rows(value: Any, start: int, stop: int) -> Any:
    """Return some rows of a value, which may be marked; of one that is broadcast over the rows, all."""
    if isinstance(value, Rows):
        return value.between(start, stop)
    array = _plain(value)
    if jnp.ndim(array) == 0 or array.shape[0] == 1 or (start, stop) == (0, array.shape[0]):
        return value
    return _marked([jax.lax.slice_in_dim(array, start, stop)], _moves(value))[0]


def _stacked(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else Rows(tuple(parts))


def _moves(value: Any) -> bool:
    """Whether any of a value depends on an active leaf."""
    return isinstance(value, Moving) or (isinstance(value, Rows) and any(map(_moves, value.parts)))


def _plain(value: Any) -> Any:
    """Return the array without its marks."""
    if isinstance(value, Moving):
        return value.value
    return _concatenated([_plain(x) for x in value.parts]) if isinstance(value, Rows) else value


def _marked(values: Sequence[Any], moving: bool) -> list[Any]:
    return [Moving(value) for value in values] if moving else list(values)


def _concatenated(arrays: list[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else jax.lax.concatenate(arrays, 0)
