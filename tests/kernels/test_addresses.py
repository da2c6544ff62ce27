"""Offsets beyond what 32 bits count, without the memory for it: of a sparse mapping only touched pages are there.

A row number times a pitch that wraps around leads into the other half of the mapping, where there are zeros.
"""

import mmap
import weakref

import numpy as np
import pytest
from calls import Clock, check_grad_input, check_grad_weight, check_linear
from devices import INTERPRETER, variants_of
from memory import Values, exact
from tolerance import assert_within, bound

from fusemlp_kernels.contract import COUNTERS, Segment, TensorRule, UpdateRule

# From the middle of 2**32 elements: the third row begins 2**31 elements further on, or by mistake at the start.
MIDDLE, PITCH, ROWS = 1 << 31, 1 << 30, 3
# Linux's MAP_NORESERVE, which Python's mmap does not name before 3.13: nothing is set aside for untouched pages.
NO_RESERVE = 0x4000
on_the_interpreter = pytest.mark.parametrize("variant", variants_of(INTERPRETER))


def far_apart(values, pitch=PITCH):
    """A torch matrix of these values whose rows lie ``pitch`` elements apart."""
    import torch

    size = (MIDDLE + (len(values) - 1) * pitch + values.shape[1]) * values.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    source = torch.from_numpy(values)
    flat = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=source.dtype)
    matrix = flat.as_strided(values.shape, (pitch, 1), MIDDLE)
    matrix.copy_(source)
    return matrix


# aligned and not
@pytest.mark.parametrize("width", [8, 5])
@on_the_interpreter
def test_rows_beyond_32_bits(variant, width):
    import torch

    values, backend = Values(11, variant), variant.backend()
    x, w, b = values.factors(ROWS, width), values.factors(ROWS, width), values.normal(ROWS)
    empty, square = np.full((ROWS, width), np.nan, variant.compute), np.full((ROWS, ROWS), np.nan, variant.compute)
    y, z = far_apart(square), far_apart(square)
    far_x, far_w = far_apart(x), far_apart(w)
    backend.bind("linear", x=far_x, w=far_w, b=torch.from_numpy(b), y=y, z=z, activation="silu")()
    check_linear(variant, y.float().numpy(), x, w, b, "silu", z=z.float().numpy())

    dz, dz_prev = values.factors(ROWS, ROWS), far_apart(empty)
    previous = far_apart(x)
    backend.bind("grad_input", dz=far_apart(dz), w=far_w, y=previous, z=previous, dz_prev=dz_prev, activation="silu")()
    check_grad_input(variant, dz_prev.float().numpy(), dz, w, x, "silu")

    dw, db = far_apart(np.full((ROWS, width), np.nan, np.float32)), torch.full((ROWS,), torch.nan)
    layer = {"dz": far_apart(dz), "x": far_x, "dw": dw, "db": db}
    counters = torch.zeros(COUNTERS, dtype=torch.int64)
    backend.bind("grad_weight", layers=[layer], rule=UpdateRule("sgd"), counters=counters)()
    check_grad_weight(variant, dz, x, dw.numpy(), db.numpy())


@on_the_interpreter
def test_parts_beyond_32_bits(variant):
    """Three parts, whose sums are written and read 2**30 elements apart."""
    import torch

    values, backend = Values(12, variant), variant.backend()
    # three stretches of a batch, a block each
    dz, x = values.factors(96, 3), values.factors(96, 8)
    grads = far_apart(np.full((3, 24), np.nan, np.float32))
    dw, rule = grads[0].view(3, 8), UpdateRule("sgd")
    layer = {"dz": torch.from_numpy(dz), "x": torch.from_numpy(x), "dw": dw, "db": None}
    counters = torch.zeros(COUNTERS, dtype=torch.int64)
    backend.bind("grad_weight", layers=[layer], rule=rule, counters=counters, parts=3, part=PITCH)()
    products = exact(dz).reshape(3, 32, 3).transpose(0, 2, 1) @ exact(x).reshape(3, 32, 8)
    magnitudes = np.abs(exact(dz)).reshape(3, 32, 3).transpose(0, 2, 1) @ np.abs(exact(x)).reshape(3, 32, 8)
    limits = bound(32, magnitudes, variant.unit, output=products)
    assert_within(grads.numpy().reshape(3, 3, 8), products, limits)

    clock = Clock(rule)
    given = {name: torch.from_numpy(clock.operands[name]) for name in ("hyper", "rates", "counters")}
    params, segments = torch.zeros(24), (Segment(0, 24, TensorRule()),)
    backend.bind(
        "update", params=params, grads=grads[0], states=(), segments=segments, rule=rule, parts=3, part=PITCH, **given
    )()
    total = -clock.rate * products.sum(axis=0)
    limit = clock.rate * limits.sum(axis=0) + 4.0 * variant.unit * clock.rate * magnitudes.sum(axis=0)
    assert_within(params.numpy().reshape(3, 8), total, limit)


@on_the_interpreter
def test_a_grouped_launch_keeps_its_operands_alive(variant):
    """The kernel reads them by their distances from the first one: freed memory would go unnoticed on a card."""
    import torch

    backend, clock = variant.backend(), Clock(UpdateRule("adam")).operands
    clock = {name: value if name == "rule" else torch.from_numpy(value) for name, value in clock.items()}
    x, dz, w = (torch.ones((8, 8), dtype=kind) for kind in (*(backend._device.compute,) * 2, torch.float32))
    states = tuple(torch.zeros(8, 8) for _ in range(2))
    layer = {"dz": dz, "x": x, "w": w, "b": None, "w_rule": TensorRule(), "w_state": states}
    run = backend.bind("grad_weight_update", layers=[layer], **clock)
    kept = [weakref.ref(tensor) for tensor in (x, dz, w, *states)]
    del x, dz, w, states, layer
    assert all(tensor() is not None for tensor in kept)
    run()
    assert float(kept[2]()[0, 0]) != 1.0


@on_the_interpreter
def test_a_launch_that_clips_rows_keeps_its_operands_alive(variant):
    import torch

    backend = variant.backend()
    x, dz = (torch.ones((8, 8), dtype=backend._device.compute) for _ in range(2))
    layer = {"dz": dz, "x": x, "w_trained": True, "b_trained": True}
    # as many rows as there are
    counters = torch.full((COUNTERS,), 8)
    run = backend.bind("clip_examples", layers=[layer], clip=1.0, counters=counters)
    kept = [weakref.ref(tensor) for tensor in (x, dz)]
    del x, dz, layer
    assert all(tensor() is not None for tensor in kept)
    run()
    assert 0.0 < float(kept[1]()[0, 0]) < 1.0


@on_the_interpreter
def test_a_vector_on_the_device_is_bound_in_place_only_if_it_is_aligned(variant):
    """Triton compiles another kernel for an address that is no multiple of 16 bytes."""
    import torch

    backend = variant.backend()
    labels = backend.allocate(9, "int64")
    labels.copy_(torch.arange(9))
    assert backend.from_host(labels) is labels
    moved = backend.from_host(labels[1:])
    assert moved.data_ptr() % 16 == 0 != labels[1:].data_ptr() % 16
    np.testing.assert_array_equal(moved.numpy(), np.arange(1, 9))
