"""Several processes train as one; when one dies the others end; the run goes on on other devices."""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import process_worker
import pytest
import train

ROOT = pathlib.Path(train.__file__).parent.parent
WORKER = pathlib.Path(process_worker.__file__)
PATIENCE = 240  # seconds for processes to start, compile and take their steps, on a machine that is busy
BOUND = 60  # seconds in which processes end after one of them died; measured: below 1


@contextlib.contextmanager
def free_port():
    """Yield a port that nothing else gets: bound here, not listened to, and open to be bound once more."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("", 0))
        yield held.getsockname()[1]


class Group:
    """Processes that run one command; those that are left are killed at the end."""

    def __init__(self, folder, count, devices, command):
        """Start ``command(coordinator, process_id)`` with so many devices each."""
        flags = f"--xla_force_host_platform_device_count={devices}"
        path = os.pathsep.join(str(ROOT / name) for name in ("", "examples", "tests"))
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        self.logs = [folder / f"process-{i}.log" for i in range(count)]
        with contextlib.ExitStack() as stack:
            coordinator = f"127.0.0.1:{stack.enter_context(free_port())}"
            self.members = [
                subprocess.Popen(
                    command(coordinator, i),
                    env=environment,
                    stdout=stack.enter_context(log.open("wb")),
                    stderr=subprocess.STDOUT,
                )
                for i, log in enumerate(self.logs)
            ]
            self.stack = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for member in self.members:
            member.kill()
            member.wait()
        self.stack.close()

    def output(self):
        """Return the end of what each process said, for an assertion to show."""
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs)

    def wait_for(self, happened):
        """Wait until something has happened, while all processes live."""
        end = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < end, f"nothing for {PATIENCE} s{self.output()}"
            assert all(member.poll() is None for member in self.members), self.output()
            time.sleep(0.02)

    def codes(self, seconds):
        """Return the exit codes once all have ended."""
        end = time.monotonic() + seconds
        for member in self.members:
            try:
                member.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {seconds} s{self.output()}") from None
        return [member.returncode for member in self.members]


def workers(folder, count, fsdp, saved=None):
    """Start `process_worker.main` on a mesh of 2 by ``fsdp`` devices."""
    settings = {"count": count, "fsdp": fsdp, "folder": str(folder), "saved": saved and str(saved)}

    def command(coordinator, i):
        given = json.dumps({**settings, "coordinator": coordinator, "process_id": i})
        return [sys.executable, str(WORKER), given]

    return Group(folder, count, 2 * fsdp // count, command)


@pytest.fixture(scope="module")
def alone():
    """Return what one process with one device finds after each step."""
    return process_worker.Run(None).train(process_worker.STEPS)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Return the folder of four processes of two devices, one of which was killed, and how the rest ended."""
    folder = tmp_path_factory.mktemp("four")
    with workers(folder, 4, 4) as group:
        group.wait_for(lambda: all((folder / f"trained-{i}.npz").exists() for i in range(4)))
        group.members[3].send_signal(signal.SIGKILL)
        return folder, group.codes(BOUND), group.output()


@pytest.fixture(scope="module")
def two(four, tmp_path_factory):
    """Return the folder of two processes of two devices, which also went on from what the four saved."""
    folder = tmp_path_factory.mktemp("two")
    with workers(folder, 2, 2, saved=four[0] / "checkpoint") as group:
        assert group.codes(PATIENCE) == [0, 0], group.output()
    return folder


def assert_agrees(path, alone, first):
    """Assert that a process found what one alone does: masks bit for bit, parameters to rounding."""
    with np.load(path) as found:
        wanted = {name: x for name, x in alone.items() if int(name.split("/")[0]) >= first}
        assert set(found) == set(wanted)
        for name, x in wanted.items():
            if "/mask/" in name:
                np.testing.assert_array_equal(found[name], x, err_msg=name)
            else:
                np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6, err_msg=name)


def test_masks_change_in_the_course_of_the_run(alone):
    for rule in process_worker.RULES:
        masks = [alone[f"{step}/{rule}/mask/['first']['kernel']"] for step in (1, 2, 4, 6)]
        assert all((a != b).any() for a, b in itertools.pairwise(masks))


def test_two_processes_take_the_steps_of_one(alone, two):
    for i in range(2):
        assert_agrees(two / f"trained-{i}.npz", alone, first=1)


def test_four_processes_take_the_steps_of_one(alone, four):
    for i in range(4):
        assert_agrees(four[0] / f"trained-{i}.npz", alone, first=1)


def test_a_killed_process_ends_the_others_with_an_error(four):
    _, codes, output = four
    assert codes[3] == -signal.SIGKILL
    assert all(code not in (0, -signal.SIGKILL) for code in codes[:3]), output
    assert "Gloo" in output or "JAX distributed service detected fatal errors" in output, output


def test_a_run_goes_on_on_fewer_devices_and_processes(alone, two):
    for i in range(2):
        assert_agrees(two / f"resumed-{i}.npz", alone, first=process_worker.MIDDLE)


def test_a_run_goes_on_in_one_process_on_one_device(alone, four, tmp_path):
    run = process_worker.Run(None)
    run.restore(four[0] / "checkpoint")
    np.savez(tmp_path / "found.npz", **run.train(process_worker.STEPS))
    assert_agrees(tmp_path / "found.npz", alone, first=process_worker.MIDDLE + 1)
