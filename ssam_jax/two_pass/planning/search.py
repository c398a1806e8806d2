"""The best items for a budget, where items share what they cost.

An item needs a set of units. A unit is paid once, however many of the chosen items need it. Chosen is
the set of items with the largest total score whose units cost at most a limit: a knapsack with shared
costs, hard in general and easy on the shape of a neural network, where the earliest chosen layer needs
nearly everything that the later ones need.

So the search tries every item as the most expensive one that is chosen. Given that, the items whose units
are all paid for are free, and the others fall into groups that share nothing any more. Each group is solved
in the same way, to a front of (cost, score) pairs, and the fronts are added up as in Nemhauser and Ullmann,
"Discrete Dynamic Programming and Capital Allocation", Management Science 15 (1969).
"""

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

LONGEST = 4096
"""How many pairs a front may have before it is thinned out."""

MOST_PAIRS = 2**18
"""How many pairs may be made of two fronts before one of them is thinned out."""

MOST_WORK = 2**24
"""How many pairs may be made in all, a sum counting as 256, before all is done more roughly."""

Units: TypeAlias = int
"""A set of units, a bit for each."""

Items: TypeAlias = int
"""A set of items, a bit for each."""


class Choice(NamedTuple):
    """What was found.

    Attributes:
      items: numbers of the chosen items.
      cost: of all their units.
      score: the sum of theirs.
      short: how much larger the best score may be at most; 0 if this is the best.
    """

    items: list[int]
    cost: float
    score: float
    short: float


class Bundle(NamedTuple):
    """Items that need the same units, so that all of them are chosen or none.

    Attributes:
      items: which.
      score: the sum of theirs.
      needs: their units, or those that are not paid for yet.
    """

    items: Items
    score: float
    needs: Units


class Front(NamedTuple):
    """Choices of which none is both cheaper and better than another, by increasing cost.

    Attributes:
      cost: of each choice.
      score: of each.
      items: of each.
      short: how far below a choice that was left out, and that costs no less, a score may be.
    """

    cost: np.ndarray
    score: np.ndarray
    items: list[Items]
    short: float

    def some(self, numbers: np.ndarray) -> "Front":
        """Return some of the choices."""
        return Front(self.cost[numbers], self.score[numbers], [self.items[i] for i in numbers], self.short)


def best(sets: Sequence[Units], costs: Sequence[float], scores: Sequence[float], limit: float) -> Choice:
    """Return the items with the largest total score whose units cost at most ``limit``.

    Of sets with equal scores a cheapest one is returned. Items without a score are never chosen.

    Args:
      sets: for each item the units it needs, unit ``i`` as bit ``i``.
      costs: of each unit.
      scores: of each item; not negative.
      limit: what may be spent.
    """
    counted = sum(1 << i for i, cost in enumerate(costs) if cost)
    alike: defaultdict[Units, list[int]] = defaultdict(list)
    for item, units in enumerate(sets):
        if scores[item] > 0:
            alike[units & counted].append(item)
    bundles = [
        Bundle(sum(1 << item for item in items), float(sum(scores[item] for item in items)), units)
        for units, items in alike.items()
    ]
    front = _Search(costs, limit).front(bundles, 0.0)
    items = [item for item in range(len(sets)) if front.items[-1] >> item & 1]
    return Choice(items, float(front.cost[-1]), float(front.score[-1]), front.short)


class _Search:
    def __init__(self, costs: Sequence[float], limit: float):
        self.costs = np.asarray(costs, np.float64)
        self.limit = limit
        self.price_of: dict[Units, float] = {}
        self.front_of: dict[tuple[Bundle, ...], Front] = {}
        self.work = 0

    def front(self, bundles: Iterable[Bundle], spent: float) -> Front:
        """Return the front of all choices that can be paid, the free ones included in each."""
        free, costly = [], []
        for bundle in bundles:
            if not bundle.needs:
                free.append(bundle)
            elif spent + self.price(bundle.needs) <= self.limit:
                costly.append(bundle)
        score = np.array([sum(bundle.score for bundle in free)], np.float64)
        total = Front(np.zeros(1), score, [sum(bundle.items for bundle in free)], 0.0)
        self.work += 256
        fronts = map(self.front_of_group, self.groups(costly))
        for front in sorted(fronts, key=lambda front: -len(front.items)):
            total = self.add(total, front, self.limit - spent)
        return total

    def price(self, units: Units) -> float:
        """Return what a set of units costs."""
        if units not in self.price_of:
            raw = np.frombuffer(units.to_bytes(len(self.costs) // 8 + 1, "little"), np.uint8)
            bits = np.unpackbits(raw, bitorder="little")[: len(self.costs)]
            self.price_of[units] = float(self.costs @ bits)
        return self.price_of[units]

    def groups(self, bundles: Iterable[Bundle]) -> list[tuple[Bundle, ...]]:
        """Return the bundles in groups that share no unit, each in the order of falling prices."""
        groups: list[tuple[Units, list[Bundle]]] = []
        for bundle in bundles:
            needs, group, apart = bundle.needs, [bundle], []
            for other in groups:
                if other[0] & bundle.needs:
                    needs, group = needs | other[0], other[1] + group
                else:
                    apart.append(other)
            groups = [*apart, (needs, group)]
        return [tuple(sorted(group, key=lambda b: (-self.price(b.needs), b.items))) for _, group in groups]

    def front_of_group(self, group: tuple[Bundle, ...]) -> Front:
        """Return the front of a group."""
        if group not in self.front_of:
            choices = self._choices(group)
            kept = choices.some(_efficient(choices.cost, choices.score, self.limit))
            self.front_of[group] = _thinned(kept, LONGEST)
        return self.front_of[group]

    def _choices(self, group: tuple[Bundle, ...]) -> Front:
        if all(cheap.needs & ~dear.needs == 0 for dear, cheap in itertools.pairwise(group)):
            # Like the rows of one leaf: whatever is chosen pays for all that come after it.
            return self._one_by_one(group[::-1], 0.0)
        if self.work > MOST_WORK:  # quick, and maybe far from the best
            ranked = sorted(group, key=lambda bundle: -bundle.score / self.price(bundle.needs))
            return self._one_by_one(ranked, sum(bundle.score for bundle in group))
        # Invariant: a choice is found where its first bundle is, the most expensive one in the group. Bundles
        # before that one are left out for good; those after it that need nothing more are in, for free.
        found = [Front(np.zeros(1), np.zeros(1), [0], 0.0)]
        for i, first in enumerate(group):
            later = [bundle._replace(needs=bundle.needs & ~first.needs) for bundle in group[i + 1 :]]
            price = self.price(first.needs)
            rest = self.front(later, price)
            chosen = [items | first.items for items in rest.items]
            found.append(Front(rest.cost + price, rest.score + first.score, chosen, rest.short))
        cost = np.concatenate([front.cost for front in found])
        score = np.concatenate([front.score for front in found])
        items = list(itertools.chain(*(front.items for front in found)))
        return Front(cost, score, items, max(front.short for front in found))

    def _one_by_one(self, bundles: Sequence[Bundle], short: float) -> Front:
        """Return the choices of the first few of some bundles."""
        paid = itertools.accumulate((bundle.needs for bundle in bundles), operator.or_)
        cost = np.array([0.0, *map(self.price, paid)])
        score = np.cumsum([0.0, *(bundle.score for bundle in bundles)])
        items = list(itertools.accumulate((bundle.items for bundle in bundles), operator.or_, initial=0))
        return Front(cost, score, items, short)

    def add(self, a: Front, b: Front, limit: float) -> Front:
        """Return the front of one choice from each of two fronts, together within a limit."""
        most = MOST_PAIRS if self.work <= MOST_WORK else MOST_PAIRS // 64
        while len(a.items) * len(b.items) > most:
            if len(a.items) >= len(b.items):
                a = _thinned(a, len(a.items) // 2)
            else:
                b = _thinned(b, len(b.items) // 2)
        self.work += len(a.items) * len(b.items)
        cost, score = np.add.outer(a.cost, b.cost).ravel(), np.add.outer(a.score, b.score).ravel()
        keep = _efficient(cost, score, limit)
        pairs = (divmod(i, len(b.items)) for i in keep.tolist())
        items = [a.items[i] | b.items[j] for i, j in pairs]
        return _thinned(Front(cost[keep], score[keep], items, a.short + b.short), LONGEST)


def _efficient(cost: np.ndarray, score: np.ndarray, limit: float) -> np.ndarray:
    """Return the numbers of the choices within a limit that no cheaper or equally cheap one beats."""
    order = np.lexsort((-score, cost))
    order = order[cost[order] <= limit]
    best_before = np.maximum.accumulate(score[order])[:-1]
    return order[np.concatenate([[True], score[order[1:]] > best_before])]


def _thinned(front: Front, length: int) -> Front:
    """Return no more choices than some, evenly spread over a front, the first and the last among them."""
    if len(front.items) <= length:
        return front
    keep = np.unique(np.linspace(0, len(front.items) - 1, length).round().astype(np.intp))
    gaps = front.score[keep[1:] - 1] - front.score[keep[:-1]]
    return front.some(keep)._replace(short=front.short + float(gaps.max(initial=0.0)))
