"""A limit of the training's time: of a fit, of a fleet whose models share it, and of ``fusemlp train``."""

from types import SimpleNamespace

import numpy as np
import pandas
import pytest

from fusemlp import MLP, Engine
from fusemlp.describe import checks
from fusemlp.fleet import fleet as fleets
from fusemlp.fleet.fleet import Fleet
from fusemlp.fleet.results import Kept, Member, mean_history, sound
from fusemlp.sklearn import TableClassifier
from fusemlp.tables import defaults
from fusemlp.training import validation
from fusemlp.training.trainer import History
from fusemlp_kernels.errors import ArgumentError
from make import read, refusal, run

# more than any test has time for
ENDLESS = ("--epochs", "1000000", "--early-stopping", "1000000", "--hidden", "8", "--quiet")


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that goes on by a second with each question whether the time is up."""
    told = [0.0]

    def later():
        told[0] += 1.0
        return told[0]

    monkeypatch.setattr(validation, "time", SimpleNamespace(monotonic=later))
    for module in (checks, fleets):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: told[0]))


def rows(count=96):
    X = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    return X, (X[:, 0] > 0).astype(np.int64)


def write(path):
    X, y = rows(400)
    pandas.DataFrame(X, columns=[*"abc"]).round(4).assign(kind=np.array(["no", "yes"])[y]).to_csv(path, index=False)
    return path


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("patience", [None, 50])
def test_a_fit_ends_at_the_limit_with_its_best_weights(patience):
    X, y = rows()
    engine, whole = (Engine(MLP([3, 4, 2]), seed=1) for _ in range(2))
    held = rows(40)
    history = engine.fit(X, y, epochs=500, validation_data=held, early_stopping=patience, time_limit=9.0)
    done = len(history.epochs)
    assert 1 < done < 10
    kept = done if patience is None else (history.best_epoch or 0) + 1
    restored = "" if patience is None else f"; the weights of epoch {kept} were restored"
    assert history.stopped == f"the time limit was reached{restored}"
    whole.fit(X, y, epochs=kept, validation_data=held)
    if patience is not None:
        # without patience the last epoch may have been cut
        np.testing.assert_array_equal(engine.predict_proba(X), whole.predict_proba(X))


def test_a_limit_shorter_than_the_set_up_trains_an_epoch():
    assert len(Engine(MLP([3, 4, 2])).fit(*rows(), epochs=500, validation_data=rows(20), time_limit=1e-9).epochs) == 1


def test_models_without_an_epoch_are_left_out_unless_all_are():
    engines = [Engine(MLP([3, 4, 2]), seed=seed) for seed in range(3)]
    engines[1].fit(*rows(), epochs=1)
    ended = [Member(at, {}, one, one.history or History(), "stopped", "", {}) for at, one in enumerate(engines)]
    assert sound(ended) == {1: engines[1]}
    assert sound([ended[0], ended[2]]) == {0: engines[0], 2: engines[2]}


@pytest.mark.usefixtures("clock")
def test_a_limit_that_is_not_reached_changes_nothing():
    X, y = rows()
    engine, whole = (Engine(MLP([3, 4, 2]), seed=1) for _ in range(2))
    assert engine.fit(X, y, epochs=3, time_limit=1e6).stopped == ""
    whole.fit(X, y, epochs=3)
    np.testing.assert_array_equal(engine.predict_proba(X), whole.predict_proba(X))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("options", [{"jobs": 1}, {"jobs": 2}, {"jobs": 1, "parts": True}])
def test_the_models_of_a_fleet_have_equal_shares(options):
    X, y = rows()
    # room for two of five engines and what stays of all
    memory = {"memory": 2 * 20_000 + 5 * 8_000} if options.pop("parts", False) else {}
    fleet = Fleet(MLP([3, 4, 2]), vary={"seed": range(5)}, **memory)
    results = fleet.fit(X, y, epochs=10_000, validation_data=rows(20), time_limit=100.0, **options)
    assert isinstance(results.members[0].held, Kept) == bool(memory)
    epochs = [len(member.history.epochs) for member in results.members]
    # the system may hold one of two threads back
    assert min(epochs) >= 1 if options["jobs"] == 2 else max(epochs) <= 2 * min(epochs)
    assert all(member.history.stopped == "the time limit was reached" for member in results.members)
    stopped = mean_history([member.history for member in results.members]).stopped
    assert stopped == "the time limit was reached by 5 of 5 models"


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("models", ["1", "3"])
def test_train_ends_in_time_and_says_so(models, tmp_path, capsys):
    data = write(tmp_path / "data.csv")
    words = ("train", data, "--target", "kind", *ENDLESS, "--models", models, "--final-fit")
    assert run(*words, "--time-limit", "300", "--out", tmp_path / "run") == 0
    report = read(tmp_path / "run" / "report.json")
    assert "time limit was reached" in report["stopped"] and "restored" in report["stopped"]
    assert report["epochs"] > 0 and report["final_fit"]["epochs"] > 0
    assert "time limit was reached" in capsys.readouterr().out
    assert "the run has ended" in refusal(capsys, "train", "--resume", tmp_path / "run")


def test_too_short_a_limit_trains_fewer_models(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(defaults, "LEAST_EPOCHS", 10**9)
    monkeypatch.setattr(defaults, "cpu_threads", lambda: 1)
    monkeypatch.setattr(defaults, "SHARE", 1e-9)
    data = write(tmp_path / "data.csv")
    words = ("train", data, "--target", "kind", "--epochs", "3", "--hidden", "8", "--models", "5")
    assert run(*words, "--time-limit", "60", "--out", tmp_path / "run") == 0
    told = capsys.readouterr().err
    assert "time limit: 2 of 5 models are trained" in told
    assert "time limit: too short for the trials that decide --scale" in told
    config, report = (read(tmp_path / "run" / name) for name in ("config.json", "report.json"))
    assert config["options"]["models"] == len(report["models"]) == 2
    assert config["options"]["scale"] == "robust"
    X, y = rows(400)
    model = TableClassifier(models=5, hidden=8, epochs=3, time_limit=60.0).fit(X, y)
    assert model.engine_.network.sizes[1] == 16
    assert "time limit: 2 of 5 models are trained, so that each has time to learn" in model.notes_


def test_a_limit_is_a_number_above_zero(tmp_path, capsys):
    said = "time_limit: expected a finite number above 0, got"
    with pytest.raises(ArgumentError, match=f"^{said} 0"):
        TableClassifier(time_limit=0).fit(*rows())
    with pytest.raises(ArgumentError, match=f"^{said} -1"):
        Engine(MLP([3, 2])).fit(*rows(), epochs=1, time_limit=-1)
    assert run("train", "iris", "--time-limit", "0", "--out", tmp_path / "run") == 2
    assert "--time-limit: expected a finite number above 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
