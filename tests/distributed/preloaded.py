"""Imports and compiled loops of all ranks, for the process that they are forked from: it has no thread."""

import torch._dynamo  # noqa: F401 - DistributedDataParallel imports it
from cases import CASES, trained

import fusemlp.cli.train  # noqa: F401

for name in ("adam", "adam fp64"):
    trained(CASES[name])
