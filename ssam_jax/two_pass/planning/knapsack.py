"""The best items for a budget, where items share what they cost.

An item needs a set of units. A unit is paid once, however many of the chosen items need it. Chosen is
the set of items with the largest total score whose units cost at most a limit: a knapsack with shared
costs, hard in general and easy on the shape of a neural network, where the earliest chosen layer needs
nearly everything that the later ones need.

So the search tries every item as the first one chosen. Given that, the items whose units are all paid
for are free, and the others fall into groups that share nothing any more. Each group is solved in the
same way, to a front of (cost, score) pairs, and the fronts are added up as in Nemhauser and Ullmann,
"Discrete Dynamic Programming and Capital Allocation", Management Science 15 (1969). Sets are ints.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np

LONGEST = 4096
"""How many pairs a front may have before it is thinned out."""

MOST_PAIRS = 2**18
"""How many pairs may be made of two fronts before one of them is thinned out."""

MOST_WORK = 2**23
"""How many pairs may be made in all, a call counting as 256, before all is done more roughly."""


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


@dataclass(frozen=True, eq=False)
class Front:
    """Choices of which none is both cheaper and better than another, by increasing cost.

    Attributes:
      cost: of each choice.
      score: of each.
      origin: from the number of a choice to its own items and the choices of other fronts in it.
      short: how far below a choice that was left out, and that costs no less, a score may be.
    """

    cost: Any
    score: Any
    origin: Callable[[int], "Origin"]
    short: float = 0.0

    def __len__(self) -> int:
        return len(self.cost)

    def items(self, number: int) -> list[int]:
        """Return the items of one choice."""
        found: list[int] = []
        stack: list[tuple[Front, int]] = [(self, number)]
        while stack:
            front, i = stack.pop()
            own, parts = front.origin(i)
            found += own
            stack += parts
        return found


Origin: TypeAlias = tuple[Sequence[int], Sequence[tuple[Front, int]]]
NOTHING = Front(np.zeros(1), np.zeros(1), lambda number: ((), ()))


def best(sets: Sequence[int], costs: Sequence[float], scores: Sequence[float], limit: float) -> Choice:
    """Return the items with the largest total score whose units cost at most ``limit``.

    Of sets with equal scores a cheapest one is returned. Items without a score are never chosen.

    Args:
      sets: for each item the units it needs, unit ``i`` as bit ``i``.
      costs: of each unit.
      scores: of each item; not negative.
      limit: what may be spent.
    """
    counted = sum(1 << i for i, cost in enumerate(costs) if cost)
    sets = [units & counted for units in sets]
    search = _Search(sets, np.asarray(costs, np.float64), np.asarray(scores, np.float64), limit)
    return search.run()


@dataclass
class _Search:
    sets: Sequence[int]
    costs: Any
    scores: Any
    limit: float
    price_of: dict[int, float] = field(default_factory=dict)
    front_of: dict[Any, Front] = field(default_factory=dict)
    work: int = 0

    def run(self) -> Choice:
        scored = [i for i, score in enumerate(self.scores) if score > 0]
        wanted = [i for i in scored if self.price(self.sets[i]) <= self.limit]
        wanted.sort(key=lambda i: -self.price(self.sets[i]))
        starts = [([i for i in wanted if not self.sets[i]], 0, self.groups([], 0))]
        for k, first in enumerate(wanted):
            base = self.sets[first]
            later = [(i, self.sets[i] & ~base) for i in wanted[k + 1 :]]
            free = [i for i, rest in later if not rest]
            starts.append(([first, *free], base, self.groups(later, self.price(base))))
        plans = []
        for own, base, groups in starts:
            fronts = [self.front(group) for group in groups]
            spent, score = self.price(base), float(sum(self.scores[i] for i in own))
            hull = _hull(fronts)
            plans.append((score + _at(hull, self.limit - spent), score, spent, own, fronts))
        plans.sort(key=lambda plan: (-plan[0], plan[2]))
        found = Choice([], 0.0, 0.0, 0.0)
        short = 0.0
        for bound, score, spent, own, fronts in plans:
            short = max(short, sum(front.short for front in fronts))
            if bound < found.score * (1 - 1e-12):
                continue
            front = self.add_up(fronts, self.limit - spent, found.score - score)
            short = max(short, front.short)
            if not len(front):
                continue
            best = (score + front.score[-1], -spent - front.cost[-1])
            if best > (found.score, -found.cost):
                items = sorted([*own, *front.items(len(front) - 1)])
                found = Choice(items, -best[1], best[0], 0.0)
        return found._replace(short=short)

    def price(self, units: int) -> float:
        """Return what a set of units costs."""
        known = self.price_of.get(units)
        if known is None:
            raw = np.frombuffer(units.to_bytes((len(self.costs) + 7) // 8 or 1, "little"), np.uint8)
            bits = np.unpackbits(raw, bitorder="little")[: len(self.costs)]
            known = self.price_of[units] = float(self.costs @ bits)
        return known

    def groups(self, items: Sequence[tuple[int, int]], spent: float) -> list[tuple[tuple[int, int], ...]]:
        """Return the items, with the units they still need, in groups that share no unit."""
        once = many = 0
        items = [(i, rest) for i, rest in items if rest and spent + self.price(rest) <= self.limit]
        for _, rest in items:
            many |= once & rest
            once |= rest
        alone = [((i, rest),) for i, rest in items if not rest & many]
        groups: list[tuple[int, list[tuple[int, int]]]] = []
        for i, rest in items:
            if not rest & many:
                continue
            joined, mask, others = [(i, rest)], rest, []
            for group in groups:
                if group[0] & rest:
                    mask |= group[0]
                    joined = [*group[1], *joined]
                else:
                    others.append(group)
            groups = [*others, (mask, joined)]
        return [*alone, *(tuple(sorted(group, key=self._order)) for _, group in groups)]

    def _order(self, item: tuple[int, int]) -> tuple[float, int]:
        return -self.price(item[1]), item[0]

    def front(self, group: tuple[tuple[int, int], ...]) -> Front:
        """Return the front of a group; the items come in order of falling cost."""
        if group in self.front_of:
            return self.front_of[group]
        if all(b & ~a == 0 for (_, a), (_, b) in itertools.pairwise(group)):
            return self.front_of.setdefault(group, self._nested(group))
        if self.work > MOST_WORK:
            return self.front_of.setdefault(group, self._in_order(group))
        parts = [NOTHING]
        for k, (first, base) in enumerate(group):
            later = [(i, rest & ~base) for i, rest in group[k + 1 :]]
            own = (first, *(i for i, rest in later if not rest))
            spent, score = self.price(base), float(self.scores[list(own)].sum())
            fronts = [self.front(inner) for inner in self.groups(later, spent)]
            rest = self.add_up(fronts, self.limit - spent, -np.inf)
            origin = functools.partial(_together, own, rest)
            parts.append(Front(rest.cost + spent, rest.score + score, origin, rest.short))
        return self.front_of.setdefault(group, _either(parts))

    def add_up(self, fronts: Sequence[Front], limit: float, worthless: float) -> Front:
        """Return the front of one choice from each of some fronts, together within a limit.

        Choices that cannot become better than ``worthless`` are left out.
        """
        total = NOTHING
        self.work += 256
        fronts = sorted(fronts, key=len, reverse=True)
        for k, front in enumerate(fronts):
            most = MOST_PAIRS if self.work <= MOST_WORK else MOST_PAIRS // 64
            while len(total) * len(front) > most:
                if len(total) >= len(front):
                    total = _thinned(total, len(total) // 2)
                else:
                    front = _thinned(front, len(front) // 2)
            self.work += len(total) * len(front)
            cost = (total.cost[:, None] + front.cost).ravel()
            score = (total.score[:, None] + front.score).ravel()
            keep = cost <= limit
            if worthless > -np.inf:
                rest = _at(_hull(fronts[k + 1 :]), np.maximum(limit - cost, 0))
                keep &= score + rest >= worthless - 1e-12 * abs(worthless)
            origin = functools.partial(_pair, total, front)
            pairs = Front(cost, score, origin, total.short + front.short)
            total = _efficient(_some(pairs, np.flatnonzero(keep)))
        return total

    def _nested(self, group: tuple[tuple[int, int], ...]) -> Front:
        """Take an item and, as they are then free, all after it: a group like the rows of one leaf."""
        numbers = tuple(i for i, _ in reversed(group))
        cost = np.array([0.0, *(self.price(rest) for _, rest in reversed(group))])
        score = np.concatenate([[0.0], np.cumsum(self.scores[list(numbers)])])
        return _efficient(Front(cost, score, lambda k: (numbers[:k], ())))

    def _in_order(self, group: tuple[tuple[int, int], ...]) -> Front:
        """Take items by score per cost, one after the other: quick, and maybe far from the best."""
        ranked = sorted(group, key=lambda item: -self.scores[item[0]] / self.price(item[1]))
        cost, paid = [0.0], 0
        for _, rest in ranked:
            paid |= rest
            cost.append(self.price(paid))
        numbers = tuple(i for i, _ in ranked)
        score = np.concatenate([[0.0], np.cumsum(self.scores[list(numbers)])])
        front = Front(np.array(cost), score, lambda k: (numbers[:k], ()), float(score[-1]))
        return _efficient(front)


def _together(own: Sequence[int], rest: Front, number: int) -> Origin:
    return own, [(rest, number)]


def _either(parts: Sequence[Front]) -> Front:
    """Return the front of all choices of some fronts."""
    which = [(part, i) for part in parts for i in range(len(part))]
    cost, score = (np.concatenate([getattr(part, name) for part in parts]) for name in ("cost", "score"))
    return _efficient(Front(cost, score, lambda k: ((), [which[k]]), max(part.short for part in parts)))


def _pair(a: Front, b: Front, number: int) -> Origin:
    i, j = divmod(number, len(b))
    return (), [(a, i), (b, j)]


def _some(front: Front, numbers: Any, short: float = 0.0) -> Front:
    """Return some choices of a front, the others being better by at most ``short``."""
    origin = front.origin
    return Front(front.cost[numbers], front.score[numbers], lambda k: origin(numbers[k]), front.short + short)


def _efficient(front: Front) -> Front:
    """Return the choices that are not beaten by a cheaper or equally cheap one."""
    order = np.lexsort((-front.score, front.cost))
    score = front.score[order]
    before = np.concatenate([[-np.inf], np.maximum.accumulate(score)])[:-1]
    front = _some(front, order[score > before])
    return front if len(front) <= LONGEST else _thinned(front, LONGEST)


def _thinned(front: Front, length: int) -> Front:
    """Return some choices, evenly spread over a front, the first and the last among them."""
    keep = np.unique(np.linspace(0, len(front) - 1, length).round().astype(int))
    gaps = front.score[keep[1:] - 1] - front.score[keep[:-1]]
    return _some(front, keep, float(gaps.max(initial=0.0)))


def _hull(fronts: Sequence[Front]) -> tuple[Any, Any]:
    """Return the costs and scores of spending, fraction by fraction, where it brings most."""
    costs, gains = [], []
    for front in fronts:
        points = [(0.0, 0.0)]
        for point in zip(front.cost.tolist(), front.score.tolist()):
            while len(points) > 1 and _turns_up(points[-2], points[-1], point):
                points.pop()
            if point[1] > points[-1][1]:
                points.append(point)
        for (a, b), (c, d) in itertools.pairwise(points):
            costs.append(c - a)
            gains.append(d - b)
    cost, gain = np.array([0.0, *costs]), np.array([0.0, *gains])
    order = np.argsort(-gain[1:] / cost[1:], kind="stable") + 1
    return np.cumsum(np.r_[0.0, cost[order]]), np.cumsum(np.r_[0.0, gain[order]])


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (c[1] - b[1]) * (b[0] - a[0]) >= (b[1] - a[1]) * (c[0] - b[0])


def _at(hull: tuple[Any, Any], cost: Any) -> Any:
    return np.interp(cost, *hull)
