"""One small network with BatchNorm and dropout, three times: in Linen, in NNX and written by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ssam_jax
from ssam_jax import NM

# Compiled without optimisations: nothing here runs often.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False},
)
CLASSES, CHANNELS = 4, 8


def wave(*shape, step=1.0):
    return np.sin(step * np.arange(1, np.prod(shape) + 1, dtype=np.float32) ** 1.5).reshape(shape)


PARAMS = {
    "conv": {"kernel": wave(2, 2, 2, CHANNELS)},
    "head": {"bias": wave(CLASSES, step=0.1), "kernel": wave(CHANNELS, CLASSES, step=0.3)},
    "norm": {"bias": wave(CHANNELS, step=0.2), "scale": 1 + wave(CHANNELS) / 4},
}
STATS = {"norm": {"mean": np.zeros(CHANNELS, np.float32), "var": np.ones(CHANNELS, np.float32)}}
IMAGES, LABELS = wave(3, 8, 4, 4, 2, step=0.7), np.arange(24).reshape(3, 8) % CLASSES
BATCHES = list(zip(jnp.array(IMAGES), jnp.array(LABELS)))
HEAD = ssam_jax.fixed_mask(lambda path: path in ("head/bias", "head/kernel"))

TRANSFORMATIONS = {
    "SAM": lambda: ssam_jax.ssam(0.1),
    "Fisher mask": lambda: ssam_jax.ssam(0.1, ssam_jax.fisher_mask(NM(2, 4), refresh_every=1)),
    "the head alone, twice": lambda: ssam_jax.ssam(0.1, HEAD, normalize="masked", ascent_steps=2),
}


def chain(name="SAM"):
    return optax.chain(TRANSFORMATIONS[name](), optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9))


def params():
    return jax.tree.map(jnp.array, PARAMS)


def stats():
    return jax.tree.map(jnp.array, STATS)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class LinenNet(nn.Module):
    rate: float = 0.5

    @nn.compact
    def __call__(self, images, train=True):
        x = nn.Conv(CHANNELS, (2, 2), use_bias=False, name="conv")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Dropout(self.rate, deterministic=not train)(x.mean(axis=(1, 2)))
        return nn.Dense(CLASSES, name="head")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs, rate=0.5):
        zeros = nnx.initializers.zeros_init()  # quick to compile
        self.conv = nnx.Conv(2, CHANNELS, (2, 2), use_bias=False, kernel_init=zeros, rngs=rngs)
        self.norm = nnx.BatchNorm(CHANNELS, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(CHANNELS, CLASSES, kernel_init=zeros, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.conv(images))).mean(axis=(1, 2))
        return self.head(self.dropout(x))


def nnx_net(rate=0.5):
    """Return a network with the parameters above."""
    model = NnxNet(nnx.Rngs(0), rate)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params())))
    return model


def loss_by_hand(params, stats, images, labels):
    """Return the loss without dropout, and the new statistics."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        images, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=dimensions
    )
    mean = x.mean((0, 1, 2), keepdims=True)
    var = jnp.square(x).mean((0, 1, 2), keepdims=True) - jnp.square(mean)
    now = {"norm": {"mean": mean.reshape(-1), "var": var.reshape(-1)}}
    norm = jax.tree.map(lambda p: p.reshape(mean.shape), params["norm"])
    x = (x - mean) * (jax.lax.rsqrt(var + 1e-5) * norm["scale"]) + norm["bias"]
    logits = jax.nn.relu(x).mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"][None]
    new = jax.tree.map(lambda old, now: 0.99 * old + 0.01 * now, stats, now)
    return cross_entropy(logits, labels), new


def train_by_hand(tx, loss_fn, batches, params, aux):
    """Return parameters and aux after a step on each batch.

    ``loss_fn(params, aux, i, *batch)`` returns the loss and the next aux, such as batch statistics.
    """

    @quick_jit
    def step(params, opt_state, aux, i, batch):
        def grad_fn(params, _):
            return jax.grad(loss_fn, has_aux=True)(params, aux, i, *batch)

        grads, new = grad_fn(params, 0)
        updates, opt_state = tx.update(
            grads, opt_state, params, grad_fn=lambda params, step: grad_fn(params, step)[0]
        )
        return optax.apply_updates(params, updates), opt_state, new

    opt_state = quick_jit(tx.init)(params)
    for i, batch in enumerate(batches):
        params, opt_state, aux = step(params, opt_state, aux, i, batch)
    return params, aux
