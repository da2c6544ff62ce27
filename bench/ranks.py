"""Worlds of ranks that torchrun starts, with contenders that take turns; for ``bench.scale``."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from multiprocessing.connection import Client, Listener
from typing import Any

import numpy as np

from bench.cases import Array, Case, Data, make_data
from bench.hardware import ROOT
from bench.measure import AGREEMENT

# The contenders: two reductions of fusemlp and torch's DistributedDataParallel; one process on all cores; and the
# arithmetic of a rank of DDP without its collectives.
ORDERED, FAST, DDP, ALONE, BARE = "ordered", "fast", "ddp", "alone", "bare"
THREADS = ("OMP_", "OPENBLAS_", "MKL_", "FUSEMLP_NUM_THREADS")
# Returns the seconds of a step over some epochs, in all and in collectives.
Turn = Callable[[int], tuple[float, float]]


class Seconds:
    """The seconds in the steps of ``fit``, and in the collectives of these steps."""

    def __init__(self) -> None:
        self.steps = self.collectives = 0.0
        self._inside = False

    def watch(self, owner: type, name: str, *, steps: bool) -> None:
        """Count the seconds in a method of a class."""
        method = getattr(owner, name)

        def timed(*given: Any) -> Any:
            before, self._inside = self._inside, self._inside or steps
            began = time.perf_counter()
            try:
                return method(*given)
            finally:
                spent = time.perf_counter() - began
                self._inside = before
                if steps:
                    self.steps += spent
                elif before:
                    self.collectives += spent

        setattr(owner, name, timed)


class Rank:
    """A process of a world: the contenders on one case, a turn at a time."""

    def __init__(self) -> None:
        import torch.distributed as dist

        from fusemlp.runtime.programs import BoundProgram
        from fusemlp.runtime.ranks import Ranks
        from fusemlp.runtime.shards import ShardedProgram

        dist.init_process_group("gloo")
        self.dist, self.seconds = dist, Seconds()
        for program in (BoundProgram, ShardedProgram):
            self.seconds.watch(program, "run_many", steps=True)
        self.seconds.watch(Ranks, "_collective", steps=False)

        self._turns: dict[tuple[int, str], Turn] = {}

    def load(self, case: Case, names: Sequence[str]) -> None:
        """Make the contenders; raise RuntimeError unless they compute the same."""
        import torch

        data, found = make_data(case), {}
        for name in names:
            if name in (DDP, BARE):
                own = slice(self.dist.get_rank(), None, self.dist.get_world_size())
                batches = [
                    # contiguous, in the rows' order on this rank
                    (torch.from_numpy(x[own].copy()), torch.from_numpy(y[own].copy()))
                    for x, y in zip(np.split(data.X, case.steps), np.split(data.y, case.steps), strict=True)
                ]
                turn, parameters = torch_turn(case, batches, shared=name == DDP)
            else:
                turn, parameters = self._engine_turn(case, data, name)
            self._turns[case.batch_size, name] = turn
            turn(1)
            found[name] = parameters()
        found.pop(BARE, None)
        for one, other in pairwise(found):
            worst = float(np.abs(found[one] - found[other]).max())
            if not worst <= AGREEMENT:
                raise RuntimeError(f"{case.name}: {one} and {other} differ by {worst}: not the same computation")

    def turn(self, batch: int, name: str, epochs: int) -> tuple[float, float]:
        """Return the seconds of a step of a contender, over some epochs: in all, and in collectives."""
        return self._turns[batch, name](epochs)

    def clear(self) -> None:
        """Forget the contenders."""
        self._turns.clear()

    def _engine_turn(self, case: Case, data: Data, name: str) -> tuple[Turn, Callable[[], Array]]:
        from fusemlp import MLP, SGD, Engine

        together = {} if name == ALONE else {"distributed": True, "reduce": name}
        engine = Engine(
            MLP(list(case.sizes)), optimizer=SGD(lr=case.learning_rate), batch_size=case.batch_size, backend="numpy",
            normalise=False, **together,
        )  # fmt: skip
        spent = self.seconds

        def turn(epochs: int) -> tuple[float, float]:
            spent.steps = spent.collectives = 0.0
            engine.fit(data.X, data.y, epochs=epochs, shuffle=False)
            return spent.steps / (epochs * case.steps), spent.collectives / (epochs * case.steps)

        return turn, lambda: np.concatenate([array.ravel() for array in engine.state_dict().values()])


def torch_turn(case: Case, batches: Sequence[Any], *, shared: bool) -> tuple[Turn, Callable[[], Array]]:
    """Return a turn of torch on a rank's batches, with the collectives of DDP if ``shared``, and its parameters."""
    import torch
    from torch import nn

    from fusemlp import MLP, Engine

    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(case.sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    module = nn.Sequential(*layers[:-1])
    start = Engine(MLP(list(case.sizes)), backend="numpy").state_dict()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in start.items()})
    trained = nn.parallel.DistributedDataParallel(module) if shared else module
    optimizer = torch.optim.SGD(module.parameters(), lr=case.learning_rate)

    def turn(epochs: int) -> tuple[float, float]:
        began = time.perf_counter()
        for _ in range(epochs):
            for x, y in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(trained(x), y).backward()
                optimizer.step()
        return (time.perf_counter() - began) / (epochs * len(batches)), 0.0

    return turn, lambda: torch.cat([one.detach().ravel() for one in module.parameters()]).numpy().copy()


def serve(address: str) -> None:
    """Take turns as the parent asks; rank 0 alone hears it and tells the others."""
    rank = Rank()
    leads = rank.dist.get_rank() == 0
    with ExitStack() as stack:
        parent = stack.enter_context(Client(address)) if leads else None
        while True:
            asked = [parent.recv() if parent is not None else None]
            rank.dist.broadcast_object_list(asked, src=0)
            if asked[0] is None:
                break
            method, *given = asked[0]
            answer = getattr(rank, method)(*given)
            if parent is not None:
                parent.send(answer)
    rank.dist.destroy_process_group()


class World:
    """The parent's end of some ranks; ``threads`` a rank, None for all cores."""

    def __init__(self, ranks: int, threads: int | None, stack: ExitStack) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(THREADS)}
        told = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "FUSEMLP_NUM_THREADS"), str(threads))
        path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        listener = stack.enter_context(Listener())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        self._process = subprocess.Popen(
            [*command, "-m", "bench.ranks", str(listener.address)], env=kept | told | {"PYTHONPATH": path}
        )
        stack.callback(self.end)
        threading.Thread(target=self._watch, args=(listener.address,), daemon=True).start()
        self._listener, self._connection = listener, None

    def _watch(self, address: Any) -> None:
        """Connect in place of a world that has ended, so that nothing waits for it."""
        self._process.wait()
        with suppress(OSError):
            Client(address).close()

    def ask(self, *asked: Any) -> Any:
        """Return the answer of rank 0; raises RuntimeError if the world has ended."""
        try:
            if self._connection is None:
                self._connection = self._listener.accept()
            self._connection.send(asked)
            return self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError("a rank has ended; see what it said itself") from None

    def end(self) -> None:
        """End the ranks."""
        with suppress(OSError):
            if self._connection is None:
                self._process.terminate()
            else:
                self._connection.send(None)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


if __name__ == "__main__":
    serve(sys.argv[1])
