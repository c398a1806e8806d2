"""How much the loss rises near the parameters: at the worst point found in a ball, and on average."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ssam_jax._base import checks, shardings, trees
from ssam_jax.ascent import ball
from ssam_jax.masks.fitting import fitted
from ssam_jax.sharpness import objective as obj
from ssam_jax.sharpness import progress as bars
from ssam_jax.sharpness.arguments import above_zero, at_least_one, seed_of
from ssam_jax.sharpness.results import Estimate, WorstCase, estimate
from ssam_jax.typing import Mask, Normalize, Params, Scalar


def worst_case_rise(
    loss_fn: Callable[..., jax.Array],
    params: Params,
    batches: Any,
    rho: float,
    *,
    steps: int = 1,
    step_size: float | None = None,
    mask: Mask | None = None,
    normalize: Normalize = "global",
    adaptive: bool = False,
    each_batch: bool = False,
    progress: bool = True,
) -> WorstCase:
    r"""Return how much the loss rises at the worst point that gradient ascent finds in a ball.

    .. math:: \max_{\|\epsilon\| \le \rho} L(w + \epsilon) - L(w)

    One step is SAM's (arXiv 2010.01412, eq. 2), with a mask sparse SAM's (arXiv 2306.17504). More steps are
    projected gradient ascent: normalized steps, each followed by a projection on the ball, and the worst
    of the points on the way. Either way it is a lower bound on the maximum; one step's can be negative.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``, in evaluation mode.
      params: pytree of floating-point arrays; half-precision ones are widened to float32, in which a
        small perturbation is not lost to rounding.
      batches: a list of batches of equal shapes; the loss is their mean.
      rho: radius of the ball, above 0, in the units of the parameters (adaptive: relative to them).
      steps: of gradient ascent, a gradient of all batches each.
      step_size: length of a step, above 0, in the units of rho; None means rho for one step, and
        2 rho / steps for several.
      mask: bool leaves that broadcast against ``params``, as from `ssam_jax.get_mask`: the ball holds only
        perturbations of entries that are True. None means all.
      normalize: ``"global"``: a step is divided by the norm of the complete gradient and then masked, as
        sparse SAM does; ``"masked"``: by that of the masked gradient, so that it is ``step_size`` long.
      adaptive: whether the ball is ASAM's (arXiv 2102.11600), ``||eps / (|w| + 0.01)|| <= rho``, biases not
        scaled: unlike the plain one it does not change when a layer is scaled up and the next one down.
      each_batch: whether each batch has a perturbation of its own, as in SAM's training; the result is
        then the mean over the batches (m-sharpness, for batches of m examples), and ``params`` is None.
      progress: whether to show a bar that counts the steps.

    Returns:
      `WorstCase`.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range, or does not fit the parameters.
    """
    measured = obj.objective(loss_fn, params, batches)
    above_zero("rho", rho)
    at_least_one("steps", steps)
    if step_size is None:
        step_size = rho if steps == 1 else 2 * rho / steps
    above_zero("step_size", step_size)
    checks.choice("normalize", normalize, ("global", "masked"))
    mask = _fitted(mask, measured.params)
    search = functools.partial(
        _search, _ascent_programs(loss_fn, normalize, adaptive), measured.params, mask, rho, steps, step_size
    )
    if not each_batch:
        with bars.bar(steps, "Worst-case rise", "step", progress) as advance:
            return search(measured.batches, advance)
    groups = [obj.batch(measured.batches, i) for i in range(obj.count(measured.batches))]
    with bars.bar(steps * len(groups), "Worst-case rise", "step", progress) as advance:
        found = [search(group, advance) for group in groups]
    rise, loss = (
        jnp.mean(jnp.stack(values)) for values in ([w.rise for w in found], [w.loss for w in found])
    )
    return WorstCase(rise, loss, None)


def average_rise(
    loss_fn: Callable[..., jax.Array],
    params: Params,
    batches: Any,
    sigma: float,
    *,
    samples: int = 10,
    mask: Mask | None = None,
    adaptive: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Estimate:
    r"""Return how much the loss rises on average when Gaussian noise is added to the parameters.

    .. math:: E_{\epsilon \sim N(0, \sigma^2)} [L(w + \epsilon)] - L(w)

    Every draw is used with both signs, so that the slope of the loss cancels out and what is left is
    curvature. To second order that is half of ``sigma ** 2`` times the Hessian's trace. The noise is about
    ``sigma * sqrt(n)`` long for n parameters: compare it with a ball of that radius.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``, in evaluation mode.
      params: pytree of floating-point arrays; half-precision ones are widened to float32.
      batches: a list of batches of equal shapes; the loss is their mean.
      sigma: standard deviation of the noise on each parameter, above 0, in the units of the parameters.
      samples: how often noise is drawn; two losses of all batches each.
      mask: bool leaves that broadcast against ``params``: only entries that are True get noise; None means
        all.
      adaptive: whether sigma is relative to ``|w| + 0.01``, as ASAM's ball is; biases are not scaled.
      seed: of the noise, which is the same on any number of devices.
      progress: whether to show a bar that counts the samples.

    Returns:
      `Estimate`, in the units of the loss.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range, or does not fit the parameters.

    References:
      Keskar et al., `On Large-Batch Training for Deep Learning <https://arxiv.org/abs/1609.04836>`_, for the
      idea; Jiang et al., `Fantastic Generalization Measures and Where to Find Them
      <https://arxiv.org/abs/1912.02178>`_, for this form.
    """
    measured = obj.objective(loss_fn, params, batches)
    above_zero("sigma", sigma)
    at_least_one("samples", samples)
    mask = _fitted(mask, measured.params)
    here, noisy = _noise_programs(loss_fn, adaptive)
    loss = here(measured.params, measured.batches)
    key, rises = jax.random.key(seed_of(seed)), []
    with bars.bar(samples, "Average rise", "sample", progress) as advance:
        for i in range(samples):
            there = noisy(measured.params, measured.batches, mask, sigma, jax.random.fold_in(key, i))
            rises.append(jax.block_until_ready(there - loss))
            advance()
    return estimate(rises)


def _search(
    programs: tuple[Callable[..., Any], ...],
    params: Params,
    mask: Mask | None,
    rho: float,
    steps: int,
    step_size: float,
    batches: Any,
    advance: Callable[[], Any],
) -> WorstCase:
    """Ascend, and return the worst of the points after the start."""
    climb, loss_at, displaced = programs
    start, away = climb(params, jax.tree.map(jnp.zeros_like, params), mask, batches, rho, step_size)
    worst, point = jnp.full_like(start, -jnp.inf), away
    for _ in range(steps - 1):
        loss, further = climb(params, away, mask, batches, rho, step_size)
        worst, point = trees.where(loss <= worst, (worst, point), (loss, away))  # NaN is the worst
        away = jax.block_until_ready(further)
        advance()
    loss = jax.block_until_ready(loss_at(params, away, batches))
    worst, point = trees.where(loss <= worst, (worst, point), (loss, away))
    advance()
    return WorstCase(worst - start, start, displaced(params, point))


@functools.lru_cache(maxsize=obj.PROGRAMS)
def _ascent_programs(
    loss_fn: Callable[..., jax.Array], normalize: Normalize, adaptive: bool
) -> tuple[Callable[..., Any], ...]:
    """Return a step of the ascent, the loss at a point, and the parameters there.

    Points are displacements from the parameters in the coordinates in which the ball is round.
    """

    def climb(
        params: Params, away: Params, mask: Mask | None, batches: Any, rho: Scalar, step_size: Scalar
    ) -> tuple[jax.Array, Params]:
        scale = ball.scales(params) if adaptive else None
        loss, grads = obj.mean_value_and_grad(loss_fn, ball.displaced(params, away, scale), batches)
        move = ball.step(grads, scale, rho=step_size, mask=mask, normalize=normalize)
        inside = ball.projected(jax.tree.map(jnp.add, away, move), rho)
        return loss, jax.tree.map(shardings.alike, inside, params)

    def loss_at(params: Params, away: Params, batches: Any) -> jax.Array:
        return obj.mean_loss(loss_fn, _displaced(params, away, adaptive), batches)

    return jax.jit(climb), jax.jit(loss_at), jax.jit(functools.partial(_displaced, adaptive=adaptive))


@functools.lru_cache(maxsize=obj.PROGRAMS)
def _noise_programs(
    loss_fn: Callable[..., jax.Array], adaptive: bool
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    def here(params: Params, batches: Any) -> jax.Array:
        return obj.mean_loss(loss_fn, params, batches)

    def noisy(params: Params, batches: Any, mask: Mask | None, sigma: Scalar, key: jax.Array) -> jax.Array:
        noise = jax.tree.map(lambda x: sigma * x, obj.random_like(params, key, jax.random.normal))
        noise = noise if mask is None else jax.tree.map(ball.apply_mask, mask, noise)
        opposite = jax.tree.map(jnp.negative, noise)
        losses = [obj.mean_loss(loss_fn, _displaced(params, x, adaptive), batches) for x in (noise, opposite)]
        return (losses[0] + losses[1]) / 2

    return jax.jit(here), jax.jit(noisy)


def _displaced(params: Params, away: Params, adaptive: bool) -> Params:
    return ball.displaced(params, away, ball.scales(params) if adaptive else None)


def _fitted(mask: Mask | None, params: Params) -> Mask | None:
    return None if mask is None else fitted(mask, params)
