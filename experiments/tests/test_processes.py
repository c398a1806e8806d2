"""The trainer in several processes: it goes on as in one, and all refuse what one refuses."""

import dataclasses
import os
import pathlib
import re
import shutil
import signal
import sys

import jax
import pytest
from process_group import PATIENCE, Group
from tiny import assert_close, assert_same

import ssam_jax
from ssam_experiments.config import Config
from ssam_experiments.running import checkpoints, integrity, loop, placement, processes
from ssam_experiments.running.files import read_rows

TRAINED = Config(
    model="mlp", limit=64, batch=16, epochs=3, fisher_samples=8, method="ssam-f", evaluate_every=3
)  # fmt: skip


@pytest.mark.usefixtures("relaxed_promotion")
def test_the_trainer_goes_on_in_two_processes_as_it_would_have_in_one(tmp_path, monkeypatch):
    config = dataclasses.replace(TRAINED, out=tmp_path / "alone")
    save = checkpoints.save

    def copied(manager, at):
        save(manager, at)
        if at.step == 4:  # the end of the first epoch
            shutil.copytree(config.out, tmp_path / "begun")

    monkeypatch.setattr(checkpoints, "save", copied)
    state, rows = loop.train(config)
    flags = ["--model=mlp", "--limit=64", "--batch=16", "--epochs=3", "--fisher-samples=8", "--method=ssam-f"]
    flags += ["--evaluate-every=3", f"--out={tmp_path / 'begun'}", "--devices=4", "--fsdp", "--processes=2"]
    main = [sys.executable, "-m", "ssam_experiments.train", *flags]
    with Group(tmp_path, 2, 2, lambda at, i: [*main, f"--coordinator={at}", f"--process-id={i}"]) as group:
        assert group.codes(PATIENCE) == [0, 0], group.output()
    first, second = (log.read_text() for log in group.logs)
    assert "| begun | 1 | 3 |" in first and "mask_density.png" in first and "png" not in second
    written = read_rows(tmp_path / "begun" / "metrics.jsonl")
    assert [row["epoch"] for row in written] == [1, 2, 3] and written[0] == rows[0]
    for ours, theirs in zip(written, rows):
        for name in set(theirs) - {"seconds", "images_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    there = loop.train(dataclasses.replace(config, out=tmp_path / "begun"))[
        0
    ]  # finished: read, on one device
    assert_close(there.params, state.params)
    assert_same(ssam_jax.get_mask(there.opt_state), ssam_jax.get_mask(state.opt_state))
    last = tmp_path / "begun" / "checkpoints" / "12"
    (part, *_) = (name for name in integrity.read(last).files if "ocdbt.process_1/d/" in name)
    os.truncate(last / part, 100)
    with pytest.raises(checkpoints.CheckpointError, match=f"{part} has 100 bytes.*add --resume-from 8"):
        loop.train(dataclasses.replace(config, out=tmp_path / "begun"))


AGREE = """
import sys
from jax.experimental import multihost_utils
from ssam_experiments.running import group, processes

at, i = sys.argv[1], int(sys.argv[2])
group.begin([f"--coordinator={at}", "--processes=2", f"--process-id={i}"])
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
multihost_utils.sync_global_devices("both have said so")
with processes.all_or_none():
    if i == 1:
        raise MemoryError("of process 1")
    multihost_utils.sync_global_devices("in vain")
"""


def test_a_run_that_one_process_refuses_is_refused_by_all_and_one_that_fails_ends_all(tmp_path):
    with Group(tmp_path, 2, 1, lambda at, i: [sys.executable, "-c", AGREE, at, str(i)]) as group:
        assert group.codes(PATIENCE) == [1, 1], group.output()
    first, second = (log.read_text() for log in group.logs)
    assert "\n0\n" in f"\n{first}" and "\n1\n" in f"\n{second}"
    for text in (first, second):
        assert "process 1 has other settings or other data than process 0" in text
    assert "process 1 refuses the run" in first and "no data here" in second
    assert "\nerror: process 1 ended, and so does this one: MemoryError: of process 1\n" in first
    assert "\nerror: MemoryError: of process 1\n" in second and "Traceback" not in first + second


@pytest.mark.skipif(not pathlib.Path("/proc/net/tcp").exists(), reason="what listens is read from Linux")
def test_a_signal_to_one_process_is_a_checkpoint_of_all_and_nothing_listens_to_other_machines(tmp_path):
    flags = ["--model=mlp", "--limit=32", "--batch=16", "--epochs=9999", "--evaluate-every=9999"]
    main = [sys.executable, "-m", "ssam_experiments.train", *flags, f"--out={tmp_path}", "--devices=2"]
    command = [*main, "--processes=2"]
    with Group(tmp_path, 2, 1, lambda at, i: [*command, f"--coordinator={at}", f"--process-id={i}"]) as group:
        group.wait_for(lambda: read_rows(tmp_path / "metrics.jsonl"))
        port = int(group.members[0].args[-2].rpartition(":")[2])
        addresses = list(listening(port))
        group.members[1].send_signal(signal.SIGTERM)
        assert group.codes(PATIENCE) == [143, 143], group.output()
    assert addresses and all(address.endswith("0100007F") for address in addresses)  # 127.0.0.1
    step = int(re.search("stopped by SIGTERM after step (\\d+), which is saved", group.output())[1])
    assert step == max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal())
    assert "Traceback" not in group.output()


def listening(port):
    """Yield the addresses, in hexadecimal, at which something on this machine listens to a port."""
    for name in ("tcp", "tcp6"):
        for line in pathlib.Path("/proc/net", name).read_text().splitlines()[1:]:
            address, at = line.split()[1].split(":")
            if line.split()[3] == "0A" and int(at, 16) == port:
                yield address


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
