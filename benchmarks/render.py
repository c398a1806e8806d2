"""Write the tables and pictures of docs/performance.md from the files of results.

Run ``python benchmarks/render.py``. A page's text is written by hand; what stands between
``<!-- table: step.MLP -->`` and ``<!-- end -->`` is replaced by the table of that name of that benchmark, and
so are pictures (``<!-- plot: step.times -->``), and what is said about the runs (``<!-- table: runs -->``). A
block whose results do not exist stays as it is. Results of other devices than CPUs are in a folder of their
own in that of the results, and make up one block together, named like the folder (``<!-- table: gpu -->``).
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tyro
from suite import BENCHMARKS, RESULTS, Record, markdown

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- (?:table|plot): ([\w.-]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is written from what."""

    page: Path = PAGE
    """The page."""
    results: Path = RESULTS
    """Folder of the JSON files."""


def load(folder: Path) -> dict[str, Record]:
    """Return the records of a folder, by benchmark."""
    paths = {name: folder / f"{name}.json" for name in BENCHMARKS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def tables(folder: Path) -> dict[str, str]:
    """Return every table for which a folder has results, by the name that a page calls it."""
    records = load(folder)
    found = {"runs": runs(records)} if records else {}
    if {"step", "algebra"} <= set(records):
        found["verdict"] = verdict(records)
    for name, record in records.items():
        every = importlib.import_module(name).tables(record)
        found |= {f"{name}.{table}": text for table, text in every.items()}
    for other in sorted(path for path in folder.glob("*") if path.is_dir()):
        found[other.name] = "\n\n".join(tables(other).values())
    return found


VERDICT = (  # what a reader asks for, its benchmark and the names of its steps there
    ("SAM: two gradients", "step", ("SAM",)),
    ("a mask of single entries: no time saved", "step", ("Fisher 50 %", "Fisher 2:4", "dynamic 50 %")),
    ("the last half of the layers, by two-pass gradients", "step", ("the same by two-pass gradients",)),
    ("`carried`: one gradient", "algebra", ("carried",)),
)


def verdict(records: dict[str, Record]) -> str:
    """Return in four rows what a step costs in SGD steps, from the cheapest to the dearest network."""

    def ratios(benchmark: str, steps: Iterable[str]) -> list[float]:
        found = []
        for network in records[benchmark]["results"].values():
            rows = network["rows"] if isinstance(network, dict) else network
            ms = {row.get("name", row.get("step")): row["ms"] for row in rows}
            found += [ms[step] / ms["SGD"] for step in steps if step in ms]
        return found

    rows = [(text, found) for text, name, steps in VERDICT if (found := ratios(name, steps))]
    columns = {
        "what you choose": (lambda row: row[0], ""),
        "a step, in SGD steps": (lambda row: f"{min(row[1]):.2f} to {max(row[1]):.2f}", ""),
    }
    return markdown(rows, columns)


def runs(records: dict[str, Record]) -> str:
    """Return where and how each benchmark was run, and what its machine could do at that time."""

    def words(values: dict[str, Any]) -> str:
        return ", ".join(f"{key} {value}" for key, value in values.items())

    def best(name: str) -> Any:
        return lambda row: row["limits"] and row["limits"][name] / 1e9

    settings: dict[str, list[str]] = {}
    for name, record in records.items():
        hardware = record["settings"]["hardware"]
        where = f"{words(record['settings']['versions'])}; {hardware['processor']}, {hardware['cores']} cores"
        if hardware["platform"] != "cpu":
            where += f"; {hardware['device']}"
        settings.setdefault(where, []).append(name)
    columns = {
        "run": (lambda row: f"`{row['command']}`".replace("|", r"\|"), ""),
        "date": ("date", ""),
        "seeds": (lambda row: ", ".join(map(str, row["seeds"])), ""),
        "seconds": ("seconds", ".0f"),
        "bandwidth, GB/s": (best("bandwidth"), ".1f"),
        "products, 10^9/s": (best("product"), ".0f"),
        "convolutions, 10^9/s": (best("convolution"), ".0f"),
    }
    where = "\n".join(f"- {', '.join(names)}: {text}" for text, names in settings.items())
    return f"{where}\n\n{markdown(list(records.values()), columns)}"


def replaced(page: str, blocks: dict[str, str]) -> str:
    """Return a page with the blocks that there are in the places of their names."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}\n{blocks[found[2]]}\n\n" if found[2] in blocks else found[0]

    return BLOCK.sub(block, page)


def names(page: str) -> list[str]:
    """Return the names of a page's blocks."""
    return [found[2] for found in BLOCK.finditer(page)]


def draw(folder: Path, images: Path, wanted: Iterable[str]) -> dict[str, str]:
    """Draw the wanted pictures for which a folder has results; return the Markdown that shows them."""
    links = {}
    for name, record in load(folder).items():
        plots = getattr(importlib.import_module(name), "plots", None)
        for plot, (text, figure) in plots(record).items() if plots else ():
            if f"{name}.{plot}" in wanted:
                images.mkdir(exist_ok=True)
                figure.savefig(images / f"{name}_{plot}.png")
                links[f"{name}.{plot}"] = f"![{text}](images/{name}_{plot}.png)"
    return links


def main(options: Options) -> None:
    """Write the page and its pictures."""
    page, blocks = options.page.read_text(), tables(options.results)
    if missing := sorted(set(blocks) - set(names(page))):
        raise SystemExit(f"error: {options.page} must have a place for each table; it has none for {missing}")
    links = draw(options.results, options.page.parent / "images", names(page))
    options.page.write_text(replaced(page, {**blocks, **links}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
