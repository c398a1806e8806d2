"""The optimizers of a run: mask rules, schedules, and the chain they go into."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import ssam_jax
from ssam_experiments.config import Config
from ssam_experiments.running import layerwise
from ssam_jax import directions, radii


class Chosen(NamedTuple):
    """What is tuned: traced, so that another choice compiles nothing. Scalars, float32."""

    lr: Any
    weight_decay: Any
    rho: Any


def make_pattern(config: Config) -> ssam_jax.Pattern:
    """Return the pattern of a run's masks."""
    if config.pattern == "n:m":
        return ssam_jax.NM(config.n, config.m, indivisible="whole")  # 4 does not divide a head of 10 classes
    if config.pattern == "structured":
        return ssam_jax.Structured(config.sparsity, config.unit)
    return ssam_jax.Unstructured(config.sparsity)


def check_paths(config: Config, params: Any) -> None:
    """Raise ValueError, with some paths, if ``--perturb`` names no parameter."""
    if config.method != "ssam-fixed":
        return
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    if not any(re.search(config.perturb, path) for path in paths):
        some = ", ".join(paths[:3] + paths[3:][-2:])
        raise ValueError(
            f"--perturb {config.perturb!r} matches none of the {len(paths)} parameters; some of them: {some}."
        )


def make_rule(config: Config, steps_per_epoch: int, seed: Any) -> ssam_jax.MaskRule | None:
    """Return the mask rule of a run, None for a dense perturbation. The seed may be traced."""
    every = config.refresh_epochs * steps_per_epoch
    if config.method == "ssam-f":
        inside = every if config.fisher == "running" else None  # per-example scores come by set_mask
        return ssam_jax.fisher_mask(make_pattern(config), refresh_every=inside, seed=seed)
    if config.method == "ssam-d":
        return ssam_jax.dynamic_mask(
            make_pattern(config),
            refresh_every=every,
            drop_fraction=config.drop_fraction,
            total_steps=config.epochs * steps_per_epoch,
            drop=config.drop,
            grow=config.grow,
            seed=seed,
        )
    if config.method == "ssam-fixed":
        return ssam_jax.fixed_mask(lambda path: re.search(config.perturb, path) is not None)
    return None


def make_direction(config: Config, seed: Any) -> optax.GradientTransformation | None:
    """Return which way is up, None for the gradient."""
    makers: dict[str, Callable[[], optax.GradientTransformation | None]] = {
        "gradient": lambda: None,
        "momentum": directions.base_momentum,
        "against-momentum": lambda: optax.chain(directions.base_momentum(), optax.scale(-1.0)),
        "ema": lambda: optax.ema(config.direction_decay, debias=False),
        "friendly": lambda: directions.friendly(decay=config.direction_decay),
        "zscore": lambda: directions.zscore(1.0),
        "sign": optax.scale_by_sign,
        "noise": lambda: directions.noise(seed),
        "layerwise": layerwise.direction,
    }
    return makers[config.direction]()


def make_combine(config: Config) -> ssam_jax.Combine | None:
    """Return what a step makes of its two gradients, None for the perturbed one."""
    if config.combine == "perturbed":
        return None
    made = getattr(ssam_jax.combine, config.combine)(config.combine_weight)
    # Steps without ascent have no grad_fn, and rho, which is traced here, is above 0.
    return made._replace(needs_skips=False)


def make_radius(config: Config, steps_per_epoch: int, rho: Any) -> Any:
    """Return the radius of the steps that perturb."""
    if config.direction == "layerwise":
        return layerwise.radius(rho)
    if config.ascent_gate:
        return radii.adaptive_gate(rho, config.epochs * steps_per_epoch)
    return rho


def make_schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate's schedule, as a factor from 0 to 1."""
    steps, warmup = config.epochs * steps_per_epoch, round(config.warmup * steps_per_epoch)
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(1.0, steps - warmup)
    elif config.schedule == "multi-step":
        at = {epoch * steps_per_epoch - warmup: config.decay for epoch in config.milestones}
        schedule = optax.piecewise_constant_schedule(1.0, at)
    else:
        schedule = optax.constant_schedule(1.0)
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), schedule], [warmup])


def make_optimizer(
    config: Config, steps_per_epoch: int, chosen: Chosen, seed: Any, *, tail: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Return the base optimizer with, unless the method is plain, `ssam` in front or `carried` around it.

    Args:
      config: the settings.
      steps_per_epoch: steps in an epoch.
      chosen: what is tuned.
      seed: of the first mask and of noise; it may be traced.
      tail: return what takes the steps of the last epochs of a carried run.
    """
    schedule = make_schedule(config, steps_per_epoch)

    def lr(count: jax.Array) -> Any:
        return chosen.lr * schedule(count)

    bases: dict[str, Callable[[], tuple[optax.GradientTransformation, ...]]] = {
        "sgd": lambda: (
            optax.add_decayed_weights(chosen.weight_decay),
            optax.sgd(lr, momentum=config.momentum),
        ),
        "adam": lambda: (optax.add_decayed_weights(chosen.weight_decay), optax.adam(lr)),
        "adamw": lambda: (optax.adamw(lr, weight_decay=chosen.weight_decay),),
    }
    base = bases[config.optimizer]()
    if config.method == "plain":
        return optax.chain(*base)
    factors: dict[str, Any] = {
        "mask": make_rule(config, steps_per_epoch, seed),
        "direction": make_direction(config, seed),
        "normalize": config.normalize,
        "adaptive": config.adaptive,
    }
    radius = make_radius(config, steps_per_epoch, chosen.rho)
    if config.carrier == "carried" and not tail:
        return ssam_jax.carried(optax.chain(*base), radius, **factors)
    ascent: dict[str, Any] = {"combine": make_combine(config), "ascent_steps": config.ascent_steps}
    ssam = ssam_jax.ssam(radius, **ascent, **factors)
    # In a tail the base optimizer is one link, as it is in `carried`: its state stays as it is.
    return optax.chain(ssam, optax.chain(*base)) if tail else optax.chain(ssam, *base)
