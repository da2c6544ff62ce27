"""Every kind of array gives the same NumPy results as plain arrays, and the input does not change."""

from functools import cache

import numpy as np
import pandas
import pytest
import torch

from fusemlp import MLP, SGD, Engine
from make import assert_same

ROWS = 13
# Small whole numbers: every type below, down to bool's neighbour uint8, holds them exactly.
X = np.random.default_rng(1).integers(0, 3, (ROWS, 4)).astype(np.float32)
Y = np.arange(ROWS) % 3
VALUES = np.random.default_rng(2).integers(0, 4, (ROWS, 2)).astype(np.float32)
WEIGHT = (1.0 + np.arange(ROWS) % 4).astype(np.float32)


class WithArray:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype=dtype, copy=copy)


class WithDLPack:
    """An object with ``__dlpack__`` and no other array protocol."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Subclass(np.ndarray):
    pass


def read_only(array):
    frozen = array.copy()
    frozen.flags.writeable = False
    return frozen


def stepped(array):
    """Return every second row and column of a larger array, which has NaN elsewhere if its type has NaN."""
    wide = np.full([2 * size for size in array.shape], np.nan if array.dtype.kind == "f" else -7, array.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def offset(array):
    memory = np.zeros(array.size + 3, array.dtype)
    memory[3:] = array.ravel()
    return memory[3:].reshape(array.shape)


def misaligned(array):
    """Return an array at an address that is no multiple of the element's size."""
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    view = memory.view(array.dtype).reshape(array.shape)
    view[...] = array
    assert not view.flags.aligned
    return view


def of_types(*names):
    return {name: (lambda array, name=name: array.astype(name)) for name in names}


LAYOUTS = {
    "list": lambda array: array.tolist(),
    "tuple of arrays": tuple,
    "read-only": read_only,
    "Fortran order": np.asfortranarray,
    "stepped": stepped,
    "reversed": lambda array: array[::-1].copy()[::-1],
    "offset": offset,
    "misaligned": misaligned,
    "broadcast": lambda array: np.broadcast_to(array, (2, *array.shape))[1],
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "masked, nothing masked": lambda array: np.ma.masked_array(array, mask=np.zeros(array.shape, bool)),
    "subclass": lambda array: array.view(Subclass),
    "__array__": WithArray,
    "__dlpack__": WithDLPack,
    "torch": lambda array: torch.from_numpy(array.copy()),
    "torch, stepped": lambda array: torch.from_numpy(np.repeat(array, 2, axis=0))[::2],
    "memoryview": lambda array: memoryview(np.ascontiguousarray(array)),
}
FEATURES = {
    **LAYOUTS,
    **of_types("float64", "float16", "longdouble", "int8", "int64", "uint8", "uint64"),
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
VECTORS = {
    "Series": pandas.Series,
    "Series with an index": lambda array: pandas.Series(array, index=range(100, 100 - len(array), -1)),
    "one column": lambda array: array[:, None],
    "column of a DataFrame": lambda array: pandas.DataFrame({"y": array}),
}
LABELS = {
    **LAYOUTS,
    **VECTORS,
    **of_types("int8", "int32", "uint8", "uint64", "float16", "float32", "float64"),
    "nullable integers": lambda array: pandas.Series(array, dtype="Int64"),
    "torch, float": lambda array: torch.from_numpy(array.astype(np.float32)),
}


def classifier(outputs=3):
    return Engine(MLP([4, 5, outputs]), optimizer=SGD(0.1, momentum=0.9), batch_size=ROWS, seed=5)


def regressor(outputs=2):
    return Engine(MLP([4, 5, outputs]), loss="mse", optimizer=SGD(0.01), batch_size=ROWS, seed=5)


def results(engine, x, y, weight=None):
    """Return the results of every public call on the same data."""
    step = engine.step(x, y, weight)
    history = engine.fit(x, y, epochs=2, sample_weight=weight, validation_data=(x, y, weight)).history
    found = {"step": step, "history": history, "evaluate": engine.evaluate(x, y, weight), "predict": engine.predict(x)}
    if engine.loss.is_classification:
        found["predict_proba"] = engine.predict_proba(x)
    return {**found, "dead_units": engine.dead_units(x), **engine.state_dict()}


PROBABILITIES = np.eye(3, dtype=np.float32)[Y]
ROLES = {
    "features": (FEATURES, X, lambda given: results(classifier(), given, Y)),
    "labels": (LABELS, Y, lambda given: results(classifier(), X, given)),
    "weights": ({**LAYOUTS, **VECTORS}, WEIGHT, lambda given: results(classifier(), X, Y, given)),
    # the columns of a DataFrame of many types are those of the features
    "values": (
        {name: kind for name, kind in FEATURES.items() if "many types" not in name},
        VALUES,
        lambda given: results(regressor(), X, given),
    ),
    "one column of values": (VECTORS, VALUES[:, 0].copy(), lambda given: results(regressor(1), X, given)),
    "probabilities": (FEATURES, PROBABILITIES, lambda given: results(classifier(), X, given)),
}


@cache
def expected(role):
    _, array, results_with = ROLES[role]
    return results_with(array)


@pytest.mark.parametrize(("role", "kind"), [(role, kind) for role, (kinds, *_) in ROLES.items() for kind in kinds])
def test_every_kind_of_array(role, kind):
    kinds, array, results_with = ROLES[role]
    given = kinds[kind](array)
    assert_same(results_with(given), expected(role))
    assert_unchanged(given, array)


def test_bool_features_and_labels():
    x, y = X > 1, Y > 0
    for given in (x, x.tolist(), torch.from_numpy(x), pandas.DataFrame(x)):
        assert_same(results(classifier(2), given, y.astype(int)), results(classifier(2), x.astype(np.float32), y))
    for labels in (y.tolist(), torch.from_numpy(y), pandas.Series(y), y[:, None]):
        assert_same(results(classifier(2), X, labels), results(classifier(2), X, y.astype(int)))


@pytest.mark.parametrize("kind", [name for name in FEATURES if "DataFrame of" not in name])
def test_parameters(kind):
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


def test_data_of_fit_are_not_kept_and_results_are_copies():
    x, y, engine, twin = X.copy(), Y.copy(), classifier(), classifier()
    loss, state = engine.step(x, y), engine.state_dict()
    first = loss.copy()
    engine.fit(x, y, epochs=1)
    x[:], y[:] = 99, 0
    for array in state.values():
        array[:] = 99
    twin.step(X, Y)
    twin.fit(X, Y, epochs=1)
    assert loss.shape == () and loss == first
    assert_same(results(engine, X, Y), results(twin, X, Y))


def assert_unchanged(given, original):
    """Assert that an argument still holds its original values."""
    if isinstance(given, WithArray | WithDLPack):
        given = given.array
    if isinstance(given, torch.Tensor):
        assert given.grad is None
        given = given.detach()
    if isinstance(given, list | tuple) and isinstance(given[0], torch.Tensor):
        given = torch.stack(list(given))
    assert np.array_equal(np.asarray(given, np.float64).reshape(original.shape), original)
