"""Foreign derivative rules cost what JAX computes for them."""

import functools
import time

import equinox.internal
import jax
import jax.numpy as jnp
import pytest
from counting import contraction_flops
from jax import lax
from jax.experimental import ode
from planned_losses import ROWS, SQUARES, own_layer, own_product, shape

from ssam_jax._base import tracing
from ssam_jax.two_pass.passes import two_pass_value_and_grad
from ssam_jax.two_pass.planning import costs, counting
from ssam_jax.two_pass.planning.report import choose_active, explain_two_pass


@jax.custom_vjp
def sine(h):
    return jnp.sin(h)


sine.defvjp(lambda h: (sine(h), cosine(h)), lambda cosine, g: (g * cosine,))


@jax.custom_vjp
def cosine(h):
    return jnp.cos(h)


cosine.defvjp(lambda h: (cosine(h), sine(h)), lambda sine, g: (-g * sine,))


@jax.custom_jvp
def sine_of_product(x, w):
    return jnp.sin(x @ w)


@sine_of_product.defjvp
def _(primals, tangents):
    _, tangent = jax.jvp(lambda x, w: jnp.sin(x @ w), primals, tangents)
    return sine_of_product(*primals), tangent


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def power(n, h):
    return h**n


power.defvjp(lambda n, h: (power(n, h), h), lambda n, h, g: (n * power(n - 1, h) * g,))


@jax.custom_vjp
def symbolic(x, w):
    return x @ w


symbolic.defvjp(
    lambda x, w: (symbolic(x.value, w.value), (x.value, w.value)),
    lambda saved, g: (g @ saved[1].T, saved[0].T @ g),
    symbolic_zeros=True,
)


@jax.custom_vjp
def gathered(rows, x, w):
    return (x @ w)[rows]


gathered.defvjp(
    lambda rows, x, w: (gathered(rows, x, w), (rows, x, w)),
    lambda saved, g: (None, g @ saved[2].T, saved[1].T @ g),
)


@jax.custom_vjp
def optimized(x, w):
    return jnp.tanh(x @ w)


optimized.defvjp(
    lambda x, w: jax.vjp(lambda x, w: jnp.tanh(x @ w), x, w), lambda pull, g: pull(g), optimize_remat=True
)


@jax.custom_gradient
def sine_with_gradient(h):
    return jnp.sin(h), lambda g: g * jnp.cos(h)


@jax.custom_batching.custom_vmap
def with_vmap_rule(x):
    return x @ x.T


@with_vmap_rule.def_vmap
def _(size, batched, x):
    return jnp.einsum("bij,bkj->bik", x, x), True


def around(rule):
    """Return a loss with a product before the rule and one behind it."""

    def loss(params, x):
        return jnp.sum((rule(jnp.tanh(x @ params["a"]), params["b"]) @ params["c"]) ** 2)

    return loss


def positive(w):
    return w @ w.T + jnp.eye(32)


def solved(h, w):
    matrix = positive(w)
    solve = lambda matvec, b: matrix @ matvec(b)  # noqa: E731
    return lax.custom_linear_solve(lambda v: matrix @ v, h.T, solve, symmetric=True).T


def root(h, w):
    def solve(f, guess):
        return lax.fori_loop(0, 3, lambda _, z: z - f(z), guess)

    def tangent_solve(g, y):
        return jnp.linalg.solve(jax.jacobian(g)(y), y)

    return lax.custom_root(lambda z: z - jnp.tanh(z @ w + h[0]), h[0], solve, tangent_solve)[None]


def integrated(h, w):
    return ode.odeint(lambda y, t, w: jnp.tanh(y @ w), h, jnp.array([0.0, 1.0]), w)[-1]


def bounded(h, w):
    def step(carry):
        return jnp.tanh(carry[0] @ w), carry[1] + 1

    start = (h, jnp.array(0))
    return equinox.internal.while_loop(lambda c: c[1] < 3, step, start, kind="bounded", max_steps=4)[0]


def linear_call(h, w):
    fixed = lax.stop_gradient(h.T @ h)
    return jax.custom_derivatives.linear_call(lambda m, h: h @ m, lambda m, g: g @ m.T, fixed, h @ w)


RULES = {
    "a rule that calls its function": lambda h, w: sine(h @ w),
    "a rule with a product that calls its function": sine_of_product,
    "a rule with static arguments": lambda h, w: power(3, h @ w),
    "a rule with symbolic zeros": symbolic,
    "a rule with integers": lambda h, w: gathered(jnp.arange(8), h, w),
    "a rule with optimized checkpoints": optimized,
    "a custom gradient": lambda h, w: sine_with_gradient(h @ w),
    "a rule under vmap": lambda h, w: jax.vmap(lambda row: sine(row @ w))(h),
    "a rule in a scan": lambda h, w: lax.scan(lambda h, _: (sine(h @ w), None), h, None, length=3)[0],
    "a rule in a cond": lambda h, w: lax.cond(h[0, 0] > 0, lambda h: sine(h @ w), lambda h: h, h),
    "a rule in a checkpoint": lambda h, w: jax.checkpoint(lambda h, w: sine(h @ w), prevent_cse=False)(h, w),
    "a rule in a jit": lambda h, w: jax.jit(sine_of_product)(h, w),
    "a rule in a rule": lambda h, w: own_layer(own_product(h, w), w),
    "a rule differentiated twice": lambda h, w: sine(h - jax.grad(lambda h: jnp.sum(sine(h @ w)))(h)),
    "a rule for vmap": lambda h, w: with_vmap_rule(lax.stop_gradient(h)) @ h @ w,
    "custom_linear_solve": solved,
    "a dense solver": lambda h, w: jnp.linalg.solve(positive(w), h.T).T,
    "a bounded while loop of Equinox": bounded,
}


@pytest.fixture(autouse=True)
def _(relaxed_promotion):
    """Rules of others promote as they like."""


@pytest.mark.parametrize("name", RULES)
def test_a_foreign_rule_costs_an_sgd_step_what_it_costs_compiled(name):
    loss = around(RULES[name])
    counted = costs.count(tracing.trace(loss, SQUARES, ROWS))
    assert counted.sgd == contraction_flops(jax.value_and_grad(loss), SQUARES, ROWS)
    assert counted.opaque == ()


@pytest.mark.parametrize("active", [(False, True, False), (False, False, True)], ids=["rule", "behind"])
@pytest.mark.parametrize("name", RULES)
def test_a_foreign_rule_costs_the_two_passes_what_it_costs_compiled(name, active):
    loss = around(RULES[name])
    two_pass = two_pass_value_and_grad(loss)

    def step(params, x):
        value, grads, grad_fn = two_pass(params, x, active=active)
        return value, grads, grad_fn(jax.tree.map(lambda w, g: w + 0.1 * g, params, grads), 0)

    compiled = contraction_flops(step, SQUARES, ROWS)
    counted = costs.count(tracing.trace(loss, SQUARES, ROWS))
    assert counted.relative(active) == pytest.approx(compiled / counted.sgd, rel=0.05)


# The compiler simplifies the first; the second takes unknown numbers of steps; the third has no derivative
# with respect to one operand, which the two passes ask for.
OTHERS = {"custom_root": root, "odeint": integrated, "linear_call": linear_call}


@pytest.mark.parametrize("rule", [*RULES.values(), *OTHERS.values()], ids=[*RULES, *OTHERS])
def test_leaves_are_explained_and_chosen_through_a_foreign_rule(rule):
    loss = around(rule)
    start = time.process_time()
    assert 1 < explain_two_pass(loss, SQUARES, ROWS, active=(False, True, False)).relative_to_sgd < 2
    scores = {"a": 1.0, "b": 1.0, "c": 1.0}
    assert choose_active(loss, SQUARES, ROWS, scores=scores, budget=2) == (True, True, True)
    assert time.process_time() - start < 5  # half a second on a quiet machine


def test_a_rule_is_one_equation_that_is_not_split():
    def rule(h, w):
        return own(h, w)

    @jax.custom_vjp
    def own(h, w):
        return jnp.tanh(h @ h.T) @ (h @ w)

    own.defvjp(lambda h, w: jax.vjp(own.fun, h, w), lambda pull, g: pull(g))
    report = explain_two_pass(around(rule), SQUARES, ROWS, active=(False, True, False))
    (listed,) = report.whole
    assert listed.startswith("custom_vjp_call at ")
    assert report.prefix.flops == 2 * 8 * 32 * 32


def test_what_a_solver_iterates_is_listed():
    def iterated(h, w):
        matrix = positive(w)
        return jax.scipy.sparse.linalg.cg(lambda v: matrix @ v, h[0])[0][None]

    counted = costs.count(tracing.trace(around(iterated), SQUARES, ROWS))
    assert counted.sgd > 0
    assert [listed.split()[0] for listed in counted.opaque] == ["while"]


def test_equal_equations_count_once():
    def loss(x, w):
        return jnp.sum(jnp.tanh(x @ w) * jnp.cos(x @ w) + 2 * (x @ w))

    jaxpr = jax.make_jaxpr(loss)(shape(8, 32), shape(32, 32)).jaxpr
    assert counting.forward_flops(jaxpr) == 2 * 8 * 32 * 32
