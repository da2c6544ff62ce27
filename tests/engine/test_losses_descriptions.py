"""The loss descriptions: options, the kernels' specifications, and refused networks."""

import json
import math

import numpy as np
import pytest

from fusemlp.describe.losses import (
    LOSSES,
    MAE,
    MSE,
    BinaryCrossEntropy,
    CrossEntropy,
    Huber,
    Poisson,
    Quantile,
    as_loss,
    loss_from_config,
)
from fusemlp.describe.network import MLP
from fusemlp_kernels import contract
from fusemlp_kernels.contract import LossSpec
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, ShapeError

EXAMPLES = [
    CrossEntropy(),
    CrossEntropy(label_smoothing=0.1, class_weight=[1, 0, 2.5], ignore_index=-100, reduction="sum"),
    BinaryCrossEntropy(reduction="sum"),
    MSE(),
    MAE(),
    Huber(0.5),
    Poisson(),
    Quantile(0.9, reduction="sum"),
]


def test_every_loss_of_the_contract_has_a_name():
    assert tuple(LOSSES) == contract.LOSSES
    for name in contract.LOSSES:
        assert as_loss(name).spec(accuracy=False) == LossSpec(name)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (
            CrossEntropy(label_smoothing=0.1, ignore_index=3, class_weight=[1, 2]),
            LossSpec("cross_entropy", label_smoothing=0.1, ignore_index=3),
        ),
        (BinaryCrossEntropy(reduction="sum"), LossSpec("binary_cross_entropy", reduction="sum")),
        (Huber(2), LossSpec("huber", delta=2.0)),
        (Quantile(0.9), LossSpec("quantile", quantile=0.9)),
    ],
    ids=repr,
)
def test_options_reach_the_kernels(loss, expected):
    assert loss.spec(accuracy=False) == expected


def test_accuracy_and_soft_targets_are_asked_for():
    spec = CrossEntropy().spec(accuracy=True, soft=True)
    assert (spec.accuracy, spec.soft) == (True, True)


def test_only_the_cross_entropies_classify():
    assert {name for name in LOSSES if as_loss(name).is_classification} == {
        "cross_entropy",
        "binary_cross_entropy",
    }


def test_class_weights_may_come_in_several_forms():
    expected = (1.0, 2.0)
    for given in ([1, 2], (1.0, 2.0), np.array([1, 2]), {1: 2, 0: 1}):
        assert CrossEntropy(class_weight=given).class_weight == expected
    assert CrossEntropy().class_weight is None
    assert MSE().class_weight is None


@pytest.mark.parametrize("loss", EXAMPLES, ids=repr)
def test_a_loss_survives_json_and_repr(loss):
    config = loss.to_config()
    assert json.loads(json.dumps(config)) == config
    assert loss_from_config(config) == loss
    assert eval(repr(loss)) == loss
    assert hash(loss_from_config(config)) == hash(loss)
    assert as_loss(loss) is loss


@pytest.mark.parametrize(
    ("loss", "net", "error", "words"),
    [
        (
            "cross_entropy",
            MLP([2, 3], output_activation="sigmoid"),
            ArgumentError,
            "^output_act.*logits.*got 'sigmoid'",
        ),
        ("binary_cross_entropy", MLP([2, 1], output_activation="sigmoid"), ArgumentError, "logits"),
        ("poisson", MLP([2, 1], output_activation="relu"), ArgumentError, "logarithm of the mean"),
        ("cross_entropy", MLP([2, 1]), ArgumentError, "at least 2 outputs.*use binary_cross_entropy"),
        (
            CrossEntropy(class_weight=[1, 1]),
            MLP([2, 3]),
            ShapeError,
            "class_weight: expected 3 weights.*got 2",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_refused(loss, net, error, words):
    with pytest.raises(error, match=words):
        as_loss(loss).check_network(net)


def test_networks_that_fit():
    for loss in ("mse", "mae", "huber", "quantile"):
        as_loss(loss).check_network(MLP([2, 1], output_activation="sigmoid"))
    for loss in ("binary_cross_entropy", "poisson"):
        as_loss(loss).check_network(MLP([2, 1]))
    CrossEntropy(class_weight=[1, 0, 2], ignore_index=7).check_network(MLP([2, 3]))


@pytest.mark.parametrize(
    ("cls", "options", "error", "words"),
    [
        (MSE, {"reduction": "none"}, ArgumentError, "reduction: unknown name 'none'.*mean, sum"),
        (MSE, {"reduction": None}, ArgumentTypeError, "reduction: .*got None"),
        (CrossEntropy, {"reduction": "men"}, ArgumentError, "reduction: .*did you mean 'mean'"),
        (CrossEntropy, {"label_smoothing": 1.1}, ArgumentError, "label_smoothing: .*got 1.1"),
        (CrossEntropy, {"label_smoothing": math.nan}, ArgumentError, "label_smoothing: .*got nan"),
        (CrossEntropy, {"ignore_index": 1.0}, ArgumentTypeError, "ignore_index: .*got 1.0"),
        (CrossEntropy, {"ignore_index": True}, ArgumentTypeError, "ignore_index: .*got True"),
        (CrossEntropy, {"class_weight": [1, -1]}, ArgumentError, r"class_weight\[1\]: .*got -1"),
        (CrossEntropy, {"class_weight": [1, "a"]}, ArgumentTypeError, r"class_weight\[1\]: .*got 'a'"),
        (CrossEntropy, {"class_weight": [0, 0]}, ArgumentError, r"class_weight: .*got \[0.0, 0.0\]"),
        (CrossEntropy, {"class_weight": []}, ArgumentError, r"class_weight: .*got \[\]"),
        (CrossEntropy, {"class_weight": "balanced"}, ArgumentTypeError, "class_weight: .*got 'balanced'"),
        (
            CrossEntropy,
            {"class_weight": {0: 1, 2: 1}},
            ArgumentError,
            r"class_weight: .*from 0 on.*got \[0, 2\]",
        ),
        (Huber, {"delta": 0.0}, ArgumentError, "delta: .*above 0, got 0.0"),
        (Huber, {"delta": math.inf}, ArgumentError, "delta: .*got inf"),
        (Quantile, {"q": 0.0}, ArgumentError, "q: .*got 0.0"),
        (Quantile, {"q": 1}, ArgumentError, "q: .*below 1, got 1"),
    ],
)
def test_impossible_options_are_refused(cls, options, error, words):
    with pytest.raises(error, match=words) as caught:
        cls(**options)
    assert caught.type is error


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("cross_entrpy", ArgumentError, "loss: unknown name 'cross_entrpy'; did you mean 'cross_entropy'"),
        ("l1", ArgumentError, "loss: unknown name 'l1'; it is called 'mae'"),
        (None, ArgumentTypeError, "loss: .*got None"),
        (MSE, ArgumentTypeError, r"loss: .*MSE\(\), got <class"),
    ],
)
def test_unknown_losses_are_refused(value, error, words):
    with pytest.raises(error, match=words):
        as_loss(value)


def test_soft_targets_belong_to_cross_entropy_without_ignore_index():
    with pytest.raises(ArgumentError, match=r"soft: only cross_entropy .*not mse"):
        MSE().spec(accuracy=False, soft=True)
    with pytest.raises(ArgumentError, match="ignore_index: 1 is a class index"):
        CrossEntropy(ignore_index=1).spec(accuracy=False, soft=True)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"kind": "mse"}, ArgumentError, r"missing \['reduction'\]"),
        ({"kind": "mse", "reduction": "mean", "delta": 1.0}, ArgumentError, r"unknown \['delta'\]"),
        ({"kind": "hinge"}, ArgumentError, "unknown name 'hinge'"),
        ({}, ArgumentTypeError, ""),
    ],
)
def test_a_configuration_of_something_else_is_refused(config, error, words):
    with pytest.raises(error, match=f"loss: .*{words}"):
        loss_from_config(config)
