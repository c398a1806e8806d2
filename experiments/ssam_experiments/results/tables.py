"""The tables of docs/results.md and docs/guides/choosing.md, from what has run."""

import statistics
from typing import Any

from ssam_experiments import report
from ssam_experiments.results import plan
from ssam_experiments.results.claims import claims
from ssam_experiments.results.formatting import accuracy, cell, markdown, rho
from ssam_experiments.results.rows import LAYERWISE, SAM, SGD
from ssam_experiments.results.spellings import spelling
from ssam_experiments.results.study import Study
from ssam_experiments.results.tuning import Found, Known, Task, accuracies, look, mean

BUDGETS = (1.01, 1.03, 1.05, 1.1, 1.3, 1.5, 2.1)
STAGES = {
    "rows": "Rows, tuned, with 3 seeds",
    "seeds": "Rows with 5 seeds",
    "when-not": "Where SAM does not help",
    "equal-time": "At equal time",
    "vit": "The small ViT",
    "widths": "Widths",
}
TITLES = {
    "resnet6": "ResNet-6, 15 epochs, 30 % wrong labels",
    "clean labels": "ResNet-6, 15 epochs, clean labels",
    "3 epochs": "ResNet-6, 3 epochs, 30 % wrong labels",
    "single epoch": "ResNet-6, 1 epoch of 45,000 images, clean labels",
}


def methods(study: Study, known: Known, times: dict[str, Any]) -> str:
    """Return the table of all rows."""
    titles = [
        "row", "rho", "test accuracy, % (seeds)", "operations / SGD", "time / SGD", "memory, MB",
        "sharpness, nats",
    ]  # fmt: skip
    rows = []
    for task in plan.main_tasks(study):
        found = look(study, task, known)
        timed = times.get(task.name, {})
        rises = [one["sharpness"] for one in found.runs if not one["diverged"]]
        memory = timed.get("temporary_bytes")
        rows.append(
            [
                task.name,
                rho(found),
                accuracy(found, task.seeds),
                cell(plan.price(study, task.name, times), 3),
                cell(plan.measured(task.name, times)),
                cell(memory and memory / 1e6, 0),
                report.spread(rises, 3) if rises else "",
            ]
        )
    return markdown(titles, rows)


def equal_time(study: Study, known: Known, times: dict[str, Any]) -> str:
    """Return the table of runs that take as long as SAM, or half as long, next to those of other rows."""
    tasks = plan.equal_time(study, known, times)
    names = list(dict.fromkeys(task.name for task in tasks))
    sam = plan.ratio(study, SAM, times)
    every = {task.name: task for task in plan.main_tasks(study)}
    rows = []
    for name in names:
        several = [every[name], *(task for task in tasks if task.name == name)]
        for task in sorted(several, key=lambda task: task.epochs or study.epochs):
            epochs = task.epochs or study.epochs
            share = epochs * plan.ratio(study, name, times) / (study.epochs * sam)
            found = look(study, task, known)
            rows.append([name, rho(found), str(epochs), cell(share), accuracy(found, task.seeds)])
    return markdown(["row", "rho", "epochs", "time / SAM's", "test accuracy, % (seeds)"], rows)


def vit(study: Study, known: Known, times: dict[str, Any]) -> str:
    """Return the table of the small ViT."""
    del times
    rows = []
    for task in plan.tasks(study, "vit", known, {}):
        found = look(study, task, known)
        name = "AdamW" if task.name == SGD else task.name
        rows.append([name, rho(found), accuracy(found, task.seeds), cell(plan.cost(study, task.name), 3)])
    return markdown(["row", "rho", "test accuracy, % (seeds)", "gradients a step"], rows)


def when_not(study: Study, known: Known, times: dict[str, Any]) -> str:
    """Return SGD and SAM where SAM helps, and where it does not."""
    tasks = [*plan.main_tasks(study)[:2], *plan.tasks(study, "when-not", known, times)]
    rows = []
    for setting in plan.WHEN_NOT:
        pair = {task.name: (task, look(study, task, known)) for task in tasks if task.setting == setting}
        (plain, a), (sam, b) = pair[SGD], pair[SAM]
        before, after = mean(a), mean(b)
        gain = "" if before is None or after is None else f"{round(after - before, 1) + 0.0:+.1f}"
        rows.append([TITLES[setting], accuracy(a, plain.seeds), accuracy(b, sam.seeds), rho(b), gain])
    return markdown(["", "SGD, % (seeds)", "SAM, % (seeds)", "rho", "gain"], rows)


def widths(study: Study, known: Known, times: dict[str, Any]) -> str:
    """Return the best radius by width, and what the best of the narrowest costs at each width."""
    by_name: dict[str, list[Task]] = {}
    for task in plan.tasks(study, "widths", known, times):
        by_name.setdefault(task.name, []).append(task)
    rows = []
    for name in (SAM, LAYERWISE):
        narrow = look(study, by_name[name][0], known).rho
        for width, task in zip(plan.WIDTHS, by_name[name]):
            found = look(study, task, known)
            moved = None
            if narrow in found.tried and found.rho is not None:
                moved = 100 * (found.tried[found.rho] - found.tried[narrow])
            rows.append([name, str(width), rho(found), accuracy(found, task.seeds), cell(moved, 1)])
    lost = "lost at the best rho of width 8, validation points"
    titles = ["", "width", "best rho", "test accuracy, % (seeds)", lost]
    return markdown(titles, rows)


def usable(study: Study, known: Known) -> dict[str, Found]:
    """Return the rows of which all of the study's least number of seeds have run at a tuned radius."""
    found = {task.name: look(study, task, known) for task in plan.main_tasks(study)}
    complete = {name: one for name, one in found.items() if one.tuned and len(one.runs) >= study.seeds}
    return {name: one for name, one in complete.items() if accuracies(one)}


def budgets(study: Study, known: Known, times: dict[str, Any]) -> str:
    """Return what to take for each budget: the row with the best mean accuracy, and what it reached."""
    rows: list[list[str]] = []
    found, seen = usable(study, known), None
    for budget in BUDGETS:
        prices = {name: round(plan.price(study, name, times), 3) for name in found if name != SGD}
        affordable = [name for name, price in prices.items() if price <= budget]
        if not affordable:
            continue
        best = max(affordable, key=lambda name: statistics.mean(accuracies(found[name])))
        if best == seen:
            continue
        seen = best
        rows.append(
            [
                f"{budget:.2f}",
                spelling(best, found[best].rho),
                accuracy(found[best], study.seeds),
                cell(plan.price(study, best, times), 3),
                cell(plan.measured(best, times)),
            ]
        )
    if SGD in found:
        rows.insert(0, ["1.00", "nothing: SGD", accuracy(found[SGD], study.seeds), "1.000", "1.00"])
    titles = ["budget, SGD steps", "take", "test accuracy, % (seeds)", "operations / SGD", "time / SGD"]
    return markdown(titles, rows, left=2)


def aims(study: Study, known: Known, times: dict[str, Any]) -> str:
    """Return whether a cheap row is within a standard deviation of SAM, and what share of its gain it has."""
    found = usable(study, known)
    if not {SGD, SAM} <= found.keys():
        return "- SGD and SAM have not run yet."
    sam, sgd = accuracies(found[SAM]), accuracies(found[SGD])
    bar, gain = statistics.mean(sam) - statistics.stdev(sam), statistics.mean(sam) - statistics.mean(sgd)
    lines = []
    for limit in (1.03, 1.01):
        names = [n for n in found if n != SGD and round(plan.price(study, n, times), 3) <= limit]
        if not names:
            lines.append(f"- At most {limit:.2f} counted operations: no row has all of its seeds yet.")
            continue
        best = max(names, key=lambda name: statistics.mean(accuracies(found[name])))
        reached = statistics.mean(accuracies(found[best]))
        share = (reached - statistics.mean(sgd)) / gain
        within = "within" if reached >= bar else "not within"
        timed = plan.measured(best, times)
        time = f"{timed:.2f} in time" if timed else "not timed yet"
        values = f"{report.spread(accuracies(found[best]), 1)} % ({len(found[best].runs)} seeds; {time})"
        lines.append(
            f"- At most {limit:.2f} counted operations: {best} reaches {values}, {within} one standard"
            f" deviation of SAM ({report.spread(sam, 1)}), and {share:.0%} of SAM's gain over SGD."
        )
    return "\n".join(lines)


def missing(study: Study, known: Known, times: dict[str, Any]) -> str:
    """Return, stage by stage, how much has run and which rows lack runs."""
    lines = []
    for stage, title in STAGES.items():
        tasks = plan.tasks(study, stage, known, times)
        lacking = [look(study, task, known).missing for task in tasks]
        names = [_title(task) for task, runs in zip(tasks, lacking) if runs]
        done, count = len(tasks) - len(names), sum(lacking)
        line = f"- {title}: {done} of {len(tasks)} complete"
        lines.append(f"{line}; about {count} runs missing: {'; '.join(names)}." if names else f"{line}.")
    untimed = [task.name for task in plan.main_tasks(study) if plan.measured(task.name, times) is None]
    if untimed:
        lines.append(f"- Not timed: {'; '.join(untimed)}.")
    earlier = [name for name, one in times.items() if one.get("earlier")]
    if earlier:
        lines.append(f"- Timed with the version before, not again since: {'; '.join(earlier)}.")
    return "\n".join(lines)


def _title(task: Task) -> str:
    where = "" if task.setting in ("resnet6", "vit") else f" ({task.setting})"
    return f"{task.name}{where}" if task.epochs is None else f"{task.name} ({task.epochs} epochs)"


TABLES = {
    "methods": methods, "equal-time": equal_time, "vit": vit, "when-not": when_not, "widths": widths,
    "budgets": budgets, "aims": aims, "missing": missing,
    "claims": claims,
}  # fmt: skip
"""By the name that a page calls them."""
