"""Bad input is refused with the right type and message, and changes nothing.

Every row of the table makes one mistake with a trained engine. Afterwards the engine must have the same state, bit for
bit, and continue exactly as a twin without the mistake. Options of networks, losses, optimizers and schedules, data
files and damaged checkpoints are refused before there is an engine: see the tests of these.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusemlp import (
    MLP,
    SGD,
    ArgumentError,
    ArgumentTypeError,
    BackendUnavailableError,
    Callback,
    Cosine,
    CrossEntropy,
    DataError,
    DTypeError,
    Engine,
    FusemlpError,
    ParameterOptions,
    ShapeError,
    load_checkpoint,
)
from fusemlp.runtime.plans import plan_text

Do = Callable[[Engine, Path], object]

NET = MLP([4, 6, 3])
X = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
Y = np.arange(12) % 3
ONE_HOT = np.eye(3)[Y]
BATCH = 8


def with_value(array: np.ndarray[Any, Any], index: Any, value: float) -> np.ndarray[Any, Any]:
    """Return a float copy of ``array`` with one element changed."""
    changed = array.astype(np.float64)
    changed[index] = value
    return changed


def classifier(**options: Any) -> Engine:
    return Engine(NET, **{"optimizer": SGD(0.1, momentum=0.9), "batch_size": BATCH, "seed": 3, **options})


ENGINES: dict[str, Callable[[], Engine]] = {
    "classes": classifier,
    "values": lambda: classifier(loss="mse"),
    "binary": lambda: classifier(loss="binary_cross_entropy"),
    "counts": lambda: classifier(loss="poisson"),
    "ignoring": lambda: classifier(loss=CrossEntropy(ignore_index=-100)),
    "cosine": lambda: classifier(optimizer=SGD(Cosine(0.1), momentum=0.9)),
}


def good_targets(kind: str) -> np.ndarray[Any, Any]:
    return Y if kind in ("classes", "ignoring", "cosine") else ONE_HOT


def trained(kind: str) -> Engine:
    """Return an engine with momentum, counters, a history and the best weights of an early stopping."""
    engine = ENGINES[kind]()
    y = good_targets(kind)
    engine.fit(X, y, epochs=2, validation_data=(X, y), early_stopping=5)
    return engine


def state_of(engine: Engine) -> dict[str, Any]:
    """Return everything that a later call depends on, as comparable values."""
    fit = engine.fit_state
    return {
        "learning_rate": engine.learning_rate,
        "arrays": {name: array.tobytes() for name, array in engine.memory.snapshot().items()},
        "best": {name: array.tobytes() for name, array in (engine.best_parameters or {}).items()},
        "epochs_trained": engine.epochs_trained,
        "update_count": engine.update_count,
        "history": copy.deepcopy(engine.history),
        "fit_state": None if fit is None else copy.deepcopy(fit.to_config()),
        "described": repr(engine),
        "stop_training": engine.stop_training,
    }


def go_on(engine: Engine, kind: str) -> tuple[Any, ...]:
    """Return the results of further good calls."""
    y = good_targets(kind)
    steps = () if kind == "cosine" else (engine.step(X[:5], y[:5]).tobytes(),)
    history = engine.fit(X, y, epochs=1).history
    return steps, history, engine.evaluate(X, y), engine.predict(X).tobytes(), state_of(engine)["arrays"]


def saved(engine: Engine, folder: Path) -> Path:
    path = folder / "good.safetensors"
    engine.save_checkpoint(path)
    return path


class Deaf:
    """An object without any callback method."""


def fit(**options: Any) -> Do:
    """Return a call of ``fit`` that is right except for ``options``."""
    arguments = {"X": X, "y": Y, "epochs": 1, **options}
    return lambda engine, folder: engine.fit(arguments["X"], arguments["y"], **without(arguments, "X", "y"))


def step(x: Any = X[:BATCH], y: Any = Y[:BATCH], weight: Any = None) -> Do:
    return lambda engine, folder: engine.step(x, y, weight)


def predict(given: Any) -> Do:
    return lambda engine, folder: engine.predict(given)


def load_own(**changes: Any) -> Do:
    """Return a load of the engine's own parameters with some changed; None leaves one out."""

    def do(engine: Engine, folder: Path) -> None:
        state = {**engine.state_dict(), **{name[1:].replace("_", "."): value for name, value in changes.items()}}
        engine.load_state_dict({name: value for name, value in state.items() if value is not None})

    return do


def make(call: Callable[[], object]) -> Do:
    """Return a case that needs no engine."""
    return lambda engine, folder: call()


def engine_with(**options: Any) -> Do:
    return make(lambda: classifier(**options))


def without(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in names}


def row(name: str, do: Do, error: type[FusemlpError], message: str, kind: str = "classes") -> Any:
    return pytest.param(do, error, message, kind, id=name)


NAN, INF = float("nan"), float("inf")

FEATURES = [
    row("X too wide", fit(X=np.ones((12, 5))), ShapeError, r"^X: expected 4 columns.*\(12, 5\).*MLP\(\[5"),
    row("X too narrow in step", step(np.ones((8, 3))), ShapeError, r"^x: expected 4 columns.*\(8, 3\)"),
    row("X too wide in predict", predict(np.ones((2, 9))), ShapeError, r"^X: expected 4 columns.*\(2, 9\)"),
    row("X is a vector", fit(X=np.ones(12)), ShapeError, r"^X: expected a matrix.*\(12,\).*X\.reshape\(1, -1\)"),
    row("X is a vector in predict", predict(X[0]), ShapeError, r"^X: .*\(4,\).*X\.reshape\(1, -1\)"),
    row("X has three dimensions", fit(X=np.ones((12, 2, 2))), ShapeError, r"^X: .*\(12, 2, 2\).*X\.reshape\(len\(X\)"),
    row("X is a number", fit(X=1.0), ShapeError, r"^X: .*shape \(\); give one row for every example"),
    row("X is an empty list", fit(X=[], y=[]), ShapeError, r"^X: .*shape \(0,\).*it is empty"),
    row("X has no rows", fit(X=np.ones((0, 4)), y=[]), DataError, r"^X: expected 1 or more rows, got 0"),
    row(
        "X has no columns", fit(X=np.ones((12, 0))), ShapeError, r"^X: expected 4 columns.*\(12, 0\).*give those 4 feat"
    ),
    row("a batch of 0 rows", step(X[:0], Y[:0]), DataError, r"^x: expected 1 or more rows, got 0"),
    row("predict of 0 rows", predict(X[:0]), DataError, r"^X: expected 1 or more rows, got 0"),
    row("more rows than a batch", step(X, Y), ShapeError, r"^x: expected 1 to 8 rows.*got 12; .*larger batch_size"),
    row("NaN in X", fit(X=with_value(X, (5, 2), NAN)), DataError, r"^X: .*nan at row 5, column 2; fill in or drop"),
    row("infinity in X", fit(X=with_value(X, (0, 3), INF)), DataError, r"^X: .*inf at row 0, column 3; clip or drop"),
    row("NaN in predict", predict(with_value(X, (1, 0), NAN)), DataError, r"^X: .*nan at row 1, column 0"),
    row("X beyond float32", fit(X=with_value(X, (2, 1), 1e39)), DataError, r"^X: 1e\+39 at row 2, column 1.*fp64"),
    row("words in X", fit(X=[["a"] * 4] * 12), DTypeError, r"^X: expected real numbers, got strings; encode"),
    row("complex X", fit(X=X + 1j), DTypeError, r"^X: .*complex.*numpy\.asarray\(X, dtype=float\)"),
    row("dates in X", fit(X=np.zeros((12, 4), "datetime64[s]")), DTypeError, r"^X: .*datetime64.*encode"),
    row("objects in X", fit(X=np.full((12, 4), None)), DTypeError, r"^X: expected real numbers, got dtype object"),
    row("X is None", fit(X=None), DTypeError, r"^X: expected real numbers, got dtype object"),
    row("ragged X", fit(X=[[1, 2, 3, 4], [1, 2]]), ShapeError, r"^X: the rows of this list differ in length"),
    row(
        "masked X",
        fit(X=np.ma.masked_invalid(with_value(X, (0, 0), NAN))),
        DataError,
        r"^X: got 1 masked values; fill them: X\.filled",
    ),
]

LABELS = [
    row("label -1", fit(y=with_value(Y, 4, -1)), DataError, r"^y: label -1 at row 4 is not one of the 3 classes"),
    row("label -1 in step", step(y=[-1] * 8), DataError, r"^y: label -1 at row 0 \(and 7 more\).*number the classes"),
    row("label too large", fit(y=with_value(Y, 7, 3)), DataError, r"^y: label 3 at row 7.*last width 4"),
    row("labels from 1", fit(y=Y + 1), DataError, r"^y: label 3 at row 2.*start at 1: give y - 1"),
    row("fractional label", fit(y=with_value(Y, 3, 0.5)), DataError, r"^y: .*whole numbers, got 0\.5 at row 3.*'mse'"),
    row("NaN as a label", fit(y=with_value(Y, 3, NAN)), DataError, r"^y: .*nan at row 3"),
    row("infinite label", step(y=with_value(Y[:8], 0, INF)), DataError, r"^y: .*inf at row 0"),
    row("strings as labels", fit(y=["a", "b", "c"] * 4), DTypeError, r"^y: .*got strings.*numpy\.unique\(y"),
    row("objects as labels", fit(y=np.full(12, None)), DTypeError, r"^y: .*got dtype object; encode"),
    row("complex labels", step(y=Y[:8] + 1j), DTypeError, r"^y: .*got dtype complex128"),
    row("labels of wrong width", fit(y=np.zeros((12, 2))), ShapeError, r"^y: got shape \(12, 2\).*y\.argmax\(axis=1\)"),
    row("labels in three dimensions", fit(y=np.zeros((12, 1, 1))), ShapeError, r"^y: got shape \(12, 1, 1\)"),
    row("one label for all", fit(y=1), ShapeError, r"^y: got shape \(\), expected \(n,\)"),
    row("no y", fit(y=None), ArgumentTypeError, r"^y: it is missing.*batches \(x, y\).*got ndarray"),
    row("fewer labels than rows", fit(y=Y[:11]), ShapeError, r"^y: expected 12 rows.*got 11"),
    row("more labels than rows", step(y=Y), ShapeError, r"^y: expected 8 rows.*got 12"),
    row("probabilities of sum 2", fit(y=2 * ONE_HOT), DataError, r"^y: .*sum to 1, got the sum 2.*divide each row"),
    row(
        "negative probability", fit(y=with_value(ONE_HOT, (0, 1), -1)), DataError, r"^y: .*at least 0, got -1 at row 0"
    ),
    row("fewer probabilities than rows", fit(y=ONE_HOT[:3]), ShapeError, r"^y: expected 12 rows.*got 3"),
    row("evaluate with -1", lambda e, d: e.evaluate(X, -Y), DataError, r"^y: label -1 at row 1"),
    row("ignored label misspelt", fit(y=with_value(Y, 0, -10)), DataError, r"^y: label -10 at row 0", "ignoring"),
    row(
        "probabilities and ignore_index",
        fit(y=ONE_HOT),
        ArgumentError,
        r"^ignore_index: -100.*leave it None",
        "ignoring",
    ),
    row(
        "probabilities and ignore_index in step",
        step(y=ONE_HOT[:8]),
        ArgumentError,
        r"^ignore_index: -100.*leave it None",
        "ignoring",
    ),
    row(
        "probabilities and ignore_index in validation",
        fit(validation_data=(X, ONE_HOT)),
        ArgumentError,
        r"^ignore_index: -100.*leave it None",
        "ignoring",
    ),
    row(
        "NaN in targets", fit(y=with_value(ONE_HOT, (1, 2), NAN)), DataError, r"^y: .*nan at row 1, column 2", "values"
    ),
    row(
        "labels for mse", fit(y=Y), ShapeError, r"^y: .*\(n, 3\).*\(12,\).*one-hot rows: numpy\.eye\(3\)\[y\]", "values"
    ),
    row("narrow targets", step(y=ONE_HOT[:8, :2]), ShapeError, r"^y: .*\(n, 3\).*\(8, 2\).*last width 2", "values"),
    row("words as targets", fit(y=[["a"] * 3] * 12), DTypeError, r"^y: expected real numbers, got strings", "values"),
    row("fewer targets", fit(y=ONE_HOT[:5]), ShapeError, r"^y: expected 12 rows.*got 5", "values"),
    row("binary target 2", fit(y=2 * ONE_HOT), DataError, r"^y: .*from 0 to 1, got 2 at row 0", "binary"),
    row("binary target -1", step(y=-ONE_HOT[:8]), DataError, r"^y: .*got -1 at row 0.*\(y \+ 1\) / 2", "binary"),
    row("negative count", fit(y=-ONE_HOT), DataError, r"^y: .*counts of at least 0, got -1 at row 0", "counts"),
]

WEIGHTS = [
    row("too few weights", fit(sample_weight=[1.0] * 11), ShapeError, r"^sample_weight: expected 12 rows.*got 11"),
    row("too many weights", step(weight=[1.0] * 9), ShapeError, r"^sample_weight: expected 8 rows.*got 9"),
    row("negative weight", fit(sample_weight=[-1.0] + [1.0] * 11), DataError, r"^sample_weight: .*got -1 at row 0"),
    row("NaN weight", fit(sample_weight=[1.0] * 11 + [NAN]), DataError, r"^sample_weight: .*nan at row 11"),
    row("infinite weight", step(weight=[INF] * 8), DataError, r"^sample_weight: .*inf at row 0"),
    row("all weights zero", fit(sample_weight=np.zeros(12)), DataError, r"^sample_weight: all 12 weights are zero"),
    row("weights too large", fit(sample_weight=[3e38] * 12), DataError, r"^sample_weight: .*float32.*greatest, 3e\+38"),
    row("weights in a matrix", fit(sample_weight=np.ones((12, 3))), ShapeError, r"^sample_weight: got shape \(12, 3\)"),
    row("a word as weights", fit(sample_weight="balanced"), DTypeError, r"^sample_weight: .*got strings"),
    row("one weight for all", fit(sample_weight=1.0), ShapeError, r"^sample_weight: got shape \(\), expected \(n,\)"),
    row("evaluate, few weights", lambda e, d: e.evaluate(X, Y, [1.0]), ShapeError, r"^sample_weight: .*12 rows.*got 1"),
]

FIT = [
    row("no epochs", fit(epochs=0), ArgumentError, r"^epochs: .*at least 1, got 0"),
    row("epochs -1", fit(epochs=-1), ArgumentError, r"^epochs: .*at least 1, got -1"),
    row("epochs 1.5", fit(epochs=1.5), ArgumentTypeError, r"^epochs: expected a whole number.*got 1\.5 \(float\)"),
    row("epochs 2.0", fit(epochs=2.0), ArgumentTypeError, r"^epochs: .*got 2\.0 \(float\); write 2"),
    row("epochs True", fit(epochs=True), ArgumentTypeError, r"^epochs: .*got True \(bool\)"),
    row(
        "early_stopping 0",
        fit(early_stopping=0, validation_data=(X, Y)),
        ArgumentError,
        r"^early_stopping: .*at least 1, got 0",
    ),
    row(
        "early_stopping alone",
        fit(early_stopping=3),
        ArgumentError,
        r"^early_stopping: .*val_loss.*validation_data=\(X",
    ),
    row(
        "early_stopping True",
        fit(early_stopping=True, validation_data=(X, Y)),
        ArgumentTypeError,
        r"^early_stopping: .*got True",
    ),
    row(
        "validation_data a matrix", fit(validation_data=X), ArgumentTypeError, r"^validation_data: .*\(X, y\).*ndarray"
    ),
    row(
        "validation_data X alone", fit(validation_data=(X,)), ArgumentTypeError, r"^validation_data: .*got 1 in a tuple"
    ),
    row(
        "validation_data of 4", fit(validation_data=[X] * 4), ArgumentTypeError, r"^validation_data: .*got 4 in a list"
    ),
    row(
        "validation_data too wide",
        fit(validation_data=(np.ones((3, 5)), [0, 1, 2])),
        ShapeError,
        r"^validation_data\[0\]: expected 4 columns.*\(3, 5\)",
    ),
    row(
        "validation_data label",
        fit(validation_data=(X, Y + 1)),
        DataError,
        r"^validation_data\[1\]: label 3.*validation_data\[1\] - 1",
    ),
    row(
        "validation_data rows", fit(validation_data=(X, Y[:3])), ShapeError, r"^validation_data\[1\]: .*12 rows.*got 3"
    ),
    row(
        "validation_data weights",
        fit(validation_data=(X, Y, [1.0])),
        ShapeError,
        r"^validation_data\[2\]: expected 12 rows.*got 1",
    ),
    row(
        "validation_data NaN",
        fit(validation_data=(with_value(X, (0, 0), NAN), Y)),
        DataError,
        r"^validation_data\[0\]: .*nan at row 0",
    ),
    row("a callback's class", fit(callbacks=[Callback]), ArgumentTypeError, r"^callbacks: .*got <class.*Callback\(\)"),
    row(
        "a function as callback",
        fit(callbacks=[print]),
        ArgumentTypeError,
        r"^callbacks: .*on_epoch_end.*got <built-in",
    ),
    row("a deaf callback", fit(callbacks=[Deaf()]), ArgumentTypeError, r"^callbacks: .*on_epoch_end.*Deaf"),
    row("a name as callback", fit(callbacks="progress"), ArgumentTypeError, r"^callbacks: .*got 'progress'"),
    row("callbacks a number", fit(callbacks=3), ArgumentTypeError, r"^callbacks: .*got 3"),
    row(
        "row_order repeats", fit(row_order=lambda epoch: [0] * 12), ArgumentError, r"^row_order: .*range\(12\).*epoch 2"
    ),
    row("row_order too short", fit(row_order=lambda epoch: range(5)), ArgumentError, r"^row_order: .*range\(12\)"),
    row("row_order of floats", fit(row_order=lambda e: np.arange(12.0)), ArgumentError, r"^row_order: .*range\(12\)"),
    row("row_order from 1", fit(row_order=lambda e: np.arange(1, 13)), ArgumentError, r"^row_order: .*range\(12\)"),
    row("row_order of nothing", fit(row_order=lambda e: None), ArgumentError, r"^row_order: .*range\(12\)"),
    row("row_order ragged", fit(row_order=lambda e: [[0], [1, 2]]), ShapeError, r"^row_order.*differ in length"),
    row("row_order rows", fit(row_order=np.arange(12)), ArgumentTypeError, r"^row_order: expected a function.*ndarray"),
    row("shuffle a word", fit(shuffle="no"), ArgumentTypeError, r"^shuffle: expected True or False, got 'no'"),
    row("drop_last a number", fit(drop_last=1), ArgumentTypeError, r"^drop_last: expected True or False, got 1"),
    row("resume a path", fit(resume="run"), ArgumentTypeError, r"^resume: expected True or False, got 'run'"),
    row(
        "drop_last, too few rows",
        fit(X=X[:5], y=Y[:5], drop_last=True),
        ArgumentError,
        r"^drop_last: 5 rows.*batch of 8",
    ),
    row(
        "resume without a state",
        make(lambda: classifier().fit(X, Y, epochs=1, resume=True)),
        ArgumentError,
        r"^resume: .*load a checkpoint",
    ),
    row("resume to before now", fit(epochs=1, resume=True), ArgumentError, r"^epochs: .*2 epochs.*got 1"),
    row("resume, bad row_order", fit(epochs=3, resume=True, row_order=lambda e: [0]), ArgumentError, r"^row_order: "),
    row("cosine in step", step(), ArgumentError, r"^steps: None depends on.*only fit knows; give steps", "cosine"),
    row(
        "predict_proba of values",
        lambda e, d: e.predict_proba(X),
        ArgumentError,
        r"^loss: predict_proba.*'mse'; use predict",
        "values",
    ),
    row("predict_proba too wide", lambda e, d: e.predict_proba(np.ones((1, 7))), ShapeError, r"^X: .*\(1, 7\)"),
    row("dead_units of a vector", lambda e, d: e.dead_units(X[0]), ShapeError, r"^X: .*\(4,\)"),
]

ENGINE = [
    row(
        "per_parameter matches nothing",
        engine_with(optimizer=SGD(per_parameter={"9.*": ParameterOptions(trainable=False)})),
        ArgumentError,
        r"^per_parameter: no parameter matches '9\.\*'; the network has: 0\.weight",
    ),
    row("unknown optimizer", engine_with(optimizer="sdg"), ArgumentError, r"^optimizer: .*'sdg'; did you mean 'sgd'\?"),
    row(
        "class_weight too short",
        engine_with(loss=CrossEntropy(class_weight=[1, 2])),
        ShapeError,
        r"^class_weight: expected 3 weights.*got 2",
    ),
    row("one class", make(lambda: Engine(MLP([4, 1]))), ArgumentError, r"^loss: .*at least 2 outputs.*has 1; widen"),
    row("loss known elsewhere", engine_with(loss="bce"), ArgumentError, r"^loss: .*'bce'; .*'binary_cross_entropy'"),
    row("sizes for a network", make(lambda: Engine([4, 3])), ArgumentTypeError, r"^net: .*MLP\(\[.*got \[4, 3\]"),
    row("batch_size 0", engine_with(batch_size=0), ArgumentError, r"^batch_size: .*at least 1, got 0"),
    row("batch_size -1", engine_with(batch_size=-1), ArgumentError, r"^batch_size: .*got -1"),
    row("batch_size 2.5", engine_with(batch_size=2.5), ArgumentTypeError, r"^batch_size: .*got 2\.5 \(float\)"),
    row("batch_size True", engine_with(batch_size=True), ArgumentTypeError, r"^batch_size: .*got True"),
    row("seed -1", engine_with(seed=-1), ArgumentError, r"^seed: .*at least 0, got -1"),
    row("seed None", engine_with(seed=None), ArgumentTypeError, r"^seed: .*got None"),
    row("unknown backend", engine_with(backend="nunpy"), ArgumentError, r"^backend: .*'nunpy'; did you mean 'numpy'\?"),
    row("backend None", engine_with(backend=None), ArgumentTypeError, r"^backend: .*'auto'.*got None"),
    row("backend a list", engine_with(backend=["numpy"]), ArgumentTypeError, r"^backend: .*got \['numpy'\]"),
    row(
        "unknown precision",
        engine_with(precision="fp23"),
        ArgumentError,
        r"^precision: .*'fp23'; did you mean 'fp32'\?",
    ),
    row("precision a dtype", engine_with(precision=np.float32), ArgumentTypeError, r"^precision: .*float32"),
    row(
        "fp16 on numpy",
        engine_with(backend="numpy", precision="fp16"),
        BackendUnavailableError,
        r"^precision: .*fp32 and fp64, got 'fp16'",
    ),
    row("unknown plan", engine_with(plan="eagr"), ArgumentError, r"^plan: .*'eagr'; did you mean 'eager'\?"),
    row("plan a number", engine_with(plan=1), ArgumentTypeError, r"^plan: .*got 1"),
    row(
        "graph on numpy",
        engine_with(backend="numpy", plan="graph"),
        BackendUnavailableError,
        r"^plan: .*eager.*, got 'graph'; use plan='auto'",
    ),
    row(
        "device that does not exist",
        engine_with(backend="numpy", device="cuda:7"),
        BackendUnavailableError,
        r"^device: .*'cpu', got 'cuda:7'",
    ),
    row("device a number", engine_with(device=0), ArgumentTypeError, r"^device: .*got 0"),
    row(
        "plan text of an unknown backend",
        make(lambda: plan_text(NET, backend="tritom")),
        ArgumentError,
        r"^backend: .*did you mean 'triton'\?",
    ),
]

STATES = [
    row("missing key", load_own(p0_bias=None), ArgumentError, r"^state: missing keys: 0\.bias; unknown"),
    row("unknown key", load_own(p7_bias=[1.0]), ArgumentError, r"^state: .*unknown keys: 7\.bias"),
    row(
        "transposed weight",
        load_own(p0_weight=np.ones((4, 6))),
        ShapeError,
        r"^state\['0\.weight'\]: expected shape \(6, 4\), got \(4, 6\)",
    ),
    row(
        "the last of them wrong",
        load_own(p0_weight=np.zeros((6, 4)), p2_bias=np.zeros(4)),
        ShapeError,
        r"^state\['2\.bias'\]: expected shape \(3,\), got \(4,\)",
    ),
    row(
        "NaN parameter",
        load_own(p0_weight=np.zeros((6, 4)), p2_bias=[0.0, NAN, 0.0]),
        DataError,
        r"^state\['2\.bias'\]: holds NaN.*must be finite",
    ),
    row("parameter beyond float32", load_own(p2_bias=[1e39] * 3), DataError, r"^state\['2\.bias'\]: .*float"),
    row("complex parameter", load_own(p2_bias=[1j] * 3), DTypeError, r"^state\['2\.bias'\]: .*complex128"),
    row("words as a parameter", load_own(p2_bias=["a"] * 3), DTypeError, r"^state\['2\.bias'\]: .*<U1"),
    row("ragged parameter", load_own(p2_bias=[[1], [1, 2]]), ShapeError, r"^state\['2\.bias'\]: .*differ"),
    row(
        "a list for a state",
        lambda e, d: e.load_state_dict(list(e.state_dict().items())),
        ArgumentTypeError,
        r"^state: expected a mapping of names to arrays, got list",
    ),
    row(
        "another network's state",
        lambda e, d: e.load_state_dict(Engine(MLP([4, 3])).state_dict()),
        ArgumentError,
        r"^state: missing keys: 2\.weight, 2\.bias.*This network has: 0\.weight",
    ),
]

CHECKPOINTS = [
    row("a number as checkpoint", make(lambda: load_checkpoint(3)), ArgumentTypeError, r"^path: .*got 3"),
    row(
        "network of wrong kind",
        lambda e, d: load_checkpoint(saved(e, d), network=[4, 6, 3]),
        ArgumentTypeError,
        r"^network: expected an MLP.*got \[4, 6, 3\]",
    ),
    row(
        "loaded on no backend",
        lambda e, d: load_checkpoint(saved(e, d), backend="nunpy"),
        ArgumentError,
        r"^backend: .*did you mean 'numpy'\?",
    ),
    row(
        "loaded on no device",
        lambda e, d: load_checkpoint(saved(e, d), backend="numpy", device="cuda"),
        BackendUnavailableError,
        r"^device: .*got 'cuda'",
    ),
    row("extra an array", lambda e, d: e.save_checkpoint(d / "a", extra={"a": X}), ArgumentError, r"^extra: .*ndarray"),
    row("saved to a number", lambda e, d: e.save_checkpoint(3), ArgumentTypeError, r"^path: .*got 3"),
]

TABLE = [*FEATURES, *LABELS, *WEIGHTS, *FIT, *ENGINE, *STATES, *CHECKPOINTS]


@pytest.mark.parametrize(("do", "error", "message", "kind"), TABLE)
def test_bad_input_says_what_is_wrong_and_changes_nothing(
    do: Do, error: type[FusemlpError], message: str, kind: str, tmp_path: Path
) -> None:
    engine, twin = trained(kind), trained(kind)
    before = state_of(engine)
    with pytest.raises(FusemlpError) as caught:
        do(engine, tmp_path)
    assert type(caught.value) is error
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert state_of(engine) == before
    assert go_on(engine, kind) == go_on(twin, kind)


class Told(Callback):
    """A callback that records whether it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def on_train_begin(self, engine: Engine) -> None:
        self.calls += 1


def test_a_refused_fit_calls_no_callback() -> None:
    told = Told()
    with pytest.raises(ArgumentError, match="row_order"):
        classifier().fit(X, Y, epochs=1, callbacks=[told], row_order=lambda epoch: [0])
    assert told.calls == 0


def test_a_row_order_that_goes_wrong_later_leaves_the_epochs_before_it() -> None:
    def order(epoch: int) -> Any:
        return np.arange(12)[::-1] if epoch == 0 else [0]

    engine, twin = classifier(), classifier()
    with pytest.raises(ArgumentError, match=r"^row_order: .*range\(12\) for epoch 1, got \[0\]"):
        engine.fit(X, Y, epochs=3, row_order=order)
    twin.fit(X, Y, epochs=1, row_order=order)
    assert engine.epochs_trained == 1
    assert engine.history is not None and twin.history is not None
    assert engine.history.history == twin.history.history
    assert state_of(engine)["arrays"] == state_of(twin)["arrays"]
