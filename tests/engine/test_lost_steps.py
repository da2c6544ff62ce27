"""A step that overflows spoils only the parameters: after loading good ones, training works as before."""

import numpy as np
import pytest

from fusemlp import MLP, SGD, Engine
from fusemlp_kernels import availability

BACKENDS = [
    "numpy",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(availability()["triton"] is not None, reason=f"triton: {availability()['triton']}"),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.1, clip_norm=1.0), SGD(0.1, accumulate=2)], ids=str)
def test_loaded_parameters_know_nothing_of_an_overflow(backend, optimizer):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((16, 3)).astype(np.float32), rng.standard_normal((16, 3)).astype(np.float32)
    lost, whole = (
        Engine(MLP([3, 4, 3]), loss="mse", optimizer=optimizer, batch_size=16, backend=backend, normalise=False)
        for _ in range(2)
    )
    for _ in range(2):
        lost.step(x * np.float32(1e25), y)
    assert not np.isfinite(lost.state_dict()["0.weight"]).any()
    lost.load_state_dict(whole.state_dict())
    assert [float(lost.step(x, y)) for _ in range(5)] == [float(whole.step(x, y)) for _ in range(5)]
