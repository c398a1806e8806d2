"""The perturbation by itself, beside a transcription of its authors' code."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssam_jax.ascent.ball import is_bias, perturb


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    tree = {
        "Dense_0": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},
        "norm": {"scale": rng.normal(size=4)},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def make_grads(dtype=jnp.float32):
    return jax.tree.map(lambda p: jnp.cos(3 * p).astype(dtype), make_params())


MASK = {
    "Dense_0": {"kernel": np.array([[True, False, True, True]]), "bias": np.array(False)},
    "norm": {"scale": np.array([True, True, False, True])},
}


def numpy64(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def assert_leaves_close(got, want, **tolerances):
    for a, b in zip(jax.tree.leaves(got), want, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, **tolerances)


@pytest.mark.parametrize("normalize", ["global", "masked"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_perturbation_is_rho_g_over_its_norm_under_the_mask(normalize, masked):
    params, grads, mask = make_params(), make_grads(), MASK if masked else None
    got = perturb(params, grads, rho=0.3, mask=mask, normalize=normalize)
    m = numpy64(mask) if masked else [1.0, 1.0, 1.0]
    g = numpy64(grads)
    scale = [x * y for x, y in zip(g, m)] if normalize == "masked" else g
    norm = np.sqrt(sum(np.sum(x**2) for x in scale))
    want = [w + 0.3 * x * y / norm for w, x, y in zip(numpy64(params), g, m)]
    assert_leaves_close(got, want, rtol=1e-5, atol=1e-6)


def asam_ascent(named_parameters, rho, eta=0.01):
    """Transcribe ``ASAM.ascent_step`` of SamsungLabs/ASAM (asam.py) from PyTorch, line by line."""
    wgrads, grads, moved = [], {}, {}
    for name, (p, grad) in named_parameters.items():
        t_w = p.copy()
        if "weight" in name:
            t_w = np.abs(t_w) + eta
            grads[name] = grad * t_w
        else:
            grads[name] = grad.copy()
        wgrads.append(np.linalg.norm(grads[name].ravel(), ord=2))
    wgrad_norm = np.linalg.norm(np.array(wgrads), ord=2) + 1.0e-16
    for name, (p, _) in named_parameters.items():
        t_w = np.abs(p) + eta if "weight" in name else p
        eps = t_w * grads[name] if "weight" in name else grads[name]
        moved[name] = p + eps * (rho / wgrad_norm)
    return moved


def test_the_adaptive_perturbation_is_that_of_the_code_of_asams_authors():
    params, grads = make_params(), make_grads()
    names = ["Dense_0.bias", "Dense_0.weight", "norm.weight"]  # PyTorch calls scales weights too
    expected = asam_ascent(dict(zip(names, zip(numpy64(params), numpy64(grads)))), rho=0.5)
    got = perturb(params, grads, rho=0.5, adaptive=True)
    assert_leaves_close(got, [expected[name] for name in names], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", ["global", "masked"])
def test_the_adaptive_perturbation_is_masked_in_the_scaled_space(normalize):
    params, grads = make_params(), make_grads()
    bias, kernel, scale = numpy64(params)
    t = [np.ones_like(bias), np.abs(kernel) + 0.01, np.abs(scale) + 0.01]
    scaled = [a * b for a, b in zip(t, numpy64(grads))]
    kept = [a * b for a, b in zip(scaled, numpy64(MASK))]
    norm = np.sqrt(sum(np.sum(x**2) for x in (kept if normalize == "masked" else scaled)))
    want = [w + 0.3 * a * b / norm for w, a, b in zip((bias, kernel, scale), t, kept)]
    got = perturb(params, grads, rho=0.3, mask=MASK, normalize=normalize, adaptive=True)
    assert_leaves_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Dense_0/bias", True),
        ("params/BatchNorm_0/bias", True),
        ("layer/b", True),
        ("bias", True),
        ("layer/Bias", True),
        ("lstm/bias_ih_l0", True),
        ("norm/offset", True),
        ("norm/beta", True),
        ("Dense_0/kernel", False),
        ("norm/scale", False),
        ("norm/gamma", False),
        ("bias/kernel", False),
        ("b/w", False),
        ("layer/table", False),
        ("layer/alpha_b", False),
        ("0", False),
        ("", False),
    ],
)
def test_a_bias_is_known_by_the_last_part_of_its_path(path, expected):
    assert is_bias(path) is expected


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("normalize", ["global", "masked"])
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf, 1e30])
def test_a_norm_of_zero_or_one_that_is_not_finite_gives_the_parameters_bit_for_bit(bad, normalize, adaptive):
    params, grads = make_params(), make_grads()
    if bad == 0:
        grads = jax.tree.map(jnp.zeros_like, grads)
    grads["Dense_0"]["kernel"] = grads["Dense_0"]["kernel"].at[0, 0].set(bad)
    got = perturb(params, grads, rho=0.3, mask=MASK, normalize=normalize, adaptive=adaptive)
    chex.assert_trees_all_equal(got, params)


def test_gradients_that_vanish_under_the_mask_give_the_parameters_bit_for_bit():
    params = make_params()
    grads = jax.tree.map(lambda g, m: jnp.where(m, 0, g), make_grads(), MASK)
    chex.assert_trees_all_equal(perturb(params, grads, rho=0.3, mask=MASK, normalize="masked"), params)


def test_a_gradient_outside_the_mask_that_is_not_finite_does_no_harm_to_the_masked_norm():
    params, grads = make_params(), make_grads()
    clean = perturb(params, grads, rho=0.3, mask=MASK, normalize="masked")
    grads["Dense_0"]["bias"] = jnp.full(4, jnp.nan)
    got = perturb(params, grads, rho=0.3, mask=MASK, normalize="masked")
    chex.assert_trees_all_equal(got, clean)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_derivative_with_respect_to_rho_is_finite_at_a_zero_gradient(adaptive):
    params = make_params()
    zeros = jax.tree.map(jnp.zeros_like, params)

    def total(rho):
        return sum(map(jnp.sum, jax.tree.leaves(perturb(params, zeros, rho=rho, adaptive=adaptive))))

    assert float(jax.grad(total)(jnp.float32(0.3))) == 0


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("grad_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rho", [0.3, jnp.float32(0.3), np.float64(0.3)], ids=["float", "jax", "numpy"])
def test_parameters_keep_their_dtype_whatever_that_of_the_gradient_and_of_rho(
    dtype, grad_dtype, adaptive, rho
):
    params, grads = make_params(dtype), make_grads(grad_dtype)
    got = perturb(params, grads, rho=rho, mask=MASK, adaptive=adaptive)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, params)
    want = perturb(*(jax.tree.map(lambda x: x.astype(jnp.float32), t) for t in (params, grads)),
                   rho=0.3, mask=MASK, adaptive=adaptive)  # fmt: skip
    chex.assert_trees_all_equal(got, jax.tree.map(lambda x: x.astype(dtype), want))


def test_the_norm_of_half_precision_gradients_does_not_overflow_or_lose_small_entries():
    params = {"w": jnp.zeros(4096, jnp.float16)}
    large = perturb(params, {"w": jnp.full(4096, 6e4, jnp.float16)}, rho=64.0)
    np.testing.assert_allclose(np.float32(large["w"]), 1.0, rtol=1e-3)
    small = perturb(params, {"w": jnp.full(4096, 1e-4, jnp.float16)}, rho=64.0)
    np.testing.assert_allclose(np.float32(small["w"]), 1.0, rtol=1e-3)


def test_mixed_dtypes_share_one_norm():
    params = {"a": jnp.zeros(1, jnp.bfloat16), "b": jnp.zeros(1)}
    got = perturb(params, {"a": jnp.array([3.0], jnp.bfloat16), "b": jnp.array([4.0])}, rho=5.0)
    assert (float(got["a"][0]), float(got["b"][0])) == pytest.approx((3.0, 4.0))


def test_an_empty_tree_and_empty_leaves_are_allowed():
    assert perturb({}, {}, rho=0.1) == {}
    assert perturb({"w": jnp.zeros((0, 3))}, {"w": jnp.zeros((0, 3))}, rho=0.1)["w"].shape == (0, 3)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharded_parameters_keep_their_sharding_and_values(adaptive):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    layout = {"bias": PartitionSpec("y"), "kernel": PartitionSpec("x", "y"), "scale": PartitionSpec()}
    params = {
        "bias": jnp.arange(8.0),
        "kernel": jnp.cos(jnp.arange(64.0)).reshape(8, 8),
        "scale": jnp.ones(3),
    }
    grads = jax.tree.map(jnp.sin, params)
    mask = {"bias": jnp.array(True), "kernel": jnp.arange(8)[None] % 2 == 0, "scale": jnp.ones(3, bool)}
    move = jax.jit(lambda p, g: perturb(p, g, rho=0.3, mask=mask, adaptive=adaptive))
    placed = [
        {n: jax.device_put(x, NamedSharding(mesh, layout[n])) for n, x in tree.items()}
        for tree in (params, grads)
    ]
    got = move(*placed)
    for name, spec in layout.items():
        assert got[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), got[name].ndim)
    chex.assert_trees_all_close(got, move(params, grads), rtol=1e-6)
