"""What a sharded step costs as devices are added: operations, bytes and collectives of each, and time.

Run ``python benchmarks/devices.py``; ``--help`` lists the sizes. On a CPU the devices are virtual: they share
its cores, so that time cannot fall, and what counts is what the compiled program does on each. The batch is
split among the devices, and every parameter along its largest axis that can be.
"""

import dataclasses
import functools
import sys
from typing import Any

import jax
import networks
import optax
import steps
import suite
from counting import collectives
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from suite import Record, markdown
from timing import compiled, medians
from tqdm import tqdm

import ssam_jax
from ssam_jax import NM, Unstructured, fisher_mask

SEEDS = (0, 1)
TIMED = True
VIRTUAL = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the comparison."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices; those that are not there are left out."""
    network: str = "transformer"
    """Or "MLP"."""
    width: int = 128
    """Of its layers."""
    repeats: int = 7
    """Timed steps of each candidate; the median counts."""


QUICK = Config((1, 2), "MLP", 16, 1)


def problem_of(config: Config) -> networks.Problem:
    """Return the network and its batch, which eight devices divide."""
    if config.network == "MLP":
        return networks.mlp(width=config.width, layers=3, batch=128)
    return networks.scanned_transformer(
        width=config.width, layers=4, heads=4, batch=16, length=64, vocabulary=64
    )


def methods() -> dict[str, Any]:
    """Return the transformations that are compared."""
    fisher = functools.partial(fisher_mask, refresh_every=100)
    return {
        "optax.contrib.sam": steps.contrib_sam(steps.optimizer()),
        "SSAM, Fisher 50 %": optax.chain(ssam_jax.ssam(0.1, fisher(Unstructured(0.5))), steps.optimizer()),
        "SSAM, Fisher 2:4": optax.chain(
            ssam_jax.ssam(0.1, fisher(NM(2, 4, indivisible="whole"))), steps.optimizer()
        ),
    }


def placed(tree: Any, mesh: Mesh, *, batch: bool) -> Any:
    """Return the arrays sharded along their first axis (a batch), or their largest (parameters)."""

    def place(leaf: jax.Array) -> jax.Array:
        axes = range(leaf.ndim) if not batch else [0]
        fitting = [axis for axis in axes if leaf.shape[axis] % mesh.size == 0]
        best = max(fitting, key=lambda axis: leaf.shape[axis], default=None)
        spec = () if best is None else (*[None] * best, "devices")
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, tree)


def measure(config: Config) -> list[dict[str, Any]]:
    """Return what each method costs on each number of devices."""
    problem, rows, calls = problem_of(config), [], {}
    there = [count for count in config.devices if count <= jax.device_count()]
    for count in tqdm(there, desc="devices", disable=None):
        mesh = Mesh(jax.devices()[:count], ("devices",))
        params = placed(problem.params, mesh, batch=False)
        args = placed(problem.args, mesh, batch=True)
        for name, tx in methods().items():
            state = tx.init(params)
            program = compiled(steps.ascending(problem, tx), params, state, *args)
            calls[count, name] = functools.partial(program.call, params, state, *args)
            found = collectives(program.text)
            row = {"devices": count, "name": name, **program.costs}
            for where, conditional in (("step", False), ("refresh", True)):
                sizes = [one.size for one in found if one.conditional == conditional]
                row |= {f"{where}_collectives": len(sizes), f"{where}_bytes": sum(sizes)}
            rows.append(row)
    times = medians(calls, config.repeats)
    return [{**row, "ms": times[row["devices"], row["name"]]} for row in rows]


def tables(record: Record) -> dict[str, str]:
    """Return the table of costs of each device."""
    peak = record["limits"]["product"]

    def limit(row: dict[str, Any]) -> float:
        virtual = record["settings"]["hardware"]["platform"] == "cpu"
        return 1e3 * row["flops"] * (row["devices"] if virtual else 1) / peak

    columns = {
        "devices": ("devices", "d"),
        "step": ("name", ""),
        "operations, 10^9": (lambda row: row["flops"] / 1e9, ".3f"),
        "memory, MB": (lambda row: row["bytes"] and row["bytes"] / 1e6, ".2f"),
        "collectives": ("step_collectives", "d"),
        "of bytes": ("step_bytes", ",d"),
        "in a refresh": ("refresh_collectives", "d"),
        "of bytes ": ("refresh_bytes", ",d"),
        "ms": ("ms", ".1f"),
        "limit, ms": (limit, ".1f"),
        "ms / limit": (lambda row: row["ms"] / limit(row), ".1f"),
        "compile, s": (lambda row: row["trace_s"] + row["compile_s"], ".1f"),
    }
    return {"steps": markdown(record["results"], columns)}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", VIRTUAL)
    suite.main(sys.modules[__name__])
