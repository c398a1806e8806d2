"""The whole algorithm once more in float64 NumPy: slow, obvious, and sharing no line with ssam_jax.

Trees are flat dicts; their leaves are in the order of the sorted names. A mask is a dict of bool
arrays of the full shape, True where perturbed. Loops are preferred to anything clever.
"""

import numpy as np

ORDER = ("bias1", "bias2", "kernel1", "kernel2")


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel1": (4, 8), "bias1": (8,), "kernel2": (8, 4), "bias2": (4,)}
    return {name: rng.normal(scale=0.7, size=shapes[name]) for name in ORDER}


def make_batches(steps, size=6, seed=2):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(size, 4)), np.eye(4)[rng.integers(0, 4, size)]) for _ in range(steps)]


# The model: tanh layer, softmax layer, mean cross-entropy.


def forward(params, x):
    hidden = np.tanh(x @ params["kernel1"] + params["bias1"])
    logits = hidden @ params["kernel2"] + params["bias2"]
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return hidden, exp / exp.sum(axis=1, keepdims=True)


def loss(params, batch):
    x, y = batch
    return -np.mean(np.sum(y * np.log(forward(params, x)[1]), axis=1))


def gradient(params, batch):
    x, y = batch
    hidden, probabilities = forward(params, x)
    d_logits = (probabilities - y) / len(x)
    d_hidden = (d_logits @ params["kernel2"].T) * (1 - hidden**2)
    return {
        "bias1": d_hidden.sum(axis=0),
        "bias2": d_logits.sum(axis=0),
        "kernel1": x.T @ d_hidden,
        "kernel2": hidden.T @ d_logits,
    }


def empirical_fisher(params, batch):
    total = {name: np.zeros_like(params[name]) for name in ORDER}
    for x, y in zip(*batch):
        single = gradient(params, (x[None], y[None]))
        for name in ORDER:
            total[name] += single[name] ** 2
    return {name: total[name] / len(batch[0]) for name in ORDER}


# Patterns. A division numbers the units of a leaf: an int array shaped like the leaf.


def by_entry(shape):
    return np.arange(np.prod(shape)).reshape(shape)


def by_tensor(shape):
    return np.zeros(shape, int)


def by_channel(axis):
    def divide(shape):
        ids = np.zeros(shape, int)
        if -len(shape) <= axis < len(shape):
            for index in np.ndindex(*shape):
                ids[index] = index[axis]
        return ids

    return divide


def by_block(height, width):
    def divide(shape):
        ids = np.zeros(shape, int)
        if len(shape) == 2:
            for row, column in np.ndindex(*shape):
                ids[row, column] = (row // height) * (shape[1] // width) + column // width
        return ids

    return divide


def list_units(scores, divide):
    """Return (score, name, where) of every unit, in order of leaf and of number."""
    units = []
    for name in sorted(scores):
        ids = divide(scores[name].shape)
        for number in range(ids.max() + 1):
            where = ids == number
            units.append((scores[name][where].mean(), name, where))
    return units


def best_first(units):
    return sorted(units, key=lambda unit: -unit[0])  # stable: ties stay in order


def keep_best(scores, divide, sparsity):
    mask = {name: np.zeros(scores[name].shape, bool) for name in scores}
    budget = round((1 - sparsity) * sum(leaf.size for leaf in scores.values()))
    kept = 0
    for _, name, where in best_first(list_units(scores, divide)):
        if kept >= budget:
            break
        mask[name] |= where
        kept += where.sum()
    return mask


def leaf_by_leaf(fn, *trees):
    mask = {}
    for name in sorted(trees[0]):
        mask |= fn(*({name: tree[name]} for tree in trees))
    return mask


def unstructured(sparsity, scope="global"):
    if scope == "global":
        return lambda scores: keep_best(scores, by_entry, sparsity)
    return lambda scores: leaf_by_leaf(lambda leaf: keep_best(leaf, by_entry, sparsity), scores)


def structured(sparsity, divide):
    return lambda scores: keep_best(scores, divide, sparsity)


def n_of_m(n, m, axis):
    def one_row(row):
        kept = np.zeros(len(row), bool)
        for start in range(0, len(row), m):
            best = sorted(range(start, start + m), key=lambda i: -row[i])[:n]
            kept[best] = True
        return kept

    def pattern(scores):
        return {
            name: np.ones(leaf.shape, bool) if leaf.ndim < 2 else np.apply_along_axis(one_row, axis, leaf)
            for name, leaf in scores.items()
        }

    return pattern


# Mask rules: ``rule(mask, scores, grads, step) -> mask, scores``, called with the descent gradient.


def fisher(pattern, refresh_every, decay):
    def rule(mask, scores, grads, step):
        scores = {name: decay * scores[name] + (1 - decay) * grads[name] ** 2 for name in ORDER}
        if (step + 1) % refresh_every == 0:
            mask = without_near_ties(pattern, scores)
        return mask, scores

    return rule


def dynamic(divide, within_leaf, refresh_every, drop_fraction, total_steps):
    def rule(mask, scores, grads, step):
        if (step + 1) % refresh_every:
            return mask, scores
        fraction = drop_fraction / 2 * (1 + np.cos(np.pi * min(step / total_steps, 1)))

        def refresh(magnitudes):
            def one(m, g):
                return trade(m, g, divide, fraction)

            return leaf_by_leaf(one, mask, magnitudes) if within_leaf else one(mask, magnitudes)

        return without_near_ties(refresh, {name: np.abs(grads[name]) for name in ORDER}), scores

    return rule


def trade(mask, scores, divide, fraction):
    units = best_first(list_units(scores, divide))
    active = [unit for unit in units if mask[unit[1]][unit[2]].all()]
    idle = [unit for unit in units if not mask[unit[1]][unit[2]].any()]
    assert len(active) + len(idle) == len(units)
    count = min(round(fraction * len(active)), len(idle))
    new = {name: np.zeros_like(mask[name]) for name in mask}
    for _, name, where in active[: len(active) - count] + idle[:count]:
        new[name] |= where
    return new


def without_near_ties(choose, scores):
    """Choose, and check that rounding to float32 could not have changed the choice."""
    chosen = choose(scores)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        other = choose({name: s * (1 + 1e-4 * rng.uniform(-1, 1, s.shape)) for name, s in scores.items()})
        assert all((chosen[name] == other[name]).all() for name in chosen), "a near-tie: change the problem"
    return chosen


# The step.


def norm(tree):
    return np.sqrt(sum((leaf**2).sum() for leaf in tree.values()))


def perturb(params, grads, rho, mask, *, normalize="global", adaptive=False):
    t = {name: np.ones_like(params[name]) for name in ORDER}
    if adaptive:
        t["kernel1"], t["kernel2"] = np.abs(params["kernel1"]) + 0.01, np.abs(params["kernel2"]) + 0.01
    scaled = {name: t[name] * grads[name] for name in ORDER}
    masked = {name: scaled[name] * mask[name] for name in ORDER}
    length = norm(masked if normalize == "masked" else scaled)
    return {name: params[name] + rho * t[name] * masked[name] / length for name in ORDER}


def descent_gradient(params, batch, rho, mask, *, ascent_steps=1, **options):
    point, grads = params, gradient(params, batch)
    for _ in range(ascent_steps):
        point = perturb(point, grads, rho, mask, **options)
        grads = gradient(point, batch)
    return grads


def sgd(learning_rate, momentum, weight_decay):
    def init(params):
        return {name: np.zeros_like(params[name]) for name in ORDER}

    def update(params, velocity, grads):
        decayed = {name: grads[name] + weight_decay * params[name] for name in ORDER}
        velocity = {name: decayed[name] + momentum * velocity[name] for name in ORDER}
        return {name: params[name] - learning_rate * velocity[name] for name in ORDER}, velocity

    return init, update


def adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    def init(params):
        zeros = {name: np.zeros_like(params[name]) for name in ORDER}
        return 0, zeros, zeros

    def update(params, state, grads):
        count, first, second = state
        count += 1
        first = {name: b1 * first[name] + (1 - b1) * grads[name] for name in ORDER}
        second = {name: b2 * second[name] + (1 - b2) * grads[name] ** 2 for name in ORDER}
        new = {}
        for name in ORDER:
            unbiased = first[name] / (1 - b1**count), second[name] / (1 - b2**count)
            new[name] = params[name] - learning_rate * unbiased[0] / (np.sqrt(unbiased[1]) + eps)
        return new, (count, first, second)

    return init, update


def train(params, batches, rho, optimizer, mask, rule=None, **options):
    """Yield the parameters and the mask after every step; ``rho(step)`` is the radius."""
    init, update = optimizer
    state = init(params)
    scores = {name: np.zeros_like(params[name]) for name in ORDER}
    for step, batch in enumerate(batches):
        grads = descent_gradient(params, batch, rho(step), mask, **options)
        if rule is not None:
            mask, scores = rule(mask, scores, grads, step)
        params, state = update(params, state, grads)
        yield params, mask
