"""How fast the gradient falls: SGD, SAM and sparse SAM against the rate that theory promises.

For smooth non-convex losses with bounded stochastic gradients, a learning rate of ``lr / sqrt(t)`` and a
radius of ``rho / sqrt(t)``, the average over the steps t <= T of the squared gradient norm falls as
``O(log T / sqrt T)``, for sparse SAM as for SAM (Mi et al., arXiv 2306.17504). This command measures that
average of the exact gradient at the iterates, fits a line ``c log T / sqrt T`` to its first part and tests
it on the rest. It exits with 1, and names the curve, if one falls slower. docs/convergence.md shows
the results.
"""

import dataclasses
import functools
import json
import math
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

import ssam_jax
from ssam_experiments.many_runs import axes_of_runs
from ssam_experiments.ranges import Rule, check_ranges
from ssam_experiments.rates import bound, checkpoints, judge, paired_ratio, standard_error

STYLES = ("-", "--", ":", "-.")  # by sparsity


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure how fast the average squared gradient norm falls; exit with 1 if slower than log T / sqrt T."""

    seeds: int = 32
    """Runs of each method, all at once; they differ in initialization, batches and first mask."""
    steps: int = 20_000
    """Steps T of a run."""
    problems: tuple[str, ...] = ("matrix", "network")
    """Losses: "matrix", a matrix factorization; "network", a regression with a tanh network."""
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.95)
    """Shares of the parameters that sparse SAM leaves unperturbed; none leaves SGD and SAM."""
    batch: int = 4
    """Examples in a mini-batch, drawn with replacement."""
    lr: float = 0.5
    """Learning rate of the first step."""
    lr_decay: float = 0.5
    """Step t has the learning rate lr / t**lr_decay. The theorem wants 0.5."""
    rho: float = 0.5
    """Radius of the first step's perturbation."""
    rho_decay: float = 0.5
    """Step t has the radius rho / t**rho_decay. The theorem wants 0.5."""
    refresh_every: int = 100
    """Steps between refreshes of the masks."""
    fit: tuple[float, float] = (0.01, 0.1)
    """The part of the run on which c is fitted, in shares of the steps; all later T are for the test."""
    tolerance: float = 0.05
    """By how much a mean curve may exceed its line, relative to it, besides three standard errors."""
    out: pathlib.Path = pathlib.Path("outputs/convergence")
    """Folder for the table, the picture and results.json."""


class Problem(NamedTuple):
    """A sum of squares: ``errors(params)`` has the shape (examples,), the loss is half their mean square."""

    shapes: dict[str, tuple[int, ...]]
    errors: Callable[[Any], jax.Array]
    examples: int


class Method(NamedTuple):
    """A curve: color, line style, whether there is a perturbation, its mask rule as a function of a seed."""

    color: str
    style: str
    perturbed: bool
    mask: Callable[[Any], ssam_jax.MaskRule | None]


def make_problem(name: str) -> Problem:
    """Return a smooth non-convex problem whose stochastic gradients do not vanish where the gradient does."""
    rng = np.random.default_rng(0)  # the problem is one and the same for all seeds

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    shapes: dict[str, tuple[int, ...]]
    if name == "matrix":  # 16 x 12 numbers, their signal of rank 3, by two factors of rank 3
        target = normal(16, 3) @ normal(3, 12) / math.sqrt(3) + 0.5 * normal(16, 12)
        shapes = {"left": (16, 3), "right": (3, 12)}
        return Problem(shapes, lambda p: 2 * (p["left"] @ p["right"] - target).ravel(), target.size)

    inputs, shapes = normal(64, 4), {"kernel": (4, 8), "bias": (1, 8), "head": (8,)}
    targets = jnp.tanh(inputs @ normal(4)) + 0.5 * normal(64)
    return Problem(shapes, lambda p: jnp.tanh(inputs @ p["kernel"] + p["bias"]) @ p["head"] - targets, 64)


def make_methods(config: Config) -> dict[str, Method]:
    """Return the methods by name, in the Okabe-Ito colors."""
    methods = {
        "SGD": Method("#000000", "-", False, lambda seed: None),
        "SAM": Method("#D55E00", "-", True, lambda seed: None),
    }
    fisher = functools.partial(ssam_jax.fisher_mask, refresh_every=config.refresh_every)
    dynamic = functools.partial(
        ssam_jax.dynamic_mask, refresh_every=config.refresh_every, total_steps=config.steps
    )
    for name, color, rule in (("SSAM-F", "#0072B2", fisher), ("SSAM-D", "#009E73", dynamic)):
        for number, sparsity in enumerate(config.sparsities):
            pattern = ssam_jax.Unstructured(sparsity)
            mask = lambda seed, rule=rule, pattern=pattern: rule(pattern, seed=seed)  # noqa: E731
            methods[f"{name} {100 * sparsity:g}%"] = Method(color, STYLES[number % 4], True, mask)
    return methods


def decaying(first: float, decay: float) -> optax.Schedule:
    """Return the schedule ``first / t**decay`` with t counted from 1."""
    return lambda count: first * (jnp.asarray(count, jnp.float32) + 1) ** -decay


def make_run(config: Config, problem: Problem, method: Method) -> Callable[..., jax.Array]:
    """Return a compiled function of the seeds, parameters and batches, each run in one scan.

    It returns the squared norms of the exact gradients at the iterates, float32 of shape (steps, seeds).
    """
    radius = decaying(config.rho, config.rho_decay) if method.perturbed else 0.0
    rate = decaying(config.lr, config.lr_decay)

    def optimizer(seed: Any) -> optax.GradientTransformationExtraArgs:
        return optax.chain(ssam_jax.ssam(radius, method.mask(seed)), optax.sgd(rate))

    @jax.grad
    def gradient(params: Any, weights: jax.Array) -> jax.Array:
        return weights @ jnp.square(problem.errors(params)) / 2

    def step(carry: Any, rows: jax.Array) -> Any:
        params, opt_state = carry
        exact = gradient(params, jnp.full(problem.examples, 1 / problem.examples))
        # How often each example is in the batch: nothing is gathered, and no gradient scattered.
        weights = jnp.mean(jax.nn.one_hot(rows, problem.examples), axis=0)

        def grad_fn(params: Any, i: Any) -> Any:
            return gradient(params, weights)

        updates, opt_state = optimizer(0).update(grad_fn(params, 0), opt_state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), opt_state), optax.tree.norm(exact, squared=True)

    def init(seed: Any, params: Any) -> Any:
        return optimizer(seed).init(params)

    one = jax.tree.map(lambda shape: jnp.zeros(shape), problem.shapes, is_leaf=lambda x: isinstance(x, tuple))
    axes = axes_of_runs(jax.eval_shape(init, jnp.int32(0), one))
    steps = jax.vmap(step, in_axes=((0, axes), 0), out_axes=((0, axes), 0))

    @jax.jit
    def run(seeds: jax.Array, params: Any, rows: jax.Array) -> jax.Array:
        state = jax.vmap(init, out_axes=axes)(seeds, params)
        return jax.lax.scan(steps, (params, state), rows)[1]

    return run


def draw(config: Config, problem: Problem) -> tuple[jax.Array, Any, jax.Array]:
    """Return seeds, first parameters and batches, the same for all methods.

    Batches are int32 of shape (steps, seeds, batch); parameters are normal with standard deviation 1/2.
    """
    rngs = [np.random.default_rng((1, seed)) for seed in range(config.seeds)]

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return np.stack([rng.standard_normal(shape, np.float32) for rng in rngs])

    params = {name: jnp.asarray(0.5 * normal(shape)) for name, shape in problem.shapes.items()}
    size = (config.steps, config.batch)
    rows = np.stack([rng.integers(problem.examples, size=size, dtype=np.int32) for rng in rngs], axis=1)
    return jnp.arange(config.seeds), params, jnp.asarray(rows)


def measure(config: Config) -> dict[str, Any]:
    """Run every method on every problem; return curves and verdicts by problem and name, for JSON."""
    at, methods = checkpoints(config.steps), make_methods(config)
    curves: dict[str, dict[str, Any]] = {}
    window = (config.fit[0] * config.steps, config.fit[1] * config.steps)
    with tqdm(total=len(config.problems) * len(methods), unit="curve", disable=None) as bar:
        for which in config.problems:
            problem, curves[which] = make_problem(which), {}
            inputs = draw(config, problem)
            for name, method in methods.items():
                bar.set_description(f"{which}, {name}")
                squares = np.asarray(make_run(config, problem, method)(*inputs), np.float64)
                averages = np.cumsum(squares, axis=0)[at - 1] / at[:, None]
                curves[which][name] = describe(at, averages, window, config.tolerance)
                curves[which][name]["last"] = squares[-max(config.steps // 100, 1) :].mean()
                bar.update()
    return {"at": at.tolist(), "curves": curves}


def describe(
    at: np.ndarray, averages: np.ndarray, window: tuple[float, float], tolerance: float
) -> dict[str, Any]:
    """Return a curve's verdict, its mean over the seeds and the standard error of that, for JSON."""
    verdict, mean = judge(at, averages, window, tolerance), averages.mean(axis=1)
    error = standard_error(averages) if np.all(np.isfinite(averages)) else np.full(mean.shape, np.nan)
    return {
        **verdict._asdict(),
        "constants": verdict.constants.tolist(),
        "holds": verdict.holds,
        "average": [float(f"{value:.5g}") for value in mean],
        "average_error": [float(f"{value:.5g}") for value in error],
    }


def table(results: dict[str, Any]) -> str:
    """Return the verdicts as a Markdown table."""
    lines = [
        f"| problem | method | c | c / c of SAM | c at T = {results['at'][-1]:,} | slope | slope of the bound"
        " | above the line, % | allowed, % | within the bound |",
        "| --- | --- | --- | --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for which, curves in results["curves"].items():
        for name, curve in curves.items():
            constants = np.array(curve["constants"])
            ratio, error = paired_ratio(curve, curves["SAM"])
            lines.append(
                f"| {which} | {name} | {constants.mean():.3f} ± {standard_error(constants):.3f}"
                f" | {ratio:.3f} ± {error:.3f} | {curve['needed']:.3f}"
                f" | {curve['slope']:.3f} ± {curve['slope_error']:.3f} | {curve['bound_slope']:.3f}"
                f" | {100 * curve['excess']:+.1f} | {100 * curve['allowed']:.1f}"
                f" | {'yes' if curve['holds'] else '**no**'} |"
            )
    return "\n".join(lines)


def growth(results: dict[str, Any]) -> str:
    """Return how c grows from the lowest to the highest sparsity, as a Markdown table; empty for fewer."""
    shares = sorted(results["config"]["sparsities"])
    if len(shares) < 2:
        return ""
    low, high = f"{100 * shares[0]:g}%", f"{100 * shares[-1]:g}%"
    lines = [f"| problem | mask | c at {high} / c at {low} |", "| --- | --- | --- |"]
    for which, curves in results["curves"].items():
        for rule in ("SSAM-F", "SSAM-D"):
            ratio, error = paired_ratio(curves[f"{rule} {high}"], curves[f"{rule} {low}"])
            lines.append(f"| {which} | {rule} | {ratio:.3f} ± {error:.3f} |")
    return "\n".join(lines)


def slower(results: dict[str, Any]) -> list[str]:
    """Return a sentence for every curve that falls slower than its bound."""
    sentences = []
    for which, curves in results["curves"].items():
        for name, curve in curves.items():
            if math.isnan(curve["excess"]):
                sentences.append(f"{which}, {name}: the average squared gradient norm is not finite.")
            elif not curve["holds"]:
                sentences.append(
                    f"{which}, {name}: falls slower than log T / sqrt T: slope {curve['slope']:.3f} ±"
                    f" {curve['slope_error']:.3f}, bound's {curve['bound_slope']:.3f};"
                    f" {100 * curve['excess']:+.1f} % above the line fitted before, of"
                    f" {100 * curve['allowed']:.1f} % allowed."
                )
    return sentences


def plot(results: dict[str, Any], config: Config, path: pathlib.Path) -> None:
    """Draw the averages with SAM's line, and below each average over that of SGD, which tells them apart."""
    at, methods = np.array(results["at"]), make_methods(config)
    figure = Figure(figsize=(5 * len(results["curves"]), 7), layout="constrained")
    panels = figure.subplots(2, len(results["curves"]), sharex=True, squeeze=False)
    for (upper, lower), (which, curves) in zip(panels.T, results["curves"].items()):
        line, late = np.mean(curves["SAM"]["constants"]) * bound(at), at >= config.fit[0] * config.steps
        upper.plot(at[late], line[late], color="#999999", linewidth=3, label="SAM's c log T / √T")
        for name, curve in curves.items():
            look = {"color": methods[name].color, "linestyle": methods[name].style, "linewidth": 1.3}
            upper.plot(at, curve["average"], label=name, **look)
            lower.plot(at, np.divide(curve["average"], curves["SGD"]["average"]), **look)
        for axes in (upper, lower):
            axes.axvspan(*np.multiply(config.fit, config.steps), color="#F0E442", alpha=0.3, linewidth=0)
            axes.set_xscale("log")
            axes.grid(alpha=0.3)
        upper.set_yscale("log")
        upper.set_title(f"{which}: c fitted in yellow, tested to the right", fontsize="medium")
        lower.set_xlabel("steps T")
    panels[0][0].set_ylabel("average squared gradient norm, t ≤ T")
    panels[1][0].set_ylabel("the same / that of SGD")
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(path, dpi=110)


def check(config: Config) -> None:
    """Raise ValueError, naming the setting, unless all are in range."""
    rules: dict[str, Rule] = {
        "at least 2": (lambda v: v >= 2, ("seeds",)),
        "at least 1": (lambda v: v >= 1, ("batch", "refresh_every")),
        "at least 100": (lambda v: v >= 100, ("steps",)),
        'one or both of "matrix" and "network"': (
            lambda v: v and set(v) <= {"matrix", "network"} and len(set(v)) == len(v),
            ("problems",),
        ),
        f"at most {len(STYLES)} different numbers above 0 and below 1": (
            lambda v: all(0 < s < 1 for s in v) and len(set(v)) == len(v) <= len(STYLES),
            ("sparsities",),
        ),
        "finite and above 0": (lambda v: 0 < v < math.inf, ("lr", "rho")),
        "from 0 to 1": (lambda v: 0 <= v <= 1, ("lr_decay", "rho_decay")),
        "finite and at least 0": (lambda v: 0 <= v < math.inf, ("tolerance",)),
        "two shares of the steps, the first above 0, the second at least twice the first and at most 0.9": (
            lambda v: 0 < 2 * v[0] <= v[1] <= 0.9,
            ("fit",),
        ),
    }
    check_ranges(config, rules)


def main(config: Config) -> int:
    """Measure, write what was found, and return the exit status: 1 if a curve falls slower than the bound.

    Raises:
      ValueError: a setting is out of range.
    """
    check(config)
    config.out.mkdir(parents=True, exist_ok=True)
    results = {
        "config": {**dataclasses.asdict(config), "out": str(config.out)},
        "versions": {
            "python": platform.python_version(),
            **{package.__name__: package.__version__ for package in (jax, np, optax)},
        },
        "device": str(jax.devices()[0]),
        **measure(config),
    }
    (config.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    text = "\n\n".join(filter(None, (table(results), growth(results)))) + "\n"
    (config.out / "table.md").write_text(text, encoding="utf-8")
    plot(results, config, config.out / "convergence.png")
    print(text)
    for name in ("table.md", "results.json", "convergence.png"):
        print(config.out / name)
    sentences = slower(results)
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
