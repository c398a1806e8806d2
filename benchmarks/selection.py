"""Time exact selection against sorting: global top-k and 2:4 masks.

Run ``python benchmarks/selection.py``; ``--help`` lists the sizes.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import plotting
import suite
from jax import lax
from suite import Record, markdown, ratio
from timing import compiled, medians

import ssam_jax
from ssam_jax.masks import selection

SEEDS = (0, 1, 2, 3)
TIMED = True
Times = dict[str, float]
Calls = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the comparison."""

    scores: tuple[int, ...] = (10**5, 10**6, 10**7, 10**8)
    """Scores in all, spread over ten leaves."""
    sorted_up_to: int = 10**7
    """Scores up to which the alternatives, which take much longer, are timed too, once."""
    design: int = 10**7
    """Scores for what the search is built on."""
    leaves: tuple[int, ...] = (10, 20, 40)
    """Numbers of leaves at which compiling is timed."""
    repeats: int = 5
    """Timed calls of each candidate; the median counts."""


QUICK = Config((10**4, 10**5), 10**4, 10**4, (1, 2), 1)


def timed(candidates: Calls, slow: Calls, repeats: int) -> Times:
    """Return medians of the candidates and one time of each slow one, compiled before."""
    return {**medians(candidates, repeats), **medians(slow, 1, warmups=0)}


def global_selection(size: int, config: Config) -> Times:
    """Keep half of the scores: ours, ``jnp.sort`` of the concatenation, ``lax.top_k``."""
    keys = jax.random.split(jax.random.key(0), 10)
    leaves = [jax.random.normal(key, (10, size // 100)) ** 2 for key in keys]
    dead = [jnp.where(leaf < 1, 0, leaf) for leaf in leaves]
    pattern = jax.jit(ssam_jax.Unstructured(sparsity=0.5))
    read = jax.jit(lambda xs: sum(jnp.sum(x) for x in xs))
    ours = {
        "ssam_jax.Unstructured(0.5)": lambda: pattern(leaves),
        "the same, 68 % of the scores 0": lambda: pattern(dead),
        "one read of the scores": lambda: read(leaves),
    }
    if size > config.sorted_up_to:
        return medians(ours, config.repeats)
    flat, half = jnp.concatenate([leaf.ravel() for leaf in leaves]), size // 2
    by_sort = compiled(lambda x: x >= jnp.sort(x)[half], flat).call
    by_top_k = compiled(lambda x: jnp.zeros(x.shape, bool).at[lax.top_k(x, half)[1]].set(True), flat).call
    slow = {
        "jnp.sort of the concatenation": lambda: by_sort(flat),
        "lax.top_k of the concatenation": lambda: by_top_k(flat),
    }
    return timed(ours, slow, config.repeats)


def two_of_four(size: int, config: Config) -> Times:
    """Keep two of every four entries: ours, two argsorts, ``lax.top_k``."""
    scores = jax.random.normal(jax.random.key(1), (size // 100, 100)) ** 2

    def argsorts(x: jax.Array) -> jax.Array:
        rank = jnp.argsort(jnp.argsort(-x.reshape(-1, 25, 4), axis=-1), axis=-1)
        return (rank < 2).reshape(x.shape)

    def top_k(x: jax.Array) -> jax.Array:
        best = lax.top_k(x.reshape(-1, 25, 4), 2)[1]
        return jax.nn.one_hot(best, 4, dtype=bool).any(axis=-2).reshape(x.shape)

    ours = jax.jit(ssam_jax.NM(2, 4))
    fast = {"ssam_jax.NM(2, 4)": lambda: ours(scores)}
    if size > config.sorted_up_to:
        return medians(fast, config.repeats)
    others = {"two argsorts": argsorts, "lax.top_k of groups": top_k}
    slow = {name: functools.partial(compiled(fn, scores).call, scores) for name, fn in others.items()}
    return timed(fast, slow, config.repeats)


def in_one_reduction(keys: jax.Array, pivots: jax.Array) -> jax.Array:
    """Count each row's keys at or above each pivot as the search does."""
    above = tuple((keys >= pivot).astype(jnp.int32) for pivot in pivots)
    nothing = (jnp.int32(0),) * len(above)
    return jnp.stack(lax.reduce(above, nothing, lambda a, b: tuple(x + y for x, y in zip(a, b)), (1,)))


def design(config: Config) -> dict[str, Times]:
    """Show what the search is built on: pivots a pass, and one reduction in place of several."""
    keys = jax.random.bits(jax.random.key(2), (config.design // 1000, 1000), jnp.uint32)
    pivots = jnp.arange(1, 8, dtype=jnp.uint32) * jnp.uint32(2**29)
    one_reduction = jax.jit(in_one_reduction)
    seven_sums = jax.jit(lambda k, ps: jnp.stack([jnp.sum(k >= p, axis=1, dtype=jnp.int32) for p in ps]))
    counting = {
        "one reduction of seven operands": lambda: one_reduction(keys, pivots),
        "seven sums": lambda: seven_sums(keys, pivots),
    }
    scores = jax.random.normal(jax.random.key(3), keys.shape) ** 2
    chosen, searches = selection.PIVOTS, {}
    for selection.PIVOTS in (3, 7, 15):
        search = compiled(ssam_jax.Unstructured(0.5), scores).call
        searches[f"{selection.PIVOTS} pivots a pass"] = functools.partial(search, scores)
    selection.PIVOTS = chosen
    return {"counting": medians(counting, config.repeats), "pivots": medians(searches, config.repeats)}


def compile_times(config: Config) -> list[dict[str, float]]:
    """Return how long a selection takes to compile, which grows with the number of leaves."""
    rows = []
    for count in config.leaves:
        leaves = [jax.ShapeDtypeStruct((64, 100 + i), jnp.float32) for i in range(count)]
        rows.append({"leaves": count, **compiled(ssam_jax.Unstructured(0.5), leaves).costs})
    return rows


def measure(config: Config) -> dict[str, Any]:
    """Return all times in milliseconds."""
    return {
        "global": {str(size): global_selection(size, config) for size in config.scores},
        "two_of_four": {str(size): two_of_four(size, config) for size in config.scores},
        "design": {"scores": config.design, **design(config)},
        "compile": compile_times(config),
    }


def tables(record: Record) -> dict[str, str]:
    """Return the tables of selection, 2:4 masks, their design, and compiling."""
    found = record["results"]
    built = found["design"]
    size = f"{built['scores']:,}"
    compiling = {
        "leaves": ("leaves", "d"),
        "trace, s": ("trace_s", ".1f"),
        "compile, s": ("compile_s", ".1f"),
    }
    bandwidth = record["limits"]["bandwidth"]
    return {
        "global": by_size(found["global"], bandwidth),
        "two_of_four": by_size(found["two_of_four"], bandwidth),
        "counting": f"Counting {size} keys at or above seven pivots\n\n"
        + compared(built["counting"], "one reduction of seven operands"),
        "pivots": f"Global selection of half of {size} scores in one leaf\n\n"
        + compared(built["pivots"], f"{selection.PIVOTS} pivots a pass"),
        "compile": markdown(found["compile"], compiling),
    }


def by_size(times: dict[str, Times], bandwidth: float) -> str:
    """Return a table with a row for each number of scores and candidate."""
    rows = []
    for size, found in times.items():
        ours, limit = next(iter(found.values())), 1e3 * 5 * int(size) / bandwidth
        rows += [
            {"size": int(size), "name": name, "ms": ms, "ours": ours, "limit": limit}
            for name, ms in found.items()
        ]
    columns = {
        "scores": ("size", ",d"),
        "candidate": ("name", ""),
        "ms": ("ms", ".2f"),
        "/ ssam_jax": (lambda row: row["ms"] / row["ours"], ".2f"),
        "limit, ms": ("limit", ".2f"),
        "ms / limit": (lambda row: row["ms"] / row["limit"], ".1f"),
    }
    return markdown(rows, columns)


def compared(times: Times, reference: str) -> str:
    """Return a table of times and of their ratios to the reference's."""
    rows = [{"name": name, "ms": ms} for name, ms in times.items()]
    columns = {
        "candidate": ("name", ""),
        "median, ms": ("ms", ".2f"),
        f"ratio to {reference}": (ratio(times[reference]), ".2f"),
    }
    return markdown(rows, columns)


def plots(record: Record) -> dict[str, Any]:
    """Return the picture of times by the number of scores."""
    figure, axes = plotting.figure()
    times, bandwidth = record["results"]["global"], record["limits"]["bandwidth"]
    names = next(iter(times.values()))
    for name, color, marker in zip(names, plotting.COLORS, plotting.MARKERS):
        sizes = [size for size, found in times.items() if name in found]
        axes.loglog(
            [int(size) for size in sizes],
            [times[size][name] for size in sizes],
            marker=marker,
            color=color,
            label=name,
        )
    sizes = [int(size) for size in times]
    label = "limit: one read at the machine's bandwidth"
    limit = [1e3 * 4 * size / bandwidth for size in sizes]
    axes.loglog(sizes, limit, ":", color=plotting.LIMIT, label=label)
    axes.set_xlabel("scores")
    axes.set_ylabel("time of a selection (ms)")
    figure.legend(loc="outside lower center", ncols=2)
    return {"times": ("Time of a global selection by the number of scores", figure)}


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
