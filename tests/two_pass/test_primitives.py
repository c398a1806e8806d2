"""The table of primitives agrees with what JAX does, and names each primitive once."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from ssam_jax._base import tracing
from ssam_jax.two_pass import primitives
from ssam_jax.two_pass.primitives import Trait

X, Y = jnp.arange(1.0, 7).reshape(2, 3) / 7, jnp.arange(7.0, 1, -1).reshape(2, 3) / 9


def equation(fn, *args):
    """Return the last equation of a function of arrays, nested ``jit`` opened."""
    jaxpr, _ = tracing.retrace(lambda *args: jax.tree.leaves(fn(*args)), *args)
    while (body := tracing.inlined_body(jaxpr.eqns[-1])) is not None:
        jaxpr = body.jaxpr
    return jaxpr.eqns[-1]


UNARY = [
    *(jnp.abs, jnp.arccos, jnp.arccosh, jnp.arcsin, jnp.arcsinh, jnp.arctan, jnp.arctanh, jnp.ceil, jnp.cosh),
    *(jnp.cos, jnp.exp, jnp.exp2, jnp.expm1, jnp.floor, jnp.isfinite, jnp.log, jnp.log1p, jnp.negative),
    *(jnp.round, jnp.sign, jnp.sin, jnp.sinh, jnp.sqrt, jnp.square, jnp.tan, jnp.tanh, lax.cbrt, lax.digamma),
    *(lax.erf, lax.erf_inv, lax.erfc, lax.lgamma, lax.logistic, lax.rsqrt, lax.stop_gradient, lax.conj),
    *(lax.bessel_i0e, lax.bessel_i1e, functools.partial(lax.integer_pow, y=3)),
    *(lambda x: x.astype(jnp.bfloat16), lambda x: lax.reduce_precision(x, 5, 7), lambda x: x.T, jnp.cumsum),
    *(
        jnp.ravel,
        lambda x: x[:1],
        lambda x: x[:, None],
        lambda x: x[::-1],
        lambda x: lax.pad(x, 0.0, [(1, 1, 0)] * 2),
    ),
    *(lambda x: lax.optimization_barrier(x), lambda x: jnp.broadcast_to(x, (4, 2, 3)), jnp.sum),
    *(lambda x: lax.dynamic_slice(x, (0, 1), (1, 1)), lambda x: jnp.take(x, jnp.array([0, 1]), mode="fill")),
]
BINARY = [
    *(
        lax.add,
        lax.atan2,
        lax.complex,
        lax.div,
        lax.dot,
        lax.eq,
        lax.ge,
        lax.gt,
        lax.igamma,
        lax.igammac,
        lax.le,
    ),
    *(
        lax.lt,
        lax.max,
        lax.min,
        lax.mul,
        lax.ne,
        lax.nextafter,
        lax.polygamma,
        lax.pow,
        lax.rem,
        lax.sub,
        lax.zeta,
    ),
    lambda x, y: jnp.concatenate([x, y]),
    lambda x, y: lax.select(x > 0, x, y),
    lambda x, y: lax.dynamic_update_slice(x, y[:1], (1, 0)),
    lambda x, y: x.at[jnp.array([0])].add(y[:1]),
    lambda x, y: lax.conv(x[None, None], y[None, None], (1, 1), "SAME"),
]


def samples():
    unary = [equation(fn, X) for fn in UNARY]
    binary = [equation(fn, X, Y.T if fn is lax.dot else Y) for fn in BINARY]
    return {eqn.primitive.name: eqn for eqn in [*unary, *binary]}


EQUATIONS = samples()
WITHOUT_DERIVATIVE = {"nextafter", "polygamma", "zeta"}  # JAX raises


def test_each_name_stands_in_one_row():
    names = [name for _, row in primitives._ROWS for name in row.split()]
    assert len(names) == len(set(names)) == len(primitives.TRAITS)
    assert len(EQUATIONS) > 60


@pytest.mark.parametrize("name", [n for n in EQUATIONS if n not in WITHOUT_DERIVATIVE])
def test_the_traits_of_a_derivative_are_those_of_the_derivative(name):
    eqn = EQUATIONS[name]
    backward = primitives.differentiated(eqn)
    operands, cotangents = backward.invars[: len(eqn.invars)], backward.invars[len(eqn.invars) :]
    sent = backward.replace(outvars=backward.outvars[len(eqn.outvars) :])
    assert any(tracing.depends(sent, cotangents)) != primitives.has(eqn, Trait.CONSTANT)
    floats = [var for var in operands if tracing.is_inexact(var)]
    needs = any(tracing.depends(sent, floats))
    assert needs != primitives.has(eqn, Trait.LINEAR | Trait.CONSTANT)


@pytest.mark.parametrize(
    "name", [n for n, eqn in EQUATIONS.items() if primitives.has(eqn, Trait.ELEMENTWISE)]
)
def test_an_elementwise_equation_may_be_computed_by_rows(name):
    eqn = EQUATIONS[name]
    operands = [X, Y][: len(eqn.invars)] if name != "select_n" else [X > 0, X, Y]
    whole = tracing.bind(eqn, operands)[0]
    rows = [tracing.bind(eqn, [x[i : i + 1] for x in operands])[0] for i in range(2)]
    assert jnp.array_equal(whole, jnp.concatenate(rows), equal_nan=True)


def solve(a, b):
    return lax.linalg.triangular_solve(a, b, left_side=True)


@pytest.mark.parametrize(
    ("fn", "args", "expected"),
    [
        (lax.dot, (X, Y.T), True),
        (solve, (X[:, :2], Y), True),
        (lax.mul, (X, Y), False),
        (lax.gt, (X, Y), False),
        (jax.jit(lambda x, y: jnp.where(x > y, x, y), inline=False), (X, Y), False),
        (lambda x, y: lax.cond(x[0, 0] > 0, lambda: x @ y.T, lambda: y @ x.T), (X, Y), True),
        (lambda x, y: lax.while_loop(lambda n: n < jnp.sum(x @ y.T), lambda n: n + 1, 0), (X, Y), False),
    ],
    ids=range(7),
)
def test_an_equation_may_multiply_if_it_holds_a_product_that_sends_a_gradient(fn, args, expected):
    assert primitives.may_multiply(equation(fn, *args)) == expected


@pytest.mark.parametrize(
    "name", ["add", "concatenate", "dot_general", "dynamic_update_slice", "eq", "scatter-add"]
)
def test_what_is_not_in_the_table_is_differentiated(name, monkeypatch):
    known = primitives.may_multiply(EQUATIONS[name])
    monkeypatch.delitem(primitives.TRAITS, name)
    assert primitives.may_multiply(EQUATIONS[name]) == known == (name == "dot_general")
