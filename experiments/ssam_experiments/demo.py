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
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from ssam_experiments import noisy_digits
from ssam_experiments.noisy_digits import (
    SAM,
    SGD,
    Data,
    Mlp,
    Settings,
    accuracy,
    load_data,
    loss_fn,
    make_methods,
    make_trainers,
    train,
)
from ssam_experiments.report import mean_std
from ssam_jax import sharpness

LANCZOS_STEPS = 20  # enough for the largest eigenvalue
GRID_LR, GRID_DECAY = (0.01, 0.02, 0.05, 0.1), (5e-4, 1e-3, 2e-3, 5e-3)
GRID_RHO = (0.2, 0.4, 0.6, 0.8)


@dataclasses.dataclass(frozen=True)
class Config(noisy_digits.Config):
    """Train a small network on noisy digits with SGD, SAM and sparse SAM; print a table, draw pictures."""

    out: pathlib.Path = pathlib.Path("outputs/digits")
    """Folder for the pictures, the table and results.json."""
    select: bool = False
    """Choose lr, weight decay and the radii on the validation examples, print the table, and stop."""


def largest_eigenvalues(model: nn.Module, runs: Any, data: Data) -> list[float]:
    """Return the largest eigenvalue of the training loss's Hessian at the end of each run."""

    def loss(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return loss_fn(model, params, *batch)

    def measured(run: int) -> float:
        params = jax.tree.map(lambda leaf: leaf[run], runs)
        batches = [(data.train_x, data.train_y)]
        pairs = sharpness.hessian_eigenpairs(loss, params, batches, depth=LANCZOS_STEPS, progress=False)
        return float(pairs.values[0])

    return [measured(run) for run in range(len(jax.tree.leaves(runs)[0]))]


def compare(config: Config, data: Data) -> dict[str, Any]:
    """Train and measure every method; return results by name."""
    methods, model = make_methods(config), Mlp(config.width)
    trainers = make_trainers(config, data)

    @jax.jit
    @jax.vmap
    def test_accuracy(params: Any) -> jax.Array:
        return accuracy(model, params, data.test_x, data.test_y)

    results = {}
    with tqdm(total=len(methods) * config.epochs, unit="epoch", disable=None) as bar:
        for name, method in methods.items():
            bar.set_description(name)
            params, opt_state, curves = train(config, trainers[name], method.settings, bar)
            stats = jax.tree.map(lambda x: float(np.mean(x)), trainers[name].stats(opt_state))
            results[name] = {
                "settings": method.settings._asdict(),
                "test_accuracy": test_accuracy(params).tolist(),
                "largest_eigenvalue": largest_eigenvalues(model, params, data),
                "density": stats.density if method.settings.rho else 0.0,
                "density_by_leaf": stats.by_leaf,
                **curves,
            }
    return results


def table(results: dict[str, Any], config: Config) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| method | test accuracy, % | largest Hessian eigenvalue | perturbed, % |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, r in results.items():
        test, spread = mean_std(r["test_accuracy"])
        top, top_spread = mean_std(r["largest_eigenvalue"])
        digits = 2 if top < 10 else 1
        lines.append(
            f"| {name} | {100 * test:.1f} ± {100 * spread:.1f} | {top:.{digits}f} ± {top_spread:.{digits}f}"
            f" | {100 * r['density']:.1f} |"
        )
    notes = (
        f"Mean ± standard deviation over {config.seeds} seeds, after {config.epochs} epochs with"
        f" {config.noise:.0%} of the training labels wrong; test labels are clean. The Hessian is that of the"
        " training loss at the end of training: the smaller its largest eigenvalue, the flatter the minimum."
    )
    return "\n".join(lines) + f"\n\n{notes}\n"


def draw_curves(figure: Figure, results: dict[str, Any], colors: dict[str, str]) -> None:
    """Draw validation accuracy against the epoch, a panel for each method, with SGD's mean in all of them."""
    columns = math.ceil(len(results) / 2)
    grid = figure.subplots(2, columns, sharex=True, sharey=True, squeeze=False)
    means = {
        name: np.array([100 * mean_std(v)[0] for v in r["valid_accuracy"]]) for name, r in results.items()
    }
    lowest = min(mean[-1] for mean in means.values())
    for axes, (name, r) in zip(grid.flat, results.items()):
        spread = np.array([100 * mean_std(v)[1] for v in r["valid_accuracy"]])
        epochs, mean = np.arange(1, len(spread) + 1), smooth(means[name])
        axes.plot(epochs, smooth(means[SGD]), ":", color="#666666", linewidth=1.5)
        axes.plot(epochs, mean, color=colors[name], linewidth=2)
        axes.fill_between(epochs, mean - spread, mean + spread, color=colors[name], alpha=0.2, linewidth=0)
        axes.set_title(f"{name}: {means[name][-1]:.1f} %", fontsize="medium")
        axes.set_ylim(max(0, lowest - 12), 100)  # the first epochs fall outside
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(results) :]:
        axes.set_axis_off()
        grid[0, -1].tick_params(labelbottom=True)
    figure.supxlabel("epoch; dotted: SGD", fontsize="medium")
    figure.supylabel("accuracy on clean validation labels, %", fontsize="medium")


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Return the mean over a window of epochs, which is narrower at the ends."""
    window = np.ones(min(width, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def draw_density(figure: Figure, results: dict[str, Any], colors: dict[str, str]) -> None:
    """Draw the share of each parameter tensor that the final mask perturbs, for the masked methods."""
    axes = figure.subplots()
    masked = {name: r["density_by_leaf"] for name, r in results.items() if r["density_by_leaf"]}
    leaves, width = list(next(iter(masked.values()))), 0.8 / len(masked)
    for i, (name, density) in enumerate(masked.items()):
        at = np.arange(len(leaves)) + (i - (len(masked) - 1) / 2) * width
        axes.bar(at, [100 * density[leaf] for leaf in leaves], width, color=colors[name], label=name)
    axes.set_xticks(range(len(leaves)), [leaf.removeprefix("params/").replace("/", "\n") for leaf in leaves])
    axes.set_title("Where the final masks perturb: mean over seeds", fontsize="medium")
    axes.set(xlabel="parameter tensor", ylabel="perturbed parameters, %", ylim=(0, 105))
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)


def save(draw: Callable[..., None], path: pathlib.Path, *args: Any) -> None:
    """Save what ``draw`` draws."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    draw(figure, *args)
    figure.savefig(path, dpi=120)


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


def main(config: Config) -> None:
    """Compare the methods and write what was found, or choose settings.

    Raises:
      ValueError: a setting is out of range.
    """
    noisy_digits.check(config)
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
