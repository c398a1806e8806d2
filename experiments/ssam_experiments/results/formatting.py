"""Cells and tables in Markdown."""

from ssam_experiments import report
from ssam_experiments.results.tuning import Found, accuracies


def markdown(titles: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Return a Markdown table, the columns but the first ``left`` aligned to the right."""
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * left}{' ---: |' * (len(titles) - left)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def accuracy(found: Found, seeds: int) -> str:
    """Return the test accuracy of a task and its number of seeds, with what it lacks."""
    values = accuracies(found)
    if not found.runs:
        return "not run yet"
    text = report.spread(values, 1) if values else "all diverged"
    if lost := len(found.runs) - len(values):
        text += f", {lost} diverged" if values else ""
    text += f" ({len(found.runs)})"
    lacks = [] if found.tuned else ["rho is not tuned to the end"]
    if len(found.runs) < seeds:
        lacks.append(f"{seeds - len(found.runs)} of {seeds} seeds missing")
    return f"{text}; {', '.join(lacks)}" if lacks else text


def rho(found: Found) -> str:
    """Return the radius of a task."""
    return "" if found.rho is None else f"{found.rho:g}"


def cell(value: float | None, digits: int = 2) -> str:
    """Return a number, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def values_of(found: Found) -> str:
    """Return mean and standard deviation of the test accuracies that are not of diverged runs."""
    return report.spread(accuracies(found), 1)
