"""Time a training step of SSAM against ``optax.contrib.sam`` and SGD on a small ResNet.

Run ``python benchmarks/step.py``; ``--help`` lists the sizes. Refreshes are outside the timed steps;
the last rows time one step with a refresh.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax
import tyro
from timing import medians, print_setting, print_table

import ssam_jax
from ssam_jax import NM, Structured, Unstructured, dynamic_mask, fisher_mask


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the comparison."""

    width: int = 16
    """Channels of the first stage; the two after it have twice and four times as many."""
    batch: int = 32
    """Images of 32 x 32 x 3 in a step."""
    repeats: int = 11
    """Timed steps of each candidate; the median counts."""


class ResNet(nn.Module):
    """Three stages of one residual block each, GroupNorm, global pooling."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits (batch, 10) of images (batch, height, width, 3)."""
        for stage in range(3):
            channels = self.width * 2**stage
            stride = 1 if stage == 0 else 2
            skip = nn.Conv(channels, (1, 1), stride, use_bias=False)(x)
            x = nn.relu(nn.GroupNorm(8)(nn.Conv(channels, (3, 3), stride, use_bias=False)(x)))
            x = nn.relu(nn.GroupNorm(8)(nn.Conv(channels, (3, 3), use_bias=False)(x)) + skip)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def contrib_sam(rho: float, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    return optax.contrib.sam(optimizer, adversary, opaque_mode=True)


def stepper(
    tx: optax.GradientTransformationExtraArgs, loss: Callable[..., jax.Array], params: Any, *, ascend: bool
) -> Callable[[], Any]:
    """Return a function that takes one compiled step from the same place every time."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def grad_fn(p: Any, i: int) -> Any:
            del i
            return jax.grad(loss)(p)

        extra = {"grad_fn": grad_fn} if ascend else {}
        updates, state = tx.update(grad_fn(params, 0), state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    return lambda: step(params, state)


def main(config: Config) -> None:
    """Print the table."""
    model = ResNet(config.width)
    images = jax.random.normal(jax.random.key(0), (config.batch, 32, 32, 3))
    labels = jax.random.randint(jax.random.key(1), (config.batch,), 0, 10)
    params = model.init(jax.random.key(2), images)

    def loss(p: Any) -> jax.Array:
        logits = model.apply(p, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def optimizer() -> optax.GradientTransformation:
        return optax.sgd(0.1, momentum=0.9)

    rare = 10**6  # a refresh that no timed step reaches
    rules = {
        "ssam, dense": None,
        "ssam, Fisher 50 %": fisher_mask(Unstructured(0.5), refresh_every=rare),
        "ssam, dynamic 50 %": dynamic_mask(Unstructured(0.5), refresh_every=rare, total_steps=rare),
        "ssam, Fisher 2:4": fisher_mask(NM(2, 4, indivisible="whole"), refresh_every=rare),
        "ssam, Fisher by tensor": fisher_mask(Structured(0.5), refresh_every=rare),
        "ssam, Fisher 50 %, with a refresh": fisher_mask(Unstructured(0.5), refresh_every=1),
        "ssam, dynamic 50 %, with a refresh": dynamic_mask(
            Unstructured(0.5), refresh_every=1, total_steps=rare
        ),
        "ssam, Fisher 2:4, with a refresh": fisher_mask(NM(2, 4, indivisible="whole"), refresh_every=1),
    }
    candidates = {
        "optax.contrib.sam": stepper(contrib_sam(0.1, optimizer()), loss, params, ascend=True),
        "SGD": stepper(optimizer(), loss, params, ascend=False),
    }
    for name, rule in rules.items():
        tx = optax.chain(ssam_jax.ssam(0.1, rule), optimizer())
        candidates[name] = stepper(tx, loss, params, ascend=True)
    count = sum(p.size for p in jax.tree.leaves(params))
    print(f"A step on {config.batch} images, ResNet of {count:,} parameters\n")
    print_table(medians(candidates, config.repeats), "optax.contrib.sam")


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__)
    print_setting()
    main(chosen)
