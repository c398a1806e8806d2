"""Which equations are matrix products and convolutions, what they cost, how others are differentiated.

A program is prepared here for being walked through many times: nested ``jit`` inlined, variables
numbered, the operations of each product counted.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ssam_jax._base import tracing
from ssam_jax.two_pass import splitting

# fmt: off
LINEAR = frozenset({
    "add", "add_any", "all_gather", "all_to_all", "broadcast_in_dim", "concatenate", "convert_element_type",
    "copy", "copy_p", "cumsum", "device_put", "dynamic_slice", "dynamic_update_slice", "expand_dims",
    "gather", "imag", "name", "neg", "optimization_barrier", "pad", "pbroadcast", "pcast", "ppermute",
    "psum", "psum2", "psum_invariant", "psum_scatter", "pvary", "real", "reduce_precision",
    "reduce_scatter", "reduce_sum", "reduce_window_sum", "reshape", "rev", "scatter-add", "scatter_add",
    "select_n", "sharding_constraint", "slice", "split", "squeeze", "sub", "transpose",
})
# fmt: on
"""Primitives whose derivative needs none of the values that gradients flow through."""

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot", "mul")
CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
UNKNOWN = ("pallas_call", "ffi_call", "custom_call", "pure_callback", "io_callback")


class Node(NamedTuple):
    """An equation.

    Attributes:
      kind: how it is differentiated, or what its body is to it.
      ins: slots of its operands; slot 0 holds constants.
      outs: slots of its results.
      inexact: whether gradients flow through each result.
      flops: of the product that it is, else 0.
      body: the program it runs, if any.
      times: how often it runs it, in all devices together.
      late: whether it belongs to the backward pass of a custom rule.
      eqn: the equation.
    """

    kind: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    inexact: tuple[bool, ...]
    flops: float
    body: Any
    times: float
    late: bool
    eqn: tracing.Equation


class Program(NamedTuple):
    """Equations whose variables are slots of a list."""

    size: int
    ins: list[int]
    outs: list[int]
    nodes: list[Node]

    @property
    def flops(self) -> float:
        """Operations of one run."""
        return sum(n.flops + (n.times * n.body.flops if n.body else 0) for n in self.nodes if not n.late)


def compile_equations(
    jaxpr: tracing.Equations, inside_shards: bool = False, late: Sequence[Any] = ()
) -> Program:
    """Prepare a program, nested ``jit`` inlined.

    Args:
      jaxpr: the program.
      inside_shards: whether it is the body of a ``shard_map``, where axis names are bound.
      late: its inputs from which the backward pass of a custom rule starts.
    """
    nodes: list[Node] = []
    numbers = itertools.count(1)
    tainted: set[int] = set()

    def inline(jaxpr: tracing.Equations, known: dict[Any, int]) -> list[int]:
        def read(atom: Any) -> int:
            return 0 if tracing.is_literal(atom) else known.get(atom, 0)

        for eqn in jaxpr.eqns:
            ins = tuple(map(read, eqn.invars))
            body = tracing.inlined_body(eqn)
            if body is not None:
                outs = inline(body.jaxpr, dict(zip(body.jaxpr.invars, ins)))
            else:
                outs = [next(numbers) for _ in eqn.outvars]
                is_late = not tainted.isdisjoint(ins)
                tainted.update(outs if is_late else ())
                nodes.append(_node(eqn, ins, tuple(outs), inside_shards, is_late))
            known.update(zip(eqn.outvars, outs))
        return [read(atom) for atom in jaxpr.outvars]

    slots = {var: next(numbers) for var in jaxpr.invars}
    tainted.update(slots[var] for var in late)
    inputs = list(slots.values())
    outs = inline(jaxpr, slots)
    return Program(next(numbers), inputs, outs, nodes)


def _node(
    eqn: tracing.Equation, ins: tuple[int, ...], outs: tuple[int, ...], inside_shards: bool, late: bool
) -> Node:
    name, params = eqn.primitive.name, eqn.params
    inner = functools.partial(compile_equations, inside_shards=inside_shards)
    kind, body, times = "nonlinear", None, 1.0
    if name in PRODUCTS:
        kind = "product"
    elif name in LINEAR or name in splitting.CONSTANT:
        kind = "linear"
    elif name in splitting.CHECKPOINT:
        kind, body = "checkpoint", inner(params["jaxpr"])
    elif name == "scan":
        kind, body, times = "scan", inner(params["jaxpr"].jaxpr), params["length"]
    elif name == "cond":
        kind, body = "block", max((inner(b.jaxpr) for b in params["branches"]), key=lambda b: b.flops)
        ins = (*ins[1:], ins[0])
    elif name == "while":
        kind, body = "block", inner(params["body_jaxpr"].jaxpr)
        ins = (*ins[params["cond_nconsts"] :], *ins[: params["cond_nconsts"]])
    elif name in ("jit", "pjit"):
        kind, body = "block", inner(params["jaxpr"].jaxpr)
    elif name == "shard_map":
        kind, body, times = (
            "block",
            compile_equations(params["jaxpr"], inside_shards=True),
            params["mesh"].size,
        )
    elif name in CUSTOM:
        call = inner(next(tracing.bodies(eqn)))
        if inside_shards:
            kind, body = "block", call
        elif call.flops or name != "custom_jvp_call":
            kind, body = "custom", _differentiated(eqn)
    inexact = tuple(name not in splitting.CONSTANT and tracing.is_inexact(var) for var in eqn.outvars)
    return Node(kind, ins, outs, inexact, _flops(eqn), body, float(times), late, eqn)


def _differentiated(eqn: tracing.Equation) -> Program:
    """Return the program of operands and cotangents that computes results and the operands' cotangents."""
    float_in, float_out = (list(map(tracing.is_inexact, vs)) for vs in (eqn.invars, eqn.outvars))

    def program(operands: list[Any], cotangents: list[Any]) -> list[Any]:
        def call(*inexact: Any) -> tuple[list[Any], list[Any]]:
            given = iter(inexact)
            results = tracing.apply(eqn, [next(given) if f else x for f, x in zip(float_in, operands)])
            return [r for r, f in zip(results, float_out) if f], results

        _, pull, results = jax.vjp(call, *(x for x, f in zip(operands, float_in) if f), has_aux=True)
        return [*results, *pull([c for c, f in zip(cotangents, float_out) if f])]

    operands, results = ([_abstract(var) for var in vs] for vs in (eqn.invars, eqn.outvars))
    jaxpr, _ = tracing.retrace(program, operands, results)
    return compile_equations(jaxpr, late=jaxpr.invars[len(operands) :])


def _abstract(atom: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)


def shape(atom: Any) -> tuple[int, ...]:
    """Return the shape of a variable or a literal."""
    return atom.aval.shape


def _flops(eqn: tracing.Equation) -> float:
    """Return the operations of a product or convolution, 0 for any other equation."""
    match eqn.primitive.name:
        case "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = shape(eqn.invars[0])
            return 2.0 * math.prod(shape(eqn.outvars[0])) * math.prod(lhs[i] for i in contracted)
        case "ragged_dot" | "ragged_dot_general":
            return 2.0 * math.prod(shape(eqn.invars[0])) * shape(eqn.outvars[0])[-1]
        case "conv_general_dilated":
            return _convolution_flops(eqn)
    return 0.0


def _convolution_flops(eqn: tracing.Equation) -> float:
    """Count the multiply-adds of a convolution on data, not on padding and not between the strides."""
    params = eqn.params
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    lhs, rhs, out = map(shape, (*eqn.invars[:2], eqn.outvars[0]))
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
        name, inner = node.eqn.primitive.name, [] if node.body is None else opaque(node.body)
        hidden = node.body is None and any(map(forward_flops, tracing.bodies(node.eqn)))
        if name in UNKNOWN or hidden or (name == "while" and node.body.flops):
            found.append(described(node.eqn))
        found += inner
    return found


def described(eqn: tracing.Equation) -> str:
    """Return the name of an equation and, if it is known, where it was traced."""
    return " at ".join(filter(None, [eqn.primitive.name, tracing.position(eqn)]))
