"""Judge the models of a sweep that differ in their seed alone by their mean score."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusemlp.describe.metrics import rises
from fusemlp.fleet.results import FleetResults, Member

Point = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Combination:
    """Models that differ in their seed alone: ``members`` have ended, best first, of ``models`` in all."""

    parameters: Point
    members: tuple[Member, ...]
    models: int

    @property
    def sound(self) -> tuple[Member, ...]:
        """The members that did not diverge, or all if there are none."""
        return tuple(one for one in self.members if one.status != "diverged") or self.members

    @property
    def diverged(self) -> int:
        return sum(one.status == "diverged" for one in self.members)

    def scores(self, name: str) -> list[float]:
        """Return the finite values of a score, of the members that did not diverge."""
        values = (one.scores.get(name, math.nan) for one in self.members if one.status != "diverged")
        return [value for value in values if math.isfinite(value)]

    def mean(self, name: str) -> float:
        """Return the mean of ``scores``, NaN if there are none."""
        values = self.scores(name)
        return math.fsum(values) / len(values) if values else math.nan

    def spread(self, name: str) -> float:
        """Return the standard deviation of ``scores``, of a sample; NaN for fewer than two."""
        values, mean = self.scores(name), self.mean(name)
        if len(values) < 2:
            return math.nan
        return math.hypot(*(value - mean for value in values)) / math.sqrt(len(values) - 1)


def averages(points: Sequence[Point]) -> bool:
    """Return whether models are judged by a mean: they differ in the seed and in something else."""
    return "seed" in points[0] and len(points[0]) > 1


def combinations(members: Collection[Member], points: Sequence[Point], metric: str) -> list[Combination]:
    """Return the combinations of the ended models, the best mean of ``metric`` first.

    Combinations of which a larger share diverged come later, then those of which a smaller share has ended; means of
    the default metric break ties. Without several seeds a combination is one model, in the order of its own scores.
    """
    results = FleetResults(tuple(members))
    ranked = results.ranked(metric)
    if not averages(points):
        return [Combination(points[one.index], (one,), 1) for one in ranked]
    found: dict[tuple[Any, ...], list[Member]] = {}
    for member in ranked:
        found.setdefault(_key(points[member.index]), []).append(member)
    models: dict[tuple[Any, ...], int] = {}
    for point in points:
        models[_key(point)] = models.get(_key(point), 0) + 1
    made = [
        Combination({k: v for k, v in points[own[0].index].items() if k != "seed"}, tuple(own), models[key])
        for key, own in found.items()
    ]
    sign, second = -1.0 if rises(metric) else 1.0, results.metric

    def place(one: Combination) -> tuple[float, float, float, float, int]:
        means = sign * one.mean(metric), one.mean(second)
        first, other = (value if math.isfinite(value) else math.inf for value in means)
        lacking = 1 - len(one.members) / one.models
        return one.diverged / len(one.members), lacking, first, other, min(member.index for member in one.members)

    return sorted(made, key=place)


def _key(point: Point) -> tuple[Any, ...]:
    return tuple(value for name, value in point.items() if name != "seed")
