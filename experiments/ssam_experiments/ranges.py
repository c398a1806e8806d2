"""The check that every command makes of its settings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rule = tuple[Callable[[Any], Any], Sequence[str]]
"""Whether a value is in range, and the names of the settings that have to be."""


def check_ranges(config: Any, rules: Mapping[str, Rule]) -> None:
    """Raise ValueError, naming the setting, unless all are in range; keys say what the range is."""
    for wanted, (holds, names) in rules.items():
        for name in names:
            if not holds(getattr(config, name)):
                raise ValueError(f"{name} must be {wanted}, got {getattr(config, name)}.")
