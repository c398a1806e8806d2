"""The check that every command makes of its settings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rule = tuple[Callable[[Any], Any], Sequence[str]]
"""Whether a value is in range, and the names of the settings that must be."""


def check_ranges(config: Any, rules: Mapping[str, Rule], spell: Callable[[str], str] = str) -> None:
    """Raise ValueError, naming the setting, unless all are in range.

    Args:
      config: an object with the settings as attributes.
      rules: by the words for the range, such as "at least 1".
      spell: returns how a setting is called in the message.
    """
    for wanted, (holds, names) in rules.items():
        for name in names:
            if not holds(getattr(config, name)):
                raise ValueError(f"{spell(name)} must be {wanted}, got {getattr(config, name)}.")
