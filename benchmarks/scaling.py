"""How the cost of sparse SAM grows with parameters, batch and the rate of refreshes.

Run ``python benchmarks/scaling.py``; ``--help`` lists the sizes. The first table is of perceptrons of growing
width and batch; the second is of mask rules alone, without a network.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import networks
import numpy as np
import optax
import plotting
import steps
import suite
from suite import Record, markdown
from timing import compiled, medians
from tqdm import tqdm

import ssam_jax
from ssam_jax import NM, MaskRule, Unstructured, dynamic_mask, fisher_mask
from ssam_jax.masks import rule as masks

SEEDS = (0, 1, 2)
TIMED = True
EVERY = 100
RATES = (1, 10, 100, 1000)
LEAVES = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the comparison."""

    widths: tuple[int, ...] = (128, 512, 2048)
    """Of the hidden layers of perceptrons, at the middle batch."""
    batches: tuple[int, ...] = (8, 32, 128, 512)
    """Examples in a batch, at the middle width."""
    scores: tuple[int, ...] = (10**5, 10**6, 10**7, 10**8)
    """Parameters of the rules that are timed alone."""
    repeats: int = 11
    """Timed steps of each candidate; the median counts."""
    seconds: float = 4.0
    """For the rules at one number of parameters; they are timed at least three times."""


QUICK = Config((16, 32), (8, 16), (10**4, 10**5), 1, 0.01)


def growth(config: Config, width: int, batch: int) -> dict[str, Any]:
    """Return the times of a step and of its refresh, on a perceptron."""
    problem = networks.mlp(width=width, layers=4, batch=batch, inputs=784)
    rule = fisher_mask(Unstructured(0.5), refresh_every=EVERY)
    ssam = optax.chain(ssam_jax.ssam(0.1, rule), steps.optimizer())
    sam = steps.contrib_sam(steps.optimizer())
    calls = {}
    for name, tx, step in (
        ("sgd", steps.optimizer(), steps.plain(problem, steps.optimizer())),
        ("sam", sam, steps.ascending(problem, sam)),
        ("ssam", ssam, steps.ascending(problem, ssam)),
    ):
        state = steps.state_of(tx, problem.params)
        program = compiled(step, problem.params, state, *problem.args)
        calls[name] = functools.partial(program.call, problem.params, state, *problem.args)
    due = optax.tree_utils.tree_set(state, step=jnp.int32(EVERY - 1))
    calls["refresh"] = functools.partial(program.call, problem.params, due, *problem.args)
    times = medians(calls, config.repeats)
    size = {"width": width, "batch": batch, "parameters": networks.count(problem.params)}
    return {**size, **times, "refresh": times["refresh"] - times["ssam"]}


def rules() -> dict[str, Any]:
    """Return the rules that are timed alone."""
    return {
        "Fisher 50 %": fisher_mask(Unstructured(0.5), refresh_every=EVERY),
        "Fisher 2:4": fisher_mask(NM(2, 4), refresh_every=EVERY),
        "dynamic 50 %": dynamic_mask(Unstructured(0.5), refresh_every=EVERY, total_steps=100 * EVERY),
    }


def updated(rule: MaskRule) -> Callable[..., Any]:
    """Return what a rule does in a step."""
    return lambda grads, state, step: masks.update(rule, state, grads, None, grads, step)


def alone(config: Config, size: int) -> list[dict[str, Any]]:
    """Return the times of each rule on a step without and on a step with a refresh."""
    generator = np.random.default_rng(2)
    shape = (size // LEAVES // 4, 4)
    grads = [jnp.asarray(generator.standard_normal(shape, np.float32)) for _ in range(LEAVES)]
    calls = {}
    for name, rule in rules().items():
        tx = optax.GradientTransformation(functools.partial(masks.init, rule), optax.identity().update)
        state = steps.state_of(tx, grads)
        program = compiled(updated(rule), grads, state, jnp.int32(0))
        for kind, step in (("keep", 0), ("refresh", EVERY - 1)):
            calls[name, kind] = functools.partial(program.call, grads, state, jnp.int32(step))
    once = sum(medians(calls, 1, warmups=1).values())
    times = medians(calls, max(3, min(config.repeats, int(1e3 * config.seconds / once))), warmups=0)
    return [
        {"name": name, "parameters": size, **{k: times[name, k] for k in ("keep", "refresh")}}
        for name in rules()
    ]


def measure(config: Config) -> dict[str, Any]:
    """Return the times of whole steps and of rules alone."""
    middle = (config.widths[len(config.widths) // 2], config.batches[len(config.batches) // 2])
    grid = [(width, middle[1]) for width in config.widths]
    grid += [(middle[0], batch) for batch in config.batches if batch != middle[1]]
    return {
        "steps": [growth(config, *sizes) for sizes in tqdm(grid, desc="steps", disable=None)],
        "rules": [
            row for size in tqdm(config.scores, desc="rules", disable=None) for row in alone(config, size)
        ],
    }


def tables(record: Record) -> dict[str, str]:
    """Return the tables of whole steps and of rules alone."""
    bandwidth = record["limits"]["bandwidth"]

    def limit(row: dict[str, Any], passes: int) -> float:
        return 1e3 * 4 * passes * row["parameters"] / bandwidth

    whole = {
        "width": ("width", "d"),
        "batch": ("batch", "d"),
        "parameters": ("parameters", ",d"),
        "SGD, ms": ("sgd", ".2f"),
        "optax.contrib.sam / SGD": (lambda row: row["sam"] / row["sgd"], ".2f"),
        "SSAM / SGD": (lambda row: row["ssam"] / row["sgd"], ".2f"),
        "refresh, ms": ("refresh", ".2f"),
        **{f"share, every {every}": (functools.partial(share, every), ".2%") for every in RATES},
    }
    rule = {
        "rule": ("name", ""),
        "parameters": ("parameters", ",d"),
        "a step, ms": ("keep", ".3f"),
        "limit, ms": (lambda row: limit(row, passes(row)), ".3f"),
        "a step with a refresh, ms": ("refresh", ".2f"),
        "limit of that, ms": (lambda row: limit(row, passes(row) + 1), ".2f"),
        "ratio": (lambda row: row["refresh"] / limit(row, passes(row) + 1), ".1f"),
    }
    found = record["results"]
    return {"steps": markdown(found["steps"], whole), "rules": markdown(found["rules"], rule)}


def share(every: int, row: dict[str, Any]) -> float:
    """Return the share of refreshes in the time of training with one in so many steps."""
    return row["refresh"] / (every * row["ssam"] + row["refresh"])


def passes(row: dict[str, Any]) -> int:
    """Return how often a rule goes through the float32 of all parameters on a step without a refresh.

    Scores are read and written, gradients are read; a rule without scores touches nothing.
    """
    return 3 if row["name"].startswith("Fisher") else 0


def plots(record: Record) -> dict[str, Any]:
    """Return the picture of the share of refreshes by their rate."""
    figure, axes = plotting.figure()
    rows = sorted(record["results"]["steps"], key=lambda row: (row["width"], row["batch"]))
    styles = zip(plotting.COLORS * 2, plotting.MARKERS * 2)
    for row, (color, marker) in zip(rows, styles):
        shares = [max(1e-4, 100 * share(every, row)) for every in RATES]  # noise may be below zero
        label = f"width {row['width']}, batch {row['batch']}"
        axes.loglog(RATES, shares, marker=marker, color=color, label=label)
    axes.axhline(1, color=plotting.LIMIT, linestyle=":", linewidth=1)
    axes.set_xlabel("steps between two refreshes")
    axes.set_ylabel("share of the refreshes in the time (%)")
    axes.legend()
    return {"rates": ("Share of refreshes in the time of training, by the steps between them", figure)}


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
