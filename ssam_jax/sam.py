"""`ssam`: gradient at ``w`` in, gradient at the sharpest nearby point out."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssam_jax._base import checks, shardings, trees
from ssam_jax.ascent.ball import Normalize, perturb
from ssam_jax.masks.rule import OTHER_STATE, MaskRule, check_mask
from ssam_jax.state import SsamState
from ssam_jax.typing import GradFn, Gradients, Mask, Params, Scalar, Schedule

_MISSING: Any = object()

LARGEST_RADIUS = float(np.finfo(np.float32).max)
"""The largest that is finite in the dtype of norms."""

ALONE = "Both must be the gradient alone, without loss or aux."
"""What to do about gradients that are no gradients."""


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

      - TypeError if ``grad_fn`` is missing or does not take ``(params, i)``, if a gradient or a parameter is
        no real float, if ``state`` is not that of this `ssam`, if a schedule returns no real scalar, or if
        the mask rule changes the dtypes of its state;
      - ValueError if ``params`` is missing, if ``state`` is that of other parameters, if a schedule returns a
        radius that is known and out of range, if the mask rule changes the shapes of its state, if
        ``grad_fn`` returns a tree of another structure or of other shapes than the gradient, if it is
        inside ``optax.masked``, or if ``grad_fn`` comes from a `two_pass_value_and_grad` of the other form,
        or of active leaves without ``normalize="masked"``.

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
    checks.choice("form", form, ("explicit", "implicit"))
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
            _check_gradient(grads, updates, "what grad_fn returns", "the gradient", ALONE)
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
        check_state(state, params, mask)
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
            radius = radius_at(rho, state.step)
            masked = mask is not None and form == "explicit"
            args = (updates, params, mask_in(state, params) if masked else None, grad_fn, radius)
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
    if mask is not None:
        _check_has_mask(mask_state, "mask.init(params)")
        check_mask(jax.eval_shape(lambda state: state.mask, mask_state), params)
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
        name, old = "what mask.update returns", state.mask_state
        trees.check_same_shapes(mask_state, old, name, "the state it was given")
        trees.check_same_dtypes(mask_state, old, name, "the state it was given")
    return state._replace(step=optax.safe_increment(state.step), mask_state=mask_state)


def check_options(rho: Any, mask: Any, *, normalize: Any, adaptive: Any, ascent_steps: Any) -> None:
    """Raise, naming the argument, unless the options that `ssam` and `alternating` share are valid."""
    if callable(rho):
        checks.takes("rho", rho, "step")
    else:
        check_radius(rho, "rho", "a float, a scalar array or an optax schedule")
    if mask is not None and not (isinstance(mask, MaskRule) and all(map(callable, mask))):
        raise TypeError(
            "mask must be None or a MaskRule such as fisher_mask(pattern, refresh_every=100) or"
            f" fixed_mask(tree), got {mask!r}."
        )
    checks.choice("normalize", normalize, ("global", "masked"))
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
    trees.check_floating(params, "params")
    _check_gradient(updates, params, "the gradient", "params", ALONE)


def _check_gradient(grads: Gradients, like: Any, name: str, like_name: str, remedy: str) -> None:
    trees.check_same_shapes(grads, like, name, like_name, remedy)
    trees.check_floating(grads, name, "take it with jax.grad of a real loss of real parameters")


def check_state(state: Any, params: Params, mask: MaskRule | None) -> None:
    """Raise unless ``state`` may be one that `init_state` made for these parameters and this kind of rule."""
    if not isinstance(state, SsamState):
        raise TypeError(
            f"state must be the SsamState that this ssam's init(params) returned, got {type(state).__name__}."
            " That of a whole chain goes to the chain's update; and a checkpoint is restored into"
            " tx.init(params), since without it Orbax and Flax return plain dicts and lists."
        )
    leaves = len(jax.tree.leaves(params))
    shape = getattr(state.leaf_sizes, "shape", None)
    if shape != (leaves,):
        raise ValueError(
            f"state must be that of these parameters, of {leaves} leaves, got one whose leaf_sizes have the"
            f" shape {shape}. {OTHER_STATE}"
        )
    if mask is None and state.mask_state is not None:
        raise TypeError(
            "this ssam is dense (mask=None), but state holds a mask rule's"
            f" {type(state.mask_state).__name__}. {OTHER_STATE}"
        )
    if mask is not None:
        _check_has_mask(state.mask_state, "tx.init(params) of this ssam with a mask")


def _check_has_mask(mask_state: Any, source: str) -> None:
    odd = [x for x in jax.tree.leaves(mask_state) if not checks.is_kind(x, jnp.generic)]
    if not hasattr(mask_state, "mask") or odd:
        found = f"{mask_state!r:.80}" if mask_state is None or not odd else f"one with the leaf {odd[0]!r}"
        raise TypeError(
            f"{source} must give a mask rule's state, a NamedTuple of arrays with a field mask (see"
            f" MaskRule), got {found}."
        )


def mask_in(state: SsamState, params: Params) -> Mask:
    """Return the mask in a state, or raise unless it fits the parameters."""
    mask = state.mask_state.mask
    check_mask(mask, params, OTHER_STATE)
    return mask


def radius_at(rho: Scalar | Schedule, step: jax.Array) -> Scalar:
    """Return rho, or what it is at a step; raise unless it is a radius, if its value is known."""
    if not callable(rho):
        return rho
    radius = rho(step)
    check_radius(radius, "what the schedule rho returns", "a float or a scalar array")
    return radius


def check_radius(rho: Any, name: str, kinds: str) -> None:
    """Raise unless ``rho`` is a real scalar; and finite and not negative, if it is known."""
    array = hasattr(rho, "dtype") and checks.is_kind(rho, jnp.floating, jnp.integer)
    if not (is_static(rho) or array):
        raise TypeError(f"{name} must be {kinds}, got {rho!r}.")
    if jnp.shape(rho) != ():
        raise ValueError(f"{name} must be a scalar, got an array of shape {jnp.shape(rho)}.")
    known = rho
    if isinstance(rho, jax.Array):
        known = 0 if isinstance(rho, jax.core.Tracer) or not rho.is_fully_addressable else jax.device_get(rho)
    if not 0 <= known <= LARGEST_RADIUS:
        raise ValueError(f"{name} must be finite and at least 0, got {rho!r}.")


def check_grad_fn(grad_fn: Any, *, form: str, normalize: str) -> None:
    """Raise unless ``grad_fn`` takes two arguments, and its gradient is of the form that `ssam` expects."""
    checks.takes("grad_fn", grad_fn, "params", "i")
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
        return rho.ndim == 0 and checks.is_kind(rho, jnp.floating, jnp.integer)
    return isinstance(rho, int | float | np.integer | np.floating) and not isinstance(rho, bool)


def _cast_like(tree: Gradients, like: Gradients) -> Gradients:
    return jax.tree.map(lambda x, other: x.astype(other.dtype), tree, like)
