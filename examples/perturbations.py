"""What a sparse perturbation does to one step, on a loss of two parameters.

The rows are directions, the columns masks; the arrows of a panel are what three combines return. The picture
builds up in five stages: where a step starts, its direction, the mask, the perturbation, the way down.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure

from ssam_jax import combine, fixed_mask, ssam

RHO, STEP = 0.55, 0.22
DIRECTIONS = {"gradient": None, "momentum": optax.trace(0.9), "sign": optax.scale_by_sign()}
MASKS = {"all parameters": None, "only x": fixed_mask({"x": True, "y": False})}
COMBINES = {
    "perturbed gradient": (None, "#0072B2", "-"),
    "weighted(1.8)": (combine.weighted(1.8), "#D55E00", "--"),
    "gsam(0.7)": (combine.gsam(0.7), "#009E73", ":"),
}
STAGES = (
    "1  a step starts at w (circle)",
    "2  direction: which way is up?",
    "3  mask: which part of it?",
    "4  radius and ball: how far? w + eps (square)",
    "5  combine: the way down from w",
)
PATH = ((-0.55, 1.95), (-1.05, 1.6), (-1.3, 1.05))  # the last point is w
SIDE = np.linspace(-2.4, 1.0, 101), np.linspace(-0.6, 2.2, 101)


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw the picture, and its stages as an animation."""

    out: pathlib.Path = pathlib.Path("outputs/perturbations.png")
    """File for the last stage; the animation has the same name and ends in .gif."""
    dpi: int = 110
    """Pixels an inch, of 5 by 6.6 inches."""
    animate: bool = True
    """Whether to write the animation."""


def loss_fn(params: Any) -> jax.Array:
    """Return the loss: a bent valley with one steep side."""
    x, y = params["x"], params["y"]
    return 1.2 * (y - 0.35 * x**2) ** 2 + 0.12 * (x - 0.4) ** 2 + 0.25 * jnp.exp(-3 * (x + 1.2))


def vector(tree: Any) -> np.ndarray:
    """Return parameters or gradients as an array of two numbers."""
    return np.array([tree["x"], tree["y"]])


def steps(direction: Any, mask: Any) -> dict[str, Any]:
    """Return direction, perturbed point, and the update of each combine, of the last step of the path."""
    found: dict[str, Any] = {"updates": {}}
    transform = direction or optax.identity()
    points = [{"x": jnp.float32(x), "y": jnp.float32(y)} for x, y in PATH]
    for name, (combined, _, _) in COMBINES.items():
        tx = ssam(RHO, mask, direction=direction, combine=combined)
        visited: list[Any] = []

        def grad_fn(params: Any, i: int, visited: list[Any] = visited) -> Any:
            visited.append(params)
            return jax.grad(loss_fn)(params)

        state, memory = tx.init(points[0]), transform.init(points[0])
        for params in points:
            grads = jax.grad(loss_fn)(params)
            found["direction"], memory = transform.update(grads, memory, params)
            found["updates"][name], state = tx.update(grads, state, params, grad_fn=grad_fn)
        found["perturbed"] = visited[-1]
    return found


def arrow(axes: Any, start: np.ndarray, move: np.ndarray, **look: Any) -> None:
    """Draw an arrow."""
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0, "linewidth": 2, **look}
    axes.annotate("", start + move, start, arrowprops=style, zorder=5)


def draw_panel(axes: Any, found: dict[str, Any], mask: Any, stage: int) -> None:
    """Draw one direction with one mask, up to a stage."""
    surface = np.asarray(loss_fn(dict(zip("xy", map(jnp.float32, np.meshgrid(*SIDE))))))
    axes.contourf(*SIDE, np.log(surface + 0.3), 18, cmap="cividis", alpha=0.55)
    axes.plot(*zip(*PATH), "o:", color="black", markersize=3, linewidth=1)
    w, unit = np.array(PATH[-1]), vector(found["direction"])
    unit = RHO * unit / np.linalg.norm(unit)
    kept = unit * (1.0 if mask is None else np.array([1.0, 0.0]))
    if stage >= 3:
        circle = np.linspace(0, 2 * np.pi, 100)
        axes.plot(w[0] + RHO * np.cos(circle), w[1] + RHO * np.sin(circle), color="black", linewidth=0.8)
    if stage in (1, 2):
        arrow(axes, w, unit, color="black", alpha=1 if stage == 1 else 0.4)
    if stage == 2:
        arrow(axes, w, kept, color="black")
    if stage >= 3:
        arrow(axes, w, vector(found["perturbed"]) - w, color="black")
        axes.plot(*vector(found["perturbed"]), "s", color="white", markeredgecolor="black", zorder=6)
    if stage >= 4:
        for name, (_, color, line) in COMBINES.items():
            arrow(axes, w, -STEP * vector(found["updates"][name]), color=color, linestyle=line, linewidth=2.4)
    axes.plot(*w, "o", color="white", markeredgecolor="black", markersize=8, zorder=7)
    axes.set(xticks=[], yticks=[], xlim=SIDE[0][[0, -1]], ylim=SIDE[1][[0, -1]])


def draw(figure: Figure, found: dict[tuple[str, str], Any], stage: int) -> None:
    """Draw all panels, up to a stage."""
    figure.clear()
    grid = figure.subplots(len(DIRECTIONS), len(MASKS), squeeze=False)
    for row, direction in zip(grid, DIRECTIONS):
        row[0].set_ylabel(direction, fontsize=13)
        for axes, (name, mask) in zip(row, MASKS.items()):
            draw_panel(axes, found[direction, name], mask, stage)
    for axes, name in zip(grid[0], MASKS):
        axes.set_title(name, fontsize=13)
    for name, (_, color, line) in COMBINES.items():
        grid[0, 0].plot([], [], color=color, linestyle=line, linewidth=2.4, label=name)
    figure.suptitle(STAGES[stage], fontsize=13)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=1.6, columnspacing=1)


def main(config: Config) -> None:
    """Take the steps and draw them."""
    found = {(d, m): steps(DIRECTIONS[d], MASKS[m]) for d in DIRECTIONS for m in MASKS}
    figure = Figure(figsize=(5, 6.6), layout="constrained")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    if config.animate:
        order = [0, 1, 2, 3, 4, 4]  # the last stage stays longest
        stages = FuncAnimation(figure, lambda i: draw(figure, found, i), order, init_func=lambda: None)
        stages.save(config.out.with_suffix(".gif"), PillowWriter(fps=0.6), dpi=config.dpi)
    draw(figure, found, len(STAGES) - 1)
    figure.savefig(config.out, dpi=config.dpi)
    print(config.out)


if __name__ == "__main__":
    main(tyro.cli(Config))
