"""Count the launches of a training step: the calls of fusemlp's program and those of eager PyTorch.

    python -m bench launches 784 128 10 --batch-size 128 --optimizer adam

PyTorch's profiler counts its side: kernels on a GPU, else the operators that compute something. Each of these is at
least one kernel on a GPU. Views do not count, and an operator counts once, without its parts.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fusemlp import MLP
from fusemlp.runtime.plans import plan_text

# Operators that only view memory or dispatch to other operators.
VIEWS = frozenset(
    {
        "aten::t", "aten::transpose", "aten::as_strided", "aten::view", "aten::reshape", "aten::expand", "aten::detach",
        "aten::result_type", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::resolve_conj",
        "aten::to", "aten::lift_fresh", "detach", "aten::is_nonzero", "aten::item", "aten::_local_scalar_dense",
        "aten::unsqueeze", "aten::select", "aten::numpy_T", "aten::broadcast_to", "aten::_reshape_alias",
    }
)  # fmt: skip
# Wrappers around other operators.
CONTAINERS = frozenset(
    {
        "aten::linear", "aten::relu", "aten::cross_entropy_loss", "aten::log_softmax", "aten::nll_loss_nd",
        "aten::nll_loss", "aten::ones_like", "aten::matmul",
    }
)  # fmt: skip
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def torch_launches(widths: list[int], batch_size: int, optimizer: str, *, foreach: bool | None) -> dict[str, int]:
    """Return how often eager PyTorch starts each operator (or kernel) in a step with a batch drawn by index."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers[:-1]).to(device)
    chosen = OPTIMIZERS[optimizer](net.parameters(), lr=0.01, foreach=foreach)
    data, labels = torch.randn(1000, widths[0], device=device), torch.randint(widths[-1], (1000,), device=device)
    rows = torch.randperm(1000, device=device)[:batch_size]

    def step() -> None:
        chosen.zero_grad()
        torch.nn.functional.cross_entropy(net(data[rows]), labels[rows]).backward()
        chosen.step()

    step()
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        step()
    if device == "cuda":
        names = [event.name for event in profiled.events() if not event.name.startswith(("Memset", "Memcpy"))]
    else:
        names = list(computing(event for event in profiled.events() if event.cpu_parent is None))
    return dict(collections.Counter(names).most_common())


def computing(events: Iterable[Any]) -> Iterator[str]:
    """Yield the operators below ``events`` that compute something."""
    for event in events:
        if not event.name.startswith("aten::") or event.name in CONTAINERS:
            yield from computing(event.cpu_children)
        elif event.name not in VIEWS:
            yield event.name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench launches", description=__doc__.split("\n")[0])
    parser.add_argument("widths", type=int, nargs="+", help="inputs, hidden widths, outputs")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adam")
    options = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    if len(options.widths) < 2:
        parser.error(f"widths: expected inputs and outputs at least, such as 784 128 10; got {options.widths}")
    text = plan_text(MLP(options.widths), optimizer=options.optimizer, batch_size=options.batch_size, backend="triton")
    print(f"fusemlp, triton backend:\n{text}\n")
    what = "kernels" if torch.cuda.is_available() else "operators"
    for name, foreach in (("tensor by tensor", False), ("foreach", True)):
        counts = torch_launches(options.widths, options.batch_size, options.optimizer, foreach=foreach)
        print(f"PyTorch {torch.__version__}, eager, optimizer: {name}: {sum(counts.values())} {what}")
        print("  " + ", ".join(f"{count} {operator.removeprefix('aten::')}" for operator, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
