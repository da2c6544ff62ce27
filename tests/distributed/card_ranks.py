"""Trainings of one rank on the Triton backend, under its interpreter; rank 0 writes the parameters as .npz files."""

import os

import numpy as np
import quick_interpreter
from cases import WEIGHTS, Case, trained

from fusemlp import SGD, Adam, AdamW, CrossEntropy, ParameterOptions, PReLU, load_checkpoint

SMALL = (9, 12, 4)
TRITON = {"backend": "triton", "plan": "eager", "batch_size": 20, "normalise": False}
MOMENTUM = {**TRITON, "optimizer": SGD(lr=0.05, momentum=0.9)}
CLIPPED = AdamW(lr=0.01, clip_norm=0.1, ema=0.9)
DROPPED = {"dropout": 0.3, "activation": PReLU(0.2), "optimizer": Adam(lr=0.01, accumulate=2)}
WEIGHTED = {"loss": CrossEntropy(class_weight=WEIGHTS)}
# 26 rows are a batch of 20 and one of 6, in which most shards are empty
SHORT = {"steps": 2, "rows": 26}
CASES = {
    "dropout": Case(SMALL, TRITON | DROPPED, steps=4, rows=26),
    "clipping fp16": Case(SMALL, {**TRITON, "optimizer": CLIPPED, "precision": "fp16"}, **SHORT),
    "weights": Case(SMALL, MOMENTUM | WEIGHTED, weighted=True, **SHORT),
    "numbers": Case((9, 12, 3), {**MOMENTUM, "loss": "huber", "activation": "gelu"}, numbers=True, **SHORT),
    "early stopping": Case(
        (9, 4), {**TRITON, "optimizer": Adam(lr=0.5)}, rows=20, fit={"early_stopping": 1, "epochs": 4}, validates=True
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
    hot = Case(SMALL, {**TRITON, "optimizer": frozen, "precision": "fp16", "batch_size": 16}).engine(distributed=True)
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
    print({"plan": again.plan, "reason": again.plan_reason})
    if rank == 0:
        for name, arrays in found.items():
            np.savez(folder / f"{name}.npz", **arrays)
