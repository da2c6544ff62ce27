"""Measure the host's work for a GPU where there is none. ``python -m bench host``

Triton's compiler compiles the kernels for an H100, and a driver that starts nothing takes their launches; a replay of a
graph is an empty call. So the times are Python's, torch's and Triton's, without the driver of a card: what the host
takes before a card can begin. They are processor time of the one thread that works, which other processes hardly
disturb. Results are nonsense and no part of this study. Copies between host and device cost what they cost in host
memory.
"""

from __future__ import annotations

import contextlib
import sys
import time
import types
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench.measure import spread
from bench.report import Record
from bench.study import count, finish, parse, parser, say, table

SIZES, BATCH, STEPS = (784, 128, 10), 128, 469
ROWS = STEPS * BATCH - 32
DOORS: dict[str, dict[str, Any]] = {
    "fit, plan graph": {"plan": "graph"},
    "fit, plan graph, data on the card": {"plan": "graph", "on_card": True},
    "fit, plan eager": {"plan": "eager"},
    "fit, plan resident, a callback after each epoch": {"plan": "resident"},
    "fit on batches in host memory, plan graph": {"plan": "graph", "batches": True},
}


class Gaps:
    """The host's time from the wait at the end of an epoch to the next replay: the card has no work meanwhile."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self._since: float | None = None

    def waited(self) -> None:
        """Note a wait; the first after a replay counts."""
        if self._since is None:
            self._since = time.thread_time()

    def replayed(self) -> None:
        """Note a replay."""
        if self._since is not None:
            self.taken.append(time.thread_time() - self._since)
            self._since = None


gaps = Gaps()


class Driver:
    """A driver of Triton for an H100 that is not there: it loads no binary and starts nothing."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (object(), 0, 0, 0, 1024),
        unload_module=lambda *_: None,
        get_device_properties=lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132},
    )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: None


def pretend() -> None:
    """Let this process take the CPU's memory for a card's, and start nothing there."""
    import dataclasses

    import torch
    from triton.runtime import driver

    from fusemlp_kernels import registry
    from fusemlp_kernels.triton import backend, configs
    from fusemlp_kernels.triton.launch import TritonDevice

    driver.set_active(Driver())
    torch.set_num_threads(1)
    here: Any = torch.cuda
    here.device = lambda _: contextlib.nullcontext()
    here.synchronize = lambda *_: None
    stream = types.SimpleNamespace(cuda_stream=0, wait_stream=lambda _: None)
    here.current_stream, here.is_current_stream_capturing = lambda *_: stream, lambda: False
    internals: Any = torch._C
    internals._cuda_getCurrentRawStream = lambda _: stream.cuda_stream
    placed = TritonDevice(torch.device("cpu"), configs.Architecture("sm_90", 132), "fp32", torch.float32, False)
    made: Any = backend
    made.open_device = lambda name, precision: dataclasses.replace(placed, precision=precision)
    made.TritonBackend.capture = lambda self, run, times: gaps.replayed
    tensor: Any = torch.Tensor
    to_host = tensor.cpu
    tensor.cpu = lambda self: (gaps.waited(), to_host(self))[1]
    found: Any = registry
    found._triton_reason = lambda: None


def of_fit(plan: str, rounds: int, *, batches: bool = False, on_card: bool = False) -> dict[str, float]:
    """Return the seconds of another ``fit`` of one epoch beyond the epoch, of an epoch, and of a step in it.

    ``batches``: the data comes in batches; ``on_card``: it is on the card. On graphs also the time from the end of an
    epoch to the first replay of the next, the smaller ones: others are from fit to fit.
    """
    from fusemlp import MLP, Adam, Engine

    generator = np.random.default_rng(0)
    X: Any = generator.standard_normal((ROWS, SIZES[0]), dtype=np.float32)
    y: Any = generator.integers(0, SIZES[-1], ROWS)
    if batches:
        X, y = [(X[at : at + BATCH], y[at : at + BATCH]) for at in range(0, ROWS, BATCH)], None
    engine = Engine(MLP(SIZES), optimizer=Adam(1e-3), batch_size=BATCH, backend="triton", plan=plan, normalise=False)
    taken: dict[int, list[float]] = {1: [], 5: []}
    # the resident plan launches epochs one by one only where something runs between them
    callbacks = [SimpleNamespace(on_epoch_end=lambda *_: None)] if plan == "resident" else []
    if on_card:
        X, y = map(engine.memory.backend.from_host, (X, y))
    engine.fit(X, y, epochs=1, callbacks=callbacks)
    gaps.taken.clear()
    for _ in range(rounds):
        for epochs, seconds in taken.items():
            began = time.thread_time()
            engine.fit(X, y, epochs=epochs, callbacks=callbacks)
            seconds.append(time.thread_time() - began)
    once, often = (spread(seconds).p50 for seconds in taken.values())
    epoch = (often - once) / 4
    found = {"call": once - epoch, "epoch": epoch, "step": epoch / STEPS}
    between = sorted(gaps.taken)[: 4 * rounds]
    return found | ({"gap": spread(between).p50} if between and not batches else {})


def of_calls(step: Callable[[], object], rounds: int, steps: int = 1) -> dict[str, float]:
    """Return the seconds of a step by hand; each call takes ``steps``, an epoch if several."""
    at_once, taken = max(1, 10 // steps), []
    for _ in range(1 + max(1, 20 // steps) * rounds):
        began = time.thread_time()
        for _ in range(at_once):
            step()
        taken.append((time.thread_time() - began) / at_once)
    # the first compiles
    call = spread(taken[1:]).p50
    return {"step": call / steps, **({"epoch": call} if steps > 1 else {})}


def fused_step() -> Callable[[], object]:
    """Return a step of ``fusemlp.torch.fuse`` with Adam."""
    import torch
    from torch import nn

    from fusemlp.torch import fuse

    layers = [nn.Linear(SIZES[0], SIZES[1]), nn.ReLU(), nn.Linear(SIZES[1], SIZES[2])]
    module = nn.Sequential(*layers)
    step = fuse(module, nn.CrossEntropyLoss(), torch.optim.Adam(module.parameters()), backend="triton")
    x, y = torch.randn(BATCH, SIZES[0]), torch.randint(SIZES[-1], (BATCH,))
    return lambda: step(x, y)


def engine_step() -> Callable[[], object]:
    """Return ``Engine.step`` with Adam on arrays in host memory."""
    from fusemlp import MLP, Adam, Engine

    engine = Engine(MLP(SIZES), optimizer=Adam(1e-3), batch_size=BATCH, backend="triton", plan="graph", normalise=False)
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((BATCH, SIZES[0]), dtype=np.float32), generator.integers(0, SIZES[-1], BATCH)
    return lambda: engine.step(x, y)


def layers_step() -> Callable[[], object]:
    """Return forward and backward of ``fusemlp.torch.FusedMLP``, for a gradient of its outputs."""
    import torch

    from fusemlp.torch import FusedMLP, layers

    made: Any = layers
    made.torch_backend = lambda _: "triton"
    module = FusedMLP(SIZES)
    x, gradient = torch.randn(BATCH, SIZES[0]), torch.randn(BATCH, SIZES[-1])
    return lambda: module(x).backward(gradient)


def estimator_epoch() -> Callable[[], object]:
    """Return ``partial_fit`` of ``fusemlp.sklearn.MLPClassifier`` on the rows of an epoch, in host memory."""
    from fusemlp.sklearn import MLPClassifier

    generator = np.random.default_rng(0)
    X, y = generator.standard_normal((ROWS, SIZES[0]), dtype=np.float32), generator.integers(0, SIZES[-1], ROWS)
    model = MLPClassifier(SIZES[1:-1], batch_size=BATCH, backend="triton")
    return lambda: model.partial_fit(X, y, classes=range(SIZES[-1]))


STEPPED = {
    "Engine.step, arrays in host memory": engine_step,
    "fuse, tensors on the device": fused_step,
    "FusedMLP, forward and backward": layers_step,
    "MLPClassifier.partial_fit, arrays in host memory": estimator_epoch,
}


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:,.1f}"


def text(lines: Sequence[Record]) -> str:
    """Return the table, in microseconds; the lines of a door under different labels stand together."""
    names = ("step", "epoch", "gap", "call")
    doors = list(dict.fromkeys(line["door"] for line in lines))
    rows = [
        [door, line["label"], *(_microseconds(line["seconds"].get(name)) for name in names)]
        for door in doors
        for line in lines
        if line["door"] == door
    ]
    shape = "-".join(map(str, SIZES))
    heads = ("door", "version", "a step", "an epoch", "of it, while the card waits", "another fit beyond its epochs")
    return (
        f"### Host microseconds: {shape}, batch {BATCH}, Adam, {STEPS} steps an epoch, launches that start nothing\n\n"
        + table(heads, rows)
        + "\n\nProcessor time of the thread that works. With `fit`, a step is an epoch divided by its steps."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return its exit code."""
    made = parser("host", (__doc__ or "").partition("\n")[0])
    made.add_argument("--rounds", type=count, default=15, metavar="N", help="default: %(default)s")
    made.add_argument("--label", default="this one", help="of the version, in the table; default: %(default)s")
    options = parse(made, arguments)
    pretend()
    common = {"row": "host", "label": options.label, "rounds": options.rounds}
    lines: list[Record] = []
    for door, given in DOORS.items():
        say(door)
        lines.append({**common, "door": door, "seconds": of_fit(rounds=options.rounds, **given)})
    for door, begin in STEPPED.items():
        say(door)
        lines.append(
            {
                **common,
                "door": door,
                "seconds": of_calls(begin(), options.rounds, STEPS if begin is estimator_epoch else 1),
            }
        )
    finish("host", options, lines, text(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
