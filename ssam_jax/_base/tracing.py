"""A loss as a list of equations: trace it, walk through it, compute one equation of it.

The only file that uses ``jax.extend``. Everything here works on values that are arrays or tracers,
inside any ``jit``, ``vmap`` or ``shard_map``, and never changes what an equation means: custom
derivative rules, effects and source positions stay with it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxpr_as_fun
from jax.extend.core import Literal as Literal

from ssam_jax.typing import Params, PyTree

Variable: TypeAlias = Var
"""What an equation reads or writes."""

Atom: TypeAlias = Var | Literal
"""An operand of an equation: a variable, or a number written into the equation."""

Equation: TypeAlias = JaxprEqn
"""A primitive with its operands, results and parameters."""

Equations: TypeAlias = Jaxpr
"""A program: inputs, a list of equations and outputs."""

Value: TypeAlias = Any
"""What a variable stands for: an array, a tracer, or whatever a `Rule` makes of it."""

Rule: TypeAlias = Callable[[Equation, list[Value]], Sequence[Value]]
"""From an equation and the values of its operands to the values of its results."""


class Traced(NamedTuple):
    """A function of parameters and other arguments, traced.

    Attributes:
      jaxpr: its equations; ``jaxpr.invars`` are the leaves of the parameters, then those of ``args``.
      consts: the values of ``jaxpr.constvars``: arrays that the function closes over.
      args: the arrays among the leaves of the other arguments.
      out_tree: the structure of what the function returns.
    """

    jaxpr: Equations
    consts: Sequence[Value]
    args: list[jax.Array]
    out_tree: Any


def trace(fn: Callable[..., PyTree], params: Params, *args: PyTree) -> Traced:
    """Trace ``fn(params, *args)`` once.

    Leaves of ``args`` that are not JAX arrays (a Python bool, a string, a NumPy array) stay what they are,
    as they would under ``jax.grad``. Arrays may be given as ``jax.ShapeDtypeStruct``.
    """
    leaves, tree = jax.tree.flatten(args)
    positions = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    arrays = [leaves[i] for i in positions]

    def call(params: Params, arrays: list[jax.Array]) -> PyTree:
        filled = list(leaves)
        for position, array in zip(positions, arrays):
            filled[position] = array
        return fn(params, *jax.tree.unflatten(tree, filled))

    closed, shapes = jax.make_jaxpr(call, return_shape=True)(params, arrays)
    return Traced(closed.jaxpr, closed.consts, arrays, jax.tree.structure(shapes))


def retrace(fn: Callable[..., Sequence[Value]], *args: PyTree) -> tuple[Equations, Sequence[Value]]:
    """Return the equations of ``fn``, which takes and returns flat arrays, and their constants."""
    closed = jax.make_jaxpr(fn)(*args)
    return closed.jaxpr, closed.consts


def interpret(jaxpr: Equations, consts: Sequence[Value], args: Sequence[Value], rule: Rule) -> list[Value]:
    """Walk through the equations, in order, and return the values of ``jaxpr.outvars``.

    The values may be anything that ``rule`` understands; literals appear to it as NumPy scalars.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))

    def read(atom: Atom) -> Value:
        return np.asarray(atom.val, _aval(atom).dtype) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, rule(eqn, [read(atom) for atom in eqn.invars])))
    return [read(atom) for atom in jaxpr.outvars]


def evaluate(jaxpr: Equations, consts: Sequence[Value], args: Sequence[Value]) -> list[Value]:
    """Compute the equations as they stand."""
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*args)


def apply(eqn: Equation, operands: Sequence[Value]) -> list[Value]:
    """Compute one equation, with its custom derivative rules, as it stands.

    ``operands`` has one value for each of ``eqn.invars``, of the same shape and dtype; literals are
    taken from the equation.
    """
    values = {atom: value for atom, value in zip(eqn.invars, operands) if not isinstance(atom, Literal)}
    jaxpr = sub_jaxpr(_no_equations(), list(values), eqn.outvars, [eqn])
    return evaluate(jaxpr, (), list(values.values()))


def bind(eqn: Equation, operands: Sequence[Value], **params: Any) -> list[Value]:
    """Compute an equation with some of its parameters changed, such as its body or its length.

    For primitives that carry their bodies as parameters (scan, cond, checkpoint) or have none;
    operands may have other shapes than in the equation.
    """
    info = eqn.source_info
    names = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=names), eqn.ctx.manager:
        out = eqn.primitive.bind(*operands, **{**eqn.params, **params})
    return list(out) if eqn.primitive.multiple_results else [out]


def sub_jaxpr(
    jaxpr: Equations, invars: Sequence[Variable], outvars: Sequence[Atom], eqns: Sequence[Equation]
) -> Equations:
    """Return equations of ``jaxpr`` as a program of their own, without constants."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    return jaxpr.replace(constvars=(), invars=invars, outvars=outvars, eqns=eqns, effects=effects)


@functools.cache
def _no_equations() -> Equations:
    return jax.make_jaxpr(lambda: ())().jaxpr


def is_literal(atom: Atom) -> bool:
    """Whether an operand is a number written into the equation, not a variable."""
    return isinstance(atom, Literal)


def inlined_body(eqn: Equation) -> ClosedJaxpr | None:
    """Return the body of a nested ``jit`` that means nothing but its body, or None.

    One that carries shardings, layouts or compiler options is left alone.
    """
    if eqn.primitive.name == "closed_call":
        return eqn.params["call_jaxpr"]
    if not is_jit(eqn):
        return None
    chosen = [*eqn.params["in_shardings"], *eqn.params["out_shardings"]]
    layouts = [*eqn.params["in_layouts"], *eqn.params["out_layouts"]]
    if any(type(sharding).__name__ != "UnspecifiedValue" for sharding in chosen):
        return None
    if any(layout is not None for layout in layouts) or eqn.params["compiler_options_kvs"]:
        return None
    return eqn.params["jaxpr"]


def is_jit(eqn: Equation) -> bool:
    """Whether an equation is a nested ``jit``, whose primitive has had two names."""
    return eqn.primitive.name in ("jit", "pjit")


def bodies(eqn: Equation) -> Iterator[Equations]:
    """Yield the programs that an equation carries as parameters: bodies, branches, rules."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Equations):
                yield item


def side_effect(jaxpr: Equations) -> str | None:
    """Return which equation does more than compute its results, and where it stands; None if none.

    Collectives over named axes are not counted: repeating or sharing them changes nothing.
    """
    for eqn in jaxpr.eqns:
        effects = [effect for effect in eqn.effects if type(effect).__name__ != "NamedAxisEffect"]
        if effects:
            inner = (side_effect(body) for body in bodies(eqn))
            return next((found for found in inner if found), describe(eqn))
    return None


def describe(eqn: Equation) -> str:
    """Return an equation's name and, if known, where it was traced, as ``file:line (function)``."""
    return " at ".join(filter(None, [eqn.primitive.name, source_info_util.summarize(eqn.source_info)]))


def depends(jaxpr: Equations, inputs: Iterable[Variable]) -> list[bool]:
    """Return for each result of a program whether it depends on any of some of its variables."""
    reached = set(inputs)
    for eqn in jaxpr.eqns:
        if any(var in reached for var in variables(eqn.invars)):
            reached.update(eqn.outvars)
    return [not is_literal(atom) and atom in reached for atom in jaxpr.outvars]


def variables(atoms: Iterable[Atom]) -> list[Variable]:
    """Return the operands that are variables, without the literals."""
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def shape(atom: Atom) -> tuple[int, ...]:
    """Return the shape of a variable or a literal."""
    return tuple(_aval(atom).shape)


def abstract(atom: Atom) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of a variable or a literal."""
    return jax.ShapeDtypeStruct(_aval(atom).shape, _aval(atom).dtype)


def is_inexact(value: Atom | Value) -> bool:
    """Whether gradients flow through a variable's or an array's dtype."""
    return jnp.issubdtype(_aval(value).dtype, jnp.inexact)


def _aval(value: Atom | Value) -> Any:
    return getattr(value, "aval", value)


def _is_array(leaf: Value) -> bool:
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))
