"""What a compiled program does, read from its text."""

import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def element_counts(hlo):
    """Return the number of elements of every array shape in the text of a compiled program."""
    found = re.findall(r"\b(?:pred|bf16|f16|f32|f64|[su]\d+)\[([\d,]*)\]", hlo)
    return [math.prod(map(int, shape.split(","))) if shape else 1 for shape in found]


def operations(hlo, name):
    """Return the element counts on the lines that call an operation, one list for each line."""
    return [element_counts(line) for line in hlo.splitlines() if re.search(rf"\b{name}(-start)?\(", line)]


def communicated(hlo):
    """Return the name and the largest element count of every operation between devices."""
    return [(name, max(counts)) for name in COLLECTIVES for counts in operations(hlo, name)]
