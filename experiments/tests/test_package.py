"""The package says what it needs, in one sentence, and asks for what the extra installs."""

import importlib.metadata
import pathlib
import runpy
import sys
import tomllib

import pytest

import ssam_experiments

PROJECT = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("missing", ["tyro", "grain"])
def test_a_requirement_that_is_missing_is_named_with_the_extra_that_has_it(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError) as raised:
        runpy.run_path(ssam_experiments.__file__)
    assert str(raised.value) == f"ssam_experiments needs {missing}: pip install 'ssam_jax[experiments]'."


def test_the_modules_that_are_asked_for_are_those_of_the_extra():
    extras = PROJECT["optional-dependencies"]
    wanted = [line for name in ("experiments", "plots", "sharpness") for line in extras[name]]
    names = {line.partition(">=")[0] for line in wanted if not line.startswith("ssam_jax")}
    there = importlib.metadata.packages_distributions()
    found = {name.lower().replace("_", "-") for module in ssam_experiments.MODULES for name in there[module]}
    assert names <= found and len(names) == len(ssam_experiments.MODULES)
