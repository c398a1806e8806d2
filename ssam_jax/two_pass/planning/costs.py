"""What a step costs, counted in matrix products and convolutions on the equations of loss and gradient.

An SGD step computes each product of them once. The two passes pay on top of that for

- a product of the forward pass, again in the descent pass, if it depends on an active leaf;
- a product of the backward pass, in the clean pass, if the gradient of an active leaf needs it;
- a product that a ``checkpoint`` recomputes, in the clean pass, if both are true.

Each of these is a *unit*: a number of operations and a set of leaves, paid as soon as one of the set is
active. The cost of a choice of leaves is then a sum, known before anything is compiled.

So each product needs two sets: the leaves that it depends on, found on a walk forward, and the leaves whose
gradients need it, found on a walk backward.
"""

import functools
import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from ssam_jax._base import tracing
from ssam_jax.two_pass.active import Active, FirstRow
from ssam_jax.two_pass.planning import counting
from ssam_jax.two_pass.rows import params_for_rows

Leaves: TypeAlias = int
"""A set of leaves and of rows of stacked leaves, a bit for each.

One more bit, after all leaves, stands for the loss. A value that depends on it belongs to the backward pass,
where it depends on the cotangent of the loss. A value that it needs is needed for the loss or for aux.
"""

Rows: TypeAlias = tuple[Leaves, ...]
"""One set for all of a value, or one for each of its rows."""

NONE: Rows = (0,)


@dataclass(frozen=True)
class Costs:
    """What the steps of one loss cost, in operations; a multiply-add is two.

    Attributes:
      sgd: of forward and backward pass.
      units: set of leaves to the operations that are added once one of them is active.
      rows: for each leaf, how many bits it has: its rows if layers are stacked in it, else 1.
      opaque: equations whose operations are not known and not counted, or not fully.
    """

    sgd: float
    units: Mapping[Leaves, float]
    rows: tuple[int, ...]
    opaque: tuple[str, ...] = ()

    def relative(self, active: Active) -> float:
        """Return the predicted cost of a two-pass step, in SGD steps: 1 for no leaf, about 2 for all.

        A loss without products costs 2 as soon as a leaf is active.
        """
        chosen = 0
        for entry, bits in zip(active, self._bits()):
            if entry is not False:
                first = min(entry.row, len(bits) - 1) if isinstance(entry, FirstRow) else 0
                chosen |= sum(1 << bit for bit in bits[first:])
        if not self.sgd:
            return 2.0 if chosen else 1.0
        return 1 + math.fsum(flops for leaves, flops in self.units.items() if leaves & chosen) / self.sgd

    def needs(self) -> list[int]:
        """Return for each bit the units, as a set, that are paid if it is active with all later rows."""
        found: list[int] = []
        for bits in self._bits():
            own = [sum(1 << i for i, leaves in enumerate(self.units) if leaves >> bit & 1) for bit in bits]
            found += [*itertools.accumulate(own[::-1], operator.or_)][::-1]
        return found

    def active(self, chosen: Iterable[int]) -> Active:
        """Return the choice of some bits, with all later rows of each."""
        known = set(chosen)
        firsts = [next((row for row, bit in enumerate(bits) if bit in known), None) for bits in self._bits()]
        return tuple(FirstRow(first) if first else first is not None for first in firsts)

    def _bits(self) -> Iterator[range]:
        """Yield the bits of each leaf."""
        stops = itertools.accumulate(self.rows)
        return (range(stop - rows, stop) for stop, rows in zip(stops, self.rows))


def count(traced: tracing.Traced) -> Costs:
    """Count what the steps of a traced loss cost.

    The first result is the loss; others, such as ``aux``, are computed but not differentiated. A
    ``cond`` counts as its most expensive branch, and a ``while`` loop as if it ran once. A loss with
    side effects is not split: any active leaf costs it an SGD step.
    """
    program = counting.compile_equations(counting.differentiate(traced))
    leaves = traced.jaxpr.invars[: len(traced.jaxpr.invars) - len(traced.args)]
    stacked = _stacked(program, len(leaves))
    rows = tuple(tracing.shape(leaf)[0] if i in stacked else 1 for i, leaf in enumerate(leaves))
    offsets = itertools.accumulate(rows, initial=0)
    parts = [tuple(1 << offset + row for row in range(n)) for offset, n in zip(offsets, rows)]
    loss = 1 << sum(rows)
    flow = _forward(program, [*parts, *[NONE] * len(traced.args), (loss,)], 0)
    tally = _Tally(loss)
    values = len(program.outs) - len(parts)
    tally.backward(flow, [*[(loss,)] * values, *parts])
    units = {loss - 1: tally.sgd} if tracing.side_effect(traced.jaxpr) else dict(tally.units)
    return Costs(tally.sgd, units, rows, tuple(dict.fromkeys(counting.opaque(program))))


class _Flow(NamedTuple):
    """What the walk forward has found in a program.

    Attributes:
      program: what was walked through.
      of: for each slot, the leaves that it depends on.
      around: the leaves that all of the program depends on, as the body of an equation that is not split.
      inner: by the number of an equation, what was found in its body: once, or in each run of a scan by rows.
    """

    program: counting.Program
    of: list[Rows]
    around: Leaves
    inner: dict[int, list["_Flow"]]


def _forward(program: counting.Program, inputs: Iterable[Rows], around: Leaves) -> _Flow:
    """Find out which leaves the values of a program depend on."""
    flow = _Flow(program, [NONE] * program.size, around, {})
    for slot, value in zip(program.ins, inputs):
        flow.of[slot] = value
    for number, node in enumerate(program.nodes):
        values = [flow.of[slot] for slot in node.ins]
        if node.body is None:
            results = [_rows_of_results(node, values)] * len(node.outs)
        else:
            flow.inner[number], results = _forward_body(node, node.body, values)
        for slot, result in zip(node.outs, results):
            flow.of[slot] = result
    return flow


def _forward_body(
    node: counting.Node, body: counting.Program, values: list[Rows]
) -> tuple[list[_Flow], list[Rows]]:
    """Walk through a body; its equation is not split, so that all results depend on all operands."""
    around = _union(values)
    if not node.is_scan:
        return [_forward(body, _together(values), around)], [(around,)] * len(node.outs)
    consts, carry, xs = node.sections(values)
    if all(len(x) == 1 for x in xs):
        # What a loop carries depends, some runs later, on all that comes in.
        inputs = [*_together(consts), *[(around,)] * len(carry), *xs]
        return [_forward(body, inputs, around)], [(around,)] * len(node.outs)
    # The two passes cut a scan by rows into several: a run depends on those before it, not on later ones.
    flows = []
    for row in node.order:
        current = _at(xs, row)
        around = _union([*consts, *carry, *current])
        carry = [(around,)] * len(carry)
        flows.append(_forward(body, [*_together(consts), *carry, *current], around))
    ys = tuple(flows[run].around for run in node.order)  # the order of rows is that of runs, or its reverse
    return flows, [*carry, *[ys] * (len(node.outs) - len(carry))]


@dataclass
class _Tally:
    """Walks backward and adds up what the products cost.

    Attributes:
      loss: the bit of the loss.
      sgd: operations of an SGD step.
      units: those that the two passes add to it, by the leaves of which one must be active.
    """

    loss: Leaves
    sgd: float = 0.0
    units: defaultdict[Leaves, float] = field(default_factory=lambda: defaultdict(float))

    def backward(
        self, flow: _Flow, results: Iterable[Rows], times: int = 1, merged: Leaves = 0
    ) -> list[Rows]:
        """Add up a program, and return what needs its inputs.

        Args:
          flow: what was found on the way forward.
          results: what needs each result.
          times: how often the program runs; 0 to add up nothing.
          merged: leaves for whose gradients the compiler finds recomputations done already.
        """
        need = [NONE] * flow.program.size
        _add(need, flow.program.outs, results)
        for number, node in reversed(list(enumerate(flow.program.nodes))):
            wanted = [need[slot] for slot in node.outs]
            whole = _union(wanted)
            if not whole:
                continue
            if node.body is None:
                operands = _rows_of_operands(node, wanted)
                if node.flops and times:
                    self._pay(node, flow, whole, times, merged)
            elif node.is_scan:
                operands = self._scan(node, flow.inner[number], wanted, times)
            else:
                inner, results = flow.inner[number][0], _together(wanted)
                operands = self.backward(inner, results, times * node.times, merged)
                operands += [(whole,)] * (len(node.ins) - len(operands))  # what decides, such as a predicate
            _add(need, node.ins, operands)
        return [need[slot] for slot in flow.program.ins]

    def _pay(self, node: counting.Node, flow: _Flow, need: Leaves, times: int, merged: Leaves) -> None:
        """Add a product."""
        operands = _union(flow.of[slot] for slot in node.ins)
        depends = operands | flow.around
        if depends & self.loss:  # of the backward pass
            leaves = need
        elif need & self.loss:  # of the forward pass; the descent pass leaves out what no gradient needs
            leaves = depends if need != self.loss else 0
        else:
            leaves = need & depends
        if not ((operands | need) & self.loss or node.recomputes):
            leaves &= ~merged
        leaves &= ~self.loss
        self.sgd += times * node.flops
        if leaves:
            self.units[leaves] += times * node.flops

    def _scan(self, node: counting.Node, flows: list[_Flow], wanted: list[Rows], times: int) -> list[Rows]:
        """Add a scan, once for all rows or row by row, and return what needs its operands."""
        n_consts, n_carry = node.eqn.params["num_consts"], node.eqn.params["num_carry"]
        carry, ys = _together(wanted[:n_carry]), wanted[n_carry:]
        if len(flows) < node.times:
            return self._loop(node, flows[0], [*carry, *_together(ys)], times * node.times)
        by_run = [_at(ys, row) for row in node.order]
        # The backward pass runs through the last row first. A choice of just this row is a loop of one run,
        # which the compiler takes apart: it finds what a checkpoint recomputes, and drops what nothing needs.
        taken_apart = bool(flows[0].around & self.loss)
        alone = _union(by_run[0]) & ~_union(itertools.chain(*by_run[1:]))
        consts, found = [NONE] * n_consts, []
        for run in reversed(range(len(flows))):
            results = [*carry, *by_run[run]]
            if run == 0 and taken_apart:
                operands = self.backward(flows[run], results, times, alone)
            else:
                operands = self._loop(node, flows[run], results, times)
            own, carried, xs = node.sections(operands)
            carry = list(carried)
            _add(consts, range(n_consts), own)
            found.append([_union([x]) for x in xs])
        rows = found if node.eqn.params["reverse"] else found[::-1]
        return [*consts, *carry, *zip(*rows)]

    def _loop(self, node: counting.Node, flow: _Flow, results: list[Rows], times: int) -> list[Rows]:
        """Add the body of a loop, every run of which computes what any run needs."""
        while True:
            _, carry, _ = node.sections(self.backward(flow, results, times=0))
            grown = list(results)
            _add(grown, range(len(carry)), carry)
            if grown == results:
                return self.backward(flow, results, times)
            results = grown


def _add(need: list[Rows], slots: counting.Slots, more: Iterable[Rows]) -> None:
    for slot, rows in zip(slots, more):
        both = [need[slot], rows]
        need[slot] = tuple(_union(_at(both, row)) for row in range(max(map(len, both))))


def _union(sets: Iterable[Rows]) -> Leaves:
    return functools.reduce(operator.or_, itertools.chain(*sets), 0)


def _together(sets: Iterable[Rows]) -> list[Rows]:
    """Return each set for all rows."""
    return [(_union([rows]),) for rows in sets]


def _at(sets: Iterable[Rows], row: int) -> list[Rows]:
    """Return each set for one row."""
    return [(rows[row],) if len(rows) > 1 else rows for rows in sets]


def _rows_of_results(node: counting.Node, values: Sequence[Rows]) -> Rows:
    """Return what the results of an equation depend on, by rows if it keeps them apart."""
    number, params = max(map(len, values), default=1), node.eqn.params
    if number > 1 and _keeps_rows(node.eqn):
        return tuple(_union(_at(values, row)) for row in range(number))
    if number > 1 and node.eqn.primitive.name == "slice" and params["strides"] is None:
        return values[0][params["start_indices"][0] : params["limit_indices"][0]]
    return (_union(values),)


def _rows_of_operands(node: counting.Node, wanted: Sequence[Rows]) -> list[Rows]:
    """Return what needs the operands of an equation, by rows if it keeps them apart."""
    rows, whole, eqn = wanted[0], (_union(wanted),), node.eqn
    shapes = [tracing.shape(atom) for atom in eqn.invars]
    if len(rows) > 1 and eqn.primitive.name == "pad":  # as the gradient of a slice is
        low, _, interior = eqn.params["padding_config"][0]
        if low >= 0 == interior:
            return [rows[low : low + shapes[0][0]], whole]
    by_rows = len(rows) > 1 and _keeps_rows(eqn)
    return [rows if by_rows and shape[:1] == (len(rows),) else whole for shape in shapes]


def _stacked(program: counting.Program, leaves: int) -> set[int]:
    """Return which of the first inputs are scanned over, maybe after operations that keep rows apart."""
    found: set[int] = set()
    sources: dict[int, set[int]] = {slot: {leaf} for leaf, slot in enumerate(program.ins[:leaves])}
    for node in program.nodes:
        values = [sources.get(slot, set()) for slot in node.ins]
        if node.is_scan:
            found.update(*node.sections(values)[-1])
        elif node.eqn.primitive.name == "slice" and _is_row(node.eqn):
            found.update(*values)
        elif any(values) and _keeps_rows(node.eqn):
            sources[node.outs[0]] = set().union(*values)
    return found


def _keeps_rows(eqn: tracing.Equation) -> bool:
    """Whether an equation may be computed on some rows of its operands."""
    return params_for_rows(eqn, 1) is not None


def _is_row(eqn: tracing.Equation) -> bool:
    """Whether an equation takes one row of a stack of a size that layers come in."""
    start, limit = eqn.params["start_indices"][0], eqn.params["limit_indices"][0]
    return limit - start == 1 < tracing.shape(eqn.invars[0])[0] <= 1024
