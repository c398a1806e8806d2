"""The state of `ssam`, and how to read and replace the mask in it, wherever it is nested."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ssam_jax._base import shardings, trees
from ssam_jax.masks import packing
from ssam_jax.masks.rule import check_bools, mask_churn
from ssam_jax.two_pass.active import Active, FirstRow
from ssam_jax.typing import Mask


class SsamState(NamedTuple):
    """State of `ssam`, found anywhere in an optimizer's state by the functions of this module.

    Attributes:
      step: int32 scalar, the steps taken; rho's schedule and the mask rule see it.
      leaf_sizes: float32 of shape (leaves,), the number of entries of each parameter.
      mask_state: the state of the mask rule, with a ``mask``; None for dense SAM.
    """

    step: jax.Array
    leaf_sizes: jax.Array
    mask_state: Any


class MaskStats(NamedTuple):
    """What a mask looks like.

    Attributes:
      density: float32 scalar, the share of all parameters that is perturbed.
      by_leaf: dict from each leaf's path to its own density, a float32 scalar; empty for dense SAM.
      churn: float32 scalar, the share of the perturbed entries that the last renewal of the mask, or
        `set_mask`, brought in; NaN if the mask rule does not keep it.
    """

    density: jax.Array
    by_leaf: dict[str, jax.Array]
    churn: jax.Array


def get_mask(opt_state: chex.ArrayTree) -> Mask | None:
    """Return the mask that the next step uses.

    Args:
      opt_state: the state of an optimizer with one `ssam` or `alternating` somewhere in it:
        ``optax.chain``, ``named_chain``, ``MultiSteps``, ``inject_hyperparams``,
        ``apply_if_finite``, a whole train state.

    Returns:
      bool pytree of the structure of the parameters, True where perturbed, whose leaves broadcast
      against them. None for dense SAM (``mask=None``), which has no mask.

    Raises:
      ValueError: there is no `ssam` in ``opt_state``, or more than one.
    """
    mask_state = _find(opt_state).mask_state
    return None if mask_state is None else mask_state.mask


def set_mask(opt_state: chex.ArrayTree, mask: Mask) -> Any:
    """Return ``opt_state`` with another mask, which the next step uses. Works under ``jit``.

    Args:
      opt_state: as for `get_mask`.
      mask: bool pytree of the structure of the present mask, whose leaves broadcast against its
        leaves. It is broadcast to them, so that the state keeps its shapes.

    Raises:
      TypeError: a leaf of the mask is not bool.
      ValueError: the mask does not fit the present one; or there is no mask to replace, because the
        `ssam` is dense, missing, or one of several.
    """
    state = _find(opt_state)
    if state.mask_state is None:
        raise ValueError(
            "there is no mask to replace: this ssam is dense (mask=None). Make it with"
            " mask=fisher_mask(pattern, refresh_every=None) to have one that only set_mask changes."
        )
    old = state.mask_state.mask
    new = _fitted(mask, old)
    bits = getattr(state.mask_state, "bits", None)  # the library's own rules keep them
    kept = {"mask": new} if bits is None else {"bits": packing.pack_like(new, bits)}
    mask_state = state.mask_state._replace(**kept)
    if hasattr(mask_state, "churn"):
        mask_state = mask_state._replace(churn=mask_churn(old, new))
    changed = state._replace(mask_state=mask_state)
    return jax.tree.map(lambda s: changed if _is_state(s) else s, opt_state, is_leaf=_is_state)


def active_leaves(opt_state: chex.ArrayTree) -> Active:
    """Return for each leaf, in flattening order, whether any of it is perturbed.

    For a leaf of two dimensions or more whose mask is all True or all False in every row, such as
    the stacked layers of a scan masked by layer, and whose first row is not perturbed, it is the
    `FirstRow` that is. The tuple is hashable, to be a static argument of ``jit``. It reads the mask's
    values: call it between steps.

    Args:
      opt_state: as for `get_mask`.

    Raises:
      TypeError: ``opt_state`` holds shapes in place of arrays.
      ValueError: called under ``jit``, or there is no `ssam` in ``opt_state``, or more than one.
    """
    state = _find_single(opt_state, "active_leaves")
    if state.mask_state is None:
        return (True,) * state.leaf_sizes.shape[0]
    leaves = jax.tree.leaves(state.mask_state.mask)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError(
            "active_leaves reads the mask's values, which are not known under jit. Call it between"
            " steps and pass the tuple on as a static argument."
        )
    found = [(_by_row(jnp.any, leaf), _by_row(jnp.all, leaf)) for leaf in leaves]
    rows = jax.device_get(jax.tree.map(shardings.readable, found))
    return tuple(_activity(some, whole) for some, whole in rows)


def _by_row(reduce: Callable[..., jax.Array], mask: jax.Array) -> jax.Array:
    """Reduce a mask to one value a row; one of fewer than two dimensions to a single value."""
    return reduce(mask, axis=tuple(range(1, mask.ndim))) if mask.ndim > 1 else reduce(mask)[None]


def _activity(some: np.ndarray, whole: np.ndarray) -> bool | FirstRow:
    if not some.any():
        return False
    first = int(some.argmax())
    return FirstRow(first) if first and (some == whole).all() else True


def mask_stats(opt_state: chex.ArrayTree) -> MaskStats:
    """Return the mask's density, in all and by leaf, and its churn, as arrays. Works under ``jit``.

    Args:
      opt_state: as for `get_mask`.

    Raises:
      TypeError: ``opt_state`` holds shapes in place of arrays.
      ValueError: there is no `ssam` in ``opt_state``, or more than one.
    """
    state = _find_single(opt_state, "mask_stats")
    if state.mask_state is None:
        return MaskStats(jnp.float32(1), {}, jnp.float32(0))
    mask = state.mask_state.mask
    shares = [_density(leaf) for leaf in jax.tree.leaves(mask)]
    total = jnp.sum(state.leaf_sizes)
    kept = sum((s * n for s, n in zip(shares, state.leaf_sizes)), start=jnp.float32(0))
    return MaskStats(
        density=kept / jnp.maximum(total, 1),
        by_leaf=dict(zip(trees.leaf_paths(mask), shares)),
        churn=getattr(state.mask_state, "churn", _UNKNOWN),
    )


_UNKNOWN: Any = np.float32(np.nan)  # NumPy's, which jax_debug_nans lets pass


def _density(leaf: jax.Array) -> jax.Array:
    return jnp.sum(leaf, dtype=jnp.float32) / max(1, leaf.size)


def _is_state(node: Any) -> bool:
    return isinstance(node, SsamState)


def _find(opt_state: chex.ArrayTree) -> SsamState:
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(s)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state must hold the state of exactly one ssam or alternating, found {len(found)}"
            f" in a {type(opt_state).__name__}. It is what tx.init(params) returns; restore a checkpoint into"
            " that, since without it Orbax and Flax return plain dicts and lists."
        )
    [state] = found
    if state.mask_state is not None and not hasattr(state.mask_state, "mask"):
        raise ValueError(
            "the SsamState in opt_state must hold the state of a mask rule, with a mask, got a"
            f" {type(state.mask_state).__name__}: restore a checkpoint into tx.init(params)."
        )
    return state


def _find_single(opt_state: chex.ArrayTree, caller: str) -> SsamState:
    """Return the `SsamState`, or raise if it holds several runs."""
    state = _find(opt_state)
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
    return jax.tree.map(_unboxed, state)


def _unboxed(leaf: Any) -> Any:
    """Return the array in a box of an old version of Flax, in which boxes are leaves."""
    return jnp.asarray(leaf) if hasattr(leaf, "__jax_array__") else leaf


def _fitted(mask: Any, like: Mask) -> Mask:
    """Return ``mask`` with the shapes of ``like``."""
    trees.check_same_structure(mask, like, "mask", "the present mask")
    check_bools(mask, "mask")

    def fit(path: str, new: Any, old: jax.Array) -> jax.Array:
        try:
            return shardings.alike(jnp.broadcast_to(new, old.shape), old)
        except ValueError:
            raise ValueError(
                f"mask's leaf {path!r} of shape {jnp.shape(new)} does not broadcast to the present"
                f" mask's {old.shape}; the rule's pattern decides which masks its state can hold."
            ) from None

    return trees.map_with_path(fit, mask, like)
