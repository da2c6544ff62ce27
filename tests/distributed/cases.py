"""Trainings of one rank; rank 0 writes the parameters of each as an .npz file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusemlp import (
    FGSM,
    MLP,
    SGD,
    Adam,
    AdamW,
    ArgumentError,
    Callback,
    CrossEntropy,
    DistributedError,
    Engine,
    PReLU,
)

STEPS = 50


@dataclass(frozen=True)
class Case:
    """An engine and a fit of at least ``steps`` steps; those in fp64 are compared with training in one process."""

    engine: Callable[..., Engine]
    steps: int = STEPS
    rows: int = 123
    fit: Mapping[str, Any] = field(default_factory=dict)
    numbers: bool = False
    weighted: bool = False
    validates: bool = False


def engine(*sizes, **options):
    network = {name: options.pop(name) for name in ("dropout", "activation") if name in options}

    def made(**others):
        return Engine(MLP(list(sizes), **network), backend="numpy", seed=5, **{**options, **others})

    return made


MOMENTUM = SGD(lr=0.05, momentum=0.9)
CASES = {
    "momentum": Case(engine(9, 24, 4, optimizer=MOMENTUM, batch_size=32)),
    "momentum fp64": Case(engine(9, 24, 4, optimizer=MOMENTUM, batch_size=32, precision="fp64")),
    "adam": Case(engine(9, 24, 4, optimizer=Adam(lr=0.01), batch_size=32)),
    "adam fp64": Case(engine(9, 24, 4, optimizer=Adam(lr=0.01), batch_size=32, precision="fp64")),
    "batch of 5": Case(engine(9, 12, 4, optimizer=MOMENTUM, batch_size=5, precision="fp64"), rows=58),
    "clipping": Case(engine(9, 24, 4, optimizer=AdamW(lr=0.01, clip_norm=0.1), batch_size=32)),
    "accumulation": Case(engine(9, 24, 4, optimizer=Adam(lr=0.01, accumulate=3), batch_size=32)),
    "accumulation fp64": Case(
        engine(9, 24, 4, optimizer=SGD(lr=0.05, accumulate=3, clip_norm=0.2), batch_size=32, precision="fp64")
    ),
    "dropout": Case(engine(9, 24, 16, 4, dropout=0.3, optimizer=Adam(lr=0.01), batch_size=32)),
    "dropout fp64": Case(
        engine(9, 24, 16, 4, dropout=0.3, activation=PReLU(0.2), optimizer=MOMENTUM, batch_size=32, precision="fp64")
    ),
    "weights fp64": Case(
        engine(
            9, 24, 4, loss=CrossEntropy(label_smoothing=0.1, class_weight=[1.0, 2.0, 0.5, 1.0]), optimizer=MOMENTUM,
            batch_size=32, precision="fp64",
        ),
        weighted=True,
    ),
    "numbers": Case(engine(9, 24, 3, loss="huber", activation="gelu", batch_size=32, optimizer=MOMENTUM), numbers=True),
    "average fp64": Case(
        engine(9, 24, 3, loss="mse", batch_size=32, optimizer=AdamW(lr=0.01, ema=0.9), precision="fp64"), numbers=True
    ),
    # wide enough for several tasks of the compiled loop in a shard, whose sums have their order; float64 shows it
    "wide fp64": Case(
        engine(
            64, 256, 4, dropout=0.1, activation=PReLU(0.2), optimizer=MOMENTUM, batch_size=512, precision="fp64"
        ),
        rows=1100,
    ),
    "early stopping": Case(
        engine(9, 24, 4, optimizer=Adam(lr=0.05), batch_size=32, normalise=True),
        fit={"early_stopping": 2, "epochs": 60},
        validates=True,
    ),
}  # fmt: skip

# The cases of a world of each size: all of one and two, fewer of larger ones, which take longer.
FEWER = ("momentum", "batch of 5", "accumulation", "dropout fp64", "weights fp64", "wide fp64", "early stopping")
WHOLE_IN = {1: CASES, 2: CASES, 4: {name: CASES[name] for name in FEWER}, 8: {"adam": CASES["adam"]}}


def data(case):
    """Return the arguments of ``fit``."""
    made = case.engine()
    generator = np.random.default_rng(7)
    inputs, outputs = made.network.sizes[0], made.network.sizes[-1]
    X = generator.normal(size=(case.rows + 40, inputs))
    y = generator.normal(size=(case.rows + 40, outputs))
    if not case.numbers:
        y = (X[:, :outputs] + 0.5 * y).argmax(axis=1)
    batches = -(-case.rows // made.batch_size)
    given = {"X": X[: case.rows], "y": y[: case.rows], "epochs": -(-case.steps // batches)}
    if case.weighted:
        given["sample_weight"] = generator.uniform(0.0, 2.0, case.rows)
    if case.validates:
        given["validation_data"] = X[case.rows :], y[case.rows :]
    return {**given, **case.fit}


def trained(case, **others):
    """Return the parameters, optimizer state and history after the fit of a case."""
    made = case.engine(**others)
    history = made.fit(**data(case))
    states = [f"state{index}" for index in range(len(made.memory.states))]
    arrays = {name: made.memory.arrays[name] for name in ("params", "counters", *states)}
    return arrays | {f"history {name}": np.array(values) for name, values in history.history.items()}


class StopsOnRank(Callback):
    """Stops training on one rank alone."""

    def __init__(self, rank):
        self.rank = rank

    def on_epoch_end(self, engine, epoch, logs):
        if epoch == 1 and engine.ranks.together and engine.ranks.rank == self.rank:
            engine.stop_training = True


def message(run, error):
    try:
        run()
    except error as raised:
        return str(raised)
    raise AssertionError("no error")


def refusals(rank):
    """Return the errors of what ranks do not share, or cannot do together."""
    case = CASES["momentum"]
    given = data(case)
    made = case.engine(distributed=True)
    other = {**given, "X": given["X"] + (rank == 1)}
    before = made.memory.params.copy()
    found = {
        "seed": message(lambda: Engine(MLP([9, 4]), seed=rank, backend="numpy", distributed=True), DistributedError),
        "loss": message(
            lambda: Engine(MLP([9, 4]), "mse" if rank else "mae", backend="numpy", distributed=True), DistributedError
        ),
        "reduce": message(
            lambda: case.engine(distributed=True, reduce="fast" if rank else "ordered"), DistributedError
        ),
        "data": message(lambda: made.fit(**other), DistributedError),
        "epochs": message(lambda: made.fit(**{**given, "epochs": 1 + rank}), DistributedError),
        "step": message(lambda: made.step(given["X"][:8], given["y"][:8]), ArgumentError),
        "adversarial": message(lambda: made.fit(**given, adversarial=FGSM(0.1)), ArgumentError),
        "plan": message(lambda: case.engine(distributed=True, plan="eager"), ArgumentError),
    }
    assert np.array_equal(made.memory.params, before)
    # and an engine that was refused something trains on
    made.fit(**given, callbacks=[StopsOnRank(1)])
    return found | {"stopped": str(made.epochs_trained)}


def in_torch(case, rank):
    """Return the parameters of the same training by torch's DistributedDataParallel, in float64, on two ranks."""
    import torch

    made, given = case.engine(), data(case)
    sizes, batch = made.network.sizes, made.batch_size
    module = torch.nn.Sequential(
        torch.nn.Linear(sizes[0], sizes[1]), torch.nn.ReLU(), torch.nn.Linear(sizes[1], sizes[2])
    ).double()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in made.state_dict().items()})
    shared = torch.nn.parallel.DistributedDataParallel(module)
    updates = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    X, y = torch.from_numpy(given["X"]), torch.from_numpy(given["y"])
    from fusemlp_kernels.philox import row_order

    for epoch in range(given["epochs"]):
        order = row_order(len(X), made.seed, epoch)
        for start in range(0, len(X), batch):
            rows = order[start : start + batch]
            own = rows[rank::2]
            updates.zero_grad()
            total = torch.nn.functional.cross_entropy(shared(X[own]), y[own], reduction="sum")
            # it averages over the ranks
            (2.0 * total / len(rows)).backward()
            updates.step()
    return np.concatenate([parameter.detach().numpy().ravel() for parameter in module.parameters()])


def main(folder):
    """Train the cases that a world of this size has."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {name: trained(case, distributed=True) for name, case in WHOLE_IN.get(world, {}).items()}
    if world in (2, 3):
        exact = {name: case for name, case in CASES.items() if name.endswith("fp64")}
        found |= {f"{name}, fast": trained(case, distributed=True, reduce="fast") for name, case in exact.items()}
    if world == 2:
        found["torch"] = {"params": in_torch(CASES["momentum fp64"], rank)}
        print(refusals(rank))
    if rank == 0:
        for name, arrays in found.items():
            np.savez(folder / f"{name}.npz", **arrays)
