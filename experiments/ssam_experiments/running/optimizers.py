"""The optimizers of a run: mask rules, schedules, and the chain they go into."""

import re
from typing import Any, NamedTuple

import jax
import optax

import ssam_jax
from ssam_experiments.config import Config


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
    config: Config, steps_per_epoch: int, chosen: Chosen, seed: Any
) -> optax.GradientTransformationExtraArgs:
    """Return the base optimizer with, unless the method is plain, `ssam` in front."""
    schedule = make_schedule(config, steps_per_epoch)

    def lr(count: jax.Array) -> Any:
        return chosen.lr * schedule(count)

    base = {
        "sgd": lambda: (
            optax.add_decayed_weights(chosen.weight_decay),
            optax.sgd(lr, momentum=config.momentum),
        ),
        "adam": lambda: (optax.add_decayed_weights(chosen.weight_decay), optax.adam(lr)),
        "adamw": lambda: (optax.adamw(lr, weight_decay=chosen.weight_decay),),
    }[config.optimizer]()
    if config.method == "plain":
        return optax.chain(*base)
    rule = make_rule(config, steps_per_epoch, seed)
    ssam = ssam_jax.ssam(chosen.rho, rule, normalize=config.normalize, adaptive=config.adaptive)
    return optax.chain(ssam, *base)
