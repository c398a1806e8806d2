"""A connection of every process to the first, over which all learn at once that one fails or is to stop.

JAX's own service finds out after ``--heartbeat`` seconds that a process is dead, and never that one has
failed and waits for the others to shut down. Here the kernel closes the connection of a process with it, and
a thread that listens ends the others, whatever their main threads wait for.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
from typing import Any, NoReturn

from ssam_experiments.running.stopping import Stop, name_of

LONGEST = 2000  # bytes of a message
KILLED = "it was killed or lost; the same command resumes from the last checkpoint."

_current: "Channel | None" = None
_last_words = threading.Lock()  # never released: the thread that has it ends the process


def current() -> "Channel | None":
    """Return the connections of this process, None if it trains alone."""
    return _current


def end(line: str, code: int, message: list[Any] | None = None) -> NoReturn:
    """Write a line to stderr, tell the other processes, and end this one, whatever its threads do.

    Args:
      line: what to write, if anything, and what the others are told.
      code: of the end; a signal's is that of the others too, who otherwise end with 1.
      message: what the others are told instead.
    """
    if not _last_words.acquire(blocking=False):
        threading.Event().wait()
    with contextlib.suppress(OSError, ValueError):  # nobody reads them any more
        sys.stdout.flush()
        sys.stderr.write(line and "\n" * sys.stderr.isatty() + line + "\n")
        sys.stderr.flush()
    if _current is not None:
        said = line.removeprefix("error: ") or "see what it says."
        _current.tell(message or ["failed", _current.process_id, code if code > 128 else 1, said])
    os._exit(code)


class Line:
    """A connection that carries JSON lists, one a line.

    Attributes:
      done: whether the other end has said that it ends well.
      rest: messages that came early.
    """

    def __init__(self, connection: socket.socket, heartbeat: int):
        self.socket, self.done, self._begun = connection, False, b""
        self.rest: list[list[Any]] = []
        connection.settimeout(5)
        options = {"TCP_KEEPIDLE": heartbeat // 2, "TCP_KEEPINTVL": heartbeat // 8, "TCP_KEEPCNT": 3}
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine may be lost in silence
        for name, value in options.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, value))

    def send(self, *message: Any) -> None:
        """Send a message, unless the other end is gone."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[list[Any]] | None:
        """Return the messages that have come, None once the other end is gone or talks of something else."""
        try:
            data = self.socket.recv(4096)
            *lines, self._begun = (self._begun + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        right = all(isinstance(m, list) and m and isinstance(m[0], str) for m in messages)
        return messages if data and right and len(self._begun) < LONGEST else None


class Channel:
    """The connections of a process: of the first to all others, of another to the first.

    Args:
      process_id: of this process.
      peers: the connections, by process.
      stop: where the run asks whether to stop.
    """

    def __init__(self, process_id: int, peers: dict[int, Line], stop: Stop):
        self.process_id, self._peers, self._stop = process_id, peers, stop
        self._calls: dict[int, int] = {}
        self._signum = 0
        self._turn = threading.RLock()  # of the threads that listen and that take signals

    def open(self) -> None:
        """Listen from now on, and until this process ends."""
        global _current
        _current = self
        threading.Thread(target=self._listen, daemon=True, name="channel").start()

    def close(self) -> None:
        """Say that this process ends well."""
        self.tell(["done"])

    def tell(self, message: list[Any]) -> None:
        """Send a message to the other processes that this one knows."""
        for peer in self._peers.values():
            peer.send(*message)

    def request(self, signum: int) -> None:
        """Ask all processes to stop at the next point of the run that none of them has passed."""
        with self._turn:
            if self.process_id:
                self.tell(["stop", signum])
            elif not self._signum:
                self._signum = signum
                self.tell(["freeze"])
                self._count(0, self._stop.freeze())

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for i, peer in self._peers.items():
                selector.register(peer.socket, selectors.EVENT_READ, i)
                for message in peer.rest:
                    self._hear(i, message)
            while selector.get_map():
                for key, _ in selector.select():
                    i, peer = key.data, self._peers[key.data]
                    messages = peer.receive()
                    for message in messages or ():
                        self._hear(i, message)
                    if messages is None:
                        selector.unregister(peer.socket)
                        if not peer.done:
                            self._hear(i, ["failed", i, 1, KILLED])

    def _hear(self, i: int, message: list[Any]) -> None:
        match message:
            case ["failed", int(who), int(code), str(why)]:
                end(
                    f"error: process {who} ended, and so does this one: {why}" if code == 1 else why,
                    code,
                    message,
                )
            case ["done"]:
                self._peers[i].done = True
            case ["stop", int(signum)]:
                self.request(signum)
            case ["freeze"]:
                self._peers[i].send("at", self._stop.freeze())
            case ["at", int(calls)]:
                self._count(i, calls)
            case ["stop at", int(call), int(signum)]:
                self._stop.set(call, signum)

    def _count(self, i: int, calls: int) -> None:
        """Note how far a process is; once all are known, say where they stop."""
        with self._turn:
            self._calls[i] = calls
            if len(self._calls) <= len(self._peers):
                return
            last = max(self._calls.values())
        if not last:
            end(f"stopped by {name_of(self._signum)} before the first step.", 128 + self._signum)
        self.tell(["stop at", last + 1, self._signum])
        self._stop.set(last + 1, self._signum)
