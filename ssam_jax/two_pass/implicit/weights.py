"""Which values of a traced loss are weights: facts about them, and how equations pass the facts on.

A contraction multiplies a weight with an activation, and the implicit form must know which is which.
Each value that depends on a parameter carries a `Fact`; a value without one depends on none (the batch,
a key, a constant, and what is computed from them, integers and bools always). Everything here is static:
it needs the equations and the facts, no values. The rules, for one equation:

- A view (a cast, a transpose, a slice, a concatenation, a choice between parts, a multiplication by what
  depends on no parameter) shows the same weight: its mask is followed.
- Any other function of parameters alone is still a weight, but its mask is lost. That is harmless unless
  it reaches a contraction.
- A contraction makes an activation. So does adding a weight that was broadcast or looked up, as a bias or
  an embedding is, and multiplying by a vector that was broadcast, as the scale of a normalization is.
- Any other mixture of a weight and an activation is either of the two, with the mask lost.
- Where no gradient flows, there is nothing to mask. What an equation without a derivative returns, such as
  a comparison or ``stop_gradient``, reaches no parameter.

The contraction decides what looked-up or broadcast parameters are: multiplied with a plain weight they are
its input (tokens, learned queries), multiplied with an activation they are its weight (the experts of a
mixture).
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ssam_jax._base import tracing
from ssam_jax.two_pass import primitives
from ssam_jax.two_pass.primitives import Trait


class Role(enum.IntEnum):
    """What a value is to a contraction: of two operands, the one with the lower role is the weight."""

    PARAMETER = 0
    EITHER = 1
    ACTIVATION = 2


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mask"],
    meta_fields=["role", "reached", "live", "path", "zero", "lost", "bias"],
)
@dataclasses.dataclass(frozen=True)
class Fact:
    """What is known of a value that depends on parameters: a pytree whose one leaf is the mask.

    Attributes:
      role: weight, activation or not known yet.
      reached: the paths of the parameters to which a gradient would flow without masks.
      live: those of them to which one does; on every way to the others is a mask that is all False.
      path: a parameter with a mask that the value is a function of, as a weight; None if there is none.
      mask: bool array that broadcasts against the value, True where it is kept; None if there is no mask,
        if ``zero`` or ``lost``, and wherever facts are passed on without values.
      zero: whether the mask is known to be all False.
      lost: the equation, and where it stands, that made the mask impossible to follow; None if followed.
      bias: whether the value has been broadcast from a vector or a number.
    """

    role: Role
    reached: frozenset[str]
    live: frozenset[str]
    path: str | None = None
    mask: tracing.Value = None
    zero: bool = False
    lost: str | None = None
    bias: bool = False

    @property
    def followed(self) -> bool:
        """Whether there is a mask and it is known."""
        return self.path is not None and self.lost is None


Facts: TypeAlias = Sequence[Fact | None]


def weight_fact(path: str, mask: bool | np.ndarray | jax.Array = True) -> Fact:
    """Return the fact about a parameter itself.

    Args:
      path: names the parameter in messages.
      mask: a bool, or a bool array that broadcasts against the parameter: True for the entries that stay
        in the backward pass. If its values are known while tracing, all True is no mask, and all False lets
        the compiler drop the product. Those of a traced array are not known.

    Raises:
      TypeError: the mask is not of dtype bool.
    """
    if jnp.result_type(mask) != jnp.bool_:
        raise TypeError(f"the mask of {path!r} must be of dtype bool, got {jnp.result_type(mask)}.")
    fact = Fact(Role.PARAMETER, frozenset([path]), frozenset([path]), path)
    if not isinstance(mask, jax.core.Tracer) and getattr(mask, "is_fully_addressable", True):
        entries = np.asarray(mask)
        if entries.all():
            return dataclasses.replace(fact, path=None)
        if not entries.any():
            return dataclasses.replace(fact, zero=True)
    return dataclasses.replace(fact, mask=jnp.asarray(mask))


def without_gradient(fact: Fact | None) -> list[str]:
    """Return the parameters whose gradient is zero because of the masks on every way to them, sorted.

    Args:
      fact: about the loss.
    """
    return sorted(fact.reached - fact.live) if fact else []


def flow(jaxpr: tracing.Equations, facts: Facts, masked: bool) -> list[Fact | None]:
    """Pass facts on from ``jaxpr.invars`` to ``jaxpr.outvars``, without their masks.

    Args:
      jaxpr: equations.
      facts: one for each of the ``invars``, or None.
      masked: whether contractions are masked. If not, all that is reached is live.
    """

    def rule(eqn: tracing.Equation, operands: list[Fact | None]) -> list[Fact | None]:
        return passed_on(eqn, [x if isinstance(x, Fact) else None for x in operands], masked)

    outcome = tracing.interpret(jaxpr, [None] * len(jaxpr.constvars), facts, rule)
    return [x if isinstance(x, Fact) else None for x in outcome]


def passed_on(eqn: tracing.Equation, facts: Facts, masked: bool) -> list[Fact | None]:
    """Pass facts on from the operands of one equation to its results, without their masks."""
    name, body = eqn.primitive.name, tracing.inlined_body(eqn)
    known = [fact for fact in facts if fact]
    if not eqn.outvars:  # a callback
        return []
    if not any(fact.role < Role.ACTIVATION for fact in known):
        results: Facts = [_activation(known) if known else None] * len(eqn.outvars)
    elif body is not None:
        results = flow(body.jaxpr, facts, masked)
    elif primitives.has(eqn, Trait.CHECKPOINT):
        results = [_lost(fact, eqn) for fact in flow(eqn.params["jaxpr"], facts, masked)]
    elif name == "cond":
        branches = [flow(branch.jaxpr, facts[1:], masked) for branch in eqn.params["branches"]]
        results = [_any_of(eqn, outcomes) for outcomes in zip(*branches)]
    elif name == "scan":
        _, results = scanned(eqn, facts, masked)
    elif name == "optimization_barrier":
        results = facts
    elif is_view(eqn, facts):
        results = [_viewed(eqn, facts)] * len(eqn.outvars)
    elif primitives.may_multiply(eqn):
        results = [_product(eqn, facts, masked)] * len(eqn.outvars)
    else:
        results = [_mixed(eqn, facts)] * len(eqn.outvars)
    if primitives.has(eqn, Trait.CONSTANT):
        results = list(map(_detached, results))
    return [
        _without_mask(fact) if tracing.is_inexact(var) else None for fact, var in zip(results, eqn.outvars)
    ]


def scanned(eqn: tracing.Equation, facts: Facts, masked: bool) -> tuple[list[Fact | None], list[Fact | None]]:
    """Return the facts about the carry that enter the body of a scan, and those about the results."""
    consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    carry = [_lost(fact, eqn) for fact in facts[consts : consts + carried]]
    while True:
        inner = [*facts[:consts], *carry, *facts[consts + carried :]]
        outcome = [_lost(fact, eqn) for fact in flow(eqn.params["jaxpr"].jaxpr, inner, masked)]
        grown = [_any_of(eqn, pair) for pair in zip(carry, outcome)]
        if grown == carry:
            break
        carry = grown
    left = [  # after the last step what entered the first is live only if the body lets it through
        dataclasses.replace(fact, live=last.live) if fact and last and eqn.params["length"] else fact
        for fact, last in zip(carry, outcome)
    ]
    return carry, [*left, *outcome[carried:]]


def is_view(eqn: tracing.Equation, facts: Facts) -> bool:
    """Whether the equation shows weights from another side, so that their masks can be followed."""
    name = eqn.primitive.name
    known = [fact for fact in facts if fact]
    if any(fact.role is Role.ACTIVATION or (fact.path and fact.lost) for fact in known):
        return False
    scaled = len(known) == 1 and (name == "mul" or (name == "div" and facts[0] is not None))
    if not (scaled or primitives.has(eqn, Trait.MOVES)):
        return primitives.has(eqn, Trait.VIEW)
    return not (_has_data(eqn, facts) and any(_joins(eqn, fact) for fact in _spread(eqn, facts)))


def weight_side(facts: Facts) -> tuple[int | None, str | None]:
    """Return which operand of a contraction is the weight to mask.

    Args:
      facts: about its first two operands.

    Returns:
      0 or 1, or None for neither; and, if there is a mask but it cannot be used, whose and why.
    """
    left, right = facts[:2]
    if left is None or right is None or not (left.reached or right.reached):
        return None, None
    role = min(left.role, right.role)
    sides = [i for i, fact in enumerate((left, right)) if fact.role is role and fact.path]
    if role is Role.ACTIVATION or not sides:
        return None, None
    if len(sides) == 2:
        if role is Role.PARAMETER and left.path == right.path:  # a norm or a Gram matrix
            return None, None
        return None, f"{left.path!r} is multiplied with {right.path!r}, which has a mask too"
    weight, other = (left, right) if sides == [0] else (right, left)
    if not other.reached:  # no gradient flows to it, with or without the mask
        return None, None
    if weight.lost:
        return None, f"the mask of {weight.path!r} cannot be followed through {weight.lost}"
    return sides[0], None


def hidden_product(facts: Facts) -> str | None:
    """Return why masks cannot be used inside an equation that cannot be opened; None if none is needed."""
    if not any(fact.reached for fact in facts if fact):
        return None
    paths = sorted({fact.path for fact in facts if fact and fact.path})
    return f"the products in it cannot use the mask of {', '.join(map(repr, paths))}"


def _viewed(eqn: tracing.Equation, facts: Facts) -> Fact:
    """Return the fact about a view."""
    parts = [fact for fact, atom in zip(facts, eqn.invars) if fact or tracing.is_inexact(atom)]
    moved = primitives.has(eqn, Trait.MOVES)
    zero = all(fact.zero if fact else not moved for fact in parts)
    fact = dataclasses.replace(_weight(_spread(eqn, facts)), zero=zero)
    return dataclasses.replace(fact, role=Role.EITHER) if eqn.primitive.name == "gather" else fact


def _product(eqn: tracing.Equation, facts: Facts, masked: bool) -> Fact:
    """Return the fact about a product, or about the result of an equation that may contain one."""
    known = [fact for fact in facts if fact]
    if all(fact.role is Role.PARAMETER for fact in known) and not _has_data(eqn, facts):
        product = _weight(known, lost=tracing.describe(eqn))
    else:
        product = _activation(known)
    side, _ = weight_side(facts) if primitives.has(eqn, Trait.CONTRACTION) else (None, None)
    weight = None if side is None else facts[side]
    if masked and weight is not None and weight.zero:
        return dataclasses.replace(product, live=weight.live)
    return product


def _mixed(eqn: tracing.Equation, facts: Facts) -> Fact:
    """Return the fact about the result of an equation that is neither a view nor a product."""
    known = _spread(eqn, facts)
    weights = [fact for fact in known if fact.role < Role.ACTIVATION]
    with_activation = len(weights) < len(known)
    apart = [fact for fact in weights if not _joins(eqn, fact)]
    if not with_activation and (apart or not _has_data(eqn, facts)):
        return _weight(known, lost=tracing.describe(eqn))
    if with_activation and eqn.primitive.name == "concatenate":  # such as a class token
        apart = []
    return _blend(known, [fact for fact in apart if fact.path], lost=tracing.describe(eqn))


def _any_of(eqn: tracing.Equation, facts: Facts) -> Fact | None:
    """Return the fact about a value that is one or the other: of two branches, or from step to step."""
    known = [fact for fact in (_lost(fact, eqn) for fact in facts) if fact]
    if not known:
        return None
    if all(fact.role < Role.ACTIVATION for fact in known):
        return _weight(known)
    return _blend(known, [fact for fact in known if fact.path and not fact.bias])


def _activation(known: Sequence[Fact]) -> Fact:
    """Return the fact about an activation that depends on all of these."""
    nothing: frozenset[str] = frozenset()
    reached, live = zip(*((fact.reached, fact.live) for fact in known))
    return Fact(Role.ACTIVATION, nothing.union(*reached), nothing.union(*live))


def _weight(known: Sequence[Fact], lost: str | None = None) -> Fact:
    """Return the fact about a function of all these weights; ``lost``: what loses their masks."""
    first = next((fact for fact in known if fact.path), None)
    return dataclasses.replace(
        _activation(known),
        role=max(fact.role for fact in known),
        path=first.path if first else None,
        lost=first.lost or lost if first else None,
        bias=all(fact.bias for fact in known),
    )


def _blend(known: Sequence[Fact], apart: Sequence[Fact], lost: str | None = None) -> Fact:
    """Return the fact about an activation into which the masked weights ``apart`` have been mixed."""
    if not apart:
        return _activation(known)
    weight = _weight(apart, lost)
    return dataclasses.replace(_activation(known), role=Role.EITHER, path=weight.path, lost=weight.lost)


def _joins(eqn: tracing.Equation, fact: Fact) -> bool:
    """Whether a weight becomes part of the activation that the equation mixes it with."""
    return fact.bias or (primitives.has(eqn, Trait.JOINS) and fact.role is Role.EITHER)


def _has_data(eqn: tracing.Equation, facts: Facts) -> bool:
    """Whether an operand that depends on no parameter could be a layer's input: no mere number."""
    return any(
        fact is None and tracing.shape(atom) != () and tracing.is_inexact(atom)
        for fact, atom in zip(facts, eqn.invars)
    )


def _spread(eqn: tracing.Equation, facts: Facts) -> list[Fact]:
    """Return the facts there are, noting which operands the equation broadcasts.

    A vector, of at most one dimension larger than 1, becomes a ``bias`` then; also where it goes into
    something opaque, as the scale does of a normalization with a derivative rule of its own.
    """
    size = math.prod(tracing.shape(eqn.outvars[0]))
    broadcasts = primitives.has(eqn, Trait.ELEMENTWISE) or eqn.primitive.name == "broadcast_in_dim"
    spread = []
    for fact, shape in ((fact, tracing.shape(atom)) for fact, atom in zip(facts, eqn.invars) if fact):
        vector = sum(n > 1 for n in shape) < 2
        if broadcasts and size > math.prod(shape):
            fact = dataclasses.replace(fact, role=max(fact.role, Role.EITHER), bias=fact.bias or vector)
        elif vector and any(tracing.bodies(eqn)):
            fact = dataclasses.replace(fact, bias=True)
        spread.append(fact)
    return spread


def _detached(fact: Fact | None) -> Fact | None:
    """Return the fact about a value through which no gradient flows."""
    if fact is None or fact.role is Role.ACTIVATION:
        return None
    return dataclasses.replace(fact, reached=frozenset(), live=frozenset())


def _without_mask(fact: Fact | None) -> Fact | None:
    return dataclasses.replace(fact, mask=None) if fact and fact.mask is not None else fact


def _lost(fact: Fact | None, eqn: tracing.Equation) -> Fact | None:
    """Return the fact with its mask given up, if it has one."""
    if fact is None or not fact.followed:
        return _without_mask(fact)
    return dataclasses.replace(fact, mask=None, zero=False, lost=tracing.describe(eqn))
