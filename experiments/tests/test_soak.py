"""The soak counts what a trainer survives, and exits with 1 for one that resumes from damage."""

import dataclasses
import json
import pathlib
import sys

import pytest

from ssam_experiments import soak
from ssam_experiments.faults import ONE

TRAINER = """
import contextlib, hashlib, os, pathlib, re, shutil, sys, time
from ssam_experiments.running import integrity
from ssam_experiments.running.files import RunError, naming, write_whole

out = pathlib.Path(next(flag[6:] for flag in sys.argv if flag.startswith("--out=")))
wanted, folder, careless = sys.argv[2:3], out / "checkpoints", sys.argv[1] == "careless"


def train():
    folder.mkdir(parents=True, exist_ok=True)
    settings = out / "config.json"
    if not settings.exists():
        write_whole(settings, "settings")
    if settings.read_text() != "settings":
        raise RunError(f"{settings} is damaged")
    for path in folder.glob("*.unfinished"):
        shutil.rmtree(path)
    steps = sorted(int(path.name) for path in folder.iterdir())
    step, state = 0, b"state"
    if steps:
        if "--resume-from" in sys.argv:
            shutil.rmtree(folder / str(steps.pop()))
        at, step = folder / str(steps[-1]), steps[-1]
        if not careless:
            try:
                integrity.verify(at, integrity.read(at))
            except integrity.DamageError as error:
                raise RunError(f"{error} --resume-from {steps[0]}" if len(steps) > 1 else str(error))
        state = b"".join(path.read_bytes() for path in sorted(at.iterdir()) if path.name != "manifest.json")
    while step < 12:
        time.sleep(0.002)
        step, state = step + 1, hashlib.sha256(state).digest()
        at = folder / f"{step}.unfinished"
        at.mkdir()
        (at / "state").write_bytes(state)
        integrity.write(at, step, {})
        at.rename(folder / str(step))
        if step > 2:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree((folder / str(step - 2)).rename(folder / f"{step - 2}.unfinished"))


try:
    with naming(out):
        train()
except RunError as error:
    sys.exit(f"error: {error}")
"""


def trainer(kind):
    def end(folder):
        return (folder / "checkpoints" / "12" / "state").read_bytes().hex()

    return soak.Trainer((sys.executable, "-c", TRAINER, kind), end)


def tried(out):
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]


def test_a_trainer_that_verifies_survives_and_another_call_continues_the_count(tmp_path, capsys):
    config = soak.Soak(trials=2, damages=20, two=0, out=tmp_path)
    assert soak.soak(config, trainer("careful"))
    assert soak.soak(dataclasses.replace(config, trials=1), trainer("careful"))
    rows = tried(tmp_path)
    assert len(rows) == 3 and len({kind for row in rows for kind in row["happened"]}) >= 3
    assert not any(row["lost"] or row["missed"] for row in rows)
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "| damaged checkpoint, verified only | 60 | 60 | 0 |" in text
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("run-") and path.is_dir()]


def test_a_trainer_that_resumes_from_damage_loses_and_the_soak_exits_with_1(tmp_path, capsys):
    config = soak.Soak(trials=1, damages=5, two=0, kinds=("damaged checkpoint",), out=tmp_path)
    with pytest.raises(SystemExit, match=f"error: runs were lost; they are in {tmp_path}"):
        soak.main(config, trainer("careless"))
    assert "is not refused" in tried(tmp_path)[0]["lost"] and (tmp_path / "run-0").is_dir()
    assert "| damaged checkpoint | 1 | 0 | 1 |" in capsys.readouterr().out


def test_settings_of_the_soak_are_checked(tmp_path):
    for changes, words in (
        ({"minutes": 0}, "--minutes must be above 0, got 0"),
        ({"two": 2}, "--two must be from 0 to 1, got 2"),
        ({"kinds": ("fire",)}, f"--kinds must be of {', '.join(ONE)}, got"),
    ):
        with pytest.raises(SystemExit, match=words):
            soak.main(soak.Soak(**changes, out=pathlib.Path(tmp_path)))
