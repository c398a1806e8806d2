"""Side-by-side timing on a noisy machine, what a compiled program costs, and what the machine can do."""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from counting import program_flops
from jax import lax

Name = TypeVar("Name")


def medians(
    candidates: Mapping[Name, Callable[[], Any]], repeats: int, warmups: int = 2
) -> dict[Name, float]:
    """Return each candidate's median time in milliseconds.

    The candidates take turns, so that whatever else the machine does falls on all of them alike. Each is
    called ``warmups`` times before, to compile and to warm up, and twice in a turn, of which the second
    counts: the call before a step of training is such a step too, not that of a larger program.
    """
    return {name: float(np.median(values)) for name, values in turns(candidates, repeats, warmups).items()}


def turns(
    candidates: Mapping[Name, Callable[[], Any]], repeats: int, warmups: int = 2
) -> dict[Name, list[float]]:
    """Return all of each candidate's times in milliseconds, measured as for `medians`."""
    for candidate in candidates.values():
        for _ in range(warmups):
            jax.block_until_ready(candidate())
    times: dict[Name, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            jax.block_until_ready(candidate())
            start = time.perf_counter()
            jax.block_until_ready(candidate())
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


class Program(NamedTuple):
    """A compiled program and what is known of it before it runs.

    Attributes:
      call: takes the arguments it was compiled for.
      costs: for JSON: ``trace_s``, ``compile_s`` (seconds), ``flops`` (operations of the products),
        ``bytes`` (arguments, results and temporaries on one device; None where it is not known).
      text: the optimised HLO module.
    """

    call: Callable[..., Any]
    costs: dict[str, Any]
    text: str


def compiled(fn: Callable[..., Any], *args: Any) -> Program:
    """Compile a function of arrays, or of their ``jax.ShapeDtypeStruct``, taking the time."""
    gc.collect()
    start = time.perf_counter()
    lowered = jax.jit(lambda *xs: fn(*xs)).lower(*args)  # a new function: nothing is cached
    traced = time.perf_counter()
    executable = lowered.compile()
    done = time.perf_counter()
    text, memory = executable.as_text(), executable.memory_analysis()
    parts = ("argument", "output", "temp")
    size = memory and sum(getattr(memory, f"{part}_size_in_bytes") for part in parts)
    costs = {
        "trace_s": traced - start,
        "compile_s": done - traced,
        "flops": program_flops(text),
        "bytes": size and size - memory.alias_size_in_bytes,
    }
    return Program(executable, costs, text)


def limits(*, quick: bool) -> dict[str, float]:
    """Return what the machine can do at best, measured now.

    Returns:
      ``read`` and ``copy``, bytes a second of a sum over a large float32 array and of adding 1 to it;
      ``bandwidth``, the larger; ``product`` and ``convolution``, operations a second of a large
      matrix product and of a 3 x 3 convolution of many channels, float32 of the default precision.
    """
    large = 1 if jax.default_backend() == "cpu" else 4
    entries, side, batch = (2**20, 256, 1) if quick else (large * 2**26, large * 2048, large * 16)
    array, matrix = jnp.ones(entries), jnp.ones((side, side))
    images, kernel = jnp.ones((batch, 32, 32, 128)), jnp.ones((3, 3, 128, 128))

    @jax.jit
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        dimensions = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dimensions)

    calls = {
        "read": (jax.jit(jnp.sum), (array,), array.nbytes),
        "copy": (jax.jit(lambda x: x + 1), (array,), 2 * array.nbytes),
        "product": (jax.jit(jnp.dot), (matrix, matrix), 2 * side**3),
        "convolution": (convolve, (images, kernel), 2 * batch * 30**2 * kernel.size),
    }
    best = turns({name: lambda fn=fn, args=args: fn(*args) for name, (fn, args, _) in calls.items()}, 7)
    found = {name: amount / (1e-3 * min(best[name])) for name, (_, _, amount) in calls.items()}
    return {**found, "bandwidth": max(found["read"], found["copy"])}
