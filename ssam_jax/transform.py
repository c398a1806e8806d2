"""`ssam`: gradient at ``w`` in, gradient at the sharpest nearby point out."""

import numbers
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssam_jax import shardings, trees
from ssam_jax.masks.rules import MaskRule, check_mask
from ssam_jax.perturbation import Normalize, perturb
from ssam_jax.state import SsamState
from ssam_jax.typing import GradFn, Gradients, Mask, Params, Scalar, Schedule

_MISSING: Any = object()


def ssam(
    rho: Scalar | Schedule,
    mask: MaskRule | None = None,
    *,
    form: Literal["explicit", "implicit"] = "explicit",
    normalize: Normalize = "global",
    adaptive: bool = False,
    ascent_steps: int | None = None,
    skip_zero_rho: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimization of which a mask perturbs only a part of the parameters.

    The transformation takes the gradient at ``w`` and returns the gradient at ``w + eps``; put it
    first in a chain, and clipping, weight decay and the optimizer after it::

        tx = optax.chain(ssam(rho=0.1, mask=fisher_mask(Unstructured(0.5), refresh_every=100)),
                         optax.sgd(0.1))
        grad_fn = lambda params, i: jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)

    ``grad_fn(params, i)`` is the protocol of ``optax.contrib.sam(opaque_mode=True)``: the gradient
    of the same batch, with the same dropout key, at other parameters. Passing ``grad_fn=None``
    *explicitly* makes the step the base optimizer's at its price; so does a static ``rho`` of 0.
    Scores and masks go on being renewed on such steps. Unknown extra arguments are ignored here and
    reach the mask rule.

    Args:
      rho: radius of the ball, at least 0: a float, a scalar array (traced under
        ``optax.inject_hyperparams``), or an optax schedule of the steps taken.
      mask: a `MaskRule` such as `fisher_mask`, `dynamic_mask`, `random_mask` or `fixed_mask`; None
        perturbs everything, which is SAM.
      form: ``"explicit"`` masks the perturbation; ``"implicit"`` leaves it whole and takes gradient and
        ``grad_fn`` from ``two_pass_value_and_grad(loss_fn, form="implicit")``, whose first backward
        pass is masked.
      normalize: ``"global"``: ``||eps|| <= rho``, the paper's; ``"masked"``: ``||eps|| = rho``, the only
        one for a gradient of the active leaves alone, as `two_pass_value_and_grad` gives it.
      adaptive: ASAM (arXiv 2102.11600): eps scales with the parameters, but for biases, which are
        known by the last part of their path ("bias", Haiku's "b" and "offset").
      ascent_steps: gradient steps to the perturbed point, each ``rho`` long and from where the last
        one ended, as in ``optax.contrib.sam(sync_period=ascent_steps + 1)``. None means 1, and
        unlike 1 it passes through ``optax.inject_hyperparams``, which turns numbers into arrays.
      skip_zero_rho: put the second pass under ``lax.cond``, so that a traced rho of 0 skips it. Off
        by default because gradients under a conditional can be slow (convolutions on CPU) and the
        conditional makes a GPU wait; where the schedule is known, two compiled steps are better.
        What ``grad_fn`` returns is cast to the dtypes of the gradient then.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a `SsamState`. Its ``update`` raises

      - TypeError if ``grad_fn`` is missing;
      - ValueError if ``params`` is missing, if ``grad_fn`` returns a tree of another structure or of
        other shapes than the gradient, if it is inside ``optax.masked``, or if ``grad_fn`` comes from a
        `two_pass_value_and_grad` of the other form, or of active leaves without
        ``normalize="masked"``.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: an argument is out of range, or does not go with ``form="implicit"``.

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
    check_options(rho, mask, normalize=normalize, adaptive=adaptive, ascent_steps=ascent_steps)
    if form not in ("explicit", "implicit"):
        raise ValueError(f"form must be 'explicit' or 'implicit', got {form!r}.")
    if form == "implicit" and mask is None:
        raise ValueError("form='implicit' needs a mask rule, such as mask=fixed_mask(tree); got mask=None.")
    if not isinstance(skip_zero_rho, bool):
        raise TypeError(f"skip_zero_rho must be a bool, got {skip_zero_rho!r}.")
    never = is_static(rho) and rho == 0

    def descent_gradient(
        updates: Gradients, params: Params, mask: Mask | None, grad_fn: GradFn, radius: Scalar
    ) -> Gradients:
        point, grads = params, updates
        last = (ascent_steps or 1) - 1
        for i in range(last + 1):
            point = perturb(point, grads, rho=radius, mask=mask, normalize=normalize, adaptive=adaptive)
            grads = (grad_fn if i == last else getattr(grad_fn, "ascent", grad_fn))(point, i)
            trees.check_same_shapes(grads, updates, "what grad_fn returns", "the gradient")
        return grads

    def gradient_here(updates: Gradients, params: Params, grad_fn: GradFn) -> Gradients:
        """Return the gradient where the parameters are: the one given, if it is whole and exact."""
        exact = form == "explicit" and not getattr(grad_fn, "partial", False)
        return updates if exact else grad_fn(params, 0)

    def init(params: Params) -> SsamState:
        return init_state(params, mask)

    def update(
        updates: Gradients,
        state: SsamState,
        params: Params | None = None,
        *,
        grad_fn: GradFn | None = _MISSING,
        **extra_args: Any,
    ) -> tuple[Gradients, SsamState]:
        check_update(updates, params)
        if grad_fn is _MISSING and not never:
            raise TypeError(
                "ssam needs a gradient function: tx.update(grads, state, params, grad_fn=grad_fn) with"
                " grad_fn(params, i) -> grads. Pass grad_fn=None to take a step without the ascent"
                " on purpose. A wrapper that drops extra arguments needs ssam_jax.alternating."
            )
        if grad_fn is _MISSING or grad_fn is None:
            descent = updates
        else:
            check_grad_fn(grad_fn, form=form, normalize=normalize)
            radius = rho(state.step) if callable(rho) else rho
            masked = mask is not None and form == "explicit"
            args = (updates, params, state.mask_state.mask if masked else None, grad_fn, radius)
            if never:
                descent = gradient_here(updates, params, grad_fn)
            elif skip_zero_rho and not is_static(radius):
                descent = jax.lax.cond(
                    jnp.asarray(radius) == 0,
                    lambda: _cast_like(gradient_here(updates, params, grad_fn), updates),
                    lambda: _cast_like(descent_gradient(*args), updates),
                )
            else:
                descent = descent_gradient(*args)
        return descent, advance(state, mask, params, updates, descent, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def init_state(params: Params, mask: MaskRule | None) -> SsamState:
    """Return the state before the first step, its mask already made."""
    trees.check_not_partial(params)
    trees.check_floating(params, "params")
    sizes = [float(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(params)]
    mask_state = None if mask is None else mask.init(params)
    if mask_state is not None:
        check_mask(jax.eval_shape(lambda: mask_state.mask), params)
    state = SsamState(jnp.zeros((), jnp.int32), jnp.array(sizes, jnp.float32), mask_state)
    return shardings.beside(state, params)


def advance(
    state: SsamState,
    mask: MaskRule | None,
    params: Params,
    ascent_grads: Gradients | None,
    descent_grads: Gradients,
    **extra_args: Any,
) -> SsamState:
    """Return the state after a step: the count one up, the mask rule told of the gradients."""
    mask_state = None
    if mask is not None:
        mask_state = mask.update(
            state.mask_state, params, ascent_grads, descent_grads, state.step, **extra_args
        )
    return state._replace(step=optax.safe_increment(state.step), mask_state=mask_state)


def check_options(rho: Any, mask: Any, *, normalize: Any, adaptive: Any, ascent_steps: Any) -> None:
    """Raise, naming the argument, unless the options that `ssam` and `alternating` share are valid."""
    if is_static(rho):
        if not (np.isfinite(rho) and rho >= 0):
            raise ValueError(f"rho must be finite and at least 0, got {rho!r}.")
    elif not callable(rho) and (
        not hasattr(rho, "dtype")
        or not jnp.issubdtype(rho.dtype, jnp.number)
        or jnp.issubdtype(rho.dtype, jnp.complexfloating)
    ):
        raise TypeError(f"rho must be a float, a scalar array or an optax schedule, got {rho!r}.")
    elif not callable(rho) and jnp.shape(rho) != ():
        raise ValueError(f"rho must be a scalar, got an array of shape {jnp.shape(rho)}.")
    if mask is not None and not isinstance(mask, MaskRule):
        raise TypeError(
            "mask must be None or a MaskRule such as fisher_mask(pattern, refresh_every=100) or"
            f" fixed_mask(tree), got {mask!r}."
        )
    if normalize not in ("global", "masked"):
        raise ValueError(f"normalize must be 'global' or 'masked', got {normalize!r}.")
    if not isinstance(adaptive, bool):
        raise TypeError(f"adaptive must be a bool, got {adaptive!r}.")
    if ascent_steps is None:
        return
    if isinstance(ascent_steps, bool) or not isinstance(ascent_steps, int):
        raise TypeError(
            "ascent_steps must be a Python int of at least 1, or None for 1; under"
            " optax.inject_hyperparams, name it in static_args to keep it one. Got"
            f" {ascent_steps!r}."
        )
    if ascent_steps < 1:
        raise ValueError(f"ascent_steps must be at least 1, got {ascent_steps}.")


def check_update(updates: Gradients, params: Params | None) -> None:
    """Raise unless ``updates`` and ``params`` are what a step can start from."""
    if params is None:
        raise ValueError("ssam needs the parameters: call tx.update(grads, state, params, grad_fn=grad_fn).")
    trees.check_not_partial(params)
    trees.check_same_shapes(updates, params, "the gradient", "params")


def check_grad_fn(grad_fn: Any, *, form: str, normalize: str) -> None:
    """Raise unless the gradient that ``grad_fn`` came with is of the form that `ssam` expects."""
    given = getattr(grad_fn, "form", "explicit")
    if given != form:
        raise ValueError(
            f"this is ssam(form={form!r}), but gradient and grad_fn are of the {given} form; take both from"
            f" two_pass_value_and_grad(loss_fn, form={form!r}), or make it ssam(form={given!r})."
        )
    if getattr(grad_fn, "partial", False) and normalize != "masked":
        raise ValueError(
            "two_pass_value_and_grad(..., active=active) computes the ascent gradient of the active leaves"
            " alone, whose norm is not the whole gradient's: it needs ssam(..., normalize='masked'), got"
            f" normalize={normalize!r}."
        )


def is_static(rho: Any) -> bool:
    """Whether ``rho`` is a number of Python's or NumPy's, whose value is known while tracing."""
    if isinstance(rho, np.ndarray):
        return rho.ndim == 0 and np.issubdtype(rho.dtype, np.number)
    return isinstance(rho, numbers.Real) and not isinstance(rho, bool)


def _cast_like(tree: Gradients, like: Gradients) -> Gradients:
    return jax.tree.map(lambda x, other: x.astype(other.dtype), tree, like)
