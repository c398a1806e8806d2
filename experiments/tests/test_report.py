"""Tables and pictures of runs show every split there is, on axes that a reader can read."""

import pytest

from ssam_experiments import report


def rows_of(epochs, first=2.3, last=2.0, **others):
    """Return the metrics of a run whose training loss falls from one value to another."""
    losses = [first * (last / first) ** (i / max(1, epochs - 1)) for i in range(epochs)]
    rows = [
        {"epoch": i + 1, "train_loss": loss, "test_accuracy": 0.5, "images_per_second": 100.0 * (i + 1)}
        for i, loss in enumerate(losses)
    ]
    return [row | others for row in rows]


def labels(axis):
    """Return the labels that are drawn within the range of an axis."""
    axis.figure.draw_without_rendering()
    low, high = axis.get_view_interval()
    ticks = axis.get_major_ticks() + axis.get_minor_ticks()
    return [t.label1.get_text() for t in ticks if low <= t.get_loc() <= high and t.label1.get_text()]


@pytest.mark.parametrize("epochs", [2, 3, 5, 20])
def test_epochs_are_whole_numbers(epochs):
    rows = [row | {"density_by_leaf": {"kernel": 0.5}} for row in rows_of(epochs)]
    for figure in (report.learning_curves({"run": [rows]}), report.mask_density(rows)):
        found = [label for axes in figure.axes[:1] for label in labels(axes.xaxis)]
        assert found and all(label.isdecimal() for label in found)


@pytest.mark.parametrize(("first", "last"), [(2.15, 2.0), (2.3, 0.9), (2.3, 0.01), (3.0, 1e-5), (2.0, 0.0)])
def test_losses_are_plain_numbers(first, last):
    axes = report.learning_curves({"run": [rows_of(5, first, last)]}).axes[0]
    found = labels(axes.yaxis)
    assert len(found) >= 2
    assert all(float(label.replace("\N{MINUS SIGN}", "-")) >= 0 for label in found)
    assert axes.get_yscale() == ("log" if last in (0.01, 1e-5) else "linear")


def test_validation_accuracy_is_in_the_picture_and_in_the_table_if_there_is_any():
    plain, validated = rows_of(3), rows_of(3, valid_accuracy=0.25)
    assert len(report.learning_curves({"run": [plain]}).axes) == 2
    _, middle, _ = report.learning_curves({"plain": [plain], "validated": [validated]}).axes
    assert middle.get_ylabel() == "validation accuracy, %"
    assert [line.get_label() for line in middle.lines] == ["validated"]
    assert "| run | seeds | epochs | training loss | test accuracy, % | images/s |" in report.table(
        {"": [plain]}
    )
    lines = report.table({"plain": [plain], "validated": [validated]}).splitlines()
    assert "training loss | validation accuracy, % | test accuracy, % | images/s |" in lines[0]
    assert lines[2:] == [
        "| plain | 1 | 3 | 2.000 |  | 50.0 | 200 |",
        "| validated | 1 | 3 | 2.000 | 25.0 | 50.0 | 200 |",
    ]


def test_a_run_whose_every_step_compiled_has_no_speed():
    rows = [{name: value for name, value in rows_of(1)[0].items() if name != "images_per_second"}]
    assert report.table({"run": [rows]}).splitlines()[-1] == "| run | 1 | 1 | 2.300 | 50.0 |  |"


def test_runs_of_unequal_length_are_drawn_as_far_as_all_go():
    axes = report.learning_curves({"run": [rows_of(5), rows_of(3)]}).axes[0]
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3]


def test_spreads_are_sample_standard_deviations():
    assert report.spread([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert report.spread([1.25], 1) == "1.2"
    assert report.mean_std([1.0]) == (1.0, 0.0)
