"""A folder belongs to one trainer, until its process ends."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading

import pytest

from ssam_experiments.config import Config
from ssam_experiments.running import locks, preparation

HOLD = """
import os, pathlib, sys
from ssam_experiments.running import locks

locks.hold(pathlib.Path(sys.argv[1]))
child = os.fork()
if not child:  # a fork that outlives the process
    os.close(1)
    sys.stdin.read()
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Yield a process that holds the lock of the folder."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process


def test_a_second_trainer_is_told_who_has_the_folder_and_gets_it_when_that_process_is_killed(
    holder, tmp_path
):
    with pytest.raises(ValueError, match=rf"in use by process {holder.pid} on .* since 20.*another"):
        locks.hold(tmp_path)
    holder.kill()
    holder.wait()
    assert locks.hold(tmp_path)
    locks.release(tmp_path)


def test_a_process_holds_a_folder_once_and_gives_it_back(tmp_path):
    assert locks.hold(tmp_path) and not locks.hold(tmp_path)
    assert json.loads((tmp_path / locks.NAME).read_text())["pid"] == os.getpid()
    (tmp_path / locks.NAME).unlink()
    assert locks.hold(tmp_path)  # the file that is there now
    with locks.releasing(tmp_path):
        pass
    assert locks.hold(tmp_path)
    locks.release(tmp_path)
    locks.release(tmp_path)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    assert not locks.hold(tmp_path)
    assert f"nothing guards {tmp_path} from a second trainer" in capsys.readouterr().err


def test_without_links_a_file_is_made_whole_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(locks.errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert locks.create(tmp_path / "a", "whole") and not locks.create(tmp_path / "a", "again")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "whole"


def test_of_many_that_claim_a_folder_at_once_one_kind_of_settings_is_accepted(tmp_path):
    """Threads of one process have its lock in common, so that here the file alone decides."""
    for race in range(100):
        configs = [Config(out=tmp_path / str(race), rho=rho) for rho in (0.1, 0.2, 0.3)]
        barrier, accepted = threading.Barrier(len(configs)), []

        def claim(config, barrier=barrier, accepted=accepted):
            barrier.wait()
            try:
                preparation.claim(config)
            except ValueError:
                return
            accepted.append(config.rho)

        threads = [threading.Thread(target=claim, args=(config,)) for config in configs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (rho,) = accepted
        assert json.loads((tmp_path / str(race) / "config.json").read_text())["rho"] == rho
        locks.release(configs[0].out)


MAKE = """
import pathlib, sys
from ssam_experiments.running import locks

print("ready", flush=True)
sys.stdin.readline()
print(*[i for i in range(300) if locks.create(pathlib.Path(sys.argv[1], str(i)), "")], flush=True)
"""


def test_of_several_processes_that_make_a_file_at_once_one_makes_it(tmp_path):
    command = [sys.executable, "-c", MAKE, tmp_path]
    with contextlib.ExitStack() as stack:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        members = [stack.enter_context(subprocess.Popen(command, text=True, **pipes)) for _ in range(3)]
        for member in members:
            assert member.stdout.readline() == "ready\n"
        for member in members:
            member.stdin.write("go\n")
            member.stdin.flush()
        made = [int(i) for member in members for i in member.stdout.readline().split()]
    assert sorted(made) == list(range(300))


def test_a_trainer_that_was_refused_leaves_the_folder_to_others(tmp_path):
    config = Config(out=tmp_path)
    preparation.claim(config)
    locks.release(tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        preparation.claim(dataclasses.replace(config, rho=0.3))
    assert locks.hold(tmp_path)
    locks.release(tmp_path)
