"""A mask rule: what it remembers, what it learns from a step, and which mask it selects."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from ssam_jax._base import boxes, checks, shardings, trees
from ssam_jax.masks import hashing, packing, shards
from ssam_jax.masks.drawing import random_bits
from ssam_jax.masks.fitting import OTHER_STATE, check_pattern, fitted
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
        ``ascent_grads`` is the gradient at ``params``, or None where the carrier does not keep it, or has it
        of the active leaves alone or of the implicit form.
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
        that do not divide the words (64 output channels, eight words, over more than eight devices). Where it
        is known from the start how a mesh splits a leaf, by one of Flax's boxes or its type, False is what
        becomes of such a leaf anyway.
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


@dataclasses.dataclass(frozen=True)
class OnBits:
    """A ``select`` that on a single device needs no bools in between, so that it takes fewer kernels.

    Attributes:
      select: as that of `MaskRule`.
      bits: ``bits(memory, bits, params, key, step) -> (bits, churn)``, the same for a packed mask.
    """

    select: Select
    bits: Callable[[PyTree, Mask, Params, jax.Array, jax.Array], tuple[Mask, jax.Array]]

    def __call__(
        self, memory: PyTree, mask: Mask | None, params: Params, key: jax.Array, step: jax.Array
    ) -> Mask:
        """Select a mask of bools."""
        return self.select(memory, mask, params, key, step)


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
    if trees.is_placeholder(params):  # to optax.tree_map_params: masks are not shaped like the parameters
        bits = jnp.zeros((), bool)
    elif rule.first is not None:
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
        key = jax.random.wrap_key_data(hashing.folded(state.key, step + 1))
        if isinstance(rule.select, OnBits) and _plain(params):
            return rule.select.bits(state.memory, state.bits, params, key, step)
        old = state.mask
        new = _selected(rule, state.memory, old, params, key, step)
        trees.check_same_shapes(new, old, "the mask that select returns", "the one in the state", OTHER_STATE)
        new = jax.tree.map(shardings.alike, new, old)
        bits = packing.pack_like(new, state.bits)
        return bits, packing.churn(state.bits, bits)

    return jax.lax.cond(due, refresh, lambda: (state.bits, state.churn))


def _plain(params: Params) -> bool:
    """Whether parameters are on a single device, in no box of Flax's, so that nothing says how they lie."""
    return shards.single() and jax.sharding.get_abstract_mesh().empty and not boxes.any_in(params)


def _selected(
    rule: MaskRule, memory: PyTree, mask: Mask | None, params: Params, key: jax.Array, step: jax.Array
) -> Mask:
    assert rule.select is not None  # MaskRule has checked it
    return fitted(rule.select(memory, mask, params, key, step), params)


def boxed(rule: MaskRule, state: MaskState, params: Params) -> MaskState:
    """Return a state whose arrays are in the boxes that the parameters have, as the rule expects them."""
    memory = state.memory
    if rule.init is not None:
        memory = boxes.filled(jax.eval_shape(rule.init, params), memory)
    return state._replace(bits=boxes.filled(params, state.bits), memory=memory)


def _check_memory(rule: MaskRule, state: MaskState, params: Params) -> None:
    """Raise unless the memory in a state is one that this rule's ``init`` makes for these parameters."""
    expected = () if rule.init is None else jax.eval_shape(rule.init, params)
    name, expected_name = "the memory of the mask rule in the state", "what this rule's init(params) returns"
    trees.check_same_shapes(state.memory, expected, name, expected_name, OTHER_STATE)


def _check_same(new: PyTree, old: PyTree, name: str, old_name: str) -> None:
    trees.check_same_shapes(new, old, name, old_name)
    trees.check_same_dtypes(new, old, name, old_name)
