"""The code of README, CONTRIBUTING and the pages in docs runs in a reader's order; links lead somewhere.

The guides' code takes longer than the suite should: it is run by tests/guides.py, in `make docs`.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("docs/*/*.md")),
]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))
GUIDES = [name for name in PAGES if name.startswith("docs/guides/")]
BLOCKS = {name: re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S) for name, text in PAGES.items()}


def with_code(names):
    return [name for name in names if BLOCKS[name]]


def run_blocks(name):
    """Run the code of a page, block after block, in one namespace."""
    namespace = {}
    for number, block in enumerate(BLOCKS[name]):
        exec(compile(block, f"{name}, block {number}", "exec"), namespace)


def test_there_is_code_in_the_pages():
    assert min(len(BLOCKS[name]) for name in ("README.md", "CONTRIBUTING.md", "docs/two_pass.md")) >= 3


@pytest.mark.parametrize("name", with_code(name for name in PAGES if name not in GUIDES))
def test_every_code_block_of_a_page_runs_in_one_namespace(name, relaxed_promotion):
    run_blocks(name)


@pytest.mark.parametrize("name", PAGES)
def test_every_local_link_has_a_target(name):
    for target in re.findall(r'(?:\]\(|src=")(?!https?:)([^)#"]+)[)"]', PAGES[name]):
        assert (ROOT / name).parent.joinpath(target).exists(), target


def test_code_on_the_site_is_not_cut_off():
    """An article has room for 92 characters of code in a window of 1280 pixels."""
    lines = {
        name: re.findall(r"^```[^`]*?^```", text, flags=re.M | re.S)
        for name, text in PAGES.items()
        if name.startswith("docs/")
    }
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        lines[path.name] = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    wide = {name: [line for block in blocks for line in block.splitlines() if len(line) > 92]
            for name, blocks in lines.items()}  # fmt: skip
    assert not {name: found for name, found in wide.items() if found}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_its_links_have_targets(path):
    """The build of the site runs it."""
    notebook = json.loads(path.read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    text = "".join(line for cell in notebook["cells"] for line in cell["source"])
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)", text):
        assert path.parent.joinpath(target).exists(), target
