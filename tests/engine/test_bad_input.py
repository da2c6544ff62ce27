"""Bad input is refused with the right type and message, and changes nothing.

Every row of the table makes one mistake with a trained engine. Afterwards the engine must have the same state, bit for
bit, and continue exactly as a twin without the mistake. Options of networks, losses, optimizers and schedules, data
files and damaged checkpoints are refused before there is an engine: see the tests of these.
"""

import re
from functools import cache

import numpy as np
import pytest

from fusemlp import MLP, SGD, Callback, Cosine, CrossEntropy, Engine, FusemlpError, ParameterOptions, load_checkpoint
from fusemlp.runtime.plans import planned
from fusemlp_kernels.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendUnavailableError,
    DataError,
    DTypeError,
    ShapeError,
)
from make import state_of

NET = MLP([4, 6, 3])
X = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
Y = np.arange(12) % 3
ONE_HOT = np.eye(3)[Y]
BATCH = 8
NAN, INF = float("nan"), float("inf")
KINDS = {
    "classes": {},
    "values": {"loss": "mse"},
    "binary": {"loss": "binary_cross_entropy"},
    "counts": {"loss": "poisson"},
    "ignoring": {"loss": CrossEntropy(ignore_index=-100)},
    "cosine": {"optimizer": SGD(Cosine(0.1), momentum=0.9)},
}


def with_value(array, index, value):
    """Return a float copy of ``array`` with one element changed."""
    changed = array.astype(np.float64)
    changed[index] = value
    return changed


def engine_of(**options):
    return Engine(NET, **{"optimizer": SGD(0.1, momentum=0.9), "batch_size": BATCH, "seed": 3, **options})


def good_targets(kind):
    return Y if kind in ("classes", "ignoring", "cosine") else ONE_HOT


def trained(kind):
    """Return an engine with momentum, counters, a history and the best weights of an early stopping."""
    engine, y = engine_of(**KINDS[kind]), good_targets(kind)
    engine.fit(X, y, epochs=2, validation_data=(X, y), early_stopping=5)
    return engine


def all_of(engine):
    """Return everything that a later call depends on, as comparable values."""
    arrays = {name: array.tobytes() for name, array in engine.memory.snapshot().items()}
    return state_of(engine), arrays, engine.learning_rate, engine.stop_training, repr(engine)


def go_on(engine, kind):
    """Return the results of further good calls."""
    y = good_targets(kind)
    steps = () if kind == "cosine" else (engine.step(X[:5], y[:5]).tobytes(),)
    history = engine.fit(X, y, epochs=1).history
    return steps, history, engine.evaluate(X, y), engine.predict(X).tobytes(), all_of(engine)


@cache
def expected(kind):
    return go_on(trained(kind), kind)


# The mistakes: functions of a trained engine and a folder.


def fit(X=X, y=Y, epochs=1, **options):
    """Return a call of ``fit`` that is right except for ``options``."""
    return lambda engine, folder: engine.fit(X, y, epochs=epochs, **options)


def step(x=X[:BATCH], y=Y[:BATCH], weight=None):
    return lambda engine, folder: engine.step(x, y, weight)


def predict(rows):
    return lambda engine, folder: engine.predict(rows)


def load_own(**changes):
    """Return a load of the engine's own parameters with some changed; None leaves one out."""

    def do(engine, folder):
        state = {**engine.state_dict(), **{name[1:].replace("_", "."): value for name, value in changes.items()}}
        engine.load_state_dict({name: value for name, value in state.items() if value is not None})

    return do


def load(**options):
    def do(engine, folder):
        engine.save_checkpoint(folder / "good.safetensors")
        load_checkpoint(folder / "good.safetensors", **options)

    return do


def built(**options):
    return lambda engine, folder: engine_of(**options)


# The mistake, the error, and the kind of engine if it matters.
TABLE = [
    # features
    (fit(X=np.ones((12, 5))), ShapeError, r"^X: expected 4 columns.*\(12, 5\).*MLP\(\[5"),
    (step(np.ones((8, 3))), ShapeError, r"^x: expected 4 columns.*\(8, 3\)"),
    (predict(np.ones((2, 9))), ShapeError, r"^X: expected 4 columns.*\(2, 9\)"),
    (fit(X=np.ones(12)), ShapeError, r"^X: expected a matrix.*\(12,\).*X\.reshape\(1, -1\)"),
    (predict(X[0]), ShapeError, r"^X: .*\(4,\).*X\.reshape\(1, -1\)"),
    (fit(X=np.ones((12, 2, 2))), ShapeError, r"^X: .*\(12, 2, 2\).*X\.reshape\(len\(X\)"),
    (fit(X=1.0), ShapeError, r"^X: .*shape \(\); give one row for every example"),
    (fit(X=[], y=[]), ShapeError, r"^X: .*shape \(0,\).*it is empty"),
    (fit(X=np.ones((0, 4)), y=[]), DataError, r"^X: expected 1 or more rows, got 0"),
    (fit(X=np.ones((12, 0))), ShapeError, r"^X: expected 4 columns.*\(12, 0\).*give those 4 feat"),
    (step(X[:0], Y[:0]), DataError, r"^x: expected 1 or more rows, got 0"),
    (predict(X[:0]), DataError, r"^X: expected 1 or more rows, got 0"),
    (step(X, Y), ShapeError, r"^x: expected 1 to 8 rows.*got 12; .*larger batch_size"),
    (fit(X=with_value(X, (5, 2), NAN)), DataError, r"^X: .*nan at row 5, column 2; fill in or drop"),
    (fit(X=with_value(X, (0, 3), INF)), DataError, r"^X: .*inf at row 0, column 3; clip or drop"),
    (predict(with_value(X, (1, 0), NAN)), DataError, r"^X: .*nan at row 1, column 0"),
    (fit(X=with_value(X, (2, 1), 1e39)), DataError, r"^X: 1e\+39 at row 2, column 1.*fp64"),
    (fit(X=[["a"] * 4] * 12), DTypeError, r"^X: expected real numbers, got strings; encode"),
    (fit(X=X + 1j), DTypeError, r"^X: .*complex.*numpy\.asarray\(X, dtype=float\)"),
    (fit(X=np.zeros((12, 4), "datetime64[s]")), DTypeError, r"^X: .*datetime64.*encode"),
    (fit(X=np.full((12, 4), None)), DTypeError, r"^X: expected real numbers, got dtype object"),
    (fit(X=None), DTypeError, r"^X: expected real numbers, got dtype object"),
    (fit(X=[[1, 2, 3, 4], [1, 2]]), ShapeError, r"^X: the rows of this list differ in length"),
    (
        fit(X=np.ma.masked_invalid(with_value(X, (0, 0), NAN))),
        DataError,
        r"^X: got 1 masked values; fill them: X\.filled",
    ),
    # targets
    (fit(y=with_value(Y, 4, -1)), DataError, r"^y: label -1 at row 4 is not one of the 3 classes"),
    (step(y=[-1] * 8), DataError, r"^y: label -1 at row 0 \(and 7 more\).*number the classes"),
    (fit(y=with_value(Y, 7, 3)), DataError, r"^y: label 3 at row 7.*last width 4"),
    (fit(y=Y + 1), DataError, r"^y: label 3 at row 2.*start at 1: give y - 1"),
    (fit(y=with_value(Y, 3, 0.5)), DataError, r"^y: .*whole numbers, got 0\.5 at row 3.*'mse'"),
    (fit(y=with_value(Y, 3, NAN)), DataError, r"^y: .*nan at row 3"),
    (step(y=with_value(Y[:8], 0, INF)), DataError, r"^y: .*inf at row 0"),
    (fit(y=["a", "b", "c"] * 4), DTypeError, r"^y: .*got strings.*numpy\.unique\(y"),
    (fit(y=np.full(12, None)), DTypeError, r"^y: .*got dtype object; encode"),
    (step(y=Y[:8] + 1j), DTypeError, r"^y: .*got dtype complex128"),
    (fit(y=np.zeros((12, 2))), ShapeError, r"^y: got shape \(12, 2\).*y\.argmax\(axis=1\)"),
    (fit(y=np.zeros((12, 1, 1))), ShapeError, r"^y: got shape \(12, 1, 1\)"),
    (fit(y=1), ShapeError, r"^y: got shape \(\), expected \(n,\)"),
    (fit(y=None), ArgumentTypeError, r"^y: it is missing.*batches \(x, y\).*got ndarray"),
    (fit(y=Y[:11]), ShapeError, r"^y: expected 12 rows.*got 11"),
    (step(y=Y), ShapeError, r"^y: expected 8 rows.*got 12"),
    (fit(y=2 * ONE_HOT), DataError, r"^y: .*sum to 1, got the sum 2.*divide each row"),
    (fit(y=with_value(ONE_HOT, (0, 1), -1)), DataError, r"^y: .*at least 0, got -1 at row 0"),
    (fit(y=ONE_HOT[:3]), ShapeError, r"^y: expected 12 rows.*got 3"),
    (lambda e, d: e.evaluate(X, -Y), DataError, r"^y: label -1 at row 1"),
    (fit(y=with_value(Y, 0, -10)), DataError, r"^y: label -10 at row 0", "ignoring"),
    (fit(y=ONE_HOT), ArgumentError, r"^ignore_index: -100.*leave it None", "ignoring"),
    (step(y=ONE_HOT[:8]), ArgumentError, r"^ignore_index: -100.*leave it None", "ignoring"),
    (fit(validation_data=(X, ONE_HOT)), ArgumentError, r"^ignore_index: -100.*leave it None", "ignoring"),
    (fit(y=with_value(ONE_HOT, (1, 2), NAN)), DataError, r"^y: .*nan at row 1, column 2", "values"),
    (fit(y=Y), ShapeError, r"^y: .*\(n, 3\).*\(12,\).*one-hot rows: numpy\.eye\(3\)\[y\]", "values"),
    (step(y=ONE_HOT[:8, :2]), ShapeError, r"^y: .*\(n, 3\).*\(8, 2\).*last width 2", "values"),
    (fit(y=[["a"] * 3] * 12), DTypeError, r"^y: expected real numbers, got strings", "values"),
    (fit(y=ONE_HOT[:5]), ShapeError, r"^y: expected 12 rows.*got 5", "values"),
    (fit(y=2 * ONE_HOT), DataError, r"^y: .*from 0 to 1, got 2 at row 0", "binary"),
    (step(y=-ONE_HOT[:8]), DataError, r"^y: .*got -1 at row 0.*\(y \+ 1\) / 2", "binary"),
    (fit(y=-ONE_HOT), DataError, r"^y: .*counts of at least 0, got -1 at row 0", "counts"),
    # weights
    (fit(sample_weight=[1.0] * 11), ShapeError, r"^sample_weight: expected 12 rows.*got 11"),
    (step(weight=[1.0] * 9), ShapeError, r"^sample_weight: expected 8 rows.*got 9"),
    (fit(sample_weight=[-1.0] + [1.0] * 11), DataError, r"^sample_weight: .*got -1 at row 0"),
    (fit(sample_weight=[1.0] * 11 + [NAN]), DataError, r"^sample_weight: .*nan at row 11"),
    (step(weight=[INF] * 8), DataError, r"^sample_weight: .*inf at row 0"),
    (fit(sample_weight=np.zeros(12)), DataError, r"^sample_weight: all 12 weights are zero"),
    (fit(sample_weight=[3e38] * 12), DataError, r"^sample_weight: .*float32.*greatest, 3e\+38"),
    (fit(sample_weight=np.ones((12, 3))), ShapeError, r"^sample_weight: got shape \(12, 3\)"),
    (fit(sample_weight="balanced"), DTypeError, r"^sample_weight: .*got strings"),
    (fit(sample_weight=1.0), ShapeError, r"^sample_weight: got shape \(\), expected \(n,\)"),
    (lambda e, d: e.evaluate(X, Y, [1.0]), ShapeError, r"^sample_weight: .*12 rows.*got 1"),
    (fit(class_weight={3: 1.0}), ArgumentError, r"^class_weight: 3 is not one of the classes 0 to 2"),
    (fit(class_weight={True: 1.0}), ArgumentError, r"^class_weight: True is not one"),
    (fit(class_weight={1: -1.0}), ArgumentError, r"^class_weight\[1\]: expected a finite number of at least 0"),
    (fit(class_weight=[1.0, 2.0]), ArgumentError, r"^class_weight: expected a mapping .* got 2 numbers"),
    (fit(class_weight=[0.0, 0.0, 0.0]), ArgumentError, r"^class_weight: expected at least one weight above 0"),
    (fit(class_weight="even"), ArgumentTypeError, r"^class_weight: .* or 'balanced', got 'even'"),
    # other arguments of fit, and of what reads a trained engine
    (fit(epochs=0), ArgumentError, r"^epochs: .*at least 1, got 0"),
    (fit(epochs=-1), ArgumentError, r"^epochs: .*at least 1, got -1"),
    (fit(epochs=1.5), ArgumentTypeError, r"^epochs: expected a whole number.*got 1\.5 \(float\)"),
    (fit(epochs=2.0), ArgumentTypeError, r"^epochs: .*got 2\.0 \(float\); write 2"),
    (fit(epochs=True), ArgumentTypeError, r"^epochs: .*got True \(bool\)"),
    (fit(early_stopping=0, validation_data=(X, Y)), ArgumentError, r"^early_stopping: .*at least 1, got 0"),
    (fit(early_stopping=3), ArgumentError, r"^early_stopping: .*val_loss.*validation_data=\(X"),
    (fit(early_stopping=True, validation_data=(X, Y)), ArgumentTypeError, r"^early_stopping: .*got True"),
    (fit(early_stopping="5", validation_data=(X, Y)), ArgumentError, r"^early_stopping: .*number.* or 'auto', got '5'"),
    (fit(validation_data=X), ArgumentTypeError, r"^validation_data: .*\(X, y\).*ndarray"),
    (fit(validation_data=(X,)), ArgumentTypeError, r"^validation_data: .*got 1 in a tuple"),
    (fit(validation_data=[X] * 4), ArgumentTypeError, r"^validation_data: .*got 4 in a list"),
    (
        fit(validation_data=(np.ones((3, 5)), [0, 1, 2])),
        ShapeError,
        r"^validation_data\[0\]: expected 4 columns.*\(3, 5\)",
    ),
    (fit(validation_data=(X, Y + 1)), DataError, r"^validation_data\[1\]: label 3.*validation_data\[1\] - 1"),
    (fit(validation_data=(X, Y[:3])), ShapeError, r"^validation_data\[1\]: .*12 rows.*got 3"),
    (fit(validation_data=(X, Y, [1.0])), ShapeError, r"^validation_data\[2\]: expected 12 rows.*got 1"),
    (fit(validation_data=(with_value(X, (0, 0), NAN), Y)), DataError, r"^validation_data\[0\]: .*nan at row 0"),
    (fit(callbacks=[Callback]), ArgumentTypeError, r"^callbacks: .*got <class.*Callback\(\)"),
    (fit(callbacks=[print]), ArgumentTypeError, r"^callbacks: .*on_epoch_end.*got <built-in"),
    (fit(callbacks=[object()]), ArgumentTypeError, r"^callbacks: .*on_epoch_end.*<object object"),
    (fit(callbacks="progress"), ArgumentTypeError, r"^callbacks: .*got 'progress'"),
    (fit(callbacks=3), ArgumentTypeError, r"^callbacks: .*got 3"),
    (fit(row_order=lambda epoch: [0] * 12), ArgumentError, r"^row_order: .*range\(12\).*epoch 2"),
    (fit(row_order=lambda epoch: range(5)), ArgumentError, r"^row_order: .*range\(12\)"),
    (fit(row_order=lambda e: np.arange(12.0)), ArgumentError, r"^row_order: .*range\(12\)"),
    (fit(row_order=lambda e: np.arange(1, 13)), ArgumentError, r"^row_order: .*range\(12\)"),
    (fit(row_order=lambda e: None), ArgumentError, r"^row_order: .*range\(12\)"),
    (fit(row_order=lambda e: [[0], [1, 2]]), ShapeError, r"^row_order.*differ in length"),
    (fit(row_order=np.arange(12)), ArgumentTypeError, r"^row_order: expected a function.*ndarray"),
    (fit(shuffle="no"), ArgumentTypeError, r"^shuffle: expected True or False, got 'no'"),
    (fit(drop_last=1), ArgumentTypeError, r"^drop_last: expected True or False, got 1"),
    (fit(resume="run"), ArgumentTypeError, r"^resume: expected True or False, got 'run'"),
    (fit(X=X[:5], y=Y[:5], drop_last=True), ArgumentError, r"^drop_last: 5 rows.*batch of 8"),
    (lambda *_: engine_of().fit(X, Y, epochs=1, resume=True), ArgumentError, r"^resume: .*load a checkpoint"),
    (fit(epochs=1, resume=True), ArgumentError, r"^epochs: .*2 epochs.*got 1"),
    (fit(epochs=3, resume=True, row_order=lambda e: [0]), ArgumentError, r"^row_order: "),
    (step(), ArgumentError, r"^steps: None depends on.*only fit knows; give steps", "cosine"),
    (lambda e, d: e.predict_proba(X), ArgumentError, r"^loss: predict_proba.*'mse'; use predict", "values"),
    (lambda e, d: e.predict_proba(np.ones((1, 7))), ShapeError, r"^X: .*\(1, 7\)"),
    (lambda e, d: e.dead_units(X[0]), ShapeError, r"^X: .*\(4,\)"),
    # arguments of an engine
    (
        built(optimizer=SGD(per_parameter={"9.*": ParameterOptions(trainable=False)})),
        ArgumentError,
        r"^per_parameter: no parameter matches '9\.\*'; the network has: 0\.weight",
    ),
    (built(optimizer="sdg"), ArgumentError, r"^optimizer: .*'sdg'; did you mean 'sgd'\?"),
    (built(loss=CrossEntropy(class_weight=[1, 2])), ShapeError, r"^class_weight: expected 3 weights.*got 2"),
    (lambda *_: Engine(MLP([4, 1])), ArgumentError, r"^loss: .*at least 2 outputs.*has 1; widen"),
    (built(loss="binary_entropy"), ArgumentError, r"^loss: .*'binary_entropy'; .*'binary_cross_entropy'"),
    (lambda *_: Engine([4, 3]), ArgumentTypeError, r"^net: .*MLP\(\[.*got \[4, 3\]"),
    (built(batch_size=0), ArgumentError, r"^batch_size: .*at least 1, got 0"),
    (built(batch_size=-1), ArgumentError, r"^batch_size: .*got -1"),
    (built(batch_size=2.5), ArgumentTypeError, r"^batch_size: .*got 2\.5 \(float\)"),
    (built(batch_size=True), ArgumentTypeError, r"^batch_size: .*got True"),
    (built(seed=-1), ArgumentError, r"^seed: .*at least 0, got -1"),
    (built(seed=None), ArgumentTypeError, r"^seed: .*got None"),
    (built(backend="nunpy"), ArgumentError, r"^backend: .*'nunpy'; did you mean 'numpy'\?"),
    (built(backend=None), ArgumentTypeError, r"^backend: .*'auto'.*got None"),
    (built(backend=["numpy"]), ArgumentTypeError, r"^backend: .*got \['numpy'\]"),
    (built(precision="fp23"), ArgumentError, r"^precision: .*'fp23'; did you mean 'fp32'\?"),
    (built(precision=np.float32), ArgumentTypeError, r"^precision: .*float32"),
    (built(backend="numpy", precision="fp16"), BackendUnavailableError, r"^precision: .*fp32, bf16, fp64, got 'fp16'"),
    (built(plan="eagr"), ArgumentError, r"^plan: .*'eagr'; did you mean 'eager'\?"),
    (built(plan=1), ArgumentTypeError, r"^plan: .*got 1"),
    (built(backend="numpy", plan="graph"), BackendUnavailableError, r"^plan: .*eager.*, got 'graph'; use plan='auto'"),
    (built(backend="numpy", device="cuda:7"), BackendUnavailableError, r"^device: .*'cpu', got 'cuda:7'"),
    (built(device=0), ArgumentTypeError, r"^device: .*got 0"),
    (lambda *_: planned(NET, backend="tritom"), ArgumentError, r"^backend: .*did you mean 'triton'\?"),
    # parameters
    (load_own(p0_bias=None), ArgumentError, r"^state: missing keys: 0\.bias; unknown"),
    (load_own(p7_bias=[1.0]), ArgumentError, r"^state: .*unknown keys: 7\.bias"),
    (load_own(p0_weight=np.ones((4, 6))), ShapeError, r"^state\['0\.weight'\]: expected shape \(6, 4\), got \(4, 6\)"),
    (
        load_own(p0_weight=np.zeros((6, 4)), p2_bias=np.zeros(4)),
        ShapeError,
        r"^state\['2\.bias'\]: expected shape \(3,\), got \(4,\)",
    ),
    (
        load_own(p0_weight=np.zeros((6, 4)), p2_bias=[0.0, NAN, 0.0]),
        DataError,
        r"^state\['2\.bias'\]: holds NaN.*must be finite",
    ),
    (load_own(p2_bias=[1e39] * 3), DataError, r"^state\['2\.bias'\]: .*float"),
    (load_own(p2_bias=[1j] * 3), DTypeError, r"^state\['2\.bias'\]: .*complex128"),
    (load_own(p2_bias=["a"] * 3), DTypeError, r"^state\['2\.bias'\]: .*<U1"),
    (load_own(p2_bias=[[1], [1, 2]]), ShapeError, r"^state\['2\.bias'\]: .*differ"),
    (
        lambda e, d: e.load_state_dict(list(e.state_dict().items())),
        ArgumentTypeError,
        r"^state: expected a mapping of names to arrays, got list",
    ),
    (
        lambda e, d: e.load_state_dict(Engine(MLP([4, 3])).state_dict()),
        ArgumentError,
        r"^state: missing keys: 2\.weight, 2\.bias.*This network has: 0\.weight",
    ),
    # checkpoints
    (lambda *_: load_checkpoint(3), ArgumentTypeError, r"^path: .*got 3"),
    (load(network=[4, 6, 3]), ArgumentTypeError, r"^network: expected an MLP.*got \[4, 6, 3\]"),
    (load(backend="nunpy"), ArgumentError, r"^backend: .*did you mean 'numpy'\?"),
    (load(backend="numpy", device="cuda"), BackendUnavailableError, r"^device: .*got 'cuda'"),
    (lambda e, d: e.save_checkpoint(d / "a", extra={"a": X}), ArgumentError, r"^extra: .*ndarray"),
    (lambda e, d: e.save_checkpoint(3), ArgumentTypeError, r"^path: .*got 3"),
]


@pytest.mark.parametrize("row", TABLE, ids=[row[2] for row in TABLE])
def test_bad_input_says_what_is_wrong_and_changes_nothing(row, tmp_path):
    do, error, message, kind = (*row, "classes")[:4]
    engine = trained(kind)
    before = all_of(engine)
    with pytest.raises(FusemlpError) as caught:
        do(engine, tmp_path)
    assert type(caught.value) is error
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert all_of(engine) == before
    assert go_on(engine, kind) == expected(kind)


def test_a_row_order_that_goes_wrong_later_leaves_the_epochs_before_it():
    def order(epoch):
        return np.arange(12)[::-1] if epoch == 0 else [0]

    class Called(Callback):
        def on_train_begin(self, engine):
            raise AssertionError("the fit has begun")

    engine, twin = engine_of(), engine_of()
    with pytest.raises(ArgumentError, match="row_order"):
        engine.fit(X, Y, epochs=1, callbacks=[Called()], row_order=lambda epoch: [0])
    with pytest.raises(ArgumentError, match=r"^row_order: .*range\(12\) for epoch 1, got \[0\]"):
        engine.fit(X, Y, epochs=3, row_order=order)
    twin.fit(X, Y, epochs=1, row_order=order)
    assert engine.epochs_trained == 1
    assert engine.history.history == twin.history.history
    assert all_of(engine)[1] == all_of(twin)[1]
