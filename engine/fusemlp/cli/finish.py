"""Finish a training: write the model's checkpoint, ``curves.png``, ``report.json`` and ``report.html``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fusemlp.cli.output import finite, write_picture
from fusemlp.cli.report import write_page
from fusemlp.engine import Engine, load_checkpoint
from fusemlp.report.diagnosis import Finding
from fusemlp.report.plots import curves_figure, literal
from fusemlp.report.runs import Run, read_json, write_json
from fusemlp.report.temperature import scale_logits
from fusemlp.runtime.files import replace_file
from fusemlp.tables.scores import scores_of
from fusemlp.tables.training import Trained
from fusemlp.training.history import History
from fusemlp_kernels.errors import FusemlpError


def _scaled_best(run: Run, engine: Engine, history: History, temperature: float) -> Path | None:
    """Write the checkpoint ``best`` with divided logits beside it, and return that file; None if nothing divides them.

    Those of an epoch before a resumption have been divided once. The file replaces ``best`` after the report is
    written: a run that is resumed before that comes here again.
    """
    before = read_json(run.report)
    if before and history.best_epoch is not None and history.best_epoch < before["epochs"]:
        temperature /= before.get("temperature", 1.0)
    if temperature != 1.0 and run.checkpoint("best").exists():
        best = load_checkpoint(run.checkpoint("best"), backend=engine.backend, device=engine.device)
        scale_logits(best, temperature)
        scaled = run.checkpoint("best").with_name(".best.scaled.tmp")
        best.save_checkpoint(scaled)
        return scaled
    return None


def finish(run: Run, trained: Trained) -> dict[str, Any]:
    """Write the final files of a training, and return the report.

    The model of all rows is kept in place of the one that was judged, which is the best one then, as is that of several
    models. The temperature scales the best weights of a single model too. A diverged training has no model and no test:
    its engine is back at the last good epoch, in the checkpoint ``last``.
    """
    prepared, engine, scaled = trained.prepared, trained.engine, None
    history = engine.history or History()
    if trained.failure is None:
        kept = engine if trained.final is None else trained.final[0]
        kept.save_checkpoint(run.checkpoint("model"))
        if prepared.models > 1 or trained.final is not None:
            engine.save_checkpoint(run.checkpoint("best"))
        else:
            scaled = _scaled_best(
                run, engine, history, 1.0 if trained.temperature is None else trained.temperature.value
            )
        if prepared.models > 1:
            engine.save_checkpoint(run.checkpoint("last"))
    config = read_json(run.config)
    report = scores_of(trained, early_stopping=bool(config["options"].get("early_stopping")))
    if not history.epochs:
        report["no_plot"] = "no epoch was completed"
    else:
        scores = report.get("test", {})
        figure = next((name for name in ("accuracy", "rmse") if name in scores), None)
        result = f", test {figure} {scores[figure]:.4g}" if figure else ""
        sizes = "-".join(map(str, engine.network.sizes))
        if prepared.models > 1:
            sizes = f"mean of {prepared.models} models of {'-'.join(map(str, prepared.network.sizes))}"
        overfitting = next((finding for finding in report["diagnosis"] if finding["name"] == "overfitting"), None)
        drawn = partial(
            curves_figure,
            history.history,
            loss=engine.loss.kind,
            title=literal(f"{prepared.dataset.name}: {sizes}{result}"),
            # the models of an ensemble have a best epoch each
            best_epoch=None if prepared.models > 1 else report["best_epoch"],
            overfitting=None if overfitting is None else Finding(**overfitting),
        )
        try:
            write_picture(run.curves, drawn)
        except FusemlpError as error:
            report["no_plot"] = str(error).removeprefix("plot: ")
    # It marks a finished run; only the page, which can be made again, comes after it.
    write_json(run.report, finite(report))
    if scaled is not None:
        replace_file(scaled, run.checkpoint("best"))
    try:
        write_page(run, engine, prepared, report, history.history, command=config["command"])
    except FusemlpError as error:
        report["no_page"] = str(error).removeprefix("report: ")
    return report
