"""A character-level transformer on the standard library's documentation, with masks that choose layers.

The layers are one ``lax.scan`` of rematerialized blocks over stacked parameters, so
``Structured(..., "channel", axis=0)`` chooses layers. Parameters, optimizer state and batch are spread over
all devices (FSDP). ``python -m ssam_experiments.language_model`` compares AdamW, SAM and sparse SAM.
"""

import ast
import dataclasses
import functools
import math
import pathlib
import sysconfig
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ssam_jax

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a small language model with sparse SAM on AdamW; print the loss, and the layers of the mask."""

    steps: int = 200
    """Training steps."""
    batch: int = 16
    """Sequences in a step, a multiple of the devices."""
    context: int = 64
    """Characters of a sequence."""
    width: int = 64
    """Width of the residual stream, a multiple of 4."""
    layers: int = 4
    """Layers of the stack."""
    rho: float = 0.05
    """Radius of the perturbation."""
    seed: int = 0
    """Seed of the initialization and the batches."""


def read_text() -> np.ndarray:
    """Return the documentation strings of the standard library's modules, as indices into `CHARACTERS`."""
    strings = []
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings += [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
    index = {character: i for i, character in enumerate(CHARACTERS)}
    return np.array([index[c] for c in "\n\n".join(strings).expandtabs() if c in index], np.int32)


def init_params(config: Config, key: jax.Array) -> Any:
    """Return the parameters; those of the layers have a leading axis of layers, and start as the identity."""
    width, layers, keys = config.width, config.layers, iter(jax.random.split(key, 4))

    def normal(*shape: int) -> jax.Array:
        return shape[-2] ** -0.5 * jax.random.normal(next(keys), shape)

    return {
        "embed": width**0.5 * normal(len(CHARACTERS), width),
        "layers": {
            "attention": normal(layers, width, 3 * width),
            "attention_out": jnp.zeros((layers, width, width)),
            "perceptron": normal(layers, width, 4 * width),
            "perceptron_out": jnp.zeros((layers, 4 * width, width)),
        },
        "head": normal(width, len(CHARACTERS)),
    }


def apply(params: Any, tokens: jax.Array) -> jax.Array:
    """Return logits of shape (sequences, characters, vocabulary) for tokens (sequences, characters)."""
    position = jnp.arange(tokens.shape[1], dtype=jnp.float32)
    slopes = 4.0 ** -jnp.arange(4, dtype=jnp.float32)  # of the heads, which prefer what is near (ALiBi)
    bias = -slopes[None, :, None, None] * (position[:, None] - position[None])[None, None]

    def normed(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    @jax.checkpoint
    def block(x: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        qkv = (normed(x) @ layer["attention"]).reshape(*x.shape[:2], 12, -1)
        attended = jax.nn.dot_product_attention(*jnp.split(qkv, 3, axis=2), bias, is_causal=True)
        x = x + attended.reshape(x.shape) @ layer["attention_out"]
        return x + jax.nn.gelu(normed(x) @ layer["perceptron"]) @ layer["perceptron_out"], None

    x, _ = jax.lax.scan(block, params["embed"][tokens], params["layers"])
    return normed(x) @ params["head"]


def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
    """Return the mean cross-entropy in bits per character."""
    logits, labels = apply(params, tokens[:, :-1]), tokens[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean() / math.log(2)


def sharding(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Split the last axis, if the devices divide it; scores and momentum lie as their parameter does."""
    if not leaf.ndim or leaf.shape[-1] % mesh.size:
        return NamedSharding(mesh, P())
    return NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "data"))


def main(config: Config) -> None:
    """Train, and print the loss and the layers that the last mask perturbs; ValueError for a bad setting."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, P("data"))
    for name, divisor in (("batch", mesh.size), ("width", 4)):
        if getattr(config, name) < 1 or getattr(config, name) % divisor:
            raise ValueError(f"{name} must be a multiple of {divisor}, got {getattr(config, name)}.")
    mask = ssam_jax.fisher_mask(ssam_jax.Structured(0.5, "channel", axis=0), refresh_every=25)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, config.steps // 10, config.steps)
    tx = optax.chain(ssam_jax.ssam(config.rho, mask), optax.adamw(schedule, weight_decay=0.1))

    def init(key: jax.Array) -> tuple[Any, Any]:
        params = init_params(config, key)
        return params, tx.init(params)

    key = jax.random.key(config.seed)
    places = jax.tree.map(functools.partial(sharding, mesh), jax.eval_shape(init, key))
    params, opt_state = jax.jit(init, out_shardings=places)(key)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*places, None))
    def step(params: Any, opt_state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        grad_fn = lambda params, i: jax.grad(loss_fn)(params, tokens)  # noqa: E731
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state, loss

    text, rng = read_text(), np.random.default_rng(config.seed)
    for number in range(1, config.steps + 1):
        starts = rng.integers(len(text) - config.context, size=(config.batch, 1))
        tokens = jax.device_put(text[starts + np.arange(config.context + 1)], rows)
        params, opt_state, loss = step(params, opt_state, tokens)
        if number % max(1, config.steps // 10) == 0:
            print(f"step {number}: {loss:.3f} bits per character", flush=True)
    for name, chosen in ssam_jax.get_mask(opt_state)["layers"].items():
        print(f"{name}: layers {np.flatnonzero(chosen).tolist()}")


if __name__ == "__main__":
    main(tyro.cli(Config))
