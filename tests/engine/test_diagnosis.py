"""A diagnosis appears for a training with a problem, and only then."""

from __future__ import annotations

import pytest

from fusemlp.report.diagnosis import RISE, dead_units, overfitting

FALLING = [1.0, 0.5, 0.3, 0.2, 0.1]


def test_validation_loss_that_rises_while_training_loss_falls() -> None:
    found = overfitting({"loss": FALLING, "val_loss": [1.0, 0.6, 0.5, 0.6, 0.8]})
    assert found is not None
    assert found.name == "overfitting"
    assert found.epoch == 3
    assert found.figures["loss_gap"] == pytest.approx(0.7)
    assert "after epoch 3 the validation loss rose from 0.5 to 0.8" in str(found)
    for remedy in ("early stopping", "dropout", "weight-decay", "more data"):
        assert remedy in str(found)


def test_a_gap_between_the_accuracies() -> None:
    history = {"loss": FALLING, "val_loss": FALLING, "accuracy": [0.9] * 5, "val_accuracy": [0.75] * 5}
    found = overfitting(history)
    assert found is not None
    assert found.epoch is None
    assert found.figures["accuracy_gap"] == pytest.approx(0.15)
    assert "90.0% of the training rows are right, but only 75.0% in validation" in found.message
    assert "early stopping" in str(found)
    assert "early stopping" not in str(overfitting(history, early_stopping=True))


@pytest.mark.parametrize(
    "history",
    [
        {},
        {"loss": FALLING},
        {"loss": FALLING, "val_loss": FALLING},
        {"loss": FALLING, "val_loss": [1.0, 0.8, 0.5, 0.5, 0.5 * (1 + RISE) - 1e-9]},
        # both rise: that is no overfitting
        {"loss": [1.0, 0.5, 0.6], "val_loss": [1.0, 0.5, 0.7]},
        {"loss": FALLING, "val_loss": FALLING, "accuracy": [0.9] * 5, "val_accuracy": [0.85] * 5},
    ],
)
def test_nothing_is_said_of_a_sound_training(history: dict[str, list[float]]) -> None:
    assert overfitting(history) is None


def test_no_remedy_where_the_best_weights_were_restored() -> None:
    found = overfitting({"loss": FALLING, "val_loss": [1.0, 0.5, 0.6, 0.7, 0.8]}, restored=True)
    assert found is not None
    assert found.remedies == ()
    assert "the weights of epoch 2 were restored" in str(found)


def test_dead_units_are_named_by_layer() -> None:
    assert dead_units({}) is None
    assert dead_units({"layer 1": 0.3, "layer 2": 0.0}) is None
    found = dead_units({"layer 1": 0.1, "layer 2": 0.5})
    assert found is not None
    assert "50% of layer 2" in found.message
    assert "layer 1" not in found.message
    assert "leaky_relu" in str(found)
    assert "prelu" in str(found)
    assert "learning rate" in str(found)
    assert found.figures == {"layer 1": 0.1, "layer 2": 0.5}
