"""The compiled functions of a run: init, step, mask refresh, evaluation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ssam_jax
import ssam_jax.linen
from ssam_experiments.config import Config
from ssam_experiments.data.feeds import Feed
from ssam_experiments.running import placement
from ssam_experiments.running.optimizers import Chosen, check_paths, make_optimizer, make_pattern

FISHER_CHUNK = 32  # examples whose gradients are held at once
SHARPNESS_BATCH = 256


class Totals(NamedTuple):
    """Sums over examples, float32 scalars: of the loss in nats, of right answers, of examples."""

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array


class Programs(NamedTuple):
    """What a run calls. A state is a `ssam_jax.linen.TrainState`.

    Attributes:
      init: ``init(seed) -> state``.
      no_totals: ``no_totals() -> totals``: sums over nothing.
      step: ``step(state, totals, chosen, source, ascent=..., active=...) -> (state, totals)``; the last
        two are static: whether this step perturbs, and what `active_leaves` returned (or None).
      refresh: ``refresh(state, source) -> state`` with a mask from per-example Fisher information.
      evaluate: ``evaluate(state, images, labels, weights) -> Totals``.
      rise: ``rise(state, images, labels, rho) -> (loss here, loss at rho along its gradient)``.
    """

    init: Callable[..., Any]
    no_totals: Callable[[], Totals]
    step: jax.stages.Wrapped
    refresh: Callable[..., Any]
    evaluate: Callable[..., Totals]
    rise: Callable[..., Any]


def augmentation_key(state: Any) -> jax.Array:
    """Return a key for the step's augmentation, of another family than the dropout keys of all steps."""
    return jax.random.fold_in(jax.random.fold_in(state.dropout_key, 2**31 - 1), state.step)


def uncarried(state: Any) -> Any:
    """Return the state of a carried run as one of `ssam` in front of the same base optimizer, at ``w``."""
    at = state.opt_state
    return state.replace(params=at.center, opt_state=(at.ssam, at.opt_state))


def carried_at_rest(state: Any) -> Any:
    """Return the state of `uncarried` as that of a carried run again, with nothing added to ``w``."""
    center = jax.tree.map(jnp.copy, state.params)  # of its own: parameters and state are donated together
    return state.replace(opt_state=ssam_jax.CarriedState(center, *state.opt_state))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the loss of each example, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_programs(config: Config, model: nn.Module, feed: Feed) -> Programs:
    """Return the compiled functions of runs that differ in seed, rho, learning rate and weight decay.

    Args:
      config: the settings; seed, rho, lr and weight_decay are not read.
      model: ``model.apply(variables, images, train=...) -> logits``.
      feed: where the batches come from.
    """
    spread = functools.partial(placement.spread, devices=config.devices)
    untuned = Chosen(*(np.float32(0),) * 3)  # for what reads none of them
    at_rest = make_optimizer(config, feed.steps_per_epoch, untuned, 0)  # a part of every state's type

    def init(seed: jax.Array) -> ssam_jax.linen.TrainState:
        key = jax.random.key(seed)
        variables = model.init(jax.random.fold_in(key, 0), jnp.zeros((1, *feed.image_shape)), train=False)
        check_paths(config, variables["params"])
        state = ssam_jax.linen.TrainState.create(  # type: ignore[no-untyped-call]
            apply_fn=model.apply,
            params=variables["params"],
            tx=make_optimizer(config, feed.steps_per_epoch, untuned, seed),
            batch_stats=variables.get("batch_stats"),
            dropout_key=jax.random.fold_in(key, 1),
        )
        return state.replace(tx=at_rest)

    def loss_fn(apply: Callable[..., jax.Array], images: jax.Array, labels: jax.Array) -> Any:
        logits = apply(images, train=True)
        return cross_entropy(logits, labels).mean(), logits

    def passes(state: Any, images: jax.Array, labels: jax.Array, active: Any) -> Any:
        mask = None
        if config.form == "implicit":
            mask, active = (ssam_jax.get_mask(state.opt_state) if active is None else active), None
        options = {"active": active, "mask": mask, "form": config.form}
        part = round(len(images) * config.ascent_fraction)
        first = state.value_and_grad(loss_fn, spread(images[:part]), spread(labels[:part]), **options)
        if part == len(images):
            return first, labels
        whole = state.value_and_grad(loss_fn, spread(images), spread(labels), **options)
        return first._replace(grad_fn=whole.grad_fn), labels[:part]

    def step(state: Any, totals: Totals, chosen: Chosen, source: Any, *, ascent: bool, active: Any) -> Any:
        images, labels = feed.fetch(augmentation_key(state), source)
        tail = ascent and config.carrier == "carried"
        state = state.replace(tx=make_optimizer(config, feed.steps_per_epoch, chosen, 0, tail=tail))
        if tail:
            state = uncarried(state)
        if ascent:
            found, labels = passes(state, images, labels, active)
        else:
            found = state.value_and_grad(loss_fn, spread(images), spread(labels))
            found = found._replace(grad_fn=None)
        state = state.apply_gradients(grads=found.grads, grad_fn=found.grad_fn, batch_stats=found.batch_stats)
        if tail:
            state = carried_at_rest(state)
        state = state.replace(tx=at_rest)
        seen = jnp.float32(len(labels))
        right = jnp.sum(jnp.argmax(found.aux, -1) == labels, dtype=jnp.float32)
        return state, jax.tree.map(jnp.add, totals, Totals(seen * found.value, right, seen))

    def apply_at_rest(params: Any, state: Any, images: jax.Array) -> jax.Array:
        variables = {"params": params}
        if state.batch_stats is not None:
            variables["batch_stats"] = state.batch_stats
        logits: Any = model.apply(variables, feed.prepare(images), train=False)  # flax's type is wider
        return logits

    def refresh(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        # Statistics are those at rest: a single example has none worth normalizing by.
        def one_loss(params: Any, example: Any) -> jax.Array:
            image, label = example
            return cross_entropy(apply_at_rest(params, state, image[None]), label[None])[0]

        scores = ssam_jax.empirical_fisher(
            one_loss, state.eval_params, (images, labels), chunk_size=min(FISHER_CHUNK, len(labels))
        )
        mask = make_pattern(config)(scores)
        return state.replace(opt_state=ssam_jax.set_mask(state.opt_state, mask))

    def evaluate(state: Any, images: jax.Array, labels: jax.Array, weights: jax.Array) -> Totals:
        logits = apply_at_rest(state.eval_params, state, spread(images))
        right = jnp.argmax(logits, -1) == labels
        loss = jnp.where(weights > 0, cross_entropy(logits, labels), 0)
        return Totals(
            jnp.sum(loss), jnp.sum(jnp.where(weights > 0, right, False), dtype=jnp.float32), jnp.sum(weights)
        )

    def rise(state: Any, images: jax.Array, labels: jax.Array, rho: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            def one(total: jax.Array, batch: Any) -> Any:
                return total + cross_entropy(apply_at_rest(params, state, batch[0]), batch[1]).mean(), None

            size = min(SHARPNESS_BATCH, len(images))
            rows = len(images) // size * size
            batches = jax.tree.map(lambda x: x[:rows].reshape(-1, size, *x.shape[1:]), (images, labels))
            return jax.lax.scan(jax.checkpoint(one), jnp.float32(0), batches)[0] / (rows // size)

        params = state.eval_params
        here, grads = jax.value_and_grad(loss)(params)
        scale = rho / jnp.maximum(optax.tree.norm(grads), 1e-12)
        return here, loss(jax.tree.map(lambda p, g: p + scale * g, params, grads))

    # Whatever is passed on lies where it is expected, or the next call would be compiled anew.
    whole = placement.replicated(config.devices)
    states: Any = whole
    if config.fsdp:
        states = jax.tree.map(lambda x: placement.split(x.shape, config.devices), jax.eval_shape(init, 0))
    everywhere = functools.partial(jax.jit, out_shardings=whole)
    return Programs(
        init=jax.jit(init, out_shardings=states),
        no_totals=everywhere(lambda: Totals(*jnp.zeros(3))),
        step=jax.jit(
            step,
            static_argnames=("ascent", "active"),
            donate_argnums=(0, 1),
            out_shardings=(states, whole),
        ),
        refresh=jax.jit(refresh, donate_argnums=0, out_shardings=states),
        evaluate=everywhere(evaluate),
        rise=everywhere(rise),
    )
