"""How long processes live on after one of them was killed: ``python benchmarks/process_death.py``.

Processes on this machine, one CPU device each, sum an array over all of them in a loop until one gets
SIGKILL. Prints how the others end: with JAX alone, and in `ssam_experiments.running.processes.all_or_none`.
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

CASES = (  # which process is killed, the heartbeat, all_or_none, where the others are
    ("last", 10, True, "in a sum"),
    ("last", 10, False, "in a sum"),
    ("last", 10, True, "elsewhere"),
    ("first", 10, True, "in a sum"),
    ("last", 100, True, "in a sum"),
    ("last", 100, False, "in a sum"),
)
PROGRAM = """
import pathlib, sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ssam_experiments.running import processes

at, count, i, heartbeat, guard, busy, folder = sys.argv[1:]
processes.start(at, int(count), int(i), int(heartbeat))

def work():
    place = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec("all"))
    x = jax.make_array_from_process_local_data(place, np.ones(8, np.float32))
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    (pathlib.Path(folder) / i).touch()
    while True:
        total(x).block_until_ready() if busy == "in a sum" else time.sleep(0.1)

if guard == "True":
    with processes.all_or_none():
        work()
work()
"""


def measure(folder: pathlib.Path, count: int, case: tuple) -> str:
    """Return a line of the table."""
    killed, heartbeat, guard, busy = case
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(socket.socket())  # keeps the port from others
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("", 0))
        at = f"127.0.0.1:{held.getsockname()[1]}"
        given = [at, str(count)], [str(heartbeat), str(guard), busy, str(folder)]
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
        victim = members[0 if killed == "first" else -1]
        victim.kill()
        began = time.perf_counter()
        codes = [member.wait(600) for member in members if member is not victim]
        seconds = time.perf_counter() - began
    return f"| {killed} | {busy} | {heartbeat} | {'yes' if guard else 'no'} | {seconds:.1f} | {codes} |"


def main() -> None:
    """Print the table."""
    print(f"jax {jax.__version__}, 3 processes")
    print("| killed | the others are | heartbeat, s | all_or_none | seconds until all end | exit codes |")
    print("| --- | --- | ---: | --- | ---: | --- |")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(pathlib.Path(folder), 3, case), flush=True)


if __name__ == "__main__":
    main()
