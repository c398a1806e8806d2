"""What happens to runs of a trainer in a soak: signals, full disks, damage; and what they must do then."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from ssam_experiments.damage import damage

PATIENCE = 300  # seconds until a process that does not end counts as hanging
HEARTBEAT = 10
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
ONE = (*SIGNALS, "full disk", "damaged checkpoint", "damaged config.json")
TWO = "SIGKILL of one of two processes"
LIMIT = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
os.execv(sys.argv[2], sys.argv[2:])
"""  # bytes of a file, and then a command


class LostError(Exception):
    """A run did not do what is promised."""


class Run:
    """A run in a folder, started again and again."""

    def __init__(self, command: Sequence[str], folder: pathlib.Path, processes: int = 1):
        self._command, self._processes, self.folder = command, processes, folder
        self.checkpoints = folder / "checkpoints"
        self.output = ""

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint."""
        names = [path.name for path in self.checkpoints.iterdir()] if self.checkpoints.exists() else []
        return sorted(int(name) for name in names if name.isdecimal())

    @contextlib.contextmanager
    def started(self, *flags: str, limit: int | None = None) -> Iterator[list[subprocess.Popen]]:
        """Yield the processes of the run; those that are left are killed."""
        flags = (*flags, f"--out={self.folder}")
        if self._processes > 1:
            at = f"--coordinator=127.0.0.1:{_free_port()}"
            n = self._processes
            flags = (*flags, at, f"--devices={n}", f"--processes={n}", f"--heartbeat={HEARTBEAT}")
        limited = [] if limit is None else [sys.executable, "-c", LIMIT, str(limit)]
        log = self.folder.with_name(f"{self.folder.name}.log")
        with contextlib.ExitStack() as stack, log.open("w") as file:
            members = []
            for i in range(self._processes):
                number = [f"--process-id={i}"] if self._processes > 1 else []
                member = subprocess.Popen(
                    [*limited, *self._command, *flags, *number],
                    env=_environment(self.folder.parent),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
                stack.callback(member.wait)
                stack.callback(member.kill)
                members.append(member)
            yield members
        self.output = log.read_text(errors="replace")

    def ends(self, *flags: str, limit: int | None = None) -> int:
        """Start the run, and return its exit code once it has ended."""
        with self.started(*flags, limit=limit) as members:
            codes = codes_of(members, PATIENCE)
        return max(codes, key=abs)

    def is_hit(self, rng: np.random.Generator, number: signal.Signals, span: float) -> None:
        """Start the run and send the last of its processes a signal, some time after the next checkpoint."""
        before = self.steps()
        with self.started() as members:
            while self.steps() == before and all(member.poll() is None for member in members):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, span))
            members[-1].send_signal(number)
            code = codes_of(members, PATIENCE if len(members) == 1 else HEARTBEAT + 60)[-1]
        if code not in (0, -number, 128 + number):  # 0: it had ended
            raise LostError(f"{number.name} ends it with code {code}: {self.output[-500:]}")


def try_one(
    command: Sequence[str],
    folder: pathlib.Path,
    rng: np.random.Generator,
    span: float,
    kinds: Sequence[str] = ONE,
) -> list[str]:
    """Let up to three things happen to a run and resume it each time; return what happened.

    Args:
      command: starts the trainer.
      folder: for the run.
      rng: draws what happens, and when.
      span: seconds from a run's first checkpoint to its end.
      kinds: what may happen, of `ONE`.

    Raises:
      LostError: with what happened as its second argument.
    """
    run, happened = Run(command, folder), []
    try:
        for _ in range(rng.integers(1, 4)):
            kind = str(rng.choice(kinds))
            if "damaged" in kind and not run.steps():
                kind = "SIGKILL"
            happened.append(kind)
            if kind in SIGNALS:
                run.is_hit(rng, SIGNALS[kind], span)
            elif kind == "full disk":
                _fill(run, rng)
            elif kind == "damaged checkpoint":
                _spoil(run, rng)
            else:
                _cut_settings(run, rng)
        _must_end(run)
    except LostError as error:
        raise LostError(str(error), happened) from error
    return happened


def _must_end(run: Run, *flags: str) -> None:
    if run.ends(*flags):
        raise LostError(f"it does not resume: {run.output[-500:]}")


def _fill(run: Run, rng: np.random.Generator) -> None:
    """Start a run that cannot write more than so many bytes to a file, as on a disk that is full."""
    run.ends(limit=int(10 ** rng.uniform(0, 6)))
    if "Traceback" in run.output:
        raise LostError(f"a full disk gives a traceback: {run.output[-500:]}")


def _spoil(run: Run, rng: np.random.Generator) -> None:
    """Damage the last checkpoint; the run must refuse it by name and resume as it advises."""
    last = run.checkpoints / str(run.steps()[-1])
    kind, path = damage(rng, last, run.checkpoints / str(run.steps()[-2:][0]))
    if run.ends() == 0 or not re.search(rf"error: .*{re.escape(path.name)}", run.output):
        raise LostError(f"{kind} of {path} is not refused: {run.output[-500:]}")
    if advised := re.search(r"--resume-from \d+", run.output):
        _must_end(run, *advised[0].split())
    else:
        shutil.rmtree(run.checkpoints)  # as advised


def _cut_settings(run: Run, rng: np.random.Generator) -> None:
    path = run.folder / "config.json"
    os.truncate(path, int(rng.integers(path.stat().st_size)))
    if run.ends() == 0 or f"error: {path} is damaged" not in run.output:
        raise LostError(f"{path} was cut off, and is not refused: {run.output[-500:]}")
    path.unlink()


def try_two(command: Sequence[str], folder: pathlib.Path, rng: np.random.Generator, span: float) -> list[str]:
    """Kill one of two processes; both must end, and the run must resume in two."""
    run = Run(command, folder, processes=2)
    try:
        run.is_hit(rng, signal.SIGKILL, span)
        _must_end(run)
    except LostError as error:
        raise LostError(str(error), [TWO]) from error
    return [TWO]


def codes_of(members: Sequence[subprocess.Popen], seconds: float) -> list[int]:
    """Return the exit codes of processes once all have ended.

    Raises:
      LostError: one has not, after so many seconds.
    """
    end = time.monotonic() + seconds
    for member in members:
        try:
            member.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise LostError(f"a process still runs after {seconds} s") from None
    return [member.returncode for member in members]


def _environment(cache: pathlib.Path) -> dict[str, str]:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str((cache / "compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",
    }
    return {**os.environ, **settings}


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]
