"""Arrays on the device are not copied through the host, and training equals that of host arrays.

Under Triton's interpreter the device is the CPU, with torch's CPU tensors in place of tensors on a card. The stand-in
for CuPy has its own arrays.
"""

import numpy as np
import pytest
import torch
from devices import CUPY_GPU, GPU, INTERPRETER, STAND_IN, places, usable

from fusemlp import MLP, SGD, Engine, Fleet, InputScaleWarning
from fusemlp.describe.losses import CrossEntropy
from fusemlp_kernels.errors import ArgumentTypeError, DataError, DTypeError, ShapeError
from make import assert_same

ROWS, INPUTS, OUTPUTS = 7, 8, 3
RNG = np.random.default_rng(5)
X = RNG.standard_normal((ROWS, INPUTS)).astype(np.float32)
LABELS = np.arange(ROWS) % OUTPUTS
VALUES = RNG.random((ROWS, OUTPUTS)).astype(np.float32)
WEIGHT = RNG.random(ROWS).astype(np.float32)
TARGETS = {"cross_entropy": LABELS, "mse": VALUES, "binary_cross_entropy": VALUES, "poisson": VALUES}


class Place:
    """The device of a test, and the way to put arrays there."""

    def __init__(self, device):
        self.backend = device.backend
        self.net = self.engine()

    def engine(self, loss="cross_entropy", normalise=False):
        net, optimizer = MLP([INPUTS, 5, OUTPUTS]), SGD(0.1)
        return Engine(net, loss, optimizer, batch_size=4, backend=self.backend, plan="eager", normalise=normalise)

    def put(self, array):
        """Return a copy of the array on the device, with the same strides, made as users do."""
        array = np.asarray(array)
        base = array if array.base is None else np.asarray(array.base)
        start = array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        if self.backend == "triton":
            there = torch.from_numpy(base.ravel(order="K").copy()).to(self.net.device)
            steps = [step // array.itemsize for step in array.strides]
            return there.as_strided(array.shape, steps, start // array.itemsize)
        from fusemlp_kernels.cupy.device import cupy

        there = cupy.asarray(base.ravel(order="K"))
        return cupy.ndarray(array.shape, array.dtype, there.data + start, array.strides)


@pytest.fixture(params=places(INTERPRETER, STAND_IN, GPU, CUPY_GPU))
def place(request):
    with usable(request.param):
        yield Place(request.param)


def assert_same_memory(found, expected):
    """Assert that everything a step changes has the same bits."""
    assert_same(found.memory.snapshot(), expected.memory.snapshot())


@pytest.fixture
def host_reads(place, monkeypatch):
    """Record the shapes of the arrays that are copied to the host during the test."""
    seen = []
    kind = type(place.net.memory.backend)
    original = kind.to_host

    def to_host(self, array):
        seen.append(tuple(array.shape))
        return original(self, array)

    monkeypatch.setattr(kind, "to_host", to_host)
    return seen


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_a_fit_is_that_of_host_arrays(place, loss, host_reads):
    y = TARGETS[loss]
    by_host, by_device = place.engine(loss), place.engine(loss)
    held_out = (X[:3], y[:3], WEIGHT[:3])
    expected = by_host.fit(X, y, epochs=2, sample_weight=WEIGHT, validation_data=held_out)
    host_reads.clear()
    arrays = place.put(X), place.put(y)
    validation = tuple(map(place.put, held_out))
    history = by_device.fit(*arrays, epochs=2, sample_weight=place.put(WEIGHT), validation_data=validation)
    # Labels and targets may be checked on the host; features must not.
    assert not [shape for shape in host_reads if shape in (X.shape, held_out[0].shape)]
    assert history.history == expected.history
    assert_same_memory(by_device, by_host)
    assert by_device.evaluate(place.put(X), place.put(y)) == by_host.evaluate(X, y)
    np.testing.assert_array_equal(by_device.predict(place.put(X)), by_host.predict(X))


@pytest.mark.parametrize("loss", TARGETS)
def test_a_step_is_that_of_host_arrays(place, loss, host_reads):
    y = TARGETS[loss]
    by_host, by_device = place.engine(loss), place.engine(loss)
    for rows in (slice(0, 4), slice(4, 7)):
        by_host.step(X[rows], y[rows], WEIGHT[rows])
        arrays = place.put(X[rows]), place.put(y[rows]), place.put(WEIGHT[rows])
        host_reads.clear()
        by_device.step(*arrays)
        assert host_reads == []
    assert_same_memory(by_device, by_host)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_batches_lie_on_the_host_and_on_the_device_in_turn(place, loss):
    batches = [(X[:4], TARGETS[loss][:4]), (X[4:7], TARGETS[loss][4:7])]
    by_host, mixed = place.engine(loss), place.engine(loss)
    expected = by_host.fit(batches, epochs=1).history
    assert mixed.fit([batches[0], tuple(map(place.put, batches[1]))], epochs=1).history == expected
    assert_same_memory(mixed, by_host)


@pytest.mark.parametrize("kind", [np.float32, np.uint8, np.bool_])
def test_they_are_normalised_as_host_arrays(place, kind, host_reads):
    rows = (X > 0 if kind == np.bool_ else 100 * np.abs(X)).astype(kind)
    by_host, by_device = place.engine(normalise=True), place.engine(normalise=True)
    there, labels = place.put(rows), place.put(LABELS)
    expected = by_host.fit(rows, LABELS, epochs=2, validation_data=(rows, LABELS))
    assert by_device.fit(there, labels, epochs=2, validation_data=(there, labels)).history == expected.history
    host_reads.clear()
    by_device.step(there[:4], labels[:4])
    by_host.step(rows[:4], LABELS[:4])
    assert by_device.evaluate(there, labels) == by_host.evaluate(rows, LABELS)
    # the scale is on the device
    assert rows.shape not in host_reads and (INPUTS,) not in host_reads
    assert_same_memory(by_device, by_host)
    np.testing.assert_array_equal(by_device.predict_proba(there), by_host.predict_proba(rows))


def test_inputs_far_from_unit_scale_are_named(place):
    with pytest.warns(InputScaleWarning, match="root mean square of those that are not zero is 1e-05"):
        place.engine(normalise=None).fit(place.put(np.full_like(X, 1e-5)), place.put(LABELS), epochs=1)


def address(native):
    return int(native.data_ptr() if isinstance(native, torch.Tensor) else native.data.ptr)


def test_the_features_are_not_copied_where_their_rows_suit_the_kernels(place, caplog):
    given = place.put(X)
    backend = place.net.memory.backend
    adopted = place.net.inputs.features("X", given)
    with caplog.at_level("INFO", "fusemlp.kernels"):
        assert address(backend.from_host(adopted, "compute")) == address(given)
        assert not caplog.records
        copied = backend.from_host(backend.adopt(place.put(X.astype(np.float64))), "compute")
    assert "is copied once" in caplog.text
    np.testing.assert_array_equal(backend.to_host(copied), X)


def behind(array):
    """Return the array from the third element of its memory on."""
    memory = np.empty(array.size + 3, array.dtype)
    memory[3:] = array.ravel()
    return memory[3:].reshape(array.shape)


FORMS = {
    "transposed": np.asfortranarray(X),
    "every second row": np.repeat(X, 2, axis=0)[::2],
    "every second column": np.repeat(X, 2, axis=1)[:, ::2],
    "part of wider rows": np.concatenate([X, X + 1], axis=1)[:, :INPUTS],
    "double": X.astype(np.float64),
    "behind an offset": behind(X),
}


@pytest.mark.parametrize("form", FORMS)
def test_strides_types_and_offsets_are_read_right(place, form):
    backend = place.net.memory.backend
    given = place.put(FORMS[form])
    bound = backend.from_host(place.net.inputs.features("X", given), "compute")
    np.testing.assert_array_equal(backend.to_host(bound), X)
    staged = backend.view(backend.allocate(ROWS * INPUTS, "compute"), 0, X.shape, INPUTS)
    backend.copy_into(staged, place.net.inputs.features("x", given, check_finite=False))
    np.testing.assert_array_equal(backend.to_host(staged), X)
    np.testing.assert_array_equal(backend.to_host(given), FORMS[form])


SOFT = VALUES / VALUES.sum(axis=1, keepdims=True)
CONVERTED = {
    "soft targets": ("cross_entropy", SOFT, None),
    "ignored labels": (CrossEntropy(ignore_index=-100), np.where(LABELS == 1, -100, LABELS), None),
    "whole numbers": ("mse", (4 * VALUES).astype(np.int64), np.arange(1, ROWS + 1)),
}


@pytest.mark.parametrize(("loss", "y", "weight"), CONVERTED.values(), ids=CONVERTED)
def test_targets_that_are_checked_or_converted(place, loss, y, weight):
    by_host, by_device = place.engine(loss), place.engine(loss)
    by_host.fit(X, y, epochs=1, sample_weight=weight)
    there = None if weight is None else place.put(weight)
    by_device.fit(place.put(X), place.put(y), epochs=1, sample_weight=there)
    assert_same_memory(by_device, by_host)


def with_value(array, value):
    changed = array.copy()
    changed.reshape(-1)[3] = value
    return changed


BAD = [
    ({"X": X[:, :5]}, ShapeError, "X: expected 8 columns"),
    ({"X": X[0]}, ShapeError, "X: expected a matrix"),
    ({"X": X[:0]}, DataError, "X: expected 1 or more rows"),
    ({"X": with_value(X, np.nan)}, DataError, "X: expected finite numbers, got nan at row 0"),
    ({"X": with_value(X, -np.inf)}, DataError, "X: expected finite numbers, got -inf at row 0"),
    ({"X": with_value(X.astype(float), 1e300)}, DataError, "beyond the largest float32"),
    ({"y": with_value(LABELS, OUTPUTS)}, DataError, "y: label 3 at row 3"),
    ({"y": with_value(LABELS, -1)}, DataError, "y: label -1 at row 3"),
    ({"y": LABELS[1:]}, ShapeError, "y: expected 7 rows"),
    ({"y": LABELS + 0.5}, DataError, "y: class labels must be whole numbers"),
    ({"loss": "mse", "y": with_value(VALUES, np.nan)}, DataError, "y: expected finite numbers"),
    ({"loss": "mse", "y": VALUES[:, 0]}, ShapeError, "y: expected shape"),
    (
        {"loss": "binary_cross_entropy", "y": with_value(VALUES, 1.5)},
        DataError,
        "y: binary cross-entropy takes",
    ),
    ({"loss": "poisson", "y": with_value(VALUES, -1.0)}, DataError, "y: the Poisson loss takes counts"),
    ({"sample_weight": with_value(WEIGHT, -1.0)}, DataError, "sample_weight: weights must be at least 0"),
    ({"sample_weight": 0 * WEIGHT}, DataError, "sample_weight: all 7 weights are zero"),
    ({"sample_weight": WEIGHT[1:]}, ShapeError, "sample_weight: expected 7 rows"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[row[-1] for row in BAD])
def test_what_is_wrong_is_said_as_of_host_arrays(place, arguments, error, message):
    data = {"X": X, "y": LABELS, **arguments}
    loss = data.pop("loss", "cross_entropy")
    engine = place.engine(loss)
    with pytest.raises(error, match=message):
        engine.fit(**{name: place.put(array) for name, array in data.items()}, epochs=1)
    assert_same_memory(engine, place.engine(loss))


@pytest.mark.parametrize(
    "spoiled, error, message",
    [
        (lambda x: x.to(torch.complex64), DTypeError, "X: expected real numbers"),
        (lambda x: x.to_sparse(), ArgumentTypeError, r"X: this torch\.Tensor cannot be read"),
    ],
)
def test_tensors_that_are_no_plain_numbers(spoiled, error, message):
    with usable(INTERPRETER), pytest.raises(error, match=message):
        Place(INTERPRETER).net.fit(spoiled(torch.from_numpy(X)), LABELS, epochs=1)


def test_a_tensor_that_asks_for_a_gradient_is_read_and_left_alone(place):
    with_gradient = torch.from_numpy(X.copy()).to(place.net.device if place.backend == "triton" else "cpu")
    with_gradient.requires_grad_()
    by_host, by_tensor = place.engine(), place.engine()
    by_host.step(X[:4], LABELS[:4])
    by_tensor.step(with_gradient[:4], LABELS[:4])
    assert_same_memory(by_tensor, by_host)
    assert with_gradient.grad is None


def test_folds_of_a_fleet_are_rows_of_arrays_on_the_device(place):
    def fleet():
        net = MLP([INPUTS, 5, OUTPUTS])
        return Fleet(net, optimizer=SGD(0.1), batch_size=4, vary={"seed": [0, 1]}, backend=place.backend, plan="eager")

    folds, held_out = [np.arange(5), np.arange(2, 7)], [np.arange(5, 7), np.arange(2)]
    expected = fleet().fit(X, LABELS, epochs=2, rows=folds, validation_rows=held_out)
    results = fleet().fit(place.put(X), place.put(LABELS), epochs=2, rows=folds, validation_rows=held_out)
    for index in range(2):
        assert results.members[index].history.history == expected.members[index].history.history
        assert_same_memory(results.engine(index), expected.engine(index))


def test_the_learning_rate_finder_takes_them(place):
    found = place.engine().lr_find(place.put(X), place.put(LABELS), steps=20)
    assert found == place.engine().lr_find(X, LABELS, steps=20)
