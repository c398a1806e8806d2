"""A character-level transformer on the standard library's documentation: AdamW, SAM and sparse SAM.

The parameters of all layers are stacked and the layers are one ``lax.scan`` of rematerialized blocks, so
that ``Structured(..., "channel", axis=0)`` chooses layers through the leading axis. Parameters, optimizer
state and batch are spread over all devices there are (FSDP). The same command runs on one CPU, and with
``--distributed`` once in every process of a pod slice.
"""

import dataclasses
import functools
import math
import platform
import statistics
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import ssam_jax
from ssam_experiments.corpus import CHARACTERS, Corpus, encode, read_corpus
from ssam_experiments.ranges import Rule, check_ranges
from ssam_experiments.transformer import AXIS, apply, init_params, like_params, sharded

PROMPT = "Return the "
TEMPERATURE = 0.7


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a small language model with AdamW, SAM and sparse SAM; print a table and a sample."""

    steps: int = 200
    """Training steps of each method."""
    batch: int = 16
    """Sequences in a step, a multiple of the devices."""
    context: int = 64
    """Characters of a sequence."""
    width: int = 64
    """Width of the residual stream, a multiple of the heads."""
    layers: int = 4
    """Layers of the stack."""
    heads: int = 4
    """Attention heads of a layer."""
    lr: float = 5e-3
    """Peak learning rate, reached after a tenth of the steps, of a cosine schedule down to 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay of AdamW."""
    rho: float = 0.05
    """Radius of the perturbation of SAM and sparse SAM."""
    sparsity: float = 0.5
    """Share of the parameters that the Fisher mask leaves unperturbed."""
    refresh_every: int = 25
    """Steps between two refreshes of the Fisher mask."""
    methods: tuple[Literal["adamw", "sam", "ssam"], ...] = ("adamw", "sam", "ssam")
    """Methods to train with, in turn."""
    mask: Literal["fisher", "last"] = "fisher"
    """Sparse SAM's mask: rows of every leaf (of a stacked leaf, layers) by Fisher information, or the last
    layers and the head, by two-pass gradients, which share the work before them between both passes."""
    last: int = 1
    """Layers at the end of the stack that ``--mask last`` perturbs."""
    seed: int = 0
    """Seed of the initialization, the batches, the first mask and the sample."""
    evaluation: int = 256
    """Held-out sequences to evaluate on, a multiple of the devices."""
    sample: int = 200
    """Characters to generate with the last model."""
    distributed: bool = False
    """Call ``jax.distributed.initialize()`` first: one process of many, on a pod slice or under SLURM."""


class Method(NamedTuple):
    """A row of the table: its radius, mask rule, and whether only some leaves are perturbed at all."""

    rho: float
    mask: ssam_jax.MaskRule | None = None
    some_leaves: bool = False


class Result(NamedTuple):
    """What a run found.

    Attributes:
      held_out: bits per character of the held-out sequences, after the last step.
      train: bits per character of the training batches, mean over the last tenth of the steps.
      seconds: the median time of a step.
      params: the parameters at the end.
      opt_state: the optimizer's state at the end.
    """

    held_out: float
    train: float
    seconds: float
    params: Any
    opt_state: Any


def make_methods(config: Config) -> dict[str, Method]:
    """Return the rows of the table by name. A radius of 0 is AdamW alone, at its price."""
    if config.mask == "fisher":
        pattern = ssam_jax.Structured(config.sparsity, "channel", axis=0)
        mask = ssam_jax.fisher_mask(pattern, refresh_every=config.refresh_every, seed=config.seed)
        name, sparse = f"SSAM Fisher {config.sparsity:.0%}", Method(config.rho, mask)
    else:
        chosen = np.arange(config.layers) >= config.layers - config.last
        matrices = ("attention", "attention_out", "perceptron", "perceptron_out")
        layers = dict.fromkeys(matrices, chosen[:, None, None])
        layers |= dict.fromkeys(("attention_scale", "perceptron_scale"), chosen[:, None])
        tree = {"embed": False, "layers": layers, "scale": True, "head": True}
        name = f"SSAM last {config.last}"
        sparse = Method(config.rho, ssam_jax.fixed_mask(tree), some_leaves=True)
    rows = {"adamw": ("AdamW", Method(0.0)), "sam": ("SAM", Method(config.rho)), "ssam": (name, sparse)}
    return dict(rows[method] for method in config.methods)


def windows(text: np.ndarray, config: Config, starts: np.ndarray, mesh: Mesh) -> jax.Array:
    """Return the sequences that start at given places, one character longer than the context, spread out."""
    rows = np.stack([text[start : start + config.context + 1] for start in starts])
    return jax.make_array_from_callback(
        rows.shape, NamedSharding(mesh, PartitionSpec(AXIS)), lambda index: rows[index]
    )


def train(config: Config, method: Method, corpus: Corpus, mesh: Mesh, bar: tqdm) -> Result:
    """Train and evaluate a method."""
    by_sequence, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec(AXIS), PartitionSpec()))
    place = functools.partial(jax.lax.with_sharding_constraint, shardings=by_sequence)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.lr, config.steps // 10, config.steps)
    tx = optax.chain(
        ssam_jax.ssam(method.rho, method.mask, normalize="masked" if method.some_leaves else "global"),
        optax.adamw(schedule, weight_decay=config.weight_decay),
    )

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        logits = apply(params, tokens[:, :-1], config.heads, place)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(loss) / math.log(2)

    def init(key: jax.Array) -> tuple[Any, Any]:
        params = init_params(key, config.width, config.layers, len(CHARACTERS))
        return params, tx.init(params)

    key = jax.random.key(config.seed)
    params, opt_state = jax.eval_shape(init, key)
    shardings = sharded(params, mesh)
    shardings = shardings, like_params(opt_state, params, shardings, mesh)
    params, opt_state = jax.jit(init, out_shardings=shardings)(key)
    active = ssam_jax.active_leaves(opt_state) if method.some_leaves else None
    two_pass = ssam_jax.two_pass_value_and_grad(loss_fn)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*shardings, everywhere))
    def step(params: Any, opt_state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads, grad_fn = two_pass(params, tokens, active=active)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state, loss

    rng, losses, seconds = np.random.default_rng(config.seed), [], []
    for _ in range(config.steps):
        starts = rng.integers(len(corpus.train) - config.context, size=config.batch)
        start = time.perf_counter()
        params, opt_state, loss = step(params, opt_state, windows(corpus.train, config, starts, mesh))
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
        bar.set_postfix(bits=f"{losses[-1]:.2f}", refresh=False)
        bar.update()
    starts = np.linspace(0, len(corpus.held_out) - config.context - 1, config.evaluation).astype(int)
    held_out = jax.jit(loss_fn, out_shardings=everywhere)(
        params, windows(corpus.held_out, config, starts, mesh)
    )
    recent = statistics.mean(losses[-max(1, config.steps // 10) :])
    return Result(float(held_out), recent, statistics.median(seconds), params, opt_state)


def generate(config: Config, params: Any, mesh: Mesh) -> str:
    """Continue the prompt, one character after the other, each drawn at a temperature below 1."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    prompt = encode(PROMPT)[-config.context :]
    window = np.zeros(config.context, np.int32)
    window[: prompt.size] = prompt

    @functools.partial(jax.jit, out_shardings=everywhere)
    def run(params: Any, window: jax.Array) -> jax.Array:
        def body(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> Any:
            window, length = carry
            logits = apply(params, window[None], config.heads)[0, length - 1]
            token = jax.random.categorical(key, logits / TEMPERATURE).astype(jnp.int32)
            full = length == config.context
            window = jnp.where(full, jnp.roll(window, -1), window)
            window = window.at[jnp.where(full, length - 1, length)].set(token)
            return (window, jnp.minimum(length + 1, config.context)), token

        keys = jax.random.split(jax.random.key(config.seed), config.sample)
        return jax.lax.scan(body, (window, jnp.int32(prompt.size)), keys)[1]

    tokens = np.asarray(run(params, window))
    return PROMPT + "".join(CHARACTERS[token] for token in tokens)


def mask_table(opt_state: Any, mesh: Mesh) -> str:
    """Return which layers of each stacked leaf are perturbed, and the density of each other leaf."""
    read = jax.jit(
        lambda state: (ssam_jax.get_mask(state), ssam_jax.mask_stats(state)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    mask, stats = read(opt_state)
    lines = ["| parameter | perturbed, % | layers |", "| --- | ---: | --- |"]
    for path, leaf in jax.tree_util.tree_flatten_with_path(mask)[0]:
        name = "/".join(key.key for key in path)
        rows = np.asarray(leaf).reshape(-1) if path[0].key == "layers" else ()
        layers = " ".join(str(i) for i, row in enumerate(rows) if row) or ("none" if len(rows) else "")
        lines.append(f"| {name} | {100 * float(stats.by_leaf[name]):.0f} | {layers} |")
    return "\n".join(lines)


def table(results: dict[str, Result]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| method | held-out bits per character | training | perturbed, % | step, ms |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, result in results.items():
        stats = ssam_jax.mask_stats(result.opt_state)
        density = 0.0 if name == "AdamW" else 100 * float(stats.density)
        bits = f"{result.held_out:.3f} | {result.train:.3f}"
        lines.append(f"| {name} | {bits} | {density:.0f} | {1000 * result.seconds:.0f} |")
    return "\n".join(lines)


def check(config: Config, devices: int, corpus: Corpus) -> None:
    """Raise ValueError, naming the setting, unless all are in range."""
    longest = min(len(corpus.train), len(corpus.held_out)) - 2
    positive = ("steps", "batch", "context", "width", "layers", "heads", "refresh_every", "evaluation")
    rules: dict[str, Rule] = {
        "at least 1": (lambda v: v >= 1, positive),
        f"a multiple of the devices, {devices}": (lambda v: v % devices == 0, ("batch", "evaluation")),
        f"a multiple of heads, {config.heads}": (lambda v: v % config.heads == 0, ("width",)),
        f"at most {longest}, the length of the text": (lambda v: v <= longest, ("context",)),
        f"from 1 to layers, {config.layers}": (lambda v: 1 <= v <= config.layers, ("last",)),
        "from 0 to 1": (lambda v: 0 <= v <= 1, ("sparsity",)),
        "at least 0": (lambda v: v >= 0, ("seed", "sample")),
        "finite and above 0": (lambda v: 0 < v < math.inf, ("lr", "rho")),
        "finite and at least 0": (lambda v: 0 <= v < math.inf, ("weight_decay",)),
    }
    check_ranges(config, rules)
    if not config.methods or len(set(config.methods)) < len(config.methods):
        raise ValueError(f"methods must name at least one, and none twice, got {config.methods}.")


def main(config: Config) -> None:
    """Train with each method, and print the table, the mask and a sample.

    Raises:
      ValueError: a setting is out of range.
    """
    if config.distributed:
        jax.distributed.initialize()
    mesh, corpus = Mesh(np.array(jax.devices()), (AXIS,)), read_corpus()
    check(config, mesh.size, corpus)
    first, methods, results = jax.process_index() == 0, make_methods(config), {}
    with tqdm(total=len(methods) * config.steps, unit="step", disable=None if first else True) as bar:
        for name, method in methods.items():
            bar.set_description(name)
            results[name] = train(config, method, corpus, mesh, bar)
    last = list(results.values())[-1]
    report = [table(results)]
    if "ssam" in config.methods:
        report.append(mask_table(results[list(methods)[config.methods.index("ssam")]].opt_state, mesh))
    if config.sample:
        report.append(generate(config, last.params, mesh))
    if first:
        count = sum(leaf.size for leaf in jax.tree.leaves(last.params))
        print(
            f"{count:,} parameters; {mesh.size} devices, {mesh.devices.flat[0].platform}; seed {config.seed};"
            f" {config.steps} steps of {config.batch} sequences of {config.context} characters; docstrings of"
            f" {corpus.modules} modules of Python {platform.python_version()}, {len(corpus.train):,}"
            f" characters to train on and {len(corpus.held_out):,} held out, of which"
            f" {config.evaluation * config.context:,} are predicted\n"
        )
        print("\n\n".join(report))


if __name__ == "__main__":
    main(tyro.cli(Config))
