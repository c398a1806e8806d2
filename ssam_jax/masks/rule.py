"""Mask rules: how a mask is born and when it is renewed."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ssam_jax._base import checks, shardings, trees
from ssam_jax.masks import packing
from ssam_jax.masks.drawing import first_mask
from ssam_jax.masks.patterns import Pattern
from ssam_jax.typing import Gradients, Mask, Params

OTHER_STATE = (
    "The state is of another rule, of other options or of other parameters: make it anew with"
    " tx.init(params); set_mask can put an old mask into it."
)
"""What to say about a state that does not fit."""


class InitFn(Protocol):
    """The first half of a `MaskRule`."""

    def __call__(self, params: Params, /) -> Any:
        """Return the state; its ``.mask`` already obeys the rule."""


class UpdateFn(Protocol):
    """The second half of a `MaskRule`."""

    def __call__(
        self,
        state: Any,
        params: Params,
        ascent_grads: Gradients | None,
        descent_grads: Gradients,
        step: jax.Array,
        **extra: Any,
    ) -> Any:
        """Return the next state, of the same structure, shapes and dtypes."""


class MaskRule(NamedTuple):
    """A pair of pure functions that owns a mask, as an optax transformation owns its state.

    ``update`` is called once a step, after the descent gradient, and the mask of the state it
    returns is used from the *next* step on. It runs inside the user's ``jit``.

    Attributes:
      init: ``init(params) -> state``. A state is a NamedTuple of arrays with a field ``mask``, a pytree
        of bool arrays of the structure of the parameters whose leaves broadcast against them (or a
        field ``bits``, that pytree packed, and a property ``mask``). A field ``churn``, a float32
        scalar, is read by `mask_stats` and written by `set_mask`.
      update: ``update(state, params, ascent_grads, descent_grads, step, **extra) -> state``, with
        ``step`` an int32 scalar that counts from 0. ``ascent_grads`` is the gradient at ``params``,
        or None under `alternating`, which does not keep it. ``extra`` holds the extra arguments of
        ``tx.update``.
    """

    init: InitFn
    update: UpdateFn


class MaskState(NamedTuple):
    """State of `random_mask` and `fixed_mask`.

    Attributes:
      bits: the mask, its long leaves packed (``ssam_jax.masks.packing``): uint8, uint16 or uint32 words where
        bool would take a byte for each entry.
      churn: float32 scalar, the share of the perturbed entries that the last renewal brought in.
      key: uint32 key data, folded with the step where randomness is needed; None for `fixed_mask`.
    """

    bits: Mask
    churn: jax.Array
    key: jax.Array | None

    @property
    def mask(self) -> Mask:
        """Bool pytree, True where the parameter is perturbed."""
        return packing.unpack(self.bits)


def random_mask(
    pattern: Pattern, *, refresh_every: int | None = None, seed: int | jax.Array = 0, packed: bool = True
) -> MaskRule:
    """Perturb a random part of the parameters, for ablations.

    Args:
      pattern: the shape and size of the part.
      refresh_every: draw a new mask at the end of every so many steps; None keeps the first.
      seed: an integer, Python's or a traced scalar (to ``vmap`` over seeds).
      packed: as for `fisher_mask`.

    Returns:
      A `MaskRule` with a `MaskState`.

    Raises:
      TypeError: a pattern, a seed or a bool is not one.
      ValueError: ``refresh_every`` is below 1.
    """
    check_pattern(pattern)
    check_refresh_every(refresh_every)
    check_seed(seed)
    check_packed(packed)

    def init(params: Params) -> MaskState:
        key = key_data(seed)
        return MaskState(first_mask(pattern, key, params, packed), jnp.float32(0), key)

    def update(
        state: MaskState, params: Params, ascent_grads: Any, descent_grads: Any, step: jax.Array, **extra: Any
    ) -> MaskState:
        del ascent_grads, descent_grads, extra
        check_mask_state(state, MaskState, "random_mask", key=True)

        def renew() -> Mask:
            return pattern.random(jax.random.fold_in(as_key(state.key), step + 1), params)

        bits, churn = renewed(state, renew, step, refresh_every)
        return state._replace(bits=bits, churn=churn)

    return MaskRule(init, update)


def fixed_mask(tree_or_predicate: Mask | Callable[[str], bool], *, packed: bool = True) -> MaskRule:
    """Perturb a part of the parameters that is chosen once, by hand.

    Args:
      tree_or_predicate: a pytree of bools or bool arrays, a prefix of the parameters' tree whose
        leaves broadcast against them; or a function of a parameter's path, such as
        ``"params/Dense_0/kernel"``, that returns whether to perturb it. "Norm layers only" is
        ``fixed_mask(lambda path: "norm" in path.lower())``.
      packed: as for `fisher_mask`.

    Returns:
      A `MaskRule` with a `MaskState`. Only `set_mask` changes the mask.

    Raises:
      TypeError: ``packed`` or a leaf of the tree is not a bool, or a predicate takes more than a path; or at
        ``init``, a predicate's answer is not a bool.
      ValueError: at ``init``, the tree does not fit the parameters.
    """
    check_packed(packed)
    if isinstance(tree_or_predicate, Pattern):
        raise TypeError(
            f"fixed_mask takes a tree of bools or a function of a path, got {tree_or_predicate!r}, which"
            " needs scores: take fixed_mask(pattern(scores)), or random_mask(pattern)."
        )
    if callable(tree_or_predicate):
        checks.takes("predicate", tree_or_predicate, "path")
    else:
        check_bools(tree_or_predicate, "the mask")

    def init(params: Params) -> MaskState:
        if callable(tree_or_predicate):
            mask = trees.map_with_path(lambda path, _: _answer(tree_or_predicate, path), params)
        else:
            mask = _spread(tree_or_predicate, params)
        check_mask(mask, params)
        mask = jax.tree.map(shardings.alike, mask, params)
        return MaskState(packing.pack(mask) if packed else mask, jnp.float32(0), None)

    def update(state: MaskState, *args: Any, **extra: Any) -> MaskState:
        del args, extra
        check_mask_state(state, MaskState, "fixed_mask", key=False)
        return state

    return MaskRule(init, update)


def _answer(predicate: Callable[[str], bool], path: str) -> jax.Array:
    answer = predicate(path)
    if not isinstance(answer, bool) and getattr(answer, "dtype", None) != jnp.bool_:
        raise TypeError(f"the predicate given to fixed_mask must return a bool, got {answer!r} for {path!r}.")
    return jnp.array(answer)


def _spread(prefix: Mask, params: Params) -> Mask:
    """Return a copy of a tree of masks for every leaf below each of its own."""
    if not jax.tree.leaves(params):  # nothing to mask; optax.tree_map_params passes a placeholder
        return params
    try:
        return jax.tree.map(lambda m, part: jax.tree.map(lambda _: jnp.array(m), part), prefix, params)
    except ValueError as error:
        raise ValueError(
            f"the tree given to fixed_mask must be a prefix of the parameters' tree: {error}"
        ) from None


def renewed(
    state: Any, renew: Callable[[], Mask], step: jax.Array, refresh_every: int | None
) -> tuple[Mask, jax.Array]:
    """Return the bits of the mask and its churn after a step: new at the end of every k-th, else the old.

    The renewal is under ``lax.cond``, so the other steps do not pay for it. The new mask lies where the
    old one does.
    """
    if refresh_every is None:
        return state.bits, state.churn

    def replace() -> tuple[Mask, jax.Array]:
        old, new = state.mask, renew()
        trees.check_same_shapes(new, old, "the renewed mask", "the one in the state", OTHER_STATE)
        mask = jax.tree.map(shardings.alike, new, old)
        bits = packing.pack_like(mask, state.bits)
        return bits, packing.churn(state.bits, bits)

    return jax.lax.cond((step + 1) % refresh_every == 0, replace, lambda: (state.bits, state.churn))


def mask_churn(old: Mask, new: Mask) -> jax.Array:
    """Return the share of the True entries of ``new`` that are False in ``old``, a float32 scalar.

    Entries of masks that broadcast count once, however many parameters they stand for.
    """
    pairs = list(zip(jax.tree.leaves(old), jax.tree.leaves(new)))
    zero = jnp.zeros((), jnp.float32)
    came = sum((jnp.sum(n & ~o, dtype=jnp.float32) for o, n in pairs), start=zero)
    active = sum((jnp.sum(n, dtype=jnp.float32) for _, n in pairs), start=zero)
    return jnp.where(active > 0, came / jnp.maximum(active, 1), 0)


def key_data(seed: int | jax.Array) -> jax.Array:
    """Return a seed's key as plain uint32 data, which every checkpoint format can hold."""
    return jax.random.key_data(jax.random.key(seed))


def as_key(data: Any) -> jax.Array:
    """Return the typed key of `key_data`."""
    return jax.random.wrap_key_data(data)


def check_pattern(pattern: Any) -> None:
    """Raise TypeError unless ``pattern`` is a hashable `Pattern`."""
    if not isinstance(pattern, Pattern):
        raise TypeError(
            "pattern must be a Pattern such as Unstructured(sparsity=0.5), Structured(...) or"
            f" NM(2, 4), got {pattern!r}."
        )
    if type(pattern).__hash__ is None:
        raise TypeError(f"pattern must be hashable (a frozen dataclass, for instance), got {pattern!r}.")


def check_packed(packed: Any) -> None:
    """Raise TypeError unless ``packed`` is a bool."""
    if not isinstance(packed, bool):
        raise TypeError(f"packed must be a bool, got {packed!r}.")


def check_seed(seed: Any) -> None:
    """Raise unless ``seed`` is an integer, Python's of 64 bits or a scalar array."""
    if not checks.is_kind(seed, jnp.integer) or jnp.shape(seed) != ():
        raise TypeError(f"seed must be an integer, got {seed!r}.")
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be from -2**63 to below 2**63, got {seed}.")


def check_refresh_every(refresh_every: Any) -> None:
    """Raise unless ``refresh_every`` is None or a positive int."""
    if refresh_every is None:
        return
    checks.integer("refresh_every", refresh_every, also=", or None")


def check_mask(mask: Any, params: Params, remedy: str = "") -> None:
    """Raise, naming the leaf, unless ``mask`` has bool leaves that broadcast against ``params``."""
    trees.check_same_structure(mask, params, "the mask", "the parameters", remedy)
    check_bools(mask, "the mask")
    for path, m, p in zip(trees.leaf_paths(params), jax.tree.leaves(mask), jax.tree.leaves(params)):
        if not _broadcasts(jnp.shape(m), jnp.shape(p)):
            raise ValueError(
                f"the mask's leaf {path!r} of shape {jnp.shape(m)} does not broadcast against {jnp.shape(p)},"
                f" the parameter's.{remedy and ' '}{remedy}"
            )


def check_bools(mask: Any, name: str) -> None:
    """Raise TypeError, naming the leaf, unless all leaves are bools or bool arrays."""
    for path, leaf in zip(trees.leaf_paths(mask), jax.tree.leaves(mask)):
        if not checks.is_kind(leaf, jnp.bool_):
            raise TypeError(
                f"{name} must be bool, but its leaf {path!r} is {checks.named(checks.kind(leaf))}; True"
                " means perturbed."
            )


def check_mask_state(state: Any, kind: type, rule: str, **present: bool) -> None:
    """Raise TypeError unless the state that a rule's ``update`` gets is one that its ``init`` made.

    Args:
      state: the state of some rule.
      kind: the class that it must have.
      rule: which, for the message.
      **present: for fields, whether they are to be there or to be None.
    """

    def described(kind: type, present: dict[str, bool]) -> str:
        fields = (f"{name} {'there' if there else 'None'}" for name, there in present.items())
        return " with ".join([kind.__name__, *fields])

    known = type(state) is kind
    found = {name: getattr(state, name) is not None for name in present} if known else {}
    if not known or found != present:
        raise TypeError(
            f"this {rule} needs the state of its own init, {described(kind, present)}, got"
            f" {described(type(state), found)}. {OTHER_STATE}"
        )


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    padded = (1,) * (len(target) - len(shape)) + shape
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(padded, target))
