"""SGD, SAM and three kinds of sparse SAM on handwritten digits with noisy training labels.

Noisy labels are where SAM's effect is plain: long training makes SGD memorise them. The defaults were
chosen by ``--select``, which looks at accuracy after the last epoch on the validation examples, never
on the test examples: the learning rate and weight decay that all share, and SAM's radius, are the best
for dense SAM; the radius of sparse SAM is the best on average over the three masks. Since settings that
suit SAM need not suit SGD, a second SGD row has the learning rate and weight decay best for SGD alone.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shared import Rule, axes_of_runs, check_ranges
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import ssam_jax

TRAIN, TEST = 1024, 500  # the other 273 examples are for validation
SPLIT_SEED = 0  # of the split and of the label noise, the same for every run
TIMING_ROUNDS = 30
SGD, TUNED, SAM, LAST = "SGD", "SGD, tuned alone", "SAM", "SAM, last block"
GRID_LR, GRID_DECAY = (0.01, 0.02, 0.05, 0.1), (5e-4, 1e-3, 2e-3, 5e-3)
GRID_RHO = (0.2, 0.4, 0.6, 0.8)


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a small network on noisy digits with SGD, SAM and sparse SAM; print a table, draw pictures."""

    seeds: int = 5
    """Runs of each method; they differ in initialization, batch order and random masks."""
    epochs: int = 100
    """Passes over the training examples."""
    batch: int = 64
    """Examples in a mini-batch."""
    width: int = 128
    """Units in each of the two hidden layers."""
    noise: float = 0.4
    """Share of the training examples whose label is replaced by another, drawn at random."""
    lr: float = 0.05
    """Peak learning rate, of a cosine schedule down to 0; the same for every method."""
    weight_decay: float = 5e-3
    """Weight decay, the same for every method."""
    sgd_lr: float = 0.01
    """Peak learning rate of the second SGD row, whose settings are chosen for SGD alone."""
    sgd_weight_decay: float = 5e-3
    """Weight decay of the second SGD row."""
    rho_sam: float = 0.4
    """Radius of the perturbation for dense SAM."""
    rho_ssam: float = 0.4
    """Radius of the perturbation for sparse SAM, whatever the mask."""
    sparsity: float = 0.5
    """Share of the parameters that the unstructured masks leave unperturbed."""
    rho_sharpness: float = 0.4
    """Radius at which sharpness is measured, the same for every method; the default is that of SAM."""
    out: pathlib.Path = pathlib.Path("outputs/digits")
    """Folder for the pictures, the table and results.json."""
    select: bool = False
    """Choose lr, weight decay and the radii on the validation examples, print the table, and stop."""


class Data(NamedTuple):
    """Examples, float32 of shape (examples, 64), and labels; only ``train_y`` is noisy."""

    train_x: jax.Array
    train_y: jax.Array
    valid_x: jax.Array
    valid_y: jax.Array
    test_x: jax.Array
    test_y: jax.Array


class Settings(NamedTuple):
    """What is chosen on the validation examples; traced, so that another choice compiles nothing."""

    lr: float
    weight_decay: float
    rho: float


class Method(NamedTuple):
    """A row of the table: its colour, its settings, and its mask rule as a function of a seed.

    If the mask perturbs some leaves whole and others not at all, and never changes, only the former
    need an ascent gradient.
    """

    color: str
    settings: Settings
    mask: Callable[[Any], ssam_jax.MaskRule | None]
    some_leaves: bool = False


class Trainer(NamedTuple):
    """Compiled functions over all seeds at once."""

    init: Callable[..., Any]
    epoch: Callable[..., Any]
    stats: Callable[..., ssam_jax.MaskStats]


class Mlp(nn.Module):
    """Two hidden layers."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits of shape (examples, 10)."""
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def load_data(noise: float) -> Data:
    """Split the digits, stratified by class, and replace a share of the training labels."""
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    x, test_x, y, test_y = train_test_split(x, y, test_size=TEST, stratify=y, random_state=SPLIT_SEED)
    x, valid_x, y, valid_y = train_test_split(x, y, train_size=TRAIN, stratify=y, random_state=SPLIT_SEED)
    rng = np.random.default_rng(SPLIT_SEED)
    wrong = rng.permutation(TRAIN)[: round(noise * TRAIN)]
    y[wrong] = (y[wrong] + rng.integers(1, 10, wrong.size)) % 10
    return Data(*map(jnp.asarray, (x, y, valid_x, valid_y, test_x, test_y)))


def make_methods(config: Config) -> dict[str, Method]:
    """Return the methods by name. A radius of 0 is SGD, at the price of SGD."""
    steps = TRAIN // config.batch  # in an epoch: masks are renewed at the end of each, as in the paper
    some = ssam_jax.Unstructured(config.sparsity)
    two_of_four = ssam_jax.NM(2, 4, indivisible="whole")  # "whole": the head has 10 columns
    fisher = functools.partial(ssam_jax.fisher_mask, refresh_every=steps)
    dynamic = functools.partial(ssam_jax.dynamic_mask, refresh_every=steps, total_steps=steps * config.epochs)
    sgd, sam, ssam = (
        Settings(config.lr, config.weight_decay, rho) for rho in (0.0, config.rho_sam, config.rho_ssam)
    )
    own = Settings(config.sgd_lr, config.sgd_weight_decay, 0.0)
    share = f"{config.sparsity:.0%}"
    last_block = ssam_jax.fixed_mask(lambda path: "Dense_0" not in path)
    return {
        SGD: Method("#000000", sgd, lambda seed: None),
        TUNED: Method("#999999", own, lambda seed: None),
        SAM: Method("#E69F00", sam, lambda seed: None),
        f"SSAM Fisher {share}": Method("#0072B2", ssam, lambda seed: fisher(some, seed=seed)),
        f"SSAM dynamic {share}": Method("#009E73", ssam, lambda seed: dynamic(some, seed=seed)),
        "SSAM Fisher 2:4": Method("#CC79A7", ssam, lambda seed: fisher(two_of_four, seed=seed)),
        LAST: Method("#D55E00", sam, lambda seed: last_block, some_leaves=True),
    }


def loss_fn(model: nn.Module, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean cross-entropy in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()


def accuracy(model: nn.Module, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the share of right answers."""
    return jnp.mean(jnp.argmax(model.apply(params, x), axis=-1) == y)


def sharpness(model: nn.Module, params: Any, x: jax.Array, y: jax.Array, rho: float) -> jax.Array:
    """Return by how much the loss rises along its gradient at a distance of ``rho``, in nats."""
    loss, grads = jax.value_and_grad(loss_fn, argnums=1)(model, params, x, y)
    scale = rho / jnp.maximum(optax.tree.norm(grads), 1e-12)
    return loss_fn(model, jax.tree.map(lambda p, g: p + scale * g, params, grads), x, y) - loss


def make_trainer(config: Config, method: Method, data: Data) -> Trainer:
    """Return compiled functions that train a method."""
    model, steps = Mlp(config.width), TRAIN // config.batch
    normalize = "masked" if method.some_leaves else "global"

    def optimizer(seed: Any, chosen: Settings) -> optax.GradientTransformationExtraArgs:
        schedule = optax.cosine_decay_schedule(1.0, config.epochs * steps)
        return optax.chain(
            ssam_jax.ssam(chosen.rho if method.settings.rho else 0.0, method.mask(seed), normalize=normalize),
            optax.add_decayed_weights(chosen.weight_decay),
            optax.sgd(lambda count: chosen.lr * schedule(count), momentum=0.9),
        )

    def init(seed: jax.Array) -> Any:
        params = model.init(jax.random.key(seed), data.train_x[:1])
        return params, optimizer(seed, Settings(0.0, 0.0, 0.0)).init(params)

    two_pass = ssam_jax.two_pass_value_and_grad(functools.partial(loss_fn, model))
    active = ssam_jax.active_leaves(init(jnp.int32(0))[1]) if method.some_leaves else None

    def step(chosen: Settings, carry: Any, rows: jax.Array) -> Any:
        params, opt_state = carry
        loss, grads, grad_fn = two_pass(params, data.train_x[rows], data.train_y[rows], active=active)
        updates, opt_state = optimizer(0, chosen).update(grads, opt_state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), opt_state), loss

    def epoch(carry: Any, chosen: Settings, seed: jax.Array, number: jax.Array) -> Any:
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), number + 1), TRAIN)
        rows = order[: steps * config.batch].reshape(steps, config.batch)
        carry, losses = jax.lax.scan(functools.partial(step, chosen), carry, rows)
        return carry, (jnp.mean(losses), accuracy(model, carry[0], data.valid_x, data.valid_y))

    axes = axes_of_runs(jax.eval_shape(init, jnp.int32(0)))
    return Trainer(
        init=jax.jit(jax.vmap(init, out_axes=axes)),
        epoch=jax.jit(jax.vmap(epoch, in_axes=(axes, None, 0, None), out_axes=(axes, 0)), donate_argnums=0),
        stats=jax.jit(jax.vmap(ssam_jax.mask_stats, in_axes=(axes[1],))),
    )


def make_trainers(config: Config, data: Data) -> dict[str, Trainer]:
    """Return the trainers of all methods; the two rows of SGD share one, which takes any settings."""
    methods = make_methods(config)
    trainers = {name: make_trainer(config, method, data) for name, method in methods.items() if name != TUNED}
    return {name: trainers.get(name, trainers[SGD]) for name in methods}


def train(config: Config, trainer: Trainer, chosen: Settings, bar: tqdm) -> tuple[Any, Any, dict[str, Any]]:
    """Run all epochs of all seeds; return parameters, optimizer state and curves (epochs, seeds)."""
    seeds, losses, accuracies = jnp.arange(config.seeds), [], []
    carry = trainer.init(seeds)
    for number in range(config.epochs):
        carry, metrics = trainer.epoch(carry, chosen, seeds, number)
        loss, valid = map(np.asarray, metrics)
        losses.append(loss.tolist())
        accuracies.append(valid.tolist())
        bar.set_postfix(loss=f"{loss.mean():.3f}", valid=f"{valid.mean():.1%}", refresh=False)
        bar.update()
    return *carry, {"train_loss": losses, "valid_accuracy": accuracies}


def time_steps(config: Config, trainers: dict[str, Trainer], methods: dict[str, Method]) -> dict[str, float]:
    """Return the seconds that a step of all seeds at once takes, with its share of the mask's renewal.

    An epoch is timed at a time, the methods in turn, so that what else the machine does strikes all.
    """
    seeds, times = jnp.arange(config.seeds), {name: [] for name in trainers}
    carries = jax.block_until_ready({name: trainer.init(seeds) for name, trainer in trainers.items()})
    for turn, (name, trainer) in itertools.product(range(TIMING_ROUNDS), trainers.items()):
        start = time.perf_counter()
        carry, _ = trainer.epoch(carries[name], methods[name].settings, seeds, turn)
        carries[name] = jax.block_until_ready(carry)
        times[name].append((time.perf_counter() - start) / (TRAIN // config.batch))
    return {name: statistics.median(t) for name, t in times.items()}


def mean_std(values: Any) -> tuple[float, float]:
    """Return mean and sample standard deviation over the seeds (0 for a single seed)."""
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std(ddof=1)) if values.size > 1 else 0.0


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
    with tqdm(total=len(methods) * config.epochs, unit="epoch") as bar:
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
        " at once, renewals of the mask included."
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
    with tqdm(total=stages * config.epochs, unit="epoch") as bar:

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
    above_0, from_0 = "finite and above 0", "finite and at least 0"
    rules: dict[str, Rule] = {
        "at least 1": (lambda v: v >= 1, ("seeds", "epochs", "width")),
        f"from 1 to {TRAIN}": (lambda v: 1 <= v <= TRAIN, ("batch",)),
        "from 0 to below 1": (lambda v: 0 <= v < 1, ("noise",)),
        "from 0 to 1": (lambda v: 0 <= v <= 1, ("sparsity",)),
        from_0: (lambda v: 0 <= v < math.inf, ("weight_decay", "sgd_weight_decay")),
        above_0: (lambda v: 0 < v < math.inf, ("lr", "sgd_lr", "rho_sam", "rho_ssam", "rho_sharpness")),
    }
    check_ranges(config, rules)


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
