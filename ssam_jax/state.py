"""The state that every carrier keeps, and how to read and replace the mask in it, wherever it is nested."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from ssam_jax._base import boxes, shardings, trees
from ssam_jax.masks import packing
from ssam_jax.masks.fitting import check_bools
from ssam_jax.masks.rule import MaskState
from ssam_jax.typing import Mask, PyTree

T = TypeVar("T")


class SsamState(NamedTuple):
    """State of `ssam`, and a part of that of `alternating` and `carried`; ``()`` stands for no state.

    Attributes:
      step: int32 scalar, the steps taken; schedules and the mask rule see it.
      leaf_sizes: float32 of shape (leaves,), the number of entries of each parameter.
      mask: a `MaskState`, with the mask, its churn, the random key and the memory of the mask rule.
      direction: the state of the direction.
      radius: the state of the radius rule.
      combine: the state of the combine.
    """

    step: jax.Array
    leaf_sizes: jax.Array
    mask: MaskState | tuple[()]
    direction: PyTree
    radius: PyTree
    combine: PyTree


class MaskStats(NamedTuple):
    """What a mask looks like.

    Attributes:
      density: float32 scalar, the share of all parameters that is perturbed.
      by_leaf: dict from each leaf's path to its own density, a float32 scalar; empty for dense SAM.
      churn: float32 scalar, the share of the perturbed entries that the last refresh of the mask, or
        `set_mask`, brought in.
    """

    density: jax.Array
    by_leaf: dict[str, jax.Array]
    churn: jax.Array


def get_mask(opt_state: PyTree) -> Mask:
    """Return the mask that the next step uses.

    Args:
      opt_state: the state of an optimizer with one `ssam`, `alternating` or `carried` somewhere in it:
        ``optax.chain``, ``named_chain``, ``MultiSteps``, ``inject_hyperparams``,
        ``apply_if_finite``, a complete train state.

    Returns:
      bool pytree of the structure of the parameters, True where perturbed, whose leaves broadcast
      against them. Flax's boxes (``nn.Partitioned``, ``nnx.Variable``) are left out: a mask is not sharded as
      they say. None for dense SAM (``mask=None``), which has no mask.

    Raises:
      ValueError: there is no `ssam` in ``opt_state``, or more than one.
    """
    state = find(opt_state, SsamState)
    return packing.unpack(boxes.without(state.mask.bits)) if isinstance(state.mask, MaskState) else None


def set_mask(opt_state: PyTree, mask: Mask) -> PyTree:
    """Return ``opt_state`` with another mask, which the next step uses. Works under ``jit``.

    Args:
      opt_state: as for `get_mask`.
      mask: bool pytree of the structure of the present mask, whose leaves broadcast against its
        leaves, in boxes or not. It is broadcast to them, so that the state keeps its shapes.

    Raises:
      TypeError: a leaf of the mask is not bool.
      ValueError: the mask does not fit the present one; or there is no mask to replace, because the
        `ssam` is dense, missing, or one of several.
    """
    state = find(opt_state, SsamState)
    if not isinstance(state.mask, MaskState):
        raise ValueError(
            "there is no mask to replace: this ssam is dense (mask=None). Make it with"
            " mask=fisher_mask(pattern, refresh_every=None) to have one that only set_mask changes."
            " See docs/guides/choosing.md."
        )
    old = state.mask.bits
    bits = packing.pack_like(_fitted(mask, state.mask.mask), old)
    changed = state._replace(mask=state.mask._replace(bits=bits, churn=packing.churn(old, bits)))
    return replace(opt_state, changed)


def mask_stats(opt_state: PyTree) -> MaskStats:
    """Return the mask's density, in all and by leaf, and its churn, as arrays. Works under ``jit``.

    Args:
      opt_state: as for `get_mask`.

    Raises:
      TypeError: ``opt_state`` holds shapes in place of arrays.
      ValueError: there is no `ssam` in ``opt_state``, or more than one.
    """
    state = find_single(opt_state, "mask_stats")
    if not isinstance(state.mask, MaskState):
        return MaskStats(jnp.float32(1), {}, jnp.float32(0))
    mask = state.mask.mask
    shares = [_density(leaf) for leaf in jax.tree.leaves(mask)]
    total = jnp.sum(state.leaf_sizes)
    kept = sum((s * n for s, n in zip(shares, state.leaf_sizes)), start=jnp.float32(0))
    return MaskStats(
        density=kept / jnp.maximum(total, 1),
        by_leaf=dict(zip(trees.leaf_paths(mask), shares)),
        churn=state.mask.churn,
    )


def _density(leaf: jax.Array) -> jax.Array:
    return jnp.sum(leaf, dtype=jnp.float32) / max(1, leaf.size)


def find(opt_state: PyTree, kind: type[T]) -> T:
    """Return the only state of a class in the state of an optimizer, or raise."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    found = [node for node in nodes if isinstance(node, kind)]
    if len(found) != 1:
        carriers = "ssam, alternating or carried" if kind is SsamState else _CARRIERS[kind.__name__]
        raise ValueError(
            f"opt_state must hold the state of exactly one {carriers}, found {len(found)}"
            f" in a {type(opt_state).__name__}. It is what tx.init(params) returns; restore a checkpoint into"
            " that, since without it Orbax and Flax return plain dicts and lists: see"
            " docs/guides/checkpoints.md."
        )
    [state] = found
    if isinstance(state, SsamState) and not isinstance(state.mask, MaskState | tuple):
        raise ValueError(
            "the SsamState in opt_state must hold a MaskState, with a mask, got a"
            f" {type(state.mask).__name__}: restore a checkpoint into tx.init(params)."
        )
    return state


_CARRIERS = {"CarriedState": "carried", "AlternatingState": "alternating"}


def replace(opt_state: PyTree, new: PyTree) -> PyTree:
    """Return ``opt_state`` with another state in the place of the only one of its class."""

    def is_old(node: PyTree) -> bool:
        return isinstance(node, type(new))

    return jax.tree.map(lambda node: new if is_old(node) else node, opt_state, is_leaf=is_old)


def find_single(opt_state: PyTree, caller: str) -> SsamState:
    """Return the `SsamState`, or raise if it holds several runs."""
    state = find(opt_state, SsamState)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state)):
        raise TypeError(
            f"{caller} reads arrays, but opt_state holds shapes alone (jax.ShapeDtypeStruct): call it on"
            " tx.init(params), not on jax.eval_shape(tx.init, params)."
        )
    if jnp.ndim(state.leaf_sizes) != 1:
        raise ValueError(
            f"{caller} reads the state of one run, but this one has the leading axes of vmap,"
            f" {jnp.shape(state.leaf_sizes)[:-1]}; index it, or call {caller} under vmap too."
        )
    return boxes.without(state)


def _fitted(mask: Mask, like: Mask) -> Mask:
    """Return ``mask`` with the shapes of ``like``."""
    mask = boxes.like(mask, like)
    trees.check_same_structure(mask, like, "mask", "the present mask")
    check_bools(mask, "mask")

    def fit(path: str, new: jax.Array, old: jax.Array) -> jax.Array:
        try:
            return shardings.alike(jnp.broadcast_to(new, old.shape), old)
        except ValueError:
            raise ValueError(
                f"mask's leaf {path!r} of shape {jnp.shape(new)} does not broadcast to the present"
                f" mask's {old.shape}; the rule's pattern decides which masks its state can hold."
            ) from None

    return trees.map_with_path(fit, mask, like)
