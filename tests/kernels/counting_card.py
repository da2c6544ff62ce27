"""A card that counts: Triton's interpreter, with a type of tensor that stands for memory of a card.

Test code. It runs the backend's own code for a card, up to torch's and Triton's calls, and counts what a real card
would do at them: waits of the host, copies in both directions, launches. A wait inside the capture of a graph
raises, and a replay repeats the captured work without Python's part of it, as on a card. It cannot show work on several
streams at once, the driver or time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from fusemlp_kernels.triton import backend, launch

# Torch's functions that bring numbers to the host.
READS = frozenset({"item", "__float__", "__int__", "__bool__", "__index__", "tolist", "cpu", "nonzero"})
# Those that only look at memory in another way, or at the description of a tensor.
VIEWS = frozenset(
    {
        *("__get__", "__set__", "__getitem__", "__len__", "view", "as_strided", "detach", "data_ptr", "size", "stride"),
        *("dim", "ndimension", "storage_offset", "is_contiguous", "untyped_storage", "numel", "element_size", "split"),
        *("unsqueeze", "squeeze", "requires_grad_", "is_floating_point", "is_complex", "new_empty", "set_", "__hash__"),
        *("_is_view", "view_as", "__format__", "__repr__", "expand", "is_pinned", "type", "flatten", "empty_like"),
    }
)


class NotOnACard(AssertionError):
    """An error on a card."""


@dataclasses.dataclass
class Card:
    """The work that a card was asked for; ``events`` in order: "wait", "replay", "captured", and what tests add."""

    waits: int = 0
    bytes_read: int = 0
    bytes_sent: int = 0
    launches: int = 0
    events: list[Any] = dataclasses.field(default_factory=list)
    capturing: Graph | None = None
    streams: list[Any] = dataclasses.field(default_factory=list)
    # the number of the current stream
    current: int = 0

    def wait(self, what, count=0):
        if self.capturing is not None:
            raise NotOnACard(f"{what} waits while a stream is captured")
        self.waits += 1
        self.bytes_read += count
        self.events.append("wait")

    def start(self, work):
        """Run work now, or record it."""
        if self.capturing is not None:
            self.capturing.nodes.append(work)
            return None
        self.launches += 1
        return work()

    @contextlib.contextmanager
    def counted(self):
        """Yield the work that a block asks for."""
        before = dataclasses.astuple(dataclasses.replace(self, events=[], capturing=None, streams=[]))
        found = Card()
        events = len(self.events)
        yield found
        now = dataclasses.astuple(dataclasses.replace(self, events=[], capturing=None, streams=[]))
        found.waits, found.bytes_read, found.bytes_sent, found.launches = (
            after - first for after, first in zip(now[:4], before[:4], strict=True)
        )
        found.events = self.events[events:]


CARD = Card()


class Stream:
    """As ``torch.cuda.Stream``, with a number for its address."""

    def __init__(self, device=None, number=None):
        self.device, self.cuda_stream = device, number

    def wait_stream(self, other):
        if CARD.capturing is not None:
            raise NotOnACard("a stream that is captured waits for another one")
        CARD.events.append(("waits", self.cuda_stream, other.cuda_stream))


class Graph:
    """As ``torch.cuda.CUDAGraph``."""

    def __init__(self):
        self.nodes = []

    def replay(self):
        CARD.events.append("replay")
        # one launch, whatever is in it
        CARD.launches += 1
        for node in self.nodes:
            node()


@contextlib.contextmanager
def captured(graph, stream=None, capture_error_mode="global"):
    """As ``torch.cuda.graph``."""
    CARD.wait("a capture")
    CARD.events[-1] = "captured"
    CARD.streams.append(stream)
    CARD.capturing = graph
    try:
        yield
    finally:
        CARD.capturing = None
    if not graph.nodes:
        import warnings

        warnings.warn("The CUDA Graph is empty. This usually means ...", stacklevel=2)


def _plainly(function, args, options):
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **options)


class Pinned(torch.Tensor):
    """Pinned memory of the host."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class OnCard(torch.Tensor):
    """Memory of the card."""

    is_cpu = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        options, name = kwargs or {}, func.__name__
        if name in ("numpy", "__array__"):
            raise NotOnACard(f"{name} of a tensor on the card")
        if name in READS:
            CARD.wait(name, args[0].numel() * args[0].element_size())
            found = _plainly(func, args, options)
            return found.as_subclass(torch.Tensor).clone() if isinstance(found, torch.Tensor) else found
        if name in VIEWS:
            return _on_card(_plainly(func, args, options))
        if name == "reshape":
            before, found = args[0].data_ptr(), _plainly(func, args, options)
            if found.data_ptr() != before and found.numel():
                CARD.launches += 1
            return _on_card(found)
        into, source = args[0], args[-1]
        if name in ("copy_", "__setitem__") and isinstance(source, torch.Tensor):
            if isinstance(into, OnCard) and not isinstance(source, OnCard):
                CARD.bytes_sent += source.numel() * source.element_size()
                if not (isinstance(source, Pinned) and options.get("non_blocking")):
                    CARD.wait("a copy from pageable memory")
                if CARD.capturing is not None:
                    raise NotOnACard("a copy from the host is captured")
            elif not isinstance(into, OnCard):
                CARD.wait(name, source.numel() * source.element_size())
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if in_place:
            CARD.start(lambda: _plainly(func, args, options))
            return into
        if CARD.capturing is not None:
            # a replay writes into the memory of the capture
            found = _on_card(_plainly(func, args, options))
            CARD.start(lambda: _plainly(torch.Tensor.copy_, (found, _plainly(func, args, options)), {}))
            return found
        return _on_card(CARD.start(lambda: _plainly(func, args, options)))


def _on_card(found):
    if isinstance(found, torch.Tensor):
        return found if isinstance(found, OnCard) else found.as_subclass(OnCard)
    return type(found)(map(_on_card, found)) if type(found) in (tuple, list) else found


def put(array):
    """Return a copy of a host array on the card."""
    return torch.as_tensor(array).clone().as_subclass(OnCard)


def _no_launch(*_):
    return lambda: CARD.start(lambda: None)


def _launch(self, kernel, programs, arguments, constants, tile):
    given = {**arguments, **constants, **launch.launch_options(self.arch.family, tile)}

    def work():
        with np.errstate(all="ignore"), torch._C.DisableTorchFunctionSubclass():
            kernel[(programs,)](**given)

    def run():
        CARD.start(work)

    return run


@contextlib.contextmanager
def counting(*, computes):
    """Let the Triton backend run on the counting card, whose kernels compute nothing unless it ``computes``."""
    open_device, empty = backend.open_device, torch.empty
    allocate, zeros, numbers = backend.TritonBackend.allocate, launch.TritonDevice.zeros, launch.TritonDevice.numbers
    made = backend.TritonBackend.__init__

    launches = _launch if computes else _no_launch

    def opened(name, precision):
        return dataclasses.replace(open_device(None, precision), interpreted=False)

    def start(self, traits, device, precision):
        made(self, traits, device, precision)
        self.device = "cuda:0"

    def empty_or_pinned(*shape, pin_memory=False, **options):
        found = empty(*shape, **options)
        return found.as_subclass(Pinned) if pin_memory else found

    def sent(self, values, kind):
        CARD.wait("a copy from pageable memory")
        return _on_card(numbers(self, values, kind))

    CARD.__init__()
    cuda = {
        "CUDAGraph": Graph,
        "graph": captured,
        "Stream": Stream,
        "Event": lambda: SimpleNamespace(record=lambda stream: None, synchronize=lambda: CARD.wait("an event")),
        "current_stream": lambda device=None: Stream(device, CARD.current),
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: CARD.capturing is not None,
        "synchronize": lambda device=None: CARD.wait("synchronize"),
    }
    with contextlib.ExitStack() as stack:
        for owner, names in (
            (torch.cuda, cuda),
            (torch, {"empty": empty_or_pinned}),
            (torch._C, {"_cuda_getCurrentRawStream": lambda index: CARD.current}),
            (backend, {"open_device": opened}),
            (backend.TritonBackend, {"__init__": start, "allocate": lambda *given: _on_card(allocate(*given))}),
            (
                launch.TritonDevice,
                {"launch": launches, "numbers": sent, "zeros": lambda *given: _on_card(zeros(*given))},
            ),
        ):
            for name, value in names.items():
                # torch without CUDA lacks some
                stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield CARD
