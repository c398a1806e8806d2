"""Time a training step of SGD, of ``optax.contrib.sam`` and of every form and pattern of SSAM.

Run ``python benchmarks/step.py``; ``--help`` lists the sizes. A rule refreshes its mask every 100 steps; the
compiled step is timed at a step where it does not and at one where it does, and the difference is the
refresh. Operations are those of the products in the compiled step, bytes those that it holds at once.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import networks
import optax
import plotting
import steps
import suite
from networks import Problem
from suite import Record, markdown, ratio
from timing import compiled, medians
from tqdm import tqdm

import ssam_jax
from ssam_jax import NM, Structured, Unstructured, dynamic_mask, empirical_fisher, fisher_mask, fixed_mask

SEEDS = (0, 1)
TIMED = True
EVERY = 100
SAMPLES, BATCH, EPOCH = 1024, 128, 390  # of the trainer on CIFAR-10: per-example scores, once an epoch


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the comparison."""

    networks: tuple[str, ...] = ("MLP", "ResNet", "transformer")
    """Which networks."""
    scale: int = 4
    """Factor on the widths, and on the batches, of small ones."""
    only: str = ""
    """Regular expression, searched in the names of the steps; SGD and SAM are always there."""
    repeats: int = 15
    """Timed steps of each candidate; the median counts."""


QUICK = Config(scale=1, repeats=1)


class Way(NamedTuple):
    """One way to take a step.

    Attributes:
      step: of parameters, state and batch, as in `steps`.
      tx: whose ``init`` makes the state.
      refreshes: whether the state has a mask that is refreshed.
      calls: of the step that make one step of training.
    """

    step: steps.Step
    tx: Any
    refreshes: bool = False
    calls: int = 1


def problem_of(name: str, scale: int) -> Problem:
    """Return a network and its batch."""
    if name == "MLP":
        return networks.mlp(width=128 * scale, layers=4, batch=32 * scale, inputs=784)
    if name == "ResNet":
        return networks.resnet(widths=(8 * scale, 16 * scale), blocks=1, batch=8 * scale, size=16)
    return networks.scanned_transformer(
        width=32 * scale, layers=4, heads=4, batch=2 * scale, length=64, vocabulary=64
    )


def ways(problem: Problem) -> dict[str, Way]:
    """Return every way to take a step."""
    base, half = steps.optimizer(), problem.last(len(problem.parts) // 2)
    half_fixed = fixed_mask(networks.mask_of(problem.params, half))
    nm = NM(2, 4, indivisible="whole")  # a head of 10 classes is not divisible by 4
    block = Structured(0.5, "block", block=4, indivisible="whole")
    fisher: Callable[..., Any] = functools.partial(fisher_mask, refresh_every=EVERY)
    dynamic: Callable[..., Any] = functools.partial(
        dynamic_mask, refresh_every=EVERY, total_steps=100 * EVERY
    )

    def chained(rule: Any, **options: Any) -> Any:
        return optax.chain(ssam_jax.ssam(0.1, rule, **options), steps.optimizer())

    def explicit(rule: Any) -> Way:
        tx = chained(rule)
        return Way(steps.ascending(problem, tx), tx, refreshes=True)

    def alternate(tx: Any) -> Way:
        return Way(steps.plain(problem, tx), tx, calls=2)

    sam, contrib = chained(None), steps.contrib_sam(base)
    last, implicit = chained(half_fixed, normalize="masked"), chained(fisher(nm))
    batch = len(problem.args[-1])
    return {
        "SGD": Way(steps.plain(problem, base), base),
        "optax.contrib.sam": Way(steps.ascending(problem, contrib), contrib),
        "optax.contrib.sam, its default mode": alternate(steps.contrib_sam(base, opaque=False)),
        "SAM": Way(steps.ascending(problem, sam), sam),
        "Fisher 50 %": explicit(fisher(Unstructured(0.5))),
        "Fisher 50 % of each leaf": explicit(fisher(Unstructured(0.5, scope="leaf"))),
        "Fisher by tensor": explicit(fisher(Structured(0.5))),
        "Fisher by channel": explicit(fisher(Structured(0.5, "channel"))),
        "Fisher by block of 4": explicit(fisher(block)),
        "Fisher 2:4": explicit(fisher(nm)),
        "dynamic 50 %": explicit(dynamic(Unstructured(0.5))),
        "dynamic by channel": explicit(dynamic(Structured(0.5, "channel"))),
        "fixed, last half of the parts": explicit(half_fixed)._replace(refreshes=False),
        "the same by two-pass gradients": Way(steps.two_passes(problem, last, half), last),
        "implicit, Fisher 2:4": Way(steps.two_passes(problem, implicit), implicit, refreshes=True),
        "SAM, ascent on a quarter of the batch": Way(steps.ascending(problem, sam, batch // 4), sam),
        "alternating, Fisher 50 %": alternate(ssam_jax.alternating(base, 0.1, fisher(Unstructured(0.5)))),
    }


def called(program: Callable[..., Any], way: Way, state: Any, problem: Problem) -> Callable[[], Any]:
    """Return the function that takes one step of training from the same place every time."""

    def call() -> Any:
        params, now = problem.params, state
        for _ in range(way.calls):
            params, now = program(params, now, *problem.args)
        return params

    return call


def measure_network(problem: Problem, config: Config, bar: Any) -> dict[str, Any]:
    """Return what each step costs on a network, and each refresh."""
    always = ("SGD", "optax.contrib.sam")
    chosen = {n: w for n, w in ways(problem).items() if n in always or re.search(config.only, n)}
    calls: dict[tuple[str, str], Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, way in chosen.items():
        bar.set_description(f"{name}, compiling")
        state = steps.state_of(way.tx, problem.params)
        program = compiled(way.step, problem.params, state, *problem.args)
        costs = {**program.costs, "flops": way.calls * program.costs["flops"]}
        rows[name] = {"name": name, **costs}
        calls[name, "ms"] = called(program.call, way, state, problem)
        if way.refreshes:
            due = optax.tree_utils.tree_set(state, step=jnp.int32(EVERY - 1))
            calls[name, "refresh"] = called(program.call, way, due, problem)
        bar.update()
    examples = jax.tree.map(lambda x: x[:, None], problem.args[int(problem.has_aux) :])

    def example_loss(params: Any, example: Any) -> jax.Array:
        return problem.loss(params, *problem.args[: int(problem.has_aux)], *example)

    def exact(params: Any) -> Any:
        return empirical_fisher(example_loss, params, examples, chunk_size=32)

    scores = compiled(exact, problem.params)
    calls["scores", "ms"] = functools.partial(scores.call, problem.params)
    bar.set_description("timing")
    times = medians(calls, config.repeats)
    for name, row in rows.items():
        row["ms"] = times[name, "ms"]
        row["refresh_ms"] = times[name, "refresh"] - row["ms"] if (name, "refresh") in times else None
    batch = len(problem.args[-1])
    return {
        "parameters": networks.count(problem.params),
        "batch": batch,
        "scores_ms": times["scores", "ms"] / batch,
        "rows": list(rows.values()),
    }


def measure(config: Config) -> dict[str, Any]:
    """Return what each step costs, by network."""
    with tqdm(unit="program", disable=None) as bar:
        return {
            name: measure_network(problem_of(name, config.scale), config, bar) for name in config.networks
        }


def tables(record: Record) -> dict[str, str]:
    """Return a table of steps for each network, one of refreshes, and one of per-example scores."""
    found = record["results"]
    refresh = [
        {"network": name, **row, **refresh_limits(row, network, record["limits"])}
        for name, network in found.items()
        for row in network["rows"]
        if row["refresh_ms"] is not None
    ]
    columns = {
        "network": ("network", ""),
        "mask": ("name", ""),
        "refresh, ms": ("refresh_ms", ".2f"),
        "limit, ms": ("limit", ".2f"),
        "refresh / limit": (lambda row: row["refresh_ms"] / row["limit"], ".1f"),
        "a step, ms": ("ms", ".1f"),
        f"share of the steps, every {EVERY}": ("share", ".3%"),
    }
    scores = [exact_scores(name, network) for name, network in found.items() if sam_of(network)]
    of_scores = {
        "network": ("name", ""),
        "an example's gradient, squared, ms": ("example", ".3f"),
        f"of {SAMPLES} examples, ms": ("all", ".0f"),
        f"share of {EPOCH} steps of {BATCH} examples": ("share", ".2%"),
    }
    return {
        **{name: step_table(network, record["limits"], name) for name, network in found.items()},
        "refresh": markdown(refresh, columns),
        "scores": markdown(scores, of_scores),
    }


def sam_of(network: dict[str, Any]) -> dict[str, Any]:
    """Return the row of optax's SAM."""
    return next(row for row in network["rows"] if row["name"] == "optax.contrib.sam")


def step_table(network: dict[str, Any], limits: dict[str, float], name: str) -> str:
    """Return the table of a network's steps."""
    rows, peak = network["rows"], limits["convolution" if name == "ResNet" else "product"]
    sgd = rows[0]

    def limit(row: dict[str, Any]) -> float:
        return 1e3 * row["flops"] / peak

    columns = {
        "step": ("name", ""),
        "ms": ("ms", ".1f"),
        "/ SGD": (ratio(sgd["ms"]), ".2f"),
        "operations / SGD": (ratio(sgd["flops"], "flops"), ".2f"),
        "limit, ms": (limit, ".1f"),
        "ms / limit": (lambda row: row["ms"] / limit(row), ".1f"),
        "trace, s": ("trace_s", ".2f"),
        "compile, s": ("compile_s", ".2f"),
        "memory, MB": (lambda row: row["bytes"] and row["bytes"] / 1e6, ".1f"),
    }
    return f"{name}: {network['parameters']:,} parameters, {network['batch']} examples\n\n" + markdown(
        rows, columns
    )


def refresh_limits(
    row: dict[str, Any], network: dict[str, Any], limits: dict[str, float]
) -> dict[str, float]:
    """Return the time of one read of float32 scores, and the share of the refresh in all steps."""
    limit = 1e3 * 4 * network["parameters"] / limits["bandwidth"]
    return {"limit": limit, "share": row["refresh_ms"] / (row["refresh_ms"] + EVERY * row["ms"])}


def exact_scores(name: str, network: dict[str, Any]) -> dict[str, Any]:
    """Return what per-example Fisher scores cost once an epoch, in the sizes of the trainer on CIFAR-10."""
    every = SAMPLES * network["scores_ms"]
    epoch = EPOCH * BATCH * sam_of(network)["ms"] / network["batch"]
    return {"name": name, "example": network["scores_ms"], "all": every, "share": every / (every + epoch)}


def plots(record: Record) -> dict[str, Any]:
    """Return the picture of all steps' times relative to SGD's."""
    found = record["results"]
    names = [row["name"] for row in next(iter(found.values()))["rows"]]
    figure, axes = plotting.figure(height=0.28 * len(names) + 1.2)
    for (name, network), color, marker in zip(found.items(), plotting.COLORS, plotting.MARKERS):
        sgd = network["rows"][0]["ms"]
        times = [row["ms"] / sgd for row in network["rows"]]
        axes.plot(times, names, marker, color=color, label=name)
    axes.invert_yaxis()
    axes.axvline(2, color=plotting.LIMIT, linestyle=":", linewidth=1)
    axes.set_xlabel("time of a step (SGD steps)")
    axes.legend()
    return {"times": ("Time of a step of every method in SGD steps, on three networks", figure)}


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
