"""Judge models of a fleet that differ in their seed alone by their mean score."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusemlp.describe.metrics import rises

if TYPE_CHECKING:
    from fusemlp.fleet.results import Member

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

    @property
    def epochs(self) -> float:
        """The mean number of epochs of the members."""
        return sum(len(one.history.epochs) for one in self.members) / len(self.members)

    @property
    def status(self) -> str:
        """The status of the best member, or the number of members that diverged."""
        if 0 < self.diverged < len(self.members):
            return f"{self.diverged} diverged"
        return self.members[0].status

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
    return all("seed" in point for point in points) and any(len(point) > 1 for point in points)


def combinations(ranked: Sequence[Member], points: Mapping[int, Point], metric: str, second: str) -> list[Combination]:
    """Return the combinations of ``ranked``, the ended models from best to worst, the best mean of ``metric`` first.

    ``points`` has the parameters of all models by index. Combinations of which a larger share diverged come later,
    then those of which a smaller share has ended; means of ``second`` break ties. Without several seeds a combination
    is one model, in the order of ``ranked``.
    """
    if not averages(list(points.values())):
        return [Combination(points[one.index], (one,), 1) for one in ranked]
    found: dict[str, list[Member]] = {}
    for member in ranked:
        found.setdefault(_key(points[member.index]), []).append(member)
    models = Counter(map(_key, points.values()))
    made = [
        Combination({k: v for k, v in points[own[0].index].items() if k != "seed"}, tuple(own), models[key])
        for key, own in found.items()
    ]
    sign = -1.0 if rises(metric) else 1.0

    def place(one: Combination) -> tuple[float, float, float, float, int]:
        means = sign * one.mean(metric), one.mean(second)
        first, other = (value if math.isfinite(value) else math.inf for value in means)
        lacking = 1 - len(one.members) / one.models
        return one.diverged / len(one.members), lacking, first, other, min(member.index for member in one.members)

    return sorted(made, key=place)


def _key(point: Point) -> str:
    # A value may be a list, which has no hash.
    return repr(sorted((name, value) for name, value in point.items() if name != "seed"))
