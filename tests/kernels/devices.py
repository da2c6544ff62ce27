"""The backends under test, and how a NumPy array of a test becomes an array of theirs.

The tests keep NumPy arrays as the truth. ``Variant.bind`` puts the whole memory behind each operand on the device,
makes the same views of it there, and returns a ``run`` that takes to the device what the host has changed, runs, and
brings every byte back. On NumPy it is the call itself.

In Triton's interpreter bf16 is computed on raw bit patterns and tf32 exactly: both are tested on a GPU only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from unittest import mock

import cupy_standin
import numpy as np
import pytest
from device_memory import LOOPS, DeviceMemory, TorchMemory
from memory import Watch
from tolerance import IEEE, TF32, TF32X3, TINY, TWO_BYTES, assert_within, rounded

import fusemlp_kernels
from fusemlp_kernels import registry
from fusemlp_kernels.checks import refusal
from fusemlp_kernels.numpy.processor import why_no_tiles
from fusemlp_kernels.ops import OPS
from fusemlp_kernels.registry import TRAITS

# ``ci/gpu --rehearse``: the tests for cards run on the CPU, at tiny sizes, to find what no longer fits the program.
REHEARSED = os.environ.get("FUSEMLP_REHEARSE") == "1"
REALS = {"fp64": np.float64}
# The types of matrix products. NumPy has no bfloat16: the host holds the rounded values in float32.
COMPUTE = {"fp64": np.float64, "fp16": np.float16}
# The names of what an op may write, of sequences of mappings those of their fields.
WRITTEN = {name: {operand.rpartition(".")[2] for operand in op.written} for name, op in OPS.items()}
WRITTEN |= dict.fromkeys(LOOPS, set().union(*WRITTEN.values()))
# On a card; the interpreter, NumPy and cuBLAS on float32 compute in IEEE arithmetic.
TENSOR_CORES = {"fp32": TF32X3, "tf32": TF32, "bf16": TWO_BYTES, "fp16": TWO_BYTES}
CUBLAS = {**TENSOR_CORES, "fp32": IEEE}


@dataclass(frozen=True, repr=False)
class Device:
    """A backend on something that runs it, and how much of each kind of case is worth its time there."""

    name: str
    backend: str
    precisions: tuple[str, ...]
    examples: int
    edges: tuple[int, ...]
    longest: int
    wide: tuple[int, ...]
    # layers that are larger than a block or a tile, in rows and in columns
    blocks: tuple[tuple[int, int], tuple[int, int]]
    layouts: tuple[str, ...]
    output_layouts: tuple[str, ...]
    tensor_cores: bool = False

    def __repr__(self):
        return self.name

    @property
    def traits(self):
        return TRAITS[self.backend]

    @property
    def variants(self):
        return [Variant(self, precision) for precision in self.precisions]

    @property
    def on_host(self):
        return self.backend == "numpy"


@dataclass(frozen=True)
class Variant:
    """A device in one precision."""

    device: Device = field(repr=False)
    precision: str

    @property
    def traits(self):
        return self.device.traits

    @property
    def real(self):
        """The host's type of parameters, targets, weights and so on."""
        return REALS.get(self.precision, np.float32)

    @property
    def compute(self):
        """The host's type of what matrix products read and write."""
        return COMPUTE.get(self.precision, np.float32)

    @property
    def unit(self):
        """The unit roundoff of sums and functions."""
        return 2.0**-53 if self.precision == "fp64" else 2.0**-24

    @property
    def products(self):
        if not self.device.tensor_cores:
            return TF32 if self.precision == "tf32" else IEEE
        return (CUBLAS if self.device.backend == "cupy" else TENSOR_CORES)[self.precision]

    @property
    def output_unit(self):
        """The unit roundoff of 16-bit results; 0 where results have the type of the sums."""
        return 0.0 if self.device.on_host else {"fp16": 2.0**-11, "bf16": 2.0**-8}.get(self.precision, 0.0)

    @property
    def output_tiny(self):
        """Half the distance of the smallest results."""
        return {"fp16": 2.0**-25}.get(self.precision, TINY)

    def rounded(self, values):
        """Values as matrix products read them."""
        values = np.asarray(values, self.real)
        if self.precision == "bf16":
            bits = values.view(np.uint32).astype(np.uint64)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            return np.where(np.isnan(values), np.float32(np.nan), bits.astype(np.uint32).view(np.float32))
        return values.astype(self.compute)

    def result_bound(self, error, value):
        """The bound of a result in the type that matrix products write, from that of ``value`` before it is rounded."""
        if not self.output_unit:
            return error
        limit = rounded(error, value, self.output_unit, self.output_tiny)
        # what is too large for the type is infinite
        return np.where(np.abs(value) + limit > self.largest, np.inf, limit)

    def check(self, actual, expected, error):
        """``assert_within``, for a result in the type that matrix products write."""
        assert_within(actual, expected, self.result_bound(error, expected))

    @property
    def largest(self):
        return 65504.0 if self.precision == "fp16" else 3e38

    def backend(self):
        with usable(self.device):
            return fusemlp_kernels.backend(self.device.backend, None, self.precision)

    def bind(self, op, writes=(), **operands):
        """A ``run`` of the op that also checks, bitwise, that nothing changes but the elements of its outputs.

        ``writes``: arrays behind the outputs that may change too. ``run`` takes what the bound callable takes.
        """
        leaves = list(_leaves(operands))
        written = [array for name, array in leaves if name in WRITTEN.get(op, ())] + list(writes)
        watch = Watch([array for _, array in leaves], written)
        backend = self.backend()
        if self.device.on_host:
            call = backend.bind(op, **operands)

            def run_here(*arguments):
                watch.remember()
                call(*arguments)
                watch.check()

            return run_here
        there = (DeviceMemory if self.device.backend == "cupy" else TorchMemory)(backend, op)
        call = backend.bind(op, **_converted(operands, there.view))

        def run(*arguments):
            watch.remember()
            there.upload()
            call(*arguments)
            backend.synchronize()
            there.download()
            watch.check()

        return run


def _leaves(value, name=""):
    """(name, array) of every array in the operands."""
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, key)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item, name)


def _converted(value, convert, name=""):
    if isinstance(value, np.ndarray):
        return convert(name, value)
    if isinstance(value, Mapping):
        return {key: _converted(item, convert, key) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_converted(item, convert, name) for item in value)
    return value


def triton_is_interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device):
    """Why the device is not here; None if it is."""
    reason = fusemlp_kernels.availability()[device.backend]
    if REHEARSED and device in (GPU, CUPY_GPU):
        return why_not(INTERPRETER if device is GPU else STAND_IN)
    if device is TILES:
        return why_no_tiles()
    if device is STAND_IN:
        return "CuPy works here: its tests need the card" if reason is None else cupy_standin.why_not()
    if device.backend == "triton" and reason is None:
        if device is INTERPRETER and not triton_is_interpreted():
            return "Triton compiles here: TRITON_INTERPRET=1 asks for its interpreter"
        if device is GPU and (triton_is_interpreted() or not sees_a_gpu()):
            return "needs a GPU that torch sees, and TRITON_INTERPRET unset"
    return reason


def sees_a_gpu():
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


# "reversed": torch has no negative strides. "read-only": torch has no such thing.
STRIDED = ("plain", "transposed", "stepped", "offset", "pitched")
NUMPY = Device(
    "numpy",
    "numpy",
    ("fp32", "fp64"),
    examples=300,
    # the edges of the tiles and vectors that kernels are made of
    edges=(0, 1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129),
    longest=40,
    wide=(10, 511, 512, 513, 700),
    blocks=((300, 301), (3, 70_000)),
    layouts=(*STRIDED, "reversed", "read-only"),
    output_layouts=("plain", "plain", "pitched"),
)
# The host rounds the factors of products itself.
TILES = replace(NUMPY, name="numpy in AMX tiles", precisions=("bf16",), examples=60)
# A program costs the interpreter milliseconds: fewer cases, and no more than a few tiles each.
INTERPRETER = Device(
    "triton, interpreted",
    "triton",
    ("fp32", "fp16"),
    examples=60,
    edges=(0, 1, 2, 15, 16, 17, 31, 32, 33, 65),
    longest=20,
    wide=(10, 127, 255, 256, 257, 700),
    blocks=((140, 17), (3, 300)),
    layouts=STRIDED,
    output_layouts=("plain", "plain", "pitched", "transposed"),
)
# The kernels as C++ on the host, behind what stands in for CuPy, whose products round their factors to TF32 if asked.
STAND_IN = Device(
    "cupy, on the host",
    "cupy",
    ("fp32", "tf32", "fp16"),
    examples=120,
    # blocks of 256 threads with eight columns each, warps, and columns that a block sums
    edges=(0, 1, 2, 7, 8, 9, 31, 32, 33, 65),
    longest=40,
    wide=(10, 31, 33, 257, 700, 1025),
    blocks=((140, 17), (3, 1300)),
    layouts=(*STRIDED, "reversed"),
    output_layouts=INTERPRETER.output_layouts,
)
CARD = {"examples": 300, "edges": NUMPY.edges, "longest": 130, "blocks": NUMPY.blocks, "tensor_cores": True}
GPU = replace(
    INTERPRETER, name="triton on a GPU", precisions=tuple(TENSOR_CORES), wide=(*INTERPRETER.wide, 1000), **CARD
)
CUPY_GPU = replace(STAND_IN, name="cupy on a GPU", wide=(*STAND_IN.wide, 3000), **CARD)
if REHEARSED:
    GPU = replace(INTERPRETER, name=GPU.name, precisions=("fp32",), tensor_cores=True)
    CUPY_GPU = replace(STAND_IN, name=CUPY_GPU.name, precisions=("fp32",), tensor_cores=True)
DEVICES = (NUMPY, TILES, INTERPRETER, GPU, STAND_IN, CUPY_GPU)


@contextlib.contextmanager
def usable(device):
    """Make the device's backend available by name: the registry does not know CuPy's stand-in."""
    if device is not STAND_IN and not (REHEARSED and device is CUPY_GPU):
        yield
        return
    cupy_standin.load()
    with mock.patch.object(registry, "_cupy_reason", lambda: None):
        yield


# For tests of events, streams, memory or accuracy, which only a card has.
needs_a_card = pytest.mark.skipif(REHEARSED, reason="a rehearsal: only a card can show this")


def marks_of(device):
    reason = why_not(device)
    skip = [] if reason is None else [pytest.mark.skip(reason=f"{device.name}: {reason}")]
    return [pytest.mark.gpu, *skip] if device.tensor_cores else skip


def places(*devices):
    """Return devices as parameters of a test."""
    return [pytest.param(device, id=device.name, marks=marks_of(device)) for device in devices]


def variants_of(*devices):
    """Return devices in each of their precisions as parameters of a test."""
    return [
        pytest.param(variant, id=f"{device.name}, {variant.precision}", marks=marks_of(device))
        for device in devices
        for variant in device.variants
    ]


DEVICE_PARAMETERS, VARIANT_PARAMETERS = places(*DEVICES), variants_of(*DEVICES)


def devices_with(op):
    """Return the parameters of ``DEVICE_PARAMETERS`` whose backend has an op."""
    return [one for one in DEVICE_PARAMETERS if refusal(one.values[0].backend, op) is None]


def variants_with(op):
    """Return the parameters of ``VARIANT_PARAMETERS`` whose backend has an op."""
    return [one for one in VARIANT_PARAMETERS if refusal(one.values[0].device.backend, op) is None]
