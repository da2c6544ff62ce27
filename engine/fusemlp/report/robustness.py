"""Scores of a model on rows that an attack has changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.adversarial import Attack
from fusemlp.inputs.arrays import Array
from fusemlp.report.metrics import headline, score
from fusemlp.runtime.attacking import attack

FIGURES = ("loss", "accuracy", "rmse")


def robust_score(
    engine: Any, preprocessor: Preprocessor, X: Array, labels: Array, how: Attack, weight: Any = None
) -> dict[str, Any]:
    """Return the attack, and loss and accuracy (of numbers the rmse) under it; arguments as of ``metrics.score``."""
    changed = attack(engine, X, preprocessor.encode_targets(labels), how)
    found = score(engine, preprocessor, changed, labels, weight)
    return {"attack": how.to_config(), **{name: found[name] for name in FIGURES if name in found}}


def robust_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on the scores under an attack, if there was one."""
    if "robust" not in report:
        return
    found, told = report["robust"], report["robust"]["attack"]
    size = f"eps {told['eps']:g}" + (f", norm {told['norm']}, {told['steps']} steps" if "steps" in told else "")
    yield f"under attack by {told['kind']}, {size}:"
    yield from headline({name: found[name] for name in FIGURES if name in found}, "robust")
