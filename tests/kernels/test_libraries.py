"""The CPU's matrix products, whichever library computes them: SciPy's BLAS, or MKL where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pytest

from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError
from fusemlp_kernels.numpy import blas, libraries

Array = np.ndarray[Any, Any]


def _installed() -> list[str]:
    try:
        version("mkl")
    except PackageNotFoundError:
        return ["scipy"]
    return ["scipy", "mkl"]


@pytest.fixture(params=_installed())
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The library that computes all products, small ones too."""
    monkeypatch.setenv(libraries.VARIABLE, request.param)
    monkeypatch.setattr(blas, "LARGE", 0)
    libraries.mkl.cache_clear()
    yield request.param
    libraries.mkl.cache_clear()


def _bound(terms: Array, length: int, dtype: Any) -> Array:
    """Return the error bound of a sum of ``length`` products in any order: Higham, "Accuracy and Stability", 3.1.

    ``terms``: the sum of their absolute values; two more roundings are for the factors before it.
    """
    unit = (length + 2) * np.finfo(dtype).eps / 2
    return unit / (1 - unit) * terms


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (3, 5, 2), (33, 17, 70), (1, 40, 9), (128, 10, 64)])
def test_the_product_of_a_layer(library: str, m: int, n: int, k: int, dtype: Any) -> None:
    rng = np.random.default_rng(m + 10 * n + 100 * k)
    x, w, y = (rng.standard_normal(shape).astype(dtype) for shape in ((m, k), (n, k), (m, n)))
    exact, terms = (op(y) + op(x) @ op(w).T for op in (np.longdouble, lambda a: np.abs(a).astype(np.longdouble)))
    blas.bind_product(y, x, w)()
    assert (np.abs(y - exact) <= _bound(terms, k + 1, dtype)).all()


# Trains on an array that begins ``argv[1]`` bytes behind a cache line, and says what came of it and what was loaded.
TRAINING = """
import hashlib, json, sys
import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits
from fusemlp import MLP, SGD, Engine

plan, shift = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
n, inputs = 256, 96
memory = np.empty(4 * n * inputs + 128, np.uint8)
start = -memory.ctypes.data % 64 + shift
X = memory[start : start + 4 * n * inputs].view(np.float32).reshape(n, inputs)
X[:] = rng.standard_normal((n, inputs))
y = rng.integers(0, 10, n)
engine = Engine(MLP([inputs, 128, 10]), optimizer=SGD(lr=0.05), batch_size=64, plan=plan)
with threadpool_limits(1, user_api="blas"):
    pools = {pool["internal_api"]: pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    engine.fit(X, y, epochs=2)
    loss = engine.evaluate(X, y)["loss"]
weights = engine.state_dict()
digest = hashlib.sha256(b"".join(value.tobytes() for value in weights.values())).hexdigest()
print(json.dumps({"loss": loss, "weights": digest, "first": weights["0.weight"].ravel().tolist(), "pools": pools}))
"""
PLANS = ["eager", "resident"]


def _trained(library: str, plan: str, shift: int) -> dict[str, Any]:
    path = os.pathsep.join([*(entry for entry in sys.path if entry), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", TRAINING, plan, str(shift)],
        env={**os.environ, "PYTHONPATH": path, libraries.VARIABLE: library},
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(run.stdout)
    return result


@pytest.mark.parametrize("plan", PLANS)
def test_a_training_ends_alike_with_either_library(plan: str) -> None:
    by_scipy = _trained("scipy", plan, 0)
    assert "mkl" not in by_scipy["pools"]
    for library in _installed()[1:]:
        trained = _trained(library, plan, 0)
        assert trained["pools"]["mkl"] == 1  # a limit on BLAS threads also limits MKL's
        # the products have 64 * 96 * 128 multiplications: they are the library's own, rounded otherwise
        assert trained["weights"] != by_scipy["weights"]
        np.testing.assert_allclose(trained["loss"], by_scipy["loss"], rtol=1e-5)
        np.testing.assert_allclose(trained["first"], by_scipy["first"], atol=1e-5)
        # bit for bit again, wherever the caller's array happens to lie
        assert _trained(library, plan, 4)["weights"] == trained["weights"]


def test_an_unknown_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(libraries.VARIABLE, "mkk")
    libraries.mkl.cache_clear()
    with pytest.raises(ArgumentError, match="FUSEMLP_BLAS: unknown name 'mkk'; did you mean 'mkl'"):
        libraries.mkl()
    libraries.mkl.cache_clear()


def test_a_library_that_is_asked_for_and_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_found", lambda: iter(()))
    monkeypatch.setenv(libraries.VARIABLE, "mkl")
    libraries.mkl.cache_clear()
    with pytest.raises(BackendUnavailableError, match=r"pip install 'fusemlp\[mkl\]'"):
        libraries.mkl()
    monkeypatch.setenv(libraries.VARIABLE, "auto")
    assert libraries.mkl() is None
    libraries.mkl.cache_clear()


def test_other_makers_processors_stay_with_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(libraries.VARIABLE, raising=False)
    monkeypatch.setattr(libraries, "_is_intel", lambda: False)
    libraries.mkl.cache_clear()
    assert libraries.mkl() is None
    libraries.mkl.cache_clear()


def test_a_thread_of_its_own_computes_on_one_thread(library: str) -> None:
    """And goes on with those that it had before; another thread keeps its own number all the while."""
    loaded = libraries.mkl()
    counted: dict[str, int] = {}

    def count(when: str) -> None:
        counted[when] = 1 if loaded is None else loaded.MKL_Get_Max_Threads()

    def work() -> None:
        if loaded is not None:
            loaded.MKL_Set_Num_Threads_Local(3)
        count("before")
        with libraries.one_thread_here():
            count("within")
            other = threading.Thread(target=count, args=("beside",))
            other.start()
            other.join()
        count("after")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert counted["within"] == 1
    assert counted["before"] == counted["after"] == (1 if library == "scipy" else 3)
    assert library == "scipy" or counted["beside"] == libraries.mkl().MKL_Get_Max_Threads()
