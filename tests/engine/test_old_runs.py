"""Run folders and files of earlier releases predict, score, explain and train on as the release that wrote them did."""

import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from fusemlp import load, load_checkpoint
from fusemlp.sklearn import MLPClassifier, TableRegressor
from make import frame, read, result_of, rows, run

FIXTURES = Path(__file__).parents[1] / "fixtures"
RELEASE, ESTIMATORS, FOLDER = (FIXTURES / name for name in ("release_0_1_0", "release_0_2_0", "runs_2026_11"))
TABLE = FOLDER / "homes.csv"
# A plain network, five merged ones, members that share weights, the best model of a sweep.
NAMES = ("plain", "five", "members", "sweep")
# The same float32 network on another processor: rounding of its sums, relative to the largest value of a column. A few
# epochs move a network by a few hundred units of rounding; another learning rate or state moves it by 1e-3 or more.
TOLERANCE = 2e-5


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """Return a function that copies a run folder beside its table, and gives the copy's path."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(TABLE, tmp_path)

    def of(name):
        return Path(shutil.copytree(FOLDER / name, tmp_path / name))

    return of


def same(written, expected):
    """Compare two CSV files: words exactly, numbers within the tolerance."""
    new, old = rows(written), rows(expected)
    assert [list(row) for row in new] == [list(row) for row in old]
    for column in old[0]:
        values, wanted = [row[column] for row in new], [row[column] for row in old]
        try:
            numbers = np.array(wanted, np.float64)
        except ValueError:
            assert values == wanted, column
            continue
        np.testing.assert_allclose(np.array(values, np.float64), numbers, rtol=0, atol=TOLERANCE * abs(numbers).max())


@pytest.mark.parametrize("name", NAMES)
def test_it_predicts_the_same(name, copy, tmp_path):
    probabilities = ["--proba"] if name in ("five", "members") else []
    assert run("predict", copy(name), "--data", TABLE, "--out", tmp_path / "new.csv", *probabilities) == 0
    same(tmp_path / "new.csv", FOLDER / name / "predicted.csv")


def test_it_takes_another_spelling_of_a_number_for_an_unseen_word(copy, tmp_path):
    (tmp_path / "respelled.csv").write_text(TABLE.read_text().replace(",10.0,", ",10,"))
    assert run("predict", copy("plain"), "--data", tmp_path / "respelled.csv", "--out", tmp_path / "new.csv") == 0
    same(tmp_path / "new.csv", FOLDER / "plain" / "respelled.csv")


@pytest.mark.parametrize("name", NAMES)
def test_it_scores_the_same(name, copy, capsys):
    scores, expected = result_of(capsys, "evaluate", copy(name)), read(FOLDER / name / "report.json")["test"]
    shared = expected.keys() & scores.keys() & {"rows", "loss", "accuracy", "rmse", "r2"}
    assert len(shared) >= 3
    for score in shared:
        assert scores[score] == pytest.approx(expected[score], rel=1e-4), score


@pytest.mark.parametrize("name, options", [("plain", []), ("five", ["--method", "integrated", "--class", "dear"])])
def test_it_is_explained_the_same(name, options, copy, tmp_path):
    assert run("explain", copy(name), "--data", TABLE, "--out", tmp_path / "new.csv", *options) == 0
    same(tmp_path / "new.csv", FOLDER / name / "explained.csv")


def test_a_training_goes_on(copy):
    folder = copy("plain")
    assert run("train", "--resume", folder, "--epochs", "32", "--quiet") == 0
    epochs = rows(folder / "metrics.csv")
    assert [row["epoch"] for row in epochs] == [str(epoch) for epoch in range(1, 33)]
    assert epochs[:30] == rows(FOLDER / "plain" / "metrics.csv")


@pytest.mark.parametrize("name", NAMES)
def test_its_page_is_written_again(name, copy):
    folder = copy(name)
    assert run("report", folder) == 0
    assert (folder / "report.html").stat().st_size > 4000


@pytest.fixture(scope="module")
def expected():
    """Return data, and the predictions of the release that wrote the files, before and after further training."""
    with np.load(RELEASE / "expected.npz") as arrays:
        return dict(arrays)


def unpickled(name):
    with warnings.catch_warnings():
        # scikit-learn warns if another version wrote the file.
        warnings.simplefilter("ignore")
        return pickle.loads((RELEASE / f"{name}.pickle").read_bytes())


def close(given, wanted):
    np.testing.assert_allclose(given, wanted, rtol=0, atol=TOLERANCE)


def test_a_model(expected):
    engine = load(RELEASE / "model.safetensors", backend="numpy")
    close(engine.predict_proba(expected["X"]), expected["proba"])


def test_a_checkpoint_resumes_inside_an_epoch(expected):
    X, y = expected["X"], expected["y"]
    engine = load_checkpoint(RELEASE / "checkpoint.safetensors", backend="numpy")
    assert (engine.fit_state.epoch, engine.fit_state.batch) == (2, 2)
    history = engine.fit(X, y, epochs=4, validation_data=(X, y), resume=True)
    close(np.array(history.history["loss"]), expected["resumed_loss"])
    close(engine.predict_proba(X), expected["resumed"])


def test_a_pickled_engine_trains_on(expected):
    engine = unpickled("engine")
    close(engine.predict_proba(expected["X"]), expected["proba"])
    engine.fit(expected["X"], expected["y"], epochs=2)
    close(engine.predict_proba(expected["X"]), expected["engine_next"])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name, target, method", [("classifier", "y", "predict_proba"), ("regressor", "t", "predict")])
def test_a_pickled_estimator_trains_on(name, target, method, expected):
    estimator = unpickled(name)
    close(getattr(estimator, method)(expected["X"]), expected[name])
    estimator.partial_fit(expected["X"], expected[target])
    close(getattr(estimator, method)(expected["X"]), expected[f"{name}_next"])


def test_estimators_that_were_saved(expected):
    with np.load(ESTIMATORS / "expected.npz") as arrays:
        wanted = dict(arrays)
    close(MLPClassifier.load(ESTIMATORS / "classifier.safetensors").predict_proba(expected["X"]), wanted["classifier"])
    predicted = TableRegressor.load(ESTIMATORS / "regressor.safetensors").predict(frame(60, gaps=True))
    np.testing.assert_allclose(predicted, wanted["regressor"], rtol=0, atol=TOLERANCE * abs(wanted["regressor"]).max())
