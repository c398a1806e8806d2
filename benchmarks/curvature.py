"""What a product with the Hessian costs, beside a gradient, alone and inside the loop of Lanczos' method.

Run ``python benchmarks/curvature.py``; ``--help`` lists the sizes. In the loop each product's result is the
next one's vector. ``loop_ready`` is what `ssam_jax.sharpness` does to convolutions on a CPU before it puts a
product into a loop. Candidates take turns, and medians count.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import networks
import suite
from suite import Record, markdown
from timing import medians

from ssam_jax.sharpness.convolutions import loop_ready

SEEDS = (0,)
TIMED = True


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the networks."""

    width: int = 128
    """Of the transformer; the perceptron is 8 times as wide, the ResNet's stages an eighth and a quarter."""
    batch: int = 16
    """Examples."""
    products: int = 5
    """Products in the loop."""
    repeats: int = 5
    """Timed calls of each candidate; the median counts."""


QUICK = Config(16, 2, 2, 1)


def problems(config: Config) -> dict[str, networks.Problem]:
    """Return the networks by name."""
    widths = (config.width // 8, config.width // 4)
    return {
        "MLP": networks.mlp(width=8 * config.width, batch=config.batch),
        "ResNet": networks.resnet(widths=widths, blocks=2, batch=config.batch, size=16),
        "vision transformer": networks.vit(width=config.width, batch=config.batch),
    }


def candidates(problem: networks.Problem, products: int) -> dict[str, tuple[Callable[..., Any], int]]:
    """Return each candidate, a function of parameters and vector, and how many products it computes."""

    def gradient(params: Any, vector: Any) -> Any:
        return jax.grad(problem.loss)(params, *problem.args)

    def product(params: Any, vector: Any) -> Any:
        return jax.jvp(lambda p: gradient(p, None), (params,), (vector,))[1]

    def looped(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda p, v: jax.lax.fori_loop(0, products, lambda _, v: fn(p, v), v)

    return {
        "gradient": (gradient, 1),
        "alone": (product, 1),
        "in a loop": (looped(product), products),
        "in a loop, `loop_ready`": (looped(loop_ready(product)), products),
    }


def measure(config: Config) -> dict[str, Any]:
    """Return the milliseconds of a product by network and candidate."""
    found = {}
    for name, problem in problems(config).items():
        every = candidates(problem, config.products)
        calls = {
            key: functools.partial(jax.jit(fn), problem.params, problem.params)
            for key, (fn, _) in every.items()
        }
        times = medians(calls, config.repeats)
        found[name] = {key: times[key] / count for key, (_, count) in every.items()}
    return {"ms": found}


def tables(record: Record) -> dict[str, str]:
    """Return the table of times relative to a gradient."""
    rows = [
        {"network": name, "ms": times["gradient"], **{k: t / times["gradient"] for k, t in times.items()}}
        for name, times in record["results"]["ms"].items()
    ]
    ways = [key for key in rows[0] if key not in ("network", "ms", "gradient")]
    columns = {"network": ("network", ""), "gradient, ms": ("ms", ".1f")}
    columns |= {f"product {way} / gradient": (way, ".2f") for way in ways}
    return {"products": markdown(rows, columns)}


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
