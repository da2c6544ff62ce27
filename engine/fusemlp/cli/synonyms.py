"""Names of options in other libraries and programs."""

from __future__ import annotations

_WORDS = {
    "activation": "act activation-function nonlinearity",
    "batch-size": "batch batchsize bs mini-batch-size train-batch-size",
    "clip-norm": "clip clip-grad-norm clipnorm grad-clip gradient-clip gradient-clip-val max-grad-norm",
    "device": "cuda gpu gpus",
    "dropout": "drop-rate dropout-prob dropout-rate",
    "early-stopping": "early-stop early-stopping-patience early-stopping-rounds n-iter-no-change patience",
    "epochs": "epoch iterations max-epochs max-iter n-epochs nb-epoch nb-epochs num-epochs num-train-epochs",
    "hidden": "hidden-dim hidden-layer-sizes hidden-layers hidden-size hidden-units layers units",
    "loss": "criterion loss-fn loss-function objective",
    "lr": "eta learning-rate learning-rate-init lr-init step-size",
    "models": "ensemble ensemble-size n-estimators n-models num-models",
    "optimizer": "opt optim optimiser solver",
    "out": "out-dir output output-dir output-file save-dir",
    "schedule": "lr-schedule lr-schedule-type lr-scheduler scheduler",
    "seed": "random-seed random-state rng-seed",
    "target": "label label-column outcome response target-column",
    "time-limit": "max-time time-budget timeout",
    "validation-fraction": "val-fraction val-split validation-size validation-split",
    "weight-decay": "alpha l2 reg wd",
}
# Options of earlier releases, and what took their place.
REMOVED = {
    "--shard-optimizer": "each process keeps the whole state of the optimizer now; leave it out",
}
# The option for each.
SYNONYMS = {f"--{word}": f"--{option}" for option, words in _WORDS.items() for word in words.split()}
