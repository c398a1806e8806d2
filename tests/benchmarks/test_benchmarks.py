"""The benchmarks run, go on where they were killed, and the page shows the numbers of their files."""

import dataclasses
import importlib
import subprocess
import types

import memory
import pytest
import render
import run
import step
import suite


def test_the_tables_of_the_page_are_those_that_the_files_of_results_render_to(tmp_path):
    page = render.PAGE.read_text()
    links = render.draw(suite.RESULTS, tmp_path / "images", render.names(page))
    blocks = {**render.tables(suite.RESULTS), **links}
    assert "memory.patterns" in blocks
    assert set(blocks) <= set(render.names(page))
    assert all("--quick" not in record["command"] for record in render.load(suite.RESULTS).values())
    assert render.replaced(page, blocks) == page
    images = render.PAGE.parent / "images"
    assert all((images / path.name).exists() for path in (tmp_path / "images").glob("*"))


def test_every_place_of_the_page_is_there_once_and_belongs_to_a_benchmark():
    names = render.names(render.PAGE.read_text())
    assert len(set(names)) == len(names)
    assert {name.split(".")[0] for name in names} == {*suite.BENCHMARKS, "runs", "verdict", "gpu"}


def test_blocks_without_results_and_the_text_around_them_stay():
    page = (
        "a 1\n\n<!-- table: x.y -->\nold\n<!-- end -->\n\nb\n\n<!-- plot: x.z -->\n\nold\n\n<!-- end -->\nc\n"
    )
    assert render.names(page) == ["x.y", "x.z"]
    new = render.replaced(page, {"x.y": r"| \1 |"})
    assert new == page.replace("-->\nold\n", "-->\n\n| \\1 |\n\n", 1)
    assert render.replaced(new, {"x.y": r"| \1 |"}) == new


@pytest.mark.parametrize("name", suite.BENCHMARKS)
def test_every_benchmark_has_full_and_quick_sizes_seeds_and_tables(name):
    module = importlib.import_module(name)
    assert module.Config() != module.QUICK and type(module.QUICK) is module.Config
    assert module.SEEDS and module.TIMED in (True, False)
    assert callable(module.measure) and callable(module.tables)


@dataclasses.dataclass(frozen=True)
class Sizes:
    size: int = 1
    more: tuple[int, ...] = (1, 2)


def test_what_was_measured_is_kept_unless_sizes_or_code_differ_or_it_is_wanted_again(tmp_path, monkeypatch):
    measured = []
    fake = types.SimpleNamespace(__file__="fake.py", SEEDS=(0,), TIMED=False)
    fake.measure = lambda config: measured.append(config) or {"size": (config.size,)}
    options = suite.Options(out=tmp_path / "new")
    first = suite.run(fake, Sizes(), options)
    assert suite.run(fake, Sizes(), options) == first and len(measured) == 1
    assert first["results"] == {"size": [1]} and first["settings"]["config"] == {"size": 1, "more": [1, 2]}
    assert [path.name for path in options.out.iterdir()] == ["fake.json"]
    suite.run(fake, Sizes(), dataclasses.replace(options, again=True))
    suite.run(fake, Sizes(2), options)
    setting = suite.setting()
    monkeypatch.setattr(suite, "setting", lambda: {**setting, "code": "another"})
    assert suite.run(fake, Sizes(2), options)["settings"]["code"] == "another"
    assert measured == [Sizes(), Sizes(), Sizes(2), Sizes(2)]


def test_each_benchmark_runs_in_a_process_of_its_own_and_quick_numbers_stay_off_the_page(monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "check_output", lambda *args, **kwargs: "gpu\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: commands.append(command))
    monkeypatch.setattr(render, "main", lambda options: commands.append("page"))
    run.main(run.Options(only=("step", "memory"), quick=True, again=True))
    assert [command[1].name for command in commands] == ["step.py", "memory.py"]
    assert all(command[2] == "--out" and command[4:] == ["--quick", "--again"] for command in commands)
    assert {command[3] for command in commands} == {suite.HERE.parent / "outputs" / "benchmarks" / "gpu"}
    run.main(run.Options(only=("memory",)))
    assert commands[-2][3:] == [suite.RESULTS / "gpu"] and commands[-1] == "page"


def test_bytes_of_a_state_are_counted_as_they_are_kept():
    found = memory.measure(memory.QUICK)
    count = found["parameters"]
    assert found["methods"]["optax.contrib.sam, its default mode"]["bytes"] == 4 * count + 4
    assert found["methods"]["optax.contrib.sam, opaque mode"]["bytes"] == 4
    for rules in found["patterns"].values():
        scores = {name: sizes["scores"] / count for name, sizes in rules.items()}
        assert (scores["Fisher, float32"], scores["Fisher, bfloat16"], scores["random"]) == (4, 2, 0)
        beside = rules["Fisher, float32"]["bytes"] - rules["Fisher, float32"]["scores"]
        assert 0 < beside < 1.1 * count
        assert rules["Fisher, bfloat16"]["bytes"] == beside + 2 * count
    assert "| 8.000 |" in memory.tables({"results": found})["methods"]


def test_steps_are_measured_in_small_and_shown(relaxed_promotion):
    only = "^(Fisher 2:4|the same by two-pass gradients|SAM, ascent on a quarter of the batch)$"
    config = dataclasses.replace(step.QUICK, networks=("MLP",), only=only)
    results = step.measure(config)
    rows = {row["name"]: row for row in results["MLP"]["rows"]}
    flops = {name: row["flops"] / rows["SGD"]["flops"] for name, row in rows.items()}
    assert flops["optax.contrib.sam"] == flops["Fisher 2:4"] == 2
    assert flops["SAM, ascent on a quarter of the batch"] == 1.25
    assert 1 < flops["the same by two-pass gradients"] < 1.25
    assert rows["Fisher 2:4"]["bytes"] > rows["SGD"]["bytes"]
    limits = {"product": 1e11, "convolution": 1e11, "bandwidth": 1e10}
    record = {"results": results, "limits": limits}
    tables = step.tables(record)
    assert tables.keys() == {"MLP", "refresh", "scores"}
    assert tables["MLP"].count("\n| ") == 2 + len(rows) and "| optax.contrib.sam |" in tables["MLP"]
    assert [line.split(" | ")[1] for line in tables["refresh"].splitlines()[2:]] == ["Fisher 2:4"]
    ((text, figure),) = step.plots(record).values()
    assert text and figure.axes[0].get_xlabel() == "time of a step (SGD steps)"
