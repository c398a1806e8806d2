"""Several processes that train as one: how they start, agree on a run, and end."""

import contextlib
import functools
import hashlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Result = TypeVar("Result")


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
    options: dict[str, Any] = {}
    if "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters:
        options["heartbeat_timeout_seconds"] = heartbeat
    elif heartbeat != 100:
        raise ValueError(
            f"--heartbeat {heartbeat} needs jax 0.7 or later: {jax.__version__} always waits 100 s."
        )
    if coordinator != "auto":
        jax.distributed.initialize(coordinator, processes, process_id, **options)
        return
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        raise ValueError(
            f"--coordinator auto found no cluster here ({error}): give --coordinator HOST:PORT, --processes"
            " and --process-id."
        ) from error


def is_first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def together(work: Callable[[], Result], facts: Callable[[Result], str]) -> Result:
    """Return what ``work`` returns, if it fails in no process and ``facts`` of it are the same in all.

    So a refusal in one process, whose disk may lack the data, is one in all of them, and none waits for it.

    Raises:
      FileNotFoundError, ValueError: ``work`` raised it, here or in another process, or the facts differ.
    """
    result, problem, words = None, None, np.zeros(2, np.uint32)
    try:
        result = work()
        words = np.frombuffer(hashlib.sha256(facts(result).encode()).digest()[:8], np.uint32)
    except (FileNotFoundError, ValueError) as error:
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


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """End this process at once if it fails, so that the others, which wait for it, end too.

    An exception alone would not do: on its way out JAX waits for the others to come to their end, five
    minutes by default, and says to them meanwhile that all is well.
    """
    try:
        yield
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
