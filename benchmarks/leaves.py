"""CPU seconds to initialise, trace and compile a step, by the number of leaves: every rule and pattern.

Run ``python benchmarks/leaves.py``; ``--help`` lists the sizes. Each candidate has a process of its own, so
that none finds compiled what another compiled before it. The loss is a sum of squares: what is counted is
the optimizer's own. Seconds are those of all threads together; what else the machine does counts little.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import steps
import suite
from architectures import ARCHITECTURES
from counting import collectives
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from suite import Record, markdown
from tqdm import tqdm

import ssam_jax
from ssam_jax import NM, Structured, Unstructured, dynamic_mask, fisher_mask, random_mask

SEEDS = (0,)
TIMED = False
REFERENCE = "optax.contrib.sam"
DEVICES = "xla_force_host_platform_device_count"

PATTERNS = {
    "50 %": Unstructured(0.5),
    "50 % by leaf": Unstructured(0.5, "leaf"),
    "by tensor": Structured(0.5),
    "by channel": Structured(0.5, "channel"),
    "by block": Structured(0.5, "block", block=4, indivisible="whole"),
    "2:4": NM(2, 4, indivisible="whole"),
}
RULES = {
    "Fisher": lambda pattern: fisher_mask(pattern, refresh_every=100),
    "random": lambda pattern: random_mask(pattern, refresh_every=100),
    "dynamic": lambda pattern: dynamic_mask(pattern, refresh_every=100, total_steps=1000),
}


def candidates() -> dict[str, Any]:
    """Return what is compared: a function without arguments that makes each transformation."""

    def masked(rule: Any, pattern: Any) -> Any:
        return lambda: optax.chain(ssam_jax.ssam(0.1, rule(pattern)), steps.optimizer())

    found = {
        REFERENCE: lambda: steps.contrib_sam(steps.optimizer()),
        "SAM": lambda: optax.chain(ssam_jax.ssam(0.1), steps.optimizer()),
    }
    for rule, make in RULES.items():
        for name, pattern in PATTERNS.items():
            if rule != "dynamic" or name not in ("by tensor", "2:4"):  # which cannot be traded
                found[f"{rule} {name}"] = masked(make, pattern)
    return found


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared."""

    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    """Trees of parameters."""
    devices: tuple[int, ...] = (1, 8)
    """Numbers of virtual devices."""
    only: str = ""
    """Regular expression: candidates to measure besides optax's."""


QUICK = Config(("ResNet-18",), (1,), "^(SAM|random 2:4)$")


def measure(config: Config) -> list[dict[str, Any]]:
    """Return what each candidate costs on each tree."""
    names = [name for name in candidates() if name == REFERENCE or re.search(config.only, name)]
    jobs = [(a, d, name) for a in config.architectures for d in config.devices for name in names]
    return [in_a_process(*job) for job in tqdm(jobs, desc="leaves", disable=None)]


def in_a_process(architecture: str, devices: int, name: str) -> dict[str, Any]:
    """Return the costs of a candidate, measured in a process of its own."""
    flags = os.environ.get("XLA_FLAGS", "")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --{DEVICES}={devices}"}
    code = f"import leaves; leaves.report({architecture!r}, {devices}, {name!r})"
    command = [sys.executable, "-c", code]
    text = subprocess.check_output(command, text=True, env=environment, cwd=suite.HERE)
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def report(architecture: str, devices: int, name: str) -> None:
    """Print the costs of a candidate as JSON."""
    print(json.dumps(costs(architecture, devices, name)))


def costs(architecture: str, devices: int, name: str) -> dict[str, Any]:
    """Return the seconds of each stage and the size of the compiled program.

    The parameters are placed before anything is measured; a second initialisation and a run are not.
    """
    params = parameters(architecture, devices)
    tx = candidates()[name]()
    start = time.process_time()
    state = jax.block_until_ready(tx.init(params))
    ready = time.process_time()
    lowered = jax.jit(step_of(tx)).lower(params, state)
    traced = time.process_time()
    program = lowered.compile()
    done = time.process_time()
    text, memory = program.as_text(), program.memory_analysis()
    return {
        "tree": architecture,
        "leaves": len(params),
        "devices": devices,
        "name": name,
        "init_s": ready - start,
        "trace_s": traced - ready,
        "compile_s": done - traced,
        "all_s": done - start,
        "lines": text.count("\n"),
        "temporary": memory and memory.temp_size_in_bytes,
        "collectives": len(collectives(text)) if devices > 1 else 0,
    }


def parameters(architecture: str, devices: int) -> dict[str, jax.Array]:
    """Return zeros of the tree's shapes, on several devices split along their largest axis that can be."""
    shapes = ARCHITECTURES[architecture]()
    if devices == 1:
        return {name: jnp.asarray(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    mesh = Mesh(jax.devices()[:devices], ("devices",))

    def place(shape: tuple[int, ...]) -> jax.Array:
        fitting = [axis for axis, size in enumerate(shape) if size % devices == 0]
        best = max(fitting, key=lambda axis: shape[axis], default=None)
        spec = () if best is None else (*[None] * best, "devices")
        return jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh, PartitionSpec(*spec)))

    return {name: place(shape) for name, shape in shapes.items()}


def step_of(tx: Any) -> Any:
    """Return a step of SAM whose loss is the sum of squares of all parameters."""

    def step(params: Any, state: Any) -> Any:
        def grad_fn(params: Any, i: Any) -> Any:
            return jax.grad(lambda p: sum(jnp.sum(jnp.square(x)) for x in p.values()))(params)

        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step


def tables(record: Record) -> dict[str, str]:
    """Return a table for each number of devices."""
    rows = record["results"]
    references = {(r["tree"], r["devices"]): r["all_s"] for r in rows if r["name"] == REFERENCE}
    columns = {
        "tree": ("tree", ""),
        "leaves": ("leaves", "d"),
        "step": ("name", ""),
        "init, s": ("init_s", ".1f"),
        "trace, s": ("trace_s", ".1f"),
        "compile, s": ("compile_s", ".1f"),
        "all / optax": (lambda row: row["all_s"] / references[row["tree"], row["devices"]], ".1f"),
        "lines": ("lines", ",d"),
        "temporary, MB": (lambda row: row["temporary"] and row["temporary"] / 1e6, ".1f"),
    }
    many = {**columns, "collectives": ("collectives", "d")}
    counts = sorted({row["devices"] for row in rows})
    return {
        f"devices{count}": markdown(
            [row for row in rows if row["devices"] == count], columns if count == 1 else many
        )
        for count in counts
    }


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
