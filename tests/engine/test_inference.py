"""Predictions, losses and accuracies of any number of rows, against the oracle."""

import gc
import sys
import threading
from functools import partial

import numpy as np
import pytest
from torch_oracle import CLOSE

import fusemlp
from fusemlp import MLP, ArgumentError, CrossEntropy, DataError, Engine, LeakyReLU, PReLU
from fusemlp.describe.losses import as_loss
from fusemlp.runtime import forward as forward_module
from fusemlp_kernels import reference
from make import assert_same, layers_of

INPUTS, OUTPUTS = 5, 4
RNG = np.random.default_rng(4)
X = RNG.standard_normal((100, INPUTS))
LABELS = RNG.integers(0, OUTPUTS, 100)
SIZES = (1, 2, 15, 16, 17, 33, 100)


def make(loss="cross_entropy", outputs=OUTPUTS, net=None, **options):
    net = net or MLP([INPUTS, 7, outputs], **{"activation": "tanh", **options})
    return Engine(net, loss=loss, optimizer=fusemlp.SGD(0.1), batch_size=8, seed=2, backend="numpy", precision="fp64")


def forward(engine, X):
    """Return the oracle's outputs."""
    for layer in layers_of(engine.network, engine.state_dict()):
        X = reference.activation(layer.activation, reference.linear(X, layer.w, layer.b), layer.slope)
    return X


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=CLOSE, atol=CLOSE)


@pytest.fixture
def small_batches(monkeypatch):
    """A forward pass takes 16 rows at a time."""
    monkeypatch.setattr(forward_module, "LARGEST", 1)


def test_threads_share_an_engine():
    """They ran one program at a time in the same memory, and ended with rows of each other, or never."""
    engine = make()
    asked = [partial(engine.predict_proba, X[:n]) for n in (33, 34, 100)]
    asked += [partial(engine.evaluate, X[:n], LABELS[:n]) for n in (33, 34)]
    asked += [partial(engine.input_gradient, X, LABELS)]
    expected, right = [ask() for ask in asked], []

    def work():
        for ask, answer in 100 * [*zip(asked, expected, strict=True)]:
            assert_same(ask(), answer)
        right.append(True)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(right) == 4


class TestPredict:
    @pytest.mark.parametrize("n", SIZES)
    def test_classes(self, n):
        engine = make()
        found = engine.predict(X[:n])
        assert found.shape == (n,) and found.dtype == np.int64
        np.testing.assert_array_equal(found, forward(engine, X[:n]).argmax(axis=1))
        assert_close(engine.predict_proba(X[:n]), softmax(forward(engine, X[:n])))

    def test_one_label(self):
        engine = make("binary_cross_entropy", outputs=1)
        z = forward(engine, X)[:, 0]
        found = engine.predict(X)
        assert found.shape == (100,) and found.dtype == np.int64
        np.testing.assert_array_equal(found, z > 0)
        assert 0 < found.sum() < 100
        probabilities = engine.predict_proba(X)
        assert probabilities.shape == (100, 2)
        assert_close(probabilities[:, 1], 1.0 / (1.0 + np.exp(-z)))
        assert_close(probabilities.sum(axis=1), 1.0)

    def test_several_labels(self):
        engine = make("binary_cross_entropy")
        z = forward(engine, X)
        np.testing.assert_array_equal(engine.predict(X), z > 0)
        assert_close(engine.predict_proba(X), 1.0 / (1.0 + np.exp(-z)))

    @pytest.mark.parametrize("loss", ["mse", "mae", "huber", "quantile", "poisson"])
    def test_values_and_counts(self, loss):
        mean = np.exp if loss == "poisson" else np.asarray
        engine, one = make(loss), make(loss, outputs=1)
        assert_close(engine.predict(X), mean(forward(engine, X)))
        assert_close(one.predict(X), mean(forward(one, X)[:, 0]))
        with pytest.raises(ArgumentError, match=f"predict_proba needs cross_entropy .* has '{loss}'; use predict"):
            engine.predict_proba(X)

    @pytest.mark.parametrize(
        "options",
        [
            {"net": MLP([INPUTS, OUTPUTS])},
            {"dropout": 0.5},
            *({"output_activation": name} for name in ("sigmoid", "relu", LeakyReLU(0.3), PReLU(0.2), "gelu", "tanh")),
            *({"activation": name} for name in ("identity", "relu", "leaky_relu", "prelu", "sigmoid", "gelu", "silu")),
        ],
        ids=str,
    )
    def test_layers_have_their_activations_and_nothing_is_dropped(self, options):
        engine = make("mse", **options)
        assert_close(engine.predict(X), forward(engine, X))

    def test_predictions_are_copies(self):
        engine = make("mse")
        found = engine.predict(X)
        kept = found.copy()
        engine.predict(-X)
        np.testing.assert_array_equal(found, kept)

    def test_predicting_disturbs_nothing(self):
        engine = make()
        engine.fit(X, LABELS, epochs=1)
        before = engine.memory.snapshot()
        engine.predict(X)
        engine.predict_proba(X)
        engine.evaluate(X, LABELS)
        engine.dead_units(X)
        assert_same(engine.memory.snapshot(), before)


@pytest.mark.usefixtures("small_batches")
class TestManyBatches:
    """More rows than one forward pass takes, in all remainders."""

    @pytest.mark.parametrize("n", SIZES)
    def test_outputs(self, n):
        engine = make("mse")
        assert_close(engine.predict(X[:n]), forward(engine, X[:n]))

    @pytest.mark.parametrize("n", SIZES)
    def test_loss_and_accuracy(self, n):
        engine = make()
        outputs, labels = forward(engine, X[:n]), LABELS[:n]
        loss, _ = reference.loss_of_output(as_loss("cross_entropy").spec(accuracy=True), outputs, labels)
        found = engine.evaluate(X[:n], labels)
        assert_close(found["loss"], loss)
        assert found["accuracy"] == np.mean(outputs.argmax(axis=1) == labels)

    @pytest.mark.parametrize("n", SIZES)
    def test_weighted_loss(self, n):
        engine = make("mse")
        weight = np.random.default_rng(n).uniform(0.1, 1.0, n)
        target = np.random.default_rng(n).standard_normal((n, OUTPUTS))
        error = (forward(engine, X[:n]) - target) ** 2
        found = engine.evaluate(X[:n], target, weight)
        assert list(found) == ["loss"]
        assert_close(found["loss"], (weight[:, None] * error).sum() / (weight.sum() * OUTPUTS))

    def test_a_short_batch_after_a_long_one(self):
        # Rows left from an earlier batch must not count.
        engine = make()
        whole = engine.evaluate(X, LABELS)
        assert engine.evaluate(X[:3], LABELS[:3]) != whole
        assert engine.evaluate(X, LABELS) == whole
        assert_close(engine.evaluate(X[:3], LABELS[:3])["loss"], make().evaluate(X[:3], LABELS[:3])["loss"])

    def test_dead_units(self):
        engine = make(activation="relu")
        hidden = np.maximum(X @ engine.state_dict()["0.weight"].T + engine.state_dict()["0.bias"], 0.0)
        for n in SIZES:
            assert engine.dead_units(X[:n]) == {"layer 1": np.mean((hidden[:n] == 0).all(axis=0))}


def test_the_size_of_a_forward_pass_is_bounded():
    engine = make()
    assert engine.inference.forward.rows_for(1) == 1
    assert engine.inference.forward.rows_for(3) == 4
    assert engine.inference.forward.rows_for(1000) == 1024
    widest = 7
    assert engine.inference.forward.rows_for(10**9) * widest <= forward_module.LARGEST


def test_rows_that_are_evaluated_are_not_padded_on_the_host():
    forward = make().inference.forward
    most = forward.rows_for(10**9)
    sizes = [forward.rows_for(n, evaluated=True) for n in (1, 1000, most, most + 1)]
    assert sizes == [1, 1000, most, most // 2 + 1]


def test_evaluations_of_many_lengths_keep_few_programs():
    engine = make()
    first = engine.evaluate(X[:60], LABELS[:60])
    for n in range(1, 60):
        engine.evaluate(X[:n], LABELS[:n])
    assert len(engine.inference.forward._bound) == forward_module.MOST_PROGRAMS
    assert engine.evaluate(X[:60], LABELS[:60]) == first


def test_evaluations_of_large_lengths_keep_few_rows(monkeypatch):
    monkeypatch.setattr(forward_module, "LARGEST", 1 << 9)
    engine = make()
    most = engine.inference.forward.rows_for(10**9)
    assert 8 < most < len(X)
    for n in range(most // 2, most):
        engine.evaluate(X[:n], LABELS[:n])
    kept = [rows for _, rows, *_ in engine.inference.forward._bound]
    assert sum(kept) <= forward_module.MOST_BATCHES * most < sum(range(most // 2, most))


TARGETS = {
    "cross_entropy": LABELS,
    "binary_cross_entropy": RNG.integers(0, 2, (100, OUTPUTS)),
    "mse": RNG.standard_normal((100, OUTPUTS)),
    "mae": RNG.standard_normal((100, OUTPUTS)),
    "huber": RNG.standard_normal((100, OUTPUTS)),
    "quantile": RNG.standard_normal((100, OUTPUTS)),
    "poisson": RNG.poisson(2.0, (100, OUTPUTS)),
}


LOSSES = [type(as_loss(kind))(reduction=reduction) for kind in TARGETS for reduction in ("mean", "sum")]
LOSSES += [
    CrossEntropy(label_smoothing=0.1),
    CrossEntropy(class_weight=[1.0, 0.0, 3.0, 0.5]),
    CrossEntropy(ignore_index=2),
    fusemlp.Huber(delta=0.3),
    fusemlp.Quantile(q=0.9),
]


class TestEvaluate:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("loss", LOSSES, ids=repr)
    def test_the_loss_is_the_oracle_s(self, loss, weighted):
        engine, target = make(loss), TARGETS[loss.kind]
        weight = np.random.default_rng(1).uniform(0.0, 2.0, 100) if weighted else None
        found, spec = engine.evaluate(X, target, weight), loss.spec(accuracy=False)
        expected, _ = reference.loss_of_output(spec, forward(engine, X), target, weight, loss.class_weight)
        assert_close(found["loss"] / 100, expected / 100)
        assert all(type(value) is float for value in found.values())
        assert list(found) == (["loss", "accuracy"] if "cross_entropy" in loss.kind else ["loss"])

    def test_hits_are_not_weighted(self):
        engine = make()
        weight = np.random.default_rng(1).uniform(0.0, 2.0, 100)
        assert engine.evaluate(X, LABELS, weight)["accuracy"] == engine.evaluate(X, LABELS)["accuracy"]

    def test_ignored_rows_are_neither_right_nor_wrong(self):
        engine = make(CrossEntropy(ignore_index=-100))
        kept = np.arange(100) % 3 > 0
        found, expected = engine.evaluate(X, np.where(kept, LABELS, -100)), engine.evaluate(X[kept], LABELS[kept])
        assert_close(found["loss"], expected["loss"])
        assert found["accuracy"] == expected["accuracy"]
        assert engine.evaluate(X, np.full(100, -100)) == {"loss": 0.0, "accuracy": 0.0}

    def test_soft_targets(self):
        engine = make()
        soft = np.random.default_rng(3).dirichlet(np.ones(OUTPUTS), 100)
        z = forward(engine, X)
        found = engine.evaluate(X, soft)
        assert_close(found["loss"], -(soft * np.log(softmax(z))).sum(axis=1).mean())
        assert found["accuracy"] == np.mean(z.argmax(axis=1) == soft.argmax(axis=1))
        # One-hot probabilities equal labels.
        certain, labelled = engine.evaluate(X, np.eye(OUTPUTS)[LABELS]), engine.evaluate(X, LABELS)
        assert_close(certain["loss"], labelled["loss"])
        assert certain["accuracy"] == labelled["accuracy"]

    def test_each_label_of_several_counts(self):
        engine = make(fusemlp.BinaryCrossEntropy())
        target = TARGETS["binary_cross_entropy"]
        assert engine.evaluate(X, target)["accuracy"] == np.mean((forward(engine, X) > 0) == target)

    @pytest.mark.parametrize("kind", ["mse", "mae", "huber"])
    def test_one_hot_targets_are_classes(self, kind):
        engine = make(kind)
        found = engine.evaluate(X, np.eye(OUTPUTS)[LABELS])
        assert found["accuracy"] == np.mean(forward(engine, X).argmax(axis=1) == LABELS)
        history = engine.fit(X, np.eye(OUTPUTS)[LABELS], epochs=1, validation_data=(X, np.eye(OUTPUTS)[LABELS])).history
        assert list(history) == ["loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"]

    def test_other_targets_are_values(self):
        for target in (np.eye(OUTPUTS)[LABELS] * 0.9, np.ones((100, OUTPUTS)), np.zeros((100, OUTPUTS))):
            assert list(make("mse").evaluate(X, target)) == ["loss"]
        assert list(make("mse", outputs=1).evaluate(X, np.ones(100))) == ["loss"]


class TestDeadUnits:
    def test_units_that_are_zero_for_every_row(self):
        engine = Engine(MLP([INPUTS, 8, 6, OUTPUTS]), backend="numpy")
        state = engine.state_dict()
        state["0.bias"][:2] = -1e3
        state["2.weight"][:] *= np.where(np.arange(6) < 3, 0.0, 1e-6)[:, None]
        state["2.bias"][:] = np.arange(6) >= 3
        engine.load_state_dict(state)
        assert engine.dead_units(X) == {"layer 1": 2 / 8, "layer 2": 3 / 6}

    def test_units_that_weight_decay_has_emptied_are_not_dead(self):
        state = Engine(MLP([INPUTS, 8, OUTPUTS]), backend="numpy").state_dict()
        state["0.weight"][:4] *= 1e-4
        state["0.bias"][:5] = -1e3
        for decay, dead in ((0.0, 5 / 8), (1e-4, 1 / 8)):
            engine = Engine(MLP([INPUTS, 8, OUTPUTS]), optimizer=fusemlp.Adam(weight_decay=decay), backend="numpy")
            engine.load_state_dict(state)
            assert engine.dead_units(X) == {"layer 1": dead}

    def test_one_row_that_is_answered_is_enough(self):
        engine = Engine(MLP([1, 1, 2]), backend="numpy")
        engine.load_state_dict({**engine.state_dict(), "0.weight": [[1.0]], "0.bias": [-5.0]})
        rows = np.zeros((50, 1))
        assert engine.dead_units(rows) == {"layer 1": 1.0}
        rows[37] = 6.0
        assert engine.dead_units(rows) == {"layer 1": 0.0}

    def test_only_relu_layers_can_be_dead(self):
        engine = Engine(MLP([INPUTS, 4, 4, 4, OUTPUTS], activation=["tanh", "relu", "prelu"]), backend="numpy")
        assert list(engine.dead_units(X)) == ["layer 2"]
        assert Engine(MLP([INPUTS, OUTPUTS]), backend="numpy").dead_units(X) == {}


def python_calls(run):
    """Return how many Python functions a call of ``run`` calls, itself not counted."""
    count = -1

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    # the garbage of other tests may call functions when it is collected
    gc.collect()
    gc.disable()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


class TestFewRows:
    def test_one_row_takes_few_calls_of_python(self):
        # its arithmetic takes a microsecond or two, as ten calls do; two calls follow the stream of a card
        row = RNG.standard_normal((1, 64)).astype(np.float32)
        for layers in (1, 3, 6):
            engine = Engine(MLP([64] * layers + [4]), backend="numpy")
            engine.predict(row)
            assert python_calls(lambda engine=engine: engine.predict(row)) <= 30 + 4 * layers

    @pytest.mark.parametrize("precision", ["fp32", "fp64"])
    @pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"members": 3}], ids=str)
    def test_a_row_has_the_same_bits_alone_and_among_others(self, options, precision):
        sizes = [INPUTS, 37, 130, OUTPUTS]
        engine = Engine(
            MLP(sizes, **options), optimizer=fusemlp.Adam(ema=0.5), backend="numpy", precision=precision, normalise=True
        )
        engine.fit(X, LABELS, epochs=1)
        for method in (engine.outputs, engine.predict, engine.predict_proba):
            whole = method(X)
            for n in (1, 2, 3, 8, 13):
                assert np.concatenate([method(X[at : at + n]) for at in range(0, 100, n)]).tobytes() == whole.tobytes()

    @pytest.mark.parametrize("ema", [0.0, 0.5])
    def test_what_changed_since_the_last_prediction_counts(self, ema):
        net, row = MLP([INPUTS, 7, OUTPUTS], activation="tanh"), X[:1]
        engine = Engine(net, optimizer=fusemlp.Adam(0.1, ema=ema), backend="numpy", precision="fp64", seed=2)
        seen = {engine.outputs(row).tobytes()}
        for change in (
            lambda: engine.fit(X, LABELS, epochs=1),
            lambda: engine.step(X[:32], LABELS[:32]),
            lambda: engine.load_state_dict({name: 2.0 * array for name, array in engine.state_dict().items()}),
        ):
            change()
            assert_close(engine.outputs(row), forward(engine, row))
            seen.add(engine.outputs(row).tobytes())
        engine.memory.arrays[engine.memory.evaluated_arena][:] = 0.0
        assert not engine.outputs(row).any() and len(seen) == 4

    @pytest.mark.parametrize("rows", [1, 1000])
    @pytest.mark.parametrize(
        ("change", "error", "said"),
        [
            (lambda X: np.where(np.arange(INPUTS) == 2, np.nan, X), DataError, "finite numbers, got nan at row 0, col"),
            (lambda X: np.where(np.arange(INPUTS) == 2, np.inf, X), DataError, "finite numbers, got inf at row 0, col"),
            (lambda X: 1e300 * X, DataError, r"at row 0, column 0.* is beyond the largest float32"),
            (lambda X: X[:, :3], fusemlp.ShapeError, "expected 5 columns"),
            (lambda X: X[0], fusemlp.ShapeError, "expected a matrix"),
            (lambda X: X[:0], DataError, "expected 1 or more rows"),
            (lambda X: X.astype(str), fusemlp.DTypeError, "expected real numbers"),
        ],
        ids=["nan", "inf", "overflow", "width", "vector", "empty", "strings"],
    )
    def test_bad_rows_are_refused_after_good_ones(self, change, error, said, rows):
        engine = Engine(MLP([INPUTS, 7, OUTPUTS]), backend="numpy")
        good = np.resize(X, (rows, INPUTS)).astype(np.float32)
        expected = engine.predict_proba(good)
        for method in (engine.predict, engine.predict_proba, engine.outputs):
            with pytest.raises(error, match=said):
                method(change(good.astype(np.float64)))
        np.testing.assert_array_equal(engine.predict_proba(good), expected)

    @pytest.mark.parametrize("rows", [1, 1000])
    def test_finite_rows_whose_sum_overflows_are_taken(self, rows):
        engine = Engine(MLP([INPUTS, OUTPUTS], init="zeros"), backend="numpy")
        assert not engine.outputs(np.full((rows, INPUTS), 3e38, np.float32)).any()
