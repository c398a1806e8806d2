"""Imports run one way, on public APIs alone, and loading the library loads little."""

import ast
import inspect
import pathlib
import subprocess
import sys
import types

import pytest

import ssam_jax

ROOT = pathlib.Path(ssam_jax.__file__).parent

# A module may import from modules of a lower layer only.
LAYERS = [
    ["typing"],
    ["_base"],
    ["_base.checks", "_base.rounding"],
    ["_base.trees"],
    ["_base.shardings", "_base.tracing", "_base.boxes"],
    ["ascent", "masks"],
    ["ascent.ball", "ascent.directions", "ascent.radii", "combine"],
    ["masks.counts", "masks.hashing", "masks.shards"],
    ["masks.packing"],
    ["masks.rows"],
    ["masks.selection", "masks.shuffling"],
    ["masks.units"],
    ["masks.groups"],
    ["masks.patterns"],
    ["masks.trading", "masks.drawing", "masks.fitting"],
    ["masks.rule"],
    ["masks.fisher", "masks.dynamic", "masks.fixed"],
    ["state"],
    ["factors"],
    ["sam", "alternating", "carried"],
    ["evaluation"],
    ["two_pass.implicit", "two_pass.planning"],
    ["two_pass.active"],
    ["two_pass.primitives", "two_pass.loss"],
    ["two_pass.rows"],
    ["two_pass.splitting", "two_pass.implicit.weights"],
    [
        "two_pass.planning.counting",
        "two_pass.implicit.masks",
        "two_pass.implicit.backward",
        "two_pass.planning.search",
    ],
    ["two_pass.planning.costs", "two_pass.passes"],
    ["two_pass.planning.report"],
    ["two_pass"],
    [""],  # ssam_jax itself
    ["__main__"],
    ["linen", "nnx", "sharpness.convolutions"],
    ["sharpness.results", "sharpness.arguments", "sharpness.progress", "sharpness.vectors"],
    ["sharpness.objective"],
    ["sharpness.hessian", "sharpness.rises", "sharpness.surface"],
    ["sharpness"],
    ["plotting.drawing"],
    ["plotting.losses", "plotting.spectra", "plotting.masks"],
    ["plotting"],
]
LAYER = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def is_module(name):
    return name.removeprefix("ssam_jax").removeprefix(".") in MODULES


def imports(path):
    """Yield the full name of everything a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path):
    """Yield the modules of ssam_jax that a file imports from."""
    for name in imports(path):
        if name.split(".")[0] == "ssam_jax":
            module = name if is_module(name) else name.rpartition(".")[0]
            yield module.removeprefix("ssam_jax").removeprefix(".")


def test_every_module_has_a_layer():
    assert set(MODULES) <= set(LAYER)
    assert {"typing", "masks.selection", "alternating", ""} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_lower_layers(name):
    wrong = [other for other in own_imports(MODULES[name]) if LAYER[other] >= LAYER[name]]
    assert not wrong


@pytest.mark.parametrize("name", MODULES)
def test_a_module_uses_public_interfaces_only(name):
    private = [
        other
        for other in imports(MODULES[name])
        if any(
            part.startswith("_") and not part.startswith("__")
            for part in other.removeprefix("ssam_jax._base").split(".")
        )
    ]
    assert not private
    assert not any(text in MODULES[name].read_text() for text in ("jax._src", "optax._src"))


def test_the_library_does_not_import_the_experiments():
    users = [name for name, path in MODULES.items() if any("ssam_experiments" in i for i in imports(path))]
    assert not users


def test_the_planner_is_imported_through_the_doors_alone():
    def plans(name):
        return name.startswith("two_pass.planning")

    users = {name for name, path in MODULES.items() if any(map(plans, own_imports(path)))}
    assert {name for name in users if not plans(name)} <= {"", "two_pass"}


def test_flax_is_imported_only_by_the_modules_for_it():
    users = {name for name, path in MODULES.items() if any(i.split(".")[0] == "flax" for i in imports(path))}
    assert users <= {"linen", "nnx"}


def test_the_extension_interface_of_jax_is_used_in_one_file_at_most():
    users = [name for name, path in MODULES.items() if any("jax.extend" in i for i in imports(path))]
    assert len(users) <= 1


def test_loading_the_library_loads_no_optional_package():
    code = (
        "import sys, ssam_jax; heavy = {'flax', 'matplotlib', 'matfree', 'tqdm', 'orbax', 'sklearn'};"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}), 'jax' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert result.stdout.strip() == "[] True"


def test_loading_the_library_loads_what_optax_loads_and_little_more():
    code = (
        "import sys, optax; before = set(sys.modules); import ssam_jax;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    # jax.extend reads programs; chex, for the type of a tree, brings absl's tests and toolz.
    assert {"ssam_jax"} <= set(result.stdout.split()) <= {"ssam_jax", "jax", "chex", "absl", "toolz"}


def public():
    return {
        name: value
        for name, value in vars(ssam_jax).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def test_there_are_public_names():
    assert {"ssam", "alternating", "fisher_mask", "Unstructured", "set_mask"} <= set(public())


@pytest.mark.parametrize("name", public())
def test_a_public_name_is_documented(name):
    text = public()[name].__doc__
    assert text and not text.startswith(f"{name}("), "missing, or generated from the fields"


@pytest.mark.parametrize("name", [n for n, v in public().items() if inspect.isclass(v)])
def test_the_fields_of_a_public_class_are_documented(name):
    documented = inspect.getdoc(public()[name])
    for field in getattr(public()[name], "__annotations__", ()):
        assert f"\n  {field}: " in documented


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_documented(name):
    assert ast.get_docstring(ast.parse(MODULES[name].read_text()))
