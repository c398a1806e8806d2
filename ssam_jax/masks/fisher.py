"""Masks from Fisher information (SSAM-F), estimated in the training loop or exactly."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ssam_jax._base import checks, rounding, shardings, trees
from ssam_jax.masks.fitting import check_pattern
from ssam_jax.masks.patterns import Pattern, Unstructured
from ssam_jax.masks.rule import MaskRule, OnBits
from ssam_jax.typing import Gradients, Mask, Params, PyTree, Scores


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
      refresh_every: refresh the mask at the end of every so many steps. None keeps no running mean, and
        the mask changes only by `set_mask`.
      decay: weight of the past in the running mean, 0 (the last gradient alone) to below 1.
      accumulator_dtype: dtype of the running mean, which is computed in float32 at least:
        ``float32``, or ``bfloat16`` for half the memory. Bfloat16 is rounded up and down by turns, so
        that the mean does not stall: without bias, to about ``0.2% / sqrt(1 - decay)``, 4% at 0.998.
      seed: seed of the first mask, as for `MaskRule`.
      packed: as for `MaskRule`.

    Returns:
      A `MaskRule` whose memory is the running mean, shaped like the parameters; ``()`` without refresh.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: ``decay`` or ``refresh_every`` is out of range, or ``accumulator_dtype`` is another dtype.
    """
    check_pattern(pattern)
    checks.number("decay", decay, low=0, high=1, below=True)
    _check_accumulator(accumulator_dtype)

    def init(params: Params) -> Scores:
        return jax.tree.map(lambda p: shardings.zeros_like(p, accumulator_dtype), params)

    def observe(
        scores: Scores,
        params: Params,
        ascent_grads: Gradients | None,
        descent_grads: Gradients,
        step: jax.Array,
        **extra: Any,
    ) -> Scores:
        del params, ascent_grads, extra
        return jax.tree.map(lambda score, grad: accumulate(score, grad, step), scores, descent_grads)

    def accumulate(score: jax.Array, grad: jax.Array, step: jax.Array) -> jax.Array:
        past = trees.widened(score)
        square = jnp.square(grad.astype(past.dtype))
        mean = decay * past + (1 - decay) * square
        new = rounding.rounded(mean, score.dtype, step)
        return jnp.where(jnp.isfinite(square), new, score)

    def select(scores: Scores, mask: Mask | None, params: Params, key: jax.Array, step: jax.Array) -> Mask:
        del mask, params, key, step
        return pattern(scores)

    if refresh_every is None:
        return MaskRule(select=select, seed=seed, packed=packed, first=pattern)
    selects = (
        select
        if not isinstance(pattern, Unstructured)
        else OnBits(select, lambda scores, bits, params, key, step: pattern.largest_bits(scores, bits))
    )
    return MaskRule(init, observe, selects, refresh_every, seed=seed, packed=packed, first=pattern)


def empirical_fisher(
    loss_fn: Callable[[Params, Any], jax.Array],
    params: Params,
    batch: PyTree,
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
    checks.integer("chunk_size", chunk_size)
    _count_examples(batch)
    return _diagonal(loss_fn, chunk_size, params, batch)


# Under jit for callers that are not: a loop over closures would be compiled anew at every call.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _diagonal(
    loss_fn: Callable[[Params, PyTree], jax.Array], chunk_size: int, params: Params, batch: PyTree
) -> Scores:
    examples = _count_examples(batch)
    chunks, rest = divmod(examples, chunk_size)

    def loss(params: Params, example: PyTree) -> jax.Array:
        value = loss_fn(params, example)
        checks.loss(value)
        return value

    per_example = jax.vmap(jax.grad(loss), in_axes=(None, 0))

    def strided(x: jax.Array) -> jax.Array:
        # A chunk has examples from all over the batch: of one spread over devices, each has its share of it.
        return x[: chunks * chunk_size].reshape(chunk_size, chunks, *x.shape[1:])

    def chunk_of(x: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)

    def mean_square(params: Params, batch: PyTree) -> Scores:
        def add(total: Scores, chunk: PyTree) -> Scores:
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


def _check_accumulator(dtype: Any) -> None:
    try:
        known = dtype is not None and jnp.dtype(dtype) in map(
            jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float64)
        )
    except TypeError:
        known = False
    if not known:  # float16 would overflow
        raise ValueError(f"accumulator_dtype must be float32, bfloat16 or float64, got {dtype!r}.")


def _count_examples(batch: PyTree) -> int:
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
