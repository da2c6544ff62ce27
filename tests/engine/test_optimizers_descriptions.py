"""The optimizer descriptions: options, what they hand to the kernels, and what each parameter changes."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest

from fusemlp.describe.losses import LOSSES
from fusemlp.describe.network import MLP, PReLU
from fusemlp.describe.optimizers import (
    OPTIMIZERS,
    SGD,
    Adam,
    AdamW,
    ParameterOptions,
    as_optimizer,
    optimizer_from_config,
)
from fusemlp.describe.schedules import SCHEDULES, Constant, Cosine, StepDecay
from fusemlp_kernels.contract import TensorRule, UpdateRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

EXAMPLES = [
    SGD(0.1),
    SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, convention="scikit-learn"),
    SGD(Cosine(0.1, warmup=5), clip_norm=1.0, accumulate=4, decay_biases=False),
    Adam(betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, convention="scikit-learn"),
    AdamW(
        StepDecay(1e-3, every=10),
        per_parameter={"0.*": ParameterOptions(trainable=False), "*": ParameterOptions(lr_factor=0.5)},
    ),
]


@pytest.mark.parametrize("cls", [ParameterOptions, *OPTIMIZERS.values(), *LOSSES.values(), *SCHEDULES.values()])
def test_types_of_options_are_no_text(cls):
    """Postponed annotations would turn the checks in the types into text."""
    assert not any(isinstance(field.type, str) for field in fields(cls))


def test_names_stand_for_the_defaults():
    assert as_optimizer("sgd") == SGD(0.01)
    assert as_optimizer("adam") == Adam(1e-3)
    assert as_optimizer("adamw") == AdamW(1e-3, weight_decay=0.01)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (SGD(0.1), UpdateRule("sgd")),
        (
            SGD(0.1, momentum=0.9, nesterov=True, convention="scikit-learn"),
            UpdateRule("sgd", momentum=0.9, nesterov=True, convention="scikit-learn"),
        ),
        (
            SGD(1, clip_norm=2, accumulate=3),
            UpdateRule("sgd", clip_norm=2.0, accumulate=3),
        ),
        (
            Adam(betas=(0.8, 0.9), eps=1e-6),
            UpdateRule("adam", beta1=0.8, beta2=0.9, eps=1e-6),
        ),
        (AdamW(), UpdateRule("adam", decoupled=True)),
    ],
    ids=repr,
)
def test_options_reach_the_kernels(optimizer, expected):
    assert optimizer.rule() == expected


def test_a_learning_rate_is_a_constant_schedule():
    assert SGD(0.5).schedule == Constant(0.5)
    assert SGD(Constant(0.5)).rule() == SGD(0.5).rule()


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


@pytest.mark.parametrize("optimizer", EXAMPLES, ids=repr)
def test_an_optimizer_survives_json_and_repr(optimizer):
    config = optimizer.to_config()
    assert json.loads(json.dumps(config)) == config
    assert optimizer_from_config(config) == optimizer
    assert hash(optimizer_from_config(config)) == hash(optimizer)
    assert eval(repr(optimizer)) == optimizer
    assert as_optimizer(optimizer) is optimizer


def test_numpy_numbers_become_plain_ones():
    optimizer = SGD(np.float64(0.1), momentum=np.float64(0.5), accumulate=np.int64(2), nesterov=np.True_)
    assert optimizer == SGD(0.1, momentum=0.5, accumulate=2, nesterov=True)
    assert json.loads(json.dumps(optimizer.to_config())) == optimizer.to_config()


@pytest.mark.parametrize(
    ("cls", "options", "error", "words"),
    [
        (SGD, {"lr": -0.1}, ArgumentError, "lr: .*at least 0, got -0.1"),
        (SGD, {"lr": math.nan}, ArgumentError, "lr: .*got nan"),
        (SGD, {"lr": math.inf}, ArgumentError, "lr: .*got inf"),
        (SGD, {"lr": "0.1"}, ArgumentTypeError, r"lr: .*schedule such as Cosine\(0\.1\), got '0.1'"),
        (SGD, {"lr": True}, ArgumentTypeError, "lr: .*got True"),
        (SGD, {"lr": None}, ArgumentTypeError, "lr: .*got None"),
        (SGD, {"momentum": 2}, ArgumentError, "momentum: .*below 1, got 2"),
        (SGD, {"momentum": 1.0}, ArgumentError, "momentum: .*got 1.0"),
        (SGD, {"momentum": math.nan}, ArgumentError, "momentum: .*got nan"),
        (SGD, {"momentum": -0.5}, ArgumentError, "momentum: .*got -0.5"),
        (SGD, {"nesterov": True}, ArgumentError, "nesterov: True needs momentum > 0.*try momentum=0.9"),
        (SGD, {"nesterov": 1, "momentum": 0.9}, ArgumentTypeError, "nesterov: .*got 1"),
        (SGD, {"weight_decay": -1e-4}, ArgumentError, "weight_decay: .*got -0.0001"),
        (SGD, {"convention": "sklearn"}, ArgumentError, "convention: .*did you mean 'scikit-learn'"),
        (SGD, {"clip_norm": 0.0}, ArgumentError, "clip_norm: .*above 0, got 0.0"),
        (SGD, {"accumulate": 0}, ArgumentError, "accumulate: .*at least 1, got 0"),
        (SGD, {"accumulate": 2**63}, ArgumentError, "accumulate: .*at most 9223372036854775807, got"),
        (SGD, {"accumulate": 1.5}, ArgumentTypeError, "accumulate: .*got 1.5"),
        (SGD, {"decay_biases": None}, ArgumentTypeError, "decay_biases: .*got None"),
        (
            SGD,
            {"per_parameter": {"0.*": 0.1}},
            ArgumentTypeError,
            "per_parameter: .*ParameterOptions.*got .'0.*', 0.1",
        ),
        (SGD, {"per_parameter": "0.*"}, ArgumentTypeError, "per_parameter: .*got '0.*'"),
        (SGD, {"per_parameter": 3}, ArgumentTypeError, "per_parameter: .*got 3"),
        (Adam, {"betas": (0.9, 1.0)}, ArgumentError, r"betas\[1\]: .*got 1.0"),
        (Adam, {"betas": (-0.1, 0.9)}, ArgumentError, r"betas\[0\]: .*got -0.1"),
        (Adam, {"betas": 0.9}, ArgumentTypeError, "betas: .*got 0.9"),
        (Adam, {"betas": (0.9,)}, ArgumentError, r"betas: .*two numbers.*\(0\.9, 0\.999\), got \(0\.9,\)"),
        (Adam, {"eps": 0.0}, ArgumentError, "eps: .*got 0.0"),
        (Adam, {"eps": math.nan}, ArgumentError, "eps: .*got nan"),
        (AdamW, {"weight_decay": math.inf}, ArgumentError, "weight_decay: .*got inf"),
        (AdamW, {"betas": ("a", 0.9)}, ArgumentTypeError, r"betas\[0\]: .*got 'a'"),
    ],
)
def test_impossible_options_are_refused(cls, options, error, words):
    with pytest.raises(error, match=words) as caught:
        cls(**options)
    assert caught.type is error


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"trainable": 0}, ArgumentTypeError, "trainable: .*got 0"),
        ({"lr_factor": -1}, ArgumentError, "lr_factor: .*got -1"),
        ({"weight_decay": -1}, ArgumentError, "weight_decay: .*got -1"),
    ],
)
def test_impossible_parameter_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        ParameterOptions(**options)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("adm", ArgumentError, "optimizer: unknown name 'adm'; did you mean 'adam'"),
        (SGD, ArgumentTypeError, r"optimizer: .*SGD\(lr=0\.1\), got <class"),
        (0.1, ArgumentTypeError, "optimizer: .*got 0.1"),
    ],
)
def test_unknown_optimizers_are_refused(value, error, words):
    with pytest.raises(error, match=words):
        as_optimizer(value)


def test_a_configuration_of_something_else_is_refused():
    config = SGD(0.1).to_config()
    with pytest.raises(ArgumentError, match="optimizer: unknown name 'sgdd'"):
        optimizer_from_config({**config, "kind": "sgdd"})
    with pytest.raises(ArgumentError, match=r"optimizer: .*unknown .*'rho'"):
        optimizer_from_config({**config, "rho": 0.9})
    with pytest.raises(ArgumentError, match=r"optimizer: .*missing \['accumulate'"):
        optimizer_from_config({"kind": "sgd"})
