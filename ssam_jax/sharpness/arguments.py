"""Checks of arguments that several measures take."""

from typing import Any

import numpy as np


def at_least_one(name: str, value: Any, most: int | None = None) -> None:
    """Raise, naming the argument, unless it is an int from 1 on, up to the number of parameters if given."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int of at least 1, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, the number of parameters, got {value}.")


def above_zero(name: str, value: Any) -> None:
    """Raise, naming the argument, unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value!r}.")


def seed_of(value: Any) -> int:
    """Return a seed, or raise TypeError unless it is an int."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"seed must be an int, got {value!r}.")
    return int(value)


def offsets_of(name: str, values: Any) -> np.ndarray:
    """Return a row of numbers as float32 or float64, or raise, naming the argument."""
    row = np.asarray(values)
    if not (np.issubdtype(row.dtype, np.floating) or np.issubdtype(row.dtype, np.integer)):
        raise TypeError(f"{name} must hold real numbers, got {row.dtype}.")
    if row.ndim != 1 or not row.size or not np.isfinite(row).all():
        raise ValueError(f"{name} must hold one row of finite numbers, got shape {row.shape}.")
    return row.astype(np.float64 if row.dtype == np.float64 else np.float32)
