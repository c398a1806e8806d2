"""Directions: which way is up. Any ``optax.GradientTransformation`` is one; these are not in optax."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssam_jax._base import checks, shardings, trees
from ssam_jax.typing import Gradients, Params, PyTree

__all__ = ["FriendlyState", "NoiseState", "base_momentum", "friendly", "noise", "zscore"]


class FriendlyState(NamedTuple):
    """State of `friendly`.

    Attributes:
      started: bool scalar, whether there has been a gradient.
      mean: running mean of the gradient, shaped like the parameters, float32 at least.
    """

    started: jax.Array
    mean: Gradients


def friendly(sigma: float = 1.0, decay: float = 0.95) -> optax.GradientTransformation:
    r"""Return F-SAM's direction: the gradient without the part that all batches share.

    .. math:: d_t = g_t - \sigma e_t, \qquad e_{t+1} = \lambda e_t + (1 - \lambda) g_t

    The first step has :math:`d = g` and :math:`e = g`.

    Args:
      sigma: how much of the running mean to take away, at least 0.
      decay: lambda, weight of the past in the mean of the gradient itself, 0 to below 1.

    Returns:
      An ``optax.GradientTransformation`` with a `FriendlyState`.

    Raises:
      TypeError: an argument is not a real number.
      ValueError: an argument is out of range.

    References:
      Li et al., `Friendly Sharpness-Aware Minimization <https://arxiv.org/abs/2403.12350>`_, algorithm 1.
    """
    checks.number("sigma", sigma, low=0, high=checks.LARGEST)
    checks.number("decay", decay, low=0, high=1, below=True)

    def init(params: Params) -> FriendlyState:
        mean = jax.tree.map(lambda p: shardings.zeros_like(p, trees.wide_dtype(p)), params)
        return FriendlyState(jnp.zeros((), bool), mean)

    def update(
        grads: Gradients, state: FriendlyState, params: Params | None = None
    ) -> tuple[Gradients, FriendlyState]:
        del params

        def own(g: jax.Array, e: jax.Array) -> jax.Array:
            g = g.astype(e.dtype)
            return jnp.where(state.started, g - sigma * e, g)

        def shared(g: jax.Array, e: jax.Array) -> jax.Array:
            g = g.astype(e.dtype)
            mean = jnp.where(state.started, decay * e + (1 - decay) * g, g)
            return jnp.where(jnp.isfinite(g), mean, e)  # one bad batch must not stay in the mean for good

        direction = jax.tree.map(own, grads, state.mean)
        return direction, FriendlyState(jnp.ones((), bool), jax.tree.map(shared, grads, state.mean))

    return optax.GradientTransformation(init, update)


class NoiseState(NamedTuple):
    """State of `noise`.

    Attributes:
      key: uint32 key data.
      step: int32 scalar, the draws made.
    """

    key: jax.Array
    step: jax.Array


def noise(seed: int | jax.Array) -> optax.GradientTransformation:
    """Return a Gaussian direction, drawn anew each step, the same on any number of devices.

    Args:
      seed: an integer, Python's or a traced scalar.

    Returns:
      An ``optax.GradientTransformation`` with a `NoiseState`.

    Raises:
      TypeError: ``seed`` is not an integer.
      ValueError: it has more than 64 bits.
    """
    checks.seed(seed)

    def init(params: Params) -> NoiseState:
        del params
        return NoiseState(jax.random.key_data(jax.random.key(seed)), jnp.zeros((), jnp.int32))

    def update(
        grads: Gradients, state: NoiseState, params: Params | None = None
    ) -> tuple[Gradients, NoiseState]:
        del params
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        leaves, treedef = jax.tree.flatten(grads)
        drawn = [
            jax.random.normal(jax.random.fold_in(key, i), jnp.shape(leaf), trees.wide_dtype(leaf))
            for i, leaf in enumerate(leaves)
        ]
        tree = jax.tree.map(shardings.alike, jax.tree.unflatten(treedef, drawn), grads)
        return tree, NoiseState(state.key, optax.safe_increment(state.step))

    return optax.GradientTransformation(init, update)


def base_momentum() -> optax.GradientTransformationExtraArgs:
    """Return the momentum that the base optimizer of `carried` or `alternating` holds.

    It keeps no state of its own. The momentum is ``trace`` (``optax.sgd``, ``optax.trace``) or ``mu``
    (``optax.adam``, ``optax.lion``) in the state of the optimizer. MSAM (arXiv 2401.12033) ascends against
    it: ``direction=optax.chain(base_momentum(), optax.scale(-1.0))``.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` raises

      - TypeError in `ssam`, which has no base optimizer;
      - ValueError if the state of the optimizer holds no momentum, or more than one.
    """

    def init(params: Params) -> PyTree:
        del params
        return ()

    def update(
        grads: Gradients, state: PyTree, params: Params | None = None, **extra: Any
    ) -> tuple[Gradients, PyTree]:
        del params
        if "base_state" not in extra:
            raise TypeError(
                "directions.base_momentum() reads the state of a base optimizer, which ssam does not hold:"
                " use carried(optimizer, rho, direction=...) or alternating(...), or optax.trace(decay) here."
                " See docs/guides/carried.md."
            )
        return _momentum(extra["base_state"], grads), state

    return optax.GradientTransformationExtraArgs(init, update)


def zscore(threshold: float) -> optax.GradientTransformation:
    r"""Return ZSharp's direction: in each leaf, the entries that stand out from the others.

    An entry is kept where :math:`|g_i - \mu| / \sigma > t`, with the mean and the standard deviation of the
    leaf, and zero elsewhere. A leaf whose entries are all equal, such as a scalar, is kept as it is.

    Args:
      threshold: t, at least 0.

    Returns:
      An ``optax.GradientTransformation`` without state.

    Raises:
      TypeError: ``threshold`` is not a real number.
      ValueError: it is negative or not finite.

    References:
      Yun, `Sharpness-Aware Minimization with Z-Score Gradient Filtering <https://arxiv.org/abs/2505.02369>`_.
    """
    checks.number("threshold", threshold, low=0, high=checks.LARGEST)

    def update(
        grads: Gradients, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[Gradients, optax.EmptyState]:
        del params
        return jax.tree.map(outstanding, grads), state

    def outstanding(g: jax.Array) -> jax.Array:
        wide = trees.widened(g)
        centered = wide - jnp.mean(wide)
        variance = jnp.mean(jnp.square(centered))
        # Compared as squares: no root of zero, and no division by it.
        keep = (jnp.square(centered) > threshold**2 * variance) | (variance == 0)
        return jnp.where(keep, wide, 0)

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _momentum(base_state: PyTree, grads: Gradients) -> Gradients:
    structure: Any = jax.tree.structure(grads)
    found = [
        value
        for name in ("trace", "mu")
        for _, value in optax.tree_utils.tree_get_all_with_path(base_state, name)
        if jax.tree.structure(value) == structure
    ]
    if len(found) != 1:
        raise ValueError(
            f"directions.base_momentum() found {len(found)} momenta in the state of the base optimizer, a"
            f" {type(base_state).__name__}, and needs one: a field trace or mu shaped like the parameters, as"
            " optax.sgd(lr, momentum=0.9) and optax.adam(lr) have it."
        )
    return found[0]
