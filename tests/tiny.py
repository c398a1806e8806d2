"""A two-layer network small enough to compile in a blink, and what most tests do with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

PARAMS = {
    "first": {
        "bias": np.linspace(-0.5, 0.4, 4, dtype=np.float32),
        "kernel": np.sin(np.arange(1, 17, dtype=np.float32)).reshape(4, 4),
    },
    "second": {"kernel": np.cos(np.arange(1, 33, dtype=np.float32)).reshape(4, 8)},
}
BATCHES = np.sin(np.arange(1, 20 * 3 * 4 + 1, dtype=np.float32) ** 2).reshape(20, 3, 4)


def params():
    """Return fresh arrays, which a test may donate."""
    return jax.tree.map(jnp.array, PARAMS)


def loss(params, batch):
    hidden = jnp.tanh(batch @ params["first"]["kernel"] + params["first"]["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["second"]["kernel"] - 1))


def grad_fn_of(batch):
    return lambda params, i: jax.grad(loss)(params, batch)


def step_of(tx, **extra):
    """Return ``step(params, state, batch) -> (params, state)``."""

    def step(params, state, batch):
        grad_fn = grad_fn_of(batch)
        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn, **extra)
        return optax.apply_updates(params, updates), state

    return step


def may_promote(optimizer):
    """Let an optimizer of optax, but not this library, promote dtypes: Adam raises floats to ints."""

    def update(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*args, **kwargs)

    return optax.GradientTransformation(optimizer.init, update)


def spec(tree):
    """Return what of a tree must not change from step to step."""
    return jax.tree.structure(tree), [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]


def assert_same(actual, expected):
    """Assert that two trees are equal, bit for bit."""
    assert spec(actual) == spec(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_close(actual, expected, rtol=1e-4, atol=1e-5):
    """Assert that two trees are equal but for rounding; bools and integers exactly."""
    assert spec(actual) == spec(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        if jnp.issubdtype(jnp.result_type(a), jnp.floating):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def differ(a, b):
    """Whether any entry of two trees of one structure differs."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    return any(not np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)
