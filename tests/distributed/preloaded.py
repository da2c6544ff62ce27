"""What all ranks need, for the process that they are forked from: it has no thread and no connection."""

import torch._dynamo  # noqa: F401 - DistributedDataParallel imports it
from cases import CASES, trained

import fusemlp.cli.train  # noqa: F401

# loads the compiled loops
for name in ("adam", "adam fp64"):
    trained(CASES[name])
