"""A fleet larger than memory: how many engines fit at once, and what stays of those that have ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusemlp.datasets.preparation import available_memory
from fusemlp.engine import Engine
from fusemlp.fleet.candidates import Candidate
from fusemlp.inputs.arrays import Array
from fusemlp.runtime.ledger import Ledger
from fusemlp.runtime.memory import REAL_BYTES
from fusemlp.training.history import History
from fusemlp_kernels.errors import ArgumentError

# Bytes of an engine's Python objects beside its arrays, and of a model's that is kept; measured and rounded up. The
# history is not included: its length is not known before.
ENGINE_OBJECTS = 17 << 10
KEPT_OBJECTS = 6 << 10


@dataclass(frozen=True, eq=False)
class Kept:
    """A model without its engine: its parameters, by the names of ``state_dict``, its history, and the privacy that it
    has spent."""

    candidate: Candidate
    machine: Mapping[str, Any]
    parameters: dict[str, Array]
    history: History
    epochs_trained: int
    privacy: dict[str, Any] | None = None

    @classmethod
    def of(cls, engine: Engine, candidate: Candidate, machine: Mapping[str, Any]) -> Kept:
        """Return what is kept of an engine."""
        history = engine.history if engine.history is not None else History()
        parameters, spent = engine.state_dict(), engine.ledger.to_config(engine.update_count)
        return cls(candidate, machine, parameters, history, engine.epochs_trained, spent)

    def engine(self) -> Engine:
        """Return a new engine with these parameters; its optimizer starts afresh."""
        engine = self.candidate.engine(self.machine)
        engine.load_state_dict(self.parameters)
        # with a new seed: its updates are counted afresh
        engine.ledger = Ledger.from_config(self.privacy, engine.batch_size)
        engine.history, engine.epochs_trained = self.history, self.epochs_trained
        return engine


def engine_bytes(engine: Engine) -> int:
    """Estimate the bytes of an engine: arenas, table of rates, the best weights of early stopping, its objects."""
    memory = engine.memory
    arenas = memory.gradient_parts + 2 + len(memory.states) + bool(memory.evaluated)
    shadow = 0 if memory.shadow is None else memory.shadow.nbytes
    return int(arenas * memory.params.nbytes + shadow + memory.rates.nbytes + ENGINE_OBJECTS)


def kept_bytes(candidates: Sequence[Candidate], precision: str) -> int:
    """Estimate the bytes that stay of all models when they have ended."""
    shapes: dict[Any, int] = {}
    for one in candidates:
        if one.net not in shapes:
            shapes[one.net] = one.net.parameter_count
    parameters = sum(shapes[one.net] for one in candidates)
    return parameters * REAL_BYTES.get(precision, 4) + len(candidates) * KEPT_OBJECTS


def room(given: int | None, candidates: Sequence[Candidate], precision: str, *, device: str) -> int | None:
    """Return the bytes that engines may take at once; None is no limit.

    ``given`` is the user's limit; on the host it includes what stays of ended models. By default the limit is half of
    the available memory on the host, and there is none on a card.

    Raises ArgumentError if not even the parameters of all models fit.
    """
    if device != "cpu":
        return given
    available = available_memory() if given is None else given
    if available is None:
        return None
    kept = kept_bytes(candidates, precision)
    if kept >= available:
        raise ArgumentError(
            f"memory: {len(candidates)} models leave {_mebibytes(kept)} of parameters, and there are "
            f"{_mebibytes(available)} {'free' if given is None else 'allowed'}; train fewer models at once, or give "
            "more with memory="
        )
    return max(0, (available // 2 if given is None else available) - kept)


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.4g} MiB"
