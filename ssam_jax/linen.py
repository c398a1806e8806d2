"""Flax Linen: a train state that takes SAM's step, and gives it what the two passes need."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.core.scope import in_filter, union_filters
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

import ssam_jax
from ssam_jax._base import checks
from ssam_jax.two_pass.active import Active
from ssam_jax.typing import GradFn, Gradients, Mask, Params


class Passes(NamedTuple):
    """What `TrainState.value_and_grad` returns; all but ``grad_fn`` come from the clean pass.

    Attributes:
      value: the loss, a floating-point scalar.
      aux: the second value that ``loss_fn`` returned.
      grads: the ascent gradient, shaped like the parameters.
      grad_fn: ``grad_fn(params, i)``, the gradient of the same batch elsewhere, with the same dropout.
      batch_stats: the new batch statistics, or None.
      variables: the new collections of ``TrainState.variables``, or None.
    """

    value: jax.Array
    aux: Any
    grads: Gradients
    grad_fn: GradFn
    batch_stats: Any
    variables: Any


def _nothing() -> None:
    """Return None, the default of a field that is no attribute of its class."""


class TrainState(train_state.TrainState):
    """Flax's ``TrainState`` with collections, a dropout key, and ``grad_fn`` for `ssam`.

    A training step reads::

        @jax.jit
        def train_step(state, images, labels):
            def loss_fn(apply, images, labels):
                logits = apply(images, train=True)
                return cross_entropy(logits, labels), logits

            passes = state.value_and_grad(loss_fn, images, labels)
            state = state.apply_gradients(
                grads=passes.grads, grad_fn=passes.grad_fn, batch_stats=passes.batch_stats
            )
            return state, passes.value

    ``apply(*inputs, **kwargs)`` is the model's ``apply`` with its variables and its dropout key. It takes and
    returns what that does: the output, or with ``mutable`` or ``capture_intermediates`` a pair of it and the
    collections asked for. Where a loss calls it more than once, each call starts from
    the collections that the last one left, and drops other units. The key of the first is
    ``fold_in(dropout_key, step)``; keys for other streams go into ``rngs``.

    Collections, loss and aux are those of the clean pass; both passes drop the same units, and
    the next step others. The ascent gradient of a part of the batch takes a second call, of which only
    ``grad_fn`` is used::

        passes = state.value_and_grad(loss_fn, images[:32], labels[:32])
        grad_fn = state.value_and_grad(loss_fn, images, labels).grad_fn

    It is subclassed as Flax's is, with fields that have a default or none::

        class WithMetrics(TrainState):
            metrics: Metrics

    Attributes:
      batch_stats: the collection of that name, or None if the model has none.
      dropout_key: the key from which each step's is folded, or None for a model without dropout.
      variables: the model's other collections by name, such as a codebook, or None. A pass may change them.

    >>> import flax.linen as nn, jax.numpy as jnp
    >>> model = nn.Dense(1)
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    >>> tx = optax.chain(ssam_jax.ssam(rho=0.1), optax.sgd(0.1))
    >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    >>> passes = state.value_and_grad(lambda apply, x: (jnp.sum(apply(x) ** 2), None), jnp.ones((1, 2)))
    >>> int(state.apply_gradients(grads=passes.grads, grad_fn=passes.grad_fn).step)
    1
    """

    # By keyword alone, and without a value in the class, so that fields of a subclass, these among them, may
    # have no default.
    batch_stats: Any = struct.field(default_factory=_nothing, kw_only=True)
    dropout_key: jax.Array | None = struct.field(default_factory=_nothing, kw_only=True)
    variables: Any = struct.field(default_factory=_nothing, kw_only=True)

    @property
    def eval_params(self) -> Params:
        """The parameters ``w``, to evaluate and save with: `ssam_jax.eval_params` of this state."""
        return ssam_jax.eval_params(self.opt_state, self.params)

    def apply_gradients(self, *, grads: Gradients, **kwargs: Any) -> Self:
        """Return the state after a step.

        Args:
          grads: the (ascent) gradient, shaped like ``params``.
          **kwargs: ``grad_fn`` goes to the transformation; None means a step without the ascent. The
            others are fields to replace, such as ``batch_stats`` and ``variables``.

        Raises:
          TypeError: there is a `ssam` in the transformation and no ``grad_fn``.
        """
        extra = {"grad_fn": self._optimized(kwargs.pop("grad_fn"))} if "grad_fn" in kwargs else {}
        update = functools.partial(optax.with_extra_args_support(self.tx).update, **extra)
        told = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        step = super(TrainState, told).apply_gradients
        return step(grads=grads, **{"tx": self.tx, **kwargs})  # type: ignore[no-untyped-call]

    def _optimized(self, grad_fn: GradFn | None) -> GradFn | None:
        """Return ``grad_fn`` of the parameters that the transformation sees: not those Flax overwrites."""
        if grad_fn is None or not _overwrites(self.params):
            return grad_fn
        return lambda params, i: grad_fn({**self.params, "params": params}, i)["params"]

    def pure_loss(self, loss_fn: Callable[..., Any]) -> Callable[..., tuple[Any, tuple[Any, Any]]]:
        """Return ``fn(params, *args, **kwargs) -> (loss, (collections, aux))``, to differentiate.

        Args:
          loss_fn: ``loss_fn(apply, *args, **kwargs)`` returns ``(loss, aux)``.

        Returns:
          A function that raises TypeError if ``loss_fn`` returns no pair. Its ``collections`` are a dict of
          ``batch_stats`` and those in ``variables``, as the loss left them.

        Raises:
          TypeError: ``loss_fn`` is not callable, or ``dropout_key`` is not a single key.
          ValueError: ``variables`` is not a dict of other collections.
        """
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of (apply, *args), got {loss_fn!r}.")
        _check_dropout_key(self.dropout_key)
        _check_variables(self.variables)

        def pure(params: Params, /, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, Any]]:
            calls, held = 0, {**(self.variables or {})}
            if self.batch_stats is not None:
                held["batch_stats"] = self.batch_stats

            def apply(*inputs: Any, **kwargs: Any) -> Any:
                nonlocal calls
                if self.dropout_key is not None:
                    key = jax.random.fold_in(self.dropout_key, self.step)
                    key = jax.random.fold_in(key, calls) if calls else key
                    kwargs["rngs"] = {"dropout": key, **_streams(kwargs.get("rngs"))}
                calls += 1
                if not held:
                    return self.apply_fn(_variables(params), *inputs, **kwargs)
                asked, captures = kwargs.get("mutable", False), bool(kwargs.get("capture_intermediates"))
                kwargs["mutable"] = union_filters(asked, list(held))
                output, new = self.apply_fn({**_variables(params), **held}, *inputs, **kwargs)
                held.update((name, new[name]) for name in held if name in new)
                if asked is False and not captures:
                    return output
                asked = union_filters(asked, ["intermediates"] if captures else [])
                return output, {name: found for name, found in new.items() if in_filter(asked, name)}

            loss, aux = checks.loss_and_aux(loss_fn(apply, *args, **kwargs))
            checks.loss(loss)
            return loss, (held, aux)

        return pure

    def value_and_grad(
        self,
        loss_fn: Callable[..., Any],
        *args: Any,
        active: Active | None = None,
        mask: Mask | Active | None = None,
        form: Literal["explicit", "implicit"] = "explicit",
        strict: bool = True,
        shared: bool = True,
        **kwargs: Any,
    ) -> Passes:
        """Return loss, aux, ascent gradient and new collections, and the gradient elsewhere.

        Args:
          loss_fn: ``loss_fn(apply, *args, **kwargs)`` returns ``(loss, aux)``.
          *args: the batch, and whatever else ``loss_fn`` takes.
          active: as `two_pass_value_and_grad` takes it, with ``mask``, ``form`` and ``strict``.
          mask: for the implicit form.
          form: ``"explicit"`` or ``"implicit"``.
          strict: for the implicit form.
          shared: whether the passes share what they can (`two_pass_value_and_grad`); otherwise they are
            two complete gradients.
          **kwargs: for ``loss_fn``, but for the names above.

        Raises:
          TypeError: ``loss_fn`` is not callable, does not return a pair, or its loss is not a real
            floating-point scalar; ``shared`` is not a bool; or ``dropout_key`` is not a single key.
          ValueError: ``active``, ``mask`` or ``form`` is given with ``shared=False``; ``variables`` is not a
            dict of other collections; or as `two_pass_value_and_grad` raises it.
        """
        loss = self.pure_loss(loss_fn)
        if not isinstance(shared, bool):
            raise TypeError(f"shared must be a bool, got {shared!r}.")
        checks.choice("form", form, ("explicit", "implicit"))
        grad_fn: GradFn
        if shared:
            two_pass = ssam_jax.two_pass_value_and_grad(loss, has_aux=True, form=form, strict=strict)
            (value, rest), grads, grad_fn = two_pass(self.params, *args, active=active, mask=mask, **kwargs)
        elif active is None and mask is None and form == "explicit":
            whole = jax.value_and_grad(loss, has_aux=True)
            (value, rest), grads = whole(self.params, *args, **kwargs)

            def grad_fn(params: Params, step: int, /) -> Gradients:
                return whole(params, *args, **kwargs)[1]
        else:
            raise ValueError(
                "active, mask and form='implicit' need shared=True: without it both gradients are exact"
                f" and complete. Got active={active!r}, form={form!r}, {'no' if mask is None else 'a'} mask."
            )
        held, aux = rest
        batch_stats = held.pop("batch_stats", None)
        return Passes(value, aux, grads, grad_fn, batch_stats, None if self.variables is None else held)


def _variables(params: Params) -> dict[str, Any]:
    """Return the collections that a state holds as its parameters."""
    return {**params} if _overwrites(params) else {"params": params}


def _overwrites(params: Params) -> bool:
    """Whether Flax keeps parameters beside some that it overwrites with their gradient (fp8)."""
    return isinstance(params, Mapping) and OVERWRITE_WITH_GRADIENT in params


def _streams(rngs: Any) -> Mapping[str, Any]:
    """Return ``rngs`` as Flax's ``apply`` understands it: a single key is that of the stream "params"."""
    return {} if rngs is None else rngs if isinstance(rngs, Mapping) else {"params": rngs}


def _check_variables(variables: Any) -> None:
    """Raise ValueError unless ``variables`` is None or a dict of collections without a field of their own."""
    if not isinstance(variables, Mapping | None) or {"params", "batch_stats"} & {*(variables or {})}:
        found = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            "variables must be None or a dict of the model's other collections by name; parameters and batch"
            f" statistics go into the fields params and batch_stats. Got {found}."
        )


def _check_dropout_key(key: Any) -> None:
    """Raise TypeError unless ``key`` is None or one PRNG key, typed or of the old kind."""
    dtype, rank = getattr(key, "dtype", None), len(getattr(key, "shape", ()))
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (key is None or (typed and rank == 0) or (dtype == jnp.uint32 and rank == 1)):
        found = f"{dtype} of shape {key.shape}" if dtype is not None else repr(key)
        raise TypeError(f"dropout_key must be None or one key, such as jax.random.key(seed), got {found}.")
