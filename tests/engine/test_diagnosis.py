"""A diagnosis appears for a training with a problem, and only then."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

import fusemlp
from fusemlp import MLP, SGD
from fusemlp.report.diagnosis import EXPLODED, RISE, diagnose
from make import engine

FALLING = [1.0, 0.5, 0.3, 0.2, 0.1]


def test_validation_loss_that_rises_while_training_loss_falls():
    (found,) = diagnose({"loss": FALLING, "val_loss": [1.0, 0.6, 0.5, 0.6, 0.8]}, python=False)
    assert (found.name, found.epoch) == ("overfitting", 3)
    assert found.figures["loss_gap"] == pytest.approx(0.7)
    assert "after epoch 3 the validation loss rose from 0.5 to 0.8" in str(found)
    for remedy in ("early stopping", "dropout", "weight-decay", "more data"):
        assert remedy in str(found)


def test_a_gap_between_the_accuracies():
    history = {"loss": FALLING, "val_loss": FALLING, "accuracy": [0.9] * 5, "val_accuracy": [0.75] * 5}
    (found,) = diagnose(history)
    assert found.epoch is None
    assert found.figures["accuracy_gap"] == pytest.approx(0.15)
    assert "90.0% of the training rows are right, but only 75.0% in validation" in found.message
    assert "early stopping" in str(found)
    assert "early stopping" not in str(diagnose(history, in_use=["early stopping"]))


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
        # the training loss is still above the validation loss
        {"loss": [0.7, 0.6395], "val_loss": [0.5232, 0.5594]},
    ],
)
def test_nothing_is_said_of_a_sound_training(history):
    assert diagnose(history) == []


def test_no_remedy_where_the_best_weights_were_restored():
    (found,) = diagnose({"loss": FALLING, "val_loss": [1.0, 0.5, 0.6, 0.7, 0.8]}, restored=True)
    assert found.remedies == ()
    assert "the weights of epoch 2 were restored" in str(found)


def test_dead_units_are_named_by_layer():
    assert diagnose({}, {}) == diagnose({}, {"layer 1": 0.3, "layer 2": 0.0}) == []
    (found,) = diagnose({}, {"layer 1": 0.1, "layer 2": 0.5})
    assert "50% of layer 2" in found.message and "layer 1" not in found.message
    assert all(remedy in str(found) for remedy in ("leaky_relu", "prelu", "learning rate"))
    assert found.figures == {"layer 1": 0.1, "layer 2": 0.5}


def test_a_training_loss_that_ends_above_its_first_value():
    (found,) = diagnose({"loss": [0.8, 0.5, 2.0]})
    assert found.epoch == 2
    assert "rose from 0.8 in epoch 1 to 2" in str(found)
    assert "clip_norm=1.0" in str(found) and "--" not in str(found)
    assert "--clip-norm 1" in str(diagnose({"loss": [0.8, 0.5, 2.0]}, python=False))
    # a Poisson loss may be negative
    assert diagnose({"loss": [-1.0, -0.7]})[0].name == "exploding loss"
    for losses in ([], [1.0], FALLING, [1.0, 0.5, 1.0 + EXPLODED], [-1.0, -1.0 + EXPLODED], [1.0, 5.0, 0.9]):
        assert diagnose({"loss": losses}) == []


def test_a_loss_that_falls_slowly_and_steadily():
    slow = [2.0 - 0.01 * epoch for epoch in range(8)]
    (found,) = diagnose({"loss": slow, "learning_rate": [1e-5] * 8})
    assert "fell by only 3.5% in 8 epochs" in str(found) and "the learning rate of 1e-05 is too small" in str(found)
    assert "engine.lr_find(X, y)" in str(found)
    converging = [1.0 + 0.09 * 0.5**epoch for epoch in range(8)]
    noisy = [2.0, 1.99, 2.0, 1.98, 1.99, 1.97, 1.98, 1.96]
    for losses in (slow[:4], FALLING, converging, noisy, slow[::-1], [1.0] * 8):
        assert "slow training" not in str(diagnose({"loss": losses}))


def test_a_validation_loss_that_falls_to_the_end():
    falling = [1.0 / (epoch + 1) for epoch in range(50)]
    (found,) = diagnose({"loss": falling, "val_loss": falling})
    assert "still fell, by 20.0% in the last 10 of 50 epochs" in str(found) and "more epochs" in str(found)
    (found,) = diagnose({"val_loss": [-float(epoch) for epoch in range(1, 51)]})
    assert "by 25.0%" in str(found)
    flat = [max(0.025, value) for value in falling]
    for losses in (falling[:49], flat, falling[::-1], [-value for value in falling], [1.0] * 50):
        assert "unfinished" not in str(diagnose({"loss": losses, "val_loss": losses}))
    # more epochs would end where these did
    assert not diagnose({"loss": falling, "val_loss": falling}, waited=True)
    for words in ("val_loss has not improved for 5 epochs", "no model improved any more on its validation rows"):
        assert not fusemlp.History(stopped=words, history={"loss": falling, "val_loss": falling}).diagnose()


def test_early_stopping_before_a_schedule_has_lowered_the_rate():
    cosine = np.cos(np.linspace(0, np.pi, 100)) + 1
    words = "val_loss has not improved for 5 epochs"

    def findings(rates, stopped=words, **others):
        constant = [1.0] * len(rates)
        history = {"loss": constant, "val_loss": constant, "learning_rate": list(rates), **others}
        return [str(finding) for finding in fusemlp.History(stopped=stopped, history=history).diagnose()]

    (text,) = findings(cosine[:50])
    assert "early stopping ended it in epoch 50, with the learning rate at 51% of its highest" in text
    assert "fit without early_stopping" in text
    # a low rate, a constant one, one lowered on plateaus, one that rises, exponential, and a fit that went to its end
    for rates in (cosine[:90], [0.1] * 50, [0.1] * 40 + [0.05] * 10, cosine[::-1][:50], 0.99 ** np.arange(50)):
        assert not findings(rates)
    assert not findings(cosine[:50], stopped="")
    # more epochs help none that overfits
    (text,) = findings(cosine[:50], accuracy=[1.0] * 50, val_accuracy=[0.5] * 50)
    assert text.startswith("overfitting")


def test_a_training_that_ends_no_better_than_a_constant_prediction():
    chance = float(np.log(10))
    blown = {"loss": [1304.0, 8.0], "accuracy": [0.1, 0.1], "val_accuracy": [0.1, 0.096]}
    (found,) = diagnose(blown, chance_loss=chance)
    assert found.name == "no learning"
    assert "ended at 8, a constant prediction has 2.303; 9.6% of the validation rows are right" in str(found)
    assert "a lower learning rate" in str(found) and "normalise=True" in str(found)
    assert "normalise" not in str(diagnose(blown, chance_loss=chance, in_use=["scaling"])[0])
    assert "--scale standard" in str(diagnose(blown, chance_loss=chance, python=False)[0])
    flat = [2.4, 2.305, 2.31, 2.304, 2.306]
    assert diagnose({"loss": flat}, chance_loss=chance)
    for losses in (flat[:4], [2.4, 2.3, 2.2, 2.25, 2.2], [2.5, 2.48, 2.46, 2.44, 2.42], [14.3, 13.5, 12.8], [1304.0]):
        assert "no learning" not in str(diagnose({"loss": losses}, chance_loss=chance))
    # rows far from the boundary may cost much, where most are right
    assert diagnose({**blown, "val_accuracy": [0.1, 0.6]}, chance_loss=chance) == []
    assert diagnose(blown) == []


def test_the_diagnosis_has_all_findings_in_their_order_but_no_remedy_in_use():
    history = {"loss": [1.0, 0.5, 0.1], "val_loss": [1.0, 0.6, 0.9]}
    found = diagnose(history, {"layer 1": 0.9}, divergence="it became NaN")
    assert [one.name for one in found] == ["divergence", "overfitting", "dead units"]
    assert "MLP(dropout=0.2)" in str(found[1]) and "epochs=2" in str(found[1])
    assert not [one for one in found if "--" in str(one)]
    assert "--dropout" in str(diagnose(history, python=False)[0])
    assert "early stopping" not in str(diagnose(history, early_stopping=True)[0])
    (found,) = diagnose(history, in_use=["dropout"])
    assert "early stopping" in str(found) and "dropout" not in str(found)


class TestInPython:
    X = np.random.default_rng(1).normal(size=(60, 5)).astype(np.float32)
    labels = np.random.default_rng(0).integers(0, 3, 60)

    def make(self, optimizer="adam"):
        return engine((5, 64, 3), optimizer=optimizer, batch_size=20)

    def test_random_labels_overfit(self):
        made = self.make()
        history = made.fit(self.X, self.labels, epochs=150, validation_split=0.5)
        names = [one.name for one in made.diagnose(self.X)]
        assert "overfitting" in names and names == [one.name for one in history.diagnose()]
        # early stopping was on: it is no remedy
        stopped = made.fit(self.X, self.labels, epochs=50, validation_split=0.5, early_stopping=2)
        (found,) = [one for one in stopped.diagnose() if one.name == "overfitting"]
        assert "early stopping" not in str(found)

    @pytest.mark.parametrize("options", [{"early_stopping": 1000}, {"callbacks": fusemlp.EarlyStopping(patience=1000)}])
    def test_early_stopping_that_did_not_stop_is_not_advised(self, options):
        history = self.make().fit(self.X, self.labels, epochs=150, validation_split=0.5, **options)
        (found,) = [one for one in history.diagnose() if one.name == "overfitting"]
        assert "early stopping" not in str(found) and "dropout" in str(found)

    def test_dead_units_need_the_rows(self):
        made = self.make()
        state = made.state_dict()
        made.load_state_dict({**state, "0.bias": np.where(np.arange(64) < 40, -1e3, state["0.bias"])})
        (found,) = made.diagnose(self.X)
        assert found.name == "dead units" and "of layer 1" in str(found)
        made.fit(self.X, self.labels, epochs=1)
        assert made.diagnose() == []
        assert [one.name for one in made.diagnose(self.X)] == ["dead units"]

    def test_a_divergence_is_found_in_the_history(self):
        made = engine((5, 1), "mse", SGD(1e20))
        with pytest.raises(fusemlp.DivergenceError):
            made.fit(self.X, self.X[:, 0], epochs=3)
        (found,) = made.diagnose()
        assert found.name == "divergence" and "became NaN or infinite in epoch 1" in str(found)

    def test_a_small_rate_is_found(self):
        made = self.make(SGD(1e-5))
        made.fit(self.X, self.labels, epochs=6, shuffle=False)
        assert [one.name for one in made.diagnose()] == ["slow training"]

    @pytest.mark.parametrize(("scale", "lr"), [(16.0, 0.3), (1.0, 30.0)])
    @pytest.mark.filterwarnings("ignore")
    def test_a_rate_that_is_too_large_for_the_inputs_is_found(self, scale, lr):
        X, y = load_digits(return_X_y=True)
        made = fusemlp.Engine(MLP([64, 32, 10]), optimizer=SGD(lr), backend="numpy")
        history = made.fit(X / 16 * scale, y, epochs=6, validation_split=0.2)
        assert history.history["val_accuracy"][-1] < 0.15
        (found,) = [one for one in history.diagnose() if one.name == "no learning"]
        assert "a lower learning rate" in str(found) and "normalise=True" in str(found)

    def test_what_the_engine_does_already_is_in_use(self):
        made = engine(net=MLP([5, 8, 3], dropout=0.2), normalise=True)
        assert made.fit(self.X, self.labels, epochs=1).in_use == ["dropout", "scaling"]

    def test_nothing_to_look_at(self):
        with pytest.raises(fusemlp.ArgumentError, match="diagnose: this engine has no training yet; call fit first"):
            self.make().diagnose()
        assert fusemlp.History().diagnose() == []
