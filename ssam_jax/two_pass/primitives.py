"""What the library knows about JAX's primitives: one table from their names to their traits.

Everything that asks what kind of operation an equation is asks here. A fact that can be derived from the
equation itself is derived and is not in the table: see `may_multiply`.
"""

import enum

import jax

from ssam_jax._base import tracing


class Trait(enum.Flag):
    """What is true of every equation of a primitive.

    Attributes:
      ELEMENTWISE: each entry of the result depends on one entry of each operand, which may be broadcast
        from a number. Rows of the operands can be computed separately.
      CONSTANT: no gradient flows from the result to any operand.
      LINEAR: the derivative needs none of the values that gradients flow through.
      BILINEAR: linear in each of the first two operands; the derivative by one needs the other.
      CONTRACTION: bilinear, and sums over products; of a weight and an activation it makes an activation.
      VIEW: the result shows the entries of its operands.
      MOVES: a view that moves entries or chooses among them. What it does to values, it does to masks.
      JOINS: makes a broadcast or looked-up weight, such as a bias, part of the activation it meets.
      RELOCATES: sorts or scatters. It has several operands and multiplies none with another.
      CHECKPOINT: the primitive of ``jax.checkpoint``.
      CUSTOM_RULE: a function with derivative rules of its own.
      OPAQUE: runs code that cannot be seen, so that its operations cannot be counted.
    """

    ELEMENTWISE = enum.auto()
    CONSTANT = enum.auto()
    LINEAR = enum.auto()
    BILINEAR = enum.auto()
    CONTRACTION = enum.auto()
    VIEW = enum.auto()
    MOVES = enum.auto()
    JOINS = enum.auto()
    RELOCATES = enum.auto()
    CHECKPOINT = enum.auto()
    CUSTOM_RULE = enum.auto()
    OPAQUE = enum.auto()


_NONE = Trait(0)
_MOVE = Trait.VIEW | Trait.MOVES | Trait.LINEAR

# Each name stands in one row, with all of its traits. Names of older and newer versions of JAX side by side.
_ROWS: tuple[tuple[Trait, str], ...] = (
    (
        Trait.ELEMENTWISE,
        "abs acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt clamp cos cosh digamma div erf"
        " erf_inv erfc exp exp2 expm1 igamma igamma_grad_a igammac integer_pow lgamma log log1p logistic max"
        " min polygamma pow random_gamma_grad regularized_incomplete_beta rem rsqrt sin sinh sqrt square tan"
        " tanh zeta",
    ),
    (
        Trait.ELEMENTWISE | Trait.CONSTANT,
        "and ceil eq floor ge gt is_finite le lt ne nextafter not or population_count round shift_left"
        " shift_right_arithmetic shift_right_logical sign xor",
    ),
    (Trait.ELEMENTWISE | Trait.LINEAR, "complex conj imag real"),
    (Trait.ELEMENTWISE | Trait.LINEAR | Trait.JOINS, "add add_any sub"),
    (Trait.ELEMENTWISE | Trait.LINEAR | Trait.VIEW, "convert_element_type copy copy_p neg reduce_precision"),
    (Trait.ELEMENTWISE | Trait.CONSTANT | Trait.VIEW, "stop_gradient"),
    (Trait.ELEMENTWISE | _MOVE, "select_n"),
    (Trait.ELEMENTWISE | Trait.BILINEAR, "mul"),
    (
        Trait.BILINEAR | Trait.CONTRACTION,
        "conv_general_dilated dot_general ragged_dot ragged_dot_general",
    ),
    (
        Trait.LINEAR | Trait.VIEW,
        "device_put name optimization_barrier pbroadcast pcast pvary reshard sharding_constraint",
    ),
    (
        _MOVE,
        "all_gather all_gather_invariant broadcast_in_dim dynamic_slice dynamic_update_slice expand_dims"
        " gather pad reshape rev slice split squeeze transpose",
    ),
    (_MOVE | Trait.JOINS, "concatenate"),
    (
        Trait.LINEAR,
        "all_to_all cumsum ppermute psum psum2 psum_invariant psum_scatter reduce_scatter reduce_sum"
        " reduce_window_sum",
    ),
    (Trait.LINEAR | Trait.RELOCATES, "scatter-add scatter_add scatter-sub scatter_sub"),
    (
        Trait.RELOCATES,
        "scatter scatter-max scatter_max scatter-min scatter_min scatter-mul scatter_mul sort",
    ),
    (Trait.CHECKPOINT, "checkpoint remat remat2"),
    (Trait.CUSTOM_RULE, "custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr"),
    (Trait.OPAQUE, "custom_call ffi_call io_callback pallas_call pure_callback"),
)

TRAITS: dict[str, Trait] = {name: traits for traits, names in _ROWS for name in names.split()}
"""Traits by the name of a primitive; one that is not in it has none."""


def traits(eqn: tracing.Equation) -> Trait:
    """Return the traits of an equation's primitive."""
    return TRAITS.get(eqn.primitive.name, _NONE)


def has(eqn: tracing.Equation, trait: Trait) -> bool:
    """Whether an equation's primitive has a trait, or one of several joined by ``|``."""
    return bool(traits(eqn) & trait)


def may_multiply(eqn: tracing.Equation) -> bool:
    """Whether the gradient of one operand of an equation may be computed with the values of another.

    A contraction does that, and nothing else in the table but elementwise operations, for which the answer
    is False: they mix single entries and are no products of matrices. For an equation with bodies it is
    True if it is for any equation in them. Any other is differentiated, to see which operands a cotangent
    reaches, and by which values.
    """
    if not any(map(tracing.is_inexact, eqn.outvars)):
        return False  # no cotangent ever arrives
    inner = list(tracing.bodies(eqn))
    if inner:
        return any(may_multiply(other) for body in inner for other in body.eqns)
    if has(eqn, Trait.CONTRACTION):
        return True
    if has(eqn, Trait.ELEMENTWISE | Trait.CONSTANT | Trait.LINEAR | Trait.RELOCATES):
        return False
    operands = [i for i, x in enumerate(eqn.invars) if tracing.is_inexact(x) and tracing.shape(x) != ()]
    return len(operands) > 1 and _derivative_multiplies(eqn, operands)


def _derivative_multiplies(eqn: tracing.Equation, operands: list[int]) -> bool:
    """Differentiate an equation: whether a cotangent of one operand is computed with the value of another."""
    try:
        backward = differentiated(eqn)
    except Exception:  # it has no derivative, or needs a context that is not here
        return True
    values, cotangents = backward.invars[: len(eqn.invars)], backward.invars[len(eqn.invars) :]
    sent = backward.replace(outvars=backward.outvars[len(eqn.outvars) :])
    place = {i: n for n, i in enumerate(i for i, x in enumerate(eqn.invars) if tracing.is_inexact(x))}
    arrives = tracing.depends(sent, cotangents)
    for other in operands:
        needs = tracing.depends(sent, [values[other]])
        if any(arrives[place[i]] and needs[place[i]] for i in operands if i != other):
            return True
    return False


def differentiated(eqn: tracing.Equation) -> tracing.Equations:
    """Return the program of an equation and its backward pass.

    It takes the operands and one cotangent for each result, and returns the results and the cotangents of
    the operands that have a floating-point dtype.
    """
    float_in, float_out = ([tracing.is_inexact(x) for x in atoms] for atoms in (eqn.invars, eqn.outvars))

    def program(operands: list[jax.Array], cotangents: list[jax.Array]) -> list[jax.Array]:
        def call(*inexact: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
            given = iter(inexact)
            results = tracing.apply(eqn, [next(given) if f else x for f, x in zip(float_in, operands)])
            return [r for r, f in zip(results, float_out) if f], results

        _, pull, results = jax.vjp(call, *(x for x, f in zip(operands, float_in) if f), has_aux=True)
        return [*results, *pull([c for c, f in zip(cotangents, float_out) if f])]

    operands, results = ([tracing.abstract(atom) for atom in atoms] for atoms in (eqn.invars, eqn.outvars))
    jaxpr, _ = tracing.retrace(program, operands, results)
    return jaxpr
