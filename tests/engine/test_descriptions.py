"""The descriptions of losses, optimizers and schedules: what they hand to the kernels, their rates, and refusals."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from fusemlp.cli.session import without_gone
from fusemlp.describe.losses import (
    LOSSES,
    MAE,
    MSE,
    BinaryCrossEntropy,
    CrossEntropy,
    Huber,
    Loss,
    Poisson,
    Quantile,
    as_loss,
)
from fusemlp.describe.network import MLP, PReLU
from fusemlp.describe.optimizers import (
    PLATEAU_START,
    SCHEDULES,
    SGD,
    Adam,
    AdamW,
    Constant,
    Cosine,
    Exponential,
    OneCycle,
    Optimizer,
    ParameterOptions,
    ReduceOnPlateau,
    Schedule,
    StepDecay,
    as_optimizer,
    as_schedule,
    plateau_step,
)
from fusemlp_kernels import contract
from fusemlp_kernels.contract import LossSpec, TensorRule, UpdateRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, ShapeError

EXAMPLES = {
    as_schedule: [
        Constant(0.1),
        Constant(0.1, warmup=5),
        StepDecay(0.1, every=3, gamma=0.5),
        Exponential(0.1, gamma=0.9, warmup=0.25),
        Cosine(0.1),
        Cosine(0.1, final=0.01, steps=50),
        OneCycle(0.1),
        OneCycle(0.1, steps=20, peak_fraction=0.4, final=1e-5, warmup=2),
        ReduceOnPlateau(0.1, factor=0.5, patience=3, min_lr=1e-3, min_delta=0.0),
    ],
    as_optimizer: [
        SGD(0.1),
        SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, convention="scikit-learn"),
        SGD(Cosine(0.1, warmup=5), clip_norm=1.0, accumulate=4, decay_biases=False),
        Adam(betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, convention="scikit-learn"),
        AdamW(
            StepDecay(1e-3, every=10),
            per_parameter={"0.*": ParameterOptions(trainable=False), "*": ParameterOptions(lr_factor=0.5)},
        ),
    ],
    as_loss: [
        CrossEntropy(),
        CrossEntropy(label_smoothing=0.1, class_weight=[1, 0, 2.5], ignore_index=-100, reduction="sum"),
        BinaryCrossEntropy(reduction="sum"),
        MSE(),
        MAE(),
        Huber(0.5),
        Poisson(),
        Quantile(0.9, reduction="sum"),
    ],
}
FROM_CONFIG = {as_schedule: Schedule.from_config, as_optimizer: Optimizer.from_config, as_loss: Loss.from_config}


@pytest.mark.parametrize(
    "kind, described",
    [(kind, one) for kind in EXAMPLES for one in EXAMPLES[kind]],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_a_description_survives_json_and_repr(kind, described):
    config = described.to_config()
    assert json.loads(json.dumps(config)) == config
    again = FROM_CONFIG[kind](config)
    assert again == described and hash(again) == hash(described)
    assert eval(repr(described)) == described
    assert (kind("lr", described) if kind is as_schedule else kind(described)) is described


def fits(loss, outputs, activation="identity"):
    as_loss(loss).check_network(MLP([2, outputs], output_activation=activation))


REFUSED = {
    ArgumentError: [
        (lambda: as_schedule("rate", -1.0), "rate: .*got -1.0"),
        (lambda: Constant(math.nan), "lr: .*got nan"),
        (lambda: Constant(0.1, warmup=-1), "warmup: .*got -1"),
        (lambda: Constant(0.1, warmup=5.0), "warmup: .*got 5.0; give an int"),
        (lambda: StepDecay(0.1, every=0), "every: .*got 0"),
        (lambda: StepDecay(0.1, every=2, gamma=0.0), "gamma: .*got 0.0"),
        (lambda: Exponential(0.1, gamma=0.0), "gamma: .*above 0, got 0.0"),
        (lambda: Cosine(0.1, steps=0), "steps: .*got 0"),
        (lambda: Cosine(0.1, final=-0.1), "final: .*got -0.1"),
        (lambda: OneCycle(-0.1), "peak: .*got -0.1"),
        (lambda: OneCycle(0.1, peak_fraction=1.0), "peak_fraction: .*got 1.0"),
        (lambda: OneCycle(0.1, final=math.inf), "final: .*got inf"),
        (lambda: ReduceOnPlateau(0.1, factor=1.0), "factor: .*got 1.0"),
        (lambda: ReduceOnPlateau(0.1, patience=0), "patience: .*got 0"),
        (lambda: ReduceOnPlateau(0.1, min_lr=0.2), "min_lr: .*at most lr.*0.1, got 0.2"),
        (lambda: ReduceOnPlateau(0.1, min_delta=-1), "min_delta: .*got -1"),
        (lambda: Schedule.from_config({"kind": "cosin"}), "did you mean 'cosine'"),
        (lambda: Schedule.from_config({"kind": "constant"}), "missing .'lr', 'warmup'."),
        (lambda: SGD(lr=-0.1), "lr: .*at least 0, got -0.1"),
        (lambda: SGD(momentum=1.0), "momentum: .*below 1, got 1.0"),
        (lambda: SGD(nesterov=True), "nesterov: True needs momentum > 0.*try momentum=0.9"),
        (lambda: SGD(weight_decay=-1e-4), "weight_decay: .*got -0.0001"),
        (lambda: SGD(convention="sklearn"), "convention: .*did you mean 'scikit-learn'"),
        (lambda: SGD(clip_norm=0.0), "clip_norm: .*above 0, got 0.0"),
        (lambda: SGD(accumulate=2**63), "accumulate: .*at most 9223372036854775807, got"),
        (lambda: Adam(betas=(0.9, 1.0)), r"betas\[1\]: .*got 1.0"),
        (lambda: Adam(betas=(0.9,)), r"betas: .*two numbers.*\(0\.9, 0\.999\), got \(0\.9,\)"),
        (lambda: Adam(eps=0.0), "eps: .*got 0.0"),
        (lambda: AdamW(weight_decay=math.inf), "weight_decay: .*got inf"),
        (lambda: ParameterOptions(lr_factor=-1), "lr_factor: .*got -1"),
        (lambda: ParameterOptions(weight_decay=-1), "weight_decay: .*got -1"),
        (lambda: as_optimizer("adm"), "optimizer: unknown name 'adm'; did you mean 'adam'"),
        (lambda: MSE(reduction="none"), "reduction: unknown name 'none'.*mean, sum"),
        (lambda: CrossEntropy(label_smoothing=1.1), "label_smoothing: .*got 1.1"),
        (lambda: CrossEntropy(class_weight=[1, -1]), r"class_weight\[1\]: .*got -1"),
        (lambda: CrossEntropy(class_weight=[0, 0]), r"class_weight: .*got \[0.0, 0.0\]"),
        (lambda: CrossEntropy(class_weight={0: 1, 2: 1}), r"class_weight: .*from 0 on.*got \[0, 2\]"),
        (lambda: Huber(delta=0.0), "delta: .*above 0, got 0.0"),
        (lambda: Quantile(q=1), "q: .*below 1, got 1"),
        (lambda: as_loss("cross_entrpy"), "loss: unknown name 'cross_entrpy'; did you mean 'cross_entropy'"),
        (lambda: Loss.from_config({"kind": "mse"}), r"loss: .*missing \['reduction'\]"),
        (lambda: Loss.from_config({"kind": "mse", "reduction": "mean", "delta": 1.0}), r"loss: .*unknown \['delta'\]"),
        (lambda: Optimizer.from_config({**SGD(0.1).to_config(), "rho": 0.9}), r"optimizer: .*unknown .*'rho'"),
        (lambda: Optimizer.from_config({"kind": "sgd"}), r"optimizer: .*missing \['accumulate'"),
        (lambda: MSE().spec(accuracy=False, soft=True), r"soft: only cross_entropy .*not mse"),
        (lambda: CrossEntropy(ignore_index=1).spec(accuracy=False, soft=True), "ignore_index: 1 is a class index"),
        (lambda: fits("cross_entropy", 3, "sigmoid"), "^output_act.*logits.*got 'sigmoid'"),
        (lambda: fits("binary_cross_entropy", 1, "sigmoid"), "logits"),
        (lambda: fits("poisson", 1, "relu"), "logarithm of the mean"),
        (lambda: fits("cross_entropy", 1), "at least 2 outputs.*use binary_cross_entropy"),
        (lambda: Cosine(0.1).over(None), "steps: None depends on the length of the training"),
        (lambda: Constant(0.1, warmup=0.5).over(None), "warmup: 0.5 depends"),
    ],
    ArgumentTypeError: [
        (lambda: as_schedule("rate", True), "rate: .*got True"),
        (lambda: SGD(lr="0.1"), r"lr: .*schedule such as Cosine\(0\.1\), got '0.1'"),
        (lambda: SGD(lr=None), "lr: .*got None"),
        (lambda: SGD(nesterov=1, momentum=0.9), "nesterov: .*got 1"),
        (lambda: SGD(decay_biases=None), "decay_biases: .*got None"),
        (lambda: SGD(per_parameter={"0.*": 0.1}), "per_parameter: .*ParameterOptions.*got .'0.*', 0.1"),
        (lambda: SGD(per_parameter="0.*"), "per_parameter: .*got '0.*'"),
        (lambda: Adam(betas=0.9), "betas: .*got 0.9"),
        (lambda: AdamW(betas=("a", 0.9)), r"betas\[0\]: .*got 'a'"),
        (lambda: ParameterOptions(trainable=0), "trainable: .*got 0"),
        (lambda: as_optimizer(SGD), r"optimizer: .*SGD\(lr=0\.1\), got <class"),
        (lambda: CrossEntropy(ignore_index=1.0), "ignore_index: .*got 1.0"),
        (lambda: CrossEntropy(ignore_index=True), "ignore_index: .*got True"),
        (lambda: CrossEntropy(class_weight="balanced"), "class_weight: .*got 'balanced'"),
        (lambda: as_loss(MSE), r"loss: .*MSE\(\), .*got <class"),
        (lambda: Loss.from_config({}), "loss: .*"),
    ],
    ShapeError: [(lambda: fits(CrossEntropy(class_weight=[1, 1]), 3), "class_weight: expected 3 weights.*got 2")],
}


@pytest.mark.parametrize(("error", "make", "words"), [(error, *row) for error in REFUSED for row in REFUSED[error]])
def test_impossible_descriptions_are_refused(error, make, words):
    with pytest.raises(error, match=words) as caught:
        make()
    assert caught.type is error


def test_names_stand_for_the_defaults():
    assert as_optimizer("sgd") == SGD(0.01)
    assert as_optimizer("adam") == Adam(1e-3)
    assert as_optimizer("adamw") == AdamW(1e-3, weight_decay=0.01)
    assert SGD(0.5).schedule == Constant(0.5) == as_schedule("lr", np.float64(0.5))
    assert as_schedule("lr", 1) == Constant(1.0)
    assert tuple(LOSSES) == (*contract.LOSSES, "quantiles", "gaussian")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (SGD(0.1).rule(), UpdateRule("sgd")),
        (SGD(Constant(0.5)).rule(), UpdateRule("sgd")),
        (
            SGD(0.1, momentum=0.9, nesterov=True, convention="scikit-learn").rule(),
            UpdateRule("sgd", momentum=0.9, nesterov=True, convention="scikit-learn"),
        ),
        (SGD(1, clip_norm=2, accumulate=3).rule(), UpdateRule("sgd", clip_norm=2.0, accumulate=3)),
        (Adam(betas=(0.8, 0.9), eps=1e-6).rule(), UpdateRule("adam", beta1=0.8, beta2=0.9, eps=1e-6)),
        (AdamW().rule(), UpdateRule("adam", decoupled=True)),
        *((as_loss(name).spec(accuracy=False), LossSpec(name)) for name in contract.LOSSES),
        (
            CrossEntropy(label_smoothing=0.1, ignore_index=3, class_weight=[1, 2]).spec(accuracy=False),
            LossSpec("cross_entropy", label_smoothing=0.1, ignore_index=3),
        ),
        (BinaryCrossEntropy(reduction="sum").spec(accuracy=False), LossSpec("binary_cross_entropy", reduction="sum")),
        (Huber(2).spec(accuracy=False), LossSpec("huber", delta=2.0)),
        (Quantile(0.9).spec(accuracy=False), LossSpec("quantile", quantile=0.9)),
        (CrossEntropy().spec(accuracy=True, soft=True), LossSpec("cross_entropy", accuracy=True, soft=True)),
    ],
)
def test_options_reach_the_kernels(rule, expected):
    assert rule == expected


def test_weight_decay_applies_to_every_parameter_unless_told_otherwise():
    decayed = (True, TensorRule(1.0, 0.1))
    free = (True, TensorRule(1.0, 0.0))
    names = ["0.weight", "0.bias", "1.weight"]
    assert [SGD(weight_decay=0.1).options_for(name) for name in names] == [decayed, decayed, decayed]
    without = SGD(weight_decay=0.1, decay_biases=False)
    # 1.weight is the slope of a PReLU behind layer 0
    assert [without.options_for(name) for name in names] == [decayed, free, free]
    assert without.options_for("10.weight") == decayed


def test_the_first_matching_pattern_decides():
    optimizer = AdamW(
        weight_decay=0.1,
        decay_biases=False,
        per_parameter={
            "0.bias": ParameterOptions(weight_decay=0.3),
            "0.*": ParameterOptions(trainable=False, lr_factor=2),
            "*.weight": ParameterOptions(lr_factor=0.5, weight_decay=0.0),
        },
    )
    # what is asked for by name goes before decay_biases
    assert optimizer.options_for("0.bias") == (True, TensorRule(1.0, 0.3))
    assert optimizer.options_for("0.weight") == (False, TensorRule(2.0, 0.1))
    assert optimizer.options_for("2.weight") == (True, TensorRule(0.5, 0.0))
    assert optimizer.options_for("2.bias") == (True, TensorRule(1.0, 0.0))


def test_a_pattern_that_matches_nothing_is_refused():
    net = MLP([3, 2, 1], activation=PReLU())
    SGD(per_parameter={"1.weight": ParameterOptions(), "*.bias": ParameterOptions()}).check_network(net)
    with pytest.raises(ArgumentError, match=r"no parameter matches '3\.\*'; the network has: 0\.weight, 0\.bias, 1\."):
        SGD(per_parameter={"*": ParameterOptions(), "3.*": ParameterOptions()}).check_network(net)


def test_numpy_numbers_become_plain_ones():
    optimizer = SGD(np.float64(0.1), momentum=np.float64(0.5), accumulate=np.int64(2), nesterov=np.True_)
    assert optimizer == SGD(0.1, momentum=0.5, accumulate=2, nesterov=True)
    assert json.loads(json.dumps(optimizer.to_config())) == optimizer.to_config()


def test_class_weights_may_come_in_several_forms():
    expected = (1.0, 2.0)
    for given in ([1, 2], (1.0, 2.0), np.array([1, 2]), {1: 2, 0: 1}):
        assert CrossEntropy(class_weight=given).class_weight == expected
    assert CrossEntropy().class_weight is None
    assert MSE().class_weight is None


def test_networks_that_fit():
    for loss in ("mse", "mae", "huber", "quantile"):
        fits(loss, 1, "sigmoid")
    for loss in ("binary_cross_entropy", "poisson"):
        fits(loss, 1)
    fits(CrossEntropy(class_weight=[1, 0, 2], ignore_index=7), 3)


def rates(schedule, total, updates=None):
    return schedule.over(total).rates(0, total if updates is None else updates).tolist()


def close(actual, expected):
    """A handful of float64 operations apart."""
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", [{"kind": "coslog4"}, {"kind": "flat_cosine", "final": 0.0, "flat_fraction": 0.75}])
def test_a_schedule_that_is_gone_is_read_as_a_cosine(kind):
    """From a checkpoint, which predicts, and may go on, and from the options of a run of several models."""
    optimizer = Adam(Cosine(0.1, steps=40, warmup=2))
    config, said = optimizer.to_config(), rf"^lr: {kind['kind']} is gone; a training that goes on has a cosine"
    with pytest.warns(UserWarning, match=said):
        assert Optimizer.from_config({**config, "lr": {**kind, "lr": 0.1, "steps": 40, "warmup": 2}}) == optimizer
    with pytest.warns(UserWarning, match=said):
        assert without_gone({"schedule": kind["kind"], "devices": None}) == {"schedule": "cosine"}


def test_what_the_warm_up_leaves_are_the_steps_of_the_schedule():
    # a training that is shorter than the warm-up
    assert Cosine(1.0, warmup=10).over(5).steps == 1
    close(rates(Cosine(1.0, warmup=10), 5), [0.1, 0.2, 0.3, 0.4, 0.5])
    assert Cosine(1.0, warmup=10).over(100) == Cosine(1.0, steps=90, warmup=10)
    assert Cosine(1.0, warmup=10, steps=70).over(100) == Cosine(1.0, steps=70, warmup=10)
    # it may be a share of the training
    assert Constant(1.0, warmup=0.1).over(200).warmup == 20
    assert Cosine(1.0, warmup=0.1).over(200) == Cosine(1.0, steps=180, warmup=20)
    assert Constant(1.0, warmup=0.0).over(None).warmup == 0


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
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler, expected = make(torch.optim.lr_scheduler, optimizer), []
    for _ in range(LENGTH):
        expected.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if len(expected) < LENGTH:
            scheduler.step()
    np.testing.assert_allclose(rates(schedule, LENGTH), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PEERS)
def test_a_warm_up_rises_linearly_and_delays_the_schedule(name):
    schedule = PEERS[name][0].over(LENGTH)
    warm = replace(schedule, warmup=5)
    close(warm.rates(0, 5).tolist(), [schedule.at(0) * (t + 1) / 5 for t in range(5)])
    assert warm.rates(5, 60).tobytes() == schedule.rates(0, 60).tobytes()
    # a rate does not depend on the table that it stands in
    whole = warm.rates(0, 100)
    for first, count in ((0, 1), (2, 3), (7, 41), (99, 1)):
        assert warm.rates(first, count).tobytes() == whole[first : first + count].tobytes()
    assert [warm.at(t) for t in range(100)] == whole.tolist()


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_annealed_rates_stay_at_the_final_value(share, steps):
    """Past the end too, where a table is filled ahead."""
    one_cycle = OneCycle(0.3, steps=steps, peak_fraction=share, final=0.01)
    for schedule in (Cosine(0.3, final=0.01, steps=steps), one_cycle):
        assert (schedule.rates(0, steps) > 0.0).all() and (schedule.rates(0, steps) <= 0.3).all()
        close(schedule.rates(steps, 5).tolist(), [0.01] * 5)


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
        Schedule.from_config(schedule.to_config())
    monkeypatch.setitem(SCHEDULES, "inverse_root", InverseRoot)
    assert Schedule.from_config(schedule.to_config()) == schedule


@pytest.mark.parametrize(("shift", "update"), [(-3, 0), (0, 0)])
def test_a_rate_that_is_no_rate_names_its_update(shift, update):
    schedule = InverseRoot(0.0 if shift == 0 else 0.5, shift=shift)
    with pytest.raises(ArgumentError, match=rf"lr: InverseRoot.* gave the rate nan after {update} updates"):
        schedule.rates(0, 8)


def test_lengths_that_are_given_need_no_fit():
    for schedule in (Cosine(0.1, steps=5, warmup=2), StepDecay(0.1, every=5), ReduceOnPlateau(0.1, warmup=3)):
        assert schedule.over(None) == schedule


@pytest.mark.parametrize(
    ("options", "values", "scales"),
    [
        # 0.95 is no improvement on 1.0 by more than 0.1; 0.8 is, and begins the count anew
        (
            {"lr": 1.0, "patience": 2, "min_delta": 0.1},
            [1.0, 0.95, 0.8, 0.8, 0.8, 0.8, 0.8],
            [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25],
        ),
        ({"lr": 0.5, "patience": 1, "min_lr": 0.2}, [1.0] * 4, [1.0, 0.5, 0.4, 0.4]),
        ({"lr": 1.0, "patience": 2}, [math.nan, math.nan, 1.0], [1.0, 0.5, 0.5]),
        ({"lr": 0.0, "patience": 1, "factor": 0.1}, [1.0, 1.0], [1.0, 0.1]),
    ],
)
def test_a_plateau(options, values, scales):
    schedule, state, found = ReduceOnPlateau(**{"factor": 0.5, **options}), PLATEAU_START, []
    for value in values:
        state = plateau_step(schedule, state, value)
        found.append(state[2])
    assert found == scales
