"""The package says what it needs, in one sentence, and asks for what the extra installs."""

import importlib.metadata
import pathlib
import runpy
import subprocess
import sys
import tomllib

import pytest

import ssam_experiments
import ssam_experiments.data
import ssam_experiments.running

PROJECT = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("missing", "extra", "path"),
    [
        ("tyro", "demo", ssam_experiments.__file__),
        ("grain", "experiments", ssam_experiments.data.__file__),
        ("orbax", "experiments", ssam_experiments.running.__file__),
    ],
    ids=str,
)
def test_a_requirement_that_is_missing_is_named_with_the_extra_that_has_it(monkeypatch, missing, extra, path):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError) as raised:
        runpy.run_path(path)
    install = f"pip install '.[{extra}]' in a clone of ssam_jax"
    assert str(raised.value) == f"ssam_experiments needs {missing}: {install}."


@pytest.mark.parametrize(
    ("extras", "modules"),
    [(("demo", "plots", "sharpness"), ssam_experiments.DEMO), (("experiments",), ssam_experiments.TRAINER)],
    ids=["demo", "trainer"],
)
def test_the_modules_that_are_asked_for_are_those_of_the_extra(extras, modules):
    wanted = [line for name in extras for line in PROJECT["optional-dependencies"][name]]
    names = {line.partition(">=")[0] for line in wanted if not line.startswith("ssam_jax")}
    there = importlib.metadata.packages_distributions()
    found = {name.lower().replace("_", "-") for module in modules for name in there[module]}
    assert names <= found and len(names) == len(modules)


def test_the_demo_loads_nothing_that_the_trainer_alone_needs():
    code = "import sys; import ssam_experiments.demo; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not set(loaded.split()) & {"dm_pix", "grain", "orbax", "pyarrow"}
