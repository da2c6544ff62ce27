"""Arrays on the device are not copied through the host, and training equals that of host arrays.

Under Triton's interpreter the device is the CPU, with torch's CPU tensors in place of tensors on a card. The stand-in
for CuPy has its own arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from devices import CUPY_GPU, GPU, INTERPRETER, STAND_IN, Device, marks_of, usable

from fusemlp import MLP, SGD, Engine, Fleet, InputScaleWarning
from fusemlp.describe.losses import CrossEntropy
from fusemlp_kernels.errors import ArgumentTypeError, DataError, DTypeError, ShapeError

Array = np.ndarray[Any, Any]

ROWS, INPUTS, OUTPUTS = 7, 8, 3
RNG = np.random.default_rng(5)
X = RNG.standard_normal((ROWS, INPUTS)).astype(np.float32)
LABELS = np.arange(ROWS) % OUTPUTS
VALUES = RNG.random((ROWS, OUTPUTS)).astype(np.float32)
WEIGHT = RNG.random(ROWS).astype(np.float32)
TARGETS = {"cross_entropy": LABELS, "mse": VALUES, "binary_cross_entropy": VALUES, "poisson": VALUES}
DEVICES = [
    pytest.param(device, id=device.name, marks=marks_of(device)) for device in (INTERPRETER, STAND_IN, GPU, CUPY_GPU)
]


class Place:
    """The device of a test, and the way to put arrays there."""

    def __init__(self, device: Device) -> None:
        self.backend = device.backend
        self.net = self.engine()

    def engine(self, loss: Any = "cross_entropy", normalise: bool | None = False) -> Engine:
        net, optimizer = MLP([INPUTS, 5, OUTPUTS]), SGD(0.1)
        return Engine(net, loss, optimizer, batch_size=4, backend=self.backend, plan="eager", normalise=normalise)

    def put(self, array: Array) -> Any:
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


@pytest.fixture(params=DEVICES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with usable(request.param):
        yield Place(request.param)


def assert_same_state(found: Engine, expected: Engine) -> None:
    """Assert that everything a step changes has the same bits."""
    wanted = expected.memory.snapshot()
    for name, array in found.memory.snapshot().items():
        assert array.tobytes() == wanted[name].tobytes(), name


@pytest.fixture
def host_reads(place: Place, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the shapes of the arrays that are copied to the host during the test."""
    seen: list[tuple[int, ...]] = []
    kind: Any = type(place.net.memory.backend)
    original = kind.to_host

    def to_host(self: Any, array: Any) -> Any:
        seen.append(tuple(array.shape))
        return original(self, array)

    monkeypatch.setattr(kind, "to_host", to_host)
    return seen


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_a_fit_is_that_of_host_arrays(place: Place, loss: str, host_reads: list[tuple[int, ...]]) -> None:
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
    assert_same_state(by_device, by_host)
    assert by_device.evaluate(place.put(X), place.put(y)) == by_host.evaluate(X, y)
    np.testing.assert_array_equal(by_device.predict(place.put(X)), by_host.predict(X))


@pytest.mark.parametrize("loss", TARGETS)
def test_a_step_is_that_of_host_arrays(place: Place, loss: str, host_reads: list[tuple[int, ...]]) -> None:
    y = TARGETS[loss]
    by_host, by_device = place.engine(loss), place.engine(loss)
    for rows in (slice(0, 4), slice(4, 7)):
        by_host.step(X[rows], y[rows], WEIGHT[rows])
        arrays = place.put(X[rows]), place.put(y[rows]), place.put(WEIGHT[rows])
        host_reads.clear()
        by_device.step(*arrays)
        assert host_reads == []
    assert_same_state(by_device, by_host)


@pytest.mark.parametrize("kind", [np.float32, np.uint8, np.bool_])
def test_they_are_normalised_as_host_arrays(place: Place, kind: Any, host_reads: list[tuple[int, ...]]) -> None:
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
    assert_same_state(by_device, by_host)
    np.testing.assert_array_equal(by_device.predict_proba(there), by_host.predict_proba(rows))


def test_inputs_far_from_unit_scale_are_named(place: Place) -> None:
    with pytest.warns(InputScaleWarning, match="root mean square of those that are not zero is 1e-05"):
        place.engine(normalise=None).fit(place.put(np.full_like(X, 1e-5)), place.put(LABELS), epochs=1)


def address(native: Any) -> int:
    return int(native.data_ptr() if isinstance(native, torch.Tensor) else native.data.ptr)


def test_the_features_are_not_copied_where_their_rows_suit_the_kernels(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    given = place.put(X)
    backend = place.net.memory.backend
    adopted = place.net.inputs.features("X", given)
    with caplog.at_level("INFO", "fusemlp.kernels"):
        assert address(backend.from_host(adopted, "compute")) == address(given)
        assert not caplog.records
        copied = backend.from_host(backend.adopt(place.put(X.astype(np.float64))), "compute")
    assert "is copied once" in caplog.text
    np.testing.assert_array_equal(backend.to_host(copied), X)


def behind(array: Array) -> Array:
    """Return the array from the third element of its memory on."""
    memory = np.empty(array.size + 3, array.dtype)
    memory[3:] = array.ravel()
    return memory[3:].reshape(array.shape)


FORMS: dict[str, Array] = {
    "transposed": np.asfortranarray(X),
    "every second row": np.repeat(X, 2, axis=0)[::2],
    "every second column": np.repeat(X, 2, axis=1)[:, ::2],
    "part of wider rows": np.concatenate([X, X + 1], axis=1)[:, :INPUTS],
    "double": X.astype(np.float64),
    "behind an offset": behind(X),
}


@pytest.mark.parametrize("form", FORMS)
def test_strides_types_and_offsets_are_read_right(place: Place, form: str) -> None:
    backend = place.net.memory.backend
    given = place.put(FORMS[form])
    bound = backend.from_host(place.net.inputs.features("X", given), "compute")
    np.testing.assert_array_equal(backend.to_host(bound), X)
    staged = backend.view(backend.allocate(ROWS * INPUTS, "compute"), 0, X.shape, INPUTS)
    backend.copy_into(staged, place.net.inputs.features("x", given, check_finite=False))
    np.testing.assert_array_equal(backend.to_host(staged), X)
    np.testing.assert_array_equal(backend.to_host(given), FORMS[form])


def test_soft_targets_and_ignored_labels_pass_through_the_host_checks(place: Place) -> None:
    soft = VALUES / VALUES.sum(axis=1, keepdims=True)
    by_host, by_device = place.engine(), place.engine()
    by_host.fit(X, soft, epochs=1)
    by_device.fit(place.put(X), place.put(soft), epochs=1)
    assert_same_state(by_device, by_host)
    labels = np.where(LABELS == 1, -100, LABELS)
    by_host, by_device = (place.engine(CrossEntropy(ignore_index=-100)) for _ in range(2))
    by_host.fit(X, labels, epochs=1)
    by_device.fit(place.put(X), place.put(labels), epochs=1)
    assert_same_state(by_device, by_host)


def with_value(array: Array, value: float) -> Array:
    changed = array.copy()
    changed.reshape(-1)[3] = value
    return changed


BAD: list[tuple[str, Any, Any, Any, type[Exception], str]] = [
    ("cross_entropy", X[:, :5], LABELS, None, ShapeError, "X: expected 8 columns"),
    ("cross_entropy", X[0], LABELS, None, ShapeError, "X: expected a matrix"),
    ("cross_entropy", X[:0], LABELS, None, DataError, "X: expected 1 or more rows"),
    ("cross_entropy", with_value(X, np.nan), LABELS, None, DataError, "X: expected finite numbers, got nan at row 0"),
    ("cross_entropy", with_value(X, -np.inf), LABELS, None, DataError, "X: expected finite numbers, got -inf at row 0"),
    ("cross_entropy", with_value(X.astype(float), 1e300), LABELS, None, DataError, "beyond the largest float32"),
    ("cross_entropy", X, with_value(LABELS, OUTPUTS), None, DataError, "y: label 3 at row 3"),
    ("cross_entropy", X, with_value(LABELS, -1), None, DataError, "y: label -1 at row 3"),
    ("cross_entropy", X, LABELS[1:], None, ShapeError, "y: expected 7 rows"),
    ("cross_entropy", X, LABELS + 0.5, None, DataError, "y: class labels must be whole numbers"),
    ("mse", X, with_value(VALUES, np.nan), None, DataError, "y: expected finite numbers"),
    ("mse", X, VALUES[:, 0], None, ShapeError, "y: expected shape"),
    ("binary_cross_entropy", X, with_value(VALUES, 1.5), None, DataError, "y: binary cross-entropy takes targets"),
    ("poisson", X, with_value(VALUES, -1.0), None, DataError, "y: the Poisson loss takes counts"),
    ("mse", X, VALUES, with_value(WEIGHT, -1.0), DataError, "sample_weight: weights must be at least 0"),
    ("mse", X, VALUES, 0 * WEIGHT, DataError, "sample_weight: all 7 weights are zero"),
    ("mse", X, VALUES, WEIGHT[1:], ShapeError, "sample_weight: expected 7 rows"),
]


@pytest.mark.parametrize("loss, x, y, weight, error, message", BAD, ids=[f"{row[0]}: {row[-1]}" for row in BAD])
def test_what_is_wrong_is_said_as_of_host_arrays(
    place: Place, loss: str, x: Array, y: Array, weight: Array | None, error: type[Exception], message: str
) -> None:
    net, untouched = place.engine(loss), place.engine(loss)
    there = None if weight is None else place.put(weight)
    with pytest.raises(error, match=message):
        net.fit(place.put(x), place.put(y), epochs=1, sample_weight=there)
    assert_same_state(net, untouched)


@pytest.mark.parametrize(
    "spoiled, error, message",
    [
        (lambda x: x.to(torch.complex64), DTypeError, "X: expected real numbers"),
        (lambda x: x.to_sparse(), ArgumentTypeError, r"X: this torch\.Tensor cannot be read"),
    ],
)
def test_tensors_that_are_no_plain_numbers(spoiled: Any, error: type[Exception], message: str) -> None:
    with usable(INTERPRETER), pytest.raises(error, match=message):
        Place(INTERPRETER).net.fit(spoiled(torch.from_numpy(X)), LABELS, epochs=1)


def test_a_tensor_that_asks_for_a_gradient_is_read_and_left_alone(place: Place) -> None:
    with_gradient = torch.from_numpy(X.copy()).to(place.net.device if place.backend == "triton" else "cpu")
    with_gradient.requires_grad_()
    by_host, by_tensor = place.engine(), place.engine()
    by_host.step(X[:4], LABELS[:4])
    by_tensor.step(with_gradient[:4], LABELS[:4])
    assert_same_state(by_tensor, by_host)
    assert with_gradient.grad is None


def test_whole_numbers_as_values_and_weights_are_converted(place: Place) -> None:
    values, weight = (4 * VALUES).astype(np.int64), np.arange(1, ROWS + 1)
    by_host, by_device = place.engine("mse"), place.engine("mse")
    by_host.fit(X, values, epochs=1, sample_weight=weight)
    by_device.fit(place.put(X), place.put(values), epochs=1, sample_weight=place.put(weight))
    assert_same_state(by_device, by_host)


def test_folds_of_a_fleet_are_rows_of_arrays_on_the_device(place: Place) -> None:
    def fleet() -> Fleet:
        net = MLP([INPUTS, 5, OUTPUTS])
        return Fleet(net, optimizer=SGD(0.1), batch_size=4, vary={"seed": [0, 1]}, backend=place.backend, plan="eager")

    folds, held_out = [np.arange(5), np.arange(2, 7)], [np.arange(5, 7), np.arange(2)]
    expected = fleet().fit(X, LABELS, epochs=2, rows=folds, validation_rows=held_out)
    results = fleet().fit(place.put(X), place.put(LABELS), epochs=2, rows=folds, validation_rows=held_out)
    for index in range(2):
        assert results.members[index].history.history == expected.members[index].history.history
        assert_same_state(results.engine(index), expected.engine(index))


def test_the_learning_rate_finder_takes_them(place: Place) -> None:
    found = place.engine().lr_find(place.put(X), place.put(LABELS), steps=20)
    assert found == place.engine().lr_find(X, LABELS, steps=20)
