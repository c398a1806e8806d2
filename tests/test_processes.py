"""Several processes train as one; when one dies the others end; the run goes on on other devices."""

import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import process_worker
import pytest
import train
from tiny import assert_close, assert_same
from training import placement, processes, run
from training.config import Config
from training.trackers import read_rows

import ssam_jax

ROOT = pathlib.Path(train.__file__).parent.parent
WORKER = pathlib.Path(process_worker.__file__)
PATIENCE = 600  # seconds for processes to start, compile and take their steps, on a machine that is busy
# Seconds without a sign of life that end all processes. Some end at once, with a connection; gloo has left
# others waiting until then. jax 0.6 cannot be told another number.
SETTABLE = "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters
HEARTBEAT = 20 if SETTABLE else 100
BOUND = HEARTBEAT + 60  # seconds in which processes end after one of them died


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
        flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
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


TRAINED = Config(
    model="mlp", limit=64, batch=16, epochs=3, fisher_samples=8, method="ssam-f", evaluate_every=3
)  # fmt: skip


@pytest.mark.usefixtures("relaxed_promotion")
def test_the_trainer_goes_on_in_two_processes_as_it_would_have_in_one(tmp_path, monkeypatch):
    config = dataclasses.replace(TRAINED, out=tmp_path / "alone")
    save = run._save

    def copied(manager, at):
        save(manager, at)
        if at.step == 4:  # the end of the first epoch
            shutil.copytree(config.out, tmp_path / "begun")

    monkeypatch.setattr(run, "_save", copied)
    state, rows = run.train(config)
    flags = ["--model=mlp", "--limit=64", "--batch=16", "--epochs=3", "--fisher-samples=8", "--method=ssam-f"]
    flags += ["--evaluate-every=3", f"--out={tmp_path / 'begun'}", "--devices=4", "--fsdp", "--processes=2"]
    main = [sys.executable, str(ROOT / "examples" / "train.py"), *flags]
    with Group(tmp_path, 2, 2, lambda at, i: [*main, f"--coordinator={at}", f"--process-id={i}"]) as group:
        assert group.codes(PATIENCE) == [0, 0], group.output()
    first, second = (log.read_text() for log in group.logs)
    assert "| begun | 1 | 3 |" in first and "mask_density.png" in first and "png" not in second
    written = read_rows(tmp_path / "begun" / "metrics.jsonl")
    assert [row["epoch"] for row in written] == [1, 2, 3] and written[0] == rows[0]
    for ours, theirs in zip(written, rows):
        for name in set(theirs) - {"seconds", "images_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    there = run.train(dataclasses.replace(config, out=tmp_path / "begun"))[0]  # finished: read, on one device
    assert_close(there.params, state.params)
    assert_same(ssam_jax.get_mask(there.opt_state), ssam_jax.get_mask(state.opt_state))


AGREE = """
import sys
from training import processes

at, i = sys.argv[1], int(sys.argv[2])
processes.start(at, 2, i)


def refuse():
    if i == 1:
        raise FileNotFoundError("no data here")
    return "data"


for work, facts in ((lambda: i, lambda _: "same"), (lambda: i, str), (refuse, str)):
    try:
        print(processes.together(work, facts))
    except (FileNotFoundError, ValueError) as error:
        print(error)
"""


def test_a_run_that_one_process_refuses_is_refused_by_all(tmp_path):
    with Group(tmp_path, 2, 1, lambda at, i: [sys.executable, "-c", AGREE, at, str(i)]) as group:
        assert group.codes(PATIENCE) == [0, 0], group.output()
    first, second = (log.read_text() for log in group.logs)
    assert "\n0\n" in f"\n{first}" and "\n1\n" in f"\n{second}"
    for text in (first, second):
        assert "process 1 has other settings or other data than process 0" in text
    assert "process 1 refuses the run" in first and "no data here" in second


@pytest.mark.parametrize("knows", [True, False])
def test_the_heartbeat_is_passed_on_where_jax_takes_one(monkeypatch, knows):
    calls = []

    def with_heartbeat(*args, heartbeat_timeout_seconds=100):
        calls.append((args, heartbeat_timeout_seconds))

    def without(*args):
        calls.append((args, None))

    monkeypatch.setattr(jax.distributed, "initialize", with_heartbeat if knows else without)
    start = processes.start.__wrapped__  # past its cache
    start("here:1", 2, 1)
    assert calls == [(("here:1", 2, 1), 100 if knows else None)]
    if knows:
        start("auto", 1, 0, 7)
        assert calls[1:] == [((), 7)]
    else:
        with pytest.raises(ValueError, match=r"--heartbeat 7 needs jax 0\.7 or later"):
            start("here:1", 2, 1, 7)


def test_arrays_are_split_by_the_largest_axis_that_devices_divide():
    P = jax.sharding.PartitionSpec  # noqa: N806
    for shape, spec in (
        ((64, 128), P(None, "data")),
        ((128, 64), P("data")),
        ((3, 3, 64, 64), P(None, None, None, "data")),
        ((130, 64), P(None, "data")),
        ((130, 10), P()),
        ((512,), P()),
        ((2048,), P("data")),
        ((), P()),
    ):
        assert placement.split(shape, 4).spec == spec, shape
