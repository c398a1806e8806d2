"""The README's code runs, in the order a reader meets it."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def code_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_every_code_block_runs_in_one_namespace(relaxed_promotion):
    blocks = code_blocks()
    assert len(blocks) >= 3
    namespace = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_every_local_link_has_a_target(target):
    assert (Path(__file__).parent.parent / target).exists()
