"""Flax NNX: both passes of SAM for a model that is updated in place."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from flax.nnx import filterlib

import ssam_jax
from ssam_jax._base import checks, trees
from ssam_jax.two_pass.active import Active
from ssam_jax.two_pass.passes import GradFn
from ssam_jax.typing import Form, Gradients, Mask, Params, PyTree, TwoPassGradFn

T = TypeVar("T", bound=nnx.Module)


def two_pass_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    wrt: filterlib.Filter = nnx.Param,
    form: Form = "explicit",
    strict: bool = True,
) -> Callable[..., tuple[Any, nnx.State, TwoPassGradFn]]:
    """Return a function that computes what a step of `ssam` needs, as ``nnx.value_and_grad`` does SGD's.

    A training step reads::

        @nnx.jit
        def train_step(model, optimizer, images, labels):
            loss, grads, grad_fn = two_pass_value_and_grad(loss_fn)(model, images, labels)
            optimizer.update(model, grads, grad_fn=grad_fn)
            return loss

    with ``optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)``, and before Flax 0.11 `Optimizer` in its
    place. Batch statistics and all other variables, of the model and of modules among the arguments
    (``nnx.Rngs``, metrics), are updated in place, by the clean pass alone. Both passes use the same
    dropout keys, and the next step others.

    The ascent gradient of a part of the batch takes a second call. Make it on a copy, so that
    statistics are updated, and keys used, once::

        copy = nnx.clone(model)
        loss, grads, _ = two_pass(model, images[:32], labels[:32])
        _, _, grad_fn = two_pass(copy, images, labels)

    Args:
      loss_fn: ``loss_fn(model, *args, **kwargs)`` returns a scalar, or ``(scalar, aux)`` with ``has_aux``,
        where aux is a pytree of arrays. It may not add variables to the model, or take any away; and what
        it assigns to those of ``wrt`` is lost.
      has_aux: whether ``loss_fn`` returns a pair.
      wrt: a filter of the variables to differentiate, the optimizer's.
      form: as in `ssam_jax.two_pass_value_and_grad`, with ``strict``.
      strict: for the implicit form.

    Returns:
      ``f(model, *args, active=None, mask=None, **kwargs) -> (value, grads, grad_fn)``, with ``active`` from
      ``active_leaves(optimizer.opt_state)``, for the implicit form ``mask`` from
      ``get_mask(optimizer.opt_state)``, and ``grads`` an ``nnx.State`` like that of ``nnx.grad``. It raises
      what `ssam_jax.two_pass_value_and_grad` does, and ValueError if ``wrt`` selects no variable, or if
      ``loss_fn`` adds one.

    Raises:
      TypeError: ``loss_fn`` is not callable, ``has_aux`` or ``strict`` is not a bool, or ``wrt`` no filter.
      ValueError: ``form`` is neither of the two.

    >>> import jax.numpy as jnp
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> f = two_pass_value_and_grad(lambda model, x: jnp.sum(model(x)))
    >>> loss, grads, grad_fn = f(model, jnp.ones((3, 2)))
    >>> nnx.to_pure_dict(grads)["bias"]
    Array([3.], dtype=float32)
    """
    ssam_jax.two_pass_value_and_grad(loss_fn, has_aux=has_aux, form=form, strict=strict)  # checks them
    selects = _predicate(wrt)

    def of_model(path: tuple[Any, ...], variable: Any) -> bool:
        return path[0] == 0 and selects(path[1:], variable)

    def split(nodes: tuple[Any, ...]) -> Any:
        return nnx.split(nodes, of_model, nnx.Variable, ...)

    def two_pass(
        model: Any,
        /,
        *args: PyTree,
        active: Active | None = None,
        mask: Mask | Active | None = None,
        **kwargs: PyTree,
    ) -> tuple[Any, nnx.State, TwoPassGradFn]:
        nodes = (model, args, kwargs)
        graph, selected, state, arrays = split(nodes)
        if 0 not in selected:
            raise ValueError(
                f"wrt must select variables of the model, got {wrt!r}, which selects none of this"
                f" {type(model).__name__}; for all parameters it is nnx.Param."
            )
        params = selected[0]
        values = jax.tree.leaves(state)  # now: the variables themselves are updated below

        def pure(params: Params, values: list[Any], arrays: Any) -> tuple[Any, tuple[Any, Any]]:
            nodes = nnx.merge(graph, _filled(selected, params), _filled(state, values), arrays)
            model, args, kwargs = nodes
            value = loss_fn(model, *args, **kwargs)
            loss, aux = checks.loss_and_aux(value) if has_aux else (value, None)
            new = split(nodes)[2]
            _check_same_variables(new, state)
            return loss, (new, aux)

        def without_state(value: tuple[PyTree, tuple[PyTree, PyTree]]) -> PyTree:
            loss, (_, aux) = value
            return (loss, aux) if has_aux else loss

        def value_and_grad(point: Params, step: int) -> tuple[PyTree, Gradients]:
            value, grads = inner.value_and_grad(_filled(params, point), step)
            return without_state(value), _filled(point, grads)

        def ascent(point: Params, step: int) -> Gradients:
            return _filled(point, inner.ascent(_filled(params, point), step))

        masks = None if mask is None else tuple(_arrays(mask))
        shared = ssam_jax.two_pass_value_and_grad(pure, has_aux=True, form=form, strict=strict)
        value, grads, inner = shared(params, values, arrays, active=active, mask=masks)
        nnx.update(nodes, value[1][0])
        return without_state(value), grads, GradFn(value_and_grad, ascent, inner.partial, inner.form)

    return two_pass


class Optimizer(nnx.Optimizer):
    """``nnx.Optimizer`` with the ``update`` of Flax 0.11 in every version; from then on the same."""

    def update(self, model: Any, grads: Gradients, /, **extra_args: Any) -> Any:
        """Take a step, in place.

        Args:
          model: the one that the optimizer was made with.
          grads: the (ascent) gradient, as `two_pass_value_and_grad` or ``nnx.grad`` returns it.
          **extra_args: go to the transformation, such as ``grad_fn``; None means a step without the ascent.
        """
        args = (grads,) if _KEEPS_MODEL else (model, grads)
        return super().update(*args, **extra_args)


_KEEPS_MODEL = "model" not in inspect.signature(nnx.Optimizer.update).parameters


def eval_model(model: T, optimizer: nnx.Optimizer) -> T:
    """Return a copy of a model with the parameters ``w``, to evaluate and save with.

    Args:
      model: the one that the optimizer trains. Under `carried`, and between the calls of an `alternating`
        round, its parameters are ``w + eps``.
      optimizer: an ``nnx.Optimizer``.

    Returns:
      A copy of the model, which shares no variable with it.

    Raises:
      TypeError: ``optimizer`` is not an ``nnx.Optimizer``.
    """
    state = _arrays_of(optimizer, "ssam_jax.eval_params")
    copy = nnx.clone(model)
    params = nnx.state(copy, optimizer.wrt)
    nnx.update(copy, _filled(params, ssam_jax.eval_params(state, _arrays(params))))
    return copy


def set_mask(optimizer: nnx.Optimizer, mask: Mask) -> None:
    """Replace the mask of an optimizer's `ssam` in place, between steps or under ``nnx.jit``.

    Args:
      optimizer: its mask can be read with ``get_mask(optimizer.opt_state)``.
      mask: as for `ssam_jax.set_mask`, such as ``pattern(scores)``; boxed or plain arrays.

    Raises:
      TypeError: a leaf of the mask is not bool, or ``optimizer`` is no ``nnx.Optimizer``.
      ValueError: the mask does not fit the present one, or there is none to replace.
    """
    state = _arrays_of(optimizer, "ssam_jax.set_mask")
    boxes = jax.tree.leaves(optimizer.opt_state, is_leaf=_is_variable)
    old = ssam_jax.get_mask(state)
    fits = len(jax.tree.leaves(old)) == len(_arrays(mask))
    new = ssam_jax.set_mask(state, _filled(old, mask) if fits else mask)
    for box, array in zip(boxes, jax.tree.leaves(new)):
        nnx.update(box, array)


def _arrays_of(optimizer: nnx.Optimizer, other: str) -> PyTree:
    """Return the state of an optimizer as arrays, or raise unless it is one of NNX."""
    if not hasattr(optimizer, "opt_state"):
        raise TypeError(
            f"optimizer must be an nnx.Optimizer, which holds its state, got {type(optimizer).__name__}; for"
            f" the state of an optimizer there is {other}."
        )
    return jax.tree.map(_array, optimizer.opt_state, is_leaf=_is_variable)


def _predicate(wrt: filterlib.Filter) -> Callable[..., bool]:
    try:
        return filterlib.to_predicate(wrt)
    except (TypeError, ValueError) as error:
        raise TypeError(f"wrt must be one of Flax's filters, such as nnx.Param, got {wrt!r}.") from error


def _check_same_variables(new: Any, old: Any) -> None:
    changed = sorted({*trees.leaf_paths(new)} ^ {*trees.leaf_paths(old)})
    if changed:
        raise ValueError(
            f"loss_fn must leave the model the variables that it has, but {', '.join(changed)} came or went."
            " Take what a layer sows with nnx.pop(model, nnx.Intermediate) in loss_fn, and return it as aux."
        )


def _filled(like: Any, tree: Any) -> Any:
    """Return the arrays of ``tree`` in the structure of ``like``.

    Transformations see plain arrays or boxes of Flax's, by its version; their order is the same.
    """
    structure: Any = jax.tree.structure(like)
    arrays = _arrays(tree)
    if len(arrays) != structure.num_leaves:
        raise ValueError(
            f"a tree of arrays must have the {structure.num_leaves} leaves of the selected variables, got one"
            f" of {len(arrays)}: {jax.tree.structure(tree)}."
        )
    return jax.tree.unflatten(structure, arrays)


def _arrays(tree: Any) -> list[Any]:
    return list(map(_array, jax.tree.leaves(tree, is_leaf=_is_variable)))


def _array(leaf: Any) -> Any:
    return leaf[...] if _is_variable(leaf) else leaf


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)
