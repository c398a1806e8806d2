"""How a run stops at a signal: where it asks, what it raises, and who listens."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818 (it was asked for)
    """The run was asked to stop, and has saved how far it came.

    Attributes:
      code: of the process's end, 128 and the number of the signal, as shells have it.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"stopped by {name_of(signum)} after step {step}, which is saved: the same command resumes."
        )
        self.code = 128 + signum


class Stop:
    """Where a run asks whether to stop: as often, and at the same points of the run, in all its processes.

    Attributes:
      over: whether the run asks no more.
      signum: of the signal, once it is to stop.
    """

    def __init__(self) -> None:
        self.over, self.signum = False, 0
        self._changed = threading.Condition()
        self._calls, self._frozen = 0, False
        self._at: int | None = None

    def here(self) -> bool:
        """Return whether the run is to stop here; waits while the processes find out where."""
        with self._changed:
            while self._frozen and self._at is None:
                self._changed.wait()
            self._calls += 1
            return self._at is not None and self._calls >= self._at

    def freeze(self) -> int:
        """Let no more call of `here` return before `set`; return how many have returned."""
        with self._changed:
            self._frozen = True
            return self._calls

    def set(self, call: int, signum: int) -> None:
        """Stop at a call, of those that have not returned."""
        with self._changed:
            self._at, self.signum = call, signum
            self._changed.notify_all()


def name_of(signum: int) -> str:
    """Return the name of a signal, such as SIGTERM."""
    return signal.Signals(signum).name


class Signals:
    """The signals of a process while it trains: the first calls ``stop``, a second one ``end``.

    A thread reads them, since Python's own handlers wait for the main thread, which may be inside a
    compilation or a collective. JAX has a handler of its own for SIGTERM: `take` after
    ``jax.distributed.initialize``.
    """

    def __init__(self, stop: Callable[[int], None], end: Callable[[int], None]):
        self._stop, self._end, self._handles = stop, end, False

    def take(self) -> None:
        """Handle the signals again, if `handled` did, whoever does now."""
        for signum in SIGNALS if self._handles else ():
            signal.signal(signum, lambda *_: None)  # what counts is that it writes to the pipe

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals, and give them back at the end; outside of the main thread do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        receives, sends = os.pipe()
        os.set_blocking(sends, False)
        wakeup = signal.set_wakeup_fd(sends, warn_on_full_buffer=False)
        listener = threading.Thread(target=self._listen, args=(receives,), daemon=True, name="signals")
        listener.start()
        self._handles = True
        try:
            self.take()
            yield
        finally:
            self._handles = False
            for signum, handler in before.items():
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
            signal.set_wakeup_fd(wakeup)
            os.close(sends)  # which ends the thread
            listener.join()
            os.close(receives)

    def _listen(self, receives: int) -> None:
        seen = 0
        while data := os.read(receives, 64):
            for signum in data:
                if signum not in SIGNALS:
                    continue
                seen += 1
                (self._stop if seen == 1 else self._end)(signum)


def leave_to_the_trainer(index: int = 0, count: int = 0) -> None:
    """Make a worker process deaf to the signals that its trainer gets too, and end with its trainer.

    A terminal sends Ctrl-C, and SLURM SIGTERM, to workers too, without which the trainer could not take its
    last steps; and a trainer that is killed has no time to end them.
    """
    del index, count
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    if trainer is None:
        return

    def watch() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="trainer").start()
