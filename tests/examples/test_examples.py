"""Every example is short, stands alone, and runs, in small."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from tiny import assert_close

import ssam_jax
from ssam_experiments import m_sharpness

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = {path.stem: path for path in sorted(FOLDER.rglob("*.py"))}
QUICK = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
DEVICES = r"--xla_force_host_platform_device_count=\d+"


def run(name, *options, environment=QUICK):
    command = [sys.executable, "-W", "error", EXAMPLES[name], *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_150_lines_at_most_and_a_docstring(name):
    text = EXAMPLES[name].read_text()
    assert len(text.splitlines()) <= 150
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_imports_neither_another_nor_the_experiments(name):
    nodes = list(ast.walk(ast.parse(EXAMPLES[name].read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {module.split(".")[0] for module in imported} & {*EXAMPLES, "ssam_experiments"}


def test_the_digits_are_trained_on_and_drawn(tmp_path):
    picture = tmp_path / "pictures" / "digits.png"
    printed = run("digits", "--epochs", "2", "--batch", "256", "--out", picture)
    rows = re.findall(r"^\| (\S.*?) \| [\d.]+ \| ([\d.]+) \|$", printed, flags=re.M)
    assert rows == [("SGD", "0.0"), ("SAM", "100.0"), ("SSAM Fisher 50%", "50.0")]
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in printed


def test_a_mask_keeps_a_part_of_a_perturbation(tmp_path):
    example = runpy.run_path(str(EXAMPLES["perturbations"]))
    found = {(d, m): example["steps"](up, mask) for d, up in example["DIRECTIONS"].items()
             for m, mask in example["MASKS"].items()}  # fmt: skip
    w = np.array(example["PATH"][-1], np.float32)
    for (_, mask), step in found.items():
        shift = example["vector"](step["perturbed"]) - w
        length = np.linalg.norm(shift)
        if mask == "only x":
            assert shift[1] == 0 and 0 < length < example["RHO"]
        else:
            assert length == pytest.approx(example["RHO"], rel=1e-5)
    example["draw"](figure := Figure(figsize=(2, 2)), found, stage=4)
    figure.savefig(tmp_path / "perturbations.png", dpi=40)


def test_each_device_perturbs_by_its_part_of_the_batch():
    alone = {**QUICK, "XLA_FLAGS": re.sub(DEVICES, "", QUICK["XLA_FLAGS"])}  # it makes its devices itself
    printed = run("m_sharpness", "--devices", "4", "--epochs", "1", environment=alone)
    rows = re.findall(r"^\| (\S.*?) \| (\d+) \| [\d.]+ \|$", printed, flags=re.M)
    assert rows == [("synchronized", "64"), ("per device", "16")]


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("per_device", [False, True])
def test_a_step_of_the_example_is_that_of_the_study(per_device):
    example = runpy.run_path(str(EXAMPLES["m_sharpness"]))
    tx, params = optax.chain(ssam_jax.ssam(0.1), optax.sgd(0.1)), example["init_params"](jax.random.key(0))
    x, y = jnp.sin(jnp.arange(16 * 64, dtype=jnp.float32)).reshape(16, 64), jnp.arange(16) % 10
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    if per_device:
        ours = example["per_device_step"](tx)
        theirs = m_sharpness.per_device_step(example["loss_fn"], tx)
        specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": P()}
        ours, theirs = (jax.shard_map(step, mesh=mesh, **specs) for step in (ours, theirs))
    else:
        ours = example["synchronized_step"](tx)
        theirs = m_sharpness.synchronized_step(example["loss_fn"], tx)
    found, expected = (jax.jit(step)(params, tx.init(params), x, y)[0] for step in (ours, theirs))
    assert_close(found, expected)


def test_layers_are_chosen_alike_on_one_device_and_on_four():
    options = ["--width", "8", "--layers", "2", "--context", "8", "--batch", "4", "--steps", "30"]
    found = []
    for devices in (1, 4):
        flags = re.sub(DEVICES, f"--xla_force_host_platform_device_count={devices}", QUICK["XLA_FLAGS"])
        printed = run("language_model", *options, environment={**QUICK, "XLA_FLAGS": flags})
        losses = [float(loss) for loss in re.findall(r": ([\d.]+) bits per character$", printed, flags=re.M)]
        layers = re.findall(r"^(\w+: layers \[.*\])$", printed, flags=re.M)
        assert len(losses) == 10 and losses[-1] < losses[0] and len(layers) == 4
        found.append((losses, layers))
    assert found[0][0] == pytest.approx(found[1][0], abs=5e-3)
    assert found[0][1] == found[1][1]


def test_adapters_are_tuned_and_what_is_forgotten_is_printed():
    printed = run("fine_tuning", "--steps", "5", "--seeds", "1", "--rhos", "0", "0.1")
    rows = re.findall(
        r"^\| (\S+) \| ([\d.]+) ± 0.0 \| ([\d.]+) ± 0.0 \| ([\d.]+) ± 0.0 \|$", printed, flags=re.M
    )
    assert [row[0] for row in rows] == ["0", "0.1"]
    assert all(float(before) > 90 and float(after) > 50 for _, _, before, after in rows)


@pytest.mark.usefixtures("relaxed_promotion")
def test_fine_tuning_changes_adapters_alone_and_sam_perturbs_no_others(monkeypatch):
    example = runpy.run_path(str(EXAMPLES["fine_tuning"]))
    given, ssam = {}, ssam_jax.ssam
    monkeypatch.setattr(
        ssam_jax, "ssam", lambda *args, **kwargs: given.setdefault("tx", ssam(*args, **kwargs))
    )
    params = example["init_params"](jax.random.key(0), 2)
    data = example["load_data"](True, 0.4, 0)
    config = example["Config"](steps=2)
    tuned = example["train"](config, params, data, True, 0.1, 0)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, tuned)
    for layer in moved.values():
        assert not layer["kernel"] and not layer["bias"] and layer["adapter"]["up"]
    mask = ssam_jax.get_mask(given["tx"].init(params))
    assert [set(map(bool, jax.tree.leaves(layer["adapter"]))) for layer in mask.values()] == [{True}] * 3
    assert not any(bool(layer[name]) for layer in mask.values() for name in ("kernel", "bias"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("digits", {"epochs": 0}, "epochs must be at least 1, got 0"),
        ("digits", {"batch": 2000}, "batch must be from 1 to 1297, got 2000"),
        ("digits", {"noise": 1.5}, "noise must be from 0 to 1, got 1.5"),
        ("m_sharpness", {"devices": 0}, "epochs and devices must be at least 1, got 20 and 0"),
        ("m_sharpness", {"batch": 60}, "batch must be a multiple of devices, 8, got 60"),
        ("fine_tuning", {"seeds": 0}, "steps, rank and seeds must be at least 1, got .3000, 16, 0."),
        ("fine_tuning", {"noise": 1.5}, "noise must be from 0 to 1, got 1.5"),
        ("language_model", {"batch": 12}, "batch must be a multiple of 8, got 12"),
        ("language_model", {"width": 30}, "width must be a multiple of 4, got 30"),
    ],
    ids=range(9),
)
def test_a_bad_setting_is_refused_in_a_sentence(name, changes, message):
    example = runpy.run_path(str(EXAMPLES[name]))
    with pytest.raises(ValueError, match=message):
        example["main"](example["Config"](**changes))
