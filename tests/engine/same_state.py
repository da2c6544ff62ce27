"""Compare the states of two engines bit for bit."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from fusemlp import Engine
from fusemlp_kernels.contract import ROW_COUNT

Array = np.ndarray[Any, Any]


def assert_same_state(engine: Engine, expected: Engine) -> None:
    """Assert that everything but the times of epochs is the same for later steps, fits and reports."""
    found, wanted = state_of(engine), state_of(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == value, name


def state_of(engine: Engine) -> dict[str, Any]:
    """Return the values that ``assert_same_state`` compares; for them == means the same bits."""
    memory = engine.memory
    names = ["params", *(f"state{index}" for index in range(len(memory.states))), "hyper", "stats"]
    if engine.optimizer.accumulate > 1:
        names.append("grads")
    settings = ("network", "loss", "optimizer", "batch_size", "seed", "backend", "precision", "epochs_trained")
    counters = memory.counters.copy()
    # Not a state: it is written before each step.
    counters[ROW_COUNT] = 0
    return {
        "counters": bits(counters),
        **{name: bits(memory.arrays[name]) for name in names},
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
