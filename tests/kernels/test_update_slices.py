"""The update of slices of the arenas, one at a time, is that of the whole: bit for bit, and so is the clock."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusemlp_kernels import availability
from fusemlp_kernels.contract import COUNTERS, HYPER, LOSS_SCALE, RATE_COLUMNS, Segment, TensorRule, UpdateRule
from fusemlp_kernels.registry import backend

REASON = availability()["triton"]
TRITON = pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")
SIZE = 160
# a tensor that two slices share, a gap, and the end without tensors
SEGMENTS = (Segment(0, 90, TensorRule(1.0, 0.1)), Segment(96, 20, TensorRule(0.5)))
SLICES = ((0, 64), (64, 128), (128, 160), (160, 160))


RULES = (
    UpdateRule("sgd", momentum=0.9),
    UpdateRule("adam", clip_norm=0.5),
    UpdateRule("adam", decoupled=True, ema=0.9, accumulate=2),
)


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=["momentum", "clipped", "averaged"])
@pytest.mark.parametrize(
    ("name", "precision"), [("numpy", "fp32"), ("numpy", "fp64"), pytest.param("triton", "fp32", marks=TRITON)]
)
def test_the_slices_of_an_update(name: str, precision: str, rule: UpdateRule, overflows: bool) -> None:
    on, scaled = backend(name, None, precision), name == "triton" and rule.kind == "adam"
    generator = np.random.default_rng(3)
    given: dict[str, Any] = {"params": generator.normal(size=SIZE), "grads": generator.normal(size=SIZE)}
    for segment_end, next_start in ((90, 96), (116, SIZE)):
        given["grads"][segment_end:next_start] = 0.0
    if overflows:
        given["grads"][5] = np.inf
    states = [generator.uniform(size=SIZE) for _ in range(rule.state_count)]

    def updated(own: tuple[int, int] | None) -> dict[str, Any]:
        def there(array: Any) -> Any:
            flat = on.allocate(len(array), "real")
            on.copy_into(flat, array)
            return flat

        part = slice(*(own or (0, SIZE)))
        arrays = {name: there(array) for name, array in given.items()}
        kept = [there(array if place == rule.average else array[part]) for place, array in enumerate(states)]
        counters, hyper = on.allocate(COUNTERS, "int64"), on.allocate(HYPER, "float64")
        rates = on.allocate(2 * RATE_COLUMNS, "float64").reshape(2, RATE_COLUMNS)
        on.copy_into(rates, np.array([[0.0, 1.0, 0.0, 0.0], [0.01, 0.1, 0.001, 0.1]]))
        on.copy_into(hyper, np.array([0.01, 0.1, 0.001, 1.0, 8.0, 0.0, 0.1]))
        clock = {"rule": rule, "hyper": hyper, "rates": rates, "counters": counters}
        others = {"scaled": True} if scaled else {}
        run = on.bind("update", **arrays, states=tuple(kept), segments=SEGMENTS, own=own, **clock, **others)
        # NumPy's update scales the gradients in place: the same ones cannot be clipped again
        for _ in range(rule.accumulate):
            run()
        found = {"params": arrays["params"], "counters": counters, "hyper": hyper}
        found |= {f"state{place}": one if len(one) < SIZE else one[part] for place, one in enumerate(kept)}
        return {name: on.to_host(array) for name, array in found.items()}

    whole = updated(None)
    for own in SLICES:
        sliced = updated(own)
        untouched = given["params"].astype(whole["params"].dtype)
        untouched[slice(*own)] = whole["params"][slice(*own)]
        assert sliced.pop("params").tobytes() == untouched.tobytes()
        for key, array in sliced.items():
            wanted = whole[key] if key in ("counters", "hyper") else whole[key][slice(*own)]
            assert array.tobytes() == wanted.tobytes(), (own, key)
    assert (whole["hyper"][LOSS_SCALE] == 8.0) != (overflows and scaled)
