"""The equations of each paper in float64 NumPy, one function a factor; it shares no line with ssam_jax.

A direction is a function of the gradient, a combine one of both gradients; closures hold their state.
Trees are the flat dicts of `oracle`.
"""

import numpy as np
import oracle
from oracle import ORDER, norm


def mapped(fn, *trees):
    return {name: fn(*(tree[name] for tree in trees)) for name in ORDER}


def inner(a, b):
    return sum((a[name] * b[name]).sum() for name in ORDER)


HALF = {  # a chequerboard
    name: np.indices(leaf.shape).sum(axis=0) % 2 == 0 for name, leaf in oracle.make_params().items()
}
ALL = {name: np.ones(leaf.shape, bool) for name, leaf in oracle.make_params().items()}
NORMS_ONLY = {name: np.full(leaf.shape, name.startswith("bias")) for name, leaf in ALL.items()}

# Directions.


def gradient():
    return lambda g: g


def sign():
    return lambda g: mapped(np.sign, g)


def vasso(decay):
    mean = mapped(np.zeros_like, oracle.make_params())

    def direction(g):
        nonlocal mean
        mean = mapped(lambda e, x: decay * e + (1 - decay) * x, mean, g)
        return mean

    return direction


def friendly(sigma, decay):
    mean = None

    def direction(g):
        nonlocal mean
        if mean is None:
            mean = g
            return g
        d = mapped(lambda x, e: x - sigma * e, g, mean)
        mean = mapped(lambda x, e: decay * e + (1 - decay) * x, g, mean)  # the raw gradient
        return d

    return direction


def zscore(threshold):
    def leaf(x):
        z = (x - x.mean()) / x.std()
        return np.where(np.abs(z) > threshold, x, 0)

    return lambda g: mapped(leaf, g)


def scaled(scales):
    return lambda g: {name: scales[name] * g[name] for name in ORDER}


def muon(stretched, beta=0.95, steps=5, coefficients=(3.4445, -4.7750, 2.0315)):
    mean, count = mapped(np.zeros_like, oracle.make_params()), 0

    def orthogonalized(x):
        stretch = np.sqrt(max(1, x.shape[1] / x.shape[0])) if stretched else 1.0
        turned = x.shape[0] > x.shape[1]
        x = x.T if turned else x
        x = x / (np.linalg.norm(x) + 1e-8)
        a, b, c = coefficients
        for _ in range(steps):
            s = x @ x.T
            x = a * x + (b * s + c * s @ s) @ x
        return stretch * (x.T if turned else x)

    def direction(g):
        nonlocal mean, count
        count += 1
        mean = mapped(lambda e, x: beta * e + (1 - beta) * x, mean, g)
        unbiased = mapped(lambda e: e / (1 - beta**count), mean)
        return {n: orthogonalized(unbiased[n]) if n.startswith("kernel") else g[n] for n in ORDER}

    return direction


def noise(draw):
    step = 0

    def direction(g):
        nonlocal step
        step += 1
        return draw(step - 1)

    return direction


# Radii.


def always(rho):
    return lambda step, g: rho


def every(k, rho, start=0):
    return lambda step, g: rho if step >= start and (step - start) % k == 0 else 0.0


def gate(rho, total_steps, decay=0.9):
    mean = variance = 0.0

    def radius(step, g):
        nonlocal mean, variance
        square = norm(g) ** 2
        mean = decay * mean + (1 - decay) * square
        variance = decay * variance + (1 - decay) * (square - mean) ** 2
        c = 1 - 2 * min(step / total_steps, 1)
        return rho if square >= mean + c * np.sqrt(variance) else 0.0

    return radius


# Combines. `perturbed` is None on a step without ascent.


def replace():
    return lambda g, perturbed: g if perturbed is None else perturbed


def wsam(a):
    def combine(g, perturbed):
        if perturbed is None:
            return g
        return mapped(lambda x, p: (1 - 2 * a) / (1 - a) * x + a / (1 - a) * p, g, perturbed)

    return combine


def gsam(alpha):
    def combine(g, perturbed):
        if perturbed is None:
            return g
        unit = mapped(lambda p: p / norm(perturbed), perturbed)
        across = mapped(lambda x, u: x - inner(g, unit) * u, g, unit)
        return mapped(lambda p, v: p - alpha * v, perturbed, across)

    return combine


def looksam(alpha, scope):
    kept = None

    def parts(tree):
        return [tree] if scope == "global" else [{name: tree[name]} for name in ORDER]

    def length(tree):
        return np.sqrt(sum((leaf**2).sum() for leaf in tree.values()))

    def across(g, perturbed):
        """Return the unit vector of the perturbed gradient less its projection on the gradient."""
        dot = sum((g[name] * perturbed[name]).sum() for name in g)
        v = {name: perturbed[name] - dot / length(g) ** 2 * g[name] for name in g}
        return {name: v[name] / length(v) for name in g}

    def combine(g, perturbed):
        nonlocal kept
        if perturbed is not None:
            kept = {}
            for gs, ps in zip(parts(g), parts(perturbed)):
                kept |= across(gs, ps)
            return perturbed
        if kept is None:
            return g
        new = {}
        for gs in parts(g):
            new |= {name: gs[name] + alpha * length(gs) * kept[name] for name in gs}
        return new

    return combine


# Balls: eps from a direction.


def ball(params, d, rho, mask, *, normalize="global", adaptive=False):
    if normalize == "leaf":
        return {n: params[n] + rho * mask[n] * d[n] / np.sqrt((d[n] ** 2).sum()) for n in ORDER}
    return oracle.perturb(params, d, rho, mask, normalize=normalize, adaptive=adaptive)


# Carriers. Each yields the parameters w after every step; the optimizer is that of `oracle`.


def two_gradients(
    params,
    batches,
    optimizer,
    radius,
    direction=None,
    mask=ALL,
    combine=None,
    ascent_steps=1,
    **options,
):
    direction, combine = direction or gradient(), combine or replace()
    init, update = optimizer
    state = init(params)
    for step, batch in enumerate(batches):
        g = oracle.gradient(params, batch)
        rho, d = radius(step, g), direction(g)
        perturbed = None
        if rho:
            point = params
            for i in range(ascent_steps):
                d = d if i == 0 else oracle.gradient(point, batch)
                point = ball(point, d, rho, mask, **options)
            perturbed = oracle.gradient(point, batch)
        params, state = update(params, state, combine(g, perturbed))
        yield params


def one_gradient(params, batches, optimizer, radius, direction=None, mask=ALL, momentum=None, **options):
    """Run the carried step. ``momentum`` is the sign with which the optimizer's momentum is the direction."""
    direction = direction or gradient()
    init, update = optimizer
    state, held = init(params), params
    for step, batch in enumerate(batches):
        g = oracle.gradient(held, batch)
        params, state = update(params, state, g)
        d = direction(g) if momentum is None else mapped(lambda v: momentum * v, state)
        rho = radius(step + 1, g)
        held = ball(params, d, rho, mask, **options) if rho else params
        yield params
