"""Trainings of one rank on the Triton backend, under its interpreter; rank 0 writes the parameters as .npz files."""

import os

import numpy as np
import quick_interpreter
from cases import Case, trained

from fusemlp import MLP, SGD, Adam, AdamW, CrossEntropy, Engine, ParameterOptions, PReLU, load_checkpoint


def engine(*sizes, **options):
    network = {name: options.pop(name) for name in ("dropout", "activation") if name in options}
    given = {"backend": "triton", "plan": "eager", "batch_size": 20, "normalise": False, **options}

    def made(**others):
        return Engine(MLP(list(sizes), **network), seed=5, **{**given, **others})

    return made


MOMENTUM = SGD(lr=0.05, momentum=0.9)
# 26 rows are a batch of 20 and one of 6, in which most shards are empty
CASES = {
    "dropout": Case(
        engine(9, 12, 4, dropout=0.3, activation=PReLU(0.2), optimizer=Adam(lr=0.01, accumulate=2)), steps=4, rows=26
    ),
    "clipping fp16": Case(
        engine(9, 12, 4, optimizer=AdamW(lr=0.01, clip_norm=0.1, ema=0.9), precision="fp16"), steps=2, rows=26
    ),
    "weights": Case(
        engine(9, 12, 4, loss=CrossEntropy(class_weight=[1.0, 2.0, 0.5, 1.0]), optimizer=MOMENTUM),
        steps=2,
        rows=26,
        weighted=True,
    ),
    "numbers": Case(
        engine(9, 12, 3, loss="huber", activation="gelu", optimizer=MOMENTUM), steps=2, rows=26, numbers=True
    ),
    "early stopping": Case(
        engine(9, 4, optimizer=Adam(lr=0.5)), rows=20, fit={"early_stopping": 1, "epochs": 4}, validates=True
    ),
}


def main(folder):
    """Train all cases, and one from a checkpoint."""
    quick_interpreter.quicken()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {name: trained(case, distributed=True) for name, case in CASES.items()}
    found["weights, fast"] = trained(CASES["weights"], distributed=True, reduce="fast")
    # the gradients by the first layer's weights overflow, and those by the others do not
    frozen = Adam(lr=0.01, per_parameter={"0.bias": ParameterOptions(trainable=False)})
    hot = engine(9, 12, 4, optimizer=frozen, precision="fp16", batch_size=16)(distributed=True)
    state = hot.state_dict()
    hot.load_state_dict({**state, "2.weight": 100.0 * state["2.weight"]})
    inputs, labels = np.random.default_rng(3).normal(size=(20, 9)), np.arange(20) % 4
    hot.fit(inputs, labels, epochs=1)
    found["overflows"] = {"params": hot.memory.snapshot()["params"], "skipped": np.array(hot.skipped_batches)}
    saved = CASES["clipping fp16"].engine(distributed=True)
    saved.fit(inputs, labels, epochs=1)
    path = folder / f"of {world}.safetensors"
    saved.save_checkpoint(path)
    saved.ranks.any(True)
    again = load_checkpoint(path, backend="triton", distributed=True)
    again.fit(inputs, labels, epochs=1)
    found["resumed"] = {name: again.memory.snapshot()[name] for name in ("params", "state0", "state2")}
    if rank == 0:
        print({"plan": again.plan, "reason": again.plan_reason})
        for name, arrays in found.items():
            np.savez(folder / f"{name}.npz", **arrays)
