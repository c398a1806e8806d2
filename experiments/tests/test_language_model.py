"""The language model trains alike on one device and on four, with its parameters spread over them."""

import os
import re
import subprocess
import sys

import pytest

from ssam_experiments.corpus import read_corpus
from ssam_experiments.language_model import Config, check

SMALL = ["--width", "8", "--layers", "2", "--heads", "2", "--context", "8", "--batch", "4", "--steps", "3"]
SMALL += ["--evaluation", "8", "--sample", "8", "--refresh-every", "2"]


def run(devices, *options):
    """Return for each method its held-out and training loss and density, and the text that was printed."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    env = {**os.environ, "XLA_FLAGS": flags}
    command = [sys.executable, "-W", "error", "-m", "ssam_experiments.language_model", *SMALL, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert result.returncode == 0, result.stderr
    assert f"{devices} devices" in result.stdout
    rows = re.findall(r"^\| (\S[^|]*) \| ([\d.]+) \| ([\d.]+) \| (\d+) \| \d+ \|$", result.stdout, flags=re.M)
    return {name: tuple(map(float, row)) for name, *row in rows}, result.stdout


def test_four_devices_train_as_one_does_and_masks_choose_layers():
    one, text = run(1, "--sample", "0")
    four, text_of_four = run(4)
    assert list(one) == list(four) == ["AdamW", "SAM", "SSAM Fisher 50%"]
    for name in one:
        assert four[name] == pytest.approx(one[name], abs=2e-3)
    assert len({row[0] for row in one.values()}) == 3
    layers = re.findall(r"^\| layers/.*$", text, flags=re.M)
    assert len(layers) == 6
    assert layers == re.findall(r"^\| layers/.*$", text_of_four, flags=re.M)
    assert "\n\nReturn the " in text_of_four


def test_the_last_layers_take_the_fast_road_on_four_devices():
    rows, text = run(4, "--mask", "last", "--methods", "ssam")
    assert list(rows) == ["SSAM last 1"]
    assert re.search(r"^\| layers/perceptron \| 50 \| 1 \|$", text, flags=re.M)
    assert re.search(r"^\| embed \| 0 \|  \|$", text, flags=re.M)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 6}, "batch must be a multiple of the devices, 4, got 6"),
        ({"width": 30}, "width must be a multiple of heads, 4, got 30"),
        ({"methods": ("sam", "sam")}, "methods must name at least one, and none twice"),
        ({"context": 10**7}, "context must be at most"),
        ({"last": 5}, "last must be from 1 to layers, 4, got 5"),
        ({"sparsity": 1.5}, "sparsity must be from 0 to 1"),
        ({"rho": 0.0}, "rho must be finite and above 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and at least 0"),
    ],
    ids=range(10),
)
def test_a_bad_setting_is_refused_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        check(Config(**change), 4, CORPUS)


CORPUS = read_corpus()


def test_the_text_is_documentation_whose_held_out_modules_are_not_trained_on():
    assert len(CORPUS.train) > 5 * len(CORPUS.held_out) > 10**5
    sample = CORPUS.held_out[1000:1100].tobytes()
    assert sample not in CORPUS.train.tobytes()
