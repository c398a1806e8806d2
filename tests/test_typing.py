"""Type checkers accept what a user writes: the code of README and the pages in docs, and typed code below."""

import json
import os
import re
import subprocess
import sys

import optax
import pytest
from test_readme import BLOCKS, ROOT

pytestmark = pytest.mark.skipif(
    not hasattr(optax.contrib, "MuonDimensionNumbers"),
    reason="older versions of optax have other annotations",
)

MYPY = """\
[mypy]
strict = true
# A page is a script: its functions have no annotations, but their bodies are checked.
disallow_untyped_defs = false
disallow_incomplete_defs = false
disallow_untyped_calls = false
disallow_untyped_decorators = false
check_untyped_defs = true
# A page shows several versions of one function, in a reader's order.
disable_error_code = no-redef
# Orbax, scikit-learn and others have no stubs.
ignore_missing_imports = true
# The library's own annotations are checked by `make types`.
follow_imports = silent
"""

PYRIGHT = {
    "typeCheckingMode": "standard",
    "pythonVersion": "3.11",
    "reportMissingImports": False,  # extras that are not installed
    "reportMissingModuleSource": False,
    "reportRedeclaration": False,  # a page shows several versions of one function
}

MEMBERS = r"(Array|ndarray|bool_|number|bool|int|float|complex|Iterable|Mapping)\b.*"
IGNORED = [
    # optax types updates and states as chex.ArrayTree, a union that has neither fields nor items.
    rf'for class "{MEMBERS}"',
    rf'"__getitem__" method not defined on type "{MEMBERS}"',
    # `params, state = train_step(params, state)` at the top of a script, where the step has no annotations.
    r"could not be determined because it refers to itself",
]

TYPED = """
import jax
import jax.numpy as jnp
import optax

import ssam_jax
from ssam_jax import Combine, MaskRule, RadiusRule, Unstructured, combine, directions, radii
from ssam_jax.typing import Mask, Params

pattern = Unstructured(0.5)
mask = ssam_jax.fisher_mask(pattern, refresh_every=100)
schedule: optax.Schedule = optax.linear_schedule(0.0, 0.1, 100)

chain: optax.GradientTransformationExtraArgs = optax.chain(ssam_jax.ssam(schedule, mask), optax.sgd(0.1))
one: optax.GradientTransformation = ssam_jax.carried(optax.sgd(0.1), rho=0.1)
two: optax.GradientTransformation = ssam_jax.alternating(optax.adamw(1e-3), jnp.float32(0.1), mask)
looks = ssam_jax.ssam(radii.every(5, 0.1), combine=combine.looksam(0.7), skip_zero_rho=True)
gated = ssam_jax.ssam(radii.adaptive_gate(0.1, 100), direction=directions.friendly(), normalize="leaf")
averaged = ssam_jax.ssam(0.1, direction=optax.ema(0.9), adaptive=True)
refused = ssam_jax.ssam(0.1, form="implicit")  # type: ignore[call-arg]


def select(memory: tuple[()], old: Mask, params: Params, key: jax.Array, step: jax.Array) -> Mask:
    return pattern(jax.tree.map(jnp.abs, params))


rule: MaskRule = MaskRule(select=select, refresh_every=10)
kept: Combine = combine.weighted(0.5)
gate: RadiusRule = radii.adaptive_gate(schedule, 100)


def loss_fn(params: optax.Params, batch: jax.Array) -> jax.Array:
    return jnp.sum(batch)


Step = tuple[optax.Params, optax.OptState]


def step(params: optax.Params, state: optax.OptState, batch: jax.Array) -> Step:
    def grad_fn(params: optax.Params, i: int) -> optax.Updates:
        return jax.grad(loss_fn)(params, batch)

    updates, state = chain.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state


def read(state: optax.OptState, params: optax.Params) -> list[jax.Array]:
    bias = ssam_jax.get_mask(state)["bias"]
    state = ssam_jax.set_mask(state, {"bias": bias, "kernel": ~bias})
    w = ssam_jax.carried_eval_params(state, params)
    state = ssam_jax.carried_set_params(state, w)
    if any(ssam_jax.active_leaves(state)):
        w = ssam_jax.alternating_eval_params(state, params)
    return [ssam_jax.mask_stats(state).by_leaf["bias"], w["bias"]]
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return a folder with a script for each page that has code."""
    folder = tmp_path_factory.mktemp("pages")
    for name, blocks in BLOCKS.items():
        if blocks and name != "CONTRIBUTING.md":  # whose code has tests, and needs the experiments
            (folder / (re.sub(r"\W", "_", name.removesuffix(".md")) + ".py")).write_text("\n\n".join(blocks))
    (folder / "typed.py").write_text(TYPED)
    (folder / "mypy.ini").write_text(MYPY)
    (folder / "pyrightconfig.json").write_text(json.dumps(PYRIGHT))
    return folder


def test_mypy_finds_nothing(pages):
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", ".mypy", "."]
    found = run(command, pages)
    assert found.returncode == 0, found.stdout + found.stderr


def test_pyright_finds_nothing(pages):
    command = [
        sys.executable,
        "-m",
        "basedpyright",
        "--outputjson",
        "--pythonpath",
        sys.executable,
        "--project",
        ".",
    ]
    found = json.loads(run(command, pages).stdout)
    assert found["summary"]["filesAnalyzed"] >= len(list(pages.glob("*.py")))
    errors = [shown(error) for error in found["generalDiagnostics"] if not is_ignored(error)]
    assert not errors, "\n".join(errors)


def run(command, folder):
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment())


def environment():
    """Return an environment in which the checkers find this checkout first."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)}


def is_ignored(error):
    return any(re.search(pattern, error["message"]) for pattern in IGNORED)


def shown(error):
    name = error["file"].rsplit("/", 1)[1]
    return f"{name}:{error['range']['start']['line'] + 1}: {error.get('rule')}: {error['message']}"
