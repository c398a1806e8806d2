"""How the processes of a run come together before JAX starts, at the address that it has next."""

import contextlib
import ipaddress
import os
import selectors
import socket
import sys
import time
from collections.abc import Iterator

from ssam_experiments.running.channel import Line


def meet(
    coordinator: str, count: int, process_id: int, heartbeat: int, bind: str | None = None
) -> dict[int, Line]:
    """Return the connections of this process: those of process 0 to the others, that of another to process 0.

    Args:
      coordinator: ``HOST:PORT`` of process 0.
      count: how many processes there are.
      process_id: which of them this is.
      heartbeat: seconds to wait for the others.
      bind: ``HOST:PORT`` where process 0 listens, if this is not `bind_address` of the coordinator.

    Raises:
      ValueError: process 0 cannot listen, another does not come, or one has another number of processes.
    """
    end = time.monotonic() + heartbeat
    if process_id:
        return {0: _join(coordinator, process_id, count, heartbeat, end)}
    host = _Host(count, heartbeat)
    with _listener(coordinator, bind or bind_address(coordinator)) as listener:
        host.wait(listener, end)
    if absent := set(range(1, count)) - set(host.members):
        host.refuse(f"process {min(absent)} did not come to {coordinator} within --heartbeat {heartbeat} s.")
    for line in host.members.values():
        line.send("go")
    return host.members


def bind_address(coordinator: str) -> str:
    """Return ``HOST:PORT`` where process 0 listens: as given, or else ``JAX_COORDINATOR_BIND_ADDRESS``."""
    return os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or coordinator


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def outward() -> Iterator[str]:
    """Yield ``HOST:PORT`` at which other machines reach this one, and keep the port free."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of a network for documentation; nothing is sent
            host = probe.getsockname()[0]
        except OSError:
            host = socket.gethostbyname(socket.gethostname())
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        kept.bind((host, 0))
        yield f"{host}:{kept.getsockname()[1]}"


def _listener(coordinator: str, bind: str) -> socket.socket:
    """Return a socket that listens at the address of process 0, and at no other."""
    try:
        host, port = _address(bind)
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            # JAX listens at the same port afterwards, while these connections last.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "SO_REUSEPORT"):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(where)
            with contextlib.suppress(OSError), socket.create_connection((str(where[0]), port), timeout=1):
                raise ValueError("something listens there")
            listener.listen()
            stack.pop_all()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"process 0 cannot listen at --coordinator {coordinator} ({error}): give an address of its"
            " machine and a free port; or set JAX_COORDINATOR_BIND_ADDRESS, if others reach it by another."
        ) from error
    if ipaddress.ip_address(where[0]).is_loopback and host not in (where[0], "localhost"):
        sys.stderr.write(
            f"warning: here {host} is {where[0]}, which other machines cannot reach: give an address.\n"
        )
    return listener


class _Host:
    """Process 0, to which the others come.

    Attributes:
      members: the connections to those who came.
    """

    def __init__(self, count: int, heartbeat: int):
        self.members: dict[int, Line] = {}
        self._count, self._heartbeat = count, heartbeat

    def wait(self, listener: socket.socket, end: float) -> None:
        """Wait until all have come, or until a time."""
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ, None)
            while len(self.members) < self._count - 1 and (left := end - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if key.data is None:
                        line = Line(listener.accept()[0], self._heartbeat)
                        selector.register(line.socket, selectors.EVENT_READ, line)
                    elif not self._hear(key.data):
                        selector.unregister(key.data.socket)
                        key.data.socket.close()
            for key in list(selector.get_map().values()):  # strangers that said nothing
                if isinstance(key.data, Line) and key.data not in self.members.values():
                    key.data.socket.close()

    def refuse(self, problem: str, *others: Line) -> None:
        """Tell all who are here why the run goes no further, and raise."""
        for line in (*self.members.values(), *others):
            line.send("refused", problem)
            line.socket.close()
        raise ValueError(problem)

    def _hear(self, line: Line) -> bool:
        """Take in what has come, and return whether more may come."""
        match line.receive():
            case []:
                return True
            case [["hello", int(i), int(count)]]:
                if count != self._count:
                    self.refuse(f"process {i} has --processes {count}, and process 0 {self._count}.", line)
                if i in self.members or not 0 < i < count:
                    self.refuse(f"two processes have --process-id {i}.", line)
                self.members[i] = line
                return True
        for i, member in self.members.items():
            if member is line:
                self.refuse(f"process {i} was killed or lost before all had come to --coordinator.")
        return False  # a stranger


def _join(coordinator: str, process_id: int, count: int, heartbeat: int, end: float) -> Line:
    """Return the connection to process 0, once all have come."""
    missed = f"process 0 did not answer at --coordinator {coordinator} within --heartbeat {heartbeat} s"
    while True:
        try:
            connection = socket.create_connection(_address(coordinator), timeout=5)
            if connection.getsockname() != connection.getpeername():  # with a free port this can happen
                break
            connection.close()
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(f"{missed}: {error}.") from error
        time.sleep(0.1)
    line = Line(connection, heartbeat)
    line.send("hello", process_id, count)
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while selector.select(max(0.0, end + 1 - time.monotonic())):  # process 0 says first who is missing
            match line.receive():
                case [["go"], *rest]:
                    line.rest = rest
                    return line
                case [["refused", str(problem)], *_]:
                    raise ValueError(problem)
                case None:
                    raise ValueError(f"process 0 ended before all had come to --coordinator {coordinator}.")
    raise ValueError(f"{missed}.")
