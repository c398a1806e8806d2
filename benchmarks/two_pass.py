"""What a step costs by two-pass gradients, as more and more of the last layers are perturbed.

Run ``python benchmarks/two_pass.py``; ``--help`` lists the sizes. For each network and share of the work,
three ways to take the same step: two-pass gradients; two gradients, the first one of the active leaves
alone, which leaves it to the compiler to find what they share; and, once, ``optax.contrib.sam``. They
take turns, and medians count. Operations are those of the products in the compiled step.
"""

import dataclasses
import functools
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import networks
import optax
import plotting
import steps
import suite
from networks import Problem
from suite import Record, markdown
from timing import compiled, medians
from tqdm import tqdm

import ssam_jax
from ssam_jax import explain_two_pass
from ssam_jax.two_pass.active import Active, FirstRow

SEEDS = (0, 1)
TIMED = True


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the comparison."""

    scale: int = 4
    """Factor on the widths of the small networks that the tests use."""
    batch: int = 16
    """Examples in a step."""
    networks: tuple[str, ...] = ("ResNet", "vision transformer", "scanned transformer")
    """Which networks."""
    shares: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Of the work of an SGD step, which the perturbed parts should do about."""
    repeats: int = 7
    """Timed steps of each candidate; the median counts."""
    compilations: int = 1
    """Times that each candidate is traced and compiled; the median counts."""


QUICK = Config(1, 2, ("ResNet",), (0.5,), 1)


def problem_of(name: str, config: Config) -> Problem:
    """Return a network, of a depth at which a tenth of the work is a layer or so."""
    scale, batch = config.scale, config.batch
    if name == "ResNet":
        return networks.resnet(widths=(8 * scale, 16 * scale), blocks=3, batch=batch, size=16)
    if name == "vision transformer":
        return networks.vit(width=32 * scale, layers=8, heads=4, batch=batch, size=32)
    return networks.scanned_transformer(
        width=32 * scale, layers=8, heads=4, batch=batch, length=64, vocabulary=64
    )


def transformation(problem: Problem, active: Active) -> Any:
    """Return SSAM with a mask that perturbs what is active."""
    rule = ssam_jax.fixed_mask(networks.mask_of(problem.params, active))
    return optax.chain(ssam_jax.ssam(0.1, rule, normalize="masked"), steps.optimizer())


def trusting(problem: Problem, tx: Any, active: Active) -> steps.Step:
    """Return the same step written as two gradients, the first with respect to the active leaves."""

    def merged(leaf: Any, moving: Any, entry: bool | FirstRow) -> Any:
        if isinstance(entry, FirstRow):
            return jnp.concatenate([leaf[: entry.row], moving[entry.row :]])
        return moving if entry else leaf

    def step(params: Any, state: Any, *args: Any) -> Any:
        leaves, tree = jax.tree.flatten(params)

        def mixed(moving: list[Any]) -> Any:
            return tree.unflatten(map(merged, leaves, moving, active))

        def grad_fn(point: Any, i: int) -> Any:
            del i
            return jax.grad(problem.loss)(mixed(jax.tree.leaves(point)), *args)

        grads = tree.unflatten(jax.grad(lambda moving: problem.loss(mixed(moving), *args))(leaves))
        return steps.moved(tx, grads, state, params, grad_fn=grad_fn)

    return step


def choices(problem: Problem, config: Config) -> dict[int, float]:
    """Return the numbers of last parts whose predicted extra cost is nearest to the shares, and that cost."""
    costs = {}
    for count in range(len(problem.parts) + 1):
        report = explain_two_pass(problem.loss, problem.params, *problem.args, active=problem.last(count))
        costs[count] = report.relative_to_sgd - 1
    nearest = {min(costs, key=lambda count: abs(costs[count] - share)) for share in config.shares}
    return {count: costs[count] for count in sorted(nearest)}


def measure_network(problem: Problem, config: Config, bar: Any) -> dict[str, Any]:
    """Return what each step costs on a network."""
    predicted = choices(problem, config)
    sam = steps.contrib_sam(steps.optimizer())
    ways: dict[str, Any] = {
        "SGD": (steps.plain(problem, steps.optimizer()), steps.optimizer()),
        "optax.contrib.sam": (steps.ascending(problem, sam), sam),
    }
    for count in predicted:
        active = problem.last(count)
        tx = transformation(problem, active)
        ways[f"fast, {count}"] = (steps.two_passes(problem, tx, active), tx)
        ways[f"trusting, {count}"] = (trusting(problem, tx, active), tx)
    rows, calls = {}, {}
    for name, (step, tx) in ways.items():
        bar.set_description(f"{name}, compiling")
        args = (problem.params, tx.init(problem.params), *problem.args)
        programs = [compiled(step, *args) for _ in range(config.compilations)]
        calls[name] = functools.partial(programs[-1].call, *args)
        middle = {
            key: statistics.median(program.costs[key] for program in programs)
            for key in ("trace_s", "compile_s")
        }
        rows[name] = {**programs[-1].costs, **middle}
        bar.update()
    bar.set_description("timing")
    for name, value in medians(calls, config.repeats).items():
        rows[name]["ms"] = value
    return {
        "parameters": networks.count(problem.params),
        "parts": len(problem.parts),
        "predicted": [[count, 1 + share] for count, share in predicted.items()],
        "steps": rows,
    }


def measure(config: Config) -> dict[str, Any]:
    """Return what each step costs, by network."""
    with tqdm(unit="program", disable=None) as bar:
        return {name: measure_network(problem_of(name, config), config, bar) for name in config.networks}


def tables(record: Record) -> dict[str, str]:
    """Return the tables of the networks, and one of tracing and compiling."""
    found = record["results"]
    compiling = []
    for network, results in found.items():
        for label, fast, trusting in table_rows(results):
            sam = seconds(results["steps"]["optax.contrib.sam"])
            both = (seconds(fast) / sam, seconds(trusting) / sam)
            compiling.append((network, label, fast["trace_s"], fast["compile_s"], *both))
    columns = ("network", "predicted 1 + p", "trace, s", "compile, s", "sum / optax.contrib.sam")
    columns += ("left to the compiler / optax.contrib.sam",)
    specs = ("", ".2f", ".2f", ".2f", ".2f", ".2f")
    return {
        **{name.replace(" ", "_"): table(name, results, record) for name, results in found.items()},
        "compile": markdown(compiling, {c: (i, spec) for i, (c, spec) in enumerate(zip(columns, specs))}),
    }


def table_rows(results: dict[str, Any]) -> list[tuple[float, dict[str, Any], dict[str, Any]]]:
    """Return for each choice the prediction, and the costs of two-pass gradients and of the compiler's."""
    every = results["steps"]
    return [(share, every[f"fast, {n}"], every[f"trusting, {n}"]) for n, share in results["predicted"]]


def seconds(costs: dict[str, Any]) -> float:
    """Return the time to trace and to compile."""
    return costs["trace_s"] + costs["compile_s"]


def table(name: str, results: dict[str, Any], record: Record) -> str:
    """Return the table of a network."""
    every, peak = results["steps"], record["limits"]["convolution" if name == "ResNet" else "product"]
    sgd, sam = every["SGD"], every["optax.contrib.sam"]
    rows = [
        (f"{count} of {results['parts']}", *row)
        for (count, _), row in zip(results["predicted"], table_rows(results))
    ]
    columns = {
        "last parts perturbed": (0, ""),
        "predicted 1 + p": (1, ".2f"),
        "operations": (lambda row: row[2]["flops"] / sgd["flops"], ".2f"),
        "time": (lambda row: row[2]["ms"] / sgd["ms"], ".2f"),
        "time / optax.contrib.sam": (lambda row: row[2]["ms"] / sam["ms"], ".2f"),
        "time / limit": (lambda row: row[2]["ms"] / (1e3 * row[2]["flops"] / peak), ".1f"),
        "left to the compiler: operations": (lambda row: row[3]["flops"] / sgd["flops"], ".2f"),
        "time ": (lambda row: row[3]["ms"] / sgd["ms"], ".2f"),
    }
    return (
        f"{name[0].upper() + name[1:]}: {results['parameters']:,} parameters; SGD {sgd['ms']:.1f} ms,"
        f" {sgd['ms'] * peak / 1e3 / sgd['flops']:.1f} times its limit; optax.contrib.sam"
        f" {sam['ms'] / sgd['ms']:.2f} SGD steps, operations {sam['flops'] / sgd['flops']:.2f}\n\n"
        + markdown(rows, columns)
    )


def plots(record: Record) -> dict[str, Any]:
    """Return the picture of times by the predicted operations."""
    figure, axes = plotting.figure(5.5, 5.0)
    axes.plot([1, 2], [1, 2], ":", color=plotting.LIMIT, label="limit: operations")
    for (name, results), color, marker in zip(record["results"].items(), plotting.COLORS, plotting.MARKERS):
        rows, sgd = table_rows(results), results["steps"]["SGD"]["ms"]
        predicted = [share for share, *_ in rows]
        for i, (line, label) in enumerate((("-", name), ("--", f"{name}, left to the compiler"))):
            times = [row[1 + i]["ms"] / sgd for row in rows]
            fill = color if i == 0 else "none"
            axes.plot(predicted, times, line, marker=marker, color=color, markerfacecolor=fill, label=label)
    axes.set_xlabel("predicted operations (SGD steps)")
    axes.set_ylabel("time (SGD steps)")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return {"times": ("Time of a step by two-pass gradients, by the operations predicted", figure)}


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
