"""Read a manifest's files one by one, and print what came of each: ``python hostile_reader.py MANIFEST``."""

import json
import resource
import sys
import time

from ssam_experiments.data import datasets, sources
from ssam_experiments.data.images import decode

ROOM, SECONDS = 2**31, 60  # beyond what the imports take; of CPU time for all files


def read(reader, folder):
    """Read what the trainer would."""
    if reader in ("image", "stream"):
        find = sources.image_folder if reader == "image" else sources.parquet
        source = find(folder, "train") if reader == "image" else find(folder, "train", classes=10)
        for i in range(len(source)):
            decode(source[i][0], source.where(i))
    else:
        datasets.load({"cifar": "cifar10", "batch": "cifar10", "idx": "fashion-mnist"}[reader], folder)


def peak():
    """Return the most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(manifest):
    """Print a line of JSON for each file, after a line of its name."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    for name, reader, folder, _ in manifest:
        print(name.encode("unicode_escape").decode(), flush=True)
        before, start = peak(), time.process_time()
        try:
            read(reader, folder)
            kind, message = "", ""
        except Exception as error:
            kind, message = type(error).__name__, str(error)
        took = {"memory": peak() - before, "seconds": time.process_time() - start}
        print(json.dumps({"name": name, "kind": kind, "message": message} | took), flush=True)


if __name__ == "__main__":
    with open(sys.argv[1]) as listed:
        main(json.load(listed))
