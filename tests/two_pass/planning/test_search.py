"""The search finds the best choice, or says how much it may miss."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from ssam_jax.two_pass.planning import search


def price(units, unit_costs):
    return sum(cost for i, cost in enumerate(unit_costs) if units >> i & 1)


def exhaustive(sets, unit_costs, scores, limit):
    """Return the largest score within the limit, and the negative of the least cost it takes."""
    found = (0.0, 0.0)
    for chosen in itertools.product([False, True], repeat=len(sets)):
        units = 0
        for needed, is_chosen in zip(sets, chosen):
            units |= needed if is_chosen else 0
        cost = price(units, unit_costs)
        score = sum(score for score, is_chosen in zip(scores, chosen) if is_chosen)
        if cost <= limit:
            found = max(found, (score, -cost))
    return found


@st.composite
def systems(draw):
    """Draw items that need random units, or those of a random network: what lies downstream."""
    n = draw(st.integers(1, 8))
    unit_costs = draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    if draw(st.booleans()):
        sets = draw(st.lists(st.integers(0, 2**n - 1), min_size=n, max_size=n))
    else:
        sets = [0] * n
        for i in reversed(range(n)):
            sets[i] = 1 << i
            for j in range(i + 1, n):
                sets[i] |= sets[j] if draw(st.booleans()) else 0
    scores = draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    return sets, [float(x) for x in unit_costs], [float(x) for x in scores], float(draw(st.integers(0, 30)))


@hypothesis.given(systems())
@hypothesis.settings(max_examples=300)
def test_the_search_finds_what_trying_everything_finds(system):
    sets, unit_costs, scores, limit = system
    choice = search.best(sets, unit_costs, scores, limit)
    assert (choice.score, -choice.cost) == exhaustive(*system)
    units = 0
    for item in choice.items:
        units |= sets[item]
    assert choice.cost == price(units, unit_costs)
    assert choice.score == sum(scores[item] for item in choice.items)
    assert choice.short == 0


@hypothesis.given(systems())
def test_a_search_that_is_cut_short_says_how_much_may_be_missing(system):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "LONGEST", 2)
        patch.setattr(search, "MOST_WORK", 0)
        choice = search.best(*system)
    best, _ = exhaustive(*system)
    assert choice.cost <= system[-1]
    assert best - choice.short <= choice.score <= best


def test_a_search_that_is_cut_short_can_miss_the_best():
    rng = np.random.default_rng(0)
    sets, unit_costs = [1 << i for i in range(12)], rng.integers(50, 100, 12).astype(float)
    scores = unit_costs + rng.random(12)
    exact = search.best(sets, unit_costs, scores, 400.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "LONGEST", 2)
        thinned = search.best(sets, unit_costs, scores, 400.0)
    assert exact.short == 0 < thinned.short
    assert thinned.score < exact.score <= thinned.score + thinned.short
