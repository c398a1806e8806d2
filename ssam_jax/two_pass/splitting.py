"""Split a traced loss by data flow: what depends on an active leaf, and what does not.

First `unfold` rewrites the equations so that the line between the two can be drawn finely: nested ``jit``
is inlined, a ``checkpoint`` block of which only a part depends on an active leaf becomes two, and a
``scan`` over stacked parameters, active from some row on, becomes one scan for each range of rows.
Then `split` draws it. The values that cross the line are the *cut*.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssam_jax._base import shardings, tracing
from ssam_jax.two_pass import primitives, rows
from ssam_jax.two_pass.active import Active, FirstRow
from ssam_jax.two_pass.primitives import Trait
from ssam_jax.two_pass.rows import Marked, Moving, Rows


class Piece(NamedTuple):
    """A range of rows of a leaf, or all of it.

    Attributes:
      leaf: the leaf's number, in flattening order.
      rows: first row and the one after the last; None for the complete leaf.
      active: whether it is perturbed.
    """

    leaf: int
    rows: tuple[int, int] | None
    active: bool

    def of(self, array: tracing.Value) -> tracing.Value:
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
        and returns what the original program does.
      cut: the variables that ``prefix`` returns.
    """

    prefix: tracing.Equations
    suffix: tracing.Equations
    cut: list[tracing.Variable]


def pieces(leaves: Sequence[tracing.Value], *choices: Active) -> list[Piece]:
    """Divide the leaves at every row that a choice names; the first choice says which pieces are active."""
    found = []
    for i, (leaf, *entries) in enumerate(zip(leaves, *choices)):
        first = entries[0]
        named = sorted({entry.row for entry in entries if isinstance(entry, FirstRow)})
        if not named:
            found.append(Piece(i, None, bool(first)))
            continue
        for bounds in itertools.pairwise([0, *named, leaf.shape[0]]):
            active = bounds[0] >= first.row if isinstance(first, FirstRow) else bool(first)
            found.append(Piece(i, bounds, active))
    return found


def join(pieces: Sequence[Piece], values: Sequence[tracing.Value]) -> list[tracing.Value]:
    """Return the leaves that the values of all pieces, in order, make up."""
    return [rows.concatenate(blocks) for blocks in _by_leaf(pieces, values)]


def _by_leaf(pieces: Sequence[Piece], values: Sequence[Marked]) -> list[list[Marked]]:
    grouped = itertools.groupby(zip(pieces, values), key=lambda pair: pair[0].leaf)
    return [[value for _, value in group] for _, group in grouped]


def unfold(
    traced: tracing.Traced, pieces: Sequence[Piece], values: Sequence[tracing.Value]
) -> tuple[tracing.Equations, Sequence[tracing.Value]]:
    """Return the equations of a loss as a program of the pieces and of ``traced.args``, unfolded.

    Args:
      traced: the loss.
      pieces: all pieces of all leaves, in order.
      values: their values.

    Returns:
      The equations and the values of their constants.
    """

    def program(values: Sequence[jax.Array], args: Sequence[jax.Array]) -> list[tracing.Value]:
        marked = [Moving(value) if piece.active else value for piece, value in zip(pieces, values)]
        leaves = list(map(rows.stack, _by_leaf(pieces, marked)))
        results = tracing.interpret(traced.jaxpr, traced.consts, [*leaves, *args], _unfold)
        return [rows.plain(result) for result in results]

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


def carries_gradient(jaxpr: tracing.Equations, inputs: Sequence[tracing.Variable]) -> list[bool]:
    """Return for each of the ``inputs`` whether a gradient may flow to it from the first result.

    A value that only aux or a ``stop_gradient`` reads must not get a cotangent of zeros: times an
    infinite derivative it is NaN, and computing with it costs what computing with any other does.
    """
    found = set(tracing.variables(jaxpr.outvars[:1]))
    for eqn in reversed(jaxpr.eqns):
        if any(var in found for var in eqn.outvars) and not primitives.has(eqn, Trait.CONSTANT):
            found.update(tracing.variables(eqn.invars))
    return [var in found and tracing.is_inexact(var) for var in inputs]


def have_derivatives(values: Sequence[tracing.Value], inputs: Sequence[jax.Array]) -> list[bool]:
    """Return for each value whether its derivative may not be zero; called while JAX differentiates.

    JAX knows of a value behind ``stop_gradient`` that its derivative is zero, and takes it then for the fixed
    operand of an operation that has no derivative by it (``jax.custom_derivatives.linear_call``).

    Args:
      values: what the function that is differentiated has computed.
      inputs: what it is differentiated by.
    """
    known = [False] * len(values)
    places = [i for i, value in enumerate(values) if tracing.is_inexact(value)]

    @jax.custom_jvp
    def watched(inputs: Sequence[jax.Array], *values: jax.Array) -> tuple[jax.Array, ...]:
        return values

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        for i, tangent in zip(places, tangents[1:]):
            known[i] = not isinstance(tangent, jax.custom_derivatives.SymbolicZero)
        return primals[1:], tuple(map(jnp.zeros_like, primals[1:]))

    watched.defjvp(rule, symbolic_zeros=True)
    if inputs:  # with which the rule is called at this level of differentiation, and not at one around it
        watched(inputs, *(values[i] for i in places))
    return known


def _unfold(eqn: tracing.Equation, operands: list[Marked]) -> list[Marked]:
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
        return rows.scan(eqn, operands)
    if by_rows and (result := rows.compute(eqn, operands)) is not None:
        return [result]
    return rows.mark(tracing.apply(eqn, [rows.plain(x) for x in operands]), any(map(rows.moves, operands)))


def _unfold_checkpoint(eqn: tracing.Equation, operands: list[Marked]) -> list[Marked]:
    """Divide a ``checkpoint`` block in two: each half is recomputed in its own backward pass."""
    flat, tree = jax.tree.flatten(
        [list(x.blocks) if isinstance(x, Rows) else x for x in operands],
        is_leaf=lambda x: isinstance(x, Moving),
    )

    def program(*values: jax.Array) -> list[tracing.Value]:
        marked = [Moving(value) if rows.moves(x) else value for x, value in zip(flat, values)]
        rebuilt = [rows.stack(x) if isinstance(x, list) else x for x in jax.tree.unflatten(tree, marked)]
        return [rows.plain(x) for x in tracing.interpret(eqn.params["jaxpr"], (), rebuilt, _unfold)]

    values = [rows.plain(x) for x in flat]
    jaxpr, consts = tracing.retrace(program, *values)
    prevent_cse = bool(np.any(eqn.params["prevent_cse"]))  # it may be one for each operand
    active = [rows.moves(x) for x in flat]
    prefix, suffix, cut = split(jaxpr, active)
    known = [*consts, *(value for value, is_active in zip(values, active) if not is_active)]
    available: dict[tracing.Atom, tracing.Value] = dict(zip(prefix.invars, known))
    # Of the cut, constants and operands are there already; only the rest needs the first half.
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
