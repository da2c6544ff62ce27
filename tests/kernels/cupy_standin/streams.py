"""Devices, streams and graphs: work runs at once, or is recorded during a capture."""

from cupy_standin.memory import LIVE, CUDARuntimeError, Misuse

SILENT = "the stand-in has no such name"


class _Captured:
    """The stream in capture, if any, and its recorded work."""

    def __init__(self):
        self.stream, self.is_valid = None, True
        self.nodes = []


_captured = _Captured()


def start(work):
    """Run work on the current stream, or record it as a node of the graph in capture."""
    if _captured.stream is None:
        work()
    elif _captured.stream is _stack[-1]:
        _captured.nodes.append(work)
    else:
        raise Misuse("something is started on another stream than that which is captured: it would not be in the graph")


def refuse_in_capture(what):
    if _captured.stream is not None:
        _captured.is_valid = False
        raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {what} while a stream is captured")


class Graph:
    """The work that a capture recorded. As on a card, it holds addresses and no arrays."""

    def __init__(self, nodes):
        self._nodes = nodes

    def __getattr__(self, name):
        raise AttributeError(f"cupy.cuda.Graph.{name}: {SILENT}")

    def launch(self, stream=None):
        refuse_in_capture("the launch of a graph")
        for node in self._nodes:
            node()


class Stream:
    """As CuPy's, also as a context manager."""

    def __init__(self, null=False, non_blocking=False):
        self._is_null, self._is_blocking = null, not non_blocking

    def __getattr__(self, name):
        raise AttributeError(f"cupy.cuda.Stream.{name}: {SILENT}")

    def __enter__(self):
        _stack.append(self)
        return self

    def __exit__(self, *_):
        _stack.pop()

    def begin_capture(self):
        if self._is_null:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: the default stream cannot be captured")
        if self._is_blocking:
            raise Misuse("a captured stream is non_blocking: others would wait for the default stream meanwhile")
        refuse_in_capture("the capture of another stream")
        _captured.stream, _captured.is_valid, _captured.nodes = self, True, []

    def end_capture(self):
        if _captured.stream is not self:
            raise CUDARuntimeError("cudaErrorIllegalState: the stream is not being captured")
        _captured.stream = None
        if not _captured.is_valid:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated: something refused has ended the capture")
        return Graph(_captured.nodes)

    def is_capturing(self):
        return _captured.stream is self

    def record(self, event=None):
        return Event(self)

    def wait_event(self, event):
        refuse_in_capture("an event of another stream")
        WAITS.append((self, event.stream))

    def synchronize(self):
        refuse_in_capture("waiting")
        LIVE.check_guards()


# The waits for events: (the stream that waits, the other).
WAITS = []


class Event:
    """As CuPy's; work runs at once, so that it has happened."""

    def __init__(self, stream):
        self.stream = stream


# The current stream is the last; the default stream is the first.
_stack = [Stream(null=True)]


def get_current_stream(device_id=-1):
    return _stack[-1]


class Device:
    """The one card."""

    id: int

    def __init__(self, device=0):
        if device != 0:
            raise CUDARuntimeError("cudaErrorInvalidDevice: the stand-in has one card")
        self.id = device

    def __getattr__(self, name):
        raise AttributeError(f"cupy.cuda.Device.{name}: {SILENT}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def synchronize(self):
        refuse_in_capture("waiting")
        LIVE.check_guards()
