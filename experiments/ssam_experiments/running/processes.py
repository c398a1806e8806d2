"""Several processes that train as one: how they start, agree on a run, and end."""

import contextlib
import functools
import hashlib
import inspect
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ssam_experiments.running import channel, group, meeting

Result = TypeVar("Result")
EXPECTED = (  # what data, disks and people do; anything else is a fault of ours, and shows its traceback
    ArithmeticError, EOFError, MemoryError, OSError, ValueError,
    pickle.UnpicklingError, jax.errors.JaxRuntimeError,
)  # fmt: skip


@functools.cache
def start(coordinator: str, processes: int, process_id: int, heartbeat: int = 100) -> None:
    """Join the other processes, from where on ``jax.devices()`` are those of all; before any computation.

    Args:
      coordinator: ``HOST:PORT`` where process 0 listens; ``"auto"`` where JAX finds out all of this by
        itself (TPU pods, SLURM, Open MPI); ``""`` for a process on its own, for which nothing is done.
      processes: how many there are; not read with ``"auto"``.
      process_id: which of them this is; not read with ``"auto"``.
      heartbeat: seconds without a sign of life after which a process is taken for dead, and the others end.

    Raises:
      ValueError: JAX finds no cluster, or cannot be told the heartbeat (before 0.7, where it is 100 seconds).
      RuntimeError: JAX has computed something already, or the others did not come within 5 minutes.
    """
    if not coordinator:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # read by the CPU backend alone
    try:
        _initialize(coordinator, processes, process_id, heartbeat)
    finally:
        group.take_signals()  # JAX has taken SIGTERM


def _initialize(coordinator: str, processes: int, process_id: int, heartbeat: int) -> None:
    options: dict[str, Any] = {}
    if "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters:
        options["heartbeat_timeout_seconds"] = heartbeat
    elif heartbeat != 100:
        raise ValueError(
            f"--heartbeat {heartbeat} needs jax 0.7 or later: {jax.__version__} always waits 100 s."
        )
    if coordinator != "auto":
        if process_id == 0:  # else at every address of this machine
            options["coordinator_bind_address"] = meeting.bind_address(coordinator)
        jax.distributed.initialize(coordinator, processes, process_id, **options)
        return
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        raise ValueError(
            f"--coordinator auto found no cluster here ({error}): give --coordinator HOST:PORT, --processes"
            " and --process-id."
        ) from error
    if jax.process_count() > 1:
        _meet_after_jax(heartbeat)


def _meet_after_jax(heartbeat: int) -> None:
    """Meet the other processes where process 0 says; go on without, if one does not reach it."""
    count, i = jax.process_count(), jax.process_index()
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(meeting.outward()) if i == 0 else ""
        words = np.frombuffer(own.encode().ljust(64), np.uint8)
        heard = np.uint8(multihost_utils.broadcast_one_to_all(words))  # jax 0.6 returns uint32
        there = bytes(heard).decode().strip()
        lines, problem = {}, None
        try:
            lines = meeting.meet(there, count, i, heartbeat, bind=there)
        except ValueError as error:
            problem = error
    if multihost_utils.process_allgather(np.array(problem is None)).all():
        group.connect(i, lines)
        return
    group.disconnected = True
    if i == 0:
        sys.stderr.write(
            f"warning: processes do not learn at once if one ends, but by --heartbeat: {problem}\n"
        )


def is_first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def together(work: Callable[[], Result], facts: Callable[[Result], str]) -> Result:
    """Return what ``work`` returns, if it fails in no process and ``facts`` of it are the same in all.

    So a refusal in one process, whose disk may lack the data, is one in all of them, and none waits for it.

    Raises:
      Exception: what ``work`` raised here.
      ValueError: ``work`` raised anything in another process, or the facts differ.
    """
    result: Result  # unset where there is a problem
    problem: Exception | None = None
    words = np.zeros(2, np.uint32)
    try:
        result = work()
        words = np.frombuffer(hashlib.sha256(facts(result).encode()).digest()[:8], np.uint32)
    except Exception as error:
        problem = error
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(np.array([problem is not None, *words], np.uint32))
        failed, differing = np.flatnonzero(found[:, 0]), np.flatnonzero((found != found[0]).any(1))
        if problem is None and failed.size:
            raise ValueError(f"process {failed[0]} refuses the run: see what it says.")
        if problem is None and differing.size:
            raise ValueError(
                f"process {differing[0]} has other settings or other data than process 0: give all the same"
                " command, and the same files."
            )
    if problem is not None:
        raise problem
    return result


def part() -> None:
    """Wait until all processes have come to their end, and let go of them."""
    if (peers := channel.current()) is not None:
        jax.distributed.shutdown()
        peers.close()


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """End this process at once if it fails, with one line, so that the others, which wait for it, end too.

    An exception alone would not do: on its way out JAX waits for the others to come to their end, five
    minutes by default, and says to them meanwhile that all is well. A process on its own lets it pass.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        if channel.current() is None and not (jax.distributed.is_initialized() and jax.process_count() > 1):
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):  # jax 0.6: a ValueError
            time.sleep(2)  # a collective breaks off if another process ends: let that be heard instead
        if not isinstance(error, (*EXPECTED, KeyboardInterrupt, SystemExit)):
            traceback.print_exc()
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        channel.end(said(error), 130 if isinstance(error, KeyboardInterrupt) else code)


def said(error: BaseException) -> str:
    """Return an error in one line; nothing for an exit with a code, of which its reason was said before."""
    if isinstance(error, SystemExit):
        return "" if isinstance(error.code, int) else str(error.code)
    if isinstance(error, KeyboardInterrupt):
        return "stopped by SIGINT."
    first = str(error).strip().partition("\n")[0][:500]
    kind = type(error).__name__
    if not first:
        return f"error: {kind}"
    sentence = isinstance(error, (ArithmeticError, ValueError)) and not isinstance(error, OSError)
    return f"error: {first}" if sentence else f"error: {kind}: {first}"
