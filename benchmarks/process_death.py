"""How long processes live on after one of them has ended: ``python benchmarks/process_death.py``.

Processes on this machine, one CPU device each, sum an array over all of them in a loop until one fails or is
killed. Prints how all end: with JAX alone, and as the trainer does it (`ssam_experiments.running.channel`).
"""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import jax

CASES = (  # what happens, to which process, where the others are, the heartbeat, whether JAX is alone
    ("SIGKILL", "last", "in a sum", 10, False),
    ("SIGKILL", "last", "in a sum", 10, True),
    ("SIGKILL", "last", "elsewhere", 10, False),
    ("SIGKILL", "last", "elsewhere", 10, True),
    ("SIGKILL", "first", "in a sum", 10, False),
    ("SIGKILL", "first", "in a sum", 10, True),
    ("OSError", "last", "in a sum", 10, False),
    ("OSError", "last", "in a sum", 10, True),
    ("SIGKILL", "last", "elsewhere", 100, False),
)
PROGRAM = """
import pathlib, sys, time
from ssam_experiments.running import group

at, count, i, heartbeat, alone, busy, folder, fails = sys.argv[1:]
if alone == "False":
    flags = {"coordinator": at, "processes": count, "process-id": i, "heartbeat": heartbeat}
    group.begin([f"--{name}={value}" for name, value in flags.items()])

import contextlib
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ssam_experiments.running import processes

processes.start(at, int(count), int(i), int(heartbeat))
with contextlib.nullcontext() if alone == "True" else processes.all_or_none():
    place = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec("all"))
    x = jax.make_array_from_process_local_data(place, np.ones(8, np.float32))
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    (pathlib.Path(folder) / i).touch()
    while True:
        total(x).block_until_ready() if busy == "in a sum" else time.sleep(0.1)
        if fails == i and (pathlib.Path(folder) / "now").exists():
            raise OSError("No space left on device")
"""


def measure(folder: pathlib.Path, count: int, case: tuple) -> str:
    """Return a line of the table."""
    happens, who, busy, heartbeat, alone = case
    number = 0 if who == "first" else count - 1
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(socket.socket())  # keeps the port from others
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("", 0))
        at = f"127.0.0.1:{held.getsockname()[1]}"
        fails = str(number) if happens == "OSError" else "none"
        given = [at, str(count)], [str(heartbeat), str(alone), busy, str(folder), fails]
        members = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *given[0], str(i), *given[1]],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for i in range(count)
        ]
        for member in members:
            stack.callback(member.kill)
        while len(list(folder.iterdir())) < count:
            time.sleep(0.01)
        time.sleep(2)
        if happens == "OSError":
            (folder / "now").touch()
        else:
            members[number].kill()
        began = time.perf_counter()
        codes = [member.wait(600) for member in members]
        seconds = time.perf_counter() - began
    kind = "JAX alone" if alone else "the trainer"
    return f"| {happens} | {who} | {busy} | {heartbeat} | {kind} | {seconds:.1f} | {codes} |"


def main() -> None:
    """Print the table."""
    print(f"jax {jax.__version__}, 3 processes")
    print("| what | to which | the others are | heartbeat, s | with | seconds until all end | exit codes |")
    print("| --- | --- | --- | ---: | --- | ---: | --- |")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(pathlib.Path(folder), 3, case), flush=True)


if __name__ == "__main__":
    main()
