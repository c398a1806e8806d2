"""Several processes train as one; when one dies the others end; the run goes on on other devices."""

import inspect
import itertools
import json
import pathlib
import signal
import sys

import jax
import numpy as np
import process_worker
import pytest
from process_group import PATIENCE, Group

WORKER = pathlib.Path(process_worker.__file__)
# Seconds without a sign of life that end all processes. Some end at once, with a connection; gloo has left
# others waiting until then. jax 0.6 cannot be told another number.
SETTABLE = "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters
HEARTBEAT = 20 if SETTABLE else 100
BOUND = HEARTBEAT + 60  # seconds in which processes end after one of them died


def workers(folder, count, fsdp, saved=None):
    """Start `process_worker.main` on a mesh of 2 by ``fsdp`` devices."""
    settings = {"count": count, "heartbeat": HEARTBEAT, "fsdp": fsdp, "folder": str(folder)}
    settings["saved"] = saved and str(saved)

    def command(coordinator, i):
        given = json.dumps({**settings, "coordinator": coordinator, "process_id": i})
        return [sys.executable, str(WORKER), given]

    return Group(folder, count, 2 * fsdp // count, command)


@pytest.fixture(scope="module")
def one():
    """Return a run in this process, on one device."""
    return process_worker.Run(None)


@pytest.fixture(scope="module")
def alone(one):
    """Return what one process with one device finds after each step."""
    return one.train(process_worker.STEPS)


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


def test_a_run_goes_on_in_one_process_on_one_device(one, alone, four, tmp_path):
    one.restore(four[0] / "checkpoint")
    np.savez(tmp_path / "found.npz", **one.train(process_worker.STEPS))
    assert_agrees(tmp_path / "found.npz", alone, first=process_worker.MIDDLE + 1)
