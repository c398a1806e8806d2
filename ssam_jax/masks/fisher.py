"""Masks from Fisher information (SSAM-F): running in the training loop, or exact beside it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ssam_jax._base import checks, shardings, trees
from ssam_jax.masks import packing
from ssam_jax.masks.drawing import first_mask
from ssam_jax.masks.patterns import Pattern
from ssam_jax.masks.rule import (
    OTHER_STATE,
    MaskRule,
    check_mask_state,
    check_packed,
    check_pattern,
    check_refresh_every,
    check_seed,
    key_data,
    renewed,
)
from ssam_jax.typing import Gradients, Mask, Params, Scores


class FisherState(NamedTuple):
    """State of `fisher_mask`.

    Attributes:
      bits: the mask, its long leaves packed (``ssam_jax.masks.packing``): uint8, uint16 or uint32 words where
        bool would take a byte for each entry.
      churn: float32 scalar, the share of the perturbed entries that the last renewal brought in.
      scores: running mean of the squared gradient, shaped like the parameters; None without refresh.
    """

    bits: Mask
    churn: jax.Array
    scores: Scores | None

    @property
    def mask(self) -> Mask:
        """Bool pytree, True where the parameter is perturbed."""
        return packing.unpack(self.bits)


def fisher_mask(
    pattern: Pattern,
    *,
    refresh_every: int | None,
    decay: float = 0.95,
    accumulator_dtype: Any = jnp.float32,
    seed: int | jax.Array = 0,
    packed: bool = True,
) -> MaskRule:
    """Perturb the parameters with the largest Fisher information (SSAM-F).

    In the loop, the score is an exponential running mean of the squared mini-batch descent
    gradient: the usual stand-in, which costs no extra pass. It is not the empirical Fisher of the
    paper (arXiv 2306.17504), which averages the squares of single examples' gradients:
    for that, set ``refresh_every=None`` and every epoch or so
    ``opt_state = set_mask(opt_state, pattern(empirical_fisher(...)))``.

    The first mask is random. Gradient entries that are not finite leave the running mean as it is.

    Args:
      pattern: which entries are kept, given the scores.
      refresh_every: renew the mask at the end of every so many steps. None keeps no accumulators,
        and the mask changes only by `set_mask`.
      decay: weight of the past in the running mean, 0 (the last gradient alone) to below 1.
      accumulator_dtype: dtype of the running mean, which is computed in float32 at least:
        ``float32``, or ``bfloat16`` for half the memory (keep ``decay`` at or below 0.99 then).
      seed: seed of the first mask.
      packed: whether the state keeps a bit, not a byte, for each entry of a mask, in every leaf whose last
        axis is a multiple of 64 (or the second last of 128, the third last of 256). False is for meshes
        that do not divide the words (64 output channels, eight words, over more than eight devices).

    Returns:
      A `MaskRule` with a `FisherState`.

    Raises:
      TypeError: a pattern, a seed, a number or a bool is not one.
      ValueError: ``decay`` or ``refresh_every`` is out of range, or ``accumulator_dtype`` another dtype.
    """
    check_pattern(pattern)
    check_refresh_every(refresh_every)
    _check_decay(decay)
    _check_accumulator(accumulator_dtype)
    check_seed(seed)
    check_packed(packed)

    def init(params: Params) -> FisherState:
        scores = None
        if refresh_every is not None:
            scores = jax.tree.map(lambda p: shardings.zeros_like(p, accumulator_dtype), params)
        return FisherState(first_mask(pattern, key_data(seed), params, packed), jnp.float32(0), scores)

    def update(
        state: FisherState,
        params: Params,
        ascent_grads: Any,
        descent_grads: Gradients,
        step: jax.Array,
        **extra: Any,
    ) -> FisherState:
        del ascent_grads, extra
        check_mask_state(state, FisherState, "fisher_mask", scores=refresh_every is not None)
        if refresh_every is None:
            return state
        trees.check_same_shapes(state.scores, params, "the scores in the state", "params", OTHER_STATE)

        def accumulate(score: jax.Array, grad: jax.Array) -> jax.Array:
            past = trees.widened(score)
            square = jnp.square(grad.astype(past.dtype))
            mean = decay * past + (1 - decay) * square
            return jnp.where(jnp.isfinite(square), mean, past).astype(score.dtype)

        scores = jax.tree.map(accumulate, state.scores, descent_grads)
        bits, churn = renewed(state, lambda: pattern(scores), step, refresh_every)
        return FisherState(bits, churn, scores)

    return MaskRule(init, update)


def empirical_fisher(
    loss_fn: Callable[[Params, Any], jax.Array],
    params: Params,
    batch: chex.ArrayTree,
    *,
    chunk_size: int,
) -> Scores:
    r"""Return the diagonal of the empirical Fisher information, exactly, example by example.

    .. math:: F_i = \frac1N \sum_n \left(\partial_{w_i} \log p(y_n \mid x_n, w)\right)^2

    the mean over examples of the square of each one's own gradient (arXiv 2306.17504). Call
    it inside ``jit``. Memory is that of ``chunk_size`` gradients, however many examples there are.

    Args:
      loss_fn: ``loss_fn(params, example)``, the negative log-likelihood of one example, a scalar.
        ``example`` is ``batch`` without its leading axis; a model that wants a batch axis adds one.
      params: pytree of floating-point arrays.
      batch: pytree of arrays of shape (examples, ...).
      chunk_size: examples whose gradients are held at once, at least 1.

    Returns:
      A tree like ``params``, float32 (float64 where the parameter is).

    Raises:
      TypeError: ``params`` holds anything but real floats, ``loss_fn`` is no function of two arguments or
        returns no real floating-point loss, ``batch`` holds what are no arrays of JAX, or ``chunk_size`` is
        no int.
      ValueError: ``chunk_size`` is below 1, ``batch`` is empty or its leaves disagree on the number of
        examples, or the loss of an example is not a scalar.
    """
    checks.takes("loss_fn", loss_fn, "params", "example")
    trees.check_floating(params, "params")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size must be an int of at least 1, got {chunk_size!r}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    examples = _count_examples(batch)
    chunks, rest = divmod(examples, chunk_size)

    def loss(params: Params, example: Any) -> jax.Array:
        value = loss_fn(params, example)
        checks.loss(value)
        return value

    per_example = jax.vmap(jax.grad(loss), in_axes=(None, 0))

    def strided(x: jax.Array) -> jax.Array:
        # A chunk has examples from all over the batch: of one spread over devices, each has its share of it.
        return x[: chunks * chunk_size].reshape(chunk_size, chunks, *x.shape[1:])

    def chunk_of(x: jax.Array, i: Any) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)

    def mean_square(params: Params, batch: chex.ArrayTree) -> Scores:
        def add(total: Scores, chunk: Any) -> Scores:
            grads = per_example(params, chunk)
            return jax.tree.map(lambda t, g: t + jnp.sum(jnp.square(trees.widened(g)), axis=0), total, grads)

        total = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), trees.wide_dtype(p)), params)
        if chunks:
            parts = jax.tree.map(strided, batch)
            total = jax.lax.fori_loop(
                0, chunks, lambda i, t: add(t, jax.tree.map(lambda x: chunk_of(x, i), parts)), total
            )
        if rest:
            total = add(total, jax.tree.map(lambda x: x[examples - rest :], batch))
        return jax.tree.map(lambda t: t / examples, total)

    return shardings.computed_like(params, mean_square, batch)


def _check_decay(decay: Any) -> None:
    if isinstance(decay, bool) or not isinstance(decay, int | float | np.floating):
        raise TypeError(f"decay must be a float from 0 to below 1, got {decay!r}.")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be from 0 to below 1, got {decay!r}.")


def _check_accumulator(dtype: Any) -> None:
    try:
        known = dtype is not None and jnp.dtype(dtype) in map(
            jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float64)
        )
    except TypeError:
        known = False
    if not known:  # float16 would overflow
        raise ValueError(f"accumulator_dtype must be float32, bfloat16 or float64, got {dtype!r}.")


def _count_examples(batch: chex.ArrayTree) -> int:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(
            "batch must hold arrays of shape (examples, ...) that agree on the number of examples, at"
            f" least 1, got leading sizes {sorted(sizes)}."
        )
    for path, leaf in zip(trees.leaf_paths(batch), jax.tree.leaves(batch)):
        if not checks.is_kind(leaf, jnp.number, jnp.bool_, jax.dtypes.prng_key):
            raise TypeError(
                f"batch must hold arrays of JAX, but its leaf {path!r} is {checks.named(checks.kind(leaf))}."
            )
    return next(iter(sizes))[0]
