"""Validation data, brought to the device once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fusemlp.describe.metrics import Metric
from fusemlp.runtime.inference import Evaluation
from fusemlp.runtime.members import MeanEvaluation

if TYPE_CHECKING:
    from fusemlp.inputs.targets import Examples
    from fusemlp.runtime.session import Session

# This many kinds of models in a fleet share their validation data; the others keep theirs as long as they train.
KINDS = 8


@dataclass(frozen=True, eq=False)
class Validation:
    """Checked rows that each epoch is validated on, also by ``metrics``; ``common``: by several models."""

    data: Examples
    common: bool = False
    metrics: tuple[Metric, ...] = ()
    # evaluations not in use, by network and loss
    _idle: dict[Any, list[Evaluation | MeanEvaluation]] = field(default_factory=dict)

    def of(self, engine: Session) -> Callable[[], dict[str, float]]:
        """Return a function that evaluates ``engine`` on the rows, for the end of each epoch."""
        loss = self._loss_of(engine)
        return loss if not self.metrics else lambda: {**loss(), **engine.figures(self.data, self.metrics)}

    def _loss_of(self, engine: Session) -> Callable[[], dict[str, float]]:
        net = engine.network
        kind = (net.sizes, net.activations, engine.loss)
        if not self.common or (kind not in self._idle and len(self._idle) >= KINDS):
            alone = engine.evaluation(self.data, apart=False)
            return lambda: alone.of(engine.memory)
        idle = self._idle.setdefault(kind, [])

        def together() -> dict[str, float]:
            # models may be trained in several threads
            try:
                evaluation = idle.pop()
            except IndexError:
                evaluation = engine.evaluation(self.data, apart=True)
            metrics = evaluation.of(engine.memory)
            idle.append(evaluation)
            return metrics

        return together
