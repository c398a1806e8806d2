"""The official Python batches of CIFAR, which are pickles, read without trusting them.

A pickle is a program: it may name any function to be called with any arguments, and a few bytes of it can
ask for any amount of memory. Neither Python's nor NumPy's own unpickling sees the file. Its operations are
read one by one (``pickletools.genops``), and the small machine below knows those of CIFAR's batches: they
push and collect numbers, texts, lists, tuples and dictionaries, and describe arrays of bytes.
"""

import dataclasses
import io
import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ssam_experiments.data.bounds import DataError, check_labels, one_line, read_regular

OPERATIONS = 2**20
"""Most operations of a pickle; those of CIFAR-100 have half as many."""


class Refused(pickle.UnpicklingError):
    """The pickle asks for something that does not occur in CIFAR's batches."""

    def __init__(self, text: str):
        super().__init__(one_line(text))


@dataclasses.dataclass
class _Array:
    """Stands for an array; ``state`` is what NumPy would make it of."""

    state: Any = None

    def value(self) -> np.ndarray:
        """Make the array, of uint8, after a look at the state."""
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _Bytes) or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError("an array has no type or no shape")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if len(shape) > 4 or len(raw) != math.prod(shape):
            raise ValueError(f"an array of shape {shape[:4]} has {len(raw)} bytes")
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran is True else "C")


class _Bytes:
    """Stands for ``np.dtype("uint8")``."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name that a pickle may ask for, and what stands for calling it, if it may be called."""

    call: Callable[..., Any] | None = None


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not ALLOWED["numpy", "ndarray"]:
        raise Refused("The pickle has an array of an unknown class.")
    return _Array()


def _dtype(name: Any, *_: Any) -> _Bytes:
    if _text(name) not in ("u1", "uint8"):
        raise Refused(f"The pickle has an array of type {_text(name)}; CIFAR's batches have uint8 alone.")
    return _Bytes()


def _encode(text: Any, encoding: Any) -> str:
    if not isinstance(text, str) or _text(encoding) != "latin1":
        raise Refused(f"The pickle has bytes encoded as {_text(encoding)}, not as latin1.")
    return text  # which an array encodes, once


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Name(_reconstruct),
    ("numpy._core.multiarray", "_reconstruct"): _Name(_reconstruct),
    ("numpy", "ndarray"): _Name(),
    ("numpy", "dtype"): _Name(_dtype),
    ("_codecs", "encode"): _Name(_encode),
}


def _text(value: Any) -> str:
    """Return a key or name. What is none is neither hashed nor printed: it may be a tower of tuples."""
    if not isinstance(value, bytes | str) or len(value) > 1000:
        raise ValueError(f"a {type(value).__name__} is where a short text must be")
    return value.decode("latin1") if isinstance(value, bytes) else value


class _Machine:
    """A stack, marks on it, and a memo, as in Python's own pickle machine."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Return what a pickle describes."""
        for count, (operation, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
            if count >= OPERATIONS:
                raise Refused(f"The pickle has more than {OPERATIONS} operations.")
            if (step := STEPS.get(operation.name)) is None:
                raise Refused(f"The pickle has an operation {operation.name}; CIFAR's batches have none.")
            step(self, argument)
        return self.stack.pop()

    def pop_marked(self) -> list[Any]:
        """Return and remove what is above the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def pop(self, count: int) -> list[Any]:
        """Return and remove the last items."""
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def find(self, module: Any, name: Any) -> None:
        """Push what stands for a name."""
        try:
            self.stack.append(ALLOWED[_text(module), _text(name)])
        except KeyError:
            raise Refused(
                f"The pickle asks for {module}.{name}, which CIFAR's batches never do; nothing was called."
            ) from None

    def call(self) -> None:
        """Call a stand-in."""
        name, arguments = self.pop(2)
        if not isinstance(name, _Name) or name.call is None or not isinstance(arguments, tuple):
            raise Refused("The pickle calls something that is no function.")
        self.stack.append(name.call(*arguments))

    def build(self) -> None:
        """Give an array its state. That of a type, such as byte order, means nothing for single bytes."""
        (state,) = self.pop(1)
        if isinstance(self.stack[-1], _Array):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], _Bytes):
            raise Refused("The pickle sets the state of something that is no array.")

    def extend(self, items: list[Any]) -> None:
        """Append to the list on the stack."""
        if not isinstance(self.stack[-1], list):
            raise Refused("The pickle appends to something that is no list.")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Set items of the dictionary on the stack; keys are texts, whose hash costs nothing."""
        if not isinstance(self.stack[-1], dict):
            raise Refused("The pickle sets items of something that is no dictionary.")
        self.stack[-1].update(_pairs(items))


def _pairs(items: list[Any]) -> dict[str, Any]:
    return {_text(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG1", "FLOAT", "BINFLOAT")
_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE")
_RAW = ("BINBYTES", "SHORT_BINBYTES")

STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys((*_NUMBERS, *_TEXTS, *_RAW), lambda m, value: m.stack.append(value)),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda m, i: m.memo.update({i: m.stack[-1]})),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, i: m.stack.append(m.memo[i])),
    "MEMOIZE": lambda m, _: m.memo.update({len(m.memo): m.stack[-1]}),
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_marked())),
    "TUPLE1": lambda m, _: m.stack.append(tuple(m.pop(1))),
    "TUPLE2": lambda m, _: m.stack.append(tuple(m.pop(2))),
    "TUPLE3": lambda m, _: m.stack.append(tuple(m.pop(3))),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "LIST": lambda m, _: m.stack.append(m.pop_marked()),
    "APPEND": lambda m, _: m.extend(m.pop(1)),
    "APPENDS": lambda m, _: m.extend(m.pop_marked()),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "DICT": lambda m, _: m.stack.append(_pairs(m.pop_marked())),
    "SETITEM": lambda m, _: m.update(m.pop(2)),
    "SETITEMS": lambda m, _: m.update(m.pop_marked()),
    "GLOBAL": lambda m, names: m.find(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.find(*m.pop(2)),
    "REDUCE": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
}
"""What the machine does for an operation, given its argument."""


def read_batch(path: Path, label_key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the images, uint8 of shape (n, 32, 32, 3), and the labels, int32, of one file.

    Raises:
      pickle.UnpicklingError: the file asks for a class, function or operation that these files have not.
      ValueError: the file is too large, truncated or otherwise not a batch of CIFAR.
    """
    data = read_regular(path)
    try:
        content = _Machine().run(data)
        del data
        planes, listed = content["data"].value(), content[label_key]
        if not isinstance(listed, list):
            raise ValueError(f"{label_key} is no list")
        images = planes.reshape(len(listed), 3, 32, 32).transpose(0, 2, 3, 1)
    except Refused as error:
        raise Refused(f"{path}: {error}") from None
    except Exception as error:  # damaged bytes can be any program of the machine, hence any error
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is not a complete batch of CIFAR with data and {label_key}: {why}") from None
    return images, check_labels(listed, classes, path)
