"""Pictures show the numbers they are given, on whichever axes, and refuse what they cannot draw."""

import importlib
import io
import itertools
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import ssam_jax
from ssam_jax import plotting
from ssam_jax.sharpness import LossLine, LossPlane, SpectralDensity

X, Y = np.linspace(-1, 1, 9, dtype=np.float32), np.linspace(-2, 2, 7, dtype=np.float32)
LINES = {name: LossLine(X, 1 + c * X**2) for name, c in (("SGD", 3), ("SAM", 2), ("SSAM", 1))}
PLANES = {name: LossPlane(X, Y, 1 + c * (X**2 + Y[:, None] ** 2)) for name, c in (("SGD", 3), ("SAM", 1))}
NODES = np.array([[-1, 0, 0.5, 30], [-2, 0, 0.5, 32]], np.float32)
WEIGHTS = np.array([[0.1, 0.6, 0.299, 0.001], [0.2, 0.6, 0.1998, 0.0002]], np.float32)
SPECTRA = {
    name: SpectralDensity(jnp.array(c * NODES), jnp.array(WEIGHTS)) for name, c in (("SGD", 2), ("SAM", 1))
}
SHARES = {"first/kernel": [0.5, 0.25, 0.0], "second/kernel": [0.5, 0.75, 1.0]}


def draw(name, axes=None):
    calls = {
        "along": lambda: plotting.plot_loss_along(LINES, axes),
        "contours": lambda: plotting.plot_loss_contours(PLANES["SGD"], axes),
        "surface": lambda: plotting.plot_loss_surface(PLANES["SGD"], axes),
        "spectra": lambda: plotting.plot_spectra(SPECTRA, axes),
        "mask": lambda: plotting.plot_mask_by_layer([0, 10, 20], SHARES, axes),
    }
    return calls[name]()


NAMES = ("along", "contours", "surface", "spectra", "mask")


def with_loss(plane, losses):
    """Return a plane that is not finite in the first rows and columns."""
    changed = np.array(plane.losses)
    changed[:2, :3] = losses
    return plane._replace(losses=changed)


def pixel(figure, axes, x, y):
    """Return the colour of a picture at a point of its axes."""
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba")
    picture = np.frombuffer(buffer.getvalue(), np.uint8).reshape(height, width, 4)
    column, row = axes.transData.transform((x, y))
    return to_hex(picture[height - 1 - round(row), round(column)] / 255)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_names_its_axes_and_becomes_a_file(name, tmp_path):
    figure = draw(name)
    axes = figure.axes[0]
    assert isinstance(figure, Figure) and axes.get_xlabel()
    assert axes.get_ylabel() or name == "mask"  # whose rows have names
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_drawn_where_it_is_wanted(name):
    figure = Figure()
    part = figure.subfigures(1, 2)[1]
    axes = part.add_subplot(projection="3d" if name == "surface" else None)
    assert draw(name, axes) is figure
    assert axes.get_xlabel() and axes in figure.axes


def test_lines_show_their_losses_and_differ_in_colour_and_style():
    axes = plotting.plot_loss_along(LINES, unit="nats").axes[0]
    for line, (name, given) in zip(axes.lines, LINES.items()):
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xdata(), given.offsets)
        np.testing.assert_array_equal(line.get_ydata(), given.losses)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(LINES)
    assert axes.get_ylabel() == "loss, nats"
    many = plotting.plot_loss_along({str(i): LINES["SGD"] for i in range(28)}).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in many}) == 28
    assert all(a.get_color() != b.get_color() for a, b in itertools.pairwise(many))
    assert all(a.get_linestyle() != b.get_linestyle() for a, b in itertools.pairwise(many))


def test_a_line_goes_from_left_to_right_whatever_the_order_of_its_points():
    [line] = plotting.plot_loss_along({"SGD": LossLine(X[::-1], X[::-1] ** 2)}).axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), np.stack([X, X**2], axis=1))


def test_a_single_line_needs_no_legend():
    assert plotting.plot_loss_along({"SGD": LINES["SGD"]}).axes[0].get_legend() is None


def test_a_loss_that_is_not_finite_is_a_gap_with_a_cross_at_the_edge():
    losses = np.array(LINES["SGD"].losses)
    losses[[0, 3]] = np.inf, np.nan
    axes = plotting.plot_loss_along({"SGD": LossLine(X, losses)}).axes[0]
    line, crosses = axes.lines
    assert list(np.flatnonzero(np.isnan(line.get_ydata()))) == [0, 3]
    np.testing.assert_array_equal(crosses.get_xdata(), X[[0, 3]])
    assert max(axes.get_ylim()) < 10


def test_panels_with_one_range_share_their_colours():
    low, high = plotting.loss_range(PLANES)
    assert (low, high) == (1.0, 16.0)
    figure = Figure()
    for axes, plane in zip(figure.subplots(1, 2), PLANES.values()):
        plotting.plot_loss_contours(plane, axes, vmin=low, vmax=high, levels=5, colorbar=False)
    first, second = (axes.collections[0] for axes in figure.axes)
    np.testing.assert_allclose(first.levels, [1, 4, 7, 10, 13, 16])
    np.testing.assert_array_equal(first.levels, second.levels)
    assert first.norm(3.0) == second.norm(3.0)
    assert len(figure.axes) == 2  # no bar was asked for
    for axes, band in zip(figure.axes, (2, 0)):  # at this point of the grid the losses are 8.0 and 3.3
        assert pixel(figure, axes, 0.75, 4 / 3) == to_hex(first.get_facecolor()[band])


def test_contours_mark_the_parameters_where_they_are_on_the_plane():
    [mark] = draw("contours").axes[0].lines
    assert (*mark.get_xdata(), *mark.get_ydata()) == (0, 0)
    beside = PLANES["SGD"]._replace(x=X + 5)
    assert not plotting.plot_loss_contours(beside).axes[0].lines


def test_a_loss_beyond_the_scale_has_the_colour_of_its_end_and_one_that_is_not_finite_is_grey():
    plane = with_loss(PLANES["SGD"], [[np.nan, np.inf, np.nan]])
    figure = plotting.plot_loss_contours(plane, vmin=2, vmax=5)
    axes = figure.axes[0]
    bands = axes.collections[0]
    assert bands.extend == "both"
    assert pixel(figure, axes, 0.2, 0.2) == to_hex(bands.cmap(0))
    assert pixel(figure, axes, 0.9, 1.8) == to_hex(bands.cmap(bands.cmap.N - 1))
    assert pixel(figure, axes, -0.9, -1.8) == "#d9d9d9"


def test_contours_take_edges_and_a_level_plane():
    bands = plotting.plot_loss_contours(PLANES["SGD"], levels=[0, 1.5, 16]).axes[0].collections[0]
    assert list(bands.levels) == [0, 1.5, 16] and bands.extend == "neither"
    level = PLANES["SGD"]._replace(losses=np.full((7, 9), 2, np.float32))
    assert plotting.plot_loss_contours(level).axes[0].collections[0].levels[0] == 1.5
    assert plotting.plot_loss_surface(level).axes[0].get_zlim() == (1.5, 2.5)


def test_a_logarithmic_scale_has_even_steps_between_ratios_and_round_numbers_beside_it():
    figure = plotting.plot_loss_contours(PLANES["SGD"], levels=4, log=True)
    bands = figure.axes[0].collections[0]
    np.testing.assert_allclose(bands.levels, [1, 2, 4, 8, 16])
    assert bands.norm(4.0) == pytest.approx(0.5)
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["1", "2", "5", "10"]


def test_a_surface_is_cut_off_at_its_scale_and_has_a_hole_where_the_loss_is_not_finite():
    figure = plotting.plot_loss_surface(with_loss(PLANES["SGD"], np.nan), vmin=1, vmax=5, unit="nats")
    [axes] = figure.axes
    assert axes.get_zlim() == (1, 5) and axes.get_zlabel() == "loss, nats"
    figure.canvas.draw()
    faces = axes.collections[0].get_facecolor()
    whole = plotting.plot_loss_surface(PLANES["SGD"], vmin=1, vmax=5)
    whole.canvas.draw()
    assert len(whole.axes[0].collections[0].get_facecolor()) == 6 * 8
    assert len(faces) == 6 * 8 - 1 * 2  # those none of whose corners is finite


@pytest.mark.parametrize("width", [None, 2.0, 1e-3])
def test_spectra_are_densities_of_one_width_on_a_logarithmic_axis(width):
    axes = plotting.plot_spectra(SPECTRA, width=width).axes[0]
    assert axes.get_yscale() == "log" and axes.get_legend()
    actual = width or (64 + 4) / 100
    for line, spectrum in zip(axes.lines, SPECTRA.values()):
        grid, density = line.get_data()
        assert np.trapezoid(density, grid) == pytest.approx(1, rel=0.01)
        highest = np.max(spectrum.nodes)
        peak = np.interp(highest, grid, density)
        bells = np.exp(-(((highest - spectrum.nodes) / actual) ** 2) / 2) / (actual * np.sqrt(2 * np.pi))
        assert peak == pytest.approx(float(np.sum(bells * WEIGHTS) / 2), rel=0.02)
        assert axes.get_ylim()[0] < peak


def test_a_spectrum_of_one_value_is_drawn():
    zero = SpectralDensity(jnp.zeros((1, 2)), jnp.full((1, 2), 0.5))
    [line] = plotting.plot_spectra({"zero": zero}).axes[0].lines
    assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(1, rel=0.01)


def test_a_node_without_weight_is_not_drawn():
    padded = SpectralDensity(jnp.array([[-500.0, 0, 1, 900]]), jnp.array([[0, 0.5, 0.5, 0]]))
    axes = plotting.plot_spectra({"padded": padded}).axes[0]
    low, high = axes.get_xlim()
    assert -0.2 < low < high < 1.2 and axes.get_ylim()[0] > 1


def test_masks_are_rows_of_shares_between_the_steps():
    axes = draw("mask").axes[0]
    np.testing.assert_allclose(axes.collections[0].get_array(), 100 * np.array([*SHARES.values()]))
    assert [label.get_text() for label in axes.get_yticklabels()] == list(SHARES)
    assert axes.get_xlim() == (-5, 25) and axes.get_ylim() == (1.5, -0.5)
    rows = [{leaf: share[i] for leaf, share in SHARES.items()} for i in range(3)]
    collected = plotting.plot_mask_by_layer([0, 10, 20], rows).axes[0].collections[0]
    np.testing.assert_array_equal(collected.get_array(), axes.collections[0].get_array())


def test_masks_are_drawn_from_what_a_training_loop_collects():
    rule = ssam_jax.random_mask(ssam_jax.Unstructured(0.5), refresh_every=1)
    tx = optax.chain(ssam_jax.ssam(0.1, rule), optax.sgd(0.1))
    params = tiny.params()
    opt_state = tx.init(params)
    steps, densities = [jnp.int32(0)], [ssam_jax.mask_stats(opt_state).by_leaf]
    axes = plotting.plot_mask_by_layer(steps, densities).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "first/bias", "first/kernel", "second/kernel",
    ]  # fmt: skip
    shares = np.asarray(axes.collections[0].get_array())[:, 0] / 100
    assert shares @ [4, 16, 32] == pytest.approx(26)
    assert axes.get_xlim() == (-0.5, 0.5)


FLAT, DEEP = Figure().add_subplot(), Figure().add_subplot(projection="3d")
SGD = PLANES["SGD"]
along, contours, surface = plotting.plot_loss_along, plotting.plot_loss_contours, plotting.plot_loss_surface
spectra, mask = plotting.plot_spectra, plotting.plot_mask_by_layer
BROKEN = SpectralDensity(jnp.array([[jnp.nan]]), jnp.ones((1, 1)))
UNEVEN = SpectralDensity(jnp.ones((2, 3)), jnp.ones((3, 2)))
WRONG_KIND = {
    "lines must be a mapping .* got LossLine": lambda: along(LINES["SGD"]),
    r"lines\['SGD'\] must be a LossLine, got LossPlane": lambda: along(PLANES),
    "axes must be two-dimensional .* got Axes3D": lambda: draw("along", DEEP),
    "axes must be two-dimensional .* got Axes3D.": lambda: draw("contours", DEEP),
    "axes must be two-dimensional .* got Figure": lambda: draw("spectra", Figure()),
    "axes must be two-dimensional .* got str": lambda: draw("mask", "here"),
    "axes must be made with projection='3d', got Axes": lambda: draw("surface", FLAT),
    "plane must be a LossPlane, got dict": lambda: contours(PLANES),
}
WRONG_VALUE = {
    "lines must hold at least one LossLine, got none": lambda: along({}),
    r"\['a'\].losses must have shape \(9,\), got \(8,\)": lambda: along({"a": LossLine(X, X[1:])}),
    r"losses must have shape \(7, 8\), got \(7, 9\)": lambda: contours(SGD._replace(x=X[1:])),
    "plane.y must be two or more ascending numbers": lambda: surface(SGD._replace(y=Y[::-1])),
    "losses must hold a finite loss, got none": lambda: surface(SGD._replace(losses=SGD.losses * np.nan)),
    "levels must be an int of at least 1, .* got 0": lambda: contours(SGD, levels=0),
    r"levels must hold two or more ascending numbers, got \[2, 1\]": lambda: contours(SGD, levels=[2, 1]),
    "levels must be an int where vmin or vmax is given": lambda: contours(SGD, levels=[1, 2], vmin=0),
    "vmin must be below vmax, .* got 2.0 and 2.0": lambda: contours(SGD, vmin=2.0, vmax=2.0),
    "log needs a scale that begins above 0, got one from -1.0": lambda: contours(SGD, vmin=-1.0, log=True),
    "log needs a scale that begins above 0, got one from 0.0": lambda: contours(SGD, levels=[0, 1], log=True),
    "both finite, got 1.0 and inf": lambda: surface(SGD, vmax=np.inf),
    "planes must hold at least one LossPlane, got none": lambda: plotting.loss_range({}),
    "spectra must hold at least one SpectralDensity": lambda: spectra({}),
    r"spectra\['a'\] must hold finite nodes and weights": lambda: spectra({"a": BROKEN}),
    r"weights must have shape \(2, 3\), got \(3, 2\)": lambda: spectra({"a": UNEVEN}),
    "width must be finite and above 0, got 0": lambda: spectra(SPECTRA, width=0),
    r"steps must be one or more ascending numbers, got \[0, 2, 1\]": lambda: mask([0, 2, 1], SHARES),
    r"steps must be one or more ascending numbers, got \[\]": lambda: mask([], []),
    "at least one leaf, got none; dense SAM has no mask": lambda: mask([0], [{}]),
    r"densities\[1\] .* differs in \['a', 'b'\]": lambda: mask([0, 1], [{"a": 0.5}, {"b": 0.5}]),
    r"must have shape \(2,\), got \(3,\)": lambda: mask([0, 1], SHARES),
    r"densities\['a'\] must be from 0 to 1": lambda: mask([0, 1], {"a": [0.5, 1.5]}),
}


@pytest.mark.parametrize("message", WRONG_KIND, ids=range(len(WRONG_KIND)))
def test_what_is_of_the_wrong_kind_is_refused_in_a_sentence(message):
    with pytest.raises(TypeError, match=message):
        WRONG_KIND[message]()


@pytest.mark.parametrize("message", WRONG_VALUE, ids=range(len(WRONG_VALUE)))
def test_what_cannot_be_drawn_is_refused_in_a_sentence(message):
    with pytest.raises(ValueError, match=message):
        WRONG_VALUE[message]()


def test_a_missing_matplotlib_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "ssam_jax.plotting.drawing")
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[plots\]' in a clone"):
        importlib.import_module("ssam_jax.plotting.drawing")
