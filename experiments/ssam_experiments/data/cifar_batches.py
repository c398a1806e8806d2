"""The official Python batches of CIFAR, which are pickles, read without trusting them.

A pickle may name any function to be called with any arguments. Here it can name the five things that occur
in these files, and gets stand-ins written below, which build arrays of uint8 and nothing else: not even
NumPy's own unpickling sees the file.
"""

import math
import pickle
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


class Refused(pickle.UnpicklingError):
    """The pickle asks for something that does not occur in CIFAR's batches."""


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


class _Type:
    """Stands for ``np.dtype``, of uint8 alone."""

    def __init__(self, name: str | bytes, *_: Any):
        if _text(name) not in ("u1", "uint8"):
            raise Refused(f"The pickle has an array of type {_text(name)}; CIFAR's batches have uint8 alone.")

    def __setstate__(self, state: tuple) -> None:
        """Ignore byte order and the like, which mean nothing for single bytes."""


class _Array:
    """Stands for ``np.ndarray``; ``value`` is the array."""

    value: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Type) or len(raw) != math.prod(shape):
            raise ValueError(f"an array of shape {shape} has {len(raw)} bytes")
        self.value = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: type, *_: Any) -> _Array:
    if kind is not _Array:
        raise Refused("The pickle has an array of an unknown class.")
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    if _text(encoding) != "latin1":
        raise Refused(f"The pickle has bytes encoded as {_text(encoding)}, not as latin1.")
    return text.encode("latin1")


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    """An unpickler that finds nothing but what is in ``ALLOWED``."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise Refused(
                f"The pickle asks for {module}.{name}, which CIFAR's batches never do; nothing was called."
            ) from None

    def persistent_load(self, pid: Any) -> NoReturn:
        raise Refused("The pickle refers to something outside itself, which CIFAR's batches do not.")


def read_batch(path: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images, uint8 of shape (n, 32, 32, 3), and the labels, int64, of one file.

    Raises:
      pickle.UnpicklingError: the file asks for a class or function that these files do not contain.
      ValueError: the file is truncated or otherwise not a batch of CIFAR.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        content = {_text(key): value for key, value in content.items()}
        planes, labels = content["data"].value, np.array(content[label_key], np.int64)
        images = planes.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
    except Refused as error:
        raise Refused(f"{path}: {error}") from None
    except Exception as error:  # damaged bytes can be any program of the pickle machine, hence any error
        raise ValueError(
            f"{path} is not a complete batch of CIFAR with data and {label_key}: {error!r}"
        ) from error
    return images, labels
