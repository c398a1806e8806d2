"""Synchronized and per-device SAM on handwritten digits: one perturbation for the batch, or one a device.

Where every device takes the ascent gradient of its own part of the batch, the perturbation is found for
``m = batch / devices`` examples at a time, which Foret et al. (arXiv 2010.01412) call m-sharpness, and one of
the two all-reduces of a step falls away. docs/m_sharpness.md explains the pattern.

Data and network are those of `noisy_digits`. On a CPU the command makes as many virtual devices as it needs;
on other hardware it takes the devices there are.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import ssam_jax
from ssam_experiments import noisy_digits
from ssam_experiments.many_runs import axes_of_runs
from ssam_experiments.ranges import Rule, check_ranges
from ssam_experiments.report import mean_std

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare SGD, synchronized SAM and per-device SAM; print a table."""

    devices: int = 8
    """Devices that share a batch."""
    seeds: int = 5
    """Runs of each method, all at once; they differ in initialization, batch order and first mask."""
    epochs: int = 30
    """Passes over the 1024 training examples."""
    batch: int = 64
    """Examples in a mini-batch, a multiple of the devices."""
    width: int = 64
    """Units in each of the two hidden layers."""
    noise: float = 0.4
    """Share of the training examples whose label is wrong."""
    lr: float = 0.05
    """Peak learning rate, of a cosine schedule down to 0."""
    weight_decay: float = 5e-3
    """Weight decay."""
    rhos: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Radii tried for each method that has one; the best on the validation examples is shown."""


class Row(NamedTuple):
    """A row of the table: examples to a perturbation, radius, and accuracies of shape (seeds,)."""

    name: str
    m: int
    rho: float
    valid: np.ndarray
    test: np.ndarray


class Method(NamedTuple):
    """Whether each device makes its own perturbation, the mask rule, and whether there is a perturbation."""

    per_device: bool
    mask: ssam_jax.MaskRule | None = None
    perturbed: bool = True


def varying(tree: Any, axis: str) -> Any:
    """Return a copy of replicated arrays that counts as each device's own, inside ``shard_map``.

    The gradient with respect to replicated parameters is the sum over the devices, and JAX adds it up
    unasked; with respect to such a copy it stays the device's own.
    """
    if hasattr(jax.lax, "pcast"):
        return jax.tree.map(lambda x: jax.lax.pcast(x, axis, to="varying"), tree)
    return jax.tree.map(lambda x: jax.lax.pvary(x, axis), tree)  # type: ignore[attr-defined]


def averaged(grad_fn: ssam_jax.TwoPassGradFn, axis: str) -> ssam_jax.TwoPassGradFn:
    """Return ``grad_fn`` with the mean over the devices for its result; further ascent steps stay local."""
    own: Any = grad_fn  # a protocol cannot tell that it is a dataclass
    return dataclasses.replace(own, value_and_grad=lambda p, i: jax.lax.pmean(own.value_and_grad(p, i), axis))


def per_device_step(
    loss_fn: Callable[..., jax.Array],
    tx: optax.GradientTransformationExtraArgs,
    axis: str = AXIS,
    active: Any = None,
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """Return a step to be mapped over devices, each of which perturbs by its own part of the batch.

    Args:
      loss_fn: ``loss_fn(params, *part)``, the mean over a part of the batch.
      tx: a chain that starts with `ssam_jax.ssam`.
      axis: the mesh axis over which the batch is spread.
      active: which leaves are perturbed at all, for `ssam_jax.two_pass_value_and_grad`.

    Returns:
      ``step(params, opt_state, *part) -> (params, opt_state, loss)``; parameters and state are replicated.
    """
    two_pass = ssam_jax.two_pass_value_and_grad(loss_fn)

    def step(params: Any, opt_state: Any, *part: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads, grad_fn = two_pass(varying(params, axis), *part, active=active)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=averaged(grad_fn, axis))
        return optax.apply_updates(params, updates), opt_state, jax.lax.pmean(loss, axis)

    return step


def synchronized_step(
    loss_fn: Callable[..., jax.Array], tx: optax.GradientTransformationExtraArgs
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """Return the ordinary step, on a batch that may be spread over devices; like `per_device_step`."""

    def step(params: Any, opt_state: Any, *batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        grad_fn = lambda params, i: jax.grad(loss_fn)(params, *batch)  # noqa: E731
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def make_methods(config: Config) -> dict[str, Method]:
    """Return the rows of the table by name."""
    two_of_four = ssam_jax.NM(2, 4, indivisible="whole")  # "whole": the head has 10 columns
    fisher = ssam_jax.fisher_mask(two_of_four, refresh_every=noisy_digits.TRAIN // config.batch)
    return {
        "SGD": Method(False, perturbed=False),
        "SAM, synchronized": Method(False),
        "SAM, per device": Method(True),
        "SSAM Fisher 2:4, synchronized": Method(False, fisher),
        "SSAM Fisher 2:4, per device": Method(True, fisher),
    }


def make_trainer(config: Config, method: Method, data: noisy_digits.Data, mesh: Mesh) -> Callable[..., Any]:
    """Return a function of a bar that trains all radii and seeds at once.

    It returns the radii, and the parameters with a leading axis of radii times seeds.
    """
    model, steps = noisy_digits.Mlp(config.width), noisy_digits.TRAIN // config.batch
    loss_fn = functools.partial(noisy_digits.loss_fn, model)
    schedule = optax.cosine_decay_schedule(config.lr, config.epochs * steps)
    radii = config.rhos if method.perturbed else (0.0,)

    def optimizer(rho: Any) -> optax.GradientTransformationExtraArgs:
        return optax.chain(
            ssam_jax.ssam(rho if method.perturbed else 0.0, method.mask),
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(schedule, momentum=0.9),
        )

    def init(seed: jax.Array) -> Any:
        params = model.init(jax.random.key(seed), jnp.zeros((1, 64)))
        return params, optimizer(0.0).init(params)

    def epoch(carry: Any, rho: jax.Array, x: jax.Array, y: jax.Array, rows: jax.Array) -> Any:
        make = per_device_step if method.per_device else synchronized_step
        step = make(loss_fn, optimizer(rho))

        def body(carry: Any, rows: jax.Array) -> Any:
            params, opt_state, loss = step(*carry, x[rows], y[rows])
            return (params, opt_state), loss

        return jax.lax.scan(body, carry, rows)

    axes = axes_of_runs(jax.eval_shape(init, jnp.int32(0)))
    everywhere, by_example = PartitionSpec(), PartitionSpec(None, None, AXIS)
    epochs = jax.vmap(epoch, in_axes=(axes, 0, None, None, 0), out_axes=(axes, 0))
    if method.per_device:
        specs = (everywhere, everywhere, everywhere, everywhere, by_example)
        epochs = jax.shard_map(epochs, mesh=mesh, in_specs=specs, out_specs=everywhere)
    replicated = NamedSharding(mesh, everywhere)
    train_epoch = jax.jit(epochs, donate_argnums=0, out_shardings=replicated)
    start = jax.jit(jax.vmap(init, out_axes=axes), out_shardings=replicated)

    def train(bar: tqdm) -> tuple[Sequence[float], Any]:
        carry = start(jnp.tile(jnp.arange(config.seeds), len(radii)))
        rhos, x, y = jax.device_put(
            (jnp.repeat(jnp.array(radii), config.seeds), data.train_x, data.train_y), replicated
        )
        for number in range(config.epochs):
            rows = np.tile(draw(config, number), (len(radii), 1, 1))
            carry, losses = train_epoch(
                carry, rhos, x, y, jax.device_put(rows, NamedSharding(mesh, by_example))
            )
            losses.block_until_ready()  # a CPU runs out of threads if many collectives wait in line
            bar.update()
        return radii, jax.device_get(carry[0])

    return train


def draw(config: Config, number: int) -> np.ndarray:
    """Return the examples of an epoch, int32 of shape (seeds, steps, batch), the same for every method."""
    steps = noisy_digits.TRAIN // config.batch
    orders = [
        np.random.default_rng((seed, number)).permutation(noisy_digits.TRAIN) for seed in range(config.seeds)
    ]
    return np.stack(orders)[:, : steps * config.batch].reshape(-1, steps, config.batch).astype(np.int32)


def compare(config: Config, mesh: Mesh) -> list[Row]:
    """Train every method with every radius; return the row of each with its best radius."""
    data, model, best = noisy_digits.load_data(config.noise), noisy_digits.Mlp(config.width), []
    accuracy = jax.jit(jax.vmap(functools.partial(noisy_digits.accuracy, model), in_axes=(0, None, None)))
    methods = make_methods(config)
    with tqdm(total=len(methods) * config.epochs, unit="epoch", disable=None) as bar:
        for name, method in methods.items():
            bar.set_description(name)
            radii, params = make_trainer(config, method, data, mesh)(bar)
            shape = (len(radii), config.seeds)
            valid = np.asarray(accuracy(params, data.valid_x, data.valid_y)).reshape(shape)
            test = np.asarray(accuracy(params, data.test_x, data.test_y)).reshape(shape)
            chosen = int(valid.mean(axis=1).argmax())
            m = config.batch // config.devices if method.per_device else config.batch
            best.append(Row(name, m, radii[chosen], valid[chosen], test[chosen]))
    return best


def table(rows: Sequence[Row], config: Config) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| method | m | rho | validation accuracy, % | test accuracy, % |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        valid, test = (
            f"{100 * mean:.1f} ± {100 * std:.1f}" for mean, std in map(mean_std, (row.valid, row.test))
        )
        radius = f"{row.m} | {row.rho}" if row.rho else " | "
        lines.append(f"| {row.name} | {radius} | {valid} | {test} |")
    notes = (
        f"Mean ± standard deviation over {config.seeds} seeds, after {config.epochs} epochs with"
        f" {config.noise:.0%} of the training labels wrong, on {config.devices} devices; m examples to a"
        f" perturbation. Each rho is the best of {', '.join(map(str, config.rhos))} on the validation"
        " examples."
    )
    return "\n".join(lines) + f"\n\n{notes}\n"


def check(config: Config) -> None:
    """Raise ValueError, naming the setting, unless all are in range."""
    rules: dict[str, Rule] = {
        "at least 1": (lambda v: v >= 1, ("devices", "seeds", "epochs", "width")),
        "from 0 to below 1": (lambda v: 0 <= v < 1, ("noise",)),
        "finite and above 0": (lambda v: 0 < v < np.inf, ("lr",)),
        "finite and at least 0": (lambda v: 0 <= v < np.inf, ("weight_decay",)),
    }
    check_ranges(config, rules)
    if not 1 <= config.batch <= noisy_digits.TRAIN or config.batch % config.devices:
        raise ValueError(
            f"batch must be a multiple of devices, {config.devices}, and at most {noisy_digits.TRAIN},"
            f" got {config.batch}."
        )
    if not config.rhos or not all(0 < rho < np.inf for rho in config.rhos):
        raise ValueError(f"rhos must hold finite numbers above 0, got {config.rhos}.")


def main(config: Config) -> None:
    """Print the table.

    Raises:
      ValueError: a setting is out of range, or there are fewer devices than asked for.
    """
    check(config)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", config.devices)
    if len(jax.devices()) < config.devices:
        raise ValueError(
            f"devices must be at most {len(jax.devices())}, what there is, got {config.devices}."
        )
    mesh = Mesh(np.array(jax.devices()[: config.devices]), (AXIS,))
    print(table(compare(config, mesh), config))


if __name__ == "__main__":
    main(tyro.cli(Config))
