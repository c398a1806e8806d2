"""Files of a run are on the disk before they count, and what is wrong with them is said in a sentence."""

import errno
import json
import os
import pathlib
import re

import pytest

from ssam_experiments import compare, train
from ssam_experiments.running import files


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    path, done = tmp_path / "file", []
    sync, replace = os.fsync, pathlib.Path.replace

    def synced(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def replaced(part, to):
        done.append("replaced")
        return replace(part, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(pathlib.Path, "replace", replaced)
    files.write_whole(path, "text")
    assert done == [f"{path}.part", "replaced", str(tmp_path)] and path.read_text() == "text"
    files.append(path, " and more")
    assert done[3:] == [str(path)] and path.read_text() == "text and more"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "No space left on device. Free some space"),
        (errno.EDQUOT, "quota exceeded. Free some space"),
        (errno.EROFS, "Read-only file system. Give this user the right to read and write there"),
        (errno.EIO, "Input/output error. See to the disk or the mount"),
    ],
)
def test_an_error_of_the_system_names_the_file_and_the_remedy(tmp_path, monkeypatch, code, words):
    def full(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    for write in (files.write_whole, files.append):
        with pytest.raises(files.RunError, match=rf"{tmp_path}/name cannot be written: .*{words}"):
            write(tmp_path / "name", "text")


def test_an_out_that_cannot_be_a_folder_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
    for name in ("file", "file/in it", "link"):
        with pytest.raises(SystemExit, match=f"error: {tmp_path}/{name} cannot be written: .*another --out"):
            train.main(["--model", "mlp", "--limit", "16", "--batch", "16", "--out", str(tmp_path / name)])


def test_runs_to_compare_that_are_damaged_and_a_folder_that_is_a_file_are_refused_in_a_sentence(tmp_path):
    run, taken = tmp_path / "run", tmp_path / "file"
    run.mkdir()
    taken.write_text("")
    (run / "metrics.jsonl").write_text(
        json.dumps({"epoch": 1, "train_loss": 1.0, "test_accuracy": 0.5}) + "\n"
    )
    for settings, words in (
        ('{"rho": 0.1, "se', f"error: {run}/config.json is damaged: it does not hold settings"),
        ("[]", f"error: {run}/config.json is damaged"),
        ('{"rho": 0.1, "seed": 0}', f"error: {taken} cannot be written: File exists. A folder must be there"),
    ):
        (run / "config.json").write_text(settings)
        with pytest.raises(SystemExit, match=re.escape(words)):
            compare.main(compare.Comparison((run,), taken))


@pytest.mark.parametrize("line", [b'{"epoch": 2', b"\x00\x00\x00", b"3", b'{"epoch": "\xff"}', b"{}"])
def test_a_damaged_line_of_metrics_is_named(tmp_path, line):
    path, good = tmp_path / "metrics.jsonl", json.dumps({"epoch": 1}).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(files.RunError, match=rf"{path} is damaged in line 2, .*Delete that line"):
        files.read_rows(path, "epoch")
    path.write_bytes(good + b"\n" + line)  # not complete: a run was killed as it wrote
    assert files.read_rows(path, "epoch") == [{"epoch": 1}]
