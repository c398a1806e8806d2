"""Convolutions that a CPU computes quickly inside loops.

XLA's CPU backend has a fast routine for convolutions whose operands end in the features. Outside of loops and
conditionals it brings other operands into that order, but not inside. There, the gradient of a convolution,
whose operands have another order, takes many times as long (benchmarks/curvature.py), unless they are
transposed first.
"""

from collections.abc import Callable, Sequence

import jax

from ssam_jax._base import tracing
from ssam_jax.typing import PyTree


def loop_ready(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return ``fn`` with the operands of its convolutions transposed, for use inside a loop on a CPU.

    The results are the same. On other backends, which order operands everywhere, it is ``fn`` itself.
    Convolutions in loops, conditionals and checkpoints inside ``fn`` stay as they are.
    """
    if jax.default_backend() != "cpu":
        return fn

    def ready(*args: PyTree) -> PyTree:
        traced = tracing.trace(fn, *args)
        arrays = [*jax.tree.leaves(args[0]), *traced.args]
        results = tracing.interpret(traced.jaxpr, traced.consts, arrays, _transpose_convolutions)
        return jax.tree.unflatten(traced.out_tree, results)

    return ready


def _transpose_convolutions(eqn: tracing.Equation, operands: list[tracing.Value]) -> Sequence[tracing.Value]:
    body = tracing.inlined_body(eqn)
    if body is not None:
        return tracing.interpret(body.jaxpr, body.consts, operands, _transpose_convolutions)
    if eqn.primitive.name != "conv_general_dilated":
        return tracing.apply(eqn, operands)
    dims = eqn.params["dimension_numbers"]  # of each operand: batch (or output), feature (or input), space
    lhs, rhs, out = dims.lhs_spec, dims.rhs_spec, dims.out_spec
    rank = len(lhs)
    space = range(1, rank - 1)
    image = (0, rank - 1, *space)
    [result] = tracing.bind(
        eqn,
        [
            jax.lax.transpose(operands[0], (lhs[0], *lhs[2:], lhs[1])),
            jax.lax.transpose(operands[1], (*rhs[2:], rhs[1], rhs[0])),
        ],
        dimension_numbers=jax.lax.ConvDimensionNumbers(image, (rank - 1, rank - 2, *range(rank - 2)), image),
    )
    place = dict(zip((out[0], *out[2:], out[1]), range(rank)))
    return [jax.lax.transpose(result, [place[i] for i in range(rank)])]
