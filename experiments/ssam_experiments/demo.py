"""The demo: SGD, SAM and three kinds of sparse SAM on handwritten digits with noisy training labels.

It needs no download: the digits come with scikit-learn. ``make demo`` runs it.

The defaults were chosen by ``--select``, by accuracy after the last epoch on the validation examples and
never on the test examples. All rows share the learning rate and the weight decay that are best for dense
SAM. The radius of SAM is the best for SAM, that of sparse SAM the best on average over the three masks.
Settings that suit SAM need not suit SGD, so a second SGD row has those that are best for SGD alone.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from ssam_experiments import noisy_digits
from ssam_experiments.noisy_digits import (
    SAM,
    SGD,
    TRAIN,
    Data,
    Method,
    Mlp,
    Settings,
    Trainer,
    accuracy,
    load_data,
    loss_fn,
    make_methods,
    make_trainers,
    train,
)
from ssam_experiments.ranges import check_ranges
from ssam_experiments.report import mean_std

TIMING_ROUNDS = 30
GRID_LR, GRID_DECAY = (0.01, 0.02, 0.05, 0.1), (5e-4, 1e-3, 2e-3, 5e-3)
GRID_RHO = (0.2, 0.4, 0.6, 0.8)


@dataclasses.dataclass(frozen=True)
class Config(noisy_digits.Config):
    """Train a small network on noisy digits with SGD, SAM and sparse SAM; print a table, draw pictures."""

    rho_sharpness: float = 0.4
    """Radius at which sharpness is measured, the same for every method; the default is that of SAM."""
    out: pathlib.Path = pathlib.Path("outputs/digits")
    """Folder for the pictures, the table and results.json."""
    select: bool = False
    """Choose lr, weight decay and the radii on the validation examples, print the table, and stop."""


def sharpness(model: nn.Module, params: Any, x: jax.Array, y: jax.Array, rho: float) -> jax.Array:
    """Return by how much the loss rises along its gradient at a distance of ``rho``, in nats."""
    loss, grads = jax.value_and_grad(loss_fn, argnums=1)(model, params, x, y)
    scale = rho / jnp.maximum(optax.tree.norm(grads), 1e-12)
    return loss_fn(model, jax.tree.map(lambda p, g: p + scale * g, params, grads), x, y) - loss


def time_steps(config: Config, trainers: dict[str, Trainer], methods: dict[str, Method]) -> dict[str, float]:
    """Return the seconds that a step of all seeds at once takes, with its share of the mask's refresh.

    An epoch is timed at a time, the methods in turn, so that what else the machine does strikes all.
    """
    seeds = jnp.arange(config.seeds)
    times: dict[str, list[float]] = {name: [] for name in trainers}
    carries = jax.block_until_ready({name: trainer.init(seeds) for name, trainer in trainers.items()})
    for turn, (name, trainer) in itertools.product(range(TIMING_ROUNDS), trainers.items()):
        start = time.perf_counter()
        carry, _ = trainer.epoch(carries[name], methods[name].settings, seeds, turn)
        carries[name] = jax.block_until_ready(carry)
        times[name].append((time.perf_counter() - start) / (TRAIN // config.batch))
    return {name: statistics.median(t) for name, t in times.items()}


def compare(config: Config, data: Data) -> dict[str, Any]:
    """Train and measure every method; return results by name."""
    methods, model = make_methods(config), Mlp(config.width)
    trainers = make_trainers(config, data)

    @jax.jit
    @jax.vmap
    def evaluate(params: Any) -> tuple[jax.Array, jax.Array]:
        rise = sharpness(model, params, data.train_x, data.train_y, config.rho_sharpness)
        return accuracy(model, params, data.test_x, data.test_y), rise

    results = {}
    with tqdm(total=len(methods) * config.epochs, unit="epoch", disable=None) as bar:
        for name, method in methods.items():
            bar.set_description(name)
            params, opt_state, curves = train(config, trainers[name], method.settings, bar)
            test, rise = evaluate(params)
            stats = jax.tree.map(lambda x: float(np.mean(x)), trainers[name].stats(opt_state))
            results[name] = {
                "settings": method.settings._asdict(),
                "test_accuracy": test.tolist(),
                "sharpness": rise.tolist(),
                "density": stats.density if method.settings.rho else 0.0,
                "density_by_leaf": stats.by_leaf,
                **curves,
            }
    for name, seconds in time_steps(config, trainers, methods).items():
        results[name]["step_seconds"] = seconds
    return results


def table(results: dict[str, Any], config: Config) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| method | test accuracy, % | sharpness, nats | perturbed, % | step time / SGD |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        test, spread = mean_std(r["test_accuracy"])
        rise, rise_spread = mean_std(r["sharpness"])
        ratio = r["step_seconds"] / results[SGD]["step_seconds"]
        lines.append(
            f"| {name} | {100 * test:.1f} ± {100 * spread:.1f} | {rise:.3f} ± {rise_spread:.3f}"
            f" | {100 * r['density']:.1f} | {ratio:.2f} |"
        )
    notes = (
        f"Mean ± standard deviation over {config.seeds} seeds, after {config.epochs} epochs with"
        f" {config.noise:.0%} of the training labels wrong; test labels are clean. Sharpness: rise of the"
        f" training loss at distance {config.rho_sharpness} along its gradient. Step time: all seeds"
        " at once, refreshes of the mask included."
    )
    return "\n".join(lines) + f"\n\n{notes}\n"


def draw_curves(axes: Axes, results: dict[str, Any], colors: dict[str, str]) -> None:
    """Draw validation accuracy against the epoch, a band of one standard deviation about the mean."""
    for name, r in results.items():
        values = 100 * np.array(r["valid_accuracy"])
        epochs, mean, std = np.arange(1, len(values) + 1), *np.array([mean_std(v) for v in values]).T
        style, layer = ("-", 2) if name.startswith("SSAM") else ("--", 3)  # coinciding lines both show
        axes.plot(epochs, mean, style, color=colors[name], label=name, zorder=layer)
        axes.fill_between(epochs, mean - std, mean + std, color=colors[name], alpha=0.2, linewidth=0)
    lowest = min(100 * mean_std(r["valid_accuracy"][-1])[0] for r in results.values())
    axes.set_ylim(bottom=max(0, lowest - 12), top=100)  # the first epochs fall outside
    axes.set_title("Learning with noisy labels: mean and standard deviation over seeds", fontsize="medium")
    axes.set(xlabel="epoch", ylabel="accuracy on clean validation labels, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_density(axes: Axes, results: dict[str, Any], colors: dict[str, str]) -> None:
    """Draw the share of each parameter tensor that the final mask perturbs, for the masked methods."""
    masked = {name: r["density_by_leaf"] for name, r in results.items() if r["density_by_leaf"]}
    leaves, width = list(next(iter(masked.values()))), 0.8 / len(masked)
    for i, (name, density) in enumerate(masked.items()):
        at = np.arange(len(leaves)) + (i - (len(masked) - 1) / 2) * width
        axes.bar(at, [100 * density[leaf] for leaf in leaves], width, color=colors[name], label=name)
    axes.set_xticks(range(len(leaves)), [leaf.removeprefix("params/").replace("/", "\n") for leaf in leaves])
    axes.set_title("Where the final masks perturb: mean over seeds", fontsize="medium")
    axes.set(xlabel="parameter tensor", ylabel="perturbed parameters, %", ylim=(0, 105))


def save(draw: Callable[..., None], path: pathlib.Path, *args: Any) -> None:
    """Save what ``draw`` draws, with its legend below."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    draw(axes, *args)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def select(config: Config, data: Data) -> str:
    """Try settings on the validation examples, never the test examples; return the tables."""
    trainers = make_trainers(config, data)
    sparse = [name for name in trainers if name.startswith("SSAM")]
    pairs = list(itertools.product(GRID_LR, GRID_DECAY))
    stages = len(pairs) * (1 + len(GRID_RHO)) + len(sparse) * len(GRID_RHO)
    with tqdm(total=stages * config.epochs, unit="epoch", disable=None) as bar:

        def score(name: str, *settings: float) -> float:
            bar.set_description(name)
            curves = train(config, trainers[name], Settings(*settings), bar)[-1]
            return mean_std(curves["valid_accuracy"][-1])[0]

        rows = [(score(SGD, *pair, 0.0), SGD, *pair, 0.0) for pair in pairs]
        rows += [(score(SAM, *pair, rho), SAM, *pair, rho) for pair in pairs for rho in GRID_RHO]
        shared = max(row for row in rows if row[1] == SAM)[2:4]
        for rho in GRID_RHO:
            scores = [score(name, *shared, rho) for name in sparse]
            rows.append((statistics.mean(scores), f"SSAM, mean of {len(sparse)} masks", *shared, rho))
    lines = [
        "| method | lr | weight decay | rho | validation accuracy, % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for value, name, lr, decay, rho in sorted(rows, key=lambda row: (row[1], -row[0])):
        lines.append(f"| {name} | {lr} | {decay} | {rho} | {100 * value:.1f} |")
    return "\n".join(lines)


def check(config: Config) -> None:
    """Raise ValueError, naming the setting, unless all are in range."""
    noisy_digits.check(config)
    check_ranges(config, {"finite and above 0": (lambda v: 0 < v < math.inf, ("rho_sharpness",))})


def main(config: Config) -> None:
    """Compare the methods and write what was found, or choose settings.

    Raises:
      ValueError: a setting is out of range.
    """
    check(config)
    data = load_data(config.noise)
    if config.select:
        print(select(config, data))
        return
    config.out.mkdir(parents=True, exist_ok=True)
    results = compare(config, data)
    colors = {name: method.color for name, method in make_methods(config).items()}
    save(draw_curves, config.out / "learning_curves.png", results, colors)
    save(draw_density, config.out / "mask_density.png", results, colors)
    text = table(results, config)
    (config.out / "table.md").write_text(text, encoding="utf-8")
    settings = {**dataclasses.asdict(config), "out": str(config.out)}
    (config.out / "results.json").write_text(json.dumps({"config": settings, "methods": results}, indent=1))
    print(text)
    for name in ("table.md", "results.json", "learning_curves.png", "mask_density.png"):
        print(config.out / name)


if __name__ == "__main__":
    main(tyro.cli(Config))
