"""A Triton driver whose card is the emulator: the engine's own launches run on the CPU, from the PTX a card would get.

``emulated`` makes it the active driver and lends the Triton backend a device. Triton compiles as for the card, up to
PTX; ptxas is not needed. Device memory is the memory of the torch tensors made meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
from collections import namedtuple
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from fusemlp_kernels.triton import backend, configs
from fusemlp_kernels.triton.launch import TritonDevice

from .copies import TensorMap
from .faults import Fault, Place
from .memory import Global
from .parse import parse
from .schedule import Code, Launch

# More threads than this run in several launches of the emulator, one after another.
MOST_THREADS = 1 << 13


class Allocations(TorchDispatchMode):
    """Device memory: the storages of the tensors that torch makes while this mode is on, and that still live."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

    def add(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()

    def regions(self):
        """Return (address, bytes) of the storages."""
        self.storages = {key: found for key, found in self.storages.items() if not found[0].expired()}
        return [(address, size) for address, (_, size) in self.storages.items()]


@dataclass
class Emulator:
    """A card: the settings of its launches, what it has launched, and the kernels with tensor descriptors among it.

    ``edit`` changes the text of a kernel's PTX. Kernels of ``unfenced`` lack ``fence.proxy.async`` between cp.async and
    wgmma.
    """

    target: str
    seed: int = 0
    orders: int = 1
    limit: int = 5_000_000
    edit: Callable[[str], str] = str
    unfenced: Collection[str] = ()
    allocations: Allocations = field(default_factory=Allocations)
    launched: list[tuple[str, int]] = field(default_factory=list)
    described: set[str] = field(default_factory=set)
    # the memory of the last launch, and of those before that it need not have waited for
    running: list[Global] = field(default_factory=list)

    @property
    def capability(self):
        return int(self.target.removeprefix("sm_"))

    def launch(self, function, programs, signature, arguments, metadata):
        """Run a kernel over ``programs`` blocks; ``metadata`` is Triton's of the kernel."""
        boxes = metadata.tensordesc_meta or ()
        values, maps = [], {}
        for kind, value in zip(signature, arguments, strict=True):
            if isinstance(value, TensorDescriptor):
                # a number that is no address of a tensor
                values += [64 * (len(maps) + 1), *value.shape, *value.strides]
                maps[64 * (len(maps) + 1)] = _tensor_map(value, boxes[len(maps)])
            elif kind != "constexpr":
                values.append(_bits(kind, value))
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if isinstance(tensor, torch.Tensor):
                self.allocations.add(tensor)
        code = _loaded(self.edit(function.text))
        module = code.module
        dependent = metadata.launch_pdl
        memory = Global(self.allocations.regions(), programs, self.running if dependent else ())
        # pointers to scratch memory, which these kernels do not use
        values += [0] * (len(module.entry.parameters) - len(values))
        self.launched.append((module.name, programs))
        self.described |= {module.name} if maps else set()
        blocks = np.random.default_rng(self.seed).permutation(programs)
        together = programs if metadata.launch_cooperative_grid else max(MOST_THREADS // module.threads, 1)
        excused = bool(code.products) and not maps and module.name in self.unfenced
        for some in np.split(blocks, range(together, programs, together)):
            launch = Launch(
                code, some, values, memory, function.shared, seed=self.seed, orders=self.orders, limit=self.limit,
                maps=maps, excused=excused, cooperative=metadata.launch_cooperative_grid,
            )  # fmt: skip
            launch.run()
            if excused and not launch.threads.shared.excuses:
                raise Fault("has fence.proxy.async now: expected none", Place(module.name, "?", "wgmma"))
        if dependent and not memory.order.waited.any():
            raise Fault("a dependent launch ends without griddepcontrol.wait", Place(module.name, "?", "ret"))
        memory.order.close(blocks)
        # one that has waited before it let the next begin, or ended, ends after those before it
        self.running = [*(self.running if dependent and not memory.order.closed else ()), memory]


# A loaded kernel: its PTX, and the bytes of its dynamic shared memory.
Function = namedtuple("Function", "text shared")


@functools.cache
def _loaded(text):
    return Code(parse(text))


def _tensor_map(given, box):
    """Return the map that Triton's driver makes of a descriptor."""
    size = given.base.itemsize
    shape, boxes = ((*sides,) for sides in (given.shape, box["block_size"]))
    return TensorMap(given.base.data_ptr(), shape, given.strides[0] * size, boxes, size, box["swizzle"])


def _bits(kind, value):
    if kind.startswith("*"):
        return 0 if value is None else value.data_ptr() if hasattr(value, "data_ptr") else int(value)
    if kind in ("fp32", "f32"):
        return int(np.float32(value).view(np.uint32))
    if kind == "fp64":
        return int(np.float64(value).view(np.uint64))
    return int(value)


class Driver:
    """The parts of a Triton driver that launches use. A card's target is also its number, so that Triton keeps the
    kernels of different targets apart."""

    def __init__(self, emulator):
        self.emulator, self.utils = emulator, self

    def get_current_device(self):
        return self.emulator.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.emulator.capability, 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name, text, shared, device):
        # module, function, registers, spills, threads
        return None, Function(text.decode(), shared), 0, 0, 1024

    def launcher_cls(self, source, metadata):
        signature = list(source.signature.values())

        def launch(x, y, z, stream, function, *rest):
            # packed and launch metadata, two hooks, then the arguments
            triton.runtime.driver.active.emulator.launch(function, x * y * z, signature, rest[4:], metadata)

        return launch


def _keep_ptx(*given):
    """Triton's hook on the stages of a compilation: the PTX is the binary."""
    if given:
        given[1]["cubin"] = lambda source, _: source.encode()
    return "ptx", "ptx"


@contextlib.contextmanager
def emulated(target, precision="fp32", processors=4, **settings):
    """Run the Triton backend on an emulated card of ``target``, such as "sm_80"; see ``Emulator`` for the settings.

    ``processors`` is the card's number of multiprocessors, on which the choice of tiles depends.
    """
    emulator = Emulator(target, **settings)
    arch = configs.Architecture(configs.family_of(target), processors)
    # As under the interpreter, memory is the host's, and there is nothing to wait for.
    device = TritonDevice(torch.device("cpu"), arch, precision, backend.COMPUTE[precision], True)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver(emulator))
    try:
        with (
            mock.patch("fusemlp_kernels.registry._triton_reason", lambda: None),
            mock.patch.object(backend, "open_device", lambda *_: device),
            mock.patch.object(triton.knobs.runtime, "add_stages_inspection_hook", _keep_ptx),
            emulator.allocations,
        ):
            yield emulator
    finally:
        triton.runtime.driver._active = before
