"""What a step costs by the fast road, as more and more of the last layers are perturbed.

Run ``python benchmarks/two_pass.py``; ``--help`` lists the sizes. For each network and share of the work,
three ways to take the same step: the fast road; two gradients, the first one of the active leaves
alone, which leaves it to the compiler to find what they share; and, once, ``optax.contrib.sam``. They
take turns, and medians count. Operations are those of the products in the compiled step.
"""

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import networks
import optax
import tyro
from counting import program_flops
from networks import Problem
from timing import medians, print_setting
from tqdm import tqdm

import ssam_jax
from ssam_jax import explain_two_pass, two_pass_value_and_grad
from ssam_jax.active import Active, FirstRow

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the comparison."""

    scale: int = 4
    """Factor on the widths of the small networks that the tests use."""
    batch: int = 16
    """Examples in a step."""
    repeats: int = 11
    """Timed steps of each candidate; the median counts."""
    compilations: int = 3
    """Times that each candidate is traced and compiled; the median counts."""


def problems(config: Config) -> dict[str, Problem]:
    """Return the networks, of depths at which a tenth of the work is a layer or so."""
    scale, batch = config.scale, config.batch
    return {
        "ResNet": networks.resnet(widths=(8 * scale, 16 * scale), blocks=3, batch=batch, size=16),
        "vision transformer": networks.vit(width=32 * scale, layers=8, heads=4, batch=batch, size=32),
        "scanned transformer": networks.scanned_transformer(
            width=32 * scale, layers=8, heads=4, batch=batch, length=64, vocabulary=64
        ),
    }


def loss_of(problem: Problem) -> Callable[..., Any]:
    """Return the loss alone."""
    return lambda *args: problem.loss_fn(*args)[0] if problem.has_aux else problem.loss_fn(*args)


def optimizer() -> optax.GradientTransformation:
    """Return what comes after the perturbation."""
    return optax.sgd(0.1, momentum=0.9)


def sgd_step(problem: Problem) -> Callable[..., Any]:
    """Return a step of SGD."""

    def step(params: Any, state: Any, *args: Any) -> Any:
        grads = jax.grad(loss_of(problem))(params, *args)
        updates, state = optimizer().update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def contrib_step(problem: Problem) -> Callable[..., Any]:
    """Return a step of ``optax.contrib.sam``."""
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    tx = optax.contrib.sam(optimizer(), adversary, opaque_mode=True)

    def step(params: Any, state: Any, *args: Any) -> Any:
        del state
        grad_fn = lambda p, i: jax.grad(loss_of(problem))(p, *args)  # noqa: E731
        updates, _ = tx.update(grad_fn(params, 0), tx.init(params), params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates)

    return step


def fast_step(problem: Problem, active: Active) -> Callable[..., Any]:
    """Return a step by the fast road."""
    two_pass = two_pass_value_and_grad(loss_of(problem))

    def step(params: Any, state: Any, *args: Any) -> Any:
        _, grads, grad_fn = two_pass(params, *args, active=active)
        return stepped(problem, active, params, state, grads, grad_fn)

    return step


def trusting_step(problem: Problem, active: Active) -> Callable[..., Any]:
    """Return the same step written as two gradients, the first with respect to the active leaves."""
    loss = loss_of(problem)

    def step(params: Any, state: Any, *args: Any) -> Any:
        leaves, tree = jax.tree.flatten(params)

        def rest_fixed(moving: list[Any]) -> Any:
            return loss(tree.unflatten(map(merged, leaves, moving, active)), *args)

        def merged(leaf: Any, moving: Any, entry: bool | FirstRow) -> Any:
            if isinstance(entry, FirstRow):
                return jax.numpy.concatenate([leaf[: entry.row], moving[entry.row :]])
            return moving if entry else leaf

        grads = tree.unflatten(jax.grad(rest_fixed)(leaves))

        def grad_fn(point: Any, i: int) -> Any:
            del i
            point = tree.unflatten(map(merged, leaves, jax.tree.leaves(point), active))
            return jax.grad(loss)(point, *args)

        return stepped(problem, active, params, state, grads, grad_fn)

    return step


def stepped(problem: Problem, active: Active, params: Any, state: Any, grads: Any, grad_fn: Any) -> Any:
    """Take the step, with a mask that perturbs what is active."""
    rule = ssam_jax.fixed_mask(networks.mask_of(problem.params, active))
    tx = ssam_jax.ssam(0.1, rule, normalize="masked")
    grads, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    updates, state = optimizer().update(grads, state, params)
    return optax.apply_updates(params, updates), state


def choices(problem: Problem) -> dict[float, tuple[int, Active]]:
    """Return for each share the number of last parts whose predicted extra cost is nearest to it."""
    costs = {}
    for count in range(len(problem.parts) + 1):
        report = explain_two_pass(loss_of(problem), problem.params, *problem.args, active=problem.last(count))
        costs[count] = report.relative_to_sgd - 1
    nearest = {share: min(costs, key=lambda count: abs(costs[count] - share)) for share in SHARES}
    return {costs[count]: (count, problem.last(count)) for count in nearest.values()}


def compile_timed(step: Callable[..., Any], *args: Any) -> tuple[Any, float, float]:
    """Return the compiled step and the seconds that tracing and compiling took."""
    gc.collect()
    start = time.perf_counter()
    lowered = jax.jit(functools.partial(step)).lower(*args)  # a new function: nothing is cached
    traced = time.perf_counter()
    executable = lowered.compile()
    return executable, traced - start, time.perf_counter() - traced


def measure(problem: Problem, config: Config, bar: Any) -> None:
    """Print the tables of a network."""
    state = optimizer().init(problem.params)
    args = (problem.params, state, *problem.args)
    found = choices(problem)
    steps = {("SGD", None): sgd_step(problem), ("optax", None): contrib_step(problem)}
    for share, (_, active) in found.items():
        steps["fast", share] = fast_step(problem, active)
        steps["trusting", share] = trusting_step(problem, active)
    executables, traces, compiles = {}, {name: [] for name in steps}, {name: [] for name in steps}
    for _ in range(config.compilations):
        for name, step in steps.items():
            bar.set_description(f"{name[0]} {name[1] or 0:.2f}, compiling")
            executables[name], trace, compiling = compile_timed(step, *args)
            traces[name].append(trace)
            compiles[name].append(compiling)
            bar.update()
    bar.set_description("timing")
    times = medians(
        {name: functools.partial(executable, *args) for name, executable in executables.items()},
        config.repeats,
    )
    flops = {name: program_flops(executable.as_text()) for name, executable in executables.items()}
    count, sam = sum(p.size for p in jax.tree.leaves(problem.params)), ("optax", None)
    sgd = ("SGD", None)
    print(
        f"{count:,} parameters, {config.batch} examples; SGD {times[sgd]:.1f} ms,"
        f" optax.contrib.sam {times[sam] / times[sgd]:.2f} SGD steps,"
        f" operations {flops[sam] / flops[sgd]:.2f}\n"
    )
    print(
        "| last parts perturbed | predicted 1 + p | operations | time | time / optax.contrib.sam"
        " | left to the compiler: operations | time |\n| ---: " + "| ---: " * 6 + "|"
    )
    for share, (parts, _) in found.items():
        fast, trusting = ("fast", share), ("trusting", share)
        row = [1 + share, flops[fast] / flops[sgd], times[fast] / times[sgd], times[fast] / times[sam]]
        row += [flops[trusting] / flops[sgd], times[trusting] / times[sgd]]
        print(f"| {parts} of {len(problem.parts)} | " + " | ".join(f"{x:.2f}" for x in row) + " |")
    print("\nSeconds to trace and to compile, and their sum relative to optax.contrib.sam\n")
    print("| step | trace | compile | sum / optax.contrib.sam |\n| --- | ---: | ---: | ---: |")
    middle = statistics.median
    totals = {name: middle(map(sum, zip(traces[name], compiles[name]))) for name in steps}
    for name in steps:
        label = name[0] if name[1] is None else f"{name[0]}, {1 + name[1]:.2f}"
        row = [middle(traces[name]), middle(compiles[name]), totals[name] / totals[sam]]
        print(f"| {label} | " + " | ".join(f"{x:.2f}" for x in row) + " |")
    print()


def main(config: Config) -> None:
    """Print the tables."""
    with tqdm(total=3 * config.compilations * (2 + 2 * len(SHARES)), unit="program") as bar:
        for name, problem in problems(config).items():
            print(f"### {name}\n")
            measure(problem, config, bar)


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__)
    print_setting()
    main(chosen)
