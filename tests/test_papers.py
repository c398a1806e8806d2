"""Each line of the table "Paper → spelling" equals the paper's equations to 1e-9 in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import papers
import pytest
import tiny
from papers import HALF, NORMS_ONLY

import ssam_jax
from ssam_jax import combine, directions, fixed_mask, radii

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
RHO, STEPS, LR, DECAY = 0.2, 7, 0.3, 0.01
BATCHES = oracle.make_batches(STEPS)
BY_AXES = hasattr(
    optax.contrib, "MuonDimensionNumbers"
)  # before, Muon's matrices were stretched by their shape
MUP = {"bias1": 1.0, "bias2": 1.0, "kernel1": 4.0, "kernel2": 0.5}  # a layer's scale
LABELS = {name: name for name in MUP}


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["kernel1"] + params["bias1"][None])
    logits = hidden @ params["kernel2"] + params["bias2"][None]
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(logits), axis=1))


def base():
    return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(LR, momentum=0.9))


def layerwise():
    return optax.partition({name: optax.scale(scale) for name, scale in MUP.items()}, LABELS)


def muon():
    labels = {name: "matrix" if name.startswith("kernel") else "other" for name in LABELS}
    options = {"nesterov": False}
    if BY_AXES:
        axes = optax.contrib.MuonDimensionNumbers()
        options["weight_dimension_numbers"] = lambda updates: jax.tree.map(lambda _: axes, updates)
    matrix = tiny.may_promote(optax.contrib.scale_by_muon(**options))
    return optax.partition({"matrix": matrix, "other": optax.identity()}, labels)


def drawn(seed):
    """Return what the direction of a seed and a step is documented to be: draws of jax.random by leaf."""

    def draw(step):
        key = jax.random.fold_in(jax.random.key(seed), step)
        leaves = oracle.make_params()
        return {
            name: np.asarray(jax.random.normal(jax.random.fold_in(key, i), leaves[name].shape, jnp.float64))
            for i, name in enumerate(oracle.ORDER)
        }

    return draw


def tossed(p, rho, seed):
    def radius(step, g):
        return rho if jax.random.bernoulli(jax.random.fold_in(jax.random.key(seed), step), p) else 0.0

    return radius


# name: the spelling's arguments of `ssam`, and the paper's of `papers.two_gradients`.
TWO = {
    "SAM": ({}, {}),
    "ASAM": ({"adaptive": True}, {"adaptive": True}),
    "n-step SAM": ({"ascent_steps": 3}, {"ascent_steps": 3}),
    "normalized after masking": ({"normalize": "masked"}, {"normalize": "masked"}),
    "leaf by leaf": ({"normalize": "leaf"}, {"normalize": "leaf"}),
    "layerwise scaling (muP²)": ({"direction": layerwise}, {"direction": lambda: papers.scaled(MUP)}),
    "Muon direction": ({"direction": muon}, {"direction": lambda: papers.muon(stretched=not BY_AXES)}),
    "VaSSO": ({"direction": lambda: optax.ema(0.6, debias=False)}, {"direction": lambda: papers.vasso(0.6)}),
    "F-SAM": (
        {"direction": lambda: directions.friendly(sigma=0.8, decay=0.7)},
        {"direction": lambda: papers.friendly(0.8, 0.7)},
    ),
    "ZSharp": ({"direction": lambda: directions.zscore(0.5)}, {"direction": lambda: papers.zscore(0.5)}),
    "sign": ({"direction": optax.scale_by_sign}, {"direction": papers.sign}),
    "random": ({"direction": lambda: directions.noise(5)}, {"direction": lambda: papers.noise(drawn(5))}),
    "GSAM": ({"combine": lambda: combine.gsam(0.3)}, {"combine": lambda: papers.gsam(0.3)}),
    "WSAM coupled": ({"combine": lambda: combine.weighted(0.6 / 0.4)}, {"combine": lambda: papers.wsam(0.6)}),
    "LookSAM": (
        {"rho": radii.every(3, RHO), "combine": lambda: combine.looksam(0.7), "skip_zero_rho": True},
        {"radius": lambda: papers.every(3, RHO), "combine": lambda: papers.looksam(0.7, "global")},
    ),
    "LookSAM, leaf by leaf": (
        {
            "rho": radii.every(3, RHO),
            "combine": lambda: combine.looksam(0.7, scope="leaf"),
            "skip_zero_rho": True,
        },
        {"radius": lambda: papers.every(3, RHO), "combine": lambda: papers.looksam(0.7, "leaf")},
    ),
    "LookSAM before its first ascent": (
        {"rho": radii.every(3, RHO, start=2), "combine": lambda: combine.looksam(0.7), "skip_zero_rho": True},
        {"radius": lambda: papers.every(3, RHO, 2), "combine": lambda: papers.looksam(0.7, "global")},
    ),
    "every k-th step": ({"rho": radii.every(3, RHO)}, {"radius": lambda: papers.every(3, RHO)}),
    "every k-th step, skipped": (
        {"rho": radii.every(3, RHO), "skip_zero_rho": True},
        {"radius": lambda: papers.every(3, RHO)},
    ),
    "late SAM": ({"rho": radii.every(1, RHO, start=4)}, {"radius": lambda: papers.every(1, RHO, 4)}),
    "SS-SAM": ({"rho": radii.bernoulli(0.5, RHO, 3)}, {"radius": lambda: tossed(0.5, RHO, 3)}),
    "AE-SAM": ({"rho": radii.adaptive_gate(RHO, STEPS)}, {"radius": lambda: papers.gate(RHO, STEPS)}),
    "SAM-ON": (
        {"mask": lambda: fixed_mask(lambda path: path.startswith("bias"))},
        {"mask": lambda: NORMS_ONLY},
    ),
}
CARRIED = {
    "carried previous gradient": ({}, {}),
    "carried, a schedule": (
        {"rho": lambda step: RHO / (1.0 + step.astype(float))},
        {"radius": lambda: decayed},
    ),
    "carried, ASAM": ({"adaptive": True}, {"adaptive": True}),
    "MSAM": (
        {"direction": lambda: optax.chain(directions.base_momentum(), optax.scale(-1.0))},
        {"momentum": -1},
    ),
    "carried momentum": ({"direction": directions.base_momentum}, {"momentum": 1}),
    "carried F-SAM": (
        {"direction": lambda: directions.friendly(0.8, 0.7)},
        {"direction": lambda: papers.friendly(0.8, 0.7)},
    ),
}


def decayed(step, g):
    return RHO / (1 + step)


def made(options):
    """Call what makes a factor, for each run its own."""
    factors = ("direction", "combine", "mask", "radius")
    return {name: value() if name in factors else value for name, value in options.items()}


def spelled(carrier, options, masked):
    options = {"rho": RHO, **made(options)}
    if masked:
        options["mask"] = fixed_mask(HALF)
    if carrier == "carried":
        return ssam_jax.carried(base(), **options)
    if carrier == "alternating":
        options.pop("skip_zero_rho", None)
        return ssam_jax.alternating(base(), **options)
    return optax.chain(ssam_jax.ssam(**options), base())


def run(carrier, tx):
    """Yield w after each step."""

    @functools.partial(jax.jit, static_argnames="pass_grad_fn")
    def step(params, state, batch, pass_grad_fn):
        def grad_fn(p, i):
            return jax.grad(loss_fn)(p, batch)

        extra = {"grad_fn": grad_fn} if pass_grad_fn else {}
        updates, state = tx.update(grad_fn(params, 0), state, params, **extra)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, oracle.make_params())
    state = tx.init(params)
    for batch in BATCHES:
        for _ in range(2 if carrier == "alternating" else 1):
            params, state = step(params, state, batch, carrier == "ssam")
        yield ssam_jax.carried_eval_params(state, params) if carrier == "carried" else params


def expected(carrier, options, masked):
    options = {"radius": papers.always(RHO), **made(options)}
    if masked:
        options["mask"] = HALF
    carry = papers.one_gradient if carrier == "carried" else papers.two_gradients
    return carry(oracle.make_params(), BATCHES, oracle.sgd(LR, 0.9, DECAY), **options)


def check(carrier, spelling, paper, masked):
    with enable_x64(True):
        tx = spelled(carrier, spelling, masked)
        for ours, theirs in zip(run(carrier, tx), expected(carrier, paper, masked), strict=True):
            for name in oracle.ORDER:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-9)


MASKED = [(name, masked) for name in TWO for masked in (False, True) if not (masked and name == "SAM-ON")]


@pytest.mark.parametrize(("name", "masked"), MASKED, ids=[f"{n}{', half' * m}" for n, m in MASKED])
def test_a_spelling_with_two_gradients_equals_the_paper(name, masked):
    check("ssam", *TWO[name], masked)


@pytest.mark.parametrize("masked", [False, True], ids=["", "half"])
@pytest.mark.parametrize("name", CARRIED)
def test_a_spelling_with_one_gradient_equals_the_paper(name, masked):
    check("carried", *CARRIED[name], masked)


@pytest.mark.parametrize(
    "name", ["SAM", "F-SAM", "GSAM", "LookSAM", "LookSAM before its first ascent", "AE-SAM", "leaf by leaf"]
)
def test_alternating_takes_the_same_steps(name):
    check("alternating", *TWO[name], masked=True)
