"""Loss landscapes and Hessian spectra of SGD, SAM and sparse SAM, as in the paper (arXiv 2306.17504).

By default it trains a small network on digits with noisy labels, which SGD memorizes. Name the folders of
runs of the trainer to measure these instead::

    python -m ssam_experiments.landscape --checkpoints SGD=outputs/sgd SAM=outputs/sam

Losses are those of training examples, in nats, without dropout and with batch normalization's running
statistics. The two directions of a landscape are random, the same for all runs, and scaled filter by filter
to the run's own weights (Li et al., arXiv 1712.09913).
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

import ssam_jax
from ssam_experiments import noisy_digits
from ssam_experiments.ranges import Rule, check_ranges
from ssam_experiments.report import mean_std
from ssam_experiments.running import loop, preparation
from ssam_experiments.running.files import make_folder, write_whole
from ssam_experiments.running.programs import cross_entropy
from ssam_jax import plotting, sharpness

EIGENVALUES = 5  # the largest is compared with the fifth
DIRECTION_SEEDS = (0, 1)
ROUNDING = 1e-6  # of float32


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw loss landscapes and Hessian spectra of several runs; print a table of their sharpness."""

    checkpoints: tuple[str, ...] = ()
    """NAME=FOLDER for each run of the trainer, measured at its last checkpoint; runs of one NAME are
    averaged in the table, and the first of them is drawn."""
    data: pathlib.Path | None = None
    """Folder of the data set of --checkpoints, if it is no longer where it was."""
    out: pathlib.Path = pathlib.Path("outputs/landscape")
    """Folder for the pictures, the table and results.json."""

    seeds: int = 5
    """Runs of each method in the table; the first is drawn."""
    epochs: int = 100
    """Passes over the training examples."""
    batch: int = 64
    """Examples in a mini-batch."""
    width: int = 128
    """Units in each of the two hidden layers."""
    noise: float = 0.4
    """Share of the training examples whose label is replaced by another, drawn at random."""
    lr: float = 0.05
    """Peak learning rate, the same for every method."""
    weight_decay: float = 5e-4
    """Weight decay, the same for every method; SGD memorizes the wrong labels with a small one only."""
    rho_sam: float = 0.6
    """Radius of the perturbation for dense SAM."""
    rho_ssam: float = 0.6
    """Radius of the perturbation for sparse SAM."""
    sparsity: float = 0.5
    """Share of the parameters that sparse SAM leaves unperturbed."""

    examples: int = 1024
    """Training examples whose loss is measured."""
    measured_at_once: int = 256
    """Examples in a batch of these, as many as memory allows; a divisor of --examples."""
    probes: int = 32
    """Random vectors for the trace; a quarter of them for the spectrum."""
    depth: int = 80
    """Lanczos steps for the eigenvalues and for each of the spectrum's random vectors; memory for so many
    vectors of the network's size is needed."""
    points: int = 25
    """Points on each side of a landscape."""
    extent: float = 1.0
    """Landscapes reach from minus to plus this multiple of their directions."""
    max_loss: float | None = None
    """Upper end of the landscapes' scale, in nats; that of the highest loss if it is not given."""


TRAINING = (
    "seeds",
    "epochs",
    "batch",
    "width",
    "noise",
    "lr",
    "weight_decay",
    "rho_sam",
    "rho_ssam",
    "sparsity",
)
"""Settings of the training on digits, with the names that `noisy_digits.Config` has."""


class Run(NamedTuple):
    """A trained network to be measured: ``loss_fn(params, batch)`` over batches, and its test accuracy."""

    loss_fn: Callable[..., jax.Array]
    params: Any
    batches: list[Any]
    test_accuracy: float


class Measured(NamedTuple):
    """What was found out about the runs of a name: numbers for each, pictures of the first."""

    numbers: list[dict[str, Any]]
    plane: sharpness.LossPlane
    spectrum: sharpness.SpectralDensity


def trained(config: Config) -> dict[str, list[Run]]:
    """Train SGD, SAM and SSAM on the digits, all seeds of a method at once."""
    settings = digits_settings(config)
    data, model = noisy_digits.load_data(config.noise), noisy_digits.Mlp(config.width)
    methods = noisy_digits.make_methods(settings)
    names = noisy_digits.SGD, noisy_digits.SAM, f"SSAM Fisher {config.sparsity:.0%}"

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return noisy_digits.loss_fn(model, params, *batch)

    batches = split(config, data.train_x, data.train_y)
    runs: dict[str, list[Run]] = {}
    with tqdm(total=len(names) * config.epochs, unit="epoch", disable=None) as bar:
        for name in names:
            bar.set_description(name)
            trainer = noisy_digits.make_trainer(settings, methods[name], data)
            stacked, _, _ = noisy_digits.train(settings, trainer, methods[name].settings, bar)
            for seed in range(config.seeds):
                params = jax.tree.map(lambda leaf, seed=seed: leaf[seed], stacked)
                score = float(noisy_digits.accuracy(model, params, data.test_x, data.test_y))
                runs.setdefault(name, []).append(Run(loss_fn, params, batches, score))
    return runs


def loaded(config: Config) -> dict[str, list[Run]]:
    """Load runs of the trainer by name, on one device and in float32.

    Raises:
      FileNotFoundError: the data of a run are missing.
      ValueError: a folder holds no run or no checkpoint, or a run has too few examples.
    """
    runs: dict[str, list[Run]] = {}
    for name, folder in named_folders(config):
        settings, state = loop.load(folder, config.data)
        feed, programs = preparation.prepare(settings)
        images, labels = feed.examples(0, 0, config.examples)
        if len(labels) < config.examples:
            raise ValueError(
                f"examples must be at most {len(labels)}, those that {folder} has, got {config.examples}."
            )
        # The statistics are a part of each batch, so that runs of one network share what is compiled.
        batches = [(*batch, state.batch_stats) for batch in split(config, feed.prepare(images), labels)]
        score = loop.evaluate(settings, feed, programs, state)["test_accuracy"]
        loss_fn = loss_at_rest(state.apply_fn)
        runs.setdefault(name, []).append(Run(loss_fn, state.params, batches, score))
    return runs


@functools.cache
def loss_at_rest(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return the loss of a network of the trainer, in evaluation mode."""

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        images, labels, stats = batch
        variables = {"params": params} if stats is None else {"params": params, "batch_stats": stats}
        return cross_entropy(apply(variables, images, train=False), labels).mean()

    return loss_fn


def split(config: Config, inputs: Any, labels: Any) -> list[Any]:
    """Return the examples that are measured, in batches."""
    starts = range(0, config.examples, config.measured_at_once)
    return [tuple(x[i : i + config.measured_at_once] for x in (inputs, labels)) for i in starts]


def measure(config: Config, runs: dict[str, list[Run]]) -> dict[str, Measured]:
    """Measure every run, and the first of each name for the pictures."""
    found = {}
    total = 2 * sum(map(len, runs.values())) + 2 * len(runs)
    with tqdm(total=total, unit="measure", disable=None) as bar:
        # A large network takes long enough for a bar of its own.
        inner = bool(config.checkpoints) and not bar.disable
        for name, several in runs.items():
            numbers = []
            for number, one in enumerate(several):
                bar.set_description(f"{name}, {number + 1} of {len(several)}")
                numbers.append(measure_run(config, one, bar, inner))
            bar.set_description(f"{name}, pictures")
            plane = landscape(config, several[0], inner)
            bar.update()
            target = several[0][:3]
            probes = config.probes // 4
            spectrum = sharpness.spectral_density(*target, probes=probes, depth=config.depth, progress=inner)
            bar.update()
            found[name] = Measured(numbers, plane, spectrum)
    return found


def measure_run(config: Config, one: Run, bar: tqdm, inner: bool) -> dict[str, Any]:
    """Return the numbers of a run: those of the table, and how sure they are."""
    target = one[:3]
    pairs = sharpness.hessian_eigenpairs(*target, k=EIGENVALUES, depth=config.depth, progress=inner)
    bar.update()
    trace = sharpness.hessian_trace(*target, probes=config.probes, progress=inner)
    bar.update()
    return {
        "test_accuracy": one.test_accuracy,
        "loss": float(np.mean([one.loss_fn(one.params, batch) for batch in one.batches])),
        "eigenvalues": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "trace": float(trace.mean),
        "trace_standard_error": float(trace.standard_error),
    }


def landscape(config: Config, one: Run, inner: bool) -> sharpness.LossPlane:
    """Return the loss on the plane of two random directions."""
    directions = [sharpness.filter_normalized_direction(one.params, seed) for seed in DIRECTION_SEEDS]
    steps = np.linspace(-config.extent, config.extent, config.points, dtype=np.float32)
    return sharpness.loss_over(*one[:3], directions, steps, steps, progress=inner)


def table(found: dict[str, Measured], config: Config) -> str:
    """Return the numbers as a Markdown table."""
    lines = [
        "| run | seeds | test accuracy, % | training loss, nats | largest eigenvalue | trace"
        " | standard error of a trace | largest / fifth eigenvalue |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, measured in found.items():
        rows = measured.numbers
        cells = [
            spread([100 * row["test_accuracy"] for row in rows]),
            spread([row["loss"] for row in rows]),
            spread([row["eigenvalues"][0] for row in rows]),
            spread([row["trace"] for row in rows]),
            f"{np.mean([row['trace_standard_error'] for row in rows]):.2g}",
            spread([row["eigenvalues"][0] / row["eigenvalues"][-1] for row in rows]),
        ]
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    numbers = [row for measured in found.values() for row in measured.numbers]
    error = max(max(row["residuals"]) / abs(row["eigenvalues"][0]) for row in numbers)
    notes = (
        f"Mean ± standard deviation over the runs. Loss and Hessian are of {config.examples} training"
        f" examples, at rest. Traces are means of {config.probes} random vectors; eigenvalues are right to"
        f" within {max(error, ROUNDING):.0e} of the largest."
    )
    return "\n".join(lines) + f"\n\n{notes}\n"


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation, the mean with three digits that count; of one value, the value."""
    mean, deviation = mean_std(values)
    places = 2 - math.floor(math.log10(abs(mean))) if mean and math.isfinite(mean) else 2
    text = f"{mean:.{max(0, places)}f}"
    return text if len(values) == 1 else f"{text} ± {deviation:.{max(0, places)}f}"


def draw_landscapes(config: Config, found: dict[str, Measured]) -> Figure:
    """Return contours above surfaces, a column for each name, all on one scale."""
    planes = {name: measured.plane for name, measured in found.items()}
    low, high = plotting.loss_range(planes)
    high = config.max_loss or high
    figure = Figure(figsize=(4 * len(planes) + 0.6, 7.4), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(4, 3.4))[:, 0]
    for i, (name, plane) in enumerate(planes.items(), 1):
        axes = above.add_subplot(1, len(planes), i)
        last = i == len(planes)
        plotting.plot_loss_contours(plane, axes, vmin=low, vmax=high, unit="nats", log=low > 0, colorbar=last)
        axes.set_title(name)
        solid = below.add_subplot(1, len(planes), i, projection="3d")
        plotting.plot_loss_surface(plane, solid, vmin=low, vmax=high, unit="nats")
    return figure


def draw_spectra(found: dict[str, Measured]) -> Figure:
    """Return the spectra over one another: all of them, and the range of the flattest network."""
    spectra = {name: measured.spectrum for name, measured in found.items()}
    ends = [(float(np.min(s.nodes)), float(np.max(s.nodes))) for s in spectra.values()]
    low, high = min(ends, key=lambda pair: pair[1] - pair[0])
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    everything, near = figure.subplots(1, 2)
    plotting.plot_spectra(spectra, everything)
    width = (high - low) / 50
    plotting.plot_spectra(spectra, near, width=width)
    near.set(xlim=(low - 5 * width, high + 5 * width), title="the smallest spectrum's range, finer")
    return figure


def save(config: Config, found: dict[str, Measured]) -> list[pathlib.Path]:
    """Write the table, everything in numbers, and the pictures; return the paths."""
    make_folder(config.out)
    settings = {
        k: str(v) if isinstance(v, pathlib.Path) else v for k, v in dataclasses.asdict(config).items()
    }
    versions = {module.__name__: module.__version__ for module in (jax, np, matplotlib, ssam_jax)}
    arrays = {
        name: {"runs": m.numbers, "plane": as_lists(m.plane), "spectrum": as_lists(m.spectrum)}
        for name, m in found.items()
    }
    everything = {"config": settings, "versions": versions, "device": str(jax.devices()[0]), "names": arrays}
    write_whole(config.out / "results.json", json.dumps(everything, indent=1))
    write_whole(config.out / "table.md", table(found, config))
    draw_landscapes(config, found).savefig(config.out / "landscape.png", dpi=100)
    draw_spectra(found).savefig(config.out / "spectra.png", dpi=100)
    return [config.out / name for name in ("table.md", "results.json", "landscape.png", "spectra.png")]


def as_lists(arrays: Any) -> dict[str, Any]:
    """Return the fields of a result as lists."""
    return {name: np.asarray(values).tolist() for name, values in arrays._asdict().items()}


def digits_settings(config: Config) -> noisy_digits.Config:
    """Return the settings of the training on digits."""
    return noisy_digits.Config(**{name: getattr(config, name) for name in TRAINING})


def named_folders(config: Config) -> list[tuple[str, pathlib.Path]]:
    """Return the names and folders of ``--checkpoints``."""
    parts = [text.partition("=") for text in config.checkpoints]
    return [(name, pathlib.Path(folder)) for name, _, folder in parts]


def check(config: Config) -> None:
    """Raise ValueError, naming the setting, unless all are in range and go together."""
    noisy_digits.check(digits_settings(config))
    rules: dict[str, Rule] = {
        "at least 1": (lambda v: v >= 1, ("examples",)),
        f"a divisor of the {config.examples} examples": (
            lambda v: v >= 1 and config.examples % v == 0,
            ("measured_at_once",),
        ),
        "at least 8": (lambda v: v >= 8, ("probes",)),
        f"at least {EIGENVALUES}": (lambda v: v >= EIGENVALUES, ("depth",)),
        "odd and at least 3": (lambda v: v >= 3 and v % 2, ("points",)),
        "finite and above 0": (lambda v: v is None or 0 < v < math.inf, ("extent", "max_loss")),
    }
    check_ranges(config, rules)
    if not config.checkpoints:
        if config.data is not None:
            raise ValueError("data is for --checkpoints; the digits come with scikit-learn.")
        if config.examples > noisy_digits.TRAIN:
            raise ValueError(f"examples must be at most {noisy_digits.TRAIN}, got {config.examples}.")
        return
    for text, (name, folder) in zip(config.checkpoints, named_folders(config)):
        if not name or folder == pathlib.Path():
            raise ValueError(f"checkpoints must be NAME=FOLDER each, got {text!r}.")
    changed = [name for name in TRAINING if getattr(config, name) != getattr(Config(), name)]
    if changed:
        raise ValueError(f"{', '.join(changed)}: settings of the training on digits, not of --checkpoints.")


def main(config: Config) -> None:
    """Train or load, measure, print the table and where the rest is.

    Raises:
      FileNotFoundError, ValueError: as `check` and `loaded`.
    """
    check(config)
    make_folder(config.out)  # not to measure in vain
    found = measure(config, loaded(config) if config.checkpoints else trained(config))
    paths = save(config, found)
    print(table(found, config))
    for path in paths:
        print(path)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
