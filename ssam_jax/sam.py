"""`ssam`: gradient at ``w`` in, gradient at the sharpest nearby point out."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssam_jax._base import checks
from ssam_jax.ascent import radii
from ssam_jax.ascent.radii import RadiusRule
from ssam_jax.combine import Combine
from ssam_jax.factors import Factors, check_ascent_steps, check_gradient
from ssam_jax.masks.rule import MaskRule
from ssam_jax.state import SsamState
from ssam_jax.typing import GradFn, Gradients, Normalize, Params, PyTree, Scalar, Schedule, TwoPassGradFn

_MISSING: Any = object()


def ssam(
    rho: Scalar | Schedule | RadiusRule,
    mask: MaskRule | None = None,
    *,
    direction: optax.GradientTransformation | None = None,
    combine: Combine | None = None,
    normalize: Normalize = "global",
    adaptive: bool = False,
    ascent_steps: int | None = None,
    skip_zero_rho: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization as a composition of five factors.

    .. math:: d = \mathrm{direction}(g), \quad
        g' = \nabla L(w + \rho \, m \odot d / \|d\|), \quad
        u = \mathrm{combine}(g, g')

    The transformation takes the gradient g at ``w`` and returns u; put it first in a chain, and clipping,
    weight decay and the optimizer after it::

        tx = optax.chain(ssam(rho=0.1, mask=fisher_mask(Unstructured(0.5), refresh_every=100)),
                         optax.sgd(0.1))
        grad_fn = lambda params, i: jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)

    ``grad_fn(params, i)`` is the protocol of ``optax.contrib.sam(opaque_mode=True)``: the gradient
    of the same batch, with the same dropout key, at other parameters. Passing ``grad_fn=None``
    *explicitly* makes a step without ascent, at the price of the base optimizer's; so does a static ``rho``
    of 0. The direction and the mask rule see the gradients of such steps too. Unknown extra arguments reach
    them and the radius rule.

    Without ``grad_fn``, a ``value_fn`` serves, which is called as optax's line searches call it: in
    ``optax.chain(ssam(0.1), optax.lbfgs())``, pass ``value``, ``grad`` and ``value_fn`` and no ``grad_fn``,
    which a line search refuses unless ``value_fn`` has a parameter of that name.

    A ``grad_fn`` of `two_pass_value_and_grad` says of which form it is. The gradients of the implicit form
    come from a masked backward pass, and the perturbation is not masked again.

    Args:
      rho: radius of the ball, at least 0: a float, a scalar array (traced under
        ``optax.inject_hyperparams``), an optax schedule of the steps taken, or a `RadiusRule`. 0 means not on
        this step.
      mask: a `MaskRule` such as `fisher_mask`, `dynamic_mask`, `random_mask` or `fixed_mask`; None
        perturbs everything, which is SAM.
      direction: any ``optax.GradientTransformation``, which turns the gradient into the way up, such as
        ``optax.ema(0.9)`` or ``directions.friendly()``; None is the gradient. Further ascent steps pass their
        gradients through it too, without a change of its state.
      combine: a `Combine`, which turns the gradients at ``w`` and at ``w + eps`` into what the step returns;
        None is the latter.
      normalize: ``"global"``: ``||eps|| <= rho``, the paper's; ``"masked"``: ``||eps|| = rho``, the only one
        for a gradient of the active leaves alone, as `two_pass_value_and_grad` gives it; ``"leaf"``: each
        leaf by its own norm.
      adaptive: ASAM (arXiv 2102.11600): eps scales with the parameters, but for biases, which are
        known by the last part of their path ("bias", Haiku's "b" and "offset").
      ascent_steps: gradient steps to the perturbed point, each ``rho`` long and from where the last
        one ended, as in ``optax.contrib.sam(sync_period=ascent_steps + 1)``. None means 1, and
        unlike 1 it passes through ``optax.inject_hyperparams``, which turns numbers into arrays.
      skip_zero_rho: put the second pass under ``lax.cond``, so that a traced rho of 0 skips it, and
        ``combine`` knows of it. Off by default because gradients under a conditional can be slow
        (convolutions on CPU) and the conditional makes a GPU wait; where the schedule is known, two compiled
        steps are better. What the step returns is cast to the dtypes of the gradient then.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a `SsamState`. Its ``update`` raises

      - TypeError if ``grad_fn`` and ``value_fn`` are missing, if ``grad_fn`` does not take ``(params, i)`` or
        ``value_fn`` is not callable, if a gradient or a parameter is not a real floating-point array, if
        ``state`` is not that of this `ssam`, if a schedule does not return a real scalar, or if the mask rule
        changes the dtypes of its memory;
      - ValueError if ``params`` is missing, if ``state`` is that of other parameters, if a schedule returns a
        radius that is known and out of range, if the mask rule changes the shapes of its memory, if
        ``grad_fn`` returns a tree of another structure or of other shapes than the gradient, if it is
        inside ``optax.masked``, or if the gradient is one of the active leaves alone or of the implicit form
        and a factor needs the complete one.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range, or does not go with another.

    References:
      Mi et al., `Systematic Investigation of Sparse Perturbed Sharpness-Aware Minimization Optimizer
      <https://arxiv.org/abs/2306.17504>`_, algorithm 1; Foret et al., `Sharpness-Aware Minimization
      for Efficiently Improving Generalization <https://arxiv.org/abs/2010.01412>`_.

    >>> import jax, jax.numpy as jnp, optax
    >>> tx = optax.chain(ssam(rho=0.1), optax.sgd(0.5))
    >>> params = jnp.array([3.0, 4.0])
    >>> grad_fn = lambda params, i: jax.grad(lambda p: jnp.sum(p**2) / 2)(params)
    >>> tx.update(grad_fn(params, 0), tx.init(params), params, grad_fn=grad_fn)[0]
    Array([-1.53, -2.04], dtype=float32)
    """
    factors = Factors(rho, mask, direction, combine, normalize, adaptive)
    _check_options(factors, ascent_steps, skip_zero_rho)
    ascents = ascent_steps or 1

    def update(
        updates: Gradients,
        state: SsamState,
        params: Params | None = None,
        *,
        grad_fn: GradFn | None = _MISSING,
        **extra_args: Any,
    ) -> tuple[Gradients, SsamState]:
        factors.check(updates, state, params)
        state = factors.boxed(state, params)
        grad_fn = _checked(grad_fn, factors, extra_args)
        radius, state = factors.radius_of(state, updates, params, **extra_args)
        uphill, state = factors.uphill(state, updates, params, **extra_args)
        mask = None if _is_implicit(grad_fn) else factors.mask_of(state, params)

        def checked(grads: Gradients) -> Gradients:
            return check_gradient(grads, updates, "what grad_fn returns", "the gradient")

        def perturbed(grad_fn: GradFn) -> Gradients:
            point = factors.point(params, uphill, radius, mask)
            for i in range(ascents - 1):
                grads = checked(_ascent_gradient(grad_fn, point, i))
                further, _ = factors.uphill(state, grads, params, **extra_args)
                point = factors.point(point, further, radius, mask)
            return checked(grad_fn(point, ascents - 1))

        def with_ascent(grad_fn: GradFn) -> tuple[Gradients, PyTree]:
            return factors.joined.update(updates, perturbed(grad_fn), state.combine, params)

        def without_ascent() -> tuple[Gradients, PyTree]:
            grads = updates if grad_fn is None or _is_complete(grad_fn) else checked(grad_fn(params, 0))
            return factors.joined.update(grads, None, state.combine, params)

        skips = skip_zero_rho and not radii.is_static(radius)
        if grad_fn is None or radii.is_zero(radius, read=skips):
            descent, joined = without_ascent()
        elif skips and isinstance(radius, jax.core.Tracer):
            descent, joined = jax.lax.cond(
                jnp.asarray(radius) == 0,
                lambda: _cast_like(without_ascent(), (updates, state.combine)),
                lambda: _cast_like(with_ascent(grad_fn), (updates, state.combine)),
            )
        else:
            descent, joined = with_ascent(grad_fn)
        state = state._replace(combine=joined)
        known = updates if grad_fn is None or _is_complete(grad_fn) else None
        state = factors.advance(state, params, known, descent, **extra_args)
        return descent, factors.unboxed(state, params)

    return optax.GradientTransformationExtraArgs(factors.init, update)


def _gradient_of(value_fn: Callable[..., Any], value: Any = None, grad: Any = None, **extra: Any) -> GradFn:
    """Return the gradient of a ``value_fn``, called with the extra arguments that it names.

    That is the protocol of optax's line searches, which take ``value`` and ``grad`` for themselves.
    """
    del value, grad
    if not callable(value_fn):
        raise TypeError(f"value_fn must be a function value_fn(params, ...) -> loss, got {value_fn!r:.100}.")
    names = inspect.signature(value_fn).parameters
    named = {name: extra[name] for name in names if name in extra}
    return lambda params, i: jax.grad(value_fn)(params, **named)


def _is_implicit(grad_fn: GradFn | None) -> bool:
    return isinstance(grad_fn, TwoPassGradFn) and grad_fn.form == "implicit"


def _is_complete(grad_fn: GradFn) -> bool:
    """Whether the gradient that came with ``grad_fn`` is exact and of all leaves."""
    return not (isinstance(grad_fn, TwoPassGradFn) and (grad_fn.partial or grad_fn.form == "implicit"))


def _ascent_gradient(grad_fn: GradFn, point: Params, i: int) -> Gradients:
    """Return the gradient for one more ascent step, like the one that the first step came with."""
    return grad_fn.ascent(point, i) if isinstance(grad_fn, TwoPassGradFn) else grad_fn(point, i)


def _cast_like(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, other: x.astype(other.dtype), tree, like)


def _check_options(factors: Factors, ascent_steps: int | None, skip_zero_rho: bool) -> None:
    checks.flag("skip_zero_rho", skip_zero_rho)
    check_ascent_steps(ascent_steps)
    if factors.joined.needs_skips and not (radii.is_static(factors.rho) or skip_zero_rho):
        raise ValueError(
            "this combine must know on which steps there is no ascent, and a traced radius of 0 does not say:"
            " give ssam skip_zero_rho=True, or a float for rho and grad_fn=None on those steps. Got"
            f" rho={factors.rho!r:.80} and skip_zero_rho=False. See docs/guides/algebra.md."
        )


def _checked(grad_fn: GradFn | None, factors: Factors, extra: dict[str, Any]) -> GradFn | None:
    """Return ``grad_fn``, None for a step without ascent, or raise unless it fits the factors."""
    if grad_fn is _MISSING:
        if radii.is_zero(factors.rho):
            return None
        if extra.get("value_fn") is None:
            raise TypeError(
                "ssam needs a gradient function: tx.update(grads, state, params, grad_fn=grad_fn) with"
                " grad_fn(params, i) -> grads. Pass grad_fn=None to take a step without the ascent"
                " on purpose. A wrapper that drops extra arguments needs ssam_jax.alternating or"
                " ssam_jax.carried: see docs/guides/optax_loop.md."
            )
        return _gradient_of(**extra)
    if grad_fn is None:
        return None
    checks.takes("grad_fn", grad_fn, "params", "i")
    if isinstance(grad_fn, TwoPassGradFn) and grad_fn.partial and factors.normalize != "masked":
        raise ValueError(
            "two_pass_value_and_grad(..., active=active) computes the ascent gradient of the active leaves"
            " alone, whose norm is not that of the complete gradient: it needs ssam(..., normalize='masked'),"
            f" got normalize={factors.normalize!r}. See docs/two_pass.md."
        )
    if factors.combine is not None and not _is_complete(grad_fn):
        raise ValueError(
            "this combine needs the complete, exact gradient at w, and two_pass_value_and_grad computed it"
            " of the active leaves alone, or with a masked backward pass: leave active and form out, or take"
            " combine=None. See docs/guides/algebra.md."
        )
    return grad_fn
