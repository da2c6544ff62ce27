"""The schedules: the rates that they stand for, lengths left to ``fit``, and the plateau rule."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fusemlp.describe.schedules import (
    PLATEAU_START,
    SCHEDULES,
    Constant,
    Cosine,
    CosLog4,
    Exponential,
    FlatCosine,
    OneCycle,
    ReduceOnPlateau,
    Schedule,
    StepDecay,
    as_schedule,
    plateau_step,
    schedule_from_config,
)
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

EXAMPLES = [
    Constant(0.1),
    Constant(0.1, warmup=5),
    StepDecay(0.1, every=3, gamma=0.5),
    Exponential(0.1, gamma=0.9, warmup=0.25),
    Cosine(0.1),
    Cosine(0.1, final=0.01, steps=50),
    OneCycle(0.1),
    OneCycle(0.1, steps=20, peak_fraction=0.4, final=1e-5, warmup=2),
    FlatCosine(0.1, flat_fraction=0.5, final=0.01),
    CosLog4(0.1, warmup=2),
    ReduceOnPlateau(0.1, factor=0.5, patience=3, min_lr=1e-3, min_delta=0.0),
]


def rates(schedule, total, updates=None):
    found = schedule.over(total).rates(0, total if updates is None else updates).tolist()
    return found


def close(actual, expected):
    """A handful of float64 operations apart."""
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-15)


def test_rates_by_hand():
    close(rates(Constant(0.1), 3), [0.1, 0.1, 0.1])
    close(rates(StepDecay(1.0, every=2), 5), [1.0, 1.0, 0.1, 0.1, 0.01])
    close(rates(Exponential(1.0, gamma=0.5), 4), [1.0, 0.5, 0.25, 0.125])
    close(rates(Cosine(1.0, final=0.5, steps=2), 4), [1.0, 0.75, 0.5, 0.5])


def test_a_cosine_ends_with_the_training():
    close(rates(Cosine(1.0), 4, 6), [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0, 0.0])


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_flat_cosine_is_constant_and_then_a_cosine(share):
    found = rates(FlatCosine(0.3, flat_fraction=share, final=0.1), 40, 50)
    flat = int(40 * share)
    assert found[:flat] == [0.3] * flat
    close(found[flat:], rates(Cosine(0.3, final=0.1, steps=40 - flat), 50 - flat))
    # RealMLP's, as its paper writes it
    paper = [0.5 * (1.0 + math.cos(math.pi * (max(1.0, 2.0 * t / 40) - 1.0))) for t in range(40)]
    close(rates(FlatCosine(1.0, flat_fraction=0.5), 40), paper)


def test_coslog4_is_the_formula_of_its_paper():
    paper = [0.5 * (1.0 - math.cos(2.0 * math.pi * math.log2(1.0 + 15.0 * t / 150))) for t in range(150)]
    close(rates(CosLog4(1.0), 150), paper)
    # four waves: zeros where 1 + 15 t is a power of two, and the peaks between them
    close(CosLog4(0.5, steps=15).rates(0, 17).take([0, 1, 3, 7, 15, 16]).tolist(), [0.0] * 6)
    assert CosLog4(0.5, steps=15000).rates(0, 15000).max() == pytest.approx(0.5)


def test_warmup_stands_in_front_of_any_schedule():
    close(rates(Constant(1.0, warmup=4), 6), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    close(rates(Exponential(1.0, gamma=0.5, warmup=2), 5), [0.5, 1.0, 1.0, 0.5, 0.25])
    assert Cosine(1.0, warmup=10).over(100) == Cosine(1.0, steps=90, warmup=10)
    assert Cosine(1.0, warmup=10, steps=70).over(100) == Cosine(1.0, steps=70, warmup=10)


def test_warmup_may_be_a_share_of_the_training():
    assert Constant(1.0, warmup=0.1).over(200).warmup == 20
    assert Cosine(1.0, warmup=0.1).over(200) == Cosine(1.0, steps=180, warmup=20)
    assert Constant(1.0, warmup=0.0).over(None).warmup == 0


def test_a_training_shorter_than_its_warmup_only_warms_up():
    assert Cosine(1.0, warmup=10).over(5).steps == 1
    close(rates(Cosine(1.0, warmup=10), 5), [0.1, 0.2, 0.3, 0.4, 0.5])


def torch_rates(make, updates):
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    seen = []
    for update in range(updates):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if update < updates - 1:
            scheduler.step()
    return seen


LENGTH = 40
PEERS = {
    "constant": (Constant(0.3), lambda torch, o: torch.LambdaLR(o, lambda t: 1.0)),
    "step": (StepDecay(0.3, every=7, gamma=0.2), lambda torch, o: torch.StepLR(o, step_size=7, gamma=0.2)),
    "exponential": (Exponential(0.3, gamma=0.95), lambda torch, o: torch.ExponentialLR(o, gamma=0.95)),
    "cosine": (Cosine(0.3, final=0.01), lambda torch, o: torch.CosineAnnealingLR(o, T_max=LENGTH, eta_min=0.01)),
    **{
        f"one_cycle {share}": (
            OneCycle(0.3, peak_fraction=share),
            lambda torch, o, share=share: torch.OneCycleLR(
                o, max_lr=0.3, total_steps=LENGTH, pct_start=share, cycle_momentum=False
            ),
        )
        for share in (0.3, 0.33, 0.5, 0.01, 0.99)
    },
}


@pytest.mark.parametrize("name", PEERS)
def test_schedules_equal_those_of_torch(name):
    schedule, make = PEERS[name]
    np.testing.assert_allclose(rates(schedule, LENGTH), torch_rates(make, LENGTH), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PEERS)
def test_a_warm_up_rises_linearly_and_delays_the_schedule(name):
    schedule = PEERS[name][0].over(LENGTH)
    warm = replace(schedule, warmup=5)
    close(warm.rates(0, 5).tolist(), [schedule.at(0) * (t + 1) / 5 for t in range(5)])
    assert warm.rates(5, 60).tobytes() == schedule.rates(0, 60).tobytes()


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_annealed_rates_stay_at_the_final_value(steps):
    """Past the end too, where a table is filled ahead."""
    for share in (0.01, 0.3, 0.5, 0.99):
        for schedule in (
            Cosine(0.3, final=0.01, steps=steps),
            OneCycle(0.3, steps=steps, peak_fraction=share, final=0.01),
        ):
            assert (schedule.rates(0, steps) > 0.0).all() and (schedule.rates(0, steps) <= 0.3).all()
            close(schedule.rates(steps, 5).tolist(), [0.01] * 5)


@pytest.mark.parametrize("name", PEERS)
def test_a_rate_does_not_depend_on_the_table_that_it_stands_in(name):
    schedule = replace(PEERS[name][0], warmup=3).over(LENGTH)
    whole = schedule.rates(0, 100)
    for first, count in ((0, 1), (2, 3), (7, 41), (99, 1)):
        assert schedule.rates(first, count).tobytes() == whole[first : first + count].tobytes()
    assert [schedule.at(t) for t in range(100)] == whole.tolist()


def test_rates_too_large_for_a_float_are_no_error_ahead_of_the_training():
    assert Exponential(0.5, gamma=10.0).rates(300, 50)[-1] > 1e307
    assert (Exponential(0.0, gamma=10.0).rates(300, 50) == 0.0).all()


@dataclass(frozen=True)
class InverseRoot(Schedule):
    """A schedule of a user's own."""

    kind = "inverse_root"
    lr: float
    shift: int = 1

    def after_warmup(self, t):
        return self.lr / np.sqrt(self.shift + t)


def test_a_function_of_ones_own_is_a_schedule(monkeypatch):
    schedule = InverseRoot(0.5, warmup=2)
    close(rates(schedule, 5), [0.25, 0.5, 0.5, 0.5 / math.sqrt(2.0), 0.5 / math.sqrt(3.0)])
    # a README's snippet, run in the same process, enters one of this name
    monkeypatch.delitem(SCHEDULES, "inverse_root", raising=False)
    with pytest.raises(ArgumentError, match="'inverse_root'"):
        schedule_from_config(schedule.to_config())
    monkeypatch.setitem(SCHEDULES, "inverse_root", InverseRoot)
    assert schedule_from_config(schedule.to_config()) == schedule


@pytest.mark.parametrize(("shift", "update"), [(-3, 0), (0, 0)])
def test_a_rate_that_is_no_rate_names_its_update(shift, update):
    schedule = InverseRoot(0.0 if shift == 0 else 0.5, shift=shift)
    with pytest.raises(ArgumentError, match=rf"lr: InverseRoot.* gave the rate nan after {update} updates"):
        schedule.rates(0, 8)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Cosine(0.1), "steps: None depends on the length of the training"),
        (OneCycle(0.1), "steps: None depends"),
        (Constant(0.1, warmup=0.5), "warmup: 0.5 depends"),
    ],
)
def test_a_length_that_nobody_knows_is_refused(schedule, words):
    with pytest.raises(ArgumentError, match=words):
        schedule.over(None)


def test_lengths_that_are_given_need_no_fit():
    for schedule in (Cosine(0.1, steps=5, warmup=2), StepDecay(0.1, every=5), ReduceOnPlateau(0.1, warmup=3)):
        assert schedule.over(None) == schedule


def follow(schedule, values):
    state, scales = PLATEAU_START, []
    for value in values:
        state = plateau_step(schedule, state, value)
        scales.append(state[2])
    return scales


def test_a_plateau_reduces_the_rate():
    schedule = ReduceOnPlateau(1.0, factor=0.5, patience=2, min_delta=0.1)
    # 0.95 is no improvement on 1.0 by more than 0.1; 0.8 is, and begins the count anew
    assert follow(schedule, [1.0, 0.95, 0.8, 0.8, 0.8, 0.8, 0.8]) == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_a_plateau_stops_at_the_lowest_rate():
    schedule = ReduceOnPlateau(0.5, factor=0.5, patience=1, min_lr=0.2)
    assert follow(schedule, [1.0, 1.0, 1.0, 1.0]) == [1.0, 0.5, 0.4, 0.4]


def test_nan_is_no_improvement():
    schedule = ReduceOnPlateau(1.0, factor=0.5, patience=2)
    assert follow(schedule, [math.nan, math.nan, 1.0]) == [1.0, 0.5, 0.5]
    assert plateau_step(schedule, PLATEAU_START, math.nan) == (math.inf, 1, 1.0)


def test_a_rate_of_zero_has_a_plateau_too():
    assert follow(ReduceOnPlateau(0.0, patience=1), [1.0, 1.0]) == [1.0, 0.1]


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_a_schedule_survives_json_and_repr(schedule):
    config = schedule.to_config()
    assert json.loads(json.dumps(config)) == config
    assert schedule_from_config(config) == schedule
    assert hash(schedule_from_config(config)) == hash(schedule)
    assert eval(repr(schedule)) == schedule
    assert as_schedule("lr", schedule) is schedule


def test_a_number_is_a_constant():
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
        (lambda: Exponential(0.1, gamma=0.0), ArgumentError, "gamma: .*above 0, got 0.0"),
        (lambda: Exponential(0.1, gamma=-0.5), ArgumentError, "gamma: .*got -0.5"),
        (lambda: Cosine(0.1, steps=0), ArgumentError, "steps: .*got 0"),
        (lambda: Cosine(0.1, final=-0.1), ArgumentError, "final: .*got -0.1"),
        (lambda: OneCycle(-0.1), ArgumentError, "peak: .*got -0.1"),
        (lambda: OneCycle(0.1, peak_fraction=1.0), ArgumentError, "peak_fraction: .*got 1.0"),
        (lambda: OneCycle(0.1, final=math.inf), ArgumentError, "final: .*got inf"),
        (lambda: ReduceOnPlateau(0.1, factor=1.0), ArgumentError, "factor: .*got 1.0"),
        (lambda: ReduceOnPlateau(0.1, patience=0), ArgumentError, "patience: .*got 0"),
        (lambda: ReduceOnPlateau(0.1, min_lr=0.2), ArgumentError, "min_lr: .*at most lr.*0.1, got 0.2"),
        (lambda: ReduceOnPlateau(0.1, min_delta=-1), ArgumentError, "min_delta: .*got -1"),
        (lambda: schedule_from_config({"kind": "cosin"}), ArgumentError, "did you mean 'cosine'"),
        (lambda: schedule_from_config({"kind": "constant"}), ArgumentError, "missing .'lr', 'warmup'."),
    ],
)
def test_impossible_schedules_are_refused(make, error, words):
    with pytest.raises(error, match=words) as caught:
        make()
    assert caught.type is error
