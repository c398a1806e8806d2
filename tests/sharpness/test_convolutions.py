"""Convolutions are brought into the order that a CPU computes quickly, and compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssam_jax.sharpness.convolutions import loop_ready

CASES = {
    "plain": ({}, ("NHWC", "HWIO", "NHWC"), (2, 6, 6, 4), (3, 3, 4, 8)),
    "PyTorch's order": ({}, ("NCHW", "OIHW", "NCHW"), (2, 4, 6, 6), (8, 4, 3, 3)),
    "strided": ({"window_strides": (2, 2)}, ("NHWC", "HWIO", "NHWC"), (2, 6, 6, 4), (3, 3, 4, 8)),
    "dilated": ({"rhs_dilation": (2, 2)}, ("NHWC", "HWIO", "NHWC"), (2, 8, 8, 4), (3, 3, 4, 8)),
    "in groups": ({"feature_group_count": 2}, ("NHWC", "HWIO", "NHWC"), (2, 6, 6, 4), (3, 3, 2, 8)),
    "by channel": ({"feature_group_count": 4}, ("NHWC", "HWIO", "NHWC"), (2, 6, 6, 4), (3, 3, 1, 4)),
    "of one dimension": ({}, ("NWC", "WIO", "NCW"), (2, 6, 4), (3, 4, 8)),
}


def case(name):
    """Return a loss of kernel and images, and both."""
    options, dims, image, kernel = CASES[name]
    options = {"window_strides": (1,) * (len(image) - 2), "padding": "SAME", **options}
    x = jnp.array(np.sin(np.arange(np.prod(image))).reshape(image), jnp.float32)
    w = jnp.array(np.cos(np.arange(np.prod(kernel))).reshape(kernel), jnp.float32)

    def loss(w, x):
        relu = jax.nn.relu(jax.lax.conv_general_dilated(x, w, dimension_numbers=dims, **options))
        return jnp.sum(relu**3)

    return loss, w, x


def product(loss):
    """Return the function of a Hessian-vector product."""
    return lambda w, v, x: jax.jvp(lambda w: jax.grad(loss)(w, x), (w,), (v,))[1]


def labels(hlo):
    return {line.split("dim_labels=")[1].split(",")[0] for line in hlo.splitlines() if "dim_labels=" in line}


@pytest.mark.parametrize("name", CASES)
def test_products_with_the_hessian_are_the_same(name):
    loss, w, x = case(name)
    hvp = product(loss)
    v = jnp.flip(w)
    np.testing.assert_allclose(jax.jit(loop_ready(hvp))(w, v, x), jax.jit(hvp)(w, v, x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["plain", "PyTorch's order", "strided"])
def test_in_a_loop_every_convolution_has_its_features_last(name):
    loss, w, x = case(name)

    def looped(hvp):
        return jax.jit(lambda w, x: jax.lax.fori_loop(0, 3, lambda i, v: hvp(w, v, x), w))

    plain, ready = (
        labels(looped(hvp).lower(w, x).compile().as_text())
        for hvp in (product(loss), loop_ready(product(loss)))
    )
    assert ready == {"b01f_01io->b01f"}
    assert plain != ready, "what loop_ready is there for"


def test_nested_jit_custom_derivatives_and_other_outputs_pass_through():
    loss, w, x = case("plain")
    fn = lambda w, x: {"loss": jax.jit(loss)(w, x), "size": x.size}  # noqa: E731
    found = loop_ready(fn)(w, x)
    np.testing.assert_allclose(found["loss"], loss(w, x), rtol=1e-6)
    assert found["size"] == x.size


def test_on_other_backends_a_function_is_left_alone(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loop_ready(labels) is labels
