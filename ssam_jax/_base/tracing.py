"""A loss as a list of equations: trace it, walk through it, compute one equation of it.

The only file that uses ``jax.extend``. Everything here works on values that are arrays or tracers,
inside anybody's ``jit``, ``vmap`` or ``shard_map``, and never changes what an equation means: custom
derivative rules, effects and source positions stay with it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

Equation: TypeAlias = JaxprEqn
Equations: TypeAlias = Jaxpr
Rule: TypeAlias = Callable[[JaxprEqn, list[Any]], Sequence[Any]]
"""From an equation and the values of its operands to the values of its results."""


class Traced(NamedTuple):
    """A function of parameters and other arguments, traced.

    Attributes:
      jaxpr: its equations; ``jaxpr.invars`` are the leaves of the parameters, then those of ``args``.
      consts: the values of ``jaxpr.constvars``: arrays that the function closes over.
      args: the arrays among the leaves of the other arguments.
      out_tree: the structure of what the function returns.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]
    args: list[Any]
    out_tree: Any


def trace(fn: Callable[..., Any], params: Any, *args: Any) -> Traced:
    """Trace ``fn(params, *args)`` once.

    Leaves of ``args`` that are no JAX arrays (a Python bool, a string, an array of NumPy's) stay what
    they are, as they would under ``jax.grad``. Arrays may be given as ``jax.ShapeDtypeStruct``.
    """
    leaves, tree = jax.tree.flatten(args)
    positions = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    arrays = [leaves[i] for i in positions]

    def call(params: Any, arrays: list[Any]) -> Any:
        filled = list(leaves)
        for position, array in zip(positions, arrays):
            filled[position] = array
        return fn(params, *jax.tree.unflatten(tree, filled))

    closed, shapes = jax.make_jaxpr(call, return_shape=True)(params, arrays)
    return Traced(closed.jaxpr, closed.consts, arrays, jax.tree.structure(shapes))


def retrace(fn: Callable[..., Sequence[Any]], *args: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Return the equations of ``fn``, which takes and returns flat arrays, and their constants."""
    closed = jax.make_jaxpr(fn)(*args)
    return closed.jaxpr, closed.consts


def interpret(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], rule: Rule) -> list[Any]:
    """Walk through the equations, in order, and return the values of ``jaxpr.outvars``.

    The values may be anything that ``rule`` understands; literals appear to it as NumPy scalars.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))

    def read(atom: Any) -> Any:
        return np.asarray(atom.val, atom.aval.dtype) if is_literal(atom) else values[atom]

    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, rule(eqn, [read(atom) for atom in eqn.invars])))
    return [read(atom) for atom in jaxpr.outvars]


def evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Compute the equations as they stand."""
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*args)


def apply(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Compute one equation, with its custom derivative rules, as it stands.

    ``operands`` has one value for each of ``eqn.invars``, of the same shape and dtype; literals are
    taken from the equation.
    """
    values = {atom: value for atom, value in zip(eqn.invars, operands) if not is_literal(atom)}
    jaxpr = sub_jaxpr(_no_equations(), list(values), eqn.outvars, [eqn])
    return evaluate(jaxpr, (), list(values.values()))


def bind(eqn: JaxprEqn, operands: Sequence[Any], **params: Any) -> list[Any]:
    """Compute an equation with some of its parameters changed, such as its body or its length.

    For primitives that carry their bodies as parameters (scan, cond, checkpoint) or have none;
    operands may have other shapes than in the equation.
    """
    info = eqn.source_info
    names = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=names), eqn.ctx.manager:
        out = eqn.primitive.bind(*operands, **{**eqn.params, **params})
    return list(out) if eqn.primitive.multiple_results else [out]


def sub_jaxpr(jaxpr: Jaxpr, invars: Sequence[Any], outvars: Sequence[Any], eqns: Sequence[Any]) -> Jaxpr:
    """Return equations of ``jaxpr`` as a program of their own, without constants."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    return jaxpr.replace(constvars=(), invars=invars, outvars=outvars, eqns=eqns, effects=effects)


@functools.cache
def _no_equations() -> Jaxpr:
    return jax.make_jaxpr(lambda: ())().jaxpr


def is_literal(atom: Any) -> bool:
    """Whether an operand is a number written into the equation, not a variable."""
    return isinstance(atom, Literal)


def inlined_body(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """Return the body of a nested ``jit`` that means nothing but its body, or None.

    One that carries shardings, layouts or compiler options is left alone.
    """
    if eqn.primitive.name == "closed_call":
        return eqn.params["call_jaxpr"]
    if eqn.primitive.name not in ("jit", "pjit"):
        return None
    chosen = [*eqn.params["in_shardings"], *eqn.params["out_shardings"]]
    layouts = [*eqn.params["in_layouts"], *eqn.params["out_layouts"]]
    if any(type(sharding).__name__ != "UnspecifiedValue" for sharding in chosen):
        return None
    if any(layout is not None for layout in layouts) or eqn.params["compiler_options_kvs"]:
        return None
    return eqn.params["jaxpr"]


def bodies(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """Yield the programs that an equation carries as parameters: bodies, branches, rules."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def side_effect(jaxpr: Jaxpr) -> str | None:
    """Return which equation does more than compute its results, and where it stands; None if none.

    Collectives over named axes are not counted: repeating or sharing them changes nothing.
    """
    for eqn in jaxpr.eqns:
        effects = [effect for effect in eqn.effects if type(effect).__name__ != "NamedAxisEffect"]
        if effects:
            inner = (side_effect(body) for body in bodies(eqn))
            return next((found for found in inner if found), f"{eqn.primitive.name} at {position(eqn)}")
    return None


def position(eqn: JaxprEqn) -> str:
    """Return where in the user's code an equation was traced, as ``file:line (function)``."""
    return source_info_util.summarize(eqn.source_info)


def shape(atom: Any) -> tuple[int, ...]:
    """Return the shape of a variable or literal."""
    return tuple(atom.aval.shape)


def is_inexact(value: Any) -> bool:
    """Whether gradients flow through a variable's or an array's dtype."""
    return jnp.issubdtype(getattr(value, "aval", value).dtype, jnp.inexact)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))
