"""What a trainer's process does before it loads JAX: it takes signals, and meets the other processes."""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from ssam_experiments.running import channel
from ssam_experiments.running.channel import Channel, Line, end
from ssam_experiments.running.meeting import meet
from ssam_experiments.running.stopping import Signals, Stop, name_of

STOP = Stop()  # where the run of this process asks whether to stop
disconnected = False  # whether the processes of this run could not meet
_signals: Signals | None = None
_until_the_end = contextlib.ExitStack()


def begin(arguments: list[str]) -> None:
    """Take SIGTERM and SIGINT from now on, and meet the other processes; end if they do not come."""
    _until_the_end.enter_context(handled(STOP))
    try:
        gather(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")


def gather(arguments: list[str]) -> None:
    """Meet the other processes, once, so that from now on each learns at once if one of them ends.

    Nothing is done for a process on its own, for ``--coordinator auto``, or with flags that cannot be used:
    those are refused later, and the others learn of it.

    Raises:
      ValueError: process 0 cannot listen, another does not come, or one has another number of processes.
    """
    flags = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    flags.add_argument("--coordinator", default="")
    flags.add_argument("--processes", type=int, default=1)
    flags.add_argument("--process-id", "--process_id", type=int, default=0)
    flags.add_argument("--heartbeat", type=int, default=100)
    flags.add_argument("-h", "--help", action="store_true")
    try:
        given, _ = flags.parse_known_args(arguments)
    except (argparse.ArgumentError, SystemExit):
        return
    host, _, port = given.coordinator.rpartition(":")
    usable = host and port.isdecimal() and given.heartbeat >= 1 and 0 <= given.process_id < given.processes
    if usable and given.processes > 1 and not given.help and channel.current() is None:
        connect(given.process_id, meet(given.coordinator, given.processes, given.process_id, given.heartbeat))


def connect(process_id: int, lines: dict[int, Line]) -> None:
    """Listen to the others, and tell them what becomes of this process."""
    Channel(process_id, lines, STOP).open()


def take_signals() -> None:
    """Take the signals back from whoever has taken them since."""
    if _signals is not None:
        _signals.take()


@contextlib.contextmanager
def handled(stop: Stop) -> Iterator[None]:
    """Let SIGTERM and SIGINT stop the run, in all its processes at one step; a second one ends them at once.

    Before the first step, and when the run asks no more, the first one does that too.
    """
    global _signals

    def at_once(signum: int) -> None:
        end(f"stopped by {name_of(signum)}.", 128 + signum)

    def first(signum: int) -> None:
        if stop.over or disconnected:  # alone it must not stop at a step
            at_once(signum)
        elif (group := channel.current()) is not None:
            group.request(signum)
        elif calls := stop.freeze():
            stop.set(calls + 1, signum)
        else:
            end(f"stopped by {name_of(signum)} before the first step.", 128 + signum)

    _signals = Signals(first, at_once)
    try:
        with _signals.handled():
            yield
    finally:
        _signals = None
