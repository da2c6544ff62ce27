"""The estimators among scikit-learn's tools: its checks, its meta-estimators, pickles, data frames, bad input."""

import inspect
import io
import pickle
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pandas
import pytest
from sklearn import neural_network as theirs
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import LabelBinarizer, StandardScaler
from sklearn.utils.estimator_checks import check_estimator, estimator_checks_generator

import fusemlp
from fusemlp import sklearn as ours
from fusemlp.sklearn import MLPClassifier, MLPRegressor, settings
from fusemlp.sklearn.estimators import _classes_of
from fusemlp_kernels.contract import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

X, Y = load_iris(return_X_y=True)
NAMES = ("MLPClassifier", "MLPRegressor")
# Checks that scikit-learn's classifier skips, because it has no such parameter.
MORE_CHECKS = {"MLPClassifier": {"check_class_weight_classifiers"}, "MLPRegressor": set()}
# They need SCIPY_ARRAY_API in the environment, and a decision_function, which scikit-learn's own has not either.
SKIPPED = {"check_array_api_input", "check_classifiers_multilabel_output_format_decision_function"}


@pytest.mark.parametrize("name", NAMES)
def test_check_estimator_finds_nothing_in_any_check_of_scikit_learns_own(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(getattr(ours, name)(), on_skip=None, on_fail=None)
    checks = Counter(check.func.__name__ for _, check in estimator_checks_generator(getattr(theirs, name)()))
    mine = Counter(result["check_name"] for result in results)
    assert not checks - mine and set(mine - checks) == MORE_CHECKS[name]
    others = {(result["check_name"], result["status"]) for result in results if result["status"] != "passed"}
    assert others <= {(check, "skipped") for check in SKIPPED}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_begin_with_scikit_learns_in_order_and_with_its_defaults(name):
    mine, reference = getattr(ours, name)(), getattr(theirs, name)()
    own, known = mine.get_params(), reference.get_params()
    assert {parameter: own[parameter] for parameter in known} == known
    code, other = inspect.unwrap(type(mine).__init__).__code__, type(reference).__init__.__code__
    order = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    expected = other.co_varnames[: other.co_argcount + other.co_kwonlyargcount]
    assert order[: len(expected)] == expected
    assert code.co_argcount == other.co_argcount


def test_grid_search_in_two_processes():
    pipeline = make_pipeline(StandardScaler(), MLPClassifier(max_iter=300, solver="lbfgs", random_state=0))
    grid = {"mlpclassifier__alpha": [1e-3, 1.0], "mlpclassifier__hidden_layer_sizes": [(5,), (4, 3)]}
    search, alone = (GridSearchCV(pipeline, grid, cv=2, n_jobs=jobs).fit(X, Y) for jobs in (2, None))
    assert search.best_score_ > 0.9
    np.testing.assert_array_equal(search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])


def test_clone_copies_every_parameter_and_nothing_learned():
    options = {"activation": ["relu", fusemlp.LeakyReLU(0.2)], "learning_rate": fusemlp.Cosine(0.1), "clip_norm": 2.0}
    estimator = MLPRegressor(fusemlp.Huber(0.3), (4, 3), dropout=[0.1, 0.0], max_iter=2, **options).fit(X, Y)
    copy = clone(estimator)
    assert copy.get_params() == estimator.get_params()
    with pytest.raises(NotFittedError, match="This MLPRegressor instance is not fitted yet"):
        copy.predict(X)
    assert repr(copy).startswith("MLPRegressor(")


@pytest.mark.parametrize("through", ["pickle", "joblib"])
@pytest.mark.parametrize("options", [{"solver": "sgd"}, {"solver": "adam"}, {"activation": "prelu", "dropout": 0.2}])
def test_a_stored_model_predicts_and_goes_on_as_the_original(through, options, tmp_path):
    estimator = MLPClassifier((6, 5), max_iter=4, random_state=0, **options).fit(X, Y)
    if through == "pickle":
        stored = pickle.loads(pickle.dumps(estimator))
    else:
        joblib.dump(estimator, tmp_path / "model.joblib")
        stored = joblib.load(tmp_path / "model.joblib", mmap_mode="r")
    np.testing.assert_array_equal(stored.predict_proba(X), estimator.predict_proba(X))
    for one in (estimator, stored):
        one.partial_fit(X, Y).partial_fit(X[:50], Y[:50])
    np.testing.assert_array_equal(stored.predict_proba(X), estimator.predict_proba(X))
    assert stored.loss_curve_ == estimator.loss_curve_


def test_parameters_set_by_hand_are_what_predicts():
    estimator = MLPRegressor(hidden_layer_sizes=(), max_iter=1, random_state=0).fit(X, Y)
    estimator.coefs_[0][:] = 0.0
    estimator.intercepts_ = [np.array([3.5])]
    np.testing.assert_array_equal(estimator.predict(X), np.full(150, 3.5))
    assert not estimator.coefs_[0].any()


def test_feature_names_are_kept_and_checked():
    frame = pandas.DataFrame(X, columns=["a", "b", "c", "d"])
    labels = pandas.Series(np.array(["one", "two", "three"])[Y])
    scaled = make_pipeline(StandardScaler(), MLPClassifier(max_iter=5)).set_output(transform="pandas")
    scaled.fit(frame, labels)
    assert list(scaled[-1].feature_names_in_) == ["a", "b", "c", "d"]
    assert set(scaled.predict(frame)) <= {"one", "two", "three"}
    with pytest.raises(ValueError, match="feature names should match"):
        scaled[-1].predict(frame[["b", "a", "c", "d"]])


def test_every_activation_alone_and_per_layer_is_trained():
    for activation in (*ACTIVATIONS[1:], ["tanh", fusemlp.PReLU(0.1)]):
        estimator = MLPClassifier((6, 5), activation, max_iter=20, random_state=0).fit(X, Y)
        assert estimator.loss_ < estimator.loss_curve_[0]
    assert [slope is None for slope in estimator.slopes_] == [True, False, True]
    same = [MLPClassifier((6, 5), name, max_iter=3, random_state=0).fit(X, Y) for name in ("sigmoid", "logistic")]
    np.testing.assert_array_equal(same[0].coefs_[0], same[1].coefs_[0])


@pytest.mark.parametrize("precision, backend", [("fp32", "numpy"), ("fp64", "numpy"), ("fp64", "auto")])
def test_precision_and_backend(precision, backend):
    estimator = MLPRegressor(precision=precision, backend=backend, max_iter=2).fit(X, Y)
    assert estimator.coefs_[0].dtype == {"fp32": np.float32, "fp64": np.float64}[precision]
    assert np.isfinite(estimator.predict(X)).all()


def test_by_default_the_first_backend_that_works_is_taken(monkeypatch):
    assert MLPClassifier().backend == MLPRegressor().backend == "auto"
    chosen = MLPClassifier(max_iter=2, random_state=0).fit(X, Y)
    named = MLPClassifier(max_iter=2, random_state=0, backend="numpy").fit(X, Y)
    np.testing.assert_array_equal(chosen.coefs_[0], named.coefs_[0], strict=True)

    # lbfgs and fp64 have a backend that can do them, on a machine with a card too
    monkeypatch.setattr(settings, "working_backend", lambda: "triton")
    loss = fusemlp.CrossEntropy()
    for options in ({}, {"precision": "bf16"}):
        assert settings.backend_of(MLPClassifier(**options), loss) == "triton"
    assert settings.backend_of(MLPRegressor(), fusemlp.Quantiles()) == "numpy"
    for options in ({"solver": "lbfgs"}, {"precision": "fp64"}):
        estimator = MLPClassifier(max_iter=2, random_state=0, **options).fit(X, Y)
        assert estimator._model.engine.backend == "numpy" and estimator.coefs_[0].dtype == np.float64
    assert settings.backend_of(MLPClassifier(backend="cupy", precision="fp64"), loss) == "cupy"


BAD = {
    "unknown activation": (MLPClassifier(activation="swosh"), (X, Y), ValueError, "The 'activation' parameter of MLPC"),
    "an activation of a layer": (
        MLPClassifier((3, 2), activation=["relu", "swosh"]), (X, Y), ValueError, "unknown name 'swosh'",
    ),
    "too few activations": (MLPClassifier((3, 2), ["relu"]), (X, Y), ValueError, "hidden layer.*, got 1"),
    "dropout for other layers": (MLPClassifier((3,), dropout=[0.1, 0.2]), (X, Y), ValueError, "hidden layer.*, got 2"),
    "dropout of all": (MLPClassifier(dropout=1.0), (X, Y), ValueError, "'dropout' parameter"),
    "unknown solver": (MLPClassifier(solver="rmsprop"), (X, Y), ValueError, "'solver' parameter"),
    "unknown loss": (MLPRegressor("hinge"), (X, Y), ValueError, "'loss' parameter of MLPRegressor"),
    "negative counts": (MLPRegressor("poisson"), (X, Y - 1.0), ValueError, r"requires y >= 0, got -1"),
    "a width of zero": (MLPClassifier((3, 0)), (X, Y), ValueError, r"hidden_layer_sizes must be > 0, got \[3, 0\]"),
    "missing values": (MLPClassifier(), (np.full((3, 2), np.nan), [0, 1, 0]), ValueError, "Input X contains NaN"),
    "real classes": (MLPClassifier(), (X, Y + 0.5), ValueError, "Unknown label type"),
    "lengths": (MLPClassifier(), (X, Y[:9]), ValueError, "inconsistent numbers of samples"),
    "weights of zero": (MLPClassifier(), (X, Y, np.zeros(150)), ValueError, "at least one non-zero number"),
    "weights, too few": (MLPClassifier(), (X, Y, np.ones(3)), ValueError, "sample_weight.shape"),
    "a backend that is none": (MLPClassifier(backend="tpu"), (X, Y), ValueError, "'backend' parameter"),
    "a precision of GPUs": (MLPClassifier(precision="tf32"), (X, Y), RuntimeError, "tf32"),
    "callbacks": (MLPClassifier(callbacks=[3]), (X, Y), TypeError, "callbacks: expected objects"),
    "balanced labels": (
        MLPClassifier(class_weight="heavy"), (X, Y), ValueError, "'class_weight' parameter of MLPClassifier",
    ),
}  # fmt: skip


@pytest.mark.parametrize("estimator, data, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_anything_is_learned(estimator, data, error, message):
    estimator = clone(estimator)
    with pytest.raises(error, match=message):
        estimator.fit(*data)
    assert not [name for name in vars(estimator) if name.endswith("_")]


@pytest.mark.parametrize(
    "change, data",
    [
        ({"hidden_layer_sizes": 7}, (X, Y)),
        ({}, (X, Y % 2)),
        ({}, (X[:, :3], Y)),
        ({"dropout": [0.1, 0.2]}, (X, Y)),
        # A new fit that is refused after the checks of classes and features.
        ({"warm_start": False, "precision": "tf32"}, (X[:, :3], np.array(["a", "b"])[Y % 2])),
    ],
)
def test_a_refused_fit_leaves_the_model_as_it_was(change, data):
    estimator = MLPClassifier(max_iter=2, warm_start=True, random_state=0).fit(X, Y)
    options, before = estimator.get_params(), estimator.predict_proba(X)
    with pytest.raises((ValueError, fusemlp.BackendUnavailableError)):
        estimator.set_params(**change).fit(*data)
    estimator.set_params(**options)
    np.testing.assert_array_equal(estimator.predict_proba(X), before)
    assert list(estimator.classes_) == [0, 1, 2]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"X_val": X}, "y_val is missing"),
        ({"y_val": Y}, "X_val is missing"),
        ({"X_val": X[:, :2], "y_val": Y}, "X has 2 features, but MLPClassifier is expecting 4"),
        ({"X_val": X, "y_val": Y[:5]}, "inconsistent numbers of samples"),
        ({"X_val": X, "y_val": Y + 7}, "classes not in `self.classes_`"),
    ],
)
def test_bad_held_out_rows(given, message):
    with pytest.raises(ValueError, match=message):
        MLPClassifier().fit(X, Y, **given)


def test_partial_fit_refuses():
    for options, classes, message in (
        ({"class_weight": "balanced"}, [0, 1, 2], "'balanced' is not supported for partial_fit"),
        ({}, None, "classes must be passed on the first call"),
    ):
        with pytest.raises(ValueError, match=message):
            MLPClassifier(**options).partial_fit(X, Y, classes=classes)
    assert not hasattr(MLPClassifier(solver="lbfgs"), "partial_fit")


def test_wide_sparse_rows_are_predicted_block_by_block(monkeypatch):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    digits, y = load_digits(return_X_y=True)
    estimator = MLPClassifier(max_iter=2, random_state=0).fit(digits / 16.0, y)
    monkeypatch.setattr("fusemlp.sklearn.model.DENSE_ELEMENTS", 64 * 100)
    rows = scipy_sparse.csr_array(digits / 16.0)
    np.testing.assert_allclose(estimator.predict_proba(rows), estimator.predict_proba(digits / 16.0), rtol=1e-12)


def test_threads_may_predict_with_one_model():
    estimator = MLPClassifier(max_iter=2, random_state=0).fit(X, Y)
    parts = [X[start : start + 40] * (1.0 + start) for start in range(0, 100, 10)]
    expected = [estimator.predict_proba(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, wanted in zip(pool.map(estimator.predict_proba, parts), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)


def test_the_model_holds_no_file_or_device():
    buffer = io.BytesIO()
    pickle.dump(MLPClassifier(max_iter=1).fit(X, Y), buffer)
    # two matrices and Adam's two moments for each, in float64, and little else
    numbers = 4 * 100 + 100 + 100 * 3 + 3
    assert buffer.tell() < 3 * 8 * numbers + 20_000


def test_the_score_is_the_accuracy_whatever_the_labels_are():
    rows, labels = load_iris(return_X_y=True)
    weight = np.arange(1.0, 151.0)
    for targets in (labels, labels.astype(np.int16), labels > 0, np.array(["a", "b", "c"])[labels], list(labels)):
        model = MLPClassifier(5, max_iter=30, random_state=0).fit(rows, targets)
        assert model.score(rows, targets) == accuracy_score(targets, model.predict(rows))
        expected = accuracy_score(targets, model.predict(rows), sample_weight=weight)
        assert model.score(rows, targets, weight) == expected
        with pytest.raises(ValueError, match="inconsistent numbers of samples"):
            model.score(rows, targets[:-1])


@pytest.mark.parametrize("kind", ["int8", "uint16", "int64", ">i4", "bool"])
@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_what_is_known_of_integer_classes_is_what_is_learned_from_the_rows(kind, count):
    labels = (np.arange(90) % count).astype(kind)
    for targets in (labels, labels[::-1].copy(), (labels + labels.dtype.type(1)).astype(kind)):
        expected = LabelBinarizer().fit(targets)
        classes, several = _classes_of(targets)
        np.testing.assert_array_equal(classes, expected.classes_, strict=True)
        assert several == expected.y_type_.startswith("multilabel")
