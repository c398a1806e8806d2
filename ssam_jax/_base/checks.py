"""Checks of arguments that several modules make; they know nothing of trees, masks or SAM.

Each raises at once, naming the argument, its value and the allowed ones.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

LARGEST_STEP = 2**31 - 1
"""Where optax's step counters stop."""


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of some strings."""
    if not (isinstance(value, str) and value in allowed):
        *others, last = map(repr, allowed)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}.")


def check_steps(name: str, value: int, allowed: str = "at least 1") -> None:
    """Raise ValueError unless an int is a number of steps that a counter can reach."""
    if value < 1:
        raise ValueError(f"{name} must be {allowed}, got {value}.")
    if value > LARGEST_STEP:
        raise ValueError(f"{name} must be below 2**31, where step counters stop, got {value}.")


def check_takes(name: str, fn: Any, *arguments: str) -> None:
    """Raise TypeError unless ``fn`` is callable with some positional arguments.

    Args:
      name: of ``fn``, for the message.
      fn: a callable, whose signature is read if Python knows it.
      *arguments: what it is called with, for the message.
    """
    wanted = f"{name} must be a function {name}({', '.join(arguments)})"
    if not callable(fn):
        raise TypeError(f"{wanted}, got {fn!r}.")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # one of C's that does not tell
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{wanted}, got one with the parameters {signature}: {error}.") from None


def kind(leaf: Any) -> Any:
    """Return the dtype of an array or a number of Python's; for anything else its class."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None:
        return dtype
    if isinstance(leaf, (bool, int, float, complex)):
        return jnp.result_type(leaf)
    return type(leaf)


def is_kind(leaf: Any, *kinds: Any) -> bool:
    """Whether a leaf is an array or a number of one of some abstract dtypes, such as ``jnp.floating``."""
    found = kind(leaf)
    if isinstance(found, type) and not hasattr(leaf, "dtype"):
        return False
    try:
        return any(jnp.issubdtype(found, wanted) for wanted in kinds)
    except TypeError:  # a dtype of another library's
        return False


def named(found: Any) -> str:
    """Return what `kind` found as messages show it."""
    return found.__name__ if isinstance(found, type) else str(found)


def loss_and_aux(value: Any) -> tuple[Any, Any]:
    """Return what a loss with aux returned, or raise unless it is a pair."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"loss_fn must return a pair (loss, aux), got {value!r}.")
    return value


def check_loss(value: Any) -> None:
    """Raise unless ``value`` is a real floating-point scalar."""
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            "loss_fn must return a real floating-point scalar (and aux with has_aux=True), got"
            f" {value.dtype if hasattr(value, 'dtype') else value!r}."
        )
    if jnp.shape(value) != ():
        raise ValueError(f"loss_fn must return a scalar, got an array of shape {jnp.shape(value)}.")
