"""NumPy's losses without a gradient are those with one, to the bit."""

import numpy as np
import pytest

import fusemlp_kernels
from fusemlp_kernels.contract import COUNTERS, LOSSES, ROW_COUNT, STATS, LossSpec

ROWS, VALID = 48, 41
# The widest rows change only at the class's element, and are processed in blocks for the cache.
WIDTHS = (1, 7, 80, 3000)
# differences between logits: none, usual ones, and those whose exponentials are subnormal or zero
SCALES = (0.0, 1.0, 25.0, 40.0, 250.0, 1000.0)


def told(spec, z, target, weight, class_weight, *, gradient):
    counters, stats = np.zeros(COUNTERS, np.int64), np.zeros(STATS)
    counters[ROW_COUNT] = VALID
    z = z.copy()
    arrays = {"z": z, "dz": z if gradient else None, "target": target, "weight": weight, "class_weight": class_weight}
    backend = fusemlp_kernels.backend("numpy", None, "fp64" if z.dtype == np.float64 else "fp32")
    backend.bind("loss_grad", **arrays, counters=counters, stats=stats, loss=spec)()
    return stats.tobytes()


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("kind", "soft"), [*((kind, False) for kind in LOSSES), ("cross_entropy", True)])
def test_the_gradient_is_all_that_is_left_out(kind, weighted, soft, columns, real):
    rng = np.random.default_rng(columns)
    classes = kind == "cross_entropy"
    spec = LossSpec(kind, accuracy=True, soft=soft)
    target = rng.uniform(0.0, 1.0, (ROWS, columns)).astype(real)
    if classes:
        target = target / target.sum(axis=1, keepdims=True) if soft else rng.integers(0, columns, ROWS)
    weight = rng.uniform(0.0, 2.0, ROWS).astype(real) if weighted else None
    class_weight = rng.uniform(0.0, 2.0, columns).astype(real) if weighted and classes else None
    for scale in SCALES:
        z = (scale * rng.standard_normal((ROWS, columns))).astype(real)
        z[5] = np.inf if scale == 1000.0 and weighted else z[5]
        arguments = spec, z, target, weight, class_weight
        assert told(*arguments, gradient=False) == told(*arguments, gradient=True)
