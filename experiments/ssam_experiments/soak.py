"""Kill, damage and starve small runs of the trainer at random, resume them, and count those that are lost.

``make soak``, or ``python -m ssam_experiments.soak --minutes 20``. A run survives if it ends, bit for bit,
where one that nothing happened to ends, and if every damage was refused by name. Another call with the same
``--out`` continues the count.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tyro

from ssam_experiments.damage import damage
from ssam_experiments.faults import ONE, PATIENCE, TWO, LostError, Run, codes_of, try_one, try_two
from ssam_experiments.ranges import check_ranges
from ssam_experiments.running import integrity
from ssam_experiments.running.files import RunError, append, make_folder, read_rows, write_whole

CHECKED = "damaged checkpoint, verified only"
RUN = (
    "--model=mlp", "--limit=64", "--batch=16", "--epochs=8", "--validation=64", "--checkpoint-every=1",
    "--method=ssam-f", "--pattern=n:m", "--fisher-samples=16", "--evaluate-every=4",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Soak:
    """Kill, damage and starve runs at random, resume them, and exit with 1 if one was lost."""

    minutes: float = 20.0
    """How long to begin new runs; the last one is brought to its end."""
    trials: int | None = None
    """Runs to try at most, in addition to those that --out knows."""
    damages: int = 50
    """Damages of its last checkpoint of which each run that has ended has to notice every one."""
    kinds: tuple[str, ...] = ONE
    """What happens to runs in one process."""
    two: float = 0.15
    """Share of the runs that are in two processes, of which one is killed."""
    seed: int = 0
    """Of what happens. When a signal arrives also depends on the machine."""
    out: pathlib.Path = pathlib.Path("outputs/soak")
    """Folder of the counts, and of the runs that were lost."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What is tried.

    Attributes:
      command: without ``--out``.
      end: returns from a run's folder what its end is, bit for bit.
    """

    command: Sequence[str]
    end: Callable[[pathlib.Path], str]


def arrays_of(folder: pathlib.Path) -> str:
    """Return the checksum of all arrays at the end of a run."""
    import jax

    from ssam_experiments.running import loop

    state = loop.load(folder)[1]
    leaves = jax.tree.leaves(
        (state.params, state.opt_state, state.step, jax.random.key_data(state.dropout_key))
    )
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


TRAINER = Trainer((sys.executable, "-m", "ssam_experiments.train", *RUN), arrays_of)


def unnoticed(folder: pathlib.Path, rng: np.random.Generator, count: int) -> int:
    """Return how many of ``count`` damages of the last checkpoint in a folder nothing notices."""
    *_, other, last = sorted(
        (path for path in folder.iterdir() if path.name.isdecimal()), key=lambda p: int(p.name)
    )
    missed, copy = 0, folder / "copy"
    for _ in range(count):
        shutil.copytree(last, copy)
        kind, path = damage(rng, copy, other)
        try:
            integrity.verify(copy, integrity.read(copy))
            missed += 1
            print(f"{kind} of {path} is not noticed.")
        except integrity.DamageError:
            pass
        shutil.rmtree(copy)
    return missed


def soak(config: Soak, trainer: Trainer = TRAINER) -> bool:
    """Try runs until the time is over, print the table, and return whether none was lost."""
    make_folder(config.out)
    path, began = config.out / "trials.jsonl", time.monotonic()
    done = read_rows(path, "happened", "lost")
    ends, spans = {}, {}
    for processes in (1, 2) if config.two else (1,):
        whole = Run(trainer.command, config.out / f"whole-{processes}", processes)
        shutil.rmtree(whole.folder, ignore_errors=True)
        spans[processes] = _measure(whole)
        ends[processes] = trainer.end(whole.folder)
    first = len(done)
    while len(done) - first != config.trials and time.monotonic() - began < 60 * config.minutes:
        rng = np.random.default_rng((config.seed, len(done)))
        folder = config.out / f"run-{len(done)}"
        shutil.rmtree(folder, ignore_errors=True)
        row = _trial(config, trainer, folder, rng, spans, ends)
        done.append(row)
        append(path, json.dumps(row) + "\n")
        print(f"run {len(done)}: {', '.join(row['happened'])}: {row['lost'] or 'survived'}", flush=True)
    text = table(done)
    write_whole(config.out / "table.md", text)
    print(text)
    return not any(row["lost"] or row["missed"] for row in done)


def _trial(
    config: Soak, trainer: Trainer, folder: pathlib.Path, rng: np.random.Generator, spans: Any, ends: Any
) -> dict[str, Any]:
    processes = 2 if rng.random() < config.two else 1
    lost, missed = "", 0
    try:
        if processes == 2:
            happened = try_two(trainer.command, folder, rng, spans[2])
        else:
            happened = try_one(trainer.command, folder, rng, spans[1], config.kinds)
        if trainer.end(folder) != ends[processes]:
            lost = "it ends elsewhere than a run that nothing happened to"
        missed = unnoticed(folder / "checkpoints", rng, config.damages)
    except LostError as error:
        lost, happened = error.args
    except RunError as error:
        lost = str(error)
    if not lost:
        shutil.rmtree(folder)
    return {"happened": happened, "lost": lost, "checked": config.damages, "missed": missed}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the counts, in Markdown."""
    tried: collections.Counter[str] = collections.Counter()
    lost: collections.Counter[str] = collections.Counter()
    for row in rows:
        for kind in row["happened"]:
            tried[kind] += 1
            lost[kind] += bool(row["lost"])
        if not row["lost"]:
            tried[CHECKED] += row["checked"]
            lost[CHECKED] += row["missed"]
    lines = ["| what happened | tried | survived | lost |", "| --- | ---: | ---: | ---: |"]
    for kind in (*ONE, TWO, CHECKED):
        lines.append(f"| {kind} | {tried[kind]} | {tried[kind] - lost[kind]} | {lost[kind]} |")
    return "\n".join(lines) + "\n"


def _measure(run: Run) -> float:
    """Let a run end, and return the seconds from its first checkpoint on."""
    with run.started() as members:
        while not run.steps() and members[0].poll() is None:
            time.sleep(0.005)
        began = time.monotonic()
        codes = codes_of(members, PATIENCE)
    if any(codes):
        sys.exit(f"error: a run that nothing happens to fails: {run.output[-1000:]}")
    return time.monotonic() - began


def main(config: Soak, trainer: Trainer = TRAINER) -> None:
    """Check the settings and try; exit with 1 if a run was lost."""
    rules = {
        "above 0": (lambda v: v > 0, ("minutes",)),
        "at least 0": (lambda v: v is None or v >= 0, ("trials", "damages", "seed")),
        "from 0 to 1": (lambda v: 0 <= v <= 1, ("two",)),
        f"of {', '.join(ONE)}": (lambda v: v and {*v} <= {*ONE}, ("kinds",)),
    }
    try:
        check_ranges(config, rules, lambda name: f"--{name}")
        survived = soak(config, trainer)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not survived:
        sys.exit(f"error: runs were lost; they are in {config.out}.")


if __name__ == "__main__":
    main(tyro.cli(Soak))
