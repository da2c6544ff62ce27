"""Time eager PyTorch and ``fusemlp.torch.fuse``: the same module, batches and optimizer, in one process, in turn.

The first rows are steps over batches that are there already. Those of ``LOOPS`` include the time for a batch from a
shuffled ``DataLoader``, or from ``fusemlp.torch.Batches``. In those of ``LAYERS`` both sides are the same eager loop,
one over ``nn.Sequential``, the other over ``fusemlp.torch.FusedMLP``. The last ones are predictions of the class of a
few rows, by the module and by ``Engine.predict`` of ``fusemlp.torch.from_torch``.

``python -m bench torch_door`` prints a table. Both run once in each round, in alternating order, with a pause in which
the threads of the first one's BLAS go to sleep. A turn counts with its median step, which limits the influence of other
processes; a ratio compares two turns of one round. The losses after the first round must agree, because both sides make
the same updates.
"""

from __future__ import annotations

import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bench.doors import finish, line, parser
from bench.measure import AGREEMENT, PAUSE_SECONDS
from bench.report import Record
from bench.study import count
from fusemlp.torch import Batches, FusedMLP, from_torch, fuse

CASES = (((784, 128, 10), 64), ((64, 32, 10), 32))
LAYERS = (*CASES, ((784, 512, 256, 10), 128))
PREDICTIONS = (((64, 64, 64, 4), 1), ((64, 64, 64, 4), 16))
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "SGD, momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
}
# The sources of the batches of the eager loop and of the fused one.
LOOPS = (("DataLoader", "DataLoader"), ("DataLoader", "Batches"), ("Batches", "Batches"))
Step = Callable[[Tensor, Tensor], Tensor]
Data = Iterable[Sequence[Tensor]]


def eager_step(module: nn.Module, loss_fn: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Run the four calls that ``fuse`` replaces."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(module(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def batches(width: int, classes: int, rows: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return standard normal features, and labels from a random linear teacher."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(width, classes, generator=generator)
    drawn = [torch.randn(rows, width, generator=generator) for _ in range(count)]
    return [(x, (x @ teacher).argmax(dim=1)) for x in drawn]


def module_of(sizes: Sequence[int]) -> nn.Sequential:
    """Return a network with relu between its layers."""
    torch.manual_seed(0)
    layers = [part for i, o in itertools.pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def source_of(kind: str, data: Sequence[tuple[Tensor, Tensor]]) -> Data:
    """Return the batches of ``data`` themselves (""), or a source that shuffles their rows anew in each epoch."""
    if not kind:
        return data
    rows = len(data[0][0])
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    if kind == "Batches":
        return Batches(x, y, batch_size=rows)
    made: Data = DataLoader(TensorDataset(x, y), batch_size=rows, shuffle=True)
    return made


def compare(
    sizes: tuple[int, ...],
    rows: int,
    name: str,
    *,
    rounds: int,
    steps: int,
    loop: tuple[str, str] = ("", ""),
    layers: bool = False,
) -> Record:
    """Return a row of the table.

    ``loop``: the sources of the batches of both sides. ``layers``: the second side is ``FusedMLP`` in an eager loop.
    """
    twin = module_of(sizes)
    module = FusedMLP(sizes) if layers else copy.deepcopy(twin)
    module.load_state_dict(twin.state_dict())
    loss_fn = nn.CrossEntropyLoss()
    contenders: list[Step] = [
        eager_step(twin, loss_fn, OPTIMIZERS[name](twin.parameters())),
        (eager_step if layers else fuse)(module, loss_fn, OPTIMIZERS[name](module.parameters())),
    ]
    data = batches(sizes[0], sizes[-1], rows, steps)
    sources = [source_of(kind, data) for kind in loop]
    losses = [0.0, 0.0]
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for which in (0, 1) if turn % 2 else (1, 0):
            step = contenders[which]
            time.sleep(PAUSE_SECONDS)
            for x, y in data[:5]:
                step(x, y)
            times = [time.perf_counter()]
            # the first round compares the losses, and has the same batches for both
            for x, y in sources[which] if turn else data:
                loss = step(x, y)
                times.append(time.perf_counter())
            losses[which] = float(loss.detach())
            if turn:
                seconds[which].append(float(np.median(np.diff(times))))
        if turn == 0 and not abs(losses[0] - losses[1]) <= AGREEMENT * abs(losses[0]):
            raise RuntimeError(f"{sizes}, {name}: after {steps} steps the losses are {losses[0]} and {losses[1]}")
    sides = ", FusedMLP in an eager loop" if layers else f", {loop[0]} and {loop[1]}" if any(loop) else ""
    return line(f"{'-'.join(map(str, sizes))}@{rows}, {name}{sides}", *seconds)


def predictions(sizes: tuple[int, ...], rows: int, *, rounds: int, steps: int) -> Record:
    """Return a row of the table: the prediction of the classes of these rows."""
    module = module_of(sizes)
    engine = from_torch(module)
    ((x, _),) = batches(sizes[0], sizes[-1], rows, 1)
    array = x.numpy()

    def theirs() -> Tensor:
        with torch.no_grad():
            return module(x).argmax(dim=1)

    def ours() -> Tensor:
        return torch.from_numpy(engine.predict(array))

    if not torch.equal(theirs(), ours()):
        raise RuntimeError(f"{sizes}: torch predicts {theirs()}, and fusemlp {ours()}")

    def median(predict: Callable[[], Tensor]) -> float:
        times = [time.perf_counter()]
        for _ in range(steps):
            predict()
            times.append(time.perf_counter())
        return float(np.median(np.diff(times)))

    seconds: list[list[float]] = [[], []]
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            time.sleep(PAUSE_SECONDS)
            seconds[which].append(median((theirs, ours)[which]))
    return line(f"{'-'.join(map(str, sizes))}@{rows}, a prediction", *seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the lines, print the table."""
    made = parser("torch_door", (__doc__ or "").partition("\n")[0], 15)
    made.add_argument("--steps", type=count, default=100, metavar="N", help="steps of a turn (default: %(default)s)")
    options = made.parse_args(arguments)
    turns = {"rounds": options.rounds, "steps": options.steps}
    lines = [compare(sizes, rows, name, **turns) for sizes, rows in CASES for name in OPTIMIZERS]
    lines += [compare(sizes, rows, "Adam", loop=loop, **turns) for sizes, rows in CASES for loop in LOOPS]
    lines += [compare(sizes, rows, name, layers=True, **turns) for sizes, rows in LAYERS for name in ("SGD", "Adam")]
    lines += [predictions(sizes, rows, **turns) for sizes, rows in PREDICTIONS]
    headers = ["network@batch, optimizer, source of batches", "eager PyTorch", "fusemlp"]
    finish("torch_door", ("torch",), lines, options.out, headers=headers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
