"""Everything composes with everything: a pairwise covering of the factors, the carriers and optax's wrappers.

Each case takes jitted steps that compile once, keep structure, shapes and dtypes, and stay finite; each pair
of values of two factors is in some case. What makes no sense is refused with the reason.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import papers
import pytest
import test_contract as contract
import tiny
from jax.sharding import NamedSharding, PartitionSpec

import ssam_jax
from ssam_jax import combine, directions, radii

STEPS = 4
NO_NM = ("nm", "tensor")  # what dynamic_mask cannot trade

FACTORS = {
    "direction": {
        "gradient": lambda: None,
        "ema": lambda: optax.ema(0.9, debias=False),
        "sign": optax.scale_by_sign,
        "friendly": directions.friendly,
        "noise": lambda: directions.noise(1),
        "zscore": lambda: directions.zscore(0.5),
        "momentum": directions.base_momentum,
    },
    "rule": ["fisher", "dynamic", "random", "fixed", "dense"],
    "pattern": list(contract.PATTERNS),
    "radius": {
        "float": lambda: 0.1,
        "zero": lambda: 0.0,
        "schedule": lambda: optax.linear_schedule(0.1, 0.0, 3),
        "every": lambda: radii.every(2, 0.1),
        "bernoulli": lambda: radii.bernoulli(0.5, 0.1, 0),
        "gate": lambda: radii.adaptive_gate(0.1, STEPS),
    },
    "ball": {
        "global": {},
        "masked": {"normalize": "masked"},
        "leaf": {"normalize": "leaf"},
        "asam": {"adaptive": True},
    },
    "combine": {
        "replace": lambda: None,
        "weighted": lambda: combine.weighted(0.7),
        "gsam": lambda: combine.gsam(0.2),
        "looksam": lambda: combine.looksam(0.5),
    },
    "carrier": ["ssam", "ssam skipping", "ssam of two steps", "alternating", "carried"],
    "wrapper": ["none", "chain", "apply_if_finite", "masked base", "inject_hyperparams"],
}


def refused(case):
    """Return why the library refuses a case, or None."""
    if case["rule"] == "dynamic" and case["pattern"] in NO_NM:
        return "dynamic_mask cannot"
    if case["carrier"] == "carried" and case["combine"] != "replace":
        return "unexpected keyword argument 'combine'"
    if case["direction"] == "momentum" and case["carrier"].startswith("ssam"):
        return "directions.base_momentum"
    unskipped = case["carrier"] in ("ssam", "ssam of two steps") and case["radius"] not in ("float", "zero")
    if case["combine"] == "looksam" and unskipped:
        return "this combine must know on which steps there is no ascent"
    return None


def covering():
    """Return few cases that have each possible pair of values of two factors, greedily."""
    names = list(FACTORS)
    values = {name: list(FACTORS[name]) for name in names}
    left = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in values[a] for y in values[b]
    }
    rng, cases = np.random.default_rng(0), []
    while left:
        best, most = None, -1
        for _ in range(60):
            (a, x), (b, y) = seed = sorted(left)[int(rng.integers(len(left)))]
            case = {name: values[name][int(rng.integers(len(values[name])))] for name in names}
            case[a], case[b] = x, y
            pairs = {p for p in itertools.combinations(case.items(), 2) if p in left}
            if len(pairs) > most and (refused(case) is None or refused(dict(seed) | core(seed)) is not None):
                best, most = case, len(pairs)
        if best is not None:
            cases.append(best)
            left -= set(itertools.combinations(best.items(), 2))
    return cases


def core(seed):
    """Return the harmless completion of a pair of values."""
    plain = {name: next(iter(FACTORS[name])) for name in FACTORS}
    return {**plain, "carrier": "alternating", **dict(seed)}


CASES = covering()


def make(case):
    rule = contract.RULES.get((case["rule"], case["pattern"]))
    if case["rule"] == "dynamic" and rule is None:
        rule = lambda seed: contract.dynamic(contract.PATTERNS[case["pattern"]], seed)  # noqa: E731
    if case["rule"] == "fixed":
        rule = contract.RULES["fixed", "fixed"]
    mask = rule(0) if case["rule"] != "dense" else None
    options = {
        "mask": mask,
        "direction": FACTORS["direction"][case["direction"]](),
        "combine": FACTORS["combine"][case["combine"]](),
        **FACTORS["ball"][case["ball"]],
    }
    rho = FACTORS["radius"][case["radius"]]()
    base = optax.sgd(0.1, momentum=0.9)
    if case["wrapper"] == "masked base":
        base = optax.chain(
            optax.masked(optax.add_decayed_weights(0.01), jax.tree.map(lambda p: p.ndim > 1, tiny.PARAMS)),
            base,
        )
    if case["wrapper"] == "inject_hyperparams":
        base = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)
    if case["carrier"] == "carried":
        if options["combine"] is None:
            del options["combine"]
        tx = ssam_jax.carried(base, rho, **options)
    elif case["carrier"] == "alternating":
        tx = ssam_jax.alternating(base, rho, **options)
    else:
        options["skip_zero_rho"] = case["carrier"] == "ssam skipping"
        options["ascent_steps"] = 2 if case["carrier"] == "ssam of two steps" else None
        tx = optax.chain(ssam_jax.ssam(rho, **options), base)
    if case["wrapper"] == "chain":
        tx = optax.named_chain(("first", optax.clip_by_global_norm(10.0)), ("ours", tx))
    if case["wrapper"] == "apply_if_finite":
        tx = optax.apply_if_finite(tx, 3)
    return tx


def name_of(case):
    return " ".join(str(value).replace(" ", "-") for value in case.values())


@pytest.mark.parametrize("case", [c for c in CASES if not refused(c)], ids=name_of)
def test_a_combination_trains(case, relaxed_promotion):
    tx = make(case)
    step = jax.jit(tiny.step_of(tx))
    params, state = tiny.params(), tx.init(tiny.params())
    spec = tiny.spec((params, state))
    for batch in tiny.BATCHES[:STEPS]:
        params, state = step(params, state, batch)
    assert tiny.spec((params, state)) == spec
    assert step._cache_size() == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert tiny.differ(params, tiny.PARAMS)
    assert ssam_jax.mask_stats(state).density > 0


@pytest.mark.parametrize("case", [c for c in CASES if refused(c)], ids=name_of)
def test_a_combination_that_makes_no_sense_is_refused(case, relaxed_promotion):
    def attempt():
        tx = make(case)
        tiny.step_of(tx)(tiny.params(), tx.init(tiny.params()), tiny.BATCHES[0])

    with pytest.raises((TypeError, ValueError), match=refused(case)):
        attempt()


def test_each_pair_of_values_is_in_some_case():
    for a, b in itertools.combinations(FACTORS, 2):
        seen = {(case[a], case[b]) for case in CASES}
        assert seen == set(itertools.product(FACTORS[a], FACTORS[b]))


# Traps.


def test_fisher_scores_and_direction_are_told_of_steps_without_ascent():
    rule = ssam_jax.fisher_mask(ssam_jax.Unstructured(0.5), refresh_every=9)
    tx = ssam_jax.ssam(0.1, rule, direction=optax.ema(0.9, debias=False))
    params = tiny.params()
    grads = jax.grad(tiny.loss)(params, tiny.BATCHES[0])
    _, state = tx.update(grads, tx.init(params), params, grad_fn=None)
    tiny.assert_close(state.direction.ema, jax.tree.map(lambda g: 0.1 * g, grads))
    tiny.assert_close(state.mask.memory, jax.tree.map(lambda g: 0.05 * g**2, grads))


def test_combine_is_told_that_there_was_no_ascent():
    told = []

    def update(grads, perturbed, state, params):
        told.append(perturbed is None)
        return (grads if perturbed is None else perturbed), state

    own = ssam_jax.Combine(lambda params: (), update)
    params = tiny.params()
    for rho, extra in [(0.1, {}), (0.1, {"grad_fn": None}), (0.0, {})]:
        tx = ssam_jax.ssam(rho, combine=own)
        grad_fn = tiny.grad_fn_of(tiny.BATCHES[0])
        tx.update(grad_fn(params, 0), tx.init(params), params, **{"grad_fn": grad_fn, **extra})
    assert told == [False, True, True]


def test_a_static_radius_of_zero_and_a_step_without_ascent_take_no_second_gradient():
    calls = []

    def grad_fn(params, i):
        calls.append(i)
        return jax.grad(tiny.loss)(params, tiny.BATCHES[0])

    params = tiny.params()
    grads = grad_fn(params, 0)
    for tx in (ssam_jax.ssam(0.0), ssam_jax.ssam(0), ssam_jax.ssam(radii.every(2, 0.1), skip_zero_rho=True)):
        state = tx.init(params)
        if tx is not None and state.step.shape == ():
            state = state._replace(step=jnp.int32(1))
        tx.update(grads, state, params, grad_fn=grad_fn)
    assert calls == [0]


@pytest.mark.parametrize("devices", [1, 8])
def test_bernoulli_and_noise_are_equal_on_any_number_of_devices(devices):
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    schedule, noise = radii.bernoulli(0.5, 1.0, 7), directions.noise(3)
    everywhere, by_last = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(None, "x")))
    spread = {"w": jnp.ones((4, 8))}
    draw = jax.jit(schedule, out_shardings=everywhere)
    drawn = [float(draw(jax.device_put(jnp.int32(i), everywhere))) for i in range(12)]
    assert drawn == [float(schedule(i)) for i in range(12)] and 2 < sum(drawn) < 10
    direction, _ = jax.jit(noise.update)(jax.device_put(spread, by_last), noise.init(spread))
    tiny.assert_close(direction, noise.update(spread, noise.init(spread))[0])


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("normalize", ["global", "masked", "leaf"])
def test_a_gradient_of_zero_has_a_finite_derivative(order, normalize):
    def outer(scale, x):
        """The loss after a step from where the gradient may be exactly zero."""
        params = {"w": scale * x}

        def loss(p):
            return jnp.sum(p["w"] ** 2)

        tx = ssam_jax.ssam(0.1, normalize=normalize)
        grad_fn = lambda p, i: jax.grad(loss)(p)  # noqa: E731
        updates, _ = tx.update(grad_fn(params, 0), tx.init(params), params, grad_fn=grad_fn)
        return loss(jax.tree.map(lambda p, u: p - 0.1 * u, params, updates))

    derivative = jax.grad(outer) if order == "first" else jax.grad(jax.grad(outer))
    tasks = jnp.array([[0.0, 0.0], [1.0, 2.0]])
    found = jax.vmap(derivative, in_axes=(None, 0))(1.0, tasks)
    assert np.isfinite(found).all() and (order == "second" or found[0] == 0)


SIZES = (1.0, 0.5, 2.0, 0.1, 1.5, 0.9, 1.1, 0.2)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_an_adaptive_gate_decides_alike_whatever_the_size_of_the_gradient(size):
    """The variance of a squared norm is a fourth power; float32 has no number for that of 1e-12 or 1e12."""
    rule = ssam_jax.radii.adaptive_gate(0.1, 9, decay=0.5)
    state, decisions = rule.init({"w": jnp.zeros(1)}), []
    for step, g in enumerate(SIZES):
        radius, state = rule.update(state, {"w": jnp.array([size * g])}, None, jnp.int32(step))
        decisions.append(float(radius) > 0)
    expected = papers.gate(0.1, 9, decay=0.5)
    gradients = [{"w": np.array([g])} for g in SIZES]
    assert decisions == [expected(step, g) > 0 for step, g in enumerate(gradients)]
    assert any(decisions) and not all(decisions)


# Cost.


def gradients_touched(fn, *args):
    """Return how many arrays of the gradient's size a compiled function reads and writes."""
    cost = jax.jit(fn).lower(*args).compile().cost_analysis()
    return cost["bytes accessed"] / (4 * COUNT)


COUNT = 2**20


@pytest.mark.parametrize(("size", "scale"), [(1.0, 2.0**60), (1e-25, 2.0**60), (1e25, 2.0**-60)])
def test_a_scaled_direction_ascends_alike_and_reaches_gradients_whose_squares_are_no_numbers(size, scale):
    params, grads = {"w": jnp.zeros(4)}, {"w": size * jnp.array([1.0, 1.0, 1.0, -1.0])}

    def moved(direction):
        tx = ssam_jax.ssam(0.5, direction=direction)
        return tx.update(grads, tx.init(params), params, grad_fn=lambda p, i: p)[0]["w"]

    unscaled = moved(None)
    assert (unscaled == 0).all() == (size != 1.0)
    expected = np.array([0.25, 0.25, 0.25, -0.25])
    np.testing.assert_allclose(moved(optax.scale(scale)), expected, rtol=1e-6)
    if size == 1.0:
        np.testing.assert_array_equal(moved(optax.scale(scale)), unscaled)


def test_a_scaled_direction_costs_no_pass_over_the_gradient():
    params = {"w": jnp.ones(COUNT)}

    def touched(direction):
        tx = ssam_jax.ssam(0.1, direction=direction)
        update = lambda g, p: tx.update(g, tx.init(p), p, grad_fn=lambda p, i: p)[0]  # noqa: E731
        return gradients_touched(update, params, params)

    assert touched(optax.scale(2.0**60)) <= touched(None) + 0.01


@pytest.mark.skipif(
    not hasattr(jax, "enable_x64"), reason="the compiler of JAX 0.6 fuses less than later ones"
)
@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("name", list(FACTORS["combine"])[1:])
def test_no_combine_takes_more_than_three_passes_over_the_gradient(name, skipped):
    """A pass reads both gradients and writes one array."""
    chosen = FACTORS["combine"][name]()
    grads = {"w": jnp.ones(COUNT)}
    state = chosen.init(grads)
    perturbed = None if skipped else jax.tree.map(lambda g: 2 * g, grads)
    touched = gradients_touched(lambda g, p, s: chosen.update(g, p, s, g), grads, perturbed, state)
    assert touched <= 3 * 3 + 0.01  # and some scalars
