"""A mask rule: what it remembers, what it learns from a step, and which mask it selects."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from ssam_jax._base import checks, shardings, trees
from ssam_jax.masks import packing
from ssam_jax.masks.drawing import random_bits
from ssam_jax.masks.fitting import OTHER_STATE, check_mask, check_pattern
from ssam_jax.masks.patterns import Pattern
from ssam_jax.typing import Gradients, Mask, Params, PyTree

Init: TypeAlias = Callable[[Params], PyTree]
"""The first function of a `MaskRule`, which takes parameters and returns the memory."""

Observe: TypeAlias = Callable[..., PyTree]
"""The second, which takes memory, parameters, both gradients, step and extra arguments; it returns memory."""

Select: TypeAlias = Callable[[PyTree, Mask | None, Params, jax.Array, jax.Array], Mask]
"""The third, which takes memory, mask, parameters, key and step, and returns the next mask."""


@dataclasses.dataclass(frozen=True)
class MaskRule:
    """Three pure functions that decide which parameters a step perturbs.

    The carrier (`ssam`, `alternating`, `carried`) owns the mask, its churn and the random key, and refreshes
    the mask under ``lax.cond``, so that the other steps pay nothing for it. A rule that perturbs the largest
    weights, chosen again every 100 steps::

        def select(memory, mask, params, key, step):
            return pattern(jax.tree.map(jnp.abs, params))

        rule = MaskRule(select=select, refresh_every=100)

    All functions run inside the user's ``jit``. A new mask is used from the *next* step on.

    Attributes:
      init: ``init(params) -> memory``, a pytree of arrays. None: there is no memory, which is ``()``.
      observe: ``observe(memory, params, ascent_grads, descent_grads, step, **extra) -> memory``, called
        every step after the descent gradient, with ``step`` an int32 scalar that counts from 0.
        ``ascent_grads`` is the gradient at ``params``, or None where the carrier does not keep it.
        ``extra`` holds the extra arguments of ``tx.update``. None: the memory never changes.
      select: ``select(memory, mask, params, key, step) -> mask``, called on refresh steps, and once by
        ``init`` with ``mask=None`` and ``step=0``. A mask is a pytree of bool arrays of the structure of the
        parameters, True where perturbed, whose leaves broadcast against them. ``key`` is a typed PRNG key,
        another one at every call.
      first: a pattern, of which the first mask is a random one, so that ``select`` is called on refresh steps
        alone. None asks ``select`` for the first mask too.
      refresh_every: select a new mask at the end of every so many steps; None keeps the first, which
        `set_mask` can replace.
      seed: an integer, Python's or a traced scalar (to ``vmap`` over seeds), from which keys are made.
      packed: whether the state keeps a bit, not a byte, for each entry of a mask, in every leaf whose last
        axis is a multiple of 64 (or the second last of 128, the third last of 256). False is for meshes
        that do not divide the words (64 output channels, eight words, over more than eight devices).
      keeps_memory: whether the state keeps what ``observe`` returns. False hands it to ``select`` of the same
        step alone, and ``observe`` always sees the memory of ``init``: a gradient that only the refresh
        reads takes no memory then.

    Raises:
      TypeError: an attribute is of the wrong kind.
      ValueError: ``refresh_every`` or ``seed`` is out of range.
    """

    init: Init | None = None
    observe: Observe | None = None
    select: Select | None = None
    refresh_every: int | None = None
    seed: int | jax.Array = 0
    packed: bool = True
    keeps_memory: bool = True
    first: Pattern | None = None

    def __post_init__(self) -> None:
        for name, optional in (("init", True), ("observe", True), ("select", False)):
            function = getattr(self, name)
            if not (callable(function) or (optional and function is None)):
                raise TypeError(f"{name} must be a function{' or None' * optional}, got {function!r}.")
        if self.refresh_every is not None:
            checks.integer("refresh_every", self.refresh_every, also=", or None")
        checks.seed(self.seed)
        checks.flag("packed", self.packed)
        checks.flag("keeps_memory", self.keeps_memory)
        if self.first is not None:
            check_pattern(self.first)


class MaskState(NamedTuple):
    """What a carrier keeps for a mask rule.

    Attributes:
      bits: the mask, its long leaves packed: uint8, uint16 or uint32 words where bool would take a byte for
        each entry.
      churn: float32 scalar, the share of the perturbed entries that the last refresh brought in.
      key: uint32 key data, folded with the step where randomness is needed.
      memory: the rule's own.
    """

    bits: Mask
    churn: jax.Array
    key: jax.Array
    memory: PyTree

    @property
    def mask(self) -> Mask:
        """Bool pytree, True where the parameter is perturbed."""
        return packing.unpack(self.bits)


def init(rule: MaskRule, params: Params) -> MaskState:
    """Return the state before the first step; its mask already obeys the rule."""
    key = jax.random.key(rule.seed)
    memory = () if rule.init is None else rule.init(params)
    if rule.first is not None:
        bits = random_bits(rule.first, key, params, packed=rule.packed)
    else:
        mask = _selected(rule, memory, None, params, key, jnp.zeros((), jnp.int32))
        mask = jax.tree.map(shardings.alike, mask, params)
        bits = packing.pack(mask) if rule.packed else mask
    # Key data is plain uint32, which every checkpoint format can hold.
    return MaskState(bits, jnp.zeros((), jnp.float32), jax.random.key_data(key), memory)


def update(
    rule: MaskRule,
    state: MaskState,
    params: Params,
    ascent_grads: Gradients | None,
    descent_grads: Gradients,
    step: jax.Array,
    *,
    when: bool | jax.Array = True,
    **extra: Any,
) -> MaskState:
    """Return the state after a step: the rule told of the gradients, the mask refreshed if it is time.

    Where ``when`` is False, it is the state before.
    """
    _check_memory(rule, state, params)
    memory = state.memory
    if rule.observe is not None:
        memory = rule.observe(memory, params, ascent_grads, descent_grads, step, **extra)
    if rule.keeps_memory:
        _check_same(memory, state.memory, "what observe returns", "the memory that it was given")
        if when is not True:
            memory = trees.where(when, memory, state.memory)
        state = state._replace(memory=memory)
    if rule.refresh_every is None:
        return state
    due = ((step + 1) % rule.refresh_every == 0) & when
    bits, changed = _refreshed(
        dataclasses.replace(rule, seed=0), due, state._replace(memory=memory), params, step
    )
    return state._replace(bits=bits, churn=changed)


# Under jit for callers that are not: a conditional on closures would be compiled anew at every call.
@functools.partial(jax.jit, static_argnums=0)
def _refreshed(
    rule: MaskRule, due: jax.Array, state: MaskState, params: Params, step: jax.Array
) -> tuple[Mask, jax.Array]:
    """Return the bits and the churn of the mask after a step."""

    def refresh() -> tuple[Mask, jax.Array]:
        old, key = state.mask, jax.random.wrap_key_data(state.key)
        new = _selected(rule, state.memory, old, params, jax.random.fold_in(key, step + 1), step)
        trees.check_same_shapes(new, old, "the mask that select returns", "the one in the state", OTHER_STATE)
        new = jax.tree.map(shardings.alike, new, old)
        bits = packing.pack_like(new, state.bits)
        return bits, packing.churn(state.bits, bits)

    return jax.lax.cond(due, refresh, lambda: (state.bits, state.churn))


def _selected(
    rule: MaskRule, memory: PyTree, mask: Mask | None, params: Params, key: jax.Array, step: jax.Array
) -> Mask:
    assert rule.select is not None  # MaskRule has checked it
    selected = rule.select(memory, mask, params, key, step)
    check_mask(selected, params)
    return selected


def _check_memory(rule: MaskRule, state: MaskState, params: Params) -> None:
    """Raise unless the memory in a state is one that this rule's ``init`` makes for these parameters."""
    expected = () if rule.init is None else jax.eval_shape(rule.init, params)
    name, expected_name = "the memory of the mask rule in the state", "what this rule's init(params) returns"
    trees.check_same_shapes(state.memory, expected, name, expected_name, OTHER_STATE)


def _check_same(new: PyTree, old: PyTree, name: str, old_name: str) -> None:
    trees.check_same_shapes(new, old, name, old_name)
    trees.check_same_dtypes(new, old, name, old_name)
