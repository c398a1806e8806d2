"""What must be the same for a run to resume as itself: kept in each checkpoint, compared when it is read."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

import jax

from ssam_experiments.config import Config

FLAGS = ("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable")
"""Settings of JAX that change the numbers of a run, or the random numbers that it draws."""


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they come back from a JSON file."""
    return json.loads(json.dumps(dict(settings), default=str))


DEFAULTS = plain(dataclasses.asdict(Config()))
"""A setting that is newer than a run had its default in the run."""


def of(settings: Mapping[str, Any], data: str, tree: Any) -> dict[str, Any]:
    """Return a run's fingerprint, of plain values.

    Args:
      settings: those that change the course of a run. Where the data lie is not one.
      data: what tells the data from other data, such as their checksums.
      tree: arrays, or their shapes and dtypes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        "settings": dict(settings),
        "data": data,
        "jax": {name: str(getattr(jax.config, name)) for name in FLAGS},
        "arrays": {jax.tree_util.keystr(path): f"{leaf.dtype}{[*leaf.shape]}" for path, leaf in leaves},
    }


def difference(there: Mapping[str, Any], here: Mapping[str, Any], but: Collection[str] = ()) -> str | None:
    """Return how a checkpoint's run differs from the one that is to resume, None if it does not.

    Args:
      there: the fingerprint in the checkpoint.
      here: that of the run that is to resume.
      but: settings that may differ.
    """
    settings = other_settings(there["settings"], here["settings"], but)
    if settings:
        return f"its settings are others ({', '.join(settings)})"
    if there["data"] != here["data"]:
        return "its data are others, or have changed since"
    for kind, what in (("jax", "JAX's"), ("arrays", "the array")):
        theirs, ours = there[kind], here[kind]
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            if theirs.get(name) != ours.get(name):
                return f"{what} {name} was {theirs.get(name)} and is {ours.get(name)} now"
    return None


def other_settings(there: Mapping[str, Any], here: Mapping[str, Any], but: Collection[str]) -> list[str]:
    """Return the names of the settings that differ, without those that may."""
    there = {**DEFAULTS, **there}
    return [name for name, value in here.items() if name not in but and there[name] != value]
