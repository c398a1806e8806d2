"""Count the operations of matrix products and convolutions in a compiled program.

The compiler's own ``cost_analysis`` counts the body of a loop once and counts, in a convolution, the
zeros that gradients of strided ones are padded with. Here a loop counts as often as it runs, and a
product counts only where both factors are data. A multiply-add is two operations.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax

Shape: TypeAlias = tuple[int, ...]


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      opcode: such as ``"dot"``.
      shapes: of the result, several if it is a tuple.
      operands: names.
      attributes: the rest of the line.
      size: bytes of the result.
    """

    opcode: str
    shapes: list[Shape]
    operands: list[str]
    attributes: str
    size: int


Computation: TypeAlias = dict[str, Instruction]


def contraction_flops(fn: Callable[..., Any], *args: Any, merge: bool = True) -> float:
    """Return the operations of products and convolutions in ``fn(*args)`` as it is compiled here.

    Args:
      fn: a function; one that is already jitted keeps its options.
      *args: arrays, or their ``jax.ShapeDtypeStruct``.
      merge: whether the compiler may merge equal computations. On CPUs it merges even what
        ``jax.checkpoint`` asks to be computed again, as it does on no other backend.
    """
    jitted: Any = fn if hasattr(fn, "lower") else jax.jit(fn)
    options = {} if merge else {"xla_disable_hlo_passes": "cse"}
    return program_flops(jitted.lower(*args).compile(compiler_options=options).as_text())


def program_flops(text: str) -> float:
    """Return the operations of products and convolutions in an optimized HLO module.

    A conditional counts as its most expensive branch.

    Raises:
      ValueError: a loop whose trip count is not known holds a product, or a library call that seems
        to be one is not understood.
    """
    computations, entry = parse(text)

    @functools.cache
    def total(name: str) -> float:
        return sum(cost(instruction, computations[name]) for instruction in computations[name].values())

    def cost(instruction: Instruction, names: Computation) -> float:
        if instruction.opcode == "while":
            trips = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', instruction.attributes)
            inside = sum(map(total, called(instruction)))
            if inside and not trips:
                raise ValueError("A loop with a product in it runs an unknown number of times.")
            return inside * int(trips[1]) if trips else 0.0
        if instruction.opcode == "conditional":
            return max(map(total, called(instruction)))
        own = OWN.get(instruction.opcode, lambda *_: 0.0)
        return own(instruction, names) + sum(map(total, called(instruction)))

    return total(entry)


class Collective(NamedTuple):
    """A communication between devices in a compiled program.

    Attributes:
      opcode: such as ``"all-reduce"``.
      size: bytes of its result on a device.
      conditional: whether it is in a branch of a conditional.
    """

    opcode: str
    size: int
    conditional: bool


def collectives(text: str) -> list[Collective]:
    """Return the collectives of an optimized HLO module; one in a loop is there once."""
    computations, entry = parse(text)
    kinds = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")

    def inside(name: str, conditional: bool) -> Iterator[Collective]:
        for instruction in computations[name].values():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode in kinds:
                yield Collective(opcode, instruction.size, conditional)
                continue
            for other in called(instruction):
                yield from inside(other, conditional or instruction.opcode == "conditional")

    return list(inside(entry, False))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations of an HLO module by name, and the name of the one it starts with."""
    computations: dict[str, Computation] = {}
    entry, body = "", {}
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            body = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            body[found[1]] = instruction_of(found[2])
    return computations, entry


def instruction_of(text: str) -> Instruction:
    """Parse what follows the equals sign: shape, opcode, operands, attributes."""
    shape, rest = split_parenthesis(text) if text.startswith("(") else text.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    if opcode == "dot" and re.match(r"[su]\d", shape):  # whose factors are integers, as in a sum of counts
        opcode = "integer dot"
    operands, attributes = split_parenthesis("(" + rest)
    typed = re.findall(r"([a-z]+)(\d*)\w*\[([\d,]*)\]", shape)
    shapes = [tuple(int(size) for size in sizes.split(",") if size) for _, _, sizes in typed]
    size = sum(max(1, int(bits or 8) // 8) * math.prod(dims) for (_, bits, _), dims in zip(typed, shapes))
    return Instruction(opcode, shapes, re.findall(r"%([\w.\-]+)", operands), attributes, size)


def split_parenthesis(text: str) -> tuple[str, str]:
    """Split off a parenthesis that ``text`` starts with."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"An unbalanced parenthesis: {text}")


def called(instruction: Instruction) -> Iterator[str]:
    """Yield the names of the computations that an instruction runs."""
    attributes = instruction.attributes.split("metadata={")[0].split("backend_config=")[0]
    single = r"(?:calls|to_apply|body|condition|(?:true|false)_computation)=%?([\w.\-]+)"
    yield from re.findall(single, attributes)
    for several in re.findall(r"(?:branch|called)_computations=\{([^}]*)\}", attributes):
        yield from re.findall(r"[\w.\-]+", several)


def dot_flops(instruction: Instruction, names: Computation) -> float:
    """Return the operations of a matrix product: two for each result and contracted entry."""
    lhs = names[instruction.operands[0]].shapes[0]
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = [lhs[int(i)] for i in found[1].split(",") if i] if found else []
    return 2.0 * math.prod(instruction.shapes[0]) * math.prod(contracted)


def convolution_flops(instruction: Instruction, names: Computation) -> float:
    """Return the operations of a convolution."""
    lhs, rhs = (names[operand].shapes[0] for operand in instruction.operands[:2])
    return _convolution(instruction.attributes, lhs, rhs, instruction.shapes[0])


def _convolution(attributes: str, lhs: Shape, rhs: Shape, out: Shape) -> float:
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert found, attributes
    lhs_labels, rhs_labels, out_labels = found.groups()
    window = _window(attributes)
    spatial = [label for label in out_labels if label.isdigit()]
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    # A kernel's "i" counts the features of one group; batches of one group meet its kernels alone.
    total = 2.0 * lhs[lhs_labels.index("b")] * rhs[rhs_labels.index("i")] * rhs[rhs_labels.index("o")]
    total /= int(groups[1]) if groups else 1
    for i, label in enumerate(spatial):
        sizes = (shape[names.index(label)] for shape, names in zip((lhs, rhs, out), found.groups()))
        total *= valid_pairs(*sizes, **{name: values[i] for name, values in window.items()})
    return total


def _window(attributes: str) -> dict[str, list[int]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    rank = len(fields["size"].split("x")) if fields else 0
    names = {"stride": "stride", "lhs_dilate": "lhs_dilation", "rhs_dilate": "rhs_dilation"}
    window = {
        name: list(map(int, fields.get(field, "x".join("1" * rank)).split("x"))) if rank else []
        for field, name in names.items()
    }
    low = [int(pad.split("_")[0]) for pad in fields["pad"].split("x")] if "pad" in fields else [0] * rank
    return {**window, "low": low}


@functools.cache
def valid_pairs(
    lhs: int, rhs: int, out: int, *, stride: int, lhs_dilation: int, rhs_dilation: int, low: int
) -> int:
    """Count, along one dimension, the pairs of a result and a kernel entry that meet on data."""
    positions = (o * stride + k * rhs_dilation - low for o in range(out) for k in range(rhs))
    return sum(p % lhs_dilation == 0 and 0 <= p < lhs * lhs_dilation for p in positions)


def library_flops(instruction: Instruction, names: Computation) -> float:
    """Return the operations of a call into a library of products, 0 for any other call."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    target = found[1] if found else ""
    if not re.search(r"gemm|matmul|conv(olution|Forward|Backward|Bias)|dot", target, re.IGNORECASE):
        return 0.0
    operands = [names[operand].shapes[0] for operand in instruction.operands[:2]]
    result = instruction.shapes[0]
    if re.search(r"gemm|matmul", target):
        return 2.0 * math.prod(result) * _contracted(instruction.attributes, *operands, result)
    if "convBackwardInput" in target:  # the window and the labels are those of the forward pass
        return _convolution(instruction.attributes, result, operands[1], operands[0])
    if "convBackwardFilter" in target:
        return _convolution(instruction.attributes, operands[0], result, operands[1])
    if "convForward" in target or "convBias" in target:
        return _convolution(instruction.attributes, *operands, result)
    raise ValueError(f"What the library call {target!r} costs is not known.")


def _contracted(attributes: str, lhs: Shape, rhs: Shape, result: Shape) -> int:
    config = attributes.split("backend_config=")[-1]
    found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', config)
    if found:
        return math.prod(lhs[int(i)] for i in json.loads(found[1]))
    return math.prod(lhs) * result[-1] // math.prod(result)


OWN = {"dot": dot_flops, "convolution": convolution_flops, "custom-call": library_flops}
