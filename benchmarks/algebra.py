"""Time a training step of each direction, combine and carrier, next to SGD and SAM.

Run ``python benchmarks/algebra.py``; ``--help`` lists the sizes. Candidates take turns, and medians count. A
row with an ascent on every k-th step is the mean over k steps of its two compiled programs. Operations are
those of the products in the compiled step, bytes those of the state.
"""

import dataclasses
import functools
import sys
from typing import Any, NamedTuple

import jax
import optax
import step as every_form
import steps
import suite
from networks import Problem
from suite import Record, markdown, ratio
from timing import compiled, medians
from tqdm import tqdm

import ssam_jax
from ssam_jax import Unstructured, combine, directions, fisher_mask

SEEDS = (0, 1)
TIMED = True


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the comparison."""

    networks: tuple[str, ...] = ("ResNet", "transformer")
    """Which networks."""
    scale: int = 4
    """Factor on the widths, and on the batches, of small ones."""
    repeats: int = 25
    """Timed steps of each candidate; the median counts."""


QUICK = Config(scale=1, repeats=1)


class Way(NamedTuple):
    """One way to take a step.

    Attributes:
      tx: the transformation.
      gradients: 1 for a step of ``tx.update(grads, ...)`` alone, 2 with ``grad_fn``.
      every: an ascent on every so many steps, ``grad_fn=None`` on the others.
    """

    tx: Any
    gradients: int = 2
    every: int = 1


def ways() -> dict[str, Way]:
    """Return every way to take a step."""
    half = fisher_mask(Unstructured(0.5), refresh_every=100)

    def chained(**options: Any) -> Any:
        return optax.chain(ssam_jax.ssam(0.1, **options), steps.optimizer())

    def carried(**options: Any) -> Way:
        return Way(ssam_jax.carried(steps.optimizer(), 0.1, **options), gradients=1)

    against = optax.chain(directions.base_momentum(), optax.scale(-1.0))
    return {
        "SGD": Way(steps.optimizer(), gradients=1),
        "SAM": Way(chained()),
        "F-SAM": Way(chained(direction=directions.friendly())),
        "VaSSO": Way(chained(direction=optax.ema(0.9, debias=False))),
        "ZSharp": Way(chained(direction=directions.zscore(1.0))),
        "random direction": Way(chained(direction=directions.noise(0))),
        "WSAM": Way(chained(combine=combine.weighted(1.5))),
        "GSAM": Way(chained(combine=combine.gsam(0.1))),
        "LookSAM, every 10th step": Way(chained(combine=combine.looksam(0.5)), every=10),
        "SAM, every 10th step": Way(chained(), every=10),
        "carried": carried(),
        "carried, Fisher 50 %": carried(mask=half),
        "carried, MSAM": carried(direction=against),
    }


def measure(config: Config) -> dict[str, Any]:
    """Return the times, operations and bytes of state of each way, by network."""
    return {
        name: measured(every_form.problem_of(name, config.scale), config.repeats) for name in config.networks
    }


def measured(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each way."""
    programs, rows = {}, {}
    for name, way in tqdm(ways().items(), unit="program", disable=None):
        state = steps.state_of(way.tx, problem.params)
        args = (problem.params, state, *problem.args)
        with_ascent = steps.plain(problem, way.tx) if way.gradients == 1 else steps.ascending(problem, way.tx)
        parts = {True: with_ascent}
        if way.every > 1:
            parts[False] = without_ascent(problem, way.tx)
        for ascends, step in parts.items():
            program = compiled(step, *args)
            programs[name, ascends] = functools.partial(program.call, *args), program.costs["flops"]
        rows[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    times = medians({key: call for key, (call, _) in programs.items()}, repeats)
    found = []
    for name, way in ways().items():

        def mean(of: Any, name: str = name, way: Way = way) -> float:
            rest = of(name, False) * (way.every - 1) if way.every > 1 else 0
            return (of(name, True) + rest) / way.every

        found.append(
            {
                "step": name,
                "ms": mean(lambda *key: times[key]),
                "flops": mean(lambda *key: programs[key][1]),
                "state": rows[name] / sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params)),
            }
        )
    return found


def without_ascent(problem: Problem, tx: Any) -> steps.Step:
    """Return a step that passes ``grad_fn=None``."""

    def step(params: Any, state: Any, *args: Any) -> Any:
        return steps.moved(tx, jax.grad(problem.loss)(params, *args), state, params, grad_fn=None)

    return step


def tables(record: Record) -> dict[str, str]:
    """Return a table for each network, relative to SGD and to SAM."""
    found = {}
    for name, rows in record["results"].items():
        sgd, sam = (next(row for row in rows if row["step"] == step) for step in ("SGD", "SAM"))
        columns = {
            "step": ("step", ""),
            "ms": ("ms", ".1f"),
            "relative to SGD": (ratio(sgd["ms"]), ".3f"),
            "relative to SAM": (ratio(sam["ms"]), ".3f"),
            "operations, relative to SGD": (ratio(sgd["flops"], "flops"), ".3f"),
            "state, in trees of parameters": ("state", ".2f"),
        }
        found[name] = markdown(rows, columns)
    return found


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
