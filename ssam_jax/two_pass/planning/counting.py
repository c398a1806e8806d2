"""The equations of a loss and its gradient as a program to walk through, with the products counted.

JAX differentiates the loss, as it does in a step. So custom derivative rules, checkpoints, loops and solvers
cost what JAX computes for them, and nothing here knows how an equation is differentiated.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import numpy as np

from ssam_jax._base import tracing
from ssam_jax.two_pass import primitives
from ssam_jax.two_pass.primitives import Trait

UNSPLIT = "ssam_jax_unsplit"
"""The name of a ``jit`` whose equations the two passes do not split."""

CALLS = ("custom_vmap_call", "linear_call", "remat_opt")
"""Primitives that run the first program they carry, and have rules of their own for something."""

Slots: TypeAlias = Sequence[int]
"""The numbers of some values of a program."""

T = TypeVar("T")


class Node(NamedTuple):
    """An equation.

    Attributes:
      eqn: the equation.
      ins: slots of its operands; those that its body takes come first.
      outs: slots of its results.
      flops: operations of the product that it is, else 0.
      body: the program that it runs, if any.
      times: how often it runs the body, on all devices together.
      recomputes: whether the compiler must compute it even where it knows the result.
    """

    eqn: tracing.Equation
    ins: Slots
    outs: Slots
    flops: float
    body: "Program | None"
    times: int
    recomputes: bool

    @property
    def is_scan(self) -> bool:
        """Whether it is a loop over the rows of its operands."""
        return self.eqn.primitive.name == "scan"

    @property
    def order(self) -> range:
        """The rows of a scan in the order of its runs."""
        rows = range(self.times)
        return rows[::-1] if self.eqn.params["reverse"] else rows

    def sections(self, operands: Sequence[T]) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
        """Divide the operands of a scan: constants, what it carries between runs, what it takes by rows."""
        first = self.eqn.params["num_consts"]
        last = first + self.eqn.params["num_carry"]
        return operands[:first], operands[first:last], operands[last:]


class Program(NamedTuple):
    """Equations whose variables are slots of a list."""

    size: int
    ins: Slots
    outs: Slots
    nodes: list[Node]

    @property
    def flops(self) -> float:
        """Operations of one run."""
        return sum(node.flops + (node.times * node.body.flops if node.body else 0) for node in self.nodes)


def differentiate(traced: tracing.Traced) -> tracing.Equations:
    """Return the equations of a loss and of its gradient.

    They take the leaves of the parameters, the other arguments and the cotangent of the loss, and return
    the results of the loss and the gradient of each leaf.
    """
    avals = [tracing.abstract(var) for var in traced.jaxpr.invars]
    leaves = len(avals) - len(traced.args)

    def program(
        params: list[tracing.Value], args: list[tracing.Value], cotangent: tracing.Value
    ) -> list[tracing.Value]:
        def loss(params: list[tracing.Value]) -> tuple[tracing.Value, list[tracing.Value]]:
            value, *aux = tracing.interpret(traced.jaxpr, traced.consts, [*params, *args], _wrap)
            return value, aux

        value, pull, aux = jax.vjp(loss, params, has_aux=True)
        return [value, *aux, *pull(cotangent)[0]]

    jaxpr, _ = tracing.retrace(
        program, avals[:leaves], avals[leaves:], tracing.abstract(traced.jaxpr.outvars[0])
    )
    return jaxpr


def _wrap(eqn: tracing.Equation, operands: Sequence[tracing.Value]) -> Sequence[tracing.Value]:
    """Compute an equation, one with a custom rule in a ``jit``: JAX opens it up, the two passes do not."""
    body = tracing.inlined_body(eqn)
    if body is not None:
        return tracing.interpret(body.jaxpr, body.consts, operands, _wrap)
    if primitives.has(eqn, Trait.CHECKPOINT):
        block = eqn.params["jaxpr"]
        jaxpr, consts = tracing.retrace(lambda *xs: tracing.interpret(block, (), xs, _wrap), *operands)
        return tracing.bind(eqn, [*consts, *operands], jaxpr=jaxpr, prevent_cse=_prevents_cse(eqn))

    def unsplit(*operands: tracing.Value) -> list[tracing.Value]:
        return tracing.apply(eqn, operands)

    unsplit.__name__ = UNSPLIT
    return (jax.jit(unsplit) if primitives.has(eqn, Trait.CUSTOM_RULE) else unsplit)(*operands)


def _prevents_cse(eqn: tracing.Equation) -> bool:
    return bool(np.any(eqn.params["prevent_cse"]))  # it may be one for each operand


def compile_equations(jaxpr: tracing.Equations) -> Program:
    """Prepare a program for being walked through.

    Calls and checkpoints are inlined. Of equal equations one is kept, as by the compiler, except in the
    backward pass of a checkpoint that forbids it.
    """
    numbers = itertools.count()
    nodes: list[Node] = []
    literals: defaultdict[Hashable, int] = defaultdict(lambda: next(numbers))
    computed: dict[Hashable, Slots] = {}

    def fresh(variables: Sequence[tracing.Atom]) -> Slots:
        return [next(numbers) for _ in variables]

    def inline(jaxpr: tracing.Equations, inputs: Slots, checkpoint: int | None) -> Slots:
        slots = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*fresh(jaxpr.constvars), *inputs]))

        def read(atom: tracing.Atom) -> int:
            if isinstance(atom, tracing.Literal):
                return literals[atom.aval, np.asarray(atom.val).tobytes()]
            return slots[atom]

        for eqn in jaxpr.eqns:
            ins = [read(atom) for atom in eqn.invars]
            called = _called(eqn)
            if called is None:
                outs = compute(eqn, ins, checkpoint)
            else:  # what a checkpoint recomputes for good is equal to nothing outside of it
                outs = inline(called, ins, next(numbers) if _recomputes(eqn) else checkpoint)
            slots.update(zip(eqn.outvars, outs))
        return [read(atom) for atom in jaxpr.outvars]

    def compute(eqn: tracing.Equation, ins: Slots, checkpoint: int | None) -> Slots:
        key = _key(eqn, ins, checkpoint)
        if key not in computed:
            computed[key] = fresh(eqn.outvars)
            ins, bodies, times = _bodies(eqn, ins)
            body = max(map(compile_equations, bodies), key=lambda body: body.flops, default=None)
            nodes.append(Node(eqn, ins, computed[key], _flops(eqn), body, times, checkpoint is not None))
        return computed[key]

    inputs = fresh(jaxpr.invars)
    outs = inline(jaxpr, inputs, None)
    return Program(next(numbers), inputs, outs, nodes)


def _key(eqn: tracing.Equation, ins: Slots, checkpoint: int | None) -> Hashable:
    """Return what two equations have in common if they compute the same."""
    key = (eqn.primitive, checkpoint, *ins, *eqn.params.items())
    try:
        hash(key)
    except TypeError:  # a parameter cannot be compared
        return object()
    return key


def _called(eqn: tracing.Equation) -> tracing.Equations | None:
    """Return the program that an equation is a mere call of, or None."""
    if primitives.has(eqn, Trait.CUSTOM_RULE) or eqn.primitive.name in CALLS:
        return next(tracing.bodies(eqn))
    if primitives.has(eqn, Trait.CHECKPOINT):
        return eqn.params["jaxpr"]
    body = tracing.inlined_body(eqn)
    return None if body is None or eqn.params.get("name") == UNSPLIT else body.jaxpr


def _recomputes(eqn: tracing.Equation) -> bool:
    """Whether an equation is the backward pass of a checkpoint, with a barrier before it."""
    return primitives.has(eqn, Trait.CHECKPOINT) and eqn.params["differentiated"] and _prevents_cse(eqn)


def _bodies(eqn: tracing.Equation, ins: Slots) -> tuple[Slots, list[tracing.Equations], int]:
    """Return the operands, those of the body first; the bodies, of which one runs; and how often it runs."""
    params = eqn.params
    match eqn.primitive.name:
        case "scan":
            return ins, [params["jaxpr"].jaxpr], params["length"]
        case "cond":
            return [*ins[1:], ins[0]], [branch.jaxpr for branch in params["branches"]], 1
        case "while":
            n_cond = params["cond_nconsts"]
            return [*ins[n_cond:], *ins[:n_cond]], [params["body_jaxpr"].jaxpr], 1
        case "jit" | "pjit":
            return ins, [params["jaxpr"].jaxpr], 1
        case "shard_map":
            return ins, [params["jaxpr"]], params["mesh"].size
        case "custom_linear_solve":
            sizes = params["const_lengths"]
            start = sizes.matvec + sizes.vecmat
            taken = [*ins[start : start + sizes.solve], *ins[sum(sizes) :]]
            return [*taken, *ins], [params["jaxprs"].solve.jaxpr], 1
    return ins, [], 1


def _flops(eqn: tracing.Equation) -> float:
    """Return the operations of a product or convolution, 0 for any other equation."""
    match eqn.primitive.name:
        case "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = tracing.shape(eqn.invars[0])
            return 2.0 * math.prod(tracing.shape(eqn.outvars[0])) * math.prod(lhs[i] for i in contracted)
        case "ragged_dot" | "ragged_dot_general":
            return 2.0 * math.prod(tracing.shape(eqn.invars[0])) * tracing.shape(eqn.outvars[0])[-1]
        case "conv_general_dilated":
            return _convolution_flops(eqn)
    return 0.0


def _convolution_flops(eqn: tracing.Equation) -> float:
    """Count the multiply-adds of a convolution on data, not on padding and not between the strides."""
    params = eqn.params
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    lhs, rhs, out = map(tracing.shape, (*eqn.invars[:2], eqn.outvars[0]))
    total = 2.0 * lhs[lhs_spec[0]] * rhs[rhs_spec[0]] * rhs[rhs_spec[1]] / params["batch_group_count"]
    windows = zip(params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"])
    for i, (stride, (low, _), lhs_dilation, rhs_dilation) in enumerate(windows, start=2):
        starts = np.arange(out[out_spec[i]]) * stride - low
        positions = starts[:, None] + np.arange(rhs[rhs_spec[i]]) * rhs_dilation
        inside = (positions >= 0) & (positions < lhs[lhs_spec[i]] * lhs_dilation)
        total *= np.count_nonzero(inside & (positions % lhs_dilation == 0))
    return float(total)


def forward_flops(jaxpr: tracing.Equations) -> float:
    """Return the operations of products and convolutions in one run of a program."""
    return compile_equations(jaxpr).flops


def opaque(program: Program) -> list[str]:
    """Return the equations whose operations are not known, or not how often they run."""
    found = []
    for node in program.nodes:
        name = node.eqn.primitive.name
        hidden = node.body is None and any(map(forward_flops, tracing.bodies(node.eqn)))
        if (
            primitives.has(node.eqn, Trait.OPAQUE)
            or hidden
            or (name == "while" and node.body and node.body.flops)
        ):
            found.append(tracing.describe(node.eqn))
        found += opaque(node.body) if node.body else []
    return found
