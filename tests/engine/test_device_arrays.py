"""Arrays that already lie on the device: nothing is copied through the host, and the training is that of host arrays.

Under Triton's interpreter the device is the CPU, and torch's tensors there are what tensors on a card are on a card.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fusemlp import MLP, SGD, Engine, Fleet
from fusemlp.losses import CrossEntropy
from fusemlp_kernels.errors import ArgumentTypeError, DataError, DTypeError, ShapeError
from fusemlp_kernels.triton.backend import TritonBackend

Array = np.ndarray[Any, Any]

ROWS, INPUTS, OUTPUTS = 13, 8, 3
RNG = np.random.default_rng(5)
X = RNG.standard_normal((ROWS, INPUTS)).astype(np.float32)
LABELS = np.arange(ROWS) % OUTPUTS
VALUES = RNG.random((ROWS, OUTPUTS)).astype(np.float32)
WEIGHT = RNG.random(ROWS).astype(np.float32)
TARGETS = {"cross_entropy": LABELS, "mse": VALUES, "binary_cross_entropy": VALUES, "poisson": VALUES}


def engine(loss: Any = "cross_entropy", **options: Any) -> Engine:
    return Engine(MLP([INPUTS, 5, OUTPUTS]), loss=loss, optimizer=SGD(0.1), batch_size=4, backend="triton", **options)


def tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.copy())


def assert_same_state(found: Engine, expected: Engine) -> None:
    """All that a step changes has the same bits."""
    wanted = expected.snapshot()
    for name, array in found.snapshot().items():
        assert array.tobytes() == wanted[name].tobytes(), name


@pytest.fixture
def host_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what is brought to the host while the test runs."""
    seen: list[tuple[int, ...]] = []
    original = TritonBackend.to_host

    def to_host(self: TritonBackend, array: Any, out: Array | None = None) -> Array:
        seen.append(tuple(array.shape))
        return original(self, array, out)

    monkeypatch.setattr(TritonBackend, "to_host", to_host)
    return seen


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_a_fit_is_that_of_host_arrays(loss: str, host_reads: list[tuple[int, ...]]) -> None:
    y = TARGETS[loss]
    by_host, by_device = engine(loss), engine(loss)
    held_out = (X[:5], y[:5], WEIGHT[:5])
    expected = by_host.fit(X, y, epochs=2, sample_weight=WEIGHT, validation_data=held_out)
    host_reads.clear()
    history = by_device.fit(
        tensor(X), tensor(y), epochs=2, sample_weight=tensor(WEIGHT), validation_data=tuple(map(tensor, held_out))
    )
    # labels and targets may be looked at on the host; the features are not
    assert not [shape for shape in host_reads if shape in (X.shape, held_out[0].shape)]
    assert history.history == expected.history
    assert_same_state(by_device, by_host)
    assert by_device.evaluate(tensor(X), tensor(y)) == by_host.evaluate(X, y)
    np.testing.assert_array_equal(by_device.predict(tensor(X)), by_host.predict(X))


@pytest.mark.parametrize("loss", TARGETS)
def test_a_step_is_that_of_host_arrays(loss: str, host_reads: list[tuple[int, ...]]) -> None:
    y = TARGETS[loss]
    by_host, by_device = engine(loss), engine(loss)
    for rows in (slice(0, 4), slice(4, 7)):
        by_host.step(X[rows], y[rows], WEIGHT[rows])
        arrays = tensor(X[rows]), tensor(y[rows]), tensor(WEIGHT[rows])
        host_reads.clear()
        by_device.step(*arrays)
        assert host_reads == []
    assert_same_state(by_device, by_host)


def test_the_features_are_not_copied_where_their_rows_suit_the_kernels(caplog: pytest.LogCaptureFixture) -> None:
    given = tensor(X)
    net = engine()
    backend = net.memory.backend
    adopted = net.features("X", given)
    with caplog.at_level("INFO", "fusemlp.kernels"):
        assert backend.from_host(adopted, "compute").data_ptr() == given.data_ptr()
        assert not caplog.records
        # rows of 7 numbers do not start at multiples of 16 bytes
        copied = backend.from_host(backend.adopt(tensor(X[:, :7])), "compute")
    assert "is copied once" in caplog.text and copied.stride() == (8, 1)
    np.testing.assert_array_equal(backend.to_host(copied), X[:, :7])


FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.T.contiguous().T,
    "every second row": lambda t: torch.stack([t, torch.full_like(t, 9)], 1).reshape(-1, t.shape[1])[::2],
    "double": lambda t: t.double(),
    "with a gradient": lambda t: t.clone().requires_grad_(),
    "behind an offset": lambda t: torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].reshape(t.shape),
}


@pytest.mark.parametrize("form", FORMS)
def test_strides_types_and_offsets_are_read_right(form: str) -> None:
    net = engine()
    backend = net.memory.backend
    given = FORMS[form](tensor(X))
    before = given.detach().clone()
    bound = backend.from_host(net.features("X", given), "compute")
    np.testing.assert_array_equal(backend.to_host(bound), X)
    staged = backend.view(backend.allocate(ROWS * INPUTS, "compute"), 0, X.shape, INPUTS)
    backend.copy_into(staged, net.features("x", given, check_finite=False))
    np.testing.assert_array_equal(backend.to_host(staged), X)
    assert torch.equal(given, before)


def test_soft_targets_and_ignored_labels_pass_through_the_host_checks() -> None:
    soft = VALUES / VALUES.sum(axis=1, keepdims=True)
    by_host, by_device = engine(), engine()
    by_host.fit(X, soft, epochs=1)
    by_device.fit(tensor(X), tensor(soft), epochs=1)
    assert_same_state(by_device, by_host)
    labels = np.where(LABELS == 1, -100, LABELS)
    by_host, by_device = (engine(CrossEntropy(ignore_index=-100)) for _ in range(2))
    by_host.fit(X, labels, epochs=1)
    by_device.fit(tensor(X), tensor(labels), epochs=1)
    assert_same_state(by_device, by_host)


def with_value(array: Array, value: float) -> torch.Tensor:
    changed = array.copy()
    changed.reshape(-1)[3] = value
    return tensor(changed)


BAD: list[tuple[str, Any, Any, Any, type[Exception], str]] = [
    ("cross_entropy", tensor(X[:, :5]), LABELS, None, ShapeError, "X: expected 8 columns"),
    ("cross_entropy", tensor(X[0]), LABELS, None, ShapeError, "X: expected a matrix"),
    ("cross_entropy", tensor(X[:0]), LABELS, None, DataError, "X: expected 1 or more rows"),
    ("cross_entropy", with_value(X, np.nan), LABELS, None, DataError, "X: expected finite numbers, got nan at row 0"),
    ("cross_entropy", with_value(X, -np.inf), LABELS, None, DataError, "X: expected finite numbers, got -inf at row 0"),
    ("cross_entropy", with_value(X.astype(float), 1e300), LABELS, None, DataError, "beyond the largest float32"),
    ("cross_entropy", tensor(X).to(torch.complex64), LABELS, None, DTypeError, "X: expected real numbers"),
    ("cross_entropy", tensor(X).to_sparse(), LABELS, None, ArgumentTypeError, "X: this torch.Tensor cannot be read"),
    ("cross_entropy", X, with_value(LABELS, OUTPUTS), None, DataError, "y: label 3 at row 3"),
    ("cross_entropy", X, with_value(LABELS, -1), None, DataError, "y: label -1 at row 3"),
    ("cross_entropy", X, tensor(LABELS[1:]), None, ShapeError, "y: expected 13 rows"),
    ("cross_entropy", X, tensor(LABELS + 0.5), None, DataError, "y: class labels must be whole numbers"),
    ("mse", X, with_value(VALUES, np.nan), None, DataError, "y: expected finite numbers"),
    ("mse", X, tensor(VALUES[:, 0]), None, ShapeError, "y: expected shape"),
    ("binary_cross_entropy", X, with_value(VALUES, 1.5), None, DataError, "y: binary cross-entropy takes targets"),
    ("poisson", X, with_value(VALUES, -1.0), None, DataError, "y: the Poisson loss takes counts"),
    ("mse", X, VALUES, with_value(WEIGHT, -1.0), DataError, "sample_weight: weights must be at least 0"),
    ("mse", X, VALUES, tensor(0 * WEIGHT), DataError, "sample_weight: all 13 weights are zero"),
    ("mse", X, VALUES, tensor(WEIGHT[1:]), ShapeError, "sample_weight: expected 13 rows"),
]


@pytest.mark.parametrize("loss, x, y, weight, error, message", BAD, ids=[f"{row[0]}: {row[-1]}" for row in BAD])
def test_what_is_wrong_is_said_as_of_host_arrays(
    loss: str, x: Any, y: Any, weight: Any, error: type[Exception], message: str
) -> None:
    net, untouched = engine(loss), engine(loss)
    with pytest.raises(error, match=message):
        net.fit(x, y, epochs=1, sample_weight=weight)
    assert_same_state(net, untouched)


def test_whole_numbers_as_values_and_weights_are_converted() -> None:
    values, weight = (4 * VALUES).astype(np.int64), np.arange(1, ROWS + 1)
    by_host, by_device = engine("mse"), engine("mse")
    by_host.fit(X, values, epochs=1, sample_weight=weight)
    by_device.fit(tensor(X), tensor(values), epochs=1, sample_weight=tensor(weight))
    assert_same_state(by_device, by_host)


def test_folds_of_a_fleet_are_rows_of_arrays_on_the_device() -> None:
    def fleet() -> Fleet:
        net = MLP([INPUTS, 5, OUTPUTS])
        return Fleet(net, optimizer=SGD(0.1), batch_size=4, vary={"seed": [0, 1]}, backend="triton")

    folds, held_out = [np.arange(8), np.arange(4, 13)], [np.arange(8, 13), np.arange(4)]
    expected = fleet().fit(X, LABELS, epochs=2, rows=folds, validation_rows=held_out)
    results = fleet().fit(tensor(X), tensor(LABELS), epochs=2, rows=folds, validation_rows=held_out)
    for index in range(2):
        assert results.members[index].history.history == expected.members[index].history.history
        assert_same_state(results.engine(index), expected.engine(index))


def test_the_learning_rate_finder_takes_them() -> None:
    found = engine().lr_find(tensor(X), tensor(LABELS), steps=20)
    assert found == engine().lr_find(X, LABELS, steps=20)
