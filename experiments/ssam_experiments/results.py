"""Measure what sharpness-aware methods gain and cost: the table and pictures of docs/results.md.

For each method the radius is chosen by accuracy on held out validation examples with one seed: of three
values at first, and if the best lies at an end, one more beyond it. The other seeds then train with that
radius. Test examples choose nothing. Each run adds a line to runs.jsonl and is not repeated, so a study
that was killed resumes.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from ssam_experiments import report
from ssam_experiments.config import Config
from ssam_experiments.running import loop, preparation
from ssam_experiments.running.metrics import read_rows, write_whole
from ssam_experiments.running.optimizers import Chosen

SGD = "SGD"
LAST = "^(stage_2|head)/"
NORMS = "(^|/)norm"
SHARED = (  # settings of every run of a study
    "epochs",
    "limit",
    "validation",
    "label_noise",
    "lr",
    "weight_decay",
    "fisher_samples",
    "sharpness_rho",
)
WIDEST = 4  # values of the radius tried at most


@dataclasses.dataclass(frozen=True)
class Study:
    """Compare SGD, SAM and sparse SAM on a small network and a part of CIFAR-10, every row tuned alone."""

    data: pathlib.Path
    """Folder of CIFAR-10."""
    out: pathlib.Path = pathlib.Path("outputs/results")
    """Folder for runs.jsonl, results.json, table.md, pareto.png, and the runs' own folders."""
    seeds: int = 3
    """Runs of each row at its best radius."""
    epochs: int = 15
    """Passes over the training examples."""
    limit: int = 3000
    """Training examples."""
    validation: int = 2000
    """Held out examples that choose the radius."""
    label_noise: float = 0.3
    """Share of the training examples with a wrong label."""
    lr: float = 0.1
    """Peak learning rate of every row."""
    weight_decay: float = 5e-4
    """Weight decay of every row."""
    fisher_samples: int = 256
    """Training examples of which SSAM-F computes the Fisher information, once an epoch."""
    sharpness_rho: float = 0.1
    """Radius at which the final sharpness is measured, the same for every row."""
    timing_rounds: int = 15
    """Rounds in which the rows' steps are timed in turn."""
    rows: tuple[str, ...] = ()
    """Names of the rows to run; all if none is given."""


class Row(NamedTuple):
    """A line of the table: what it changes of the settings, and the radii to try first."""

    changes: dict[str, Any]
    radii: tuple[float, ...] = (0.05, 0.1, 0.2)


def make_rows(epochs: int) -> dict[str, Row]:
    """Return the rows by name."""
    sam, fisher, dynamic = {"method": "sam"}, {"method": "ssam-f"}, {"method": "ssam-d"}
    structured = {**fisher, "pattern": "structured", "refresh_epochs": max(1, epochs // 3)}
    channels = {"pattern": "structured", "unit": "channel"}
    last = {"method": "ssam-fixed", "perturb": LAST, "normalize": "masked"}
    late = {**sam, "ascent_from": epochs - epochs // 3}
    sparse, sparsest = (0.1, 0.2, 0.4), (0.2, 0.4, 0.8)
    radii = {0.5: sparse, 0.8: sparse, 0.9: sparsest, 0.95: sparsest}
    return {
        SGD: Row({}, ()),
        "SAM": Row(sam),
        **{f"SSAM-F {s:.0%}": Row({**fisher, "sparsity": s}, radii[s]) for s in radii},
        **{f"SSAM-D {s:.0%}": Row({**dynamic, "sparsity": s}, radii[s]) for s in radii},
        "SSAM-F 2:4": Row({**fisher, "pattern": "n:m"}, sparse),
        "SSAM-F 2:4, implicit": Row({**fisher, "pattern": "n:m", "form": "implicit"}),
        "SSAM-F structured 50%": Row({**structured, "normalize": "masked"}),
        "SSAM-F structured 50%, implicit": Row({**structured, "form": "implicit"}),
        "SSAM-D channels 50%": Row({**dynamic, **channels}, sparse),
        "last block": Row(last),
        "norm layers": Row({**last, "perturb": NORMS}, sparse),
        "quarter batch": Row({**sam, "ascent_fraction": 0.25}),
        "last third": Row(late),
        "every 4th step": Row({**sam, "ascent_every": 4}),
        "every 10th step": Row({**sam, "ascent_every": 10}, sparse),
        "every 4th, quarter batch": Row({**sam, "ascent_every": 4, "ascent_fraction": 0.25}),
        "last third, quarter batch": Row({**late, "ascent_fraction": 0.25}),
        "every 3rd, last block": Row({**last, "ascent_every": 3}),
    }


def settings(study: Study, row: Row, name: str, rho: float, seed: int) -> Config:
    """Return the settings of one run."""
    slug = "".join(c if c.isalnum() else "-" for c in name)
    config = Config(
        dataset="cifar10",
        data=study.data,
        model="resnet6",
        augment=False,
        fisher_samples=study.fisher_samples,
        epochs=study.epochs,
        limit=study.limit,
        validation=study.validation,
        label_noise=study.label_noise,
        lr=study.lr,
        weight_decay=study.weight_decay,
        evaluate_every=study.epochs,
        rho=rho,
        seed=seed,
        out=study.out / "runs" / slug / f"rho-{rho:g}-seed-{seed}",
    )
    return dataclasses.replace(config, **row.changes)


def trained(study: Study, row: Row, name: str, rho: float, seed: int) -> dict[str, Any]:
    """Return what one run came to, from runs.jsonl if it is there already."""
    path = study.out / "runs.jsonl"
    shared = {key: value for key, value in dataclasses.asdict(study).items() if key in SHARED}
    identity, known = {"row": name, "rho": rho, "seed": seed, **shared}, read_rows(path)
    for result in known:
        if identity.items() <= result.items():
            return result
    config = settings(study, row, name, rho, seed)
    try:
        state, rows = loop.train(config)
    except FloatingPointError:
        result = {"diverged": True, "valid_accuracy": 0.0}
    else:
        result = {"diverged": False, **rows[-1], **sharpness(study, config, state)}
    result.pop("density_by_leaf", None)
    result |= identity  # last: a run's final learning rate is not the study's
    write_whole(path, "".join(json.dumps(line) + "\n" for line in [*known, result]))
    return result


def sharpness(study: Study, config: Config, state: Any) -> dict[str, float]:
    """Return by how much the loss on training examples rises along its gradient, statistics at rest."""
    feed, programs = preparation.prepare(config)
    here, there = programs.rise(state, *feed.examples(0, 0, 2048), np.float32(study.sharpness_rho))
    return {"sharpness": float(there - here)}


def tuned(study: Study, row: Row, name: str) -> dict[str, Any]:
    """Choose the radius with the first seed, train the others with it."""
    tried = {rho: trained(study, row, name, rho, 0)["valid_accuracy"] for rho in row.radii or (1.0,)}
    best = max(tried, key=tried.get)
    while row.radii and best in (min(tried), max(tried)) and len(tried) < WIDEST:
        rho = best / 2 if best == min(tried) else best * 2
        tried[rho] = trained(study, row, name, rho, 0)["valid_accuracy"]
        best = max(tried, key=tried.get)
    runs = [trained(study, row, name, best, seed) for seed in range(study.seeds)]
    return {"rho": best if row.radii else None, "tried": tried, "runs": runs}


class Timed(NamedTuple):
    """A compiled step and how often it is taken, in shares of all steps."""

    step: Any
    share: float
    temporary_bytes: int


def compiled_steps(study: Study, row: Row, name: str) -> list[Timed]:
    """Return the compiled steps of a row: that of SAM, that of SGD, or both."""
    config = settings(study, row, name, 1.0, 0)
    feed, programs = preparation.prepare(config)
    state, source = programs.init(0), next(iter(feed.batches(0, 0, 0)))
    chosen = Chosen(*map(np.float32, (config.lr, config.weight_decay, config.rho)))
    steps = config.epochs * feed.steps_per_epoch
    ascents = sum(loop.ascends(config, i // feed.steps_per_epoch, i) for i in range(steps))
    timed = []
    for ascent, share in ((True, ascents / steps), (False, 1 - ascents / steps)):
        if share:
            active = loop.perturbed_leaves(config, state) if ascent else None
            args = (state, programs.no_totals(), chosen, source)
            compiled = programs.step.lower(*args, ascent=ascent, active=active).compile()
            memory = compiled.memory_analysis()
            timed.append(
                Timed(_repeated(compiled, programs.init(0), args[1:]), share, memory.temp_size_in_bytes)
            )
    return timed


def _repeated(compiled: Any, state: Any, rest: tuple) -> Any:
    """Return a function that takes another step from where the last one ended."""
    carry = [state, rest[0]]

    def step() -> None:
        carry[:] = compiled(*carry, *rest[1:])
        jax.block_until_ready(carry)

    return step


def time_steps(study: Study, rows: dict[str, Row], results: dict[str, Any]) -> None:
    """Add to the results the time of a step of each row, timed in turn, and its memory."""
    steps = {name: compiled_steps(study, row, name) for name, row in rows.items()}
    times: dict[Any, list[float]] = {}
    for turn in tqdm(range(study.timing_rounds + 1), desc="timing", unit="round", disable=None):
        for name, several in steps.items():
            for i, one in enumerate(several):
                start = time.perf_counter()
                one.step()
                if turn:  # the first warms up
                    times.setdefault((name, i), []).append(time.perf_counter() - start)
    for name, several in steps.items():
        median = sum(s.share * statistics.median(times[name, i]) for i, s in enumerate(several))
        results[name] |= {"step_seconds": median, "temporary_bytes": max(s.temporary_bytes for s in several)}


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| row | rho | test accuracy, % | step time / SGD | temporary memory, MB | sharpness, nats |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, r in results.items():
        runs, lost = converged(r), len(r["runs"]) - len(converged(r))
        accuracy = report.spread([100 * one["test_accuracy"] for one in runs], 1) if runs else "all diverged"
        if runs and lost:
            accuracy += f", {lost} of {len(r['runs'])} diverged"
        rise = report.spread([one["sharpness"] for one in runs], 3) if runs else ""
        rho = "" if r["rho"] is None else f"{r['rho']:g}"
        ratio = r["step_seconds"] / results[SGD]["step_seconds"]
        memory = f"{r['temporary_bytes'] / 1e6:.0f}"
        lines.append(f"| {name} | {rho} | {accuracy} | {ratio:.2f} | {memory} | {rise} |")
    return "\n".join(lines) + "\n"


def converged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row's runs at its best radius but for those that diverged."""
    return [one for one in result["runs"] if not one["diverged"]]


def pareto(results: dict[str, Any]) -> Figure:
    """Return accuracy against cost, with the rows that no other beats in both joined by a line.

    Points have numbers, in the order of cost, since many lie close together; names are at the right.
    """
    figure = Figure(figsize=(10.5, 6.5), layout="constrained")
    axes, names = figure.subplots(1, 2, width_ratios=(3, 1))
    accuracies = {name: [100 * one["test_accuracy"] for one in converged(r)] for name, r in results.items()}
    cost = {name: results[name]["step_seconds"] / results[SGD]["step_seconds"] for name in accuracies}
    shown = sorted((name for name, values in accuracies.items() if values), key=cost.__getitem__)
    points = {name: (cost[name], statistics.mean(accuracies[name])) for name in shown}
    for number, name in enumerate(shown, 1):
        values = accuracies[name]
        error = statistics.stdev(values) if len(values) > 1 else 0
        axes.errorbar(*points[name], yerr=error, fmt="o", color="#0072B2", ecolor="#BBBBBB", capsize=2)
        axes.annotate(str(number), points[name], xytext=(5, 3), textcoords="offset points", fontsize=8)
    front = [p for p in points.values() if all(q == p or q[0] > p[0] or q[1] < p[1] for q in points.values())]
    axes.plot(*zip(*front), color="#D55E00", linewidth=1, label="no row is both cheaper and better")
    axes.legend(frameon=False, loc="lower right")
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)
    axes.set(xlabel="time per step, relative to SGD", ylabel="test accuracy, % (mean ± standard deviation)")
    names.axis("off")
    listed = "\n".join(f"{number:2d}  {name}" for number, name in enumerate(shown, 1))
    names.text(0, 1, listed, va="top", fontsize=8, linespacing=1.6, transform=names.transAxes)
    return figure


def main(study: Study) -> None:
    """Run all rows, time them, write the table and the pictures."""
    rows = make_rows(study.epochs)
    unknown = set(study.rows) - set(rows)
    if unknown:
        raise SystemExit(f"error: --rows must be of {', '.join(rows)}; got {', '.join(sorted(unknown))}.")
    rows = {name: row for name, row in rows.items() if name == SGD or not study.rows or name in study.rows}
    results = {}
    for i, (name, row) in enumerate(rows.items()):
        print(f"{i + 1} of {len(rows)}: {name}", flush=True)
        results[name] = tuned(study, row, name)
    time_steps(study, rows, results)
    described = {
        k: v.name if isinstance(v, pathlib.Path) else v for k, v in dataclasses.asdict(study).items()
    }
    versions = {package.__name__: package.__version__ for package in (jax, np)}
    everything = {"study": described, "versions": versions, "device": str(jax.devices()[0]), "rows": results}
    write_whole(study.out / "results.json", json.dumps(everything, indent=1))
    write_whole(study.out / "table.md", table(results))
    pareto(results).savefig(study.out / "pareto.png", dpi=150)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Study))
