"""The libraries that are measured, one file a library.

Each file has ``prepare(case, data) -> Trainer``. To add a peer, write such a file and name it in ``PEERS``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from bench.cases import Array, Case, Data


class Trainer(Protocol):
    """A network bound to its data, trained in the way that its library's users would write it."""

    def reset(self) -> None:
        """Go back to the initial parameters."""

    def train(self, epochs: int) -> None:
        """Make ``epochs`` passes over the data, each in a new random order; return when they are finished.

        What is timed. The mean training loss of each epoch is computed too, as every training loop does that reports
        how it is getting on.
        """

    def train_in_order(self, order: Array) -> None:
        """One pass over the rows in ``order``, a permutation."""

    def parameters(self) -> list[tuple[Array, Array]]:
        """For each layer the weight (outputs, inputs) and the bias (outputs,)."""


@dataclass(frozen=True)
class Peer:
    """How a peer is called in tables, and the package that it needs."""

    label: str
    package: str


# The first is what the others are compared with.
PEERS = {
    "engine": Peer("fusemlp", "fusemlp"),
    "torch_eager": Peer("PyTorch eager", "torch"),
    "sklearn_mlp": Peer("scikit-learn", "sklearn"),
    "jax_jit": Peer("JAX jit", "jax"),
    "jax_scan": Peer("JAX lax.scan", "jax"),
}
REFERENCE = "engine"


def missing_packages(names: Iterable[str]) -> list[str]:
    """The packages of these peers, and of the report, that are not installed."""
    packages = ["threadpoolctl", *(PEERS[name].package for name in names)]
    return [package for package in dict.fromkeys(packages) if importlib.util.find_spec(package) is None]


def prepare(name: str, case: Case, data: Data) -> Trainer:
    """The trainer of the peer ``name``."""
    trainer: Trainer = importlib.import_module(f"bench.peers.{name}").prepare(case, data)
    return trainer
