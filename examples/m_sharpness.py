"""One perturbation for the batch, or one for each device, on several devices (here virtual ones of a CPU).

If every device takes the ascent gradient of its own part of the batch, a perturbation is found for
``m = batch / devices`` examples at a time (m-sharpness, arXiv 2010.01412), and one of the two all-reduces of
a step is gone. docs/m_sharpness.md explains the pattern, ``python -m ssam_experiments.m_sharpness`` compares
both modes over seeds and radii.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import ssam_jax


@dataclasses.dataclass(frozen=True)
class Config:
    """Train on handwritten digits with synchronized and with per-device sparse SAM; print a table."""

    devices: int = 8
    """Devices that share a batch."""
    epochs: int = 20
    """Passes over the training examples."""
    batch: int = 64
    """Examples in a mini-batch, a multiple of the devices."""
    rho: float = 0.1
    """Radius of the perturbation."""
    seed: int = 0
    """Seed of the initialization, the batches and the first mask."""


def init_params(key: jax.Array) -> dict[str, jax.Array]:
    """Return a network with one hidden layer."""
    first, second = jax.random.split(key)
    kernels = jax.random.normal(first, (64, 64)) / 8, jax.random.normal(second, (64, 12)) / 8
    return {"kernel_1": kernels[0], "bias_1": jnp.zeros(64), "kernel_2": kernels[1]}


def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Return logits of shape (examples, 12), of which the digits are the first ten."""
    return jax.nn.relu(x @ params["kernel_1"] + params["bias_1"]) @ params["kernel_2"]


def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean cross-entropy in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


def synchronized_step(tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """Return the ordinary step: where the batch lies is the compiler's business."""

    def step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
        grad_fn = lambda point, i: jax.grad(loss_fn)(point, x, y)  # noqa: E731
        updates, opt_state = tx.update(grad_fn(params, 0), opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    return step


def per_device_step(tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """Return a step for ``shard_map``: each device perturbs by its own part of the batch."""

    def own(params: Any) -> Any:
        """Each device's own copy of the parameters: JAX does not sum its gradient over the devices."""
        if hasattr(jax.lax, "pcast"):
            return jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
        return jax.tree.map(lambda p: jax.lax.pvary(p, "data"), params)

    def step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
        grads = jax.grad(loss_fn)(own(params), x, y)  # local, not averaged

        def grad_fn(point: Any, i: int) -> Any:  # at this device's w + eps
            return jax.lax.pmean(jax.grad(loss_fn)(point, x, y), "data")

        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    return step


def train(config: Config, step: Callable[..., Any], tx: Any, mesh: Mesh, x: Any, y: Any) -> Any:
    """Return the parameters after all epochs."""
    by_example, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=everywhere)
    params = init_params(jax.random.key(config.seed))
    params, opt_state = jax.device_put((params, tx.init(params)), everywhere)
    rng = np.random.default_rng(config.seed)
    for _ in range(config.epochs):
        order = rng.permutation(len(y))
        for start in range(0, len(order) - config.batch + 1, config.batch):
            rows = order[start : start + config.batch]
            params, opt_state = step(params, opt_state, *jax.device_put((x[rows], y[rows]), by_example))
        jax.block_until_ready(params)  # a CPU runs out of threads if many collectives wait in line
    return jax.device_get(params)


def main(config: Config) -> None:
    """Train with both steps, and print the table.

    Raises:
      ValueError: ``epochs`` or ``devices`` is below 1, or the devices do not divide the batch.
    """
    if min(config.epochs, config.devices) < 1:
        raise ValueError(f"epochs and devices must be at least 1, got {config.epochs} and {config.devices}.")
    if config.batch < 1 or config.batch % config.devices:
        raise ValueError(f"batch must be a multiple of devices, {config.devices}, got {config.batch}.")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", config.devices)
    mesh = Mesh(np.array(jax.devices()[: config.devices]), ("data",))
    x, y = load_digits(return_X_y=True)
    split = train_test_split((x / 16).astype(np.float32), y.astype(np.int32), test_size=500, random_state=0)
    train_x, test_x, train_y, test_y = split
    mask = ssam_jax.fisher_mask(ssam_jax.NM(2, 4), refresh_every=len(train_y) // config.batch)
    tx = optax.chain(ssam_jax.ssam(config.rho, mask), optax.sgd(0.05, momentum=0.9))
    specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": P()}
    steps = {
        "synchronized": (config.batch, synchronized_step(tx)),
        "per device": (
            config.batch // config.devices,
            jax.shard_map(per_device_step(tx), mesh=mesh, **specs),
        ),
    }
    print("| perturbation | m | test accuracy, % |\n| --- | ---: | ---: |")
    for name, (m, step) in steps.items():
        params = train(config, step, tx, mesh, train_x, train_y)
        accuracy = np.mean(np.argmax(apply(params, test_x), axis=-1) == test_y)
        print(f"| {name} | {m} | {100 * accuracy:.1f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
