"""Files of earlier releases load, predict the same, and continue the same training."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest

from fusemlp import load, load_checkpoint

FOLDER = Path(__file__).parents[1] / "fixtures" / "release_0_1_0"
# Rounding differs with BLAS and with the compiled loop. A network of these sizes, trained for a few epochs in float32,
# moves by a few hundred units of rounding; another learning rate or state moves it by 1e-3 or more.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def expected():
    """Return data, and the predictions of the release that wrote the files, before and after further training."""
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


def unpickled(name):
    with warnings.catch_warnings():
        # scikit-learn warns if another version wrote the file.
        warnings.simplefilter("ignore")
        return pickle.loads((FOLDER / f"{name}.pickle").read_bytes())


def close(given, wanted):
    np.testing.assert_allclose(given, wanted, rtol=0, atol=TOLERANCE)


def test_a_model(expected):
    engine = load(FOLDER / "model.safetensors", backend="numpy")
    close(engine.predict_proba(expected["X"]), expected["proba"])


def test_a_checkpoint_resumes_inside_an_epoch(expected):
    X, y = expected["X"], expected["y"]
    engine = load_checkpoint(FOLDER / "checkpoint.safetensors", backend="numpy")
    assert engine.fit_state is not None and (engine.fit_state.epoch, engine.fit_state.batch) == (2, 2)
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
