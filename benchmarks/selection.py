"""Time exact selection against sorting: global top-k and 2:4 masks.

Run ``python benchmarks/selection.py``; ``--help`` lists the sizes.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import tyro
from jax import lax
from timing import medians, print_setting, print_table

import ssam_jax
from ssam_jax.masks import selection


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the comparison."""

    scores: int = 10_000_000
    """Scores in all, spread over ten leaves."""
    side: int = 4096
    """Rows and columns of the matrix for 2:4."""
    repeats: int = 3
    """Timed calls of each candidate; the median counts."""


def global_selection(config: Config) -> None:
    """Keep half of the scores: ours, ``jnp.sort`` of the concatenation, ``lax.top_k``."""
    keys = jax.random.split(jax.random.key(0), 10)
    leaves = [jax.random.normal(key, (10, config.scores // 100)) ** 2 for key in keys]
    flat = jnp.concatenate([leaf.ravel() for leaf in leaves])
    half = flat.size // 2
    pattern = jax.jit(ssam_jax.Unstructured(sparsity=0.5))
    by_sort = jax.jit(lambda x: x >= jnp.sort(x)[half])
    by_top_k = jax.jit(lambda x: jnp.zeros(x.shape, bool).at[lax.top_k(x, half)[1]].set(True))
    read = jax.jit(lambda xs: sum(jnp.sum(x) for x in xs))
    dead = [jnp.where(leaf < 1, 0, leaf) for leaf in leaves]
    times = medians(
        {
            "ssam_jax.Unstructured(0.5)": lambda: pattern(leaves),
            "the same, 68 % of the scores 0": lambda: pattern(dead),
            "jnp.sort of the concatenation": lambda: by_sort(flat),
            "lax.top_k of the concatenation": lambda: by_top_k(flat),
            "one read of the scores": lambda: read(leaves),
        },
        config.repeats,
    )
    print(f"Global selection of {half:,} out of {flat.size:,} scores\n")
    print_table(times, "ssam_jax.Unstructured(0.5)")


def two_of_four(config: Config) -> None:
    """Keep two of every four entries: ours, two argsorts, ``lax.top_k``."""
    scores = jax.random.normal(jax.random.key(1), (config.side, config.side)) ** 2

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(config.side, config.side // 4, 4)

    def argsorts(x: jax.Array) -> jax.Array:
        rank = jnp.argsort(jnp.argsort(-grouped(x), axis=-1), axis=-1)
        return (rank < 2).reshape(x.shape)

    def top_k(x: jax.Array) -> jax.Array:
        best = lax.top_k(grouped(x), 2)[1]
        return jax.nn.one_hot(best, 4, dtype=bool).any(axis=-2).reshape(x.shape)

    ours, by_argsorts, by_top_k = map(jax.jit, (ssam_jax.NM(2, 4), argsorts, top_k))
    times = medians(
        {
            "ssam_jax.NM(2, 4)": lambda: ours(scores),
            "two argsorts": lambda: by_argsorts(scores),
            "lax.top_k": lambda: by_top_k(scores),
        },
        config.repeats,
    )
    print(f"\n2:4 mask of {config.side} x {config.side} scores\n")
    print_table(times, "ssam_jax.NM(2, 4)")


def design(config: Config) -> None:
    """Show what the search is built on: pivots a pass, and one reduction in place of several."""
    keys = jax.random.bits(jax.random.key(2), (10, config.scores // 10), jnp.uint32)
    pivots = jnp.arange(1, 8, dtype=jnp.uint32) * jnp.uint32(2**29)
    one_reduction = jax.jit(selection._count_at_least)
    seven_sums = jax.jit(lambda k, ps: jnp.stack([jnp.sum(k >= p, dtype=jnp.int32) for p in ps]))
    times = medians(
        {
            "one reduction of seven operands": lambda: one_reduction(keys, pivots),
            "seven sums": lambda: seven_sums(keys, pivots),
        },
        config.repeats,
    )
    print(f"\nCounting {keys.size:,} keys at or above seven pivots\n")
    print_table(times, "one reduction of seven operands")

    scores = jax.random.normal(jax.random.key(3), keys.shape) ** 2
    chosen, searches = selection.PIVOTS, {}
    for selection.PIVOTS in (3, 7, 15):
        search = jax.jit(lambda x: ssam_jax.Unstructured(0.5)(x)).lower(scores).compile()
        searches[f"{selection.PIVOTS} pivots a pass"] = functools.partial(search, scores)
    selection.PIVOTS = chosen
    times = medians(searches, config.repeats)
    print(f"\nGlobal selection of {scores.size // 2:,} out of {scores.size:,} scores in one leaf\n")
    print_table(times, "7 pivots a pass")


def compile_time() -> None:
    """Print how long a selection takes to compile, which grows with the number of leaves."""
    print("\n| leaves | compile time of a selection, s |\n| ---: | ---: |")
    for count in (10, 40, 160):
        leaves = [jnp.zeros((64, 100 + i)) for i in range(count)]
        lowered = jax.jit(lambda xs: ssam_jax.Unstructured(0.5)(xs)).lower(leaves)
        start = time.perf_counter()
        lowered.compile()
        print(f"| {count} | {time.perf_counter() - start:.1f} |")


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    print_setting()
    global_selection(config)
    two_of_four(config)
    design(config)
    compile_time()
