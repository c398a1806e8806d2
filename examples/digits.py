"""SGD, SAM and sparse SAM on scikit-learn's handwritten digits, many of whose training labels are wrong.

With wrong labels SAM's effect is plain: SGD memorizes them, and its test accuracy falls. One seed takes a
few seconds for each method. ``python -m ssam_experiments.demo`` compares more methods over several seeds.
"""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ssam_jax


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a small network on noisy digits with SGD, SAM and sparse SAM; print a table, draw a picture."""

    epochs: int = 100
    """Passes over the training examples."""
    batch: int = 64
    """Examples in a mini-batch."""
    noise: float = 0.4
    """Share of the training examples whose label is replaced by another."""
    lr: float = 0.05
    """Peak learning rate, of a cosine schedule down to 0."""
    weight_decay: float = 5e-4
    """Weight decay."""
    rho: float = 0.6
    """Radius of the perturbation."""
    sparsity: float = 0.5
    """Share of the parameters that sparse SAM leaves unperturbed."""
    seed: int = 0
    """Seed of the noise, the initialization, the batches and the first mask."""
    out: pathlib.Path = pathlib.Path("outputs/digits.png")
    """File for the picture of test accuracy by epoch."""


class Data(NamedTuple):
    """Images, float32 of shape (examples, 64), and labels; only the training labels are noisy."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


class Mlp(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits of shape (examples, 10)."""
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


def load_data(noise: float, seed: int) -> Data:
    """Split the digits, and replace a share of the training labels."""
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=500, stratify=y, random_state=0)
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(len(train_y))[: round(noise * len(train_y))]
    train_y[wrong] = (train_y[wrong] + rng.integers(1, 10, wrong.size)) % 10
    return Data(train_x, train_y, test_x, test_y)


def make_optimizers(config: Config, steps_per_epoch: int) -> dict[str, optax.GradientTransformationExtraArgs]:
    """Return the optimizers by name. They differ in one line of their chain; a radius of 0 is SGD."""
    schedule = optax.cosine_decay_schedule(config.lr, config.epochs * steps_per_epoch)
    half = ssam_jax.Unstructured(config.sparsity)
    mask = ssam_jax.fisher_mask(half, refresh_every=steps_per_epoch, seed=config.seed)
    first = {
        "SGD": ssam_jax.ssam(0.0),
        "SAM": ssam_jax.ssam(config.rho),
        f"SSAM Fisher {config.sparsity:.0%}": ssam_jax.ssam(config.rho, mask),
    }
    rest = (optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, momentum=0.9))
    return {name: optax.chain(ssam, *rest) for name, ssam in first.items()}


def train(
    config: Config, tx: optax.GradientTransformationExtraArgs, data: Data
) -> tuple[list[float], ssam_jax.MaskStats]:
    """Return the test accuracy after each epoch, and the density of the last mask."""
    model = Mlp()

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        grad_fn = lambda params, i: jax.grad(loss_fn)(params, x, y)  # noqa: E731
        updates, opt_state = tx.update(grad_fn(params, 0), opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    predict = jax.jit(lambda params: model.apply(params, data.test_x).argmax(axis=-1))
    params = model.init(jax.random.key(config.seed), data.train_x[:1])
    opt_state, rng, accuracies = tx.init(params), np.random.default_rng(config.seed), []
    for _ in range(config.epochs):
        order = rng.permutation(len(data.train_y))
        for start in range(0, len(order) - config.batch + 1, config.batch):
            rows = order[start : start + config.batch]
            params, opt_state = step(params, opt_state, data.train_x[rows], data.train_y[rows])
        accuracies.append(float(np.mean(predict(params) == data.test_y)))
    return accuracies, ssam_jax.mask_stats(opt_state)


def check(config: Config, examples: int) -> None:
    """Raise ValueError, naming the setting, unless all are in range."""
    if config.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {config.epochs}.")
    if not 1 <= config.batch <= examples:
        raise ValueError(f"batch must be from 1 to {examples}, got {config.batch}.")
    if not 0 <= config.noise <= 1:
        raise ValueError(f"noise must be from 0 to 1, got {config.noise}.")


def main(config: Config) -> None:
    """Train with each optimizer; print a table, and draw the test accuracies."""
    data = load_data(config.noise, config.seed)
    check(config, len(data.train_y))
    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    axes.set(xlabel="epoch", ylabel="test accuracy, %")
    print("| method | test accuracy, % | perturbed, % |\n| --- | ---: | ---: |")
    for name, tx in make_optimizers(config, len(data.train_y) // config.batch).items():
        accuracies, stats = train(config, tx, data)
        density = 0.0 if name == "SGD" else 100 * float(stats.density)
        print(f"| {name} | {100 * accuracies[-1]:.1f} | {density:.1f} |", flush=True)
        axes.plot(range(1, config.epochs + 1), [100 * a for a in accuracies], label=name)
    axes.legend(frameon=False)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(config.out, dpi=150)
    print(f"\n{config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
