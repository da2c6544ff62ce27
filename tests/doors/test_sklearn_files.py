"""Estimators in files: save and load without pickle, and ONNX graphs that predict what the estimators predict."""

import json
import pickle

import numpy as np
import pandas
import pytest
from graphs import graph_outputs
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError

import fusemlp
import make
from fusemlp import ArgumentError, CheckpointError, Cosine, Huber
from fusemlp.sklearn import MLPClassifier, MLPRegressor, TableClassifier, TableRegressor
from fusemlp.sklearn.model import _decoded

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

X, Y = load_iris(return_X_y=True)
WORDS = np.array(["setosa", "versicolor", "virginica"])[Y]
SMALL = {"hidden_layer_sizes": (8,), "max_iter": 5, "random_state": 0, "backend": "numpy"}
# Attributes that are compared otherwise, or are made anew.
APART = ("coefs_", "intercepts_", "slopes_", "_model")


LAYERS = {**SMALL, "hidden_layer_sizes": [8, 4], "activation": ["prelu", "gelu"], "dropout": (0.5, 0.0)}
FRAME = pandas.DataFrame(X.astype(np.float32), columns=list("abcd"))
# A model, its targets, and its features where they are not X.
CASES = {
    "three numbers": (MLPClassifier(**SMALL), Y),
    "words": (MLPClassifier(**SMALL, learning_rate=Cosine(0.01), solver="adamw"), WORDS),
    "words as objects": (MLPClassifier(**SMALL, class_weight={"setosa": 2.0}), WORDS.astype(object)),
    "truth values": (MLPClassifier(**SMALL), Y == 1),
    "one class": (MLPClassifier(**SMALL), np.full(150, 7)),
    "real labels": (MLPClassifier(**SMALL, early_stopping=True, n_iter_no_change=np.inf), Y * 1.0),
    "several labels": (MLPClassifier(**SMALL), np.column_stack([Y == 0, Y == 1]).astype(int)),
    "lbfgs": (MLPClassifier(**SMALL, solver="lbfgs"), Y),
    "layers": (MLPClassifier(**LAYERS), np.where(Y == 0, "a", "b"), FRAME),
    "rates": (MLPClassifier(**SMALL, solver="sgd", learning_rate="invscaling"), Y),
    "counts": (MLPRegressor("poisson", **SMALL), Y),
    "two values": (MLPRegressor(Huber(2.0), **SMALL), np.column_stack([Y, -Y]) * 0.5),
}


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_estimator_is_the_saved_one(case, tmp_path):
    model, targets, features = (*CASES[case], X)[:3]
    model.fit(features, targets).save(tmp_path / "model.safetensors")
    loaded = type(model).load(tmp_path / "model.safetensors")
    assert loaded.get_params() == model.get_params()
    before, after = vars(model), vars(loaded)
    assert set(after) == set(before)
    for name in set(before) - set(APART):
        np.testing.assert_equal(after[name], before[name], err_msg=name)
        assert type(after[name]) is type(before[name]) or np.isscalar(before[name]), name
    for mine, its in zip(model.coefs_ + model.intercepts_, loaded.coefs_ + loaded.intercepts_, strict=True):
        np.testing.assert_array_equal(mine, its, strict=True)
    np.testing.assert_array_equal(loaded.predict(features), model.predict(features), strict=True)


@pytest.mark.parametrize("case", CASES)
def test_onnx_predicts_the_same(case, tmp_path):
    model, targets, features = (*CASES[case], X)[:3]
    model.fit(features, targets).to_onnx(tmp_path / "model.onnx")
    kind = model.coefs_[0].dtype
    found = graph_outputs(tmp_path / "model.onnx", np.asarray(features, kind))
    expected = model.predict(features)
    if isinstance(model, MLPRegressor):
        np.testing.assert_allclose(found["prediction"], expected, rtol=1e-12)
        return
    np.testing.assert_array_equal(found["prediction"], expected)
    # onnxruntime's sigmoid is accurate to roundings of 1
    rounding = np.finfo(kind).eps
    np.testing.assert_allclose(found["probabilities"], model.predict_proba(features), rtol=64 * rounding, atol=rounding)


@pytest.mark.parametrize(
    "options",
    [{}, {"solver": "sgd", "learning_rate": "invscaling", "dropout": 0.5}, {"learning_rate": Cosine(0.01, steps=9)}],
    ids=["adam", "invscaling", "schedule"],
)
def test_partial_fit_continues_with_the_same_bits(options, tmp_path):
    model = MLPClassifier(**SMALL, **options)
    for _ in range(3):
        model.partial_fit(X, Y, classes=np.unique(Y))
    model.save(tmp_path / "model.safetensors")
    three = model, MLPClassifier.load(tmp_path / "model.safetensors"), pickle.loads(pickle.dumps(model))
    first, *others = [one.partial_fit(X, Y).coefs_ for one in three]
    for other in others:
        for mine, its in zip(first, other, strict=True):
            np.testing.assert_array_equal(mine, its)


def test_coefs_that_the_user_changed_are_the_saved_ones(tmp_path):
    model = MLPRegressor(**SMALL).fit(X, Y)
    model.coefs_[0] = np.zeros_like(model.coefs_[0])
    model.save(tmp_path / "model.safetensors")
    assert not MLPRegressor.load(tmp_path / "model.safetensors").coefs_[0].any()


def test_callbacks_and_random_states_are_left_out(tmp_path):
    given = {**SMALL, "random_state": np.random.RandomState(0)}
    MLPClassifier(**given, callbacks=[fusemlp.EarlyStopping("loss")]).fit(X, Y).save(tmp_path / "model")
    loaded = MLPClassifier.load(tmp_path / "model")
    assert loaded.callbacks is None and loaded.random_state is None


def test_a_model_of_a_missing_backend_loads_on_numpy(tmp_path, monkeypatch):
    model = MLPClassifier(**SMALL, precision="fp32").fit(X, Y)
    model.save(tmp_path / "model")
    monkeypatch.setattr("fusemlp.sklearn.model.availability", lambda: {"numpy": "gone"})
    assert MLPClassifier.load(tmp_path / "model")._model.options["backend"] == "numpy"


def test_the_attack_of_a_training_that_is_gone_becomes_its_own_steps():
    stored = {"kind": "trades", "eps": 0.1, "bounds": [0.0, 1.0], "steps": 4, "step_size": None, "beta": 6.0}
    attack = _decoded({"adversarial": stored | {"norm": "inf", "seed": 3}})
    assert attack == fusemlp.PGD(0.1, steps=4, seed=3, bounds=(0.0, 1.0))


def test_what_cannot_be_saved_or_read_is_refused_before_anything_changes(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(NotFittedError):
        MLPClassifier().save(path)
    with pytest.raises(NotFittedError):
        MLPClassifier().to_onnx(path)
    model = MLPClassifier(**SMALL).fit(X, Y)
    with pytest.raises(ArgumentError, match=r"momentum: a file cannot hold .*; use joblib\.dump"):
        model.set_params(momentum=object()).save(path)
    assert not path.exists()
    model.set_params(momentum=0.9).save(path)
    with pytest.raises(CheckpointError, match=r"holds a MLPClassifier; use MLPClassifier\.load\(path\)"):
        TableClassifier.load(path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        MLPClassifier.load(tmp_path / "other")
    engine = fusemlp.Engine(fusemlp.MLP([4, 3]), backend="numpy")
    engine.save_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"holds an engine, and no estimator; use fusemlp\.load\(path\)"):
        MLPClassifier.load(path)
    content = {"class": "MLPClassifier", "parameters": {"colour": 1}, "fitted": {}}
    engine.save_checkpoint(path, extra={"estimator": json.loads(json.dumps(content))})
    with pytest.raises(CheckpointError, match="parameter 'colour', which this version of fusemlp does not know"):
        MLPClassifier.load(path)


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("kind", [TableClassifier, TableRegressor])
def test_table_estimators_are_saved_whole(kind, models, tmp_path):
    table = make.frame(80, target="y", classes=2 * (kind is TableClassifier))
    X, y = table[["word", "a"]], table["y"]
    options = {"hidden": (6,), "epochs": 4, "backend": "numpy", "lr": Cosine(0.01), "optimizer": "adamw"}
    norm = fusemlp.RMSNorm(1e-3) if models == 1 else None
    model = kind(**options, models=models, norm=norm).fit(X, y)
    model.save(tmp_path / "table.safetensors")
    loaded = kind.load(tmp_path / "table.safetensors", backend="numpy")
    assert loaded.get_params() == model.get_params()
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X), strict=True)
    assert loaded.history_ == model.history_ and loaded.notes_ == model.notes_
    assert list(loaded.feature_names_in_) == ["word", "a"]
    loaded.to_onnx(tmp_path / "table.onnx")
    loaded.save(tmp_path / "again.safetensors")
    again = kind.load(tmp_path / "again.safetensors", backend="numpy")
    assert again.history_ == model.history_
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
