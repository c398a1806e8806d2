"""Write README's table of budgets and choices from the tables of docs/results.md.

Run ``python -m ssam_experiments.choices`` after a new study; a test compares the two pages.
"""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
README, RESULTS = ROOT / "README.md", ROOT / "docs/results.md"
BLOCK = re.compile(r"(<!-- table: choices -->\n).*?(?=<!-- end -->)", re.DOTALL)

ROWS = {  # of the study: the gradients of a step, and what a reader chooses
    "SGD": ("1", "SGD"),
    "every 10th step": ("1.1", "SAM on every tenth step"),
    "quarter batch": ("1.25", "SAM, the ascent on a quarter of the batch"),
    "SAM": ("2", "SAM"),
    "SSAM-F 50%": ("2", "SSAM-F, 50 %"),
}


def rows_of(page: str) -> dict[str, dict[str, str]]:
    """Return the rows of a page's tables by their first cell, each a mapping from titles to cells."""
    found: dict[str, dict[str, str]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in block.splitlines()]
        titles, rows = lines[0], lines[2:]
        for row in rows:
            found.setdefault(row[0], dict(zip(titles, row)))
    return found


def table(results: str) -> str:
    """Return README's table.

    Raises:
      KeyError: the results lack a row or a column.
    """
    rows = {
        name: row for name, row in rows_of(results).items() if any("time / SGD" in title for title in row)
    }
    titles = ("gradients a step", "choice", "step time / SGD", "test accuracy, %")
    lines = [f"| {' | '.join(titles)} |", "| ---: | --- | ---: | ---: |"]
    for name, (gradients, choice) in ROWS.items():
        time, accuracy = (cell(rows[name], title) for title in ("time / SGD", "test accuracy, %"))
        lines.append(f"| {gradients} | {choice} | {time} | {accuracy} |")
    return "\n".join(lines) + "\n"


def cell(row: dict[str, str], title: str) -> str:
    """Return the number in a cell, with its spread, by a part of its title."""
    text = next((text for key, text in row.items() if title in key), None)
    if text is None:
        raise KeyError(title)
    found = re.match(r"[\d.]+(?: ± [\d.]+)?", text)
    return found[0] if found else text


def written(readme: str, results: str) -> str:
    """Return README with its table written anew."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{table(results)}\n", readme)


if __name__ == "__main__":
    README.write_text(written(README.read_text(), RESULTS.read_text()))
