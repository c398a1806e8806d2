"""Small losses whose steps are counted, each with the shapes of its parameters and of its batch."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def mlp(params, x):
    for name in ("a", "b", "c"):
        x = jnp.tanh(x @ params[name])
    return jnp.sum(x**2)


SQUARES = {name: shape(32, 32) for name in ("a", "b", "c")}
ROWS = shape(8, 32)


def convolutional(params, x):
    conv = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jax.nn.relu(conv(x, params["a"], (1, 1), "SAME"))
    x = jax.nn.relu(conv(x, params["b"], (2, 2), "SAME", feature_group_count=2))
    x = jax.nn.relu(conv(x, params["c"], (1, 1), "VALID", rhs_dilation=(2, 2)))
    return jnp.mean(jax.nn.logsumexp(x.mean((1, 2)) @ params["d"], -1))


KERNELS = {"a": shape(3, 3, 4, 8), "b": shape(3, 3, 4, 16), "c": shape(3, 3, 16, 16), "d": shape(16, 10)}


def block(params, x):
    return x + jnp.tanh(x @ params["in"]) @ params["out"]


def blocks(params, x, policy=None):
    for name in ("one", "two", "three"):
        x = jax.checkpoint(block, policy=policy)(params[name], x)
    return jnp.sum(jnp.tanh(x @ params["head"]) ** 2)


BLOCKS = {
    **{name: {"in": shape(32, 64), "out": shape(64, 32)} for name in ("one", "two", "three")},
    "head": shape(32, 16),
}


def scanned(params, x, layer=block):
    x, _ = lax.scan(lambda x, layers: (layer(layers, x), None), x @ params["embed"], params["layers"])
    return jnp.sum(jnp.tanh(x @ params["head"]) ** 2)


def unrolled(params, x):
    x = x @ params["embed"]
    for i in range(4):
        x = block({name: leaf[i] for name, leaf in params["layers"].items()}, x)
    return jnp.sum(jnp.tanh(x @ params["head"]) ** 2)


STACKED = {
    "embed": shape(32, 32),
    "head": shape(32, 16),
    "layers": {"in": shape(4, 32, 64), "out": shape(4, 64, 32)},
}


@jax.custom_vjp
def own_product(x, w):
    return x @ w


own_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@jax.custom_jvp
def own_layer(x, w):
    return jnp.tanh(x @ w)


@own_layer.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    y = jnp.tanh(x @ w)
    return y, (1 - y * y) * (dx @ w + x @ dw)


def custom(params, x):
    x = own_product(jnp.tanh(x @ params["a"]), params["b"])
    return jnp.sum(own_layer(x, params["c"]) ** 2)


def branching(params, x):
    x = jnp.tanh(x @ params["a"])

    def deep(x):
        return jnp.tanh(jnp.tanh(x @ params["b"]) @ params["b"])

    x = lax.cond(x[0, 0] > 0, deep, lambda x: 2 * x, x)
    return jnp.sum((x @ params["c"]) ** 2)


def microbatches(params, x):
    return lax.scan(lambda total, rows: (total + mlp(params, rows), None), jnp.zeros(()), x)[0]


def attention(params, x):
    q, k, v = (jnp.einsum("bsd,de->bse", x, params[name]) for name in "qkv")
    x = x + jax.nn.softmax(q @ k.mT) @ v
    return jnp.sum(jnp.tanh(x @ params["w"]) ** 2)


def detached(params, x):
    return mlp(params, lax.stop_gradient(x @ params["a"]))


def with_metrics(params, x):
    logits = jnp.tanh(x @ params["a"]) @ params["b"]
    return jnp.sum(logits**2), jnp.tanh(logits @ params["c"])


save_products = functools.partial(blocks, policy=jax.checkpoint_policies.dots_saveable)
recomputed = functools.partial(scanned, layer=jax.checkpoint(block, prevent_cse=False))

LOSSES = {
    "mlp": (mlp, SQUARES, ROWS),
    "convolutional": (convolutional, KERNELS, shape(4, 16, 16, 4)),
    "checkpoint": (blocks, BLOCKS, ROWS),
    "checkpoint that saves products": (save_products, BLOCKS, ROWS),
    "scan": (scanned, STACKED, ROWS),
    "scan of checkpoints": (recomputed, STACKED, ROWS),
    "unrolled": (unrolled, STACKED, ROWS),
    "custom rules": (custom, SQUARES, ROWS),
    "cond": (branching, SQUARES, ROWS),
    "microbatches": (microbatches, SQUARES, shape(3, 8, 32)),
    "attention": (attention, {name: shape(32, 32) for name in "qkvw"}, shape(2, 16, 32)),
    "stop_gradient": (detached, SQUARES, ROWS),
    "aux": (with_metrics, SQUARES, ROWS),
}
