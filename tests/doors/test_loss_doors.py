"""A loss of the caller's, and those that the host computes, through the doors beside Engine."""

import pickle

import numpy as np
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV

import fusemlp
from fusemlp import MLP, MSE, Adam, Engine, Fleet, GaussianNLL, Quantiles
from fusemlp.sklearn import FleetSearchCV, MLPClassifier, MLPRegressor
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError
from make import assert_same_state
from own_losses import cross_entropy, logistic, mse

RANDOM = np.random.default_rng(0)
# three batches of 32 rows and a short one an epoch
ROWS, INPUTS, OUTPUTS = 100, 6, 3
X = RANDOM.normal(size=(ROWS, INPUTS))
VALUES = X[:, :OUTPUTS] + 0.1 * RANDOM.normal(size=(ROWS, OUTPUTS))
NUMPY = {"backend": "numpy", "precision": "fp64"}


FLEETS = {
    "function": (mse, 3),
    "quantiles": (Quantiles(), 3),
    "gaussian": (GaussianNLL(), 6),
    "gaps": (MSE(missing=True), 3),
}


@pytest.mark.parametrize("name", FLEETS)
def test_a_fleet_is_so_many_engines_trained_alone(name):
    loss, width = FLEETS[name]
    y = VALUES[:, 0] if name == "quantiles" else np.where(X[:, 3:] > 1, np.nan, VALUES) if name == "gaps" else VALUES
    fit = {"epochs": 5, "validation_data": (X, y), "early_stopping": 2}
    fleet = Fleet(MLP([INPUTS, 8, width]), loss, vary={"lr": [0.01, 0.02], "seed": [0, 1]}, **NUMPY)
    results = fleet.fit(X, y, **fit)
    for index, (lr, seed) in enumerate([(0.01, 0), (0.01, 1), (0.02, 0), (0.02, 1)]):
        engine = Engine(MLP([INPUTS, 8, width]), loss, Adam(lr), seed=seed, **NUMPY)
        engine.fit(X, y, **fit)
        assert_same_state(results.engine(index), engine)
    predicted = np.mean([results.engine(index).predict(X) for index in range(4)], axis=0)
    np.testing.assert_allclose(fleet.predict(X).prediction, predicted)


def test_workers_take_functions_that_pickle():
    vary = {"seed": [0, 1]}
    here, there = (Fleet(MLP([INPUTS, OUTPUTS]), mse, vary=vary, backend="numpy") for _ in range(2))
    here.fit(X, VALUES, epochs=2)
    results = there.fit(X, VALUES, epochs=2, workers="sequential")
    for index in range(2):
        wanted = here.results.engine(index).state_dict()
        assert all(np.array_equal(one, wanted[name]) for name, one in results.engine(index).state_dict().items())
    fleet = Fleet(MLP([INPUTS, OUTPUTS]), lambda outputs, targets: mse(outputs, targets), vary=vary, backend="numpy")
    with pytest.raises(ArgumentError, match="workers: the loss '<lambda>' does not pickle; define the function at the"):
        fleet.fit(X, VALUES, epochs=1, workers="loky")


def half_squares(outputs, targets, weights=None):
    value, gradient = mse(outputs, targets, weights)
    return value * outputs.shape[1] / 2, gradient * outputs.shape[1] / 2


WEIGHTS = RANDOM.uniform(0.5, 2.0, ROWS)
CLASSES = np.array(["a", "b", "c"])[VALUES.argmax(axis=1)]
LABELS = (VALUES > 0).astype(int)
# an estimator, the loss of the caller's that repeats its own, and targets
REPEATED = {
    "regressor": (MLPRegressor, half_squares, VALUES[:, 0]),
    "classes": (MLPClassifier, cross_entropy, CLASSES),
    "two classes": (MLPClassifier, logistic, CLASSES == "a"),
    "labels": (MLPClassifier, logistic, LABELS),
}
FITS = {
    "adam": {},
    "sgd": {"solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.1},
    "lbfgs": {"solver": "lbfgs", "max_iter": 20},
    "early stopping": {"early_stopping": True, "n_iter_no_change": 3},
    "attack": {"adversarial": fusemlp.PGD(0.1, steps=2)},
    "adamw, dropout, clipping": {"solver": "adamw", "dropout": 0.2, "clip_norm": 0.1},
}


def assert_alike(mine, other):
    for attribute in ("coefs_", "intercepts_"):
        for one, wanted in zip(getattr(mine, attribute), getattr(other, attribute), strict=True):
            assert np.abs(one - wanted).max() <= 1e-9
    assert mine.loss_ == pytest.approx(other.loss_, rel=1e-9)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("training", FITS)
@pytest.mark.parametrize("name", REPEATED)
def test_an_estimator_trains_as_with_its_own_loss(name, training, weighted):
    kind, loss, y = REPEATED[name]
    options = {
        "hidden_layer_sizes": (8,),
        "batch_size": 32,
        "max_iter": 50,
        "random_state": 0,
        **NUMPY,
        **FITS[training],
    }
    weights = WEIGHTS if weighted else None
    # 50 epochs of four batches
    own, built_in = (kind(**beside, **options).fit(X, y, weights) for beside in ({"loss": loss}, {}))
    assert_alike(own, built_in)
    answer = "predict" if name == "regressor" else "predict_proba"
    np.testing.assert_allclose(getattr(own, answer)(X), getattr(built_in, answer)(X), atol=1e-8)
    assert own.score(X, y) == pytest.approx(built_in.score(X, y))
    if training == "early stopping":
        np.testing.assert_allclose(own.validation_scores_, built_in.validation_scores_)
        np.testing.assert_allclose(own.validation_loss_curve_, built_in.validation_loss_curve_, rtol=1e-9)


SMALL = {"hidden_layer_sizes": (8,), "batch_size": 32, "random_state": 0, **NUMPY}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_single_steps_warm_starts_and_class_weights():
    pairs = [
        (MLPClassifier(loss=loss, **SMALL), MLPClassifier(loss=loss, max_iter=3, warm_start=True, **SMALL))
        for loss in (cross_entropy, "log_loss")
    ]
    for stepped, warm in pairs:
        for _ in range(3):
            stepped.partial_fit(X, CLASSES, WEIGHTS, classes=np.unique(CLASSES))
        warm.set_params(class_weight="balanced").fit(X, CLASSES).fit(X, CLASSES)
    for own, built_in in zip(*pairs, strict=True):
        assert_alike(own, built_in)
        assert own.n_iter_ == built_in.n_iter_


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_rows_that_validate_and_sparse_rows():
    sparse = scipy.sparse.csr_matrix(np.where(X > 0, X, 0))
    for weights in (None, WEIGHTS):
        own, built_in = (
            MLPRegressor(loss, max_iter=5, **SMALL).fit(sparse, VALUES[:, 0], weights, X_val=X, y_val=VALUES[:, 0])
            for loss in (half_squares, "squared_error")
        )
        assert_alike(own, built_in)
        np.testing.assert_allclose(own.validation_loss_curve_, built_in.validation_loss_curve_, rtol=1e-9)
        np.testing.assert_allclose(own.predict(sparse), built_in.predict(sparse), rtol=1e-6)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_searches_clones_pickles_and_files(tmp_path):
    grid = {"loss": [half_squares, "squared_error", Quantiles()], "alpha": [0.0, 0.1]}
    y = VALUES[:, 0]
    searches = [
        search(MLPRegressor(max_iter=3, **SMALL), grid, cv=2).fit(X, y) for search in (GridSearchCV, FleetSearchCV)
    ]
    scores = [search.cv_results_["mean_test_score"] for search in searches]
    np.testing.assert_array_equal(*scores)
    # the loss of the caller's repeats that of scikit-learn
    np.testing.assert_allclose(scores[0][::3], scores[0][1::3])
    path = tmp_path / "m.safetensors"
    for estimator, targets in (
        (MLPRegressor(half_squares, max_iter=3, **SMALL), y),
        (MLPRegressor(GaussianNLL(), max_iter=3, **SMALL), y),
        (MLPClassifier(loss=cross_entropy, max_iter=3, **SMALL), CLASSES),
        (MLPClassifier(loss=lambda outputs, targets: cross_entropy(outputs, targets), max_iter=3, **SMALL), CLASSES),
    ):
        assert clone(estimator).loss == estimator.loss
        estimator.fit(X, targets)
        estimator.save(path)
        loaded = type(estimator).load(path)
        assert np.array_equal(loaded.predict(X), estimator.predict(X))
        assert fusemlp.load(path).outputs(X).shape[0] == ROWS
        if callable(estimator.loss):
            with pytest.raises(ArgumentError, match=r"a function, .* an estimator takes it by set_params"):
                loaded.fit(X, targets)
            loaded.set_params(loss=estimator.loss)
        again = [estimator, loaded]
        if getattr(estimator.loss, "__name__", "") != "<lambda>":
            again.append(pickle.loads(pickle.dumps(estimator)))
        for copy in again:
            copy.partial_fit(X, targets)
            assert_alike(copy, estimator)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("loss, y", [(Quantiles([0.2, 0.6]), VALUES[:, 0]), (GaussianNLL(), VALUES), (mse, VALUES)])
def test_an_estimator_trains_as_an_engine(loss, y):
    options = {"alpha": 0.0, "tol": 0.0, "shuffle": False, **SMALL}
    start = MLPRegressor(loss, max_iter=1, solver="sgd", learning_rate_init=1e-300, **options).fit(X, y)
    # 50 epochs of four batches
    estimator = MLPRegressor(loss, max_iter=50, **options).fit(X, y)
    net = MLP([INPUTS, 8, len(start.intercepts_[1])])
    engine = Engine(net, loss, Adam(0.001, convention="scikit-learn"), batch_size=32, **NUMPY)
    state = {f"{2 * layer}.weight": coef.T for layer, coef in enumerate(start.coefs_)}
    engine.load_state_dict({**state, **{f"{2 * layer}.bias": bias for layer, bias in enumerate(start.intercepts_)}})
    history = engine.fit(X, y, epochs=50, shuffle=False)
    np.testing.assert_allclose(estimator.loss_curve_, history.history["loss"], rtol=1e-9)
    for layer, coef in enumerate(estimator.coefs_):
        np.testing.assert_allclose(coef.T, engine.state_dict()[f"{2 * layer}.weight"], atol=1e-9)
    np.testing.assert_allclose(estimator.predict(X), engine.predict(X), atol=1e-8)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_quantiles_and_deviations():
    y = VALUES[:, 0]
    bands = MLPRegressor(Quantiles([0.2, 0.6]), max_iter=300, learning_rate_init=0.01, **SMALL).fit(X, y)
    quantiles = bands.predict(X)
    assert quantiles.shape == (ROWS, 2) and (quantiles[:, 0] <= quantiles[:, 1]).all()
    assert bands.score(X, y) == r2_score(y, quantiles[:, 1]) > 0.5
    normal = MLPRegressor(GaussianNLL(), max_iter=50, early_stopping=True, **SMALL).fit(X, VALUES)
    mean, std = normal.predict(X, return_std=True)
    assert mean.shape == std.shape == (ROWS, OUTPUTS) and (std > 0).all()
    assert np.array_equal(mean, normal.predict(X))
    np.testing.assert_allclose(normal.predict(scipy.sparse.csr_matrix(X), return_std=True), (mean, std))
    with pytest.raises(ArgumentError, match="return_std: it needs the loss gaussian, this engine has 'quantiles'"):
        bands.predict(X, return_std=True)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", ["classes", "two classes"])
def test_an_engine_from_a_classifiers_file_predicts_classes(name, tmp_path):
    kind, loss, y = REPEATED[name]
    codes = np.unique(y, return_inverse=True)[1]
    values = codes if name == "classes" else codes[:, None].astype(float)
    files = [tmp_path / "own.safetensors", tmp_path / "built-in.safetensors"]
    for chosen, path in zip((loss, "log_loss"), files, strict=True):
        kind(loss=chosen, max_iter=3, **SMALL).fit(X, y).save(path)
    own, built_in = map(fusemlp.load, files)
    for output in (None, 0, 1):
        np.testing.assert_allclose(own.input_gradient(X, output=output), built_in.input_gradient(X, output=output))
    assert np.array_equal(own.predict(X), built_in.predict(X))
    # the function may come with the file, or later
    for engine in (fusemlp.load(files[0], loss=loss), own):
        engine.fit(X, values, epochs=1, loss=loss)
        assert engine.predict(X).dtype == np.int64 and set(engine.predict(X)) <= set(codes)
        assert engine.predict_proba(X).shape == (ROWS, codes.max() + 1)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_scores_are_of_the_loss_of_the_fit():
    y = VALUES[:, 0]
    with pytest.raises(NotFittedError, match="not fitted yet"):
        MLPRegressor().score(X, y)
    for loss, other in ((Quantiles([0.2, 0.6]), "squared_error"), ("squared_error", Quantiles([0.2, 0.6]))):
        estimator = MLPRegressor(loss, max_iter=2, **SMALL).fit(X, y)
        before = estimator.score(X, y)
        assert estimator.set_params(loss=other).score(X, y) == before


def test_an_error_of_the_function_leaves_the_estimator():
    calls = []

    def fails(outputs, targets):
        calls.append(outputs.shape)
        if len(calls) == 6:
            raise RuntimeError("of the caller")
        return half_squares(outputs, targets)

    estimator = MLPRegressor(fails, max_iter=1, **SMALL)
    with pytest.warns(ConvergenceWarning):
        estimator.fit(X, VALUES)
    assert calls == [(32, 3), (32, 3), (32, 3), (4, 3)]
    before, coefs = vars(estimator).copy(), [coef.copy() for coef in estimator.coefs_]
    for train in (estimator.partial_fit, estimator.fit):
        with pytest.raises(RuntimeError, match="of the caller"):
            train(X, VALUES)
        calls[:] = calls[:4]
        assert vars(estimator).keys() == before.keys()
        assert all(map(np.array_equal, estimator.coefs_, coefs))


REFUSED = {
    "two arguments": (MLPRegressor(lambda outputs: 0), ArgumentTypeError, "loss: '<lambda>' is called with outputs"),
    "a class": (MLPRegressor(MSE), ArgumentTypeError, "loss: expected a name such as"),
    "gaps": (MLPRegressor(fusemlp.Huber(missing=True)), ArgumentError, "loss: missing=True of huber is for gaps in y"),
    "several targets": (MLPRegressor(Quantiles()), ArgumentError, "loss: quantiles learns one target, and there are 3"),
    "smoothing": (
        MLPClassifier(loss=logistic, label_smoothing=0.1),
        ArgumentError,
        "label_smoothing: a function such as 'logistic' gets whole classes; leave it 0",
    ),
    "intervals": (
        MLPClassifier(loss=cross_entropy, adversarial=fusemlp.IBP(0.1)),
        ArgumentError,
        "adversarial: IBP ",
    ),
    "card": (
        MLPClassifier(loss=logistic, backend="cupy"),
        BackendUnavailableError,
        "loss: a function such as 'logistic' is not supported yet on the backend 'cupy'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_estimator_refuses(name):
    estimator, error, words = REFUSED[name]
    y = LABELS if isinstance(estimator, MLPClassifier) else VALUES
    with pytest.raises(error, match=words):
        estimator.fit(X, y)


def test_weights_need_a_function_that_takes_them():
    def unweighted(outputs, targets):
        return logistic(outputs, targets)

    with pytest.raises(ArgumentError, match="sample_weight: the loss 'unweighted' takes outputs and targets alone"):
        MLPClassifier(loss=unweighted).fit(X, LABELS, WEIGHTS)
    with pytest.raises(ArgumentError, match="class_weight: the loss 'unweighted' takes outputs and targets alone"):
        MLPClassifier(loss=unweighted, class_weight="balanced").fit(X, CLASSES == "a")
