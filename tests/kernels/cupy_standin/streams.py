"""Devices, streams and graphs: work runs at once, or is recorded during a capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from cupy_standin.memory import LIVE, CUDARuntimeError, Misuse

Work = Callable[[], object]
SILENT = "the stand-in has no such name"


class _Captured:
    """The stream in capture, if any, and its recorded work."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.nodes: list[Work] = []


_captured = _Captured()


def start(work: Work) -> None:
    """Run work on the current stream, or record it as a node of the graph in capture."""
    if _captured.stream is None:
        work()
    elif _captured.stream is _stack[-1]:
        _captured.nodes.append(work)
    else:
        raise Misuse("something is started on another stream than that which is captured: it would not be in the graph")


def refuse_in_capture(what: str) -> None:
    if _captured.stream is not None:
        raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {what} while a stream is captured")


class Graph:
    """The work that a capture recorded. As on a card, it holds addresses and no arrays."""

    def __init__(self, nodes: list[Work]) -> None:
        self._nodes = nodes

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"cupy.cuda.Graph.{name}: {SILENT}")

    def launch(self, stream: Stream | None = None) -> None:
        refuse_in_capture("the launch of a graph")
        for node in self._nodes:
            node()


class Stream:
    """As CuPy's, also as a context manager."""

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self._is_null, self._is_blocking = null, not non_blocking

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"cupy.cuda.Stream.{name}: {SILENT}")

    def __enter__(self) -> Stream:
        _stack.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _stack.pop()

    def begin_capture(self) -> None:
        if self._is_null:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: the default stream cannot be captured")
        if self._is_blocking:
            raise Misuse("a captured stream is non_blocking: others would wait for the default stream meanwhile")
        refuse_in_capture("the capture of another stream")
        _captured.stream, _captured.nodes = self, []

    def end_capture(self) -> Graph:
        if _captured.stream is not self:
            raise CUDARuntimeError("cudaErrorIllegalState: the stream is not being captured")
        _captured.stream = None
        return Graph(_captured.nodes)

    def synchronize(self) -> None:
        refuse_in_capture("waiting")
        LIVE.check_guards()


# The current stream is the last; the default stream is the first.
_stack = [Stream(null=True)]


def get_current_stream() -> Stream:
    return _stack[-1]


class Device:
    """The one card."""

    id: int

    def __init__(self, device: int = 0) -> None:
        if device != 0:
            raise CUDARuntimeError("cudaErrorInvalidDevice: the stand-in has one card")
        self.id = device

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"cupy.cuda.Device.{name}: {SILENT}")

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def synchronize(self) -> None:
        refuse_in_capture("waiting")
        LIVE.check_guards()
