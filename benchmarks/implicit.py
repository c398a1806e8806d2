"""What the implicit form costs: its first backward pass and a whole step, beside the explicit form's.

Run ``python benchmarks/implicit.py``; ``--help`` lists the sizes. Operations are those of the matrix
products in the compiled program. A mask that is known while compiling removes products; one of single
entries, 2:4 or not, removes none, for XLA has no sparse product to put in their place.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import steps
import suite
from suite import Record, markdown
from timing import compiled, medians

import ssam_jax
from ssam_jax import NM, two_pass_value_and_grad

SEEDS = (0, 1, 2)
TIMED = True


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the vision transformer."""

    width: int = 128
    """Of the residual stream."""
    layers: int = 2
    """Transformer layers."""
    batch: int = 16
    """Images of 32 x 32, 64 patches each."""
    repeats: int = 15
    """Timed calls of each candidate; the median counts."""


QUICK = Config(8, 1, 1, 1)


def candidates(problem: networks.Problem) -> dict[str, tuple[Any, Any]]:
    """Return for each candidate the mask of the implicit form, None for the explicit one, and active."""
    params = problem.params
    in_mlp = networks.active_where(params, lambda path: "block" in path and "/Dense_" in path)
    attention = tuple(not entry for entry in in_mlp)
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    generator = np.random.default_rng(2)
    entries = [jnp.asarray(generator.random(shape) < 0.5) for shape in shapes]
    return {
        "SAM": (None, None),
        "explicit, perceptrons not perturbed": (None, attention),
        "implicit, perceptrons masked": (attention, None),
        "implicit, perceptrons masked and not perturbed": (attention, attention),
        "implicit, the same mask as arrays": (networks.mask_of(params, attention), None),
        "implicit, 2:4": (jax.jit(NM(2, 4, indivisible="whole"))(params), None),
        "implicit, unstructured 50 %": (jax.tree.unflatten(jax.tree.structure(params), entries), None),
    }


def first_pass(problem: networks.Problem, known: Any, active: Any) -> Callable[..., Any]:
    """Return the function of parameters, mask and batch that computes the ascent gradient."""
    passes = two_pass_value_and_grad(problem.loss, form="explicit" if known is None else "implicit")

    def gradient(params: Any, arrays: Any, *args: Any) -> Any:
        mask = {} if known is None else {"mask": known or arrays}
        return passes(params, *args, active=active, **mask)[1]

    return gradient


def programs(problem: networks.Problem, mask: Any, active: Any) -> dict[str, Any]:
    """Return the first pass and the whole step of a candidate, compiled, and their arguments.

    A mask that is a tuple is known while compiling; one of arrays is an argument.
    """
    arrays = None if isinstance(mask, tuple) else mask
    known = mask if arrays is None else ()
    form: Any = "explicit" if mask is None else "implicit"
    rule = ssam_jax.fixed_mask((lambda path: True) if arrays is None else arrays)
    tx = optax.chain(ssam_jax.ssam(0.1, rule, form=form, normalize="masked"), steps.optimizer())
    step = steps.two_passes(problem, tx, active, known or None, form)
    first = first_pass(problem, known, active)
    return {
        "first": prepared(first, problem.params, arrays, *problem.args),
        "step": prepared(step, problem.params, tx.init(problem.params), *problem.args),
    }


def prepared(fn: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return the call of a compiled function, and its costs."""
    program = compiled(fn, *args)
    return functools.partial(program.call, *args), program.costs


def measure(config: Config) -> dict[str, Any]:
    """Return the costs of each candidate's first pass and whole step."""
    problem = networks.vit(width=config.width, layers=config.layers, batch=config.batch, size=32, heads=4)
    base = steps.optimizer()
    state = base.init(problem.params)
    found = {
        "unit": {
            "first": prepared(jax.grad(problem.loss), problem.params, *problem.args),
            "step": prepared(steps.plain(problem, base), problem.params, state, *problem.args),
        },
        **{name: programs(problem, *which) for name, which in candidates(problem).items()},
    }
    calls = {(name, part): call for name, parts in found.items() for part, (call, _) in parts.items()}
    times = medians(calls, config.repeats)
    rows = {
        name: {part: {**costs, "ms": times[name, part]} for part, (_, costs) in parts.items()}
        for name, parts in found.items()
    }
    return {"parameters": networks.count(problem.params), "batch": config.batch, "rows": rows}


def tables(record: Record) -> dict[str, str]:
    """Return the table of candidates."""
    found, peak = record["results"], record["limits"]["product"]
    rows = dict(found["rows"])
    unit = rows.pop("unit")

    def over(part: str, key: str) -> tuple[Any, str]:
        return (lambda row: row[1][part][key] / unit[part][key]), ".2f"

    columns = {
        "first pass": (0, ""),
        "operations / gradient": over("first", "flops"),
        "time / gradient": over("first", "ms"),
        "step: operations / SGD": over("step", "flops"),
        "time / SGD": over("step", "ms"),
        "step, ms": (lambda row: row[1]["step"]["ms"], ".1f"),
        "time / limit": (lambda row: row[1]["step"]["ms"] * peak / 1e3 / row[1]["step"]["flops"], ".1f"),
    }
    title = f"Vision transformer of {found['parameters']:,} parameters, {found['batch']} images"
    return {"steps": f"{title}\n\n{markdown(list(rows.items()), columns)}"}


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
