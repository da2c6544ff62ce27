"""The schedules: the rates that they stand for, lengths left to ``fit``, and the plateau rule."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from fusemlp.describe.schedules import (
    PLATEAU_START,
    SCHEDULES,
    Constant,
    Cosine,
    Exponential,
    OneCycle,
    ReduceOnPlateau,
    Schedule,
    StepDecay,
    as_schedule,
    plateau_step,
    schedule_from_config,
)
from fusemlp_kernels import contract
from fusemlp_kernels.contract import ScheduleSpec
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError
from fusemlp_kernels.reference import learning_rate

EXAMPLES = [
    Constant(0.1),
    Constant(0.1, warmup=5),
    StepDecay(0.1, every=3, gamma=0.5),
    Exponential(0.1, gamma=0.9, warmup=0.25),
    Cosine(0.1),
    Cosine(0.1, final=0.01, steps=50),
    OneCycle(0.1),
    OneCycle(0.1, steps=20, peak_fraction=0.4, final=1e-5, warmup=2),
    ReduceOnPlateau(0.1, factor=0.5, patience=3, min_lr=1e-3, min_delta=0.0),
]


def rates(schedule: Schedule, total: int, updates: int | None = None) -> list[float]:
    spec = schedule.spec(total)
    return [learning_rate(spec, t) for t in range(total if updates is None else updates)]


def close(actual: list[float], expected: Any) -> None:
    """A handful of float64 operations apart."""
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-15)


def test_the_kinds_are_those_of_the_contract_and_the_plateau() -> None:
    assert tuple(SCHEDULES) == (*contract.SCHEDULES, "reduce_on_plateau")


def test_rates_by_hand() -> None:
    close(rates(Constant(0.1), 3), [0.1, 0.1, 0.1])
    close(rates(StepDecay(1.0, every=2), 5), [1.0, 1.0, 0.1, 0.1, 0.01])
    close(rates(Exponential(1.0, gamma=0.5), 4), [1.0, 0.5, 0.25, 0.125])
    close(rates(Cosine(1.0, final=0.5, steps=2), 4), [1.0, 0.75, 0.5, 0.5])


def test_a_cosine_ends_with_the_training() -> None:
    close(rates(Cosine(1.0), 4, 6), [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0, 0.0])


def test_warmup_stands_in_front_of_any_schedule() -> None:
    close(rates(Constant(1.0, warmup=4), 6), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    close(rates(Exponential(1.0, gamma=0.5, warmup=2), 5), [0.5, 1.0, 1.0, 0.5, 0.25])
    assert Cosine(1.0, warmup=10).spec(100) == ScheduleSpec("cosine", 1.0, steps=90, warmup=10)
    assert Cosine(1.0, warmup=10, steps=70).spec(100) == ScheduleSpec("cosine", 1.0, steps=70, warmup=10)


def test_warmup_may_be_a_share_of_the_training() -> None:
    assert Constant(1.0, warmup=0.1).spec(200).warmup == 20
    assert Cosine(1.0, warmup=0.1).spec(200) == ScheduleSpec("cosine", 1.0, steps=180, warmup=20)
    assert Constant(1.0, warmup=0.0).spec(None).warmup == 0


def test_a_training_shorter_than_its_warmup_only_warms_up() -> None:
    assert Cosine(1.0, warmup=10).spec(5).steps == 1
    close(rates(Cosine(1.0, warmup=10), 5), [0.1, 0.2, 0.3, 0.4, 0.5])


def test_schedules_equal_those_of_torch() -> None:
    import torch
    from torch.optim import lr_scheduler

    def torch_rates(make: Any, updates: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
        scheduler = make(optimizer)
        seen = []
        for update in range(updates):
            seen.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            if update < updates - 1:
                scheduler.step()
        return seen

    def same(schedule: Schedule, make: Any) -> None:
        np.testing.assert_allclose(rates(schedule, 40), torch_rates(make, 40), rtol=1e-9, atol=1e-12)

    same(StepDecay(0.3, every=7, gamma=0.2), lambda o: lr_scheduler.StepLR(o, step_size=7, gamma=0.2))
    same(Exponential(0.3, gamma=0.95), lambda o: lr_scheduler.ExponentialLR(o, gamma=0.95))
    same(Cosine(0.3, final=0.01), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.01))
    same(OneCycle(0.3), lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=40))
    same(
        OneCycle(0.3, peak_fraction=0.5),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=40, pct_start=0.5),
    )


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Cosine(0.1), "steps: None depends on the length of the training"),
        (OneCycle(0.1), "steps: None depends"),
        (Constant(0.1, warmup=0.5), "warmup: 0.5 depends"),
    ],
)
def test_a_length_that_nobody_knows_is_refused(schedule: Schedule, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        schedule.spec(None)


def test_lengths_that_are_given_need_no_fit() -> None:
    assert Cosine(0.1, steps=5, warmup=2).spec(None) == ScheduleSpec("cosine", 0.1, steps=5, warmup=2)
    assert StepDecay(0.1, every=5).spec(None) == ScheduleSpec("step", 0.1, steps=5, gamma=0.1)
    assert ReduceOnPlateau(0.1, warmup=3).spec(None) == ScheduleSpec("constant", 0.1, warmup=3)


def follow(schedule: ReduceOnPlateau, values: list[float]) -> list[float]:
    state, scales = PLATEAU_START, []
    for value in values:
        state = plateau_step(schedule, state, value)
        scales.append(state[2])
    return scales


def test_a_plateau_reduces_the_rate() -> None:
    schedule = ReduceOnPlateau(1.0, factor=0.5, patience=2, min_delta=0.1)
    # 0.95 is no improvement on 1.0 by more than 0.1; 0.8 is, and begins the count anew
    assert follow(schedule, [1.0, 0.95, 0.8, 0.8, 0.8, 0.8, 0.8]) == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_a_plateau_stops_at_the_lowest_rate() -> None:
    schedule = ReduceOnPlateau(0.5, factor=0.5, patience=1, min_lr=0.2)
    assert follow(schedule, [1.0, 1.0, 1.0, 1.0]) == [1.0, 0.5, 0.4, 0.4]


def test_nan_is_no_improvement() -> None:
    schedule = ReduceOnPlateau(1.0, factor=0.5, patience=2)
    assert follow(schedule, [math.nan, math.nan, 1.0]) == [1.0, 0.5, 0.5]
    assert plateau_step(schedule, PLATEAU_START, math.nan) == (math.inf, 1, 1.0)


def test_a_rate_of_zero_has_a_plateau_too() -> None:
    assert follow(ReduceOnPlateau(0.0, patience=1), [1.0, 1.0]) == [1.0, 0.1]


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_a_schedule_survives_json_and_repr(schedule: Schedule) -> None:
    config = schedule.to_config()
    assert json.loads(json.dumps(config)) == config
    assert schedule_from_config(config) == schedule
    assert hash(schedule_from_config(config)) == hash(schedule)
    assert eval(repr(schedule)) == schedule
    assert as_schedule("lr", schedule) is schedule


def test_a_number_is_a_constant() -> None:
    assert as_schedule("lr", 1) == as_schedule("lr", np.float64(1.0)) == Constant(1.0)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: as_schedule("rate", -1.0), ArgumentError, "rate: .*got -1.0"),
        (lambda: as_schedule("rate", True), ArgumentTypeError, "rate: .*got True"),
        (lambda: as_schedule("rate", "cosine"), ArgumentTypeError, "rate: .*got 'cosine'"),
        (lambda: Constant(math.nan), ArgumentError, "lr: .*got nan"),
        (lambda: Constant(0.1, warmup=-1), ArgumentError, "warmup: .*got -1"),
        (lambda: Constant(0.1, warmup=True), ArgumentTypeError, "warmup: .*got True"),
        (lambda: Constant(0.1, warmup=5.0), ArgumentError, "warmup: .*got 5.0; give an int"),
        (lambda: StepDecay(0.1, every=0), ArgumentError, "every: .*got 0"),
        (lambda: StepDecay(0.1, every=2.0), ArgumentTypeError, "every: .*got 2.0"),
        (lambda: StepDecay(0.1, every=2, gamma=0.0), ArgumentError, "gamma: .*got 0.0"),
        (lambda: Exponential(0.1, gamma=-0.5), ArgumentError, "gamma: .*got -0.5"),
        (lambda: Cosine(0.1, steps=0), ArgumentError, "steps: .*got 0"),
        (lambda: Cosine(0.1, final=-0.1), ArgumentError, "final: .*got -0.1"),
        (lambda: OneCycle(-0.1), ArgumentError, "peak: .*got -0.1"),
        (lambda: OneCycle(0.1, peak_fraction=1.0), ArgumentError, "peak_fraction: .*got 1.0"),
        (lambda: OneCycle(0.1, final=math.inf), ArgumentError, "final: .*got inf"),
        (lambda: ReduceOnPlateau(0.1, factor=1.0), ArgumentError, "factor: .*got 1.0"),
        (lambda: ReduceOnPlateau(0.1, patience=0), ArgumentError, "patience: .*got 0"),
        (lambda: ReduceOnPlateau(0.1, min_lr=0.2), ArgumentError, "min_lr: .*0.1, got 0.2"),
        (lambda: ReduceOnPlateau(0.1, min_delta=-1), ArgumentError, "min_delta: .*got -1"),
        (lambda: schedule_from_config({"kind": "cosin"}), ArgumentError, "did you mean 'cosine'"),
        (lambda: schedule_from_config({"kind": "constant"}), ArgumentError, "missing .'lr', 'warmup'."),
    ],
)
def test_impossible_schedules_are_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
