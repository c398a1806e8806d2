"""Run the study of docs/results.md, time its steps, or write its page: ``--help``.

For each row the radius is chosen by accuracy on held out validation examples with one seed: of three values
at first, then, while the best lies at an end and there are fewer than five, one more beyond it. The other
seeds train with that radius. Test examples choose nothing. Each run adds a line to runs.jsonl and is not
repeated, so a study that was killed resumes, and the page can be written from what there is at any time.
"""

import time

import tyro

from ssam_experiments.results import page, plan, timing
from ssam_experiments.results.rows import make_rows
from ssam_experiments.results.running import train
from ssam_experiments.results.study import Study
from ssam_experiments.results.tuning import look, next_run
from ssam_experiments.running import preparation
from ssam_experiments.running.files import read_rows


def check(study: Study) -> None:
    """Exit with a sentence unless rows and stages exist."""
    for flag, given, allowed in (
        ("--rows", study.rows, make_rows(study.epochs)),
        ("--stages", study.stages, plan.STAGES),
    ):
        unknown = sorted(set(given) - set(allowed))
        if unknown:
            raise SystemExit(f"error: {flag} must be of {', '.join(allowed)}; got {', '.join(unknown)}.")


def left(study: Study, stage: str) -> int:
    """Return the runs that are missing from a stage on, as far as is known."""
    path, count = study.out / "runs.jsonl", 0
    known, times = read_rows(path), timing.read(study.out)
    for name in study.stages[study.stages.index(stage) :]:
        count += sum(look(study, task, known).missing for task in plan.tasks(study, name, known, times))
    return count


def run(study: Study) -> None:
    """Make all runs, stage by stage, and say what is left."""
    seconds: list[float] = []
    for stage in study.stages:
        known, times = read_rows(study.out / "runs.jsonl"), timing.read(study.out)
        for task in plan.tasks(study, stage, known, times):
            while (following := next_run(study, task, known)) is not None:
                began = time.perf_counter()
                result = train(study, task, following)
                known = read_rows(study.out / "runs.jsonl")
                seconds.append(time.perf_counter() - began)
                runs = left(study, stage)
                hours = runs * sum(seconds[-20:]) / len(seconds[-20:]) / 3600
                print(
                    f"{time.strftime('%H:%M:%S')} {stage}: {task.setting}, {task.name}, rho"
                    f" {following.rho:g}, seed {following.seed}: validation"
                    f" {result['valid_accuracy']:.1%}, {seconds[-1]:.0f} s"
                    f" ({result['cpu_seconds']:.0f} s of CPU); left: about {runs} runs, {hours:.1f} h",
                    flush=True,
                )
            preparation.forget()


def main(study: Study) -> None:
    """Run, time or render."""
    check(study)
    if study.timing_only:
        timing.time_rows(study, plan.main_tasks(study))
    elif study.render_only:
        page.write(study)
    else:
        run(study)


if __name__ == "__main__":
    main(tyro.cli(Study))
