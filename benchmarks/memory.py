"""Bytes of optimizer state for each parameter: every rule and pattern, and the alternatives.

Run ``python benchmarks/memory.py``; ``--help`` lists the sizes. Nothing is computed: the state is that of
``jax.eval_shape(tx.init, params)``, without the momentum of an optimizer behind it.
"""

import dataclasses
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import networks
import optax
import steps
import suite
from suite import Record, markdown

import ssam_jax
from ssam_jax import NM, Structured, Unstructured, dynamic_mask, fisher_mask, fixed_mask, random_mask

SEEDS = (0,)
TIMED = False
AUTHORS = 8.0  # float32 mask and float32 perturbation, both as large as the parameters


@dataclasses.dataclass(frozen=True)
class Config:
    """The network whose parameters are counted."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of the stages of a ResNet."""
    blocks: int = 1
    """Blocks in a stage."""


QUICK = Config((8,))

PATTERNS = {
    "unstructured": Unstructured(0.5),
    "unstructured, by leaf": Unstructured(0.5, scope="leaf"),
    "by tensor": Structured(0.5),
    "by channel": Structured(0.5, "channel"),
    "by block of 4": Structured(0.5, "block", block=4, indivisible="whole"),
    "2:4": NM(2, 4, indivisible="whole"),
}


def rules(pattern: Any) -> dict[str, Any]:
    """Return every rule that takes a pattern, None where it does not take this one."""
    every: dict[str, Any] = {"refresh_every": 100}
    trades = pattern not in (PATTERNS["by tensor"], PATTERNS["2:4"])  # the others keep their density
    return {
        "random": random_mask(pattern, **every),
        "dynamic": dynamic_mask(pattern, total_steps=1000, **every) if trades else None,
        "Fisher, scores by set_mask": fisher_mask(pattern, refresh_every=None),
        "Fisher, bfloat16": fisher_mask(pattern, accumulator_dtype=jnp.bfloat16, **every),
        "Fisher, float32": fisher_mask(pattern, **every),
    }


def measure(config: Config) -> dict[str, Any]:
    """Return the bytes of each state, and those of its scores; the optimizer behind it has none."""
    params = networks.resnet(widths=config.widths, blocks=config.blocks).params
    base = optax.sgd(0.1)

    def measured(tx: Any) -> dict[str, int]:
        state = jax.eval_shape(tx.init, params)
        scores = state.mask.memory if isinstance(state, ssam_jax.SsamState) and state.mask else ()
        return {"bytes": bytes_of(state), "scores": bytes_of(scores)}

    methods = {
        "optax.contrib.sam, opaque mode": steps.contrib_sam(base),
        "optax.contrib.sam, its default mode": steps.contrib_sam(base, opaque=False),
        "ssam without a mask (SAM)": ssam_jax.ssam(0.1),
        "ssam, fixed_mask of whole tensors": ssam_jax.ssam(0.1, fixed_mask(lambda path: "head" in path)),
        "alternating without a mask": ssam_jax.alternating(base, 0.1),
        "alternating, dynamic_mask(Unstructured(0.5))": ssam_jax.alternating(
            base, 0.1, rules(PATTERNS["unstructured"])["dynamic"]
        ),
    }
    return {
        "parameters": networks.count(params),
        "methods": {name: measured(tx) for name, tx in methods.items()},
        "patterns": {
            name: {
                rule_name: measured(ssam_jax.ssam(0.1, rule))
                for rule_name, rule in rules(pattern).items()
                if rule is not None
            }
            for name, pattern in PATTERNS.items()
        },
    }


def bytes_of(tree: Any) -> int:
    """Return the bytes of all arrays of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def tables(record: Record) -> dict[str, str]:
    """Return the tables of bytes a parameter."""
    found = record["results"]
    count = found["parameters"]
    methods = [("the authors' implementation: mask and perturbation, float32", AUTHORS)]
    methods += [(name, sizes["bytes"] / count) for name, sizes in found["methods"].items()]

    def cell(rule: str, key: str = "bytes") -> Any:
        return lambda row: row[1][rule][key] / count if rule in row[1] else None

    def beside(row: Any) -> float:
        sizes = row[1]["Fisher, float32"]
        return (sizes["bytes"] - sizes["scores"]) / count

    patterns = list(found["patterns"].items())
    columns = {rule: (cell(rule), ".3f") for rule in patterns[0][1]}
    return {
        "methods": markdown(methods, {"state": (0, ""), "bytes a parameter": (1, ".3f")}),
        "patterns": f"ResNet of {count:,} float32 parameters, bytes a parameter\n\n"
        + markdown(patterns, {"mask": (0, ""), **columns, "Fisher, beside its scores": (beside, ".3f")}),
    }


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
