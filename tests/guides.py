"""The code of the guides runs. No part of the suite, for the time it takes: `make docs` names this file."""

import pytest
from test_readme import GUIDES, run_blocks, with_code


@pytest.mark.parametrize("name", with_code(GUIDES))
def test_every_code_block_of_a_guide_runs_in_one_namespace(name, relaxed_promotion):
    run_blocks(name)
