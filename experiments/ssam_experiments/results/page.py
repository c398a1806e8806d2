"""Write what has run into docs/results.md and docs/guides/choosing.md, so that they cannot go stale.

What stands between ``<!-- study: methods -->`` and ``<!-- end -->`` on a page is the table of that name. The
text around the blocks is written by hand.
"""

import json
import pathlib
import re
import shutil

from ssam_experiments.results import pictures, plan, tables, timing
from ssam_experiments.results.study import Study
from ssam_experiments.results.tuning import accuracies, look
from ssam_experiments.running.files import read_rows, write_whole

BLOCK = re.compile(r"(<!-- study: ([\w-]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
PAGES = ("results.md", "guides/choosing.md")
KEPT = ("runs.jsonl", "timing.json")


def rendered(text: str, study: Study) -> str:
    """Return a page with its blocks made anew from the study's folder."""
    known, times = read_rows(study.out / "runs.jsonl"), timing.read(study.out)

    def block(found: re.Match) -> str:
        return f"{found[1]}\n{tables.TABLES[found[2]](study, known, times)}\n\n"

    return BLOCK.sub(block, text)


def digest(study: Study) -> dict:
    """Return what each row came to, without its runs."""
    known = read_rows(study.out / "runs.jsonl")
    rows = {}
    for stage in plan.STAGES[:-1]:
        for task in plan.tasks(study, stage, known, timing.read(study.out)):
            found = look(study, task, known)
            epochs = task.epochs or plan.epochs(study, task.setting)
            rows[f"{task.setting}, {epochs} epochs: {task.name}"] = {
                "rho": found.rho,
                "tried": found.tried,
                "tuned": found.tuned,
                "test_accuracy": accuracies(found),
                "missing": found.missing,
            }
    return rows


def write(study: Study) -> None:
    """Write both pages, the pictures and the digest, and keep the runs with them."""
    kept = study.docs / "results"
    for page in PAGES:
        path: pathlib.Path = study.docs / page
        path.write_text(rendered(path.read_text(), study))
    known, times = read_rows(study.out / "runs.jsonl"), timing.read(study.out)
    for name, draw in pictures.PICTURES.items():
        draw(study, known, times).savefig(study.docs / "images" / f"{name}.png", dpi=120)
    write_whole(kept / "results.json", json.dumps(digest(study), indent=1))
    for name in KEPT:
        if (study.out / name).exists() and study.out.resolve() != kept.resolve():
            shutil.copy(study.out / name, kept / name)
    print(tables.methods(study, known, times))
    print(tables.missing(study, known, times))
