"""A small network on scikit-learn's digits with noisy training labels, all seeds of a method at once.

With noisy labels SAM's effect is plain: in a long training SGD memorizes them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import ssam_jax
from ssam_experiments.many_runs import axes_of_runs
from ssam_experiments.ranges import Rule, check_ranges

TRAIN, TEST = 1024, 500  # the other 273 examples are for validation
SPLIT_SEED = 0  # of the split and of the label noise, the same for every run
SGD, TUNED, SAM, LAST = "SGD", "SGD, tuned alone", "SAM", "SAM, last block"


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a training on noisy digits."""

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
    """A row of the table: its color, its settings, and its mask rule as a function of a seed.

    ``some_leaves`` says that the mask never changes, and perturbs each leaf entirely or not at all. Then only
    the perturbed leaves need an ascent gradient.
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
    steps = TRAIN // config.batch  # in an epoch: masks are refreshed at the end of each, as in the paper
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
    logits: Any = model.apply(params, x)
    return jnp.mean(jnp.argmax(logits, axis=-1) == y)


def make_trainer(config: Config, method: Method, data: Data) -> Trainer:
    """Return compiled functions that train a method."""
    model, steps = Mlp(config.width), TRAIN // config.batch
    normalize: Literal["masked", "global"] = "masked" if method.some_leaves else "global"

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


def check(config: Config) -> None:
    """Raise ValueError, naming the setting, unless all are in range."""
    above_0, from_0 = "finite and above 0", "finite and at least 0"
    rules: dict[str, Rule] = {
        "at least 1": (lambda v: v >= 1, ("seeds", "epochs", "width")),
        f"from 1 to {TRAIN}": (lambda v: 1 <= v <= TRAIN, ("batch",)),
        "from 0 to below 1": (lambda v: 0 <= v < 1, ("noise",)),
        "from 0 to 1": (lambda v: 0 <= v <= 1, ("sparsity",)),
        from_0: (lambda v: 0 <= v < math.inf, ("weight_decay", "sgd_weight_decay")),
        above_0: (lambda v: 0 < v < math.inf, ("lr", "sgd_lr", "rho_sam", "rho_ssam")),
    }
    check_ranges(config, rules)
