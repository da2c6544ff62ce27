"""The record of a training: how it ended, what it looked like, and the scores of its model on the test rows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from fusemlp.describe.adversarial import IBP
from fusemlp.describe.losses import Quantiles
from fusemlp.describe.metrics import Judged
from fusemlp.report.evidence import certify, robust_score
from fusemlp.report.metrics import MOST_NUMBERS, baselines, quantile_figures, score, worse_than
from fusemlp.report.uncertainty import COVERAGE, summary
from fusemlp.tables.training import Trained, attack_on
from fusemlp.training.history import History


def scores_of(trained: Trained, *, early_stopping: bool) -> tuple[dict[str, Any], Judged | None]:
    """Return the report of a training as JSON-able values, and the predictions of its test rows.

    A diverged training has neither scores nor predictions. ``early_stopping``: whether it was to stop early.
    """
    prepared, engine = trained.prepared, trained.engine
    history, preprocessor = engine.history or History(), prepared.preprocessor
    best = None if history.best_epoch is None else history.best_epoch + 1
    dead = engine.dead_units(prepared.train.X)
    divergence = "" if trained.failure is None else str(trained.failure)
    in_use = history.in_use if preprocessor.scale == "none" else [*history.in_use, "scaling"]
    known = {"divergence": divergence, "early_stopping": early_stopping, "in_use": in_use}
    report: dict[str, Any] = {
        "task": prepared.dataset.task,
        "epochs": len(history.epochs),
        "best_epoch": best,
        "stopped": history.stopped,
        "interrupted": trained.interrupted,
        "diverged": trained.failure is not None,
        "seconds": sum(history.seconds),
        "final": {name: values[-1] for name, values in history.history.items()},
        "dead_units": dead,
        "diagnosis": [asdict(finding) for finding in history.diagnose(dead, **known, python=False)],
    }
    if engine.privacy is not None:
        report["privacy"] = engine.privacy_spent()
    tested = _judged(trained, report) if trained.failure is None else None
    if prepared.start is not None:
        report["from"] = prepared.start.about
    if trained.models:
        report["models"] = list(trained.models)
    if trained.final is not None:
        report["final_fit"] = trained.final[1]
    return report, tested


def _judged(trained: Trained, report: dict[str, Any]) -> Judged | None:
    """Enter scores of the test rows and errors of held-out rows, and return the predictions of the former."""
    prepared, engine = trained.prepared, trained.engine
    preprocessor, test, tested = prepared.preprocessor, prepared.test, None
    if test is not None:
        report["test"], tested = score(engine, preprocessor, test.X, test.labels, test.weight)
        attack = attack_on(prepared, test.X)
        if isinstance(attack, IBP):
            cells, labels, rows = prepared.test_rows
            report["certified"] = certify(engine, preprocessor, cells[rows], labels[rows], attack.eps)
        elif attack is not None:
            report["robust"] = robust_score(engine, preprocessor, test.X, test.labels, attack, test.weight)
        seen = prepared.seen(MOST_NUMBERS // max(1, len(preprocessor.classes or ())))
        report["baselines"] = baselines(preprocessor, *seen, test.X, test.labels)
        if isinstance(engine.loss, Quantiles):
            constant = np.quantile(np.asarray(seen[1], np.float64), engine.loss.q)
            scores = quantile_figures(engine.loss, np.tile(constant, (len(test.X), 1)), test.labels.reshape(-1, 1))
            report["baselines"]["constant"]["quantiles"] = scores
        report["worse_than"] = list(worse_than(report))
    if trained.temperature is not None:
        report["temperature"] = trained.temperature.value
    if (held_out := trained.held_out) is not None:
        report["held_out"] = held_out.to_config()
        if tested is not None and test is not None and held_out.reaches(COVERAGE):
            report["intervals"] = summary(engine, preprocessor, test.X, held_out, tested)
    return tested
