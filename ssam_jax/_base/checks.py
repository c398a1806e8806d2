"""Checks of arguments; they know nothing of trees, masks or SAM.

Each raises at once, naming the argument, its value and the allowed values.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

LARGEST_STEP = 2**31 - 1
"""Where optax's step counters stop."""

LARGEST = 1e30
"""The largest factor on a gradient; beyond it float32 overflows."""


def choice(name: str, value: Any, allowed: Sequence[str], *, also: str = "") -> None:
    """Raise ValueError unless ``value`` is one of some strings; ``also`` is what else the caller allows."""
    if not (isinstance(value, str) and value in allowed):
        *others, last = map(repr, allowed)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}{also}, got {value!r}.")


def flag(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}.")


def integer(name: str, value: Any, *, low: int = 1, also: str = "", remedy: str = "") -> None:
    """Raise unless ``value`` is a Python int from ``low`` to the last step that optax counts.

    Args:
      name: of the argument, for the message.
      value: its value; a bool is not an int here.
      low: the smallest allowed value.
      also: what else the caller allows, such as ``", or None"``, for the message.
      remedy: a clause for the message of a value of the wrong kind, such as ``"; name it in static_args"``.

    Raises:
      TypeError: ``value`` is not an int.
      ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int of at least {low}{also}{remedy}, got {value!r}.")
    if value < low:
        raise ValueError(f"{name} must be at least {low}{also}, got {value}.")
    if value > LARGEST_STEP:
        raise ValueError(f"{name} must be below 2**31, where step counters stop, got {value}.")


def number(name: str, value: Any, *, low: float, high: float, below: bool = False, also: str = "") -> None:
    """Raise unless ``value`` is a real number of Python or NumPy from ``low`` to ``high``.

    Args:
      name: of the argument, for the message.
      value: its value.
      low: the smallest allowed value.
      high: the largest allowed value.
      below: whether ``high`` itself is excluded.
      also: what else the caller allows, for the message of a value of the wrong kind.

    Raises:
      TypeError: ``value`` is not a real number.
      ValueError: it is out of range.
    """
    span = f"from {low:g} to {'below ' * below}{high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating):
        raise TypeError(f"{name} must be a float {span}{also}, got {value!r}.")
    if not low <= value <= high or (below and value == high):
        raise ValueError(f"{name} must be {span}, got {value!r}.")


def seed(value: Any) -> None:
    """Raise unless ``value`` is an integer, Python's of 64 bits or a scalar array."""
    if not is_kind(value, jnp.integer) or jnp.shape(value) != ():
        raise TypeError(f"seed must be an integer, got {value!r}.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"seed must be from -2**63 to below 2**63, got {value}.")


def takes(name: str, fn: Any, *arguments: str) -> None:
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


def loss(value: Any) -> None:
    """Raise unless ``value`` is a real floating-point scalar."""
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            "loss_fn must return a real floating-point scalar (and aux with has_aux=True), got"
            f" {value.dtype if hasattr(value, 'dtype') else value!r}."
        )
    if jnp.shape(value) != ():
        raise ValueError(f"loss_fn must return a scalar, got an array of shape {jnp.shape(value)}.")
