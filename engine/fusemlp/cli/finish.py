"""Finish a training: write the model's checkpoint, ``curves.png``, ``report.json`` and ``report.html``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fusemlp.cli.output import finite, write_picture
from fusemlp.cli.prepare import Prepared
from fusemlp.cli.report import write_page
from fusemlp.describe.adversarial import Attack
from fusemlp.describe.intervals import IBP
from fusemlp.engine import Engine, load_checkpoint
from fusemlp.report.diagnosis import diagnose
from fusemlp.report.metrics import MOST_NUMBERS, baselines, score, worse_than
from fusemlp.report.plots import curves_figure, literal
from fusemlp.report.robustness import certify, robust_score
from fusemlp.report.runs import Run, read_json, write_json
from fusemlp.report.uncertainty import COVERAGE, HeldOut, Temperature, errors_of, scale_logits, summary
from fusemlp.runtime.files import replace_file
from fusemlp.training.history import History
from fusemlp_kernels.errors import DivergenceError, FusemlpError


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


def finish(
    run: Run,
    engine: Engine,
    prepared: Prepared,
    *,
    interrupted: bool,
    failure: DivergenceError | None,
    models: Sequence[dict[str, Any]] = (),
    final: tuple[Engine, dict[str, int]] | None = None,
    held_out: HeldOut | None = None,
    temperature: Temperature | None = None,
    attack: Attack | IBP | None = None,
) -> dict[str, Any]:
    """Write the final files of a training, and return the report.

    ``models`` are the records of an ensemble, whose merged ``engine`` is the best one too. ``final`` is the model of
    all rows, which is kept in place of ``engine``, with its epochs and rows; the scores are those of ``engine``, which
    is the best one then.

    ``held_out`` are the errors of rows that no model was trained on, for intervals; by default of the validation rows.
    ``temperature`` has scaled ``engine`` and ``final``; it scales the best weights of a single model too. ``attack``:
    the scores of the test rows under it are in the report.

    A diverged training has no model and no test. Its engine is back at the last good epoch, in the checkpoint ``last``.
    """
    history, scaled = engine.history or History(), None
    if failure is None:
        kept = engine if final is None else final[0]
        kept.save_checkpoint(run.checkpoint("model"))
        if prepared.models > 1 or final is not None:
            engine.save_checkpoint(run.checkpoint("best"))
        else:
            scaled = _scaled_best(run, engine, history, 1.0 if temperature is None else temperature.value)
        if prepared.models > 1:
            engine.save_checkpoint(run.checkpoint("last"))
    best = None if history.best_epoch is None else history.best_epoch + 1
    config = read_json(run.config)
    dead = engine.dead_units(prepared.train.X)
    found = diagnose(
        history.history,
        dead,
        divergence="" if failure is None else str(failure),
        restored="restored" in history.stopped,
        best_epoch=best,
        early_stopping=bool(config["options"].get("early_stopping")),
        chance_loss=history.chance_loss,
        in_use=history.in_use if prepared.preprocessor.scale == "none" else [*history.in_use, "scaling"],
        python=False,
    )
    overfitting = next((finding for finding in found if finding.name == "overfitting"), None)
    report: dict[str, Any] = {
        "task": prepared.dataset.task,
        "epochs": len(history.epochs),
        "best_epoch": best,
        "stopped": history.stopped,
        "interrupted": interrupted,
        "diverged": failure is not None,
        "seconds": sum(history.seconds),
        "final": {name: values[-1] for name, values in history.history.items()},
        "dead_units": dead,
        "diagnosis": [asdict(finding) for finding in found],
    }
    if engine.privacy is not None:
        report["privacy"] = engine.privacy_spent()
    if failure is None:
        test = prepared.test
        report["test"] = score(engine, prepared.preprocessor, test.X, test.labels, test.weight)
        if isinstance(attack, IBP):
            cells, labels, rows = prepared.test_rows
            report["certified"] = certify(engine, prepared.preprocessor, cells[rows], labels[rows], attack.eps)
        elif attack is not None:
            report["robust"] = robust_score(engine, prepared.preprocessor, test.X, test.labels, attack, test.weight)
        seen = prepared.seen(MOST_NUMBERS // max(1, len(prepared.preprocessor.classes or ())))
        report["baselines"] = baselines(prepared.preprocessor, *seen, test.X, test.labels)
        report["worse_than"] = list(worse_than(report))
        made, validation = prepared.preprocessor, prepared.validation
        if temperature is not None:
            report["temperature"] = temperature.value
        if validation is not None and held_out is None:
            held_out = HeldOut.of(errors_of(engine, made, validation.X, validation.labels))
        if held_out is not None:
            report["held_out"] = held_out.to_config()
            if held_out.reaches(COVERAGE):
                report["intervals"] = summary(engine, made, held_out, test.X, test.labels)
    if prepared.start is not None:
        report["from"] = prepared.start.about
    if models:
        report["models"] = list(models)
    if final is not None:
        report["final_fit"] = final[1]
    if not history.epochs:
        report["no_plot"] = "no epoch was completed"
    else:
        test_figures = report.get("test", {})
        figure = next((name for name in ("accuracy", "rmse") if name in test_figures), None)
        result = f", test {figure} {test_figures[figure]:.4g}" if figure else ""
        sizes = "-".join(map(str, engine.network.sizes))
        if prepared.models > 1:
            sizes = f"mean of {prepared.models} models of {'-'.join(map(str, prepared.network.sizes))}"
        drawn = partial(
            curves_figure,
            history.history,
            loss=engine.loss.kind,
            title=literal(f"{prepared.dataset.name}: {sizes}{result}"),
            # the models of an ensemble have a best epoch each
            best_epoch=None if prepared.models > 1 else best,
            overfitting=overfitting,
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
