"""What a step costs, counted in matrix products and convolutions on the equations of the loss.

An SGD step computes each product once, and once more for the gradient of each factor. The two-pass
step pays, on top of that, for a product

- the forward pass again, if it depends on an active leaf;
- the ascent gradient of each factor that depends on an active leaf;
- under ``jax.checkpoint``, its recomputation for that gradient.

Each of these is a *unit*: a number of operations and a set of leaves, paid as soon as one of the set
is active. What a choice of leaves costs is then a sum, known before anything is compiled.

Leaves and the rows of leaves that are scanned over are numbered by bits, and a set of them is an int.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ssam_jax._base import tracing
from ssam_jax.two_pass import splitting
from ssam_jax.two_pass.active import Active, FirstRow
from ssam_jax.two_pass.planning import counting


@dataclass(frozen=True)
class Costs:
    """What the steps of one loss cost, in operations; a multiply-add is two.

    Attributes:
      sgd: of forward and backward pass.
      units: set of leaves, as bits, to the operations that are added once one of them is active.
      rows: for each leaf, how many bits it has: its rows if it is scanned over, else 1.
      opaque: equations whose operations are not known and not counted, or not fully.
    """

    sgd: float
    units: Mapping[int, float]
    rows: tuple[int, ...]
    opaque: tuple[str, ...] = ()

    def bits(self, active: Active) -> int:
        """Return the active leaves as a set of bits."""
        found, offset = 0, 0
        for entry, rows in zip(active, self.rows):
            first = min(entry.row, rows - 1) if isinstance(entry, FirstRow) else 0
            if entry is not False:
                found |= _range(offset + first, offset + rows)
            offset += rows
        return found

    def relative(self, active: Active) -> float:
        """Return the predicted cost of a two-pass step, in SGD steps: 1 for no leaf, about 2 for all.

        A loss without products costs 2 as soon as a leaf is active.
        """
        bits = self.bits(active)
        if not self.sgd:
            return 2.0 if bits else 1.0
        return 1 + math.fsum(flops for leaves, flops in self.units.items() if leaves & bits) / self.sgd


def count(traced: tracing.Traced) -> Costs:
    """Count what the steps of a traced loss cost.

    The first result is the loss; others, such as ``aux``, are computed but not differentiated. A
    ``cond`` counts as its most expensive branch, and a ``while`` loop as if it ran once. A loss with
    side effects is not split: any active leaf costs it an SGD step.
    """
    program = counting.compile_equations(traced.jaxpr)
    leaves = len(traced.jaxpr.invars) - len(traced.args)
    stacked = _stacked(program, leaves)
    shapes = map(counting.shape, traced.jaxpr.invars[:leaves])
    rows = tuple(shape[0] if i in stacked else 1 for i, shape in enumerate(shapes))
    walk = _Walk()
    values, offset = [], 0
    for var, n in zip(traced.jaxpr.invars, rows):
        gradient = tracing.is_inexact(var)
        parts = [_Set(1 << bit, (1 << bit) * gradient) for bit in range(offset, offset + n)]
        values.append(_Value(_union(parts), parts if n > 1 else None))
        offset += n
    values += [_Value(_Set(0, 0), None)] * len(traced.args)
    tape = walk.forward(program, values, 0)
    results = len(program.outs)
    back = _Back([True] + [False] * (results - 1), [[1] * results, [0] * results])
    walk.backward(tape, back, _Scope(1.0))
    units = dict(walk.units)
    if tracing.side_effect(traced.jaxpr):
        units = {_range(0, offset): walk.sgd}
    return Costs(walk.sgd, units, rows, tuple(dict.fromkeys(counting.opaque(program))))


class _Set(NamedTuple):
    """Which leaves a value depends on.

    Attributes:
      flow: in any way.
      gradient: so that gradients flow.
    """

    flow: int
    gradient: int


class _Value(NamedTuple):
    """What is known of a variable: of all of it, and of each row where rows are kept apart."""

    whole: _Set
    rows: list[_Set] | None


class _Tape(NamedTuple):
    """What the forward walk found, for the backward walk.

    Attributes:
      program: what was walked through.
      flow: for each slot, which leaves it depends on.
      gradient: for each slot, which leaves gradients flow to.
      around: leaves on which the whole program depends, as a body that is not split.
      inner: the tapes of the bodies, one for each row of a scan that is walked row by row.
      outs: the results.
    """

    program: counting.Program
    flow: list[int]
    gradient: list[int]
    around: int
    inner: dict[int, list["_Tape"]]
    outs: list[_Value]


class _Back(NamedTuple):
    """What flows backward, for a number of variables.

    Attributes:
      cotangent: for each, whether the loss has a gradient with respect to it.
      needs: for each run of the forward pass, and each variable, the leaves whose gradient needs its
        value there, 0 if none does. The first run is the clean pass, the second the descent pass, the
        others are recomputations, one for each surrounding ``checkpoint``.
    """

    cotangent: list[bool]
    needs: list[list[int]]

    def of(self, slots: Sequence[int]) -> "_Back":
        return _Back([self.cotangent[i] for i in slots], [[need[i] for i in slots] for need in self.needs])

    def add(self, slots: Sequence[int], other: "_Back") -> None:
        for i, slot in enumerate(slots):
            self.cotangent[slot] |= other.cotangent[i]
            for need, more in zip(self.needs, other.needs):
                need[slot] |= more[i]


class _Scope(NamedTuple):
    """Where the backward walk is.

    Attributes:
      times: how often the equations run; 0 to count nothing.
      policy: what the innermost ``checkpoint`` saves; None if nothing.
      late: whether in the backward pass of a custom rule.
      loop: the leaves that make this the body of a loop, if active; -1 if it is one anyway.
      again: the leaves for whose gradients the innermost ``checkpoint`` is computed again.
    """

    times: float
    policy: Any = None
    late: bool = False
    loop: int = 0
    again: int = -1


@dataclass
class _Walk:
    """Walks forward for what depends on what, then backward for what is needed, and adds it up."""

    sgd: float = 0.0
    units: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))

    def forward(self, program: counting.Program, inputs: Sequence[_Value], around: int) -> _Tape:
        flow, gradient = [0] * program.size, [0] * program.size
        rows: dict[int, list[_Set]] = {}
        inner: dict[int, list[_Tape]] = {}

        def write(slots: Sequence[int], values: Sequence[_Value]) -> None:
            for slot, value in zip(slots, values):
                flow[slot], gradient[slot] = value.whole
                if value.rows is not None:
                    rows[slot] = value.rows

        def read(slots: Sequence[int]) -> list[_Value]:
            return [_Value(_Set(flow[i], gradient[i]), rows.get(i)) for i in slots]

        write([slot for slot in program.ins if slot], inputs)
        for number, node in enumerate(program.nodes):
            if node.body is not None:
                inner[number], results = self._forward_body(node, read(node.ins))
                write(node.outs, results)
                continue
            flows = gradients = 0
            for i in node.ins:
                flows |= flow[i]
                gradients |= gradient[i]
            for slot, inexact in zip(node.outs, node.inexact):
                flow[slot], gradient[slot] = flows, gradients if inexact else 0
            if rows and any(i in rows for i in node.ins):
                write(node.outs, _by_rows(node, read(node.ins)) or ())
        return _Tape(program, flow, gradient, around, inner, read(program.outs))

    def _forward_body(self, node: counting.Node, inputs: list[_Value]) -> tuple[list[_Tape], list[_Value]]:
        together = _union(value.whole for value in inputs)
        if node.kind == "checkpoint":
            tape = self.forward(node.body, inputs, 0)
            return [tape], tape.outs
        if node.kind == "scan":
            return self._forward_scan(node, inputs, together)
        if node.kind == "custom":
            blank = _Value(_Set(0, 0), None)
            padded = [*inputs, *[blank] * (len(node.body.ins) - len(inputs))]
            tape = self.forward(node.body, padded, together.flow)
            outs = [_Set(together.flow, together.gradient * inexact) for inexact in node.inexact]
        else:
            tape = self.forward(node.body, inputs, together.flow)
            outs = [_Set(together.flow, out.whole.gradient) for out in tape.outs]
        return [tape], [_Value(out, None) for out in outs]

    def _forward_scan(
        self, node: counting.Node, inputs: list[_Value], together: _Set
    ) -> tuple[list[_Tape], list[_Value]]:
        """Walk a scan row by row if rows of its inputs are kept apart, else once for all rows."""
        n_consts, n_carry = node.eqn.params["num_consts"], node.eqn.params["num_carry"]
        consts, carry = inputs[:n_consts], inputs[n_consts : n_consts + n_carry]
        xs = inputs[n_consts + n_carry :]
        if all(x.rows is None for x in xs):
            tape = self._settled(node, consts, carry, xs, together.flow)
            return [tape], [_Value(_Set(together.flow, out.whole.gradient), None) for out in tape.outs]
        tapes = []
        for row in _order(node):
            current = [_Value(x.rows[row] if x.rows else x.whole, None) for x in xs]
            around = _union(value.whole for value in (*consts, *carry, *current)).flow
            # A loop that runs once is no loop to the compiler, which then drops what is not needed.
            last = row == _order(node)[-1]
            walk = self._once if last else self._settled
            tapes.append(walk(node, consts, carry, current, around))
            carry = [_Value(_Set(around, out.whole.gradient), None) for out in tapes[-1].outs[:n_carry]]
        ys = []
        for i in range(n_carry, len(node.outs)):
            parts = [_Set(tape.around, tape.outs[i].whole.gradient) for tape in tapes]
            parts = parts[::-1] if node.eqn.params["reverse"] else parts
            ys.append(_Value(_union(parts), parts))
        return tapes, [*carry, *ys]

    def _once(self, node: counting.Node, consts: Any, carry: Any, xs: Any, around: int) -> _Tape:
        return self.forward(node.body, [*consts, *carry, *xs], around)

    def _settled(self, node: counting.Node, consts: Any, carry: Any, xs: Any, around: int) -> _Tape:
        """Walk the body until what the carry depends on no longer grows."""
        while True:
            tape = self._once(node, consts, carry, xs, around)
            grown = [_Value(_union([a.whole, b.whole]), None) for a, b in zip(carry, tape.outs)]
            if all(a.whole == b.whole for a, b in zip(carry, grown)):
                return tape
            carry = grown

    def backward(self, tape: _Tape, results: _Back, scope: _Scope) -> _Back:
        """Walk backward and add up what is found; return what flows to the inputs."""
        program = tape.program
        back = _Back([False] * program.size, [[0] * program.size for _ in results.needs])
        back.add(program.outs, results)
        for number in range(len(program.nodes) - 1, -1, -1):
            node = program.nodes[number]
            if scope.policy is not None and _saves(scope.policy, node.eqn):
                for slot in node.outs:
                    back.needs[-2][slot] |= back.needs[-1][slot]
                    back.needs[-1][slot] = 0
            if node.body is None:
                self._backward_equation(node, tape, back, scope)
            else:
                self._backward_body(node, tape, tape.inner[number], back, scope)
        return back.of(program.ins)

    def _backward_equation(self, node: counting.Node, tape: _Tape, back: _Back, scope: _Scope) -> None:
        ins, gradient = node.ins, tape.gradient
        pulled = any(back.cotangent[o] and gradient[o] for o in node.outs)
        needs = []
        for need in back.needs:
            found = 0
            for slot in node.outs:
                found |= need[slot]
            needs.append(found)
            if found:
                for slot in ins:
                    need[slot] |= found
        if pulled:
            for i, slot in enumerate(ins):
                if not gradient[slot]:
                    continue
                back.cotangent[slot] = True
                if node.kind != "linear":
                    for j, other in enumerate(ins):
                        if node.kind == "nonlinear" or j != i:
                            back.needs[-1][other] |= gradient[slot]
        if node.flops and scope.times:
            sets = [gradient[slot] for slot in ins[:2]] if pulled else []
            flow = tape.around | functools.reduce(lambda found, slot: found | tape.flow[slot], ins, 0)
            here = scope._replace(late=scope.late or node.late)
            self._pay(scope.times * node.flops, flow, sets, needs, here)

    def _pay(self, flops: float, flow: int, gradients: list[int], needs: list[int], scope: _Scope) -> None:
        """Add the units of one product."""
        clean, descent, *recomputed = needs
        if scope.late:
            gradients = [needs[-1]]
        else:
            again = [flow if descent else 0, *(need & flow & scope.again for need in recomputed)]
            self.sgd += flops * (bool(clean) + sum(map(bool, recomputed)))
            for leaves in again:
                self._add(leaves, flops)
        for leaves in gradients:
            self.sgd += flops * bool(leaves)
            self._add(leaves, flops)

    def _add(self, leaves: int, flops: float) -> None:
        if leaves:
            self.units[leaves] += flops

    def _backward_body(
        self, node: counting.Node, tape: _Tape, inner: list[_Tape], back: _Back, scope: _Scope
    ) -> None:
        results = back.of(node.outs)
        scope = scope._replace(late=scope.late or node.late)
        if node.kind == "checkpoint" and not (node.eqn.params["prevent_cse"] or scope.loop):
            back.add(node.ins, self.backward(inner[0], results, scope))  # the compiler merges both runs
        elif node.kind == "checkpoint":
            results.needs.append([0] * len(node.outs))
            policy, kept = node.eqn.params["policy"], -1 if node.eqn.params["prevent_cse"] else scope.loop
            operands = self.backward(inner[0], results, scope._replace(policy=policy, again=kept))
            *_, outer, innermost = operands.needs
            outer[:] = [a | b for a, b in zip(outer, innermost)]
            back.add(node.ins, operands)
        elif node.kind == "scan":
            back.add(node.ins, self._backward_scan(node, inner, results, scope))
        elif node.kind == "custom":
            pulled = any(back.cotangent[o] and tape.gradient[o] for o in node.outs)
            sets = [tape.gradient[i] for i, v in zip(node.ins, node.eqn.invars) if tracing.is_inexact(v)]
            for depth, need in enumerate(results.needs):
                last = depth == len(results.needs) - 1
                need += [leaves if last and pulled else 0 for leaves in sets]
            quiet = _Back([False] * len(node.body.outs), results.needs)
            operands = self.backward(inner[0], quiet, scope)
            cotangent = [pulled and bool(tape.gradient[i]) for i in node.ins]
            back.add(node.ins, operands._replace(cotangent=cotangent))
        else:
            operands = self.backward(inner[0], results, scope._replace(times=scope.times * node.times))
            back.add(node.ins[: len(node.body.ins)], operands)
            self._need_all(node, back)

    def _need_all(self, node: counting.Node, back: _Back) -> None:
        """Need what decides on the way of a block, such as the predicate, wherever its results are."""
        for need in back.needs:
            found = functools.reduce(lambda found, slot: found | need[slot], node.outs, 0)
            for slot in node.ins[len(node.body.ins) :]:
                need[slot] |= found

    def _backward_scan(self, node: counting.Node, tapes: list[_Tape], results: _Back, scope: _Scope) -> _Back:
        n_consts, n_carry = node.eqn.params["num_consts"], node.eqn.params["num_carry"]
        carried = range(n_consts, n_consts + n_carry)
        scope = scope._replace(loop=-1 if node.times > 1 else scope.loop)
        if len(tapes) == 1 and node.times != 1:
            while True:
                operands = self.backward(tapes[0], results, scope._replace(times=0))
                before = repr(results)
                results.add(range(n_carry), operands.of(carried))
                if repr(results) == before:
                    return self.backward(tapes[0], results, scope._replace(times=scope.times * node.times))
        total = _Back([False] * len(node.ins), [[0] * len(node.ins) for _ in results.needs])
        for number, tape in reversed(list(enumerate(tapes))):
            own = scope if number < len(tapes) - 1 else scope._replace(loop=~_last_row(tapes))
            operands = self.backward(tape, results, own)
            total.add(range(len(node.ins)), operands)
            results = results.of(range(len(node.outs)))
            for i, slot in enumerate(carried):
                results.cotangent[i] = operands.cotangent[slot]
                for need, more in zip(results.needs, operands.needs):
                    need[i] = more[slot]
        return total


def _last_row(tapes: list[_Tape]) -> int:
    """Return the leaves that only the last of several runs of a body depends on."""
    before = functools.reduce(lambda found, tape: found | tape.around, tapes[:-1], 0)
    return tapes[-1].around & ~before


def _by_rows(node: counting.Node, inputs: list[_Value]) -> list[_Value] | None:
    """Return what is known of the rows of a result, or None if the equation mixes rows."""
    if node.eqn.primitive.name == "slice":
        params, rows = node.eqn.params, inputs[0].rows
        if params["strides"] is not None or rows is None:
            return None
        parts = rows[params["start_indices"][0] : params["limit_indices"][0]]
        return [_Value(_union(parts), parts)]
    if not _keeps_rows(node.eqn):
        return None
    number = max(len(value.rows) for value in inputs if value.rows)
    parts = [
        _union(value.rows[row] if value.rows else value.whole for value in inputs) for row in range(number)
    ]
    if not node.inexact[0]:
        parts = [part._replace(gradient=0) for part in parts]
    return [_Value(_union(parts), parts)]


def _order(node: counting.Node) -> range:
    """Return the rows of a scan in the order in which it comes to them."""
    rows = range(node.eqn.params["length"])
    return rows[::-1] if node.eqn.params["reverse"] else rows


def _union(sets: Any) -> _Set:
    flow = gradient = 0
    for one in sets:
        flow |= one[0]
        gradient |= one[1]
    return _Set(flow, gradient)


def _range(start: int, stop: int) -> int:
    """Return the set of the leaves from ``start`` to before ``stop``."""
    return (1 << stop) - (1 << start)


def _saves(policy: Any, eqn: tracing.Equation) -> bool:
    """Whether a policy of ``jax.checkpoint`` keeps the results of an equation."""
    decision = policy(eqn.primitive, *(atom.aval for atom in eqn.invars), **eqn.params)
    return bool(decision) if isinstance(decision, bool) else type(decision).__name__ != "RecomputeType"


def _stacked(program: counting.Program, leaves: int) -> set[int]:
    """Return which of the first inputs are scanned over, maybe after operations that keep rows apart."""
    found: set[int] = set()

    def walk(program: counting.Program, inputs: Sequence[frozenset[int]]) -> list[frozenset[int]]:
        carried: list[frozenset[int]] = [frozenset()] * program.size
        for slot, value in zip(program.ins, inputs):
            carried[slot] = value
        for node in program.nodes:
            values = [carried[i] for i in node.ins]
            if not any(values):
                continue
            if node.kind == "scan":
                params = node.eqn.params
                found.update(*values[params["num_consts"] + params["num_carry"] :])
            elif node.kind == "checkpoint":
                for slot, value in zip(node.outs, walk(node.body, values)):
                    carried[slot] = value
            elif _keeps_rows(node.eqn):
                carried[node.outs[0]] = frozenset().union(*values)
            elif node.eqn.primitive.name == "slice" and _is_row(node.eqn):
                found.update(*values)
        return [carried[slot] for slot in program.outs]

    walk(program, [frozenset({i}) for i in range(leaves)])
    return found


def _keeps_rows(eqn: tracing.Equation) -> bool:
    """Whether an equation may be computed on some rows of its operands."""
    return splitting.params_for_rows(eqn, 1) is not None


def _is_row(eqn: tracing.Equation) -> bool:
    """Whether an equation takes one row of a stack of a size that layers come in."""
    start, limit = eqn.params["start_indices"][0], eqn.params["limit_indices"][0]
    return limit - start == 1 < counting.shape(eqn.invars[0])[0] <= 1024
