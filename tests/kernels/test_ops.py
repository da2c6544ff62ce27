"""The records of the ops, and the binders of each backend, say the same."""

import importlib
import importlib.util

import cupy_standin
import numpy as np
import pytest
from devices import DEVICE_PARAMETERS, usable

from fusemlp_kernels.checks import checked, operands_of, refusal
from fusemlp_kernels.contract import COUNTERS, Dropout, UpdateRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError
from fusemlp_kernels.ops import FIXED, OPS, UPDATED
from fusemlp_kernels.registry import TRAITS


def binders(backend):
    if backend == "cupy" and importlib.util.find_spec("cupy") is None:
        if cupy_standin.why_not():
            pytest.skip(cupy_standin.why_not())
        cupy_standin.load()
    if backend == "triton":
        pytest.importorskip("triton")
    return importlib.import_module(f"fusemlp_kernels.{backend}.backend").BINDERS


@pytest.mark.parametrize("backend", TRAITS)
@pytest.mark.parametrize("op", OPS)
def test_a_binder_takes_what_the_record_says(backend, op):
    known, record = binders(backend), OPS[op]
    if refusal(backend, op) is not None:
        assert op not in known
        return
    assert set(record.required) <= operands_of(known[op]) <= {operand.name for operand in record.operands}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_record_is_complete(op):
    for name, operand in op.by_name.items():
        assert operand.shape == "target" or set(operand.shape or "") <= {*"ABDMNKR", *FIXED}, name
        assert operand.rows in ("", *(other.name for other in op.operands)) or name.startswith("layers."), name
        assert operand.use == UPDATED or operand.kind != "control" or name == "epoch_stats", name
        # what is written has a shape, or is an arena
        assert name not in op.written or operand.shape or operand.kind != "work"


@pytest.mark.parametrize("device", DEVICE_PARAMETERS)
def test_operands_are_checked_by_name(device):
    with usable(device):
        bind = device.variants[0].backend().bind
    with pytest.raises(ArgumentError, match=r"op: unknown name 'lineal'; did you mean 'linear'\?"):
        bind("lineal")
    with pytest.raises(ArgumentTypeError, match="advance: missing hyper, rates, counters"):
        bind("advance", rule=None)
    with pytest.raises(ArgumentTypeError, match=r"advance: operand: unknown name 'hypr'; did you mean 'hyper'\?"):
        bind("advance", rule=None, hypr=None, rates=None, counters=None)
    with pytest.raises(ArgumentTypeError, match=r"grad_weight: layers\[0\]: missing x, dw, db"):
        bind("grad_weight", layers=[{"dz": None}], rule=None, counters=None)


@pytest.mark.parametrize("device", DEVICE_PARAMETERS)
def test_ops_that_a_backend_does_not_have_are_refused_with_a_reason(device):
    with usable(device):
        bind = device.variants[0].backend().bind
    refused = [op for op in OPS if refusal(device.backend, op)]
    assert refused
    for op in refused:
        with pytest.raises(BackendUnavailableError, match=f"op: the {device.backend} backend has no '{op}': it"):
            bind(op)


def test_what_a_backend_does_not_take_is_refused():
    numpy = DEVICE_PARAMETERS[0].values[0].variants[0].backend()
    with pytest.raises(ArgumentTypeError, match="update: norm: the numpy backend does not take it"):
        numpy.bind("update", **dict.fromkeys(OPS["update"].required), norm=[0.0])


LAYER = {"x": np.zeros((6, 3)), "w": np.zeros((2, 3)), "b": np.zeros(2), "y": np.zeros((4, 2)), "activation": "relu"}
COUNTED = {"counters": np.zeros(COUNTERS)}


@pytest.mark.parametrize(
    ("op", "given", "said"),
    [
        ("linear", LAYER, r"y: \(4, 2\) is not \(6, 2\)"),
        ("linear", LAYER | {"rows": np.zeros(4)}, "counters: rows needs them"),
        ("linear", LAYER | {"dropout": Dropout(0.5, 0, 0)}, "counters: dropout needs them"),
        ("linear", LAYER | COUNTED | {"rows": np.zeros(6)}, "rows: expected 4 row numbers, or several batches of 4"),
        ("grad_weight", {"layers": [], "rule": UpdateRule("sgd"), "parts": 2, "part": 4} | COUNTED, "a multiple of 8"),
        ("grad_weight", {"layers": [], "rule": UpdateRule("sgd", accumulate=2), "parts": 2} | COUNTED, "use parts=1"),
        ("grad_weight", {"layers": [{"dz": np.zeros((5, 2)), "x": np.zeros((5, 1)), "dw": np.zeros((2, 2)), "db": None}]
            } | COUNTED, r"layers\[0\]: dw: \(2, 2\) is not \(2, 1\)"),
    ],
)  # fmt: skip
def test_operands_are_checked_as_the_record_says(op, given, said):
    def check(op, name, array, shape, dtype, *, written, flat):
        if any(wanted not in (None, size) for wanted, size in zip(shape, array.shape, strict=True)):
            raise ArgumentError(f"{op}: {name}: {array.shape} is not {shape}")
        return array

    with pytest.raises(ArgumentError, match=f"{op}: .*{said}"):
        checked(op, given, check)


def test_checked_operands_have_their_sizes_and_defaults():
    given = checked("linear", LAYER | COUNTED | {"rows": np.zeros(8)}, lambda op, name, array, *_, **__: array)
    assert (given.M, given.N, given.K, given.n) == (4, 2, 3, 6)
    assert given.slope == 0.0 and given.z is None and given.y is LAYER["y"]
