"""The Hessian of a loss without forming it: largest eigenpairs, trace, spectral density.

Everything is made of Hessian-vector products, each about twice the work of a gradient of all batches.
matfree has Lanczos' method, Hutchinson's estimator and their quadrature.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ssam_jax.sharpness import objective as obj
from ssam_jax.sharpness import progress as bars
from ssam_jax.sharpness.arguments import at_least_one, seed_of
from ssam_jax.sharpness.results import Eigenpairs, Estimate, SpectralDensity, estimate
from ssam_jax.sharpness.vectors import Layout, layout_of
from ssam_jax.typing import Params

try:
    from matfree import decomp, stochtrace
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ssam_jax.sharpness needs matfree: pip install '.[sharpness]' in a clone of ssam_jax.",
        name=error.name,
    ) from None

NOISE = 100
"""A residual vector of at most so many roundings, relative to the spectrum so far, counts as 0."""

LANCZOS_STEPS = 40
"""Lanczos steps to the largest eigenpairs, unless ``k`` is large: enough for a network's outliers."""


def hessian_eigenpairs(
    loss_fn: Callable[..., jax.Array],
    params: Params,
    batches: Any,
    k: int = 1,
    *,
    depth: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Eigenpairs:
    """Return the k largest eigenvalues of the loss's Hessian, with their eigenvectors, by Lanczos' method.

    Largest means furthest to the right, not largest in magnitude. Of an eigenvalue that occurs several times,
    one copy is found for certain, others perhaps. Values far from the rest of the spectrum converge first;
    ``residuals`` bounds the error of each.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``, twice differentiable, in evaluation mode.
      params: pytree of floating-point arrays; half-precision ones are widened to float32.
      batches: a list of batches of equal shapes; the loss is their mean.
      k: the number of pairs.
      depth: Lanczos steps: Hessian-vector products, and vectors of the parameters' size that are kept.
        At least k and at most the number of parameters; None means 40, or 4 k if that is more, or the
        number of parameters if that is less.
      seed: of the random start.
      progress: whether to show a bar that counts the products.

    Returns:
      `Eigenpairs`, laid out as the parameters are. Values beyond the reach of the start vector are NaN, for
      example where the Hessian is 0.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range, or the batches differ in shape.

    References:
      Lanczos, An iteration method for the solution of the eigenvalue problem, 1950.
    """
    measured = obj.objective(loss_fn, params, batches)
    layout = layout_of(measured.params)
    at_least_one("k", k, most=layout.size)
    if depth is None:
        depth = min(layout.size, max(LANCZOS_STEPS, 4 * k))
    at_least_one("depth", depth, most=layout.size)
    if depth < k:
        raise ValueError(f"depth must be at least k, {k}, got {depth}.")
    run = _eigenpairs_program(loss_fn, layout, k, depth, progress)
    with bars.bar(depth, "Hessian eigenvalues", "product", progress):
        return jax.block_until_ready(run(measured.params, measured.batches, jax.random.key(seed_of(seed))))


def hessian_trace(
    loss_fn: Callable[..., jax.Array],
    params: Params,
    batches: Any,
    *,
    probes: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    """Return the trace of the loss's Hessian, by Hutchinson's estimator with random signs.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``, twice differentiable, in evaluation mode.
      params: pytree of floating-point arrays; half-precision ones are widened to float32.
      batches: a list of batches of equal shapes; the loss is their mean.
      probes: random vectors, a Hessian-vector product each.
      seed: of the random signs.
      progress: whether to show a bar that counts the probes.

    Returns:
      `Estimate`, one sample a probe.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range, or the batches differ in shape.

    References:
      Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990.
    """
    measured = obj.objective(loss_fn, params, batches)
    at_least_one("probes", probes)
    run = _trace_program(loss_fn, layout_of(measured.params))
    key, samples = jax.random.key(seed_of(seed)), []
    with bars.bar(probes, "Hessian trace", "probe", progress) as advance:
        for i in range(probes):
            sample = run(measured.params, measured.batches, jax.random.fold_in(key, i))
            samples.append(jax.block_until_ready(sample))
            advance()
    return estimate(samples)


def spectral_density(
    loss_fn: Callable[..., jax.Array],
    params: Params,
    batches: Any,
    *,
    probes: int = 4,
    depth: int = 50,
    seed: int = 0,
    progress: bool = True,
) -> SpectralDensity:
    """Return the density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``, twice differentiable, in evaluation mode.
      params: pytree of floating-point arrays; half-precision ones are widened to float32.
      batches: a list of batches of equal shapes; the loss is their mean.
      probes: random vectors to average over.
      depth: Lanczos steps for each: Hessian-vector products, and vectors of the parameters' size that
        are kept. At most the number of parameters.
      seed: of the random vectors.
      progress: whether to show a bar that counts the products.

    Returns:
      `SpectralDensity`: depth nodes for each probe.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range, or the batches differ in shape.

    References:
      Ghorbani, Krishnan, Xiao, `An Investigation into Neural Net Optimization via Hessian Eigenvalue
      Density <https://arxiv.org/abs/1901.10159>`_, section 2.
    """
    measured = obj.objective(loss_fn, params, batches)
    layout = layout_of(measured.params)
    at_least_one("probes", probes)
    at_least_one("depth", depth, most=layout.size)
    run = _density_program(loss_fn, layout, depth, progress)
    key, found = jax.random.key(seed_of(seed)), []
    with bars.bar(probes * depth, "Hessian spectrum", "product", progress):
        for i in range(probes):
            probe = run(measured.params, measured.batches, jax.random.fold_in(key, i))
            found.append(jax.block_until_ready(probe))
    nodes, weights = zip(*found)
    return SpectralDensity(jnp.stack(nodes), jnp.stack(weights))


@functools.lru_cache(maxsize=obj.PROGRAMS)
def _eigenpairs_program(
    loss_fn: Callable[..., jax.Array], layout: Layout, k: int, depth: int, show: bool
) -> Callable[..., Eigenpairs]:
    def run(params: Params, batches: Any, key: jax.Array) -> Eigenpairs:
        basis, matrix, found, coupling = _lanczos(loss_fn, layout, depth, show, params, batches, key)
        beyond = jnp.where(found, 0, 4 * jnp.max(jnp.abs(matrix)) + 1)  # below all eigenvalues
        values, vectors = jnp.linalg.eigh(matrix - jnp.diag(beyond))
        values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
        basis = jnp.where(found[:, None], basis, 0)
        ritz = jax.vmap(layout.as_tree)(vectors.T @ basis)
        usable = jnp.arange(k) < jnp.sum(found)
        values, residuals = (jnp.where(usable, x, jnp.nan) for x in (values, jnp.abs(coupling * vectors[-1])))
        return Eigenpairs(values, ritz, residuals)

    def out(specs: Any) -> Any:
        rows = jax.tree.map(lambda spec: PartitionSpec(None, *spec), specs)
        whole: Any = PartitionSpec()
        return Eigenpairs(whole, rows, whole)

    return layout.compiled(run, out)


@functools.lru_cache(maxsize=obj.PROGRAMS)
def _density_program(
    loss_fn: Callable[..., jax.Array], layout: Layout, depth: int, show: bool
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def run(params: Params, batches: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, matrix, _, _ = _lanczos(loss_fn, layout, depth, show, params, batches, key)
        nodes, vectors = jnp.linalg.eigh(matrix)
        return nodes, jnp.square(vectors[0])  # Golub and Welsch

    return layout.compiled(run, lambda _: (PartitionSpec(), PartitionSpec()))


@functools.lru_cache(maxsize=obj.PROGRAMS)
def _trace_program(loss_fn: Callable[..., jax.Array], layout: Layout) -> Callable[..., jax.Array]:
    integrand = stochtrace.monte_carlo_trace()

    def run(params: Params, batches: Any, key: jax.Array) -> jax.Array:
        product = _product(loss_fn, layout, params, batches, show=False)
        return integrand(product, layout.vector(obj.random_like(params, key, jax.random.rademacher)))

    return layout.compiled(run, lambda _: PartitionSpec())


def _product(
    loss_fn: Callable[..., jax.Array], layout: Layout, params: Params, batches: Any, *, show: bool
) -> Callable[[jax.Array], jax.Array]:
    def product(vector: jax.Array) -> jax.Array:
        if show:
            bars.tick()
        return layout.vector(obj.mean_hessian_product(loss_fn, params, layout.as_tree(vector), batches))

    return product


def _lanczos(
    loss_fn: Callable[..., jax.Array],
    layout: Layout,
    depth: int,
    show: bool,
    params: Params,
    batches: Any,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return basis, shape (depth, n), tridiagonal matrix, which rows were found, and the last coupling.

    Where the start vector reaches only a part of the space, to rounding, the rows beyond it are noise or NaN
    in matfree's result; here the matrix has them uncoupled, with the first diagonal entry.
    """
    product = _product(loss_fn, layout, params, batches, show=show)
    start = layout.vector(obj.random_like(params, key, jax.random.normal))
    decompose = decomp.hessenberg(depth, reortho="full", custom_vjp=False)  # of a symmetric matrix: Lanczos
    basis, full, residual, _ = decompose(product, start)
    diagonal, beside = jnp.diagonal(full), jnp.diagonal(full, -1)
    scale = jax.lax.cummax(jnp.maximum(jnp.abs(diagonal[:-1]), beside))
    reached = beside > NOISE * float(np.finfo(beside.dtype).eps) * scale  # not so for NaN
    # The first row counts in any case: if it is not finite, neither is the Hessian.
    found = jnp.cumprod(jnp.append(True, reached).astype(jnp.int32)).astype(bool)
    beside = jnp.where(found[1:], beside, 0)
    diagonal = jnp.where(found, diagonal, diagonal[0])
    matrix = jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
    return basis, matrix, found, jnp.where(found[-1], jnp.linalg.norm(residual), 0)
