"""``python -m ssam_jax`` says what a bug report needs."""

import importlib.metadata
import platform
import runpy

import jax

from ssam_jax import __main__ as command


def lines_of(text):
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_versions_and_devices_are_printed_a_line_each(capsys):
    runpy.run_path(command.__file__, run_name="__main__")
    found = lines_of(capsys.readouterr().out)
    for name in ("ssam_jax", "jax", "jaxlib", "optax", "flax", "chex", "numpy"):
        assert found[name] == importlib.metadata.version(name)
    assert found["python"] == platform.python_version()
    assert found["platform"] == platform.platform()
    assert found["devices"] == f"{jax.default_backend()}: 8 x {jax.devices()[0].device_kind}"
    assert found["processes"] == "1"


def test_a_package_that_is_missing_is_said_to_be(monkeypatch):
    monkeypatch.setattr(command, "PACKAGES", ("jax", "no_such_package"))
    assert lines_of(command.report())["no_such_package"] == "not installed"
