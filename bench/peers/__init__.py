"""The contenders, one file each: this engine's backends and plans, and the libraries it is measured against.

Each file has ``prepare(case, data, **options) -> Trainer``. To add one, write such a file and name it in ``PEERS``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

from bench.cases import Array, Case, Data, Parameters
from bench.oracle import Rules


class Trainer(Protocol):
    """A network bound to its data, with the training loop that users of its library write."""

    def reset(self) -> None:
        """Go back to the initial parameters and a fresh optimizer."""

    def train(self, epochs: int) -> None:
        """Make ``epochs`` passes over the data, each in a new random order; return when they are finished.

        This is the timed method. It also computes the mean training loss of each epoch, as usual training loops do.
        """

    def losses(self, order: Array) -> Array:
        """Make one pass over the rows in ``order`` (steps * batch_size,), on the code path of ``train``.

        Returns the mean loss of each batch before its update: (steps,), for a fleet (steps, models).
        """

    def parameters(self) -> Parameters:
        """Return each layer's weight (outputs, inputs) and bias (outputs,); for a fleet (models, ...)."""


TORCH, SCIKIT_LEARN = Rules(), Rules(convention="scikit-learn")


@dataclass(frozen=True)
class Peer:
    """A contender: its label in tables, its requirements and its abilities.

    ``package``: the import that it needs. ``module``: its file, by default the name in ``PEERS``; it gets ``options``.
    ``devices``: the devices that a machine must have. ``host``: it computes on the CPU even then. ``fleet``: it trains
    many models at once, and only those. ``differs``: a note for the table if its mathematics differs. ``environment``:
    variables of its process.
    """

    label: str
    package: str
    module: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "gpu")
    host: bool = False
    fleet: bool = False
    losses: tuple[str, ...] = ("cross_entropy", "mse")
    optimizers: tuple[str, ...] = ("sgd", "adam")
    dropout: bool = True
    compiles_long: bool = False
    rules: Rules = TORCH
    precisions: tuple[str, ...] = ("fp32", "tf32", "bf16")
    differs: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


HOST: dict[str, Any] = {"host": True, "dropout": False, "precisions": ("fp32",)}
# By default JAX takes three quarters of a card's memory when it starts, and the contenders share the card.
JAX = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
EPS = "Adam adds eps before the bias correction, as scikit-learn does"

# The first one is the reference of all others.
PEERS = {
    "engine": Peer("fusemlp", "fusemlp"),
    **{
        f"engine_{backend}_{plan}": Peer(
            f"fusemlp {backend} {plan}",
            "fusemlp",
            module="engine",
            options={"backend": backend, "plan": plan},
            host=backend == "numpy",
            devices=("cpu", "gpu") if backend == "numpy" else ("gpu",),
            precisions=("fp32", "tf32", "bf16") if backend == "triton" else ("fp32",),
        )
        for backend, plans in (
            ("numpy", ("eager", "resident")),
            ("triton", ("eager", "graph", "resident")),
            ("cupy", ("eager", "graph")),
        )
        for plan in plans
    },
    "torch_eager": Peer("PyTorch eager", "torch"),
    "torch_compile": Peer("PyTorch torch.compile", "torch", compiles_long=True),
    "torch_graph": Peer("PyTorch whole-step CUDA graph", "torch", devices=("gpu",)),
    "torch_addmm": Peer(
        "PyTorch addmm_ by hand",
        "torch",
        losses=("cross_entropy",),
        optimizers=("sgd",),
        dropout=False,
        precisions=("fp32", "tf32"),
    ),
    "sklearn_mlp": Peer("scikit-learn", "sklearn", **HOST, rules=SCIKIT_LEARN, differs=EPS),
    "jax_jit": Peer("JAX jit", "jax", environment=JAX),
    "jax_scan": Peer("JAX lax.scan", "jax", environment=JAX),
    "fleet": Peer("fusemlp Fleet", "fusemlp", fleet=True),
    "jax_vmap": Peer("JAX vmap + lax.scan", "jax", fleet=True, environment=JAX),
    "torch_func": Peer("PyTorch torch.func", "torch", fleet=True, dropout=False),
    "sklearn_loop": Peer("scikit-learn one by one", "sklearn", **HOST, fleet=True, rules=SCIKIT_LEARN, differs=EPS),
}
REFERENCE, FLEET_REFERENCE = "engine", "fleet"
DISTRIBUTIONS = {"sklearn": "scikit-learn"}
# The C++ compilers that torch.compile looks for on a CPU.
COMPILERS = tuple(filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")))
BENCH_EXTRA = 'pip install "fusemlp[bench]"'


def reference_of(case: Case) -> str:
    """Return the reference of a case's other contenders."""
    return REFERENCE if case.models is None else FLEET_REFERENCE


def is_own(name: str) -> bool:
    """Return whether a contender is this engine."""
    return PEERS[name].package == "fusemlp"


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    if importlib.util.find_spec(package) is None:
        return None
    if package == "fusemlp":
        import fusemlp

        return fusemlp.__version__
    return importlib.metadata.version(DISTRIBUTIONS.get(package, package))


def absent(name: str, device: str) -> str | None:
    """Return the reason if a contender cannot run on this machine, else None."""
    peer = PEERS[name]
    version = version_of(peer.package)
    if version is None:
        named = DISTRIBUTIONS.get(peer.package, peer.package)
        return f"{named} is not installed ({BENCH_EXTRA})"
    if device not in peer.devices:
        return "runs on a GPU only, and no card was found"
    if peer.package == "torch" and device == "gpu" and version.endswith("+cpu"):
        return f"torch {version} is the build without GPU support"
    if name == "torch_compile" and device == "cpu" and not any(map(shutil.which, COMPILERS)):
        return f"needs a C++ compiler for its kernels: none of {', '.join(COMPILERS)} was found"
    if peer.options:
        return _plan_missing(peer.options["backend"], peer.options["plan"], device)
    return None


@functools.cache
def _plan_missing(backend: str, plan: str, device: str) -> str | None:
    """Return the reason if a plan is not measured: it does not work here, or ``engine`` chooses it anyway."""
    from fusemlp import MLP, ArgumentError, BackendUnavailableError, Engine
    from fusemlp_kernels.registry import interprets_triton

    if backend == "triton" and interprets_triton():
        return "TRITON_INTERPRET is set: the interpreter's times mean nothing"
    net = MLP([4, 3, 2])
    try:
        Engine(net, backend=backend, plan=plan)
    except (ArgumentError, BackendUnavailableError) as error:
        return str(error)
    chosen = Engine(net, backend="auto" if device == "gpu" else "numpy")
    return "equals fusemlp's own choice here" if (chosen.backend, chosen.plan) == (backend, plan) else None


def unsuited(name: str, case: Case) -> str | None:
    """Return the reason if a contender cannot run a case, else None."""
    peer = PEERS[name]
    if peer.fleet != (case.models is not None):
        return "trains many models at once" if peer.fleet else "trains one model at a time"
    if case.loss not in peer.losses:
        return f"has no {case.loss}"
    if case.optimizer not in peer.optimizers:
        return f"has no {case.optimizer} step"
    if case.dropout and not peer.dropout:
        return "has no dropout"
    if peer.host and case.gpu_only:
        return "runs on the CPU"
    if case.precision not in peer.precisions:
        return f"has no {case.precision}"
    return None


def prepare(name: str, case: Case, data: Data) -> Trainer:
    """Return the trainer of the contender ``name``."""
    peer = PEERS[name]
    trainer: Trainer = import_module(name).prepare(case, data, **peer.options)
    return trainer


def import_module(name: str) -> ModuleType:
    """Import the contender's file, and with it its library."""
    return importlib.import_module(f"bench.peers.{PEERS[name].module or name}")
