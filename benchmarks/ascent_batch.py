"""What a step costs whose ascent gradient comes from a part of the batch, in operations and in time.

Run ``python benchmarks/ascent_batch.py``; ``--help`` lists the sizes. A step is that of docs/two_pass.md: two
calls of `two_pass_value_and_grad`, of which the first sees a part of the batch and the second all of it.
Candidates take turns, and medians count. Everything is relative to an SGD step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import networks
import tyro
from counting import program_flops
from timing import medians, print_setting
from tqdm import tqdm
from two_pass import loss_of, optimizer, sgd_step, stepped

from ssam_jax import explain_two_pass, two_pass_value_and_grad
from ssam_jax.two_pass.active import Active


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the comparison; the network is the ResNet of two_pass.py."""

    scale: int = 4
    """Factor on the widths of the small network that the tests use."""
    batch: int = 16
    """Examples in a step."""
    shares: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    """Shares of the batch that the ascent gradient sees; each must be a whole number of examples."""
    last: int = 2
    """Last parts, of 8, that the second half of the table perturbs; the first half perturbs everything."""
    repeats: int = 11
    """Timed steps of each candidate; the median counts."""


def partial_step(problem: networks.Problem, active: Active, rows: int) -> Callable[..., Any]:
    """Return a step whose ascent gradient sees the first ``rows`` examples."""
    two_pass = two_pass_value_and_grad(loss_of(problem))

    def step(params: Any, state: Any, stats: Any, images: jax.Array, labels: jax.Array) -> Any:
        _, grads, _ = two_pass(params, stats, images[:rows], labels[:rows], active=active)
        _, _, grad_fn = two_pass(params, stats, images, labels, active=active)
        return stepped(problem, active, params, state, grads, grad_fn)

    return step


def main(config: Config) -> None:
    """Print the table.

    Raises:
      ValueError: a share is not a whole number of examples of the batch.
    """
    for share in config.shares:
        if not 0 < share <= 1 or config.batch * share % 1:
            raise ValueError(
                f"shares must be above 0, at most 1, and whole numbers of the batch's {config.batch}"
                f" examples, got {share}."
            )
    widths = (8 * config.scale, 16 * config.scale)
    problem = networks.resnet(widths=widths, blocks=3, batch=config.batch, size=16)
    args = (problem.params, optimizer().init(problem.params), *problem.args)
    everything, last = problem.last(len(problem.parts)), problem.last(config.last)
    keys = [(active, share) for active in (everything, last) for share in config.shares]
    steps = {key: partial_step(problem, key[0], round(config.batch * key[1])) for key in keys}
    programs = {}
    with tqdm(total=len(steps) + 1, unit="program", disable=None) as bar:
        for key, step in {"SGD": sgd_step(problem), **steps}.items():
            programs[key] = jax.jit(step).lower(*args).compile()
            bar.update()
    times = medians({k: functools.partial(program, *args) for k, program in programs.items()}, config.repeats)
    flops = {key: program_flops(program.as_text()) for key, program in programs.items()}
    print("| perturbed | share of the batch b | predicted 1 + b p | operations | time |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for active, share in keys:
        report = explain_two_pass(loss_of(problem), problem.params, *problem.args, active=active)
        name = "everything" if active == everything else f"last {config.last} of {len(problem.parts)} parts"
        row = [
            1 + share * (report.relative_to_sgd - 1),
            *(found[active, share] / found["SGD"] for found in (flops, times)),
        ]
        print(f"| {name} | {share:g} | " + " | ".join(f"{x:.2f}" for x in row) + " |")


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__)
    print_setting()
    main(chosen)
