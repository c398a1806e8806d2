"""Processes meet, end together, and stop at one step: without JAX, which none of this needs."""

import contextlib
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import threading

import jax
import pytest
from process_group import free_port

from ssam_experiments.running import channel, group, meeting, processes, stopping
from ssam_experiments.running.stopping import Stop

BUSY = """
import pathlib, sys, time
from ssam_experiments.running import channel, group

group.begin(sys.argv[3:])
i, does = sys.argv[1:3]
print("ready", flush=True)
if does == "fails":
    sys.stdin.readline()
    channel.end("error: OSError: the disk of this process is full", 1)
calls = 0
while does == "trains":
    time.sleep(0.001 * (1 + int(i)))  # one process is ahead of the other
    calls += 1
    if calls == 2:
        print("going", flush=True)
    if group.STOP.here():
        print("stopped at", calls, flush=True)
        channel.current().close()
        sys.exit(128 + group.STOP.signum)
time.sleep(100)
"""


class Members:
    """Processes that run a program with the flags of a group."""

    def __init__(self, stack, *does, counts=None, ids=None, heartbeat=20):
        port, count = stack.enter_context(free_port()), len(does)
        self.port, self.all = port, []
        for i, what in enumerate(does):
            flags = [f"--coordinator=127.0.0.1:{port}", f"--processes={(counts or [count] * count)[i]}"]
            flags += ["--process-id", str((ids or range(count))[i]), f"--heartbeat={heartbeat}"]
            command = [sys.executable, "-c", BUSY, str(i), what, *flags]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            self.all.append(stack.enter_context(subprocess.Popen(command, text=True, **pipes)))
            stack.callback(self.all[-1].kill)

    def ready(self):
        """Wait until all have met."""
        assert [member.stdout.readline() for member in self.all] == ["ready\n"] * len(self.all)
        return self.all

    def ends(self):
        """Return the exit codes, and what was written to stdout and stderr."""
        said = [member.communicate(timeout=60) for member in self.all]
        return [member.returncode for member in self.all], said


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_process_ends_the_others_with_a_line(stack, victim):
    members = Members(stack, "sleeps", "sleeps", "sleeps")
    members.ready()[victim].kill()
    codes, said = members.ends()
    assert codes == [-signal.SIGKILL if i == victim else 1 for i in range(3)]
    for i in {0, 1, 2} - {victim}:
        assert said[i][1].startswith(f"error: process {victim} ended, and so does this one: it was killed")
        assert said[i][1].count("\n") == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_fails_says_why_to_all(stack, victim):
    members = Members(stack, *("fails" if i == victim else "sleeps" for i in range(3)))
    members.ready()[victim].stdin.write("now\n")
    members.all[victim].stdin.flush()
    codes, said = members.ends()
    assert codes == [1, 1, 1]
    reason = "OSError: the disk of this process is full\n"
    for i, (_, line) in enumerate(said):
        own = f"process {victim} ended, and so does this one: "
        assert line == f"error: {'' if i == victim else own}{reason}"


@pytest.mark.parametrize(("victim", "signum"), [(0, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_one_process_stops_all_at_one_call(stack, victim, signum):
    members = Members(stack, "trains", "trains", "trains")
    assert [member.stdout.readline() for member in members.ready()] == ["going\n"] * 3
    members.all[victim].send_signal(signum)
    codes, said = members.ends()
    assert codes == [128 + signum] * 3
    ((out, err),) = set(said)
    assert out.startswith("stopped at ") and not err


def test_before_the_first_step_a_signal_ends_all(stack):
    members = Members(stack, "sleeps", "sleeps")
    members.ready()[1].send_signal(signal.SIGTERM)
    codes, said = members.ends()
    assert codes == [143, 143] and {err for _, err in said} == {"stopped by SIGTERM before the first step.\n"}


def test_a_second_signal_ends_a_process_at_once(stack):
    (member,) = Members(stack, "sleeps").ready()
    ended = []
    signals = stopping.Signals(lambda signum: None, ended.append)
    with signals.handled():
        os.kill(os.getpid(), signal.SIGTERM)
        assert not ended
        os.kill(os.getpid(), signal.SIGINT)
    assert ended == [signal.SIGINT]
    member.kill()


def test_processes_that_do_not_fit_are_told_so(stack):
    for options, sentence in (
        ({"counts": [2, 3]}, "error: process 1 has --processes 3, and process 0 2.\n"),
        ({"counts": [3, 3, 3], "ids": [0, 1, 1]}, "error: two processes have --process-id 1.\n"),
    ):
        members = Members(stack, *["sleeps"] * len(options["counts"]), **options)
        codes, said = members.ends()
        assert set(codes) == {1} and {err for _, err in said} == {sentence}


def test_those_who_came_end_when_another_does_not_come_within_the_heartbeat(stack):
    members = Members(stack, "sleeps", "sleeps", counts=[3, 3], heartbeat=1)
    codes, said = members.ends()
    assert codes == [1, 1]
    assert said[0][1] == said[1][1] and "process 2 did not come to 127.0.0.1" in said[0][1]


def test_a_process_killed_before_all_have_come_ends_the_others_at_once():
    with free_port() as port, pytest.raises(ValueError, match="process 1 was killed or lost before all had"):
        threading.Thread(target=say, args=(port, b'["hello", 1, 3]\n')).start()
        meeting.meet(f"127.0.0.1:{port}", 3, 0, 60)


def say(port, *words):
    """Connect, say something, and hang up; then, with more words, connect again."""
    for word in words:
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(word)
                    break
            except ConnectionRefusedError:
                continue


def test_strangers_are_let_be():
    strangers = b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b'{"a": 1}\n', b'["go"]\n', b"", b'["hello", 1'
    with free_port() as port, pytest.raises(ValueError, match="process 1 did not come"):
        threading.Thread(target=say, args=(port, *strangers)).start()
        meeting.meet(f"127.0.0.1:{port}", 2, 0, 1)


def test_process_0_listens_at_the_address_that_was_given_and_says_if_it_cannot(monkeypatch):
    with free_port() as port:
        with meeting._listener(f"127.0.0.1:{port}", f"127.0.0.1:{port}") as listener:
            assert listener.getsockname() == ("127.0.0.1", port)
            with pytest.raises(ValueError, match=r"something listens there.*a free port"):
                meeting.meet(f"127.0.0.1:{port}", 2, 0, 1)
        with pytest.raises(ValueError, match=r"cannot listen at --coordinator 192\.0\.2\.1.*its machine"):
            meeting._listener(f"192.0.2.1:{port}", f"192.0.2.1:{port}")
    assert meeting.bind_address("here:1") == "here:1"
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "0.0.0.0:1")
    assert meeting.bind_address("here:1") == "0.0.0.0:1"


def test_a_name_of_this_machine_alone_is_warned_of(monkeypatch, capsys):
    found = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: (_ for _ in ()).throw(OSError()))
    meeting._listener("first-host:0", "first-host:0").close()
    assert "first-host is 127.0.0.1, which other machines cannot reach" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--coordinator=auto"],
        ["--coordinator=here:1"],
        ["--coordinator=here:1", "--processes=two"],
        ["--coordinator=here:1", "--processes=2", "--process-id=2"],
        ["--coordinator=here:1", "--processes=2", "--heartbeat=0"],
        ["--coordinator=here", "--processes=2"],
        ["--coordinator=here:1", "--processes=2", "--help"],
    ],
)
def test_flags_that_name_no_group_are_left_to_be_refused_later(monkeypatch, flags):
    monkeypatch.setattr(group, "meet", lambda *_: pytest.fail("met"))
    group.gather(flags)


def test_a_stop_waits_until_it_is_known_where():
    stop, reached = Stop(), []
    assert not stop.here() and not stop.here() and stop.freeze() == 2
    waiting = threading.Thread(target=lambda: reached.append(stop.here()))
    waiting.start()
    waiting.join(0.02)
    assert waiting.is_alive() and not reached
    stop.set(4, signal.SIGTERM)
    waiting.join()
    assert reached == [False] and stop.here() and stop.signum == signal.SIGTERM


ERRORS = {
    KeyboardInterrupt(): (130, "stopped by SIGINT."),
    OSError(28, "No space left on device", "out"): (
        1, "error: OSError: [Errno 28] No space left on device: 'out'",
    ),
    pickle.UnpicklingError("hostile\nvery"): (1, "error: UnpicklingError: hostile"),
    MemoryError(): (1, "error: MemoryError"),
    ValueError("--lr is 0."): (1, "error: --lr is 0."),
    SystemExit("error: no"): (1, "error: no"),
    SystemExit(2): (2, ""),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_whatever_fails_in_one_of_several_processes_ends_it_at_once_in_a_line(monkeypatch, error, capsys):
    ended = []
    monkeypatch.setattr(channel, "current", lambda: "connected")
    monkeypatch.setattr(channel, "end", lambda line, code: ended.append((code, line)))
    with processes.all_or_none():
        raise error
    assert ended == [ERRORS[error]] and not capsys.readouterr().err


def test_a_fault_of_ours_shows_where_and_one_process_alone_lets_all_pass(monkeypatch, capsys):
    with pytest.raises(KeyboardInterrupt), processes.all_or_none():
        raise KeyboardInterrupt
    monkeypatch.setattr(channel, "current", lambda: "connected")
    monkeypatch.setattr(channel, "end", lambda line, code: None)
    with processes.all_or_none():
        raise TypeError("a fault")
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(SystemExit), processes.all_or_none():
        sys.exit(0)  # help was asked for


def test_a_collective_that_breaks_off_waits_for_the_reason(monkeypatch):
    waited = []
    monkeypatch.setattr(channel, "current", lambda: "connected")
    monkeypatch.setattr(channel, "end", lambda line, code: None)
    monkeypatch.setattr(processes.time, "sleep", waited.append)
    for error in (jax.errors.JaxRuntimeError("connection closed"), ValueError("Gloo all-reduce failed")):
        with processes.all_or_none():
            raise error
    assert waited == [2, 2]


WORKER = """
import multiprocessing, os, sys, time
from ssam_experiments.running import stopping

def work(sends):
    stopping.leave_to_the_trainer(0, 1)
    sends.send(os.getpid())
    time.sleep(100)

if __name__ == "__main__":
    receives, sends = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=work, args=(sends,), daemon=True).start()
    print(receives.recv(), flush=True)
    sys.stdin.read()
"""


def test_a_worker_ignores_the_signals_of_its_trainer_and_ends_with_it(stack, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    trainer = stack.enter_context(
        subprocess.Popen([sys.executable, tmp_path / "worker.py"], text=True, **pipes)
    )
    worker = int(trainer.stdout.readline())
    for signum in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, signum)
    ignored = int(dict(read_status(worker))["SigIgn"], 16)
    assert all(ignored >> (signum - 1) & 1 for signum in (signal.SIGINT, signal.SIGTERM))
    trainer.kill()
    assert not trainer.stdout.read()  # which the worker holds open while it lives


def read_status(pid):
    """Return what Linux says of a process, line by line."""
    return [line.split(":\t", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()]
