"""The words of the command line become descriptions."""

from dataclasses import replace

import numpy as np
import pytest

import fusemlp
from fusemlp import SGD, Adam, AdamW
from fusemlp.cli.options import FindOptions, TrainOptions
from fusemlp.tables import defaults, descriptions

PLAIN = TrainOptions(data="digits")


def test_activations_and_their_slopes():
    asked = replace(PLAIN, activation="prelu, leaky_relu", output_activation="tanh", dropout="0.1,0", slope=0.3)
    net = descriptions.network([4, 3, 3, 2], asked)
    assert net.activations[:2] == (fusemlp.PReLU(0.3), fusemlp.LeakyReLU(0.3))
    assert net.activations[2].name == "tanh"
    assert net.dropouts == (0.1, 0.0, 0.0)


OPTIMIZERS = [
    ({}, Adam()),
    ({"lr": 0.1, "beta1": 0.5}, Adam(0.1, betas=(0.5, 0.999))),
    ({"optimizer": "sgd"}, SGD(0.01)),
    (
        {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        SGD(0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    ({"optimizer": "adamw"}, AdamW()),
    (
        {"optimizer": "adamw", "eps": 1e-6, "clip_norm": 1.0, "accumulate": 2, "decay_biases": False},
        AdamW(eps=1e-6, clip_norm=1.0, accumulate=2, decay_biases=False),
    ),
]


@pytest.mark.parametrize(("options", "expected"), OPTIMIZERS)
def test_optimizers(options, expected):
    assert descriptions.optimizer(replace(PLAIN, **options)) == expected


def test_plain_networks_of_a_backend_with_kernels_for_codes_read_them():
    assert defaults.reads_codes(replace(PLAIN, backend="numpy"))
    assert not defaults.reads_codes(replace(PLAIN, backend="triton"))
    assert not defaults.reads_codes(replace(PLAIN, backend="numpy", adversarial="pgd"))


# 100 rows in batches of 30: four updates an epoch; ten epochs.
SCHEDULES = [
    ({}, fusemlp.Constant(0.1)),
    ({"warmup": 0.5}, fusemlp.Constant(0.1, warmup=2)),
    ({"schedule": "step", "lr_step": 3.0}, fusemlp.StepDecay(0.1, every=12)),
    ({"schedule": "step", "lr_step": 0.5, "lr_gamma": 0.5}, fusemlp.StepDecay(0.1, every=2, gamma=0.5)),
    ({"schedule": "exponential", "lr_gamma": 0.5}, fusemlp.Exponential(0.1, gamma=0.5**0.25)),
    ({"schedule": "cosine", "lr_final": 0.01}, fusemlp.Cosine(0.1, final=0.01, steps=40)),
    ({"schedule": "cosine", "warmup": 2.0}, fusemlp.Cosine(0.1, steps=32, warmup=8)),
    ({"schedule": "cosine", "drop_last": True}, fusemlp.Cosine(0.1, steps=30)),
    ({"schedule": "cosine", "accumulate": 3}, fusemlp.Cosine(0.1, steps=13)),
    ({"schedule": "one_cycle"}, fusemlp.OneCycle(0.1, steps=40)),
    (
        {"schedule": "reduce_on_plateau", "lr_patience": 3, "lr_gamma": 0.5, "lr_final": 0.01},
        fusemlp.ReduceOnPlateau(0.1, factor=0.5, patience=3, min_lr=0.01),
    ),
]


@pytest.mark.parametrize(("options", "expected"), SCHEDULES)
def test_lengths_in_epochs_become_updates(options, expected):
    asked = replace(PLAIN, lr=0.1, batch_size=30, **options)
    assert descriptions.schedule(asked, rows=100, epochs=10) == expected


def test_losses_take_their_options():
    for options, name, weights, expected in (
        (
            {"label_smoothing": 0.1},
            "cross_entropy",
            [1.0, 2.0],
            fusemlp.CrossEntropy(label_smoothing=0.1, class_weight=[1.0, 2.0]),
        ),
        ({"delta": 2.0}, "huber", None, fusemlp.Huber(2.0)),
        ({"quantile": 0.9}, "quantile", None, fusemlp.Quantile(0.9)),
    ):
        assert descriptions.loss(FindOptions(**options), name, weights) == expected


def test_balanced_weights_make_classes_count_alike():
    codes = np.array([0] * 6 + [1] * 3 + [3])
    weights = descriptions.class_weights("balanced", codes, range(4))
    # An absent class has no weight.
    assert weights == pytest.approx([10 / 18, 10 / 9, 0.0, 10 / 3])
    assert np.bincount(codes, weights=np.array(weights)[codes])[[0, 1, 3]] == pytest.approx([10 / 3] * 3)
    assert descriptions.class_weights("1,0,2,3", codes, range(4)) == [1.0, 0.0, 2.0, 3.0]
    assert descriptions.class_weights(None, codes, range(4)) is None
