"""The masked backward pass: gradients reach the inputs of layers through masked weights.

Section on implicit SSAM of arXiv 2306.17504: the forward pass and the gradients of the weights stay
exact; where a weight w with mask m is one operand of a matrix product or a convolution, the cotangent of
the *other* operand is computed with ``where(m, w, 0)``. The traced loss is computed equation by equation,
with facts about which values are weights (`weights`), inside ``jit``, ``checkpoint``, ``scan`` and
``cond`` as well. A masked weight that reaches a product in any other way is never silently used unmasked.

Two things count as activations although they contain a weight: the result of a product with anything
but parameters (a kernel mixed from several by data, or one multiplied by a constant matrix), and a weight
that was broadcast or looked up and then added to an activation.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from ssam_jax._base import tracing
from ssam_jax._base.tracing import Equation, Equations, Value
from ssam_jax.two_pass import primitives
from ssam_jax.two_pass.implicit import weights
from ssam_jax.two_pass.implicit.weights import Fact, Facts, Role
from ssam_jax.two_pass.primitives import Trait


class _Known(NamedTuple):
    """A value and the fact about it."""

    value: Value
    fact: Fact | None


class _Options(NamedTuple):
    masked: bool
    strict: bool


def masked_evaluate(
    jaxpr: Equations,
    consts: Sequence[Value],
    values: Sequence[Value],
    facts: Facts,
    *,
    masked: bool,
    strict: bool,
) -> tuple[list[Value], list[Fact | None]]:
    """Compute equations, with the masks of their weights in the derivative.

    Args:
      jaxpr: equations; a loss or a part of one.
      consts: arrays, one for each of ``jaxpr.constvars``.
      values: arrays or tracers, one for each of ``jaxpr.invars``.
      facts: what is known of each of the ``values``: `weights.weight_fact` for a parameter, what this
        function returned for a value from another part of the loss, None for the rest.
      masked: False for a part through which no masked gradient is sent: everything is computed as it
        stands, nothing is raised, and only the facts are passed on.
      strict: whether a mask that cannot be followed raises, or warns and leaves that product exact.

    Returns:
      The values of ``jaxpr.outvars``, and the facts about them.

    Raises:
      ValueError: ``masked`` and ``strict``, and a masked parameter whose mask cannot be followed reaches
        a product; the message names both and the equation in between.
    """
    if not any(facts):  # no parameter: the explicit form, or a part of the loss that reads none
        return tracing.evaluate(jaxpr, consts, values), [None] * len(jaxpr.outvars)
    rule = functools.partial(_compute, options=_Options(masked, strict))
    args = [_Known(value, fact) for value, fact in zip(values, facts)]
    outcome = tracing.interpret(jaxpr, [_Known(const, None) for const in consts], args, rule)
    results = [_known(x) for x in outcome]
    return [x.value for x in results], [x.fact for x in results]


def _known(x: Value) -> _Known:
    return x if isinstance(x, _Known) else _Known(x, None)  # a literal


def _compute(eqn: Equation, operands: list[Value], options: _Options) -> list[_Known]:
    """Compute one equation."""
    values, facts = map(list, zip(*map(_known, operands))) if operands else ([], [])
    body = tracing.inlined_body(eqn)
    if body is not None and any(fact and fact.role < Role.ACTIVATION for fact in facts):
        inner = masked_evaluate(body.jaxpr, body.consts, values, facts, **options._asdict())
        return list(map(_Known, *inner))
    results = weights.passed_on(eqn, facts, options.masked)
    if not any(fact and fact.path for fact in facts):
        computed = tracing.apply(eqn, values)
    elif options.masked and (opened := _opener(eqn)) is not None:
        computed = opened(eqn, values, facts, options)
    elif options.masked and primitives.may_multiply(eqn):
        computed = _product(eqn, values, facts, options)
    else:
        computed = tracing.apply(eqn, values)
        results = _with_masks(eqn, values, facts, results)
    return list(map(_Known, computed, results))


def _product(eqn: Equation, values: list[Value], facts: Facts, options: _Options) -> list[Value]:
    """Compute a contraction, or an equation that cannot be opened and may contain one."""
    if primitives.has(eqn, Trait.CONTRACTION):
        side, problem = weights.weight_side(facts)
    else:
        side, problem = None, weights.hidden_product(facts)
    if problem:
        _complain(eqn, problem, options.strict)
    weight = None if side is None else facts[side]
    if side is None or weight is None:
        return tracing.apply(eqn, values)
    if weight.zero:  # the other operand gets no cotangent, so that the compiler drops the product
        values = [jax.lax.stop_gradient(v) if i == 1 - side else v for i, v in enumerate(values)]
        return tracing.apply(eqn, values)
    return [_masked_product(eqn, side, values, weight.mask)]


def _masked_product(eqn: Equation, side: int, operands: list[Value], mask: jax.Array) -> jax.Array:
    """Compute a product exactly, with ``where(mask, weight, 0)`` in the derivative by the other operand.

    The rule is the derivative itself, which JAX transposes as it does that of the plain product: with a
    mask of nothing but True every bit stays the same.

    Args:
      eqn: a contraction of ``operands[0]`` and ``operands[1]``.
      side: which of the two is the weight.
      operands: arrays.
      mask: bool array that broadcasts against the weight.
    """

    def product(weight: Value, other: Value, rest: list[Value]) -> jax.Array:
        pair = (weight, other) if side == 0 else (other, weight)
        return tracing.apply(eqn, [*pair, *rest])[0]

    @jax.custom_jvp
    def masked_product(weight: Value, other: Value, rest: list[Value], mask: jax.Array) -> jax.Array:
        return product(weight, other, rest)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # or the masked weight is kept from pass to pass
    def through_mask(weight: Value, d_other: Value, rest: list[Value], mask: jax.Array) -> jax.Array:
        kept = jnp.where(jnp.broadcast_to(mask, weight.shape), weight, jnp.zeros_like(weight))
        return product(kept, d_other, rest)

    def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        weight, other, rest, mask = primals
        d_weight, d_other, *_ = tangents
        terms = []
        if not isinstance(d_weight, SymbolicZero):
            terms.append(product(d_weight, other, rest))
        if not isinstance(d_other, SymbolicZero):
            terms.append(through_mask(weight, d_other, rest, mask))
        return product(weight, other, rest), sum(terms[1:], start=terms[0])

    masked_product.defjvp(derivative, symbolic_zeros=True)
    return masked_product(operands[side], operands[1 - side], operands[2:], mask)


_Opener = Callable[[Equation, list[Value], Facts, _Options], list[Value]]


def _opener(eqn: Equation) -> _Opener | None:
    """Return the function that computes an equation with a body, the masks followed inside; None if none."""
    if primitives.has(eqn, Trait.CHECKPOINT):
        return _checkpoint
    return {"cond": _cond, "scan": _scan}.get(eqn.primitive.name)


def _checkpoint(eqn: Equation, values: list[Value], facts: Facts, options: _Options) -> list[Value]:
    def block(values: list[Value], facts: Facts) -> list[Value]:
        return _run(eqn.params["jaxpr"], (), values, facts, options)

    prevent_cse = bool(np.any(eqn.params["prevent_cse"]))
    return jax.checkpoint(block, prevent_cse=prevent_cse, policy=eqn.params["policy"])(values, list(facts))


def _cond(eqn: Equation, values: list[Value], facts: Facts, options: _Options) -> list[Value]:
    def branch(closed: Any) -> Callable[[list[Value], Facts], list[Value]]:
        return lambda values, facts: _run(closed.jaxpr, closed.consts, values, facts, options)

    return jax.lax.switch(values[0], list(map(branch, eqn.params["branches"])), values[1:], list(facts[1:]))


def _scan(eqn: Equation, values: list[Value], facts: Facts, options: _Options) -> list[Value]:
    """Scan again, over the rows of the masks as well."""
    params = eqn.params
    body, first, carried = params["jaxpr"], params["num_consts"], params["num_carry"]
    rest = first + carried
    carry_facts, _ = weights.scanned(eqn, facts, options.masked)
    row_facts = [_with_full_mask(*pair) for pair in zip(values[rest:], facts[rest:])]

    def step(
        carry: list[Value], row: tuple[list[Value], list[Fact | None]]
    ) -> tuple[list[Value], list[Value]]:
        row_values, row_facts = row
        inner = [*values[:first], *carry, *row_values]
        results = _run(body.jaxpr, body.consts, inner, [*facts[:first], *carry_facts, *row_facts], options)
        return results[:carried], results[carried:]

    carry, rows = jax.lax.scan(
        step,
        values[first:rest],
        (values[rest:], row_facts),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        _split_transpose=params.get("_split_transpose", False),
    )
    return [*carry, *rows]


def _run(
    jaxpr: Equations, consts: Sequence[Value], values: list[Value], facts: Facts, options: _Options
) -> list[Value]:
    results, _ = masked_evaluate(jaxpr, consts, values, facts, **options._asdict())
    return results


def _with_masks(eqn: Equation, values: list[Value], facts: Facts, results: Facts) -> list[Fact | None]:
    """Return the facts about the results of a view with their masks."""
    if not any(fact and fact.followed and not fact.zero for fact in results):
        return list(results)
    if eqn.primitive.name == "optimization_barrier":
        return list(facts)
    if primitives.has(eqn, Trait.MOVES):
        operands = [
            _full_mask(value, fact) if tracing.is_inexact(atom) else value
            for atom, value, fact in zip(eqn.invars, values, facts)
        ]
        fill = {"fill_value": True} if eqn.primitive.name == "gather" else {}
        masks = tracing.bind(eqn, operands, **fill)
    else:
        masks = [fact.mask for fact in facts if fact]
    return [fact and dataclasses.replace(fact, mask=mask) for fact, mask in zip(results, masks)]


def _with_full_mask(value: Value, fact: Fact | None) -> Fact | None:
    """Return the fact with a mask of the shape of the value, if it holds a mask."""
    if fact is None or fact.mask is None:
        return fact
    return dataclasses.replace(fact, mask=_full_mask(value, fact))


def _full_mask(value: Value, fact: Fact | None) -> jax.Array:
    if fact is None or fact.mask is None:
        return jnp.full(jnp.shape(value), not (fact and fact.zero))
    return jnp.broadcast_to(fact.mask, jnp.shape(value))


def _complain(eqn: Equation, problem: str, strict: bool) -> None:
    message = f"the implicit form cannot mask {tracing.describe(eqn)}: {problem}."
    if strict:
        raise ValueError(
            f"{message} Set the mask of the parameter to True, or pass strict=False to leave such products"
            " exact. See docs/two_pass.md."
        )
    warnings.warn(f"{message} This product stays exact.", stacklevel=2)
