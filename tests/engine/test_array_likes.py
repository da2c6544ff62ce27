"""Every kind of array gives the same NumPy results as plain arrays, and the input does not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from fusemlp import MLP, SGD, Engine

Array = np.ndarray[Any, Any]

ROWS = 13
# Small whole numbers: every type below, down to bool's neighbour uint8, holds them exactly.
X = np.random.default_rng(1).integers(0, 3, (ROWS, 4)).astype(np.float32)
Y = np.arange(ROWS) % 3
VALUES = np.random.default_rng(2).integers(0, 4, (ROWS, 2)).astype(np.float32)
WEIGHT = (1.0 + np.arange(ROWS) % 4).astype(np.float32)


class WithArray:
    """An object with ``__array__``."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.array, dtype=dtype, copy=copy)


class WithDLPack:
    """An object with ``__dlpack__`` and no other array protocol."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Subclass(np.ndarray[Any, Any]):
    """A subclass of ndarray."""


def read_only(array: Array) -> Array:
    frozen = array.copy()
    frozen.flags.writeable = False
    return frozen


def stepped(array: Array) -> Array:
    """Return every second row and column of a larger array, which has NaN elsewhere if its type has NaN."""
    wide = np.full([2 * size for size in array.shape], np.nan if array.dtype.kind == "f" else -7, array.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def reversed_rows(array: Array) -> Array:
    """Return an array with negative strides."""
    return array[::-1].copy()[::-1]


def offset(array: Array) -> Array:
    """Return an array with an offset into its memory."""
    memory = np.zeros(array.size + 3, array.dtype)
    memory[3:] = array.ravel()
    return memory[3:].reshape(array.shape)


def misaligned(array: Array) -> Array:
    """Return an array at an address that is no multiple of the element's size."""
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    view = memory.view(array.dtype).reshape(array.shape)
    view[...] = array
    assert not view.flags.aligned
    return view


def broadcast(array: Array) -> Array:
    """Return the same values, read-only, with an odd stride."""
    return np.broadcast_to(array, (2, *array.shape))[1]


def big_endian(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder(">"))


def masked(array: Array) -> Array:
    """Return a masked array without masked values."""
    return np.ma.masked_array(array, mask=np.zeros(array.shape, bool))


LAYOUTS: dict[str, Callable[[Array], Any]] = {
    "list": lambda array: array.tolist(),
    "tuple of arrays": tuple,
    "read-only": read_only,
    "Fortran order": np.asfortranarray,
    "stepped": stepped,
    "reversed": reversed_rows,
    "offset": offset,
    "misaligned": misaligned,
    "broadcast": broadcast,
    "big-endian": big_endian,
    "masked, nothing masked": masked,
    "subclass": lambda array: array.view(Subclass),
    "__array__": WithArray,
    "__dlpack__": WithDLPack,
    "torch": lambda array: torch.from_numpy(array.copy()),
    "torch, stepped": lambda array: torch.from_numpy(np.repeat(array, 2, axis=0))[::2],
    "memoryview": lambda array: memoryview(np.ascontiguousarray(array)),
}
FEATURES: dict[str, Callable[[Array], Any]] = {
    **LAYOUTS,
    **{name: (lambda array, name=name: array.astype(name)) for name in ("float64", "float16", "longdouble")},
    **{name: (lambda array, name=name: array.astype(name)) for name in ("int8", "int64", "uint8", "uint64")},
    "DataFrame": lambda array: pandas.DataFrame(array, columns=list("abcd")[: array.shape[1]]),
    "DataFrame of many types": lambda array: pandas.DataFrame(
        {f"c{i}": column.astype(("int8", "float64", "uint8", "float32")[i]) for i, column in enumerate(array.T)}
    ),
    "DataFrame with an index": lambda array: pandas.DataFrame(array, index=range(100, 100 - len(array), -1)),
    "torch, requires grad": lambda array: torch.tensor(array, requires_grad=True),
    "torch, transposed": lambda array: torch.from_numpy(np.ascontiguousarray(array.T)).T,
    "torch, int": lambda array: torch.from_numpy(array.astype(np.int64)),
    "list of tensors": lambda array: [torch.from_numpy(one) for one in array.copy()],
}
VECTORS: dict[str, Callable[[Array], Any]] = {
    "Series": pandas.Series,
    "Series with an index": lambda array: pandas.Series(array, index=range(100, 100 - len(array), -1)),
    "one column": lambda array: array[:, None],
    "column of a DataFrame": lambda array: pandas.DataFrame({"y": array}),
}
LABELS: dict[str, Callable[[Array], Any]] = {
    **LAYOUTS,
    **VECTORS,
    **{name: (lambda array, name=name: array.astype(name)) for name in ("int8", "int32", "uint8", "uint64")},
    **{name: (lambda array, name=name: array.astype(name)) for name in ("float16", "float32", "float64")},
    "range": lambda array: array.tolist(),
    "nullable integers": lambda array: pandas.Series(array, dtype="Int64"),
    "torch, float": lambda array: torch.from_numpy(array.astype(np.float32)),
}


def classifier(outputs: int = 3) -> Engine:
    return Engine(MLP([4, 5, outputs]), optimizer=SGD(0.1, momentum=0.9), batch_size=ROWS, seed=5)


def regressor() -> Engine:
    return Engine(MLP([4, 5, 2]), loss="mse", optimizer=SGD(0.01), batch_size=ROWS, seed=5)


def results(engine: Engine, x: Any, y: Any, weight: Any = None) -> dict[str, Any]:
    """Return the results of every public call on the same data."""
    found: dict[str, Any] = {"step": engine.step(x, y, weight)}
    history = engine.fit(x, y, epochs=2, sample_weight=weight, validation_data=(x, y, weight))
    found |= {"history": history.history, "evaluate": engine.evaluate(x, y, weight), "predict": engine.predict(x)}
    if engine.loss.is_classification:
        found["predict_proba"] = engine.predict_proba(x)
    return {**found, "dead_units": engine.dead_units(x), **engine.state_dict()}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert type(found[name]) is np.ndarray, name
            assert found[name].dtype == value.dtype, name
            assert found[name].shape == value.shape, name
            assert found[name].tobytes() == value.tobytes(), name
        else:
            assert found[name] == value, name


PLAIN = results(classifier(), X, Y)


@pytest.mark.parametrize("kind", FEATURES)
def test_features(kind: str) -> None:
    given = FEATURES[kind](X)
    assert_same(results(classifier(), given, Y), PLAIN)
    assert_unchanged(given, X)


@pytest.mark.parametrize("kind", LABELS)
def test_labels(kind: str) -> None:
    given = LABELS[kind](Y)
    assert_same(results(classifier(), X, given), PLAIN)
    assert_unchanged(given, Y)


@pytest.mark.parametrize("kind", [*LAYOUTS, *VECTORS])
def test_weights(kind: str) -> None:
    given = {**LAYOUTS, **VECTORS}[kind](WEIGHT)
    assert_same(results(classifier(), X, Y, given), results(classifier(), X, Y, WEIGHT))
    assert_unchanged(given, WEIGHT)


@pytest.mark.parametrize("kind", [name for name in FEATURES if "many types" not in name])
def test_real_targets(kind: str) -> None:
    given = FEATURES[kind](VALUES)
    assert_same(results(regressor(), X, given), results(regressor(), X, VALUES))
    assert_unchanged(given, VALUES)


@pytest.mark.parametrize("kind", FEATURES)
def test_probabilities(kind: str) -> None:
    rows = np.eye(3, dtype=np.float32)[Y]
    given = FEATURES[kind](rows)
    assert_same(results(classifier(), X, given), results(classifier(), X, rows))
    assert_unchanged(given, rows)


def test_bool_features_and_labels() -> None:
    x, y = X > 1, Y > 0
    for given in (x, x.tolist(), torch.from_numpy(x), pandas.DataFrame(x)):
        assert_same(results(classifier(2), given, y.astype(int)), results(classifier(2), x.astype(np.float32), y))
    for labels in (y.tolist(), torch.from_numpy(y), pandas.Series(y), y[:, None]):
        assert_same(results(classifier(2), X, labels), results(classifier(2), X, y.astype(int)))


@pytest.mark.parametrize("kind", ["Series", "one column", "column of a DataFrame"])
def test_a_vector_stands_for_one_column_of_targets(kind: str) -> None:
    def engine() -> Engine:
        return Engine(MLP([4, 5, 1]), loss="mse", optimizer=SGD(0.01), batch_size=ROWS, seed=5)

    target = VALUES[:, 0].copy()
    expected = results(engine(), X, target)
    assert expected["predict"].shape == (ROWS,)
    assert_same(results(engine(), X, VECTORS[kind](target)), expected)


@pytest.mark.parametrize("kind", [name for name in FEATURES if "DataFrame of" not in name])
def test_parameters(kind: str) -> None:
    state = {name: np.round(8 * array) for name, array in classifier().state_dict().items()}
    if kind.startswith(("u", "list of tensors")):
        state = {name: np.abs(array) for name, array in state.items()}
    convert = FEATURES[kind]
    given = {name: convert(array) if array.ndim == 2 and array.shape[1] < 5 else array for name, array in state.items()}
    engine = classifier()
    engine.load_state_dict(given)
    assert_same(engine.state_dict(), state)
    engine.step(X, Y)
    for name, array in state.items():
        if given[name] is not array:
            assert_unchanged(given[name], array)


def test_parameters_of_a_torch_module_go_in_and_out() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    engine = classifier()
    for state in (module.state_dict(), dict(module.named_parameters())):
        engine.load_state_dict(state)
        assert_same(engine.state_dict(), {name: value.detach().numpy() for name, value in state.items()})
    module.load_state_dict({name: torch.from_numpy(array) for name, array in engine.state_dict().items()})
    # A sum of K products is within (2 sqrt(K) + 4) u of the sum of their sizes. Here x <= 2, torch's weights and biases
    # <= 1 / sqrt(K): the hidden units are at most 4.5 and err by 8 * 4.5 u, the logits by 8.5 * 10.5 u of their own and
    # 5 * 0.45 times that: 171 u, in either library. No probability moves by more than its logits do.
    outputs = module(torch.from_numpy(X)).softmax(dim=1).detach().numpy()
    assert np.abs(outputs - engine.predict_proba(X)).max() <= 2 * 171 * 2.0**-24


def test_data_of_fit_are_not_kept_and_results_are_copies() -> None:
    x, y = X.copy(), Y.copy()
    engine, twin = classifier(), classifier()
    loss = engine.step(x, y)
    first = loss.copy()
    state = engine.state_dict()
    engine.fit(x, y, epochs=1)
    x[:], y[:] = 99, 0
    for array in state.values():
        array[:] = 99
    twin.step(X, Y)
    twin.fit(X, Y, epochs=1)
    assert loss.shape == () and loss == first
    assert_same(results(engine, X, Y), results(twin, X, Y))


def assert_unchanged(given: Any, original: Array) -> None:
    """Assert that an argument still holds its original values."""
    if isinstance(given, WithArray | WithDLPack):
        given = given.array
    if isinstance(given, torch.Tensor):
        assert given.grad is None
        given = given.detach()
    if isinstance(given, list | tuple) and isinstance(given[0], torch.Tensor):
        given = torch.stack(list(given))
    assert np.array_equal(np.asarray(given, np.float64).reshape(original.shape), original)
