"""What the implicit form costs: its first backward pass and a whole step, beside the explicit form's.

Run ``python benchmarks/implicit.py``; ``--help`` lists the sizes. Operations are those of the matrix
products in the compiled program. A mask that is known while compiling removes products; one of single
entries, 2:4 or not, removes none, for XLA has no sparse product to put in their place.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import networks
import optax
import tyro
from counting import contraction_flops
from timing import medians, print_setting

import ssam_jax
from ssam_jax import NM, Unstructured, two_pass_value_and_grad


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the vision transformer."""

    width: int = 128
    """Of the residual stream."""
    layers: int = 4
    """Transformer layers."""
    batch: int = 16
    """Images of 32 x 32, 64 patches each."""
    repeats: int = 21
    """Timed calls of each candidate; the median counts."""


def candidates(problem: networks.Problem) -> dict[str, tuple[Any, Any]]:
    """Return for each candidate the mask of the implicit form, None for the explicit one, and active."""
    params = problem.params
    in_mlp = networks.active_where(params, lambda path: "block" in path and "/Dense_" in path)
    attention = tuple(not entry for entry in in_mlp)
    some = jax.tree.map(abs, params)
    return {
        "SAM": (None, None),
        "explicit, perceptrons not perturbed": (None, attention),
        "implicit, perceptrons masked": (attention, None),
        "implicit, perceptrons masked and not perturbed": (attention, attention),
        "implicit, the same mask as arrays": (networks.mask_of(params, attention), None),
        "implicit, 2:4": (NM(2, 4, indivisible="whole")(some), None),
        "implicit, unstructured 50 %": (Unstructured(0.5)(some), None),
    }


def first_pass(problem: networks.Problem, mask: Any, active: Any) -> Callable[..., Any]:
    """Return the function of parameters and mask that computes the ascent gradient."""

    def gradient(params: Any, arrays: Any) -> Any:
        return passes(problem, params, mask if arrays is None else arrays, active)[1]

    return gradient


def passes(problem: networks.Problem, params: Any, mask: Any, active: Any) -> Any:
    """Return value, ascent gradient and gradient function."""
    if mask is None:
        return two_pass_value_and_grad(problem.loss_fn)(params, *problem.args, active=active)
    implicit = two_pass_value_and_grad(problem.loss_fn, form="implicit")
    return implicit(params, *problem.args, active=active, mask=mask)


def whole_step(problem: networks.Problem, mask: Any, active: Any) -> Callable[..., Any]:
    """Return the function that takes a training step."""
    form = "explicit" if mask is None else "implicit"
    rule = ssam_jax.fixed_mask(lambda path: True)
    tx = optax.chain(ssam_jax.ssam(0.1, rule, form=form, normalize="masked"), optax.sgd(0.1))

    def step(params: Any, arrays: Any) -> Any:
        _, grads, grad_fn = passes(problem, params, mask if arrays is None else arrays, active)
        updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates)

    return step


def main(config: Config) -> None:
    """Print the table."""
    problem = networks.vit(width=config.width, layers=config.layers, batch=config.batch, size=32, heads=4)
    params = problem.params

    def gradient(params: Any, arrays: Any) -> Any:
        return jax.grad(problem.loss_fn)(params, *problem.args)

    def sgd(params: Any, arrays: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient(params, arrays))

    functions = {"a gradient": (gradient, None), "an SGD step": (sgd, None)}
    for name, (mask, active) in candidates(problem).items():
        known = mask if isinstance(mask, tuple) or mask is None else ()
        arrays = None if known is mask else mask
        functions[f"{name}: first pass"] = (first_pass(problem, known, active), arrays)
        functions[f"{name}: step"] = (whole_step(problem, known, active), arrays)
    flops = {name: contraction_flops(fn, params, arrays) for name, (fn, arrays) in functions.items()}
    calls = {name: functools.partial(jax.jit(fn), params, arrays) for name, (fn, arrays) in functions.items()}
    times = medians(calls, config.repeats)
    count = sum(p.size for p in jax.tree.leaves(params))
    print(f"Vision transformer of {count:,} parameters, {config.batch} images\n")
    print("| first pass | operations / gradient | time / gradient | step: operations / SGD | time / SGD |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in candidates(problem):
        row = []
        for part, unit in (("first pass", "a gradient"), ("step", "an SGD step")):
            row += [table[f"{name}: {part}"] / table[unit] for table in (flops, times)]
        print(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in row) + " |")


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__)
    print_setting()
    main(chosen)
