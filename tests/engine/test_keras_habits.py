"""Arguments, methods and names that a user of Keras types: they work, or the error names the equivalent."""

import dataclasses
import importlib
import inspect
import pickle
import re
from functools import partial

import numpy as np
import pytest

import fusemlp
import fusemlp.sklearn
from fusemlp import MLP, ArgumentError, Engine
from fusemlp.describe import blocks, losses, network
from fusemlp.describe.checks import bytes_text
from fusemlp.engine import KERAS
from fusemlp.fleet import fleet
from fusemlp.runtime import session
from fusemlp.training import fit
from make import assert_same
from make import engine as make

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 5)).astype(np.float32), RNG.integers(0, 3, 40)
W = RNG.random(40).astype(np.float32) + 0.1
THRICE = np.where(Y == 1, 3.0, 1.0)
NET = MLP([5, 8, 3])
NAMES = "MLPClassifier", "MLPRegressor", "TableClassifier", "TableRegressor"
ESTIMATORS = {name: getattr(fusemlp.sklearn, name) for name in NAMES}


class TestValidationSplit:
    def test_it_takes_the_last_share_of_rows_and_weights(self):
        one, other = make(), make()
        history = one.fit(X, Y, epochs=2, sample_weight=W, validation_split=0.3)
        expected = other.fit(X[:28], Y[:28], epochs=2, sample_weight=W[:28], validation_data=(X[28:], Y[28:], W[28:]))
        assert_same(one, other)
        assert history.history == expected.history

    def test_classes_that_only_the_last_rows_have_are_told(self):
        with pytest.warns(UserWarning, match="validation_split: .*only these have the classes 2; shuffle") as caught:
            make().fit(X, np.repeat([0, 1, 2], [20, 16, 4]), epochs=1, validation_split=0.1)
        assert caught[0].filename == __file__

    def test_weights_of_a_part_that_are_all_zero_are_refused(self):
        with pytest.raises(fusemlp.DataError, match="validation_split: the last 20 rows weigh zero"):
            make().fit(X, Y, epochs=1, validation_split=0.5, sample_weight=np.r_[np.ones(20), np.zeros(20)])


class TestBatchSize:
    @pytest.mark.parametrize("parts", [False, True])
    @pytest.mark.parametrize("optimizer", [fusemlp.SGD(0.1, momentum=0.9), fusemlp.Adam(0.01, accumulate=2)])
    def test_training_goes_on_as_in_an_engine_made_with_it(self, optimizer, parts, monkeypatch):
        if parts:
            # as on a GPU, where the memory of the gradients depends on the batch
            monkeypatch.setattr("fusemlp.runtime.session.batch_parts", lambda traits, rows, weights: rows // 4)
        one, other = make(optimizer=optimizer), make(optimizer=optimizer, batch_size=8)
        one.fit(X, Y, epochs=2, batch_size=8)
        other.fit(X, Y, epochs=2)
        assert one.batch_size == 8
        assert_same(one, other)
        # the moments stay
        one.fit(X, Y, epochs=1, batch_size=8)
        one.fit(X, Y, epochs=1, batch_size=10)
        other.fit(X, Y, epochs=1)
        other.take_batches_of(10)
        other.fit(X, Y, epochs=1)
        assert_same(one, other)
        assert float(one.step(X[:10], Y[:10])) == float(other.step(X[:10], Y[:10]))

    def test_a_refused_fit_does_not_change_it(self):
        engine = make()
        for options, message in (
            ({"monitor": "val_loss"}, "monitor"),
            ({"resume": True}, "batch_size: the fit that is resumed has batches of 16 rows, got 8"),
        ):
            with pytest.raises(ArgumentError, match=message):
                engine.fit(X, Y, epochs=2, batch_size=8, **options)
            assert engine.batch_size == 16
            engine.fit(X, Y, epochs=1)

    def test_a_plan_that_was_asked_for_stays(self):
        engine = make(plan="eager")
        engine.fit(X, Y, epochs=1, batch_size=8)
        assert engine.plan == "eager" and engine.plan_reason == "asked for"


class TestClassWeight:
    @pytest.mark.parametrize("given", [{0: 1.0, 1: 4.0, 2: 1}, {1: 4.0}, [1.0, 4.0, 1.0], np.array([1.0, 4.0, 1.0])])
    def test_it_trains_as_the_class_weights_of_the_loss_and_validates_without(self, given):
        one, other = make(), make(loss=fusemlp.CrossEntropy(class_weight=[1.0, 4.0, 1.0]))
        history = one.fit(X, Y, epochs=3, class_weight=given, validation_data=(X, Y))
        expected = other.fit(X, Y, epochs=3, validation_data=(X, Y))
        # a row's weight is read, not looked up, and enters the same product: the same bits
        assert_same(one, other)
        assert history.history["val_loss"][-1] == one.evaluate(X, Y)["loss"] != expected.history["val_loss"][-1]

    @pytest.mark.parametrize(
        ("net", "loss", "targets", "given", "weights"),
        [
            (NET, "cross_entropy", Y, {"class_weight": "balanced"}, (40 / (3 * np.bincount(Y)))[Y]),
            (
                NET,
                "cross_entropy",
                Y,
                {"class_weight": {2: 0.5}, "sample_weight": W},
                W * np.where(Y == 2, np.float32(0.5), np.float32(1)),
            ),
            (MLP([5, 1]), fusemlp.BinaryCrossEntropy(), (Y == 1) * 1.0, {"class_weight": {1: 3.0}}, THRICE),
            (NET, "cross_entropy", np.eye(3)[Y], {"class_weight": {1: 3.0}}, THRICE),
            (NET, "mse", np.eye(3)[Y], {"class_weight": {1: 3.0}}, THRICE),
            (NET, fusemlp.CrossEntropy(ignore_index=0), Y, {"class_weight": {1: 3.0}}, THRICE),
        ],
        ids=["balanced", "sample weights", "binary", "probabilities", "one-hot", "ignored"],
    )
    def test_it_is_weights_of_rows(self, net, loss, targets, given, weights):
        one, other = make(net=net, loss=loss), make(net=net, loss=loss)
        one.fit(X, targets, epochs=2, **given)
        other.fit(X, targets, epochs=2, sample_weight=weights)
        assert_same(one, other)

    def test_numbers_have_no_classes_and_some_row_has_a_weight(self):
        with pytest.raises(ArgumentError, match=r"class_weight: it needs one class for each row.*sample_weight"):
            make(loss="mse").fit(X, RNG.random((40, 3)), epochs=1, class_weight={0: 2.0})
        with pytest.raises(fusemlp.DataError, match="class_weight: it leaves no training row a weight above 0"):
            make().fit(X, np.zeros(40, int), epochs=1, class_weight={0: 0.0})


class TestMetricsAndVerbose:
    def test_accuracy_is_always_there(self):
        assert make().fit(X, Y, epochs=1, metrics=["accuracy"]).history.keys() == {"loss", "accuracy", "learning_rate"}
        assert make().fit(X, Y, epochs=1, metrics=None, callbacks=None).epochs == [0]
        assert make().evaluate(X, Y, metrics=["accuracy"]).keys() == {"loss", "accuracy"}

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("acc", "unknown name 'acc'; it is called 'accuracy' here"),
            ("mse", r"unknown name 'mse'; it is called 'rmse' \(its square root\) here"),
            (3, r"expected names such as 'auc', functions f\(targets, outputs\) -> number, or Metric\(name, rises"),
        ],
    )
    def test_names_of_keras(self, given, message):
        with pytest.raises(fusemlp.FusemlpError, match=f"metrics: {message}"):
            make().fit(X, Y, epochs=1, metrics=[given], validation_split=0.2)

    def test_a_regression_has_no_accuracy(self):
        with pytest.raises(ArgumentError, match="metrics: unknown name 'accuracy'"):
            make(loss="mse").fit(X, RNG.random((40, 3)), epochs=1, metrics=["accuracy"], validation_split=0.2)

    def test_verbose(self, capsys, monkeypatch):
        make().fit(X, Y, epochs=2)
        assert capsys.readouterr() == ("", "")
        for verbose in (True, "auto"):
            make().fit(X, Y, epochs=2, verbose=verbose)
            assert capsys.readouterr().err.count("epoch") == 2
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        make().fit(X, Y, epochs=2, verbose=2)
        lines = capsys.readouterr().err.splitlines()
        assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
        with pytest.raises(ArgumentError, match="verbose: expected 0"):
            make().fit(X, Y, epochs=1, verbose=3)


class TestSummary:
    def test_of_a_network(self, capsys):
        MLP([784, 128, 10], activation="prelu", dropout=0.1).summary()
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "MLP 784-128-10"
        assert lines[2].split() == ["1", "784", "->", "128", "prelu", "0.25", "0.1", "he_normal", "100,481"]
        assert lines[3].split()[-2:] == ["glorot_uniform", "1,290"]
        assert lines[4] == "101,771 parameters"
        assert "398 KiB (SGD), 795 KiB (SGD with momentum), 1.16 MiB (Adam)" in lines[5]
        shown = []
        assert NET.summary(print_fn=shown.append) is None
        assert shown[0].startswith("MLP 5-8-3\n") and not capsys.readouterr().out

    def test_of_an_engine(self):
        frozen = fusemlp.AdamW(0.01, per_parameter={"0.*": fusemlp.ParameterOptions(trainable=False)})
        engine, shown = make(optimizer=frozen), list[str]()
        engine.fit(X, Y, epochs=2)
        engine.summary(print_fn=shown.append)
        text = shown[0]
        assert "75 parameters, 48 of them frozen" in text
        assert "loss cross_entropy, optimizer adamw with lr 0.01, batch_size 16, seed 1" in text
        assert "fp32 on numpy (cpu), plan resident" in text
        size = engine.memory.params.nbytes
        assert f"parameters {bytes_text(size)}, optimizer state {bytes_text(2 * size)}" in text
        assert "2 epochs, 6 updates trained" in text

    @pytest.mark.parametrize(
        ("count", "text"),
        [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 20, "1 MiB"), (5000 << 30, "5000 GiB")],
    )
    def test_bytes(self, count, text):
        assert bytes_text(count) == text


WRONG = {
    "fit x": (lambda e: e.fit(x=X, y=Y, epochs=1), r"x: it is called X here: fit\(X, y"),
    "fit initial_epoch": (lambda e: e.fit(X, Y, epochs=1, initial_epoch=3), "initial_epoch: .*engine.epochs_trained"),
    "fit validation_freq": (lambda e: e.fit(X, Y, epochs=1, validation_freq=2), "validation_freq: .*leave it out"),
    "fit workers": (lambda e: e.fit(X, Y, epochs=1, workers=2), "workers: .*num_workers"),
    "fit typo": (lambda e: e.fit(X, Y, epoch=1), "epoch: there is no such argument; did you mean 'epochs'"),
    "fit nonsense": (
        lambda e: e.fit(X, Y, qqq=1),
        "qqq: there is no such argument; there are X, adversarial, batch_size",
    ),
    "fit places": (lambda e: e.fit(X, Y, 32, 10), r"fit: too many arguments without names; write fit\(X, y, epochs"),
    "engine metrics": (lambda e: Engine(NET, metrics=["auc"]), "metrics: it belongs to fit and evaluate"),
    "engine lr": (lambda e: Engine(NET, learning_rate=0.1), "learning_rate: it belongs to the optimizer"),
    "engine epochs": (lambda e: Engine(NET, epochs=3), "epochs: it belongs to fit"),
    "predict": (lambda e: e.predict(X, callbacks=[]), "callbacks: .*leave it out"),
    "predict_proba": (lambda e: e.predict_proba(x=X), "x: it is called X here"),
    "evaluate": (lambda e: e.evaluate(X, Y, return_dict=True), "return_dict: .*leave it out"),
    "network": (lambda e: MLP(5, 8, 3), r"MLP: too many arguments without names; write MLP\(\[784"),
    "units": (lambda e: MLP(units=3), "units: sizes has all widths"),
    "adam": (lambda e: fusemlp.Adam(learning_rate=0.1), "learning_rate: it is called lr here"),
    "beta": (lambda e: fusemlp.AdamW(beta_1=0.8), "beta_1: it is called betas here"),
    "sgd": (lambda e: fusemlp.SGD(0.1, momentun=0.9), "momentun: there is no such argument; did you mean 'momentum'"),
    "fleet": (
        lambda e: fusemlp.Fleet(NET, vary={"seed": [1]}).fit(X, Y, epochs=1, validation_split=0.2),
        "validation_rows",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_argument_of_another_name_is_refused_with_the_right_one(case):
    call, message = WRONG[case]
    engine = make()
    with pytest.raises(fusemlp.ArgumentTypeError, match=message):
        call(engine)
    assert engine.update_count == 0


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
@pytest.mark.parametrize("door", ["engine", "fleet", *ESTIMATORS])
def test_what_keras_gives_to_predict_is_taken_and_does_nothing(door, capsys):
    if door == "engine":
        model = make()
    elif door == "fleet":
        model = fusemlp.Fleet(NET, vary={"seed": [0]}, batch_size=16)
        model.fit(X, Y, epochs=1)
    else:
        options = {"max_iter": 1} if door.startswith("MLP") else {"epochs": 1, "models": 1}
        model = ESTIMATORS[door](**options).fit(X, Y)
    capsys.readouterr()
    for method, data in (("predict", (X,)), ("predict_proba", (X,)), ("evaluate", (X, Y)), ("score", (X, Y))):
        if hasattr(model, method):
            plain, keras = getattr(model, method)(*data), getattr(model, method)(*data, batch_size=7, verbose=1)
            if door == "fleet":
                plain, keras = plain.prediction, keras.prediction
            np.testing.assert_array_equal(plain, keras)
    assert capsys.readouterr() == ("", "")
    # a loss without probabilities leaves the method out, as in scikit-learn
    assert not hasattr(fusemlp.sklearn.TableClassifier(loss="mse"), "predict_proba")


def test_a_method_of_the_other_estimator_is_an_error_that_names_ours():
    for name, wrong, right in (
        ("TableClassifier", "predict_interval", r"predict_set\(X\)"),
        ("TableRegressor", "predict_set", r"predict_interval\(X\)"),
        ("TableRegressor", "predict_proba", r"predict\(X, return_std=True\)"),
        ("TableRegressor", "partial_fit", r"fit\(X, y\) takes old and new rows together"),
    ):
        with pytest.raises(AttributeError, match=f"{name} has no attribute '{wrong}': {right}"):
            getattr(ESTIMATORS[name](), wrong)
        assert wrong not in dir(ESTIMATORS[name]())


def test_every_sentence_on_another_name_is_of_one_that_is_not_there():
    tables = [(fit.ELSEWHERE, Engine.fit), (session.ELSEWHERE, Engine), (fleet._ELSEWHERE, fusemlp.Fleet.fit)]
    for table, called in tables:
        assert not table.keys() & inspect.signature(called).parameters.keys()
    assert not KERAS.keys() & {*dir(session.Session), *vars(make()), *dir(make())}


@pytest.mark.parametrize("name", KERAS)
def test_a_method_of_keras_is_an_error_that_names_ours(name):
    engine = make()
    assert not hasattr(engine, name)
    with pytest.raises(AttributeError, match=f"Engine has no attribute '{name}': "):
        getattr(engine, name)
    # in a script that is taken over it would do nothing
    with pytest.raises(AttributeError, match=f"Engine has no attribute '{name}': "):
        setattr(engine, name, 0.1)


def test_names_of_other_libraries_are_taken():
    for module, make_from in (
        (losses, losses.as_loss),
        (network, partial(network.as_activation, "activation")),
        (blocks, partial(blocks.as_norm, "norm")),
    ):
        for name, ours in module._NAMES_ELSEWHERE.items():
            assert make_from(name) == make_from(ours)
    assert losses.as_loss("binary_crossentropy") == losses.BinaryCrossEntropy()
    assert MLP([4, 3, 2], activation="swish") == MLP([4, 3, 2], activation="silu")


@pytest.mark.parametrize(
    ("name", "equivalent"),
    [("load_model", "use fusemlp.load(path)"), ("Sequential", "write Engine(MLP("), ("Dense", "MLP([784, 128, 10]")],
)
def test_a_name_of_keras_in_the_package_is_an_error_that_names_ours(name, equivalent):
    assert not hasattr(fusemlp, name) and name not in dir(fusemlp)
    with pytest.raises(AttributeError, match=re.escape(f"module 'fusemlp' has no attribute '{name}': ")) as raised:
        getattr(fusemlp, name)
    assert equivalent in str(raised.value)
    with pytest.raises(AttributeError, match=r"^module 'fusemlp' has no attribute 'nonsense'$"):
        fusemlp.nonsense  # noqa: B018


@pytest.mark.parametrize("name", fusemlp.callbacks._ELSEWHERE)
def test_a_callback_of_keras_is_an_error_that_names_ours(name):
    with pytest.raises(ImportError, match=f"^{name}: .*(leave it out|write|goes on)"):
        exec(f"from fusemlp.callbacks import {name}")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        fusemlp.callbacks.nonsense  # noqa: B018


@pytest.mark.parametrize("door", ["sklearn", "torch"])
def test_a_name_of_a_door_is_an_error_that_names_it(door):
    module = importlib.import_module(f"fusemlp.{door}")
    for name in module.__all__:
        with pytest.raises(ImportError, match=rf"^{name} is in fusemlp\.{door}: from fusemlp\.{door} import {name}$"):
            exec(f"from fusemlp import {name}")
        assert name not in dir(fusemlp)


def test_missing_attributes_stay_what_they_were():
    with pytest.raises(AttributeError, match="'Engine' object has no attribute 'nonsense'"):
        make().nonsense  # noqa: B018
    with pytest.raises(AttributeError, match=r"Optimizer has no attribute 'learning_rate': it is called lr"):
        make().optimizer.learning_rate  # noqa: B018
    with pytest.raises(AttributeError, match="MLP has no attribute 'fit': a network is a description"):
        NET.fit  # noqa: B018
    assert pickle.loads(pickle.dumps(NET)) == NET
    assert_same(pickle.loads(pickle.dumps(make())), make())


def test_arguments_together_are_checked():
    for options, message in (
        ({"validation_split": 1.0}, "validation_split: expected a finite number of at least 0 and below 1"),
        ({"validation_data": (X, Y), "validation_steps": 2}, "validation_steps: it counts the batches"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1"),
    ):
        engine = make()
        with pytest.raises(ArgumentError, match=message):
            engine.fit(X, Y, epochs=1, **options)
        assert engine.update_count == 0
    with pytest.raises(ArgumentError, match=r"validation_split: 0\.2 of 1 rows leaves 0 to train on"):
        make().fit(X[:1], Y[:1], epochs=1, validation_split=0.2)


def test_another_rate_between_two_fits():
    one, other = make(optimizer=fusemlp.SGD(0.1, momentum=0.9)), make(optimizer=fusemlp.SGD(0.1, momentum=0.9))
    one.fit(X, Y, epochs=1)
    other.fit(X, Y, epochs=1)
    one.optimizer = dataclasses.replace(one.optimizer, lr=0.01)
    assert one.fit(X, Y, epochs=1).history["learning_rate"] == [0.01]
    other.fit(X, Y, epochs=1, callbacks=fusemlp.LearningRateScheduler(lambda epoch: 0.01))
    assert_same(one, other)
