"""The demo runs, in small, and prints and draws what it promises."""

import json
import os
import runpy
import subprocess
import sys

import pytest


def test_the_demo_prints_a_table_and_draws_its_pictures(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "ssam_experiments.demo"]
    options = ["--epochs", "2", "--seeds", "2", "--batch", "256", "--width", "8", "--out", tmp_path]
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, env=quick)
    assert result.returncode == 0, result.stderr
    for name in ("SGD", "SAM", "Fisher", "dynamic", "2:4"):
        assert name in result.stdout
    for name in ("learning_curves.png", "mask_density.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in result.stdout
    assert json.loads((tmp_path / "results.json").read_text())


def test_the_demo_refuses_a_bad_setting_in_a_sentence(tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["demo", "--epochs", "0", "--out", str(out)])
    monkeypatch.delitem(sys.modules, "ssam_experiments.demo", raising=False)  # to be run, not imported
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        runpy.run_module("ssam_experiments.demo", run_name="__main__")
    assert not out.exists()
