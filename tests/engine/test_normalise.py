"""``normalise=True`` gives the training of rows that were standardised before, in all that an engine does."""

import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler

import fusemlp
from fusemlp import MLP, SGD, ArgumentError
from fusemlp.fleet.results import merged
from fusemlp.sklearn import MLPClassifier, TableClassifier
from fusemlp.torch import from_torch, fuse, to_torch
from make import assert_same, run

RNG = np.random.default_rng(0)
# columns of many scales; one is constant
SCALES = np.array([1e3, 0.0, 1e-3, 50.0, 1.0])
OFFSETS = np.array([2e3, 7.0, 0.0, -60.0, 0.5])
X = (RNG.normal(size=(90, 5)) * SCALES + OFFSETS).astype(np.float32)
Y = (X[:, 0] > 2e3) + (X[:, 3] > -60).astype(np.int64)
XV, YV = X[60:], Y[60:]
X, Y = X[:60], Y[:60]
NET = MLP([5, 8, 3])


def make(normalise=True, **options):
    options = {"optimizer": SGD(0.1, momentum=0.9), "batch_size": 16, "seed": 3, **options}
    return fusemlp.Engine(NET, **options, normalise=normalise)


def fitted(epochs=4, **options):
    engine = make(**options)
    engine.fit(X, Y, epochs=epochs, validation_data=(XV, YV))
    return engine


def scaled(engine, rows):
    """Return rows scaled as the user would, in the engine's precision."""
    return (rows.astype(engine.input_scale.mean.dtype) - engine.input_scale.mean) / engine.input_scale.scale


def plain(engine):
    """Return an untrained engine for rows that are scaled already."""
    return make(normalise=False, precision=engine.precision)


class TestTraining:
    @pytest.mark.parametrize("precision", ["fp32", "fp64"])
    @pytest.mark.parametrize("plan", ["resident", "eager"])
    def test_a_fit_has_the_bits_of_one_on_scaled_rows(self, precision, plan):
        engine = fitted(precision=precision, plan=plan)
        other = make(normalise=False, precision=precision, plan=plan)
        other.fit(scaled(engine, X), Y, epochs=4, validation_data=(scaled(engine, XV), YV))
        assert engine.history.history == other.history.history
        np.testing.assert_array_equal(engine.predict_proba(XV), other.predict_proba(scaled(engine, XV)))
        assert engine.evaluate(XV, YV) == other.evaluate(scaled(engine, XV), YV)
        assert engine.evaluate(XV, YV)["loss"] == engine.history.history["val_loss"][-1]

    def test_the_statistics_are_scikit_learns_of_the_first_fit(self):
        engine = fitted(precision="fp64")
        expected = StandardScaler().fit(X.astype(np.float64))
        # Two algorithms: sums of 60 numbers, each rounded by 2**-53.
        np.testing.assert_allclose(engine.input_scale.mean, expected.mean_, rtol=120 * 2**-53)
        np.testing.assert_allclose(engine.input_scale.scale, expected.scale_, rtol=120 * 2**-53)
        before = engine.scaling.tensors
        engine.fit(X * 3 + 1, Y, epochs=1)
        assert_same(engine.scaling.tensors, before)

    @pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float16, np.float64, torch.uint8, torch.float64])
    def test_integers_and_tensors_train_as_the_same_numbers_in_float32(self, kind):
        pixels = RNG.integers(0, 256, (60, 5))
        rows = torch.tensor(pixels, dtype=kind) if isinstance(kind, torch.dtype) else pixels.astype(kind)
        one, other = make(), make()
        one.fit(rows, Y, epochs=2)
        other.fit(pixels.astype(np.float32), Y, epochs=2)
        np.testing.assert_array_equal(one.predict_proba(rows), other.predict_proba(pixels))
        assert one.step(rows[:9], Y[:9]) == other.step(pixels[:9], Y[:9])
        # the caller's rows are as they were
        np.testing.assert_array_equal(rows, pixels)

    def test_all_that_an_engine_does_is_that_on_scaled_rows(self):
        engine, unmeasured = make(normalise=X), make()
        other = plain(engine)
        found = engine.lr_find(X, Y, steps=40)
        assert found.losses == other.lr_find(scaled(engine, X), Y, steps=40).losses
        # the finder measures the rows, and leaves the engine as it was
        assert found.losses == unmeasured.lr_find(X, Y, steps=40).losses and unmeasured.input_scale is None
        for start in range(0, 60, 16):
            rows = slice(start, start + 16)
            assert engine.step(X[rows], Y[rows]) == other.step(scaled(engine, X[rows]), Y[rows])
        np.testing.assert_array_equal(engine.predict_proba(XV), other.predict_proba(scaled(engine, XV)))
        assert engine.dead_units(X) == other.dead_units(scaled(engine, X))

    @pytest.mark.parametrize(
        "use",
        [
            lambda engine, _: engine.step(X[:4], Y[:4]),
            lambda engine, _: engine.predict(X),
            lambda engine, _: engine.predict_proba(X),
            lambda engine, _: engine.evaluate(X, Y),
            lambda engine, _: engine.evaluate(X, Y, metrics=["f1"]),
            lambda engine, _: engine.dead_units(X),
            lambda engine, _: to_torch(engine),
            lambda engine, folder: engine.to_onnx(folder / "model.onnx"),
        ],
    )
    def test_uses_before_rows_were_measured_are_refused(self, tmp_path, use):
        engine = make()
        with pytest.raises(ArgumentError, match="normalise: no rows were measured yet: fit measures its arrays"):
            use(engine, tmp_path)
        assert not list(tmp_path.iterdir()) and engine.update_count == 0
        use(make(normalise=X), tmp_path)
        engine.load_state_dict(make(normalise=X).state_dict())
        use(engine, tmp_path)

    def test_an_engine_without_measured_rows_is_saved_and_fitted_later(self, tmp_path):
        make().save(tmp_path / "model.safetensors")
        again = fusemlp.load(tmp_path / "model.safetensors")
        with pytest.raises(ArgumentError, match="normalise: no rows were measured yet"):
            again.predict(X)
        again.fit(X, Y, epochs=1)
        assert again.predict(X).shape == (60,)

    def test_a_refused_fit_measures_nothing(self):
        engine = make()
        with pytest.raises(ArgumentError):
            engine.fit(X, Y, epochs=1, resume=True)
        with pytest.raises(fusemlp.ShapeError):
            engine.fit(X, Y, epochs=1, validation_data=(XV[:, :4], YV))
        assert engine.input_scale is None

    def test_metrics_of_counts_do_not_overflow_before_the_rows_are_measured(self):
        engine = fusemlp.Engine(MLP([5, 8, 1]), loss="poisson", seed=1, normalise=True)
        history = engine.fit(X, Y, epochs=1, validation_data=(XV, YV), metrics=["r2"])
        assert np.isfinite(history.history["val_r2"]).all()


class TestKeeping:
    def test_the_state_names_the_statistics_and_goes_back(self):
        engine, other = fitted(), make()
        other.load_state_dict(engine.state_dict())
        assert engine.state_dict().keys() == {*NET.parameter_shapes(), "normalise.mean", "normalise.scale"}
        np.testing.assert_array_equal(other.predict_proba(XV), engine.predict_proba(XV))

    def test_a_state_of_the_other_kind_is_refused(self):
        engine = fitted()
        state = engine.state_dict()
        more = r"unknown keys: normalise\.mean.*goes into an engine with normalise=True"
        for other, wrong, error, message in (
            (make(normalise=None), state, ArgumentError, more),
            (engine, plain(engine).state_dict(), ArgumentError, r"missing keys: normalise\.mean, normalise\.scale"),
            (
                engine,
                {**state, "normalise.scale": -np.ones(5)},
                fusemlp.DataError,
                "'normalise.scale'.*above 0, got -1",
            ),
        ):
            with pytest.raises(error, match=message):
                other.load_state_dict(wrong)
        assert_same(engine.state_dict(), state)

    def test_onnx_takes_raw_rows(self, tmp_path):
        onnxruntime = pytest.importorskip("onnxruntime")
        engine = fitted()
        engine.to_onnx(tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        labels, probabilities = session.run(["prediction", "probabilities"], {"x": XV})
        np.testing.assert_array_equal(labels, engine.predict(XV))
        np.testing.assert_allclose(probabilities, engine.predict_proba(XV), atol=1e-5)

    def test_torch_takes_raw_rows_and_comes_back(self, tmp_path):
        engine = fitted()
        module = to_torch(engine).eval()
        assert module.state_dict().keys() == engine.state_dict().keys()
        with torch.no_grad():
            found = module(torch.tensor(XV)).softmax(1)
        np.testing.assert_allclose(found, engine.predict_proba(XV), atol=1e-5)
        again = from_torch(module)
        assert again.normalise is True
        np.testing.assert_array_equal(again.predict_proba(XV), engine.predict_proba(XV))
        # torch refuses the file for a module that would not scale
        engine.save(tmp_path / "model.safetensors")
        bare = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        state = {name: torch.tensor(array) for name, array in load_file(tmp_path / "model.safetensors").items()}
        with pytest.raises(RuntimeError, match=r"normalise\.mean"):
            bare.load_state_dict(state)
        module.load_state_dict(state)

    def test_a_fused_step_names_the_mend(self):
        module = to_torch(fitted())
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        with pytest.raises(ArgumentError, match=r"normalise.*scale the rows before the step: fuse\(module\[1:\]"):
            fuse(module, torch.nn.CrossEntropyLoss(), optimizer)
        step = fuse(module[1:], torch.nn.CrossEntropyLoss(), optimizer)
        assert np.isfinite(float(step(module[0](torch.tensor(X)), torch.tensor(Y))))


class TestFleets:
    def test_all_rows_are_measured_for_models_on_folds_and_in_parts(self):
        folds, held, found = [np.arange(40), np.arange(20, 60)], [np.arange(40, 60), np.arange(20)], []
        # rows to measure may be given too
        for memory, normalise in ((None, True), (60_000, True), (None, X)):
            fleet = fusemlp.Fleet(NET, batch_size=16, vary={"seed": [0, 1]}, normalise=normalise, memory=memory)
            results = fleet.fit(X, Y, epochs=2, rows=folds, validation_rows=held)
            found.append([results.engine(index).predict_proba(XV) for index in (0, 1)])
            np.testing.assert_array_equal(results.engine(1).input_scale.mean, make(normalise=X).input_scale.mean)
        np.testing.assert_array_equal(found[1:], [found[0]] * 2)

    @pytest.mark.parametrize("differ", [False, True])
    def test_merged_engines_predict_the_mean(self, differ):
        engines = [make(normalise=X[: 60 - 20 * differ * seed], seed=seed, loss="mse") for seed in (0, 1)]
        for engine in engines:
            engine.fit(X, np.eye(3)[Y], epochs=2)
        one = merged(engines)
        assert one.normalise is not differ
        mean = np.mean([engine.predict(XV) for engine in engines], axis=0)
        # Raw inputs of up to 3e3 times their scale lose that many units of 2**-24 in the first layer.
        np.testing.assert_allclose(one.predict(XV), mean, atol=5e-3 if differ else 1e-5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        *(
            (one, fusemlp.ArgumentTypeError, r"expected True, False, None, or an array \(n, 5\)")
            for one in ("a", 1, 0.5)
        ),
        (X[:, :3], fusemlp.ShapeError, "expected 5 columns"),
        (X * np.nan, fusemlp.DataError, "expected finite numbers"),
    ],
)
def test_other_values_are_refused(given, error, message):
    with pytest.raises(error, match=f"normalise: {message}"):
        make(normalise=given)


def test_it_is_printed():
    assert "normalise=True" in repr(make())
    assert "normalise" not in repr(make(normalise=None))


def warned(engine, rows, **options):
    """Return the messages of a fit."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        engine.fit(rows, np.arange(len(rows)) % 3, epochs=1, **options)
    assert all(one.category is fusemlp.InputScaleWarning and one.filename == __file__ for one in found)
    return [str(one.message) for one in found]


class TestWarning:
    @pytest.mark.parametrize("size", [1e-3, 0.09, 5.1, 1e6])
    def test_inputs_far_from_unit_scale_are_named_with_the_mend(self, size):
        rows = np.full((50, 5), size)
        (message,) = warned(make(normalise=None, optimizer=SGD(1e-9)), rows)
        assert f"those that are not zero is {size:.3g}" in message
        assert "normalise=True" in message
        (message,) = warned(fusemlp.Fleet(NET, optimizer=SGD(1e-9), vary={"seed": [0, 1]}), rows)
        assert f"{size:.3g}" in message

    def test_others_and_false_and_true_are_silent(self):
        for size in (0.0, 0.11, 1.0, 4.9):
            assert not warned(make(normalise=None), np.full((50, 5), size))
        # rare ones, and pixels from 0 to 1
        assert not warned(fusemlp.Engine(MLP([2000, 4, 3])), np.eye(2000)[:400])
        assert not warned(fusemlp.Engine(MLP([64, 4, 3])), load_digits().data / 16)
        assert not warned(make(normalise=False, optimizer=SGD(1e-9)), 100 * X)
        assert not warned(make(), 100 * X)

    def test_the_sample_is_spread_over_all_rows(self):
        rows = np.ones((1000, 5))
        rows[500:] = 100
        assert warned(make(normalise=None, optimizer=SGD(1e-9)), rows)

    def test_a_loop_of_steps_is_warned_once(self):
        engine = make(normalise=None, optimizer=SGD(1e-9))
        with pytest.warns(fusemlp.InputScaleWarning, match="^x: the inputs are far from unit scale") as found:
            for start in range(0, 48, 16):
                engine.step(X[start : start + 16], Y[start : start + 16])
        assert len(found) == 1

    def test_the_learning_rate_finder_warns(self):
        with pytest.warns(fusemlp.InputScaleWarning):
            make(normalise=None).lr_find(X, Y, start=1e-12, end=1e-9, steps=20)

    def test_the_doors_that_scale_or_follow_scikit_learn_are_silent(self, tmp_path):
        # warnings are errors in this suite
        digits, labels = load_digits(return_X_y=True)
        with pytest.warns(ConvergenceWarning) as found:
            MLPClassifier(max_iter=2).fit(100 * digits, labels)
        assert {one.category for one in found} == {ConvergenceWarning}
        for models in (1, 2):
            TableClassifier(epochs=1, scale="none", models=models).fit(100 * digits, labels)
        for command in (["train"], ["train", "--models", "2"], ["sweep", "--vary", "seed=0:2"]):
            options = ["--scale", "none", "--epochs", "1", "--quiet", "--out", tmp_path / "-".join(command)]
            assert run(command[0], "wine", *command[1:], *options) == 0


def test_batches_are_scaled_by_rows_that_were_measured_before():
    X = np.random.default_rng(0).normal(50.0, 20.0, size=(96, 4)).astype(np.float32)
    y = (X[:, 0] > 50.0).astype(np.int64)
    batches = [(X[at : at + 32], y[at : at + 32]) for at in range(0, 96, 32)]
    with pytest.raises(ArgumentError, match=r"^normalise: no rows were measured yet"):
        fusemlp.Engine(MLP([4, 8, 2]), batch_size=32, normalise=True).fit(batches, epochs=1)
    streamed, whole = (fusemlp.Engine(MLP([4, 8, 2]), batch_size=32, normalise=X) for _ in range(2))
    streamed.fit(batches, epochs=3)
    whole.fit(X, y, epochs=3, shuffle=False)
    assert_same(whole, streamed)


@pytest.mark.parametrize(
    "loss, mean, spread, warns",
    [
        ("mse", 0.0, 1.0, False),
        ("mse", 5.0, 1.0, False),
        ("mse", 20.0, 1.0, True),
        ("mae", 0.0, 0.05, True),
        ("huber", 0.0, 200.0, True),
        ("poisson", 200.0, 10.0, False),
        ("mse", 300.0, 0.0, False),  # a constant has no spread to learn
        (fusemlp.Quantiles([0.5]), 300.0, 1.0, True),
        (fusemlp.MSE(missing=True), 300.0, 1.0, True),
    ],
)
def test_fit_warns_of_targets_far_from_unit_scale(loss, mean, spread, warns):
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(200, 3)), mean + spread * generator.normal(size=(200, 1))
    if getattr(loss, "missing", False):
        y[::2] = np.nan
        y[1] = mean
    engine = fusemlp.Engine(MLP([3, 4, 1]), loss=loss, optimizer=SGD(lr=1e-6), seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.fit(X, y, epochs=1)
    assert [warning.category for warning in caught] == [fusemlp.TargetScaleWarning] * warns
    assert all("(y - y.mean()) / y.std()" in str(warning.message) for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)


def test_fit_does_not_warn_of_one_hot_rows_or_of_a_long_tail_of_unit_scale():
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(400, 3)), generator.normal(size=400)
    # in a row that no sample of every seventh has
    y[3] = 1e6
    y = (y - y.mean()) / y.std()
    assert y[::7].std() < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusemlp.Engine(MLP([3, 4, 1]), loss="mse", optimizer=SGD(lr=1e-6)).fit(X, y, epochs=1)
        engine = fusemlp.Engine(MLP([3, 4, 200]), loss="mse", optimizer=SGD(lr=1e-6))
        engine.fit(X, np.eye(200)[np.arange(400) % 200], epochs=1)
