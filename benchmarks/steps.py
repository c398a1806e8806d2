"""The ways to take a training step that benchmarks compare.

Each is a function ``step(params, state, *args) -> (params, state)`` of the arguments of the problem's loss,
made from the transformation whose ``init`` gives its state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from networks import Problem

from ssam_jax import get_mask, two_pass_value_and_grad

Step = Callable[..., tuple[Any, Any]]


def optimizer() -> optax.GradientTransformation:
    """Return what comes after the perturbation."""
    return optax.sgd(0.1, momentum=0.9)


def contrib_sam(base: optax.GradientTransformation, *, opaque: bool = True) -> Any:
    """Return optax's SAM of radius 0.1 around an optimizer, in one of its two modes."""
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    return optax.contrib.sam(base, adversary, opaque_mode=opaque)


def state_of(tx: Any, params: Any) -> Any:
    """Return a state like that of ``tx.init(params)``, in which any mask is drawn by NumPy.

    A first mask takes as long to compile as a step with a refresh, and its values cost no time.
    """
    generator = np.random.default_rng(2)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        bits = leaf.dtype in (jnp.bool_, jnp.uint8)
        values = generator.integers(2 if leaf.dtype == jnp.bool_ else 256, size=leaf.shape) if bits else 0
        return jnp.asarray(np.broadcast_to(values, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(tx.init, params))


def plain(problem: Problem, tx: optax.GradientTransformation) -> Step:
    """Return a step with one gradient: SGD's, or half of one where two calls alternate."""

    def step(params: Any, state: Any, *args: Any) -> Any:
        return moved(tx, jax.grad(problem.loss)(params, *args), state, params)

    return step


def ascending(problem: Problem, tx: Any, examples: int | None = None) -> Step:
    """Return a step with a gradient and ``grad_fn``; the first is of so many ``examples``, None for all."""

    def step(params: Any, state: Any, *args: Any) -> Any:
        few = args if examples is None else problem.first(examples, args)
        grads = jax.grad(problem.loss)(params, *few)
        return moved(tx, grads, state, params, grad_fn=lambda p, i: jax.grad(problem.loss)(p, *args))

    return step


def two_passes(
    problem: Problem, tx: Any, active: Any = None, mask: Any = None, form: Any = "explicit"
) -> Step:
    """Return a step by two-pass gradients; the implicit form takes the state's mask if none is given."""
    passes = two_pass_value_and_grad(problem.loss, form=form)

    def step(params: Any, state: Any, *args: Any) -> Any:
        implicit = {"mask": get_mask(state) if mask is None else mask} if form == "implicit" else {}
        _, grads, grad_fn = passes(params, *args, active=active, **implicit)
        return moved(tx, grads, state, params, grad_fn=grad_fn)

    return step


def moved(tx: Any, grads: Any, state: Any, params: Any, **extra: Any) -> Any:
    """Return the parameters and the state after an update."""
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state
