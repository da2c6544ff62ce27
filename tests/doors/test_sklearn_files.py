"""Estimators in files: save and load without pickle, and ONNX graphs that predict what the estimators predict."""

import json
import pickle
import warnings

import numpy as np
import onnxruntime
import pandas
import pytest
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning, NotFittedError

import fusemlp
from fusemlp import ArgumentError, CheckpointError, Cosine, Huber
from fusemlp.sklearn import MLPClassifier, MLPRegressor, TableClassifier, TableRegressor, files

X, Y = load_iris(return_X_y=True)
WORDS = np.array(["setosa", "versicolor", "virginica"])[Y]
SMALL = {"hidden_layer_sizes": (8,), "max_iter": 5, "random_state": 0, "backend": "numpy"}
# Attributes that are compared otherwise, or are made anew.
APART = ("coefs_", "intercepts_", "slopes_", "_model")


def case(name, model, targets, features=X):
    return pytest.param(model, targets, features, id=name)


CASES = [
    case("three numbers", MLPClassifier(**SMALL), Y),
    case("words", MLPClassifier(**SMALL, learning_rate=Cosine(0.01), solver="adamw"), WORDS),
    case("words as objects", MLPClassifier(**SMALL, class_weight={"setosa": 2.0}), WORDS.astype(object)),
    case("truth values", MLPClassifier(**SMALL), Y == 1),
    case("one class", MLPClassifier(**SMALL), np.full(150, 7)),
    case("real labels", MLPClassifier(**SMALL, early_stopping=True, n_iter_no_change=np.inf), Y * 1.0),
    case("several labels", MLPClassifier(**SMALL), np.column_stack([Y == 0, Y == 1]).astype(int)),
    case("lbfgs", MLPClassifier(**SMALL, solver="lbfgs"), Y),
    case(
        "layers",
        MLPClassifier(**{**SMALL, "hidden_layer_sizes": [8, 4]}, activation=["prelu", "gelu"], dropout=(0.5, 0.0)),
        np.where(Y == 0, "a", "b"),
        pandas.DataFrame(X.astype(np.float32), columns=list("abcd")),
    ),
    case("rates", MLPClassifier(**SMALL, solver="sgd", learning_rate="invscaling"), Y),
    case("counts", MLPRegressor("poisson", **SMALL), Y),
    case("two values", MLPRegressor(Huber(2.0), **SMALL), np.column_stack([Y, -Y]) * 0.5),
]


def fit(model, features, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, targets)


@pytest.mark.parametrize("model, targets, features", CASES)
def test_a_loaded_estimator_is_the_saved_one(model, targets, features, tmp_path):
    fit(model, features, targets).save(tmp_path / "model.safetensors")
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


@pytest.mark.parametrize("model, targets, features", CASES)
def test_onnx_predicts_the_same(model, targets, features, tmp_path):
    fit(model, features, targets).to_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    kind = model.coefs_[0].dtype
    assert session.get_inputs()[0].type == {"float32": "tensor(float)", "float64": "tensor(double)"}[kind.name]
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"x": np.asarray(features, kind)}), strict=True))
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
    model = fit(MLPRegressor(**SMALL), X, Y)
    model.coefs_[0] = np.zeros_like(model.coefs_[0])
    model.save(tmp_path / "model.safetensors")
    assert not MLPRegressor.load(tmp_path / "model.safetensors").coefs_[0].any()


def test_the_file_is_a_checkpoint_of_the_network(tmp_path):
    model = fit(MLPClassifier(**SMALL), X, Y)
    model.save(tmp_path / "model.safetensors")
    engine = fusemlp.load(tmp_path / "model.safetensors", backend="numpy")
    np.testing.assert_array_equal(engine.predict(X), model.predict(X))


def test_callbacks_and_random_states_are_left_out(tmp_path):
    given = {**SMALL, "random_state": np.random.RandomState(0)}
    fit(MLPClassifier(**given, callbacks=[fusemlp.EarlyStopping("loss")]), X, Y).save(tmp_path / "model")
    loaded = MLPClassifier.load(tmp_path / "model")
    assert loaded.callbacks is None and loaded.random_state is None


def test_a_model_of_a_missing_backend_loads_on_numpy(tmp_path, monkeypatch):
    model = fit(MLPClassifier(**SMALL, precision="fp32"), X, Y)
    model.save(tmp_path / "model")
    monkeypatch.setattr("fusemlp.sklearn.model.availability", lambda: {"numpy": "gone"})
    assert MLPClassifier.load(tmp_path / "model")._model.options["backend"] == "numpy"


class Unheard:
    def __str__(self):
        return "auto"


def test_the_attack_of_a_training_that_is_gone_becomes_its_own_steps():
    stored = {"kind": "trades", "eps": 0.1, "bounds": [0.0, 1.0], "steps": 4, "step_size": None, "beta": 6.0}
    attack = files._decoded({"adversarial": stored | {"norm": "inf", "seed": 3}})
    assert attack == fusemlp.PGD(0.1, steps=4, seed=3, bounds=(0.0, 1.0))


def test_what_cannot_be_saved_or_read_is_refused_before_anything_changes(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(NotFittedError):
        MLPClassifier().save(path)
    with pytest.raises(NotFittedError):
        MLPClassifier().to_onnx(path)
    model = fit(MLPClassifier(**SMALL), X, Y)
    with pytest.raises(ArgumentError, match=r"momentum: a file cannot hold .*; use joblib\.dump"):
        model.set_params(momentum=Unheard()).save(path)
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


def table(n=80):
    generator = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {"colour": generator.choice(["red", "green", "blue"], n), "size": generator.normal(size=n)}
    )
    return frame, np.where(frame["size"] > 0, "yes", "no"), 3.0 * frame["size"].to_numpy() + 100.0


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("kind", [TableClassifier, TableRegressor])
def test_table_estimators_are_saved_whole(kind, models, tmp_path):
    frame, labels, values = table()
    options = {
        "hidden": (6,),
        "epochs": 4,
        "backend": "numpy",
        "lr": Cosine(0.01),
        "optimizer": "adamw",
    }
    model = kind(**options, models=models).fit(frame, labels if kind is TableClassifier else values)
    model.save(tmp_path / "table.safetensors")
    loaded = kind.load(tmp_path / "table.safetensors", backend="numpy")
    assert loaded.get_params() == model.get_params()
    np.testing.assert_array_equal(loaded.predict(frame), model.predict(frame), strict=True)
    assert loaded.history_ == model.history_ and loaded.notes_ == model.notes_
    assert list(loaded.feature_names_in_) == ["colour", "size"]
    loaded.to_onnx(tmp_path / "table.onnx")
    loaded.save(tmp_path / "again.safetensors")
    again = kind.load(tmp_path / "again.safetensors", backend="numpy")
    assert again.history_ == model.history_
    np.testing.assert_array_equal(again.predict(frame), model.predict(frame))
