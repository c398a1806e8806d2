"""The example measures networks it has trained or loaded, at rest, and shows the same numbers everywhere."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from tiny import assert_same

from ssam_experiments import landscape
from ssam_experiments.config import Config as Training
from ssam_experiments.landscape import Config
from ssam_experiments.running import loop, preparation

SMALL = Config(
    seeds=2, epochs=1, width=8, examples=64, measured_at_once=32, probes=8, depth=6, points=3, extent=0.5
)  # fmt: skip
MEASURES = ("examples", "measured_at_once", "probes", "depth", "points", "extent")
LOADED = Config(**{name: getattr(SMALL, name) for name in MEASURES})
PICTURES = ("landscape.png", "spectra.png")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compile without optimizations, and promote as users do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Settings and final state of finished runs, two of them of a network with batch normalization."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    changes = {
        "SGD": {},
        "other": {"seed": 1},
        "normalized": {"model": "resnet6"},
        "normalized too": {"model": "resnet6", "seed": 1},
    }
    for name, changed in changes.items():
        settings = Training(
            **{"model": "mlp", "limit": 64, "batch": 16, "epochs": 1, **changed}, out=folder / name
        )
        runs[name] = settings, loop.train(settings)[0]
    return runs


def rows_of(text):
    """Return the cells of a Markdown table by the first of each row."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in rows[2:]}


def test_three_methods_are_trained_measured_and_drawn(tmp_path, capsys):
    landscape.main(dataclasses.replace(SMALL, out=tmp_path))
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    rows = rows_of(printed)
    assert list(rows) == list(found["names"]) == ["SGD", "SAM", "SSAM Fisher 50%"]
    assert (tmp_path / "table.md").read_text() in printed
    for name in PICTURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / name) in printed
    for name, everything in found["names"].items():
        several = everything["runs"]
        assert len(several) == 2 and rows[name][0] == "2"
        largest = [one["eigenvalues"][0] for one in several]
        assert rows[name][3] == landscape.spread(largest)
        assert largest[0] != largest[1] and all(one["trace_standard_error"] > 0 for one in several)
        plane = everything["plane"]
        assert np.shape(plane["losses"]) == (3, 3) and plane["x"] == [-0.5, 0, 0.5]
        assert plane["losses"][1][1] == pytest.approx(several[0]["loss"], rel=1e-5)
        assert np.shape(everything["spectrum"]["nodes"]) == (2, 6)


def checkpoints(trained, *names):
    return tuple(f"{name}={trained[name][0].out}" for name in names)


def test_runs_of_the_trainer_are_loaded_measured_and_drawn(trained, tmp_path, capsys):
    config = dataclasses.replace(
        LOADED, checkpoints=checkpoints(trained, "SGD", "other", "SGD"), out=tmp_path
    )
    landscape.main(config)
    rows = rows_of(capsys.readouterr().out)
    assert {name: cells[0] for name, cells in rows.items()} == {"SGD": "2", "other": "1"}
    found = json.loads((tmp_path / "results.json").read_text())["names"]
    assert found["SGD"]["runs"][0] == found["SGD"]["runs"][1] != found["other"]["runs"][0]
    assert "±" not in rows["other"][2] and "± 0.00" in rows["SGD"][2]
    assert all((tmp_path / name).exists() for name in PICTURES)


def test_a_network_with_batch_normalisation_is_measured_at_rest(trained):
    config = dataclasses.replace(LOADED, checkpoints=checkpoints(trained, "normalized", "normalized too"))
    runs = [one for several in landscape.loaded(config).values() for one in several]
    for one, name in zip(runs, ("normalized", "normalized too")):
        settings, state = trained[name]
        feed, programs = preparation.prepare(settings)
        totals = programs.evaluate(state, *feed.examples(0, 0, 64), np.ones(64, np.float32))
        losses = [float(one.loss_fn(one.params, batch)) for batch in one.batches]
        assert np.mean(losses) == pytest.approx(float(totals.loss) / 64, rel=1e-4)
        assert one.test_accuracy == loop.evaluate(settings, feed, programs, state)["test_accuracy"]
    assert runs[0].loss_fn is runs[1].loss_fn  # and so compiled once


def test_a_run_is_loaded_as_it_ended_whatever_devices_it_had(trained):
    settings, state = trained["normalized"]
    config, loaded = loop.load(settings.out)
    assert_same((loaded.params, loaded.batch_stats), (state.params, state.batch_stats))
    path = settings.out / "config.json"
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), "devices": 512, "precision": "bfloat16"}))
    assert loop.load(settings.out)[0] == config
    path.write_text(text)


def test_a_folder_without_a_run_or_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run: there is no .*config\.json"):
        loop.load(tmp_path)
    settings = Training(model="mlp", limit=64, batch=16, out=tmp_path)
    preparation.claim(settings)
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        loop.load(tmp_path)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([12.2, 12.4], "12.3 ± 0.1"),
        ([0.0123, 0.0125], "0.0124 ± 0.0001"),
        ([1234.0], "1234"),
        ([-2.5, -3.5], "-3.00 ± 0.71"),
        ([0.0, 0.0], "0.00 ± 0.00"),
        ([float("nan"), 1.0], "nan ± nan"),
    ],
    ids=range(6),
)  # fmt: skip
def test_a_mean_has_three_digits_that_count(values, text):
    assert landscape.spread(values) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"measured_at_once": 100}, "measured_at_once must be a divisor of the 1024 examples, got 100"),
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"examples": 2048}, "examples must be at most 1024, got 2048"),
        ({"probes": 4}, "probes must be at least 8, got 4"),
        ({"depth": 4}, "depth must be at least 5, got 4"),
        ({"points": 10}, "points must be odd and at least 3, got 10"),
        ({"extent": float("inf")}, "extent must be finite and above 0, got inf"),
        ({"max_loss": 0.0}, "max_loss must be finite and above 0, got 0.0"),
        ({"data": pathlib.Path("here")}, "data is for --checkpoints"),
        ({"checkpoints": ("here",)}, "checkpoints must be NAME=FOLDER each, got 'here'"),
        ({"checkpoints": ("=here",)}, "checkpoints must be NAME=FOLDER each, got '=here'"),
        ({"checkpoints": ("a=b",), "lr": 0.1, "seeds": 2}, "seeds, lr: settings of the training on digits"),
        ({"checkpoints": ("a=/nowhere",)}, "/nowhere holds no run"),
    ],
    ids=range(14),
)  # fmt: skip
def test_a_bad_setting_is_refused_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        landscape.main(dataclasses.replace(Config(), **change))


def test_more_examples_than_a_run_has_are_refused(trained):
    with pytest.raises(ValueError, match=r"examples must be at most 64, those that .*SGD has, got 1024"):
        landscape.main(Config(checkpoints=checkpoints(trained, "SGD")))
