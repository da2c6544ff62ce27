"""Models of a fleet trained by other processes, which keep their parameters and histories."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fusemlp.fleet.devices import trained_on
from fusemlp.fleet.elsewhere import trained_elsewhere
from fusemlp.fleet.memory import Kept
from fusemlp.fleet.results import Member
from fusemlp.inputs.arrays import Array
from fusemlp.runtime.backends import one_thread
from fusemlp.runtime.plans import shares_launches

if TYPE_CHECKING:
    from fusemlp.engine import Engine
    from fusemlp.fleet.fleet import Fleet
    from fusemlp.inputs.targets import Examples
    from fusemlp.training.plan import FitPlan


def trained_apart(
    fleet: Fleet,
    plan: FitPlan,
    data: Examples,
    held: Examples | None,
    *,
    workers: str | None,
    jobs: int | None,
    **rows: Any,
) -> Generator[Member, None, None]:
    """Yield each model of a fleet when it has ended, in any order, trained on ``data`` and validated on ``held``.

    ``workers`` train it, ``jobs`` tasks at once, or without these the fleet's cards. ``rows``: those of each model.
    """
    first, untrained = fleet.first, copy(fleet)
    # its parts build their own, on the backend that they shall have
    untrained._built, untrained._groups, untrained._devices = [], None, ()
    options = {name: getattr(plan, name) for name in ("epochs", "metrics", "early_stopping", "monitor", "drop_last")}
    task = partial(_train_part, untrained, **options, **rows)
    sent = [*_arrays(first, data), *_arrays(first, held)]
    if workers is not None:
        return trained_elsewhere(len(fleet), task, sent, workers=workers, jobs=jobs)
    # of the process, which sees one
    untrained._machine = {**fleet._machine, "device": None}
    together = shares_launches(first.memory.backend.traits)
    return trained_on(fleet._devices, len(fleet), task, sent, together=together)


def _train_part(
    whole: Fleet,
    numbers: Sequence[int],
    X: Array,
    y: Array,
    weight: Array | None,
    *validation: Array | None,
    rows: Sequence[Array] | None,
    validation_rows: Sequence[Array] | None,
    **options: Any,
) -> list[Member]:
    """Train the models of some numbers on one core, or on the default card; without numbers try the latter."""
    fleet = whole.part(numbers or [0])
    if not numbers:
        return []
    if rows is not None:
        options["rows"] = [rows[number] for number in numbers]
    if validation_rows is not None:
        options["validation_rows"] = [validation_rows[number] for number in numbers]
    elif validation[0] is not None:
        options["validation_data"] = validation
    with one_thread():
        found = fleet.fit(X, y, sample_weight=weight, jobs=1, **options).members
    kept = (
        one.held if isinstance(one.held, Kept) else Kept.of(one.held, candidate, fleet._machine)
        for one, candidate in zip(found, fleet.candidates, strict=True)
    )
    return [replace(one, index=number, held=held) for one, number, held in zip(found, numbers, kept, strict=True)]


def _arrays(engine: Engine, data: Examples | None) -> tuple[Array | None, Array | None, Array | None]:
    """Return X, y and weight on the host."""
    if data is None:
        return None, None, None
    X, targets, weight = data.map(engine.inputs.on_host)
    return X, targets.values, weight
