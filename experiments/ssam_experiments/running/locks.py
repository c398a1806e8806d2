"""One trainer to a folder: a lock that its process holds while it lives, and files that are made once."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator

NAME = "lock"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # what a file system without locks says
NO_LINKS = {errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP}

_held: dict[pathlib.Path, int] = {}  # folders, and the descriptors of their lock files
_mutex = threading.Lock()


def hold(folder: pathlib.Path) -> bool:
    """Lock a folder for this process, until `release` or the end of the process, however it ends.

    The lock is ``flock``'s: the kernel drops it with the process, so that none is left behind. It holds
    between machines on NFS (Linux asks the server for it), and on other shared file systems as they are
    mounted: one that knows no locks is named on stderr, and its folders are not locked.

    Returns:
      Whether this call locked the folder; False if this process holds it already, or it cannot be locked.

    Raises:
      ValueError: another process holds it.
      OSError: the lock file cannot be opened.
    """
    with _mutex:
        folder = folder.resolve()
        path = folder / NAME
        if folder in _held and _is(_held[folder], path):
            return False
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise ValueError(
                    f"--out {folder} is in use by {holder}: wait until it ends, stop it, or name another."
                ) from None
            except OSError as error:
                os.close(descriptor)
                if error.errno not in NO_LOCKS:
                    raise
                sys.stderr.write(f"warning: nothing guards {folder} from a second trainer: {error}\n")
                return False
            if _is(descriptor, path):  # else the file was deleted, and another made, meanwhile
                break
            os.close(descriptor)
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T %z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode(), 0)
        _held[folder] = descriptor
        return True


def release(folder: pathlib.Path) -> None:
    """Unlock a folder, if this process holds it."""
    with _mutex:
        if (descriptor := _held.pop(folder.resolve(), None)) is not None:
            os.close(descriptor)


@contextlib.contextmanager
def releasing(folder: pathlib.Path) -> Iterator[None]:
    """Unlock a folder at the end."""
    try:
        yield
    finally:
        release(folder)


def create(path: pathlib.Path, text: str) -> bool:
    """Write a file that is complete or absent, unless there is one already.

    Of several processes that do so at the same time one alone writes it.

    Returns:
      Whether this call wrote the file.
    """
    if path.exists():
        return False
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            part.replace(path)  # no links here: the folder's lock keeps others from it
    finally:
        part.unlink(missing_ok=True)
    return True


def _is(descriptor: int, path: pathlib.Path) -> bool:
    """Return whether a descriptor is of the file that is at a path now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Return who holds a lock, as the lock file says; it is empty for a moment."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        about = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    return "another process"


def _leave() -> None:
    """Close the lock files in a fork, which would keep the locks when this process has ended."""
    global _mutex
    _mutex = threading.Lock()
    while _held:
        os.close(_held.popitem()[1])


os.register_at_fork(after_in_child=_leave)
