"""Make what tests begin with: data, a table, an engine, a run of the command line; and compare what they end with."""

from __future__ import annotations

import csv
import functools
import itertools
import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import typer

import fusemlp
from fusemlp import cli
from fusemlp.describe.losses import as_loss
from fusemlp.report.runs import FORMAT
from fusemlp_kernels import reference
from fusemlp_kernels.contract import ROW_COUNT

Array = np.ndarray[Any, Any]
# Options of a training that is only to end soon.
QUICK = ("--epochs", "3", "--quiet")
# One command line for all calls: its 300 options take longer to build than most calls take to be refused.
typer.main.get_command = functools.cache(typer.main.get_command)


def data(rows: int = 64, inputs: int = 5, outputs: int = 3, seed: int = 0, kind: str = "labels") -> tuple[Array, Array]:
    """Return inputs (rows, inputs) in float32 and targets of a kind: labels, values, counts, binary or soft."""
    random = np.random.default_rng(seed)
    X = random.standard_normal((rows, inputs)).astype(np.float32)
    labels = (X @ random.standard_normal((inputs, outputs))).argmax(1)
    if kind == "labels":
        return X, labels
    targets = {
        "values": lambda: X @ random.standard_normal((inputs, outputs)),
        "counts": lambda: random.poisson(1.5, (rows, outputs)),
        "binary": lambda: random.random((rows, outputs)) < 0.4,
        "soft": lambda: random.dirichlet(np.ones(outputs), rows),
    }
    return X, targets[kind]().astype(np.float32)


def engine(
    sizes: tuple[int, ...] = (5, 8, 3), loss: Any = None, optimizer: Any = None, **options: Any
) -> fusemlp.Engine:
    """Return an engine of batches of 16 on NumPy, with ``net`` or a network of these sizes."""
    net = options.pop("net", None) or fusemlp.MLP(list(sizes))
    arguments = {name: value for name, value in (("loss", loss), ("optimizer", optimizer)) if value is not None}
    return fusemlp.Engine(net, **arguments, **{"batch_size": 16, "seed": 1, "backend": "numpy", **options})


def layers_of(net: fusemlp.MLP, state: dict[str, Array]) -> list[reference.Layer]:
    """Return a network with these parameters as the oracle has it."""
    return [
        reference.Layer(
            state[f"{2 * layer}.weight"],
            state[f"{2 * layer}.bias"],
            chosen.name,
            state.get(f"{2 * layer + 1}.weight", chosen.slope),
            net.dropouts[layer],
        )
        for layer, chosen in enumerate(net.activations)
    ]


def halfway(engine: fusemlp.Engine, path: Path, batches: int, *data: Any, **options: Any) -> fusemlp.Engine:
    """Train, and return the engine of a checkpoint that is written after this many batches."""
    counts = itertools.count(1)
    saves = SimpleNamespace(on_batch_end=lambda engine, _: next(counts) == batches and engine.save_checkpoint(path))
    engine.fit(*data, **options, callbacks=[saves])
    return fusemlp.load_checkpoint(path, backend="numpy")


def frame(rows: int = 120, *, target: str = "price", classes: int = 0, gaps: bool = False, seed: int = 0) -> Any:
    """Return a table: two numbers (a, b), a word, a day, and a target that follows from the numbers and the word.

    The target is a positive skewed number, or a word of ``classes``; with ``gaps`` a tenth of ``a`` is empty.
    """
    random = np.random.default_rng(seed)
    numbers, words = random.normal(size=(rows, 2)), random.integers(0, 3, rows)
    days = np.datetime64("2020-01-01") + random.integers(0, 900, rows)
    signal = numbers.sum(1) + 0.5 * words
    table = pandas.DataFrame({"a": numbers[:, 0], "b": numbers[:, 1], "word": np.array([*"xyz"])[words], "day": days})
    if gaps:
        table.loc[random.random(rows) < 0.1, "a"] = np.nan
    ranks = signal.argsort().argsort() * classes // rows
    table[target] = np.array([*"pqrstuv"])[ranks] if classes else np.exp(2 + 0.5 * signal)
    return table


def table(path: Path, rows: int = 120, **options: Any) -> Path:
    """Write ``frame`` as a CSV file, and return its path."""
    frame(rows, **options).to_csv(path, index=False)
    return path


def run(*arguments: str | Path) -> int:
    """Return the exit code of ``fusemlp`` with these arguments."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def words(**options: Any) -> list[Any]:
    """Return parameters as the options of a command."""
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 2) -> str:
    """Return what ``fusemlp`` writes to stderr as it refuses these arguments, or with the code 1 fails."""
    assert run(*arguments) == code
    return capsys.readouterr().err


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Return what ``fusemlp`` prints on stdout with these arguments."""
    assert run(*arguments) == 0
    return capsys.readouterr().out


def result_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    """Return the last line of JSON that ``fusemlp`` prints with these arguments and --json."""
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def trained(folder: Path, *options: str | Path, target: str = "price", **columns: Any) -> Path:
    """Train on a table that is written beside the run, and return the run's folder: ``folder``/run."""
    path = table(folder / "data.csv", target=target, **columns)
    assert run("train", path, "--target", target, *(options or QUICK), "--out", folder / "run") == 0
    return folder / "run"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def configuration(loss: str = "mse") -> dict[str, Any]:
    """Return a configuration with all entries that a run folder needs."""
    described = {"network": fusemlp.MLP([2, 1]), "loss": as_loss(loss), "optimizer": fusemlp.SGD(0.1)}
    return {
        "format": FORMAT,
        **dict.fromkeys(("command", "started", "backend", "precision", "plan"), "x"),
        "options": {"metric": None},
        "data": {"name": "x", "source": "x", "fingerprint": "x", "notes": []},
        "preprocessor": {},
        **{name: description.to_config() for name, description in described.items()},
        "epochs": 1,
    }


def assert_same(left: Any, right: Any, name: str = "") -> None:
    """Assert that two values hold the same bits: arrays, parameters of engines, records, containers."""
    assert type(left) is type(right), name
    if isinstance(left, fusemlp.Engine):
        assert_same(left.state_dict(), right.state_dict(), name)
    elif isinstance(left, np.ndarray):
        assert bits(left) == bits(right), name
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), name
        for key, value in left.items():
            assert_same(value, right[key], f"{name}[{key!r}]")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), name
        for index, value in enumerate(left):
            assert_same(value, right[index], f"{name}[{index}]")
    elif is_dataclass(left) and not isinstance(left, type):
        assert_same(vars(left), vars(right), name)
    else:
        assert left == right or (left != left and right != right), name  # NaN


def assert_same_state(engine: fusemlp.Engine, expected: fusemlp.Engine) -> None:
    """Assert that everything but the times of epochs is the same for later steps, fits and reports."""
    state, wanted = state_of(engine), state_of(expected)
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert state[name] == value, name


def state_of(engine: fusemlp.Engine) -> dict[str, Any]:
    """Return the values that ``assert_same_state`` compares; for them == means the same bits."""
    memory = engine.memory
    names = ["params", *(f"state{index}" for index in range(len(memory.states))), "hyper", "stats"]
    if engine.optimizer.accumulate > 1:
        names.append("grads")
    settings = ("network", "loss", "optimizer", "batch_size", "seed", "backend", "precision", "epochs_trained")
    to_host = memory.backend.to_host
    counters = to_host(memory.counters)
    # Not a state: it is written before each step.
    counters[ROW_COUNT] = 0
    return {
        "counters": bits(counters),
        **{name: bits(to_host(memory.arrays[name])) for name in names},
        **{name: getattr(engine, name) for name in settings},
        "best": {name: bits(array) for name, array in (engine.best_parameters or {}).items()},
        "history": None if engine.history is None else _exact(vars(engine.history)),
        "fit": None if engine.fit_state is None else _exact(asdict(engine.fit_state)),
    }


def bits(array: Array) -> tuple[str, tuple[int, ...], bytes]:
    """Return an array as dtype, shape and bytes: NaN equals NaN, and 0 differs from -0."""
    return array.dtype.str, array.shape, array.tobytes()


def _exact(record: dict[str, Any]) -> str:
    """Return a text that distinguishes every float, NaN and infinity too, without the durations."""
    return json.dumps(_without_seconds(record), sort_keys=True)


def _without_seconds(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_seconds(inner) for name, inner in value.items() if name != "seconds"}
