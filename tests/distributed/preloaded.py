"""What all ranks need, for the process that they are forked from: it has no thread and no connection."""

import torch._dynamo  # DistributedDataParallel imports it
import torch.distributed  # noqa: F401
from cases import CASES, trained

# loads the compiled loops
for name in ("adam", "adam fp64"):
    trained(CASES[name])
