"""Several processes that run one command on this machine, and end with the test."""

import contextlib
import os
import re
import socket
import subprocess
import time

PATIENCE = 600  # seconds for processes to start, compile and take their steps, on a machine that is busy


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
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
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
