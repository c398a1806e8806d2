"""README's table of choices has the numbers of docs/results.md."""

import pytest

from ssam_experiments import choices


def test_the_table_in_readme_has_the_numbers_of_the_results():
    page = choices.README.read_text()
    assert choices.BLOCK.search(page)
    assert page == choices.written(page, choices.RESULTS.read_text())


def test_a_new_number_is_written_and_a_missing_row_is_named():
    results = choices.RESULTS.read_text()
    row = next(line for line in results.splitlines() if line.startswith("| quarter batch |"))
    accuracy = choices.cell(choices.rows_of(results)["quarter batch"], "test accuracy, %")
    changed = results.replace(row, row.replace(accuracy, "99.9 ± 0.1"))
    assert "99.9 ± 0.1" in choices.written(choices.README.read_text(), changed)
    with pytest.raises(KeyError, match="quarter batch"):
        choices.table(results.replace(f"{row}\n", ""))
