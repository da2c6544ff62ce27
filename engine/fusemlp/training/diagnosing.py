"""Diagnose an engine: its last training, and its units on given rows."""

from __future__ import annotations

from typing import Any

from fusemlp.report.diagnosis import Finding
from fusemlp.runtime.session import Session
from fusemlp.training.history import History
from fusemlp_kernels.errors import ArgumentError


def diagnose(engine: Session, X: Any = None) -> list[Finding]:
    """Return what is wrong with the last ``fit``, and with X (n, K), its training rows, the dead relu units.

    Findings: divergence, exploding loss, slow training, no learning, overfitting, dead units. Print one for its
    evidence and remedies. An empty list means that none of these was found.

    Raises ArgumentError without a training and without X.
    """
    if engine.history is None and X is None:
        raise ArgumentError("diagnose: this engine has no training yet; call fit first, or give X to look at its units")
    history = History() if engine.history is None else engine.history
    return history.diagnose(None if X is None else engine.dead_units(X))
