"""Gradients by the inputs and attributions, against torch's autograd and their own promises."""

import numpy as np
import pytest
import torch
from devices import CUPY_GPU, GPU, INTERPRETER, NUMPY, STAND_IN, marks_of, usable
from tolerance import UNIT, assert_within
from torch_oracle import TORCH_ACTIVATIONS, assert_close, numpy, tensor, torch_loss

import fusemlp
from fusemlp import ELU, MLP, ArgumentError, ArgumentTypeError, CrossEntropy, DataError, Engine, PReLU, ShapeError
from fusemlp.report.evidence import Importance
from fusemlp.report.explanations import Attributions, attributions
from fusemlp.runtime import forward as forward_module
from fusemlp_kernels.contract import ACTIVATIONS
from make import assert_same

RNG = np.random.default_rng(7)
X = RNG.standard_normal((21, 5))
LABELS = RNG.integers(0, 3, 21)
VALUES = RNG.standard_normal((21, 3))
BINARY = (RNG.random((21, 3)) < 0.5).astype(np.float64)
# every activation, and each slope that is not the default
HIDDEN = [*ACTIVATIONS, fusemlp.LeakyReLU(0.2), PReLU(0.3), ELU(0.4)]


def make(loss="mse", sizes=(5, 7, 6, 3), **options):
    """Return an engine with large weights, and biases that are not zero."""
    names = ("activation", "output_activation", "dropout")
    net = {"activation": "tanh", **{name: options.pop(name) for name in names if name in options}}
    options = {"backend": "numpy", "precision": "fp64", "seed": 3, "normalise": False, **options}
    engine = Engine(MLP(sizes, init="torch", **net), loss, **options)
    state = engine.state_dict()
    # without the slopes of prelu and the scale of the inputs
    large = {name: 2.5 * array for name, array in state.items() if array.size > 1 and name.split(".")[0].isdigit()}
    engine.load_state_dict(state | large)
    return engine


def forward(engine, x):
    """Return the outputs in torch's double precision."""
    state = engine.state_dict()
    if engine.input_scale is not None:
        x = (x - tensor(engine.input_scale.mean)) / tensor(engine.input_scale.scale)
    for layer, chosen in enumerate(engine.network.activations):
        z = x @ tensor(state[f"{2 * layer}.weight"]).T + tensor(state[f"{2 * layer}.bias"])
        slope = state.get(f"{2 * layer + 1}.weight", [chosen.slope])
        x = TORCH_ACTIVATIONS[chosen.name](z, np.asarray(slope, np.float64)[0])
    return x


def torch_gradient(engine, rows, output):
    """Return the gradient of one output of each row, by autograd."""
    x = tensor(rows, grad=True)
    y = forward(engine, x)
    y[torch.arange(len(rows)), torch.as_tensor(np.broadcast_to(output, len(rows)).copy())].sum().backward()
    return numpy(x.grad)


@pytest.fixture
def small_batches(monkeypatch):
    """A pass takes 16 rows at a time, and a path one row."""
    monkeypatch.setattr(forward_module, "LARGEST", 1)


class TestGradientOfAnOutput:
    @pytest.mark.parametrize("sizes", [(5, 3), (5, 7, 3), (5, 7, 6, 3)], ids=str)
    @pytest.mark.parametrize("output", ["identity", "tanh", "silu", PReLU(0.3)], ids=str)
    @pytest.mark.parametrize("hidden", HIDDEN, ids=str)
    def test_is_autograds(self, hidden, output, sizes):
        engine = make(sizes=sizes, activation=hidden, output_activation=output)
        assert_close(engine.input_gradient(X, output=1), torch_gradient(engine, X, 1))

    def test_is_that_of_the_predicted_class(self):
        engine = make("cross_entropy")
        predicted = engine.predict(X)
        assert len(set(predicted.tolist())) > 1
        assert_close(engine.input_gradient(X), torch_gradient(engine, X, predicted))
        np.testing.assert_array_equal(engine.input_gradient(X), engine.input_gradient(X, output=predicted))

    def test_of_one_logit_class_0_has_its_minus_and_one_target_needs_no_index(self):
        engine = make("binary_cross_entropy", sizes=(5, 7, 1))
        plain = torch_gradient(engine, X, 0)
        assert_close(engine.input_gradient(X, output=1), plain)
        assert_close(engine.input_gradient(X, output=0), -plain)
        predicted = engine.predict(X)
        assert 0 < predicted.sum() < len(X)
        assert_close(engine.input_gradient(X), np.where(predicted[:, None] == 1, plain, -plain))
        assert_close(make(sizes=(5, 7, 1)).input_gradient(X), plain)
        # an explanation is of the prediction
        found = attributions(engine, X)
        np.testing.assert_array_equal(found.chosen, predicted)
        assert (found.outputs > 0).all()

    @pytest.mark.parametrize("n", [1, 15, 16, 17, 21])
    def test_batches_change_no_row(self, n, small_batches):
        engine = make()
        assert_close(engine.input_gradient(X[:n], output=2), torch_gradient(engine, X[:n], 2))

    @pytest.mark.parametrize("labels", [None, LABELS])
    def test_normalised_inputs_give_the_gradient_by_raw_ones(self, labels):
        raw = X * [1e3, 1e-3, 1.0, 50.0, 7.0] + 5.0
        engine = make("cross_entropy", normalise=raw)
        x = tensor(raw, grad=True)
        if labels is None:
            y = forward(engine, x).max(dim=1).values
        else:
            y = torch.nn.functional.cross_entropy(forward(engine, x), torch.tensor(labels), reduction="none")
        y.sum().backward()
        assert_close(engine.input_gradient(raw, labels), numpy(x.grad))

    def test_nothing_is_dropped_and_nothing_disturbed(self):
        engine, plain = make(dropout=0.5), make()
        before = engine.memory.snapshot()
        np.testing.assert_array_equal(engine.input_gradient(X, output=0), plain.input_gradient(X, output=0))
        engine.input_gradient(X, VALUES)
        attributions(engine, X, output=0)
        assert_same(engine.memory.snapshot(), before)


WEIGHTS = [0.5, 2.0, 0.0]
IGNORED = np.where(LABELS == 1, -100, LABELS)
SOFT = RNG.dirichlet(np.ones(3), 21)
LOSSES = {
    "cross_entropy": ("cross_entropy", LABELS),
    "class weights": (CrossEntropy(class_weight=WEIGHTS), LABELS),
    "smoothed": (CrossEntropy(label_smoothing=0.1, class_weight=[0.5, 2.0, 1.0]), LABELS),
    "ignored": (CrossEntropy(ignore_index=-100, class_weight=WEIGHTS), IGNORED),
    "soft": (CrossEntropy(class_weight=WEIGHTS), SOFT),
    "sum": (CrossEntropy(reduction="sum", class_weight=WEIGHTS), LABELS),
    "binary": ("binary_cross_entropy", BINARY),
    "mse": ("mse", VALUES),
    "mae": ("mae", VALUES),
    "huber": (fusemlp.Huber(0.5), VALUES),
    "poisson": (fusemlp.Poisson(), RNG.poisson(1.5, (21, 3)).astype(np.float64)),
    "quantile, sum": (fusemlp.Quantile(q=0.8, reduction="sum"), VALUES),
}


class TestGradientOfTheLoss:
    @pytest.mark.parametrize(("loss", "y"), LOSSES.values(), ids=LOSSES)
    def test_is_autograds_of_each_row_alone(self, loss, y):
        engine = make(loss)
        spec = engine.inputs.spec_for(engine.inputs.targets("y", y, rows=len(y)))
        weights = None if engine.class_weight is None else np.asarray(engine.class_weight)
        wanted = np.zeros_like(X)
        for row in range(len(X)):
            x = tensor(X[row : row + 1], grad=True)
            torch_loss(spec, forward(engine, x), y[row : row + 1], None, weights).backward()
            # torch's mean of no weight is NaN, the contract's is zero
            wanted[row] = numpy(torch.nan_to_num(x.grad))[0]
        assert np.abs(wanted).max() > 0.01
        assert_close(engine.input_gradient(X, y), wanted)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output": 3}, ArgumentError, "output: expected an index from 0 to 2, got 3"),
        ({"output": [0, 1]}, ShapeError, r"output: expected one index, or 21, one a row, got shape \(2,\)"),
        ({"output": 1.0}, ArgumentTypeError, "output: expected the index of an output"),
        ({}, ArgumentError, "output: the network has 3 outputs; give the index of one, output=0"),
        ({"y": VALUES, "output": 1}, ArgumentError, "output: the loss of y reads all outputs; leave output or y out"),
    ],
)
def test_wrong_outputs_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        make().input_gradient(X, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "integratd"}, ArgumentError, "method: .*did you mean 'integrated'"),
        ({"steps": 0}, ArgumentError, "steps: "),
        ({"baseline": X[:2]}, ShapeError, "baseline: expected one row, or 21, one for each row of X, got 2"),
        ({"background": X}, ArgumentError, "background: the method 'integrated' has none; leave it out"),
        ({"method": "expected"}, ArgumentError, "background: expected gradients draw baselines from rows"),
        ({"method": "expected", "background": X, "baseline": X}, ArgumentError, "baseline: the method 'expected'"),
        ({"engine": MLP([5, 2])}, ArgumentTypeError, "engine: expected an Engine, got MLP"),
    ],
)
def test_wrong_attributions_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        attributions(**{"engine": make(), "X": X, "output": 0, **options})


def integrated_by_hand(engine, baseline, output, steps):
    """Return integrated gradients with the Gauss-Legendre rule, point by point, by autograd."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    total = np.zeros_like(X)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        total += weight * torch_gradient(engine, baseline + point * (X - baseline), output)
    return (X - baseline) * total


def steep(factor):
    """Return a network whose hidden units jump where their input is zero; it is not at the baseline."""
    engine = make(sizes=(5, 7, 3))
    state = engine.state_dict()
    engine.load_state_dict(state | {name: factor * state[name] for name in ("0.weight", "0.bias")})
    return engine


def not_complete(found):
    """Return whether the mean error is above a tenth of the mean difference that the attributions explain."""
    return bool(np.abs(found.error).mean() > 0.1 * np.abs(found.outputs - found.base).mean())


@pytest.mark.parametrize(
    ("gradient", "output", "calls"),
    [
        (0, "identity", ["linear", "linear", "grad_input", "grad_input", "grad_input"]),
        (0, "tanh", ["linear", "linear", "linear", "grad_input", "grad_input", "grad_input", "grad_input"]),
        # from the first hidden layer on, without its product and that of the data
        (1, "identity", ["linear", "grad_input", "grad_input"]),
    ],
)
def test_a_program_has_no_more_calls_than_it_needs(gradient, output, calls):
    engine = make(output_activation=output)
    program = engine.inference.forward.lowered(engine.network, 16, gradient=gradient)
    assert [call.op for call in program.calls] == calls


class TestIntegratedGradients:
    @pytest.mark.parametrize("sizes", [(5, 3), (5, 7, 3), (5, 9, 6, 3)], ids=str)
    @pytest.mark.parametrize("hidden", HIDDEN, ids=str)
    def test_are_those_of_a_rule_by_hand(self, hidden, sizes):
        engine = make(sizes=sizes, activation=hidden, output_activation="sigmoid")
        found = attributions(engine, X, output=2, steps=6)
        assert_close(found.values, integrated_by_hand(engine, np.zeros(5), 2, 6))
        assert_close(found.outputs, engine.predict(X)[:, 2])
        assert_close(found.base, np.full(len(X), engine.predict(np.zeros((1, 5)))[0, 2]))

    @pytest.mark.parametrize("baseline", [X[3], X[::-1]], ids=["a row", "one a row"])
    def test_start_from_any_baseline(self, baseline, small_batches):
        engine = make("cross_entropy")
        output = engine.predict(X)
        found = attributions(engine, X, baseline=baseline, steps=5)
        assert_close(found.values, integrated_by_hand(engine, np.array(baseline), output, 5))
        np.testing.assert_array_equal(found.chosen, output)

    def test_of_normalised_inputs_start_from_their_mean(self):
        raw = X * [1e3, 1e-3, 1.0, 50.0, 7.0] + 5.0
        engine, scaled = make(normalise=raw), make()
        inputs = (raw - engine.input_scale.mean) / engine.input_scale.scale
        assert_close(attributions(engine, raw, output=1).values, attributions(scaled, inputs, output=1).values)

    @pytest.mark.parametrize("hidden", HIDDEN, ids=str)
    def test_are_complete(self, hidden):
        # a rule is exact for smooth activations, and those with kinks have the promised tenth
        close = 1e-9 if hidden in ("identity", "sigmoid", "tanh", "gelu", "silu", "softplus", "mish") else 0.1
        for seed in range(5):
            found = attributions(make("cross_entropy", activation=hidden, seed=seed), X, baseline=X[0])
            difference = np.abs(found.outputs - found.base)
            assert difference.max() > 0.05
            assert np.abs(found.error).mean() < close * difference.mean()

    def test_take_more_steps_until_they_are_complete(self):
        # outputs that jump between two points of the rule with 50 steps
        engine = steep(150.0)
        assert not_complete(attributions(engine, X, output=1, steps=50))
        found = attributions(engine, X, output=1)
        assert not not_complete(found)
        more = (attributions(engine, X, output=1, steps=steps) for steps in (100, 200, 400, 800))
        first = next(one for one in more if not not_complete(one))
        np.testing.assert_array_equal(found.values, first.values)

    def test_that_are_never_complete_are_an_error(self):
        engine = steep(1e6)
        words = r"^X: integrated gradients are not exact enough with 800 steps: .* 'expected'"
        with pytest.raises(DataError, match=words):
            attributions(engine, X, output=1)
        # a number of steps from the caller is taken
        assert not_complete(attributions(engine, X, output=1, steps=50))

    @pytest.mark.parametrize("precision", ["fp32", "fp64"])
    def test_that_differ_by_roundings_alone_are_complete(self, precision):
        engine = make(precision=precision)
        near = np.repeat(X[:1], 3, axis=0) * (1.0 + np.finfo("f4" if precision == "fp32" else "f8").eps)
        found = attributions(engine, near, baseline=X[0], output=1)
        assert np.abs(found.values).max() < 1e-5


class TestOtherMethods:
    def test_expected_gradients_are_the_mean_over_the_draws(self):
        engine, background, steps = make("cross_entropy"), RNG.standard_normal((9, 5)), 4
        output, random, total = engine.predict(X), np.random.default_rng(5), np.zeros_like(X)
        for _ in range(steps):
            start = background[random.integers(0, 9, len(X))]
            place = random.uniform(size=(len(X), 1))
            total += (X - start) * torch_gradient(engine, X - place * (X - start), output)
        found = attributions(engine, X, method="expected", background=background, steps=steps, seed=5)
        assert_close(found.values, total / steps)
        assert_close(found.base, engine.outputs(background).mean(axis=0)[output])

    @pytest.mark.parametrize("hidden", HIDDEN, ids=str)
    def test_gradient_times_input(self, hidden):
        engine = make(activation=hidden)
        found = attributions(engine, X, method="gradient", output=1)
        assert_close(found.values, X * torch_gradient(engine, X, 1))

    def test_importance_is_the_mean_size(self):
        values = np.array([[1.0, -2.0], [-3.0, 0.0]])
        found = Attributions(values, np.array([1.0, 2.0]), np.array([0.5, 0.5]), np.zeros(2, np.int64))
        np.testing.assert_array_equal(found.importance, [2.0, 1.0])
        np.testing.assert_array_equal(found.error, [1.5, 4.5])
        sizes = "the mean of their sizes: column 0 2, column 1 1"
        assert repr(found) == f"<Attributions of 2 rows; {sizes}; error at most 4>"
        table = Importance("RMSE", list("abcdef"), [], np.arange(6.0), np.zeros(6), 80, 0)
        assert repr(table) == "<Importance of 6 columns for RMSE, by 80 rows: f 5, e 4, d 3, c 2, b 1 ...>"


CASES = {
    "relu": {"activation": "relu"},
    "gelu and prelu": {"activation": ["gelu", PReLU(0.3)], "output_activation": "silu"},
    "sigmoid": {"activation": "sigmoid", "sizes": (5, 9, 3)},
    "no hidden layer": {"sizes": (5, 3)},
}
ELSEWHERE = [
    pytest.param(device, precision, case, id=f"{device.name}, {precision}, {case}", marks=marks_of(device))
    for device in (NUMPY, INTERPRETER, GPU, STAND_IN, CUPY_GPU)
    for precision in ("fp32", "fp16")
    for case in CASES
    # in 16 bits a network says enough
    if precision in device.precisions and (precision == "fp32" or case == "gelu and prelu")
]


@pytest.mark.parametrize(("device", "precision", "case"), ELSEWHERE)
def test_every_backend_agrees_with_autograd(device, precision, case):
    # On numbers of order one: roundings of inputs, weights and values in a chain of at most three layers.
    unit = 2.0**-11 if precision == "fp16" else UNIT["float32"]
    described = CASES[case]
    with usable(device):
        engine = make(backend=device.backend, precision=precision, **described)
        oracle = make(**described)
        oracle.load_state_dict(engine.state_dict())
        rows, y = X.astype(np.float32), VALUES.astype(np.float32)
        results = [
            [
                one.input_gradient(rows, output=1),
                one.input_gradient(rows, y),
                attributions(one, rows, output=1, steps=3).values,
            ]
            for one in (engine, oracle)
        ]
    for found, wanted in zip(*results, strict=True):
        assert np.abs(wanted).max() > 0.05
        assert_within(found, wanted, 32 * unit * np.maximum(1.0, np.abs(wanted)))
