"""The documentation strings of the standard library, as a text of characters."""

import ast
import pathlib
import sysconfig
from typing import NamedTuple

import numpy as np

HELD_OUT = 10  # every tenth module is for evaluation
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))


class Corpus(NamedTuple):
    """Text as indices into `CHARACTERS`, int32 of shape (characters,)."""

    train: np.ndarray
    held_out: np.ndarray
    modules: int


def read_corpus() -> Corpus:
    """Return the documentation strings of the standard library's top-level modules, in order of their names.

    Whole modules are held out. The text depends on the version of Python alone.
    """
    texts = []
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        text = "\n\n".join(filter(None, strings))
        if text:
            texts.append("".join(c for c in text.expandtabs() if c in CHARACTERS) + "\n\n")
    held_out = "".join(texts[HELD_OUT - 1 :: HELD_OUT])
    train = "".join(text for i, text in enumerate(texts) if i % HELD_OUT != HELD_OUT - 1)
    return Corpus(encode(train), encode(held_out), len(texts))


def encode(text: str) -> np.ndarray:
    """Return the indices of a text's characters."""
    return np.array([CHARACTERS.index(c) for c in text], np.int32)
