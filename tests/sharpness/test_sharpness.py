"""The measures of sharpness, against dense Hessians, known spectra, and SAM's own perturbation."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree
from matfree import decomp, funm

import ssam_jax
from ssam_jax import sharpness
from ssam_jax._base.trees import map_with_path
from ssam_jax.ascent.ball import asam_scale, perturb
from ssam_jax.sharpness import SpectralDensity

BATCHES = list(tiny.BATCHES[:3])
MASK = jax.tree.map(lambda p: p > 0, tiny.PARAMS)
quiet = {
    name: functools.partial(getattr(sharpness, name), progress=False)
    for name in (
        "worst_case_rise",
        "average_rise",
        "hessian_eigenpairs",
        "hessian_trace",
        "spectral_density",
        "loss_along",
        "loss_over",
    )
}
SPECTRUM = np.array([9, 9, 9, 5, 5, 3, 1, 0, 0, -2], np.float32)


def mean_loss(params):
    return sum(tiny.loss(params, batch) for batch in BATCHES) / len(BATCHES)


def quadratic(params, batch):
    """Half of sum(SPECTRUM * params ** 2), whatever the batch."""
    return jnp.sum(jnp.asarray(SPECTRUM, params.dtype) * params**2) / 2


@functools.cache
def dense_hessian():
    flat, unravel = ravel_pytree(tiny.params())
    return np.asarray(jax.jit(jax.hessian(lambda x: mean_loss(unravel(x))))(flat), np.float64)


# Rises


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": MASK},
        {"mask": MASK, "normalize": "masked"},
        {"adaptive": True},
        {"adaptive": True, "mask": MASK},
    ],
    ids=["plain", "masked", "masked to the ball", "adaptive", "adaptive and masked"],
)
def test_one_step_is_the_perturbation_of_sam(options):
    params = tiny.params()
    expected = perturb(params, jax.grad(mean_loss)(params), rho=0.1, **options)
    found = quiet["worst_case_rise"](tiny.loss, params, BATCHES, 0.1, **options)
    tiny.assert_close(found.params, expected)
    np.testing.assert_allclose(found.loss, mean_loss(params), rtol=1e-5)
    np.testing.assert_allclose(found.rise, mean_loss(expected) - mean_loss(params), rtol=1e-4)


@pytest.mark.parametrize("adaptive", [False, True])
def test_more_steps_find_a_worse_point_of_the_same_ball(adaptive):
    params, rho = tiny.params(), 0.5
    rise = functools.partial(
        quiet["worst_case_rise"], tiny.loss, params, BATCHES, rho, mask=MASK, adaptive=adaptive
    )
    one, many = rise(), rise(steps=10)
    assert many.rise > one.rise > 0
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), many.params, params)
    for change, mask in zip(jax.tree.leaves(moved), jax.tree.leaves(MASK)):
        assert not change[~mask].any() and change[mask].any()
    if adaptive:
        moved = jax.tree.map(np.divide, moved, map_with_path(asam_scale, params))
    assert np.linalg.norm(ravel_pytree(moved)[0]) <= rho * 1.0001


def test_many_steps_find_the_worst_point_of_a_bowl():
    start = jnp.full(10, 1e-3)
    found = quiet["worst_case_rise"](quadratic, start, BATCHES, 1.0, steps=30, step_size=0.5)
    np.testing.assert_allclose(found.rise, 9 / 2, rtol=0.01)


def test_the_worst_of_the_points_come_by_is_kept():
    """Steps as long as the ball jump over the peak and back: the first one lands on it."""

    def peak(params, batch):
        return -jnp.sum(jnp.abs(params - 1.0))

    found = quiet["worst_case_rise"](peak, jnp.zeros(1), BATCHES, 1.5, steps=2, step_size=1.0)
    np.testing.assert_allclose(found.rise, 1.0)
    np.testing.assert_allclose(found.params, 1.0)


def test_each_batch_can_have_a_worst_point_of_its_own():
    params = tiny.params()
    together = quiet["worst_case_rise"](tiny.loss, params, BATCHES, 0.1, each_batch=True)
    alone = [quiet["worst_case_rise"](tiny.loss, params, [batch], 0.1) for batch in BATCHES]
    np.testing.assert_allclose(together.rise, np.mean([a.rise for a in alone]), rtol=1e-5)
    assert together.params is None
    assert together.rise > quiet["worst_case_rise"](tiny.loss, params, BATCHES, 0.1).rise


def test_where_the_gradient_is_zero_nothing_rises():
    found = quiet["worst_case_rise"](quadratic, jnp.zeros(10), BATCHES, 0.1, steps=2)
    assert found.rise == 0 and not found.params.any()


def test_a_loss_that_is_not_finite_is_the_worst():
    def cliff(params, batch):
        return jnp.where(params[0] > 1.05, jnp.nan, params[0])

    assert np.isnan(quiet["worst_case_rise"](cliff, jnp.ones(1), BATCHES, 0.1, steps=3).rise)


def test_half_precision_does_not_swallow_a_small_perturbation():
    params = jnp.ones(10, jnp.bfloat16)
    found = quiet["worst_case_rise"](quadratic, params, BATCHES, 1e-3)
    assert found.params.dtype == jnp.float32
    np.testing.assert_allclose(found.rise, 1e-3 * np.linalg.norm(SPECTRUM), rtol=0.01)


@pytest.mark.parametrize("mask", [None, SPECTRUM > 4])
def test_the_average_rise_of_a_bowl_is_half_the_trace(mask):
    found = quiet["average_rise"](quadratic, jnp.ones(10), BATCHES, 0.1, samples=300, mask=mask)
    expected = 0.1**2 / 2 * SPECTRUM[slice(None) if mask is None else mask].sum()
    assert abs(found.mean - expected) < 4 * found.standard_error < expected
    assert found.samples.shape == (300,)
    np.testing.assert_allclose(found.mean, np.mean(found.samples), rtol=1e-5)
    np.testing.assert_allclose(found.standard_error, np.std(found.samples, ddof=1) / 300**0.5, rtol=1e-4)


def test_adaptive_noise_is_relative_to_the_parameters():
    params = {"kernel": jnp.full(10, 3.0), "bias": jnp.full(10, 3.0)}
    losses = {name: lambda p, b, name=name: quadratic(p[name], b) for name in params}
    rises = {
        name: quiet["average_rise"](loss, params, BATCHES, 0.1, samples=200, adaptive=True)
        for name, loss in losses.items()
    }
    for name, scale in (("kernel", 3.01), ("bias", 1.0)):
        expected = (0.1 * scale) ** 2 / 2 * SPECTRUM.sum()
        assert abs(rises[name].mean - expected) < 4 * rises[name].standard_error


def test_the_same_seed_gives_the_same_estimate_and_another_another():
    trace = functools.partial(quiet["hessian_trace"], tiny.loss, tiny.params(), BATCHES, probes=2)
    assert np.array_equal(trace().samples, trace().samples)
    assert not np.array_equal(trace().samples, trace(seed=1).samples)


# The Hessian


def test_eigenpairs_are_those_of_the_dense_hessian():
    values, vectors = np.linalg.eigh(dense_hessian())
    found = quiet["hessian_eigenpairs"](tiny.loss, tiny.params(), BATCHES, 5, depth=52)
    np.testing.assert_allclose(found.values, values[:-6:-1], rtol=1e-4)
    for i in range(5):
        vector = ravel_pytree(jax.tree.map(lambda x, i=i: x[i], found.vectors))[0]
        np.testing.assert_allclose(abs(vector @ vectors[:, -1 - i]), 1, rtol=1e-4)
        error = dense_hessian() @ vector - found.values[i] * vector
        assert np.linalg.norm(error) < found.residuals[i] + 1e-5
    assert jax.tree.structure(found.vectors) == jax.tree.structure(tiny.PARAMS)


def test_residuals_tell_how_far_a_short_run_is_from_an_eigenvalue():
    found = quiet["hessian_eigenpairs"](tiny.loss, tiny.params(), BATCHES, 3, depth=6)
    true = np.linalg.eigvalsh(dense_hessian())
    distances = [np.abs(true - value).min() for value in found.values]
    assert (np.array(distances) <= found.residuals + 1e-5).all()
    assert found.residuals[-1] > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_of_eigenvalues_that_occur_several_times_none_is_found_too_often(seed):
    found = quiet["hessian_eigenpairs"](quadratic, jnp.ones(10), BATCHES, 10, seed=seed)
    values = np.asarray(found.values)[np.isfinite(found.values)]
    np.testing.assert_allclose(values, np.round(values), atol=1e-4)
    counts = dict(zip(*np.unique(np.round(values).astype(int), return_counts=True)))
    assert set(counts) == set(SPECTRUM)
    assert all(times <= np.sum(value == SPECTRUM) for value, times in counts.items())


def test_what_the_start_cannot_reach_is_nan():
    found = quiet["hessian_eigenpairs"](lambda p, b: 3 * jnp.sum(p**2), jnp.ones(10), BATCHES, 3)
    np.testing.assert_allclose(found.values, [6, np.nan, np.nan], rtol=1e-6)
    np.testing.assert_array_equal(found.residuals, [0, np.nan, np.nan])
    assert not found.vectors[1:].any()


def test_the_hessian_of_a_linear_loss_is_zero():
    found = quiet["hessian_eigenpairs"](lambda p, b: jnp.sum(p), jnp.ones(10), BATCHES)
    assert found.values == 0 and found.residuals == 0
    density = quiet["spectral_density"](lambda p, b: jnp.sum(p), jnp.ones(10), BATCHES, depth=3)
    assert not density.nodes.any()
    np.testing.assert_allclose(density.weights.sum(axis=1), 1)
    assert jnp.isfinite(density.density(density.grid())).all()


def test_parameters_that_are_not_finite_have_no_spectrum():
    params = jnp.full(10, jnp.nan)
    loss = lambda p, b: jnp.sum(p**4)  # noqa: E731
    assert np.isnan(quiet["hessian_eigenpairs"](loss, params, BATCHES).values).all()
    assert np.isnan(quiet["hessian_trace"](loss, params, BATCHES, probes=2).mean)


def test_double_precision_stays_double():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        params = jnp.linspace(0.1, 1, 10, dtype=jnp.float64)
        loss = lambda p, b: jnp.sum(p**3)  # noqa: E731
        found = quiet["hessian_eigenpairs"](loss, params, BATCHES, 2)
        assert found.values.dtype == found.vectors.dtype == jnp.float64
        np.testing.assert_allclose(found.values, 6 * params[:-3:-1], rtol=1e-13)
        assert quiet["hessian_trace"](quadratic, params, BATCHES, probes=2).mean == float(SPECTRUM.sum())
        assert quiet["average_rise"](quadratic, params, BATCHES, 0.1, samples=2).mean.dtype == jnp.float64
        direction = sharpness.filter_normalized_direction(params[None])
        assert direction.dtype == jnp.float64


def test_the_trace_agrees_with_that_of_the_dense_hessian():
    found = quiet["hessian_trace"](tiny.loss, tiny.params(), BATCHES, probes=60)
    assert abs(found.mean - np.trace(dense_hessian())) < 4 * found.standard_error


def test_of_a_diagonal_hessian_every_probe_gives_the_trace():
    found = quiet["hessian_trace"](quadratic, jnp.ones(10), BATCHES, probes=3)
    np.testing.assert_allclose(found.samples, SPECTRUM.sum(), rtol=1e-6)
    single = quiet["hessian_trace"](quadratic, jnp.ones(10), BATCHES, probes=1)
    assert np.isnan(single.standard_error)


def test_the_spectral_density_has_the_moments_of_the_dense_hessian():
    found = quiet["spectral_density"](tiny.loss, tiny.params(), BATCHES, probes=100, depth=10)
    assert found.nodes.shape == found.weights.shape == (100, 10)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1, rtol=1e-5)
    for power in (1, 2):
        samples = np.sum(found.weights * found.nodes**power, axis=1)
        expected = np.trace(np.linalg.matrix_power(dense_hessian(), power)) / 52
        assert abs(samples.mean() - expected) < 4 * samples.std() / 100**0.5


def test_nodes_and_weights_are_matfrees_quadrature():
    hessian = jnp.diag(jnp.asarray(SPECTRUM[2:], jnp.float32))
    loss = lambda p, b: p @ hessian @ p / 2  # noqa: E731
    found = quiet["spectral_density"](loss, jnp.ones(8), BATCHES, probes=1, depth=4)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)  # the probe's, and its leaf's
    start = jax.random.normal(key, (8,))
    integrand = funm.monte_carlo_funm_sym(funm.dense_funm_sym_eigh(jnp.exp), decomp.tridiag_sym(4))
    expected = integrand(lambda v: hessian @ v, start) / (start @ start)
    np.testing.assert_allclose(jnp.sum(found.weights * jnp.exp(found.nodes)), expected, rtol=1e-5)


def test_the_density_of_a_known_spectrum_has_its_shares():
    found = quiet["spectral_density"](quadratic, jnp.ones(10), BATCHES, probes=300, depth=10)
    for value, times in zip(*np.unique(SPECTRUM, return_counts=True)):
        share = jnp.sum(jnp.where(jnp.abs(found.nodes - value) < 1e-3, found.weights, 0)) / 300
        np.testing.assert_allclose(share, times / 10, atol=0.03)


def test_a_density_integrates_to_one_around_its_nodes():
    made = SpectralDensity(jnp.array([[0.0, 1.0], [0.0, 3.0]]), jnp.array([[0.5, 0.5], [0.75, 0.25]]))
    grid = made.grid(points=2001, margin=1.0)
    assert grid.shape == (2001,) and grid[0] == -3 and grid[-1] == 6
    density = made.density(grid)
    np.testing.assert_allclose(jnp.trapezoid(density, grid), 1, rtol=1e-4)
    at = lambda value: made.density(jnp.array([value]), width=0.1)[0]  # noqa: E731
    peak = 1 / (0.1 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose([at(0.0), at(1.0), at(3.0)], peak * np.array([0.625, 0.25, 0.125]), rtol=1e-5)


# Surfaces


def test_filters_of_a_direction_are_as_long_as_those_of_the_parameters():
    params = {"conv": jnp.arange(1.0, 3 * 3 * 2 * 4 + 1).reshape(3, 3, 2, 4), "bias": jnp.ones(4)}
    direction = sharpness.filter_normalized_direction(params)
    for i in range(4):
        lengths = [jnp.linalg.norm(tree["conv"][..., i]) for tree in (direction, params)]
        np.testing.assert_allclose(*lengths, rtol=1e-5)
    assert not direction["bias"].any()
    by_row = sharpness.filter_normalized_direction(params, axis=0)
    np.testing.assert_allclose(
        jnp.linalg.norm(by_row["conv"][1]), jnp.linalg.norm(params["conv"][1]), rtol=1e-5
    )
    assert tiny.differ(direction, sharpness.filter_normalized_direction(params, 1))


def test_a_filter_of_zeros_stays_zero():
    assert not sharpness.filter_normalized_direction(jnp.zeros((3, 2))).any()


def test_the_loss_along_a_line_is_the_loss_there():
    params = tiny.params()
    direction = sharpness.filter_normalized_direction(params)
    line = quiet["loss_along"](tiny.loss, params, BATCHES, direction, [-0.5, 0, 1])
    moved = [jax.tree.map(lambda p, d, c=c: p + c * d, params, direction) for c in (-0.5, 0, 1)]
    np.testing.assert_allclose(line.losses, [mean_loss(p) for p in moved], rtol=1e-5)
    np.testing.assert_array_equal(line.offsets, [-0.5, 0, 1])


def test_rows_of_a_plane_go_with_the_second_direction():
    directions = [jnp.eye(10)[0], jnp.eye(10)[6]]
    plane = quiet["loss_over"](quadratic, jnp.zeros(10), BATCHES, directions, [0, 1, 2], [0, 4])
    np.testing.assert_allclose(plane.losses, [[0, 4.5, 18], [8, 12.5, 26]])


# All of them

ARGUMENTS = {
    "worst_case_rise": (0.1,),
    "average_rise": (0.1,),
    "hessian_eigenpairs": (),
    "hessian_trace": (),
    "spectral_density": (),
    "loss_along": (jnp.ones(10), [0.0, 1.0]),
    "loss_over": ([jnp.ones(10), jnp.ones(10)], [0.0], [0.0, 1.0]),
}
OPTIONS = {"spectral_density": {"depth": 5}}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_measuring_again_compiles_nothing(name):
    traces = []

    def loss(params, batch):
        traces.append(1)
        return quadratic(params, batch)

    for _ in range(2):
        before = len(traces)
        quiet[name](loss, jnp.ones(10), BATCHES, *ARGUMENTS[name], **OPTIONS.get(name, {}))
    assert len(traces) - before <= 1, "the check of what the loss returns"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_bar_is_shown_until_the_work_is_done(name, capfd):
    options = OPTIONS.get(name, {})
    getattr(sharpness, name)(quadratic, jnp.ones(10), BATCHES, *ARGUMENTS[name], **options)
    assert "100%" in capfd.readouterr().err
    quiet[name](quadratic, jnp.ones(10), BATCHES, *ARGUMENTS[name], **options)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss_fn": 3}, TypeError, "loss_fn must be a function"),
        ({"loss_fn": lambda p, b: p}, TypeError, r"loss_fn must return one real scalar.*float32\[10\]"),
        ({"loss_fn": lambda p, b: (jnp.sum(p), {})}, TypeError, "without aux"),
        ({"params": jnp.ones(10, int)}, TypeError, "params must hold real floating-point"),
        ({"params": []}, ValueError, "params must hold at least one number"),
        ({"batches": []}, ValueError, "batches must hold at least one batch"),
        ({"batches": (jnp.ones(3),)}, TypeError, r"batches must be a list.*write \[batch\]"),
        ({"batches": jnp.ones(3)}, TypeError, "batches must be a list"),
        (
            {"batches": [jnp.ones(3), jnp.ones(2)]},
            ValueError,
            r"batches\[1\] must have the shapes of batches\[0\]",
        ),
    ],
)
def test_what_every_measure_takes_is_checked(name, change, error, message):
    given = {"loss_fn": quadratic, "params": jnp.ones(10), "batches": BATCHES, **change}
    with pytest.raises(error, match=message):
        quiet[name](*given.values(), *ARGUMENTS[name])


@pytest.mark.parametrize(
    ("name", "arguments", "options", "error", "message"),
    [
        ("worst_case_rise", (0,), {}, ValueError, "rho must be finite and above 0, got 0"),
        ("worst_case_rise", (float("nan"),), {}, ValueError, "rho must be finite"),
        ("worst_case_rise", ("1",), {}, TypeError, "rho must be a number"),
        ("worst_case_rise", (1,), {"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ("worst_case_rise", (1,), {"step_size": -1}, ValueError, "step_size must be finite and above 0"),
        (
            "worst_case_rise",
            (1,),
            {"normalize": "none"},
            ValueError,
            "normalize must be 'global' or 'masked'",
        ),
        ("worst_case_rise", (1,), {"mask": jnp.ones(10)}, TypeError, "mask must be bool"),
        ("worst_case_rise", (1,), {"mask": jnp.ones(9, bool)}, ValueError, "does not broadcast"),
        ("average_rise", (-1,), {}, ValueError, "sigma must be finite and above 0"),
        ("average_rise", (1,), {"samples": 1.5}, TypeError, "samples must be an int"),
        ("average_rise", (1,), {"seed": None}, TypeError, "seed must be an int"),
        ("hessian_eigenpairs", (11,), {}, ValueError, "k must be at most 10, the number of parameters"),
        ("hessian_eigenpairs", (True,), {}, TypeError, "k must be an int"),
        ("hessian_eigenpairs", (3,), {"depth": 2}, ValueError, "depth must be at least k, 3, got 2"),
        ("hessian_trace", (), {"probes": 0}, ValueError, "probes must be at least 1"),
        ("spectral_density", (), {}, ValueError, "depth must be at most 10.*got 50"),
        ("spectral_density", (), {"probes": "2"}, TypeError, "probes must be an int"),
        ("loss_along", (jnp.ones(9), [0]), {}, ValueError, "direction must have the shapes of params"),
        ("loss_along", (jnp.ones(10, int), [0]), {}, TypeError, "direction must hold real floating-point"),
        ("loss_along", (jnp.ones(10), []), {}, ValueError, "offsets must hold one row"),
        ("loss_along", (jnp.ones(10), [1j]), {}, TypeError, "offsets must hold real numbers"),
        ("loss_over", (jnp.ones(10), [0], [0]), {}, ValueError, "directions must be two trees"),
        ("loss_over", ([jnp.ones(10)] * 2, [0], [np.inf]), {}, ValueError, "y must hold one row of finite"),
    ],
)
def test_other_arguments_are_checked(name, arguments, options, error, message):
    with pytest.raises(error, match=message):
        quiet[name](quadratic, jnp.ones(10), BATCHES, *arguments, **options)


def test_an_unhashable_loss_is_refused_with_the_remedy():
    class Loss:
        __hash__ = None

        def __call__(self, params, batch):
            return quadratic(params, batch)

    with pytest.raises(TypeError, match=r"loss_fn must be hashable.*lambda"):
        quiet["hessian_trace"](Loss(), jnp.ones(10), BATCHES)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (({"a": jnp.ones(2, int)},), {}, TypeError, "params must hold real"),
        ((jnp.ones((2, 2)), 0.5), {}, TypeError, "seed must be an int"),
        ((jnp.ones((2, 2)),), {"axis": 2}, ValueError, "axis must be an axis of every leaf.*no axis 2"),
        ((jnp.ones((2, 2)),), {"axis": None}, TypeError, "axis must be an int"),
    ],
)
def test_arguments_of_a_direction_are_checked(arguments, options, error, message):
    with pytest.raises(error, match=message):
        sharpness.filter_normalized_direction(*arguments, **options)


@pytest.mark.parametrize("package", ["matfree", "tqdm"])
def test_a_missing_package_is_named_with_the_extra(package):
    code = f"import sys; sys.modules[{package!r}] = None; import ssam_jax.sharpness"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert f"needs {package}: pip install '.[sharpness]' in a clone" in result.stderr


def test_masks_of_a_state_are_taken_as_they_are():
    tx = ssam_jax.ssam(0.1, ssam_jax.random_mask(ssam_jax.Structured(0.5, unit="channel")))
    params = tiny.params()
    mask = ssam_jax.get_mask(tx.init(params))
    found = quiet["worst_case_rise"](tiny.loss, params, BATCHES, 0.1, mask=mask)
    tiny.assert_close(found.params, perturb(params, jax.grad(mean_loss)(params), rho=0.1, mask=mask))
