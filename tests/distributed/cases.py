"""Trainings of one rank; rank 0 writes the parameters of each as an .npz file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fusemlp
from fusemlp_kernels.coding import Coding, Column

STEPS = 20


@dataclass(frozen=True)
class Case:
    """An engine and a fit of at least ``steps`` steps; those in fp64 are compared with training in one process."""

    sizes: tuple[int | fusemlp.Residual, ...]
    options: Mapping[str, Any]
    steps: int = STEPS
    rows: int = 123
    fit: Mapping[str, Any] = field(default_factory=dict)
    numbers: bool = False
    weighted: bool = False
    validates: bool = False
    coded: bool = False
    gaps: bool = False

    def engine(self, **others):
        options = {"backend": "numpy", "batch_size": 32, **self.options, **others}
        network = {name: options.pop(name) for name in ("dropout", "activation", "norm") if name in options}
        return fusemlp.Engine(fusemlp.MLP(self.sizes, **network), seed=5, **options)


def absolute(outputs, targets, weights):
    """Return the weighted mean of absolute errors, and its gradient."""
    errors, shares = outputs - targets, (weights / weights.sum() / outputs.shape[1])[:, None]
    return (shares * np.abs(errors)).sum(), shares * np.sign(errors)


SMALL, DEEPER, FP64 = (9, 24, 4), (9, 24, 16, 4), {"precision": "fp64"}
MOMENTUM, ADAM = {"optimizer": fusemlp.SGD(lr=0.05, momentum=0.9)}, {"optimizer": fusemlp.Adam(lr=0.01)}
SLOPES, WEIGHTS = {"activation": fusemlp.PReLU(0.2)}, [1.0, 2.0, 0.5, 1.0]
SMOOTHED = {"loss": fusemlp.CrossEntropy(label_smoothing=0.1, class_weight=WEIGHTS)}
CASES = {
    "momentum": Case(SMALL, MOMENTUM),
    "momentum fp64": Case(SMALL, MOMENTUM | FP64),
    "adam": Case(SMALL, ADAM),
    "adam fp64": Case(SMALL, ADAM | FP64),
    "batch of 5": Case((9, 12, 4), {**MOMENTUM, **FP64, "batch_size": 5}, rows=58),
    "clipping": Case(SMALL, {"optimizer": fusemlp.AdamW(lr=0.01, clip_norm=0.1)}),
    "accumulation": Case(SMALL, {"optimizer": fusemlp.Adam(lr=0.01, accumulate=3)}),
    "accumulation fp64": Case(SMALL, {"optimizer": fusemlp.SGD(lr=0.05, accumulate=3, clip_norm=0.2), **FP64}),
    "dropout": Case(DEEPER, {**ADAM, "dropout": 0.3}),
    "dropout fp64": Case(DEEPER, {**MOMENTUM, **SLOPES, **FP64, "dropout": 0.3}),
    "norms fp64": Case(
        (9, 24, fusemlp.Residual(16), 4), {"optimizer": fusemlp.SGD(lr=0.05, accumulate=3), "norm": "layer", **FP64}
    ),
    "weights fp64": Case(SMALL, {**MOMENTUM, **SMOOTHED, **FP64}, weighted=True),
    "numbers": Case((9, 24, 3), {**MOMENTUM, "loss": "huber", "activation": "gelu"}, numbers=True),
    "average fp64": Case(
        (9, 24, 3), {"loss": "mse", "optimizer": fusemlp.AdamW(lr=0.01, ema=0.9), **FP64}, numbers=True
    ),
    # wide enough for several tasks of the compiled loop in a shard, whose sums have their order; float64 shows it
    "wide fp64": Case((64, 256, 4), {**MOMENTUM, **SLOPES, **FP64, "dropout": 0.1, "batch_size": 512}, rows=1100),
    "function fp64": Case((9, 24, 3), {**ADAM, **FP64, "loss": absolute}, numbers=True, weighted=True, validates=True),
    "gaps fp64": Case(
        (9, 24, 3), {"loss": fusemlp.MSE(missing=True), "optimizer": fusemlp.SGD(lr=0.05, accumulate=3), **FP64},
        numbers=True, gaps=True,
    ),
    "gaussian sum fp64": Case(
        (9, 24, 6), {"loss": fusemlp.GaussianNLL(missing=True, reduction="sum"), **ADAM, **FP64},
        numbers=True, gaps=True,
    ),
    "columns": Case((27, 24, 4), ADAM, coded=True, validates=True),
    "columns fp64": Case((27, 24, 4), {**MOMENTUM, **FP64, "batch_size": 64}, coded=True),
    "early stopping": Case(
        SMALL, {"optimizer": fusemlp.Adam(lr=0.05), "normalise": True}, fit={"early_stopping": 2, "epochs": 60},
        validates=True,
    ),
}  # fmt: skip

# The cases of a world of each size: all of one and two, fewer of larger ones, which take longer.
FEWER = (
    "momentum",
    "batch of 5",
    "accumulation",
    "dropout fp64",
    "norms fp64",
    "weights fp64",
    "function fp64",
    "wide fp64",
    "early stopping",
)
WHOLE_IN = {1: CASES, 2: CASES, 4: {name: CASES[name] for name in FEWER}, 8: {"adam": CASES["adam"]}}


def data(case):
    """Return the arguments of ``fit``."""
    made = case.engine()
    generator = np.random.default_rng(7)
    inputs, outputs = made.network.sizes[0], made.network.sizes[-1] // made.loss.width
    X = generator.normal(size=(case.rows + 40, inputs))
    y = generator.normal(size=(case.rows + 40, outputs))
    if not case.numbers:
        y = (X[:, :outputs] + 0.5 * y).argmax(axis=1)
    if case.gaps:
        y[generator.uniform(size=y.shape) < 0.3] = np.nan
    if case.coded:
        words, pieces = generator.integers(0, 12, len(X)), generator.integers(0, 15, len(X))
        coding = Coding((Column("word", 12), Column("pieces", 15)))
        X = fusemlp.Columns(coding, np.column_stack([words, pieces, X[:, 0]]))
    batches = -(-case.rows // made.batch_size)
    given = {"X": X[: case.rows], "y": y[: case.rows], "epochs": -(-case.steps // batches)}
    if case.weighted:
        given["sample_weight"] = generator.uniform(0.0, 2.0, case.rows)
    if case.validates:
        given["validation_data"] = X[case.rows :], y[case.rows :], *([np.ones(40)] if case.weighted else [])
    return {**given, **case.fit}


def trained(case, **others):
    """Return the parameters, optimizer state and history after the fit of a case."""
    made = case.engine(**others)
    history = made.fit(**data(case))
    states = [f"state{index}" for index in range(len(made.memory.states))]
    arrays = {name: made.memory.arrays[name] for name in ("params", "counters", *states)}
    return arrays | {f"history {name}": np.array(values) for name, values in history.history.items()}


class StopsOnRank(fusemlp.Callback):
    """Stops training on one rank alone."""

    def __init__(self, rank):
        self.rank = rank

    def on_epoch_end(self, engine, epoch, logs):
        if epoch == 1 and engine.ranks.together and engine.ranks.rank == self.rank:
            engine.stop_training = True


def message(run):
    """Return the error of a call: a DistributedError where ranks differ, else an ArgumentError."""
    try:
        run()
    except (fusemlp.DistributedError, fusemlp.ArgumentError) as error:
        assert isinstance(error, fusemlp.DistributedError) == str(error).startswith("distributed: ")
        return str(error)
    raise AssertionError("no error")


def refusals(rank):
    """Return the errors of what ranks do not share, or cannot do together."""
    case = CASES["momentum"]
    given, net, alike = data(case), fusemlp.MLP([9, 4]), {"backend": "numpy", "distributed": True}
    made = case.engine(distributed=True)
    rows, coded = data(CASES["columns"]), CASES["columns"].engine(distributed=True)
    before = made.memory.params.copy()
    refused = {
        "seed": lambda: fusemlp.Engine(net, seed=rank, **alike),
        "loss": lambda: fusemlp.Engine(net, "mse" if rank else "mae", **alike),
        "reduce": lambda: case.engine(distributed=True, reduce="fast" if rank else "ordered"),
        "data": lambda: made.fit(**{**given, "X": given["X"] + (rank == 1)}),
        "codes": lambda: coded.fit(**{**rows, "X": rows["X"][:: 1 - 2 * (rank == 1)]}),
        "epochs": lambda: made.fit(**{**given, "epochs": 1 + rank}),
        "step": lambda: made.step(given["X"][:8], given["y"][:8]),
        "adversarial": lambda: made.fit(**given, adversarial=fusemlp.FGSM(0.1)),
        "plan": lambda: case.engine(distributed=True, plan="eager"),
    }
    found = {name: message(run) for name, run in refused.items()}
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
