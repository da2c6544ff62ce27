"""The end of a training: checkpoint, ``curves.png``, ``report.json``, ``report.html`` and lines on its scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fusemlp._version import commit
from fusemlp.callbacks import progress
from fusemlp.cli.output import command_line, finite, write_made, write_picture
from fusemlp.cli.session import Session
from fusemlp.describe.checks import counted
from fusemlp.describe.metrics import Judged
from fusemlp.engine import Engine, load_checkpoint
from fusemlp.report.diagnosis import Finding
from fusemlp.report.evidence import Evidence, guarantee_lines
from fusemlp.report.metrics import headline, spelled, verdict
from fusemlp.report.page import page
from fusemlp.report.plots import curves_figure, literal
from fusemlp.report.runs import Run, joint, read_columns, read_json, write_json, write_training_rows
from fusemlp.report.uncertainty import Temperature, scale_logits
from fusemlp.runtime.files import replace_file
from fusemlp.tables.descriptions import learning_rate
from fusemlp.tables.preparation import Prepared
from fusemlp.tables.training import Trained, report_of
from fusemlp.training.trainer import History
from fusemlp_kernels.errors import FusemlpError


def describe_training(session: Session) -> str:
    """Return two lines or more on data, network and optimizer."""
    engine, prepared = session.engine, session.prepared
    net, rate = engine.network, engine.optimizer.schedule
    several = ""
    if prepared.models > 1:
        shared = "" if prepared.validation is None else ", which share these validation rows,"
        several = f"{prepared.models} models{shared} of "
    lines = [
        describe_data(prepared),
        f"{several}{net.title}, {net.parameter_count} parameters; {engine.loss.kind}; "
        f"{engine.optimizer.kind}, {rate.kind} lr {learning_rate(session.options):g}; "
        f"batch {engine.batch_size}; {engine.backend} {engine.precision}, plan {engine.plan}"
        f"{f', {engine.sharding}' if engine.sharding else ''}",
    ]
    if engine.device == "cpu" and not engine.memory.backend.traits.on_host:
        lines.append("Triton's interpreter runs the kernels on the CPU, slowly: this checks and does not time them")
    if engine.privacy is not None:
        privacy = engine.privacy
        lines.append(
            f"private training: noise {privacy.noise:.4g}, clip {privacy.clip:g}, delta {privacy.delta:g}; it covers "
            "the parameters and each training row. Not covered: scaling and categories, curves, baselines and scores, "
            "and the validation rows, which decide when to stop. Share the exported model, not the run folder"
        )
    return "\n".join(lines)


def describe_data(prepared: Prepared) -> str:
    """Return one line on the rows, after those on the reading of a table."""
    about, inputs = prepared.summary, counted(prepared.network.sizes[0], "input")
    nouns = {"regression": "target", "multilabel": "label", "classification": "class"}
    outputs = counted(prepared.preprocessor.outputs, nouns[prepared.dataset.task])
    rows = f"{about['name']}: {prepared.training_rows}, {counted(about['test_rows'], 'test row')}"
    notes = [note for note in prepared.notes if note not in prepared.warned]
    return "\n".join([*notes, f"{rows}; {inputs}, {outputs}"])


def written(report: dict[str, Any], run: Run) -> list[str]:
    """Return a line for the page and one for the picture of a run, or why there is none."""
    files = ("report", "no_page", run.page), ("plot", "no_plot", run.curves)
    return [f"no {name}: {report[key]}" if key in report else f"{name} {path}" for name, key, path in files]


def outcome(report: Mapping[str, Any]) -> list[str]:
    """Return lines on the end of the training, the scores and the diagnosis."""
    lines = []
    if report["interrupted"]:
        lines.append(f"interrupted after epoch {report['epochs']}")
    elif report.get("models"):
        epochs = sorted({model["epochs"] for model in report["models"]})
        spread = f"{epochs[0]} to " if len(epochs) > 1 else ""
        stopped = f": {report['stopped']}" if report["stopped"] else ""
        models, last = counted(len(report["models"]), "model"), counted(epochs[-1], "epoch")
        lines.append(f"{models} after {spread}{last}{stopped}")
    elif report["stopped"]:
        lines.append(f"stopped after epoch {report['epochs']}: {report['stopped']}")
    lines += [*headline(report.get("test", {})), *verdict(report)]
    if "intervals" in report:
        sizes = report["intervals"]
        size = f"{sizes['classes']:.2f} classes" if "classes" in sizes else "intervals"
        size = f"width {spelled(sizes['width'])}" if "width" in sizes else size
        average = "" if size == "intervals" else " on average,"
        covered = f"{size}{average} which cover {sizes['coverage']:.0%} of the test rows"
        lines.append(f"predict --interval {sizes['level']:g}: {covered}")
    lines += guarantee_lines(report)
    if report.get("final_fit"):
        final = report["final_fit"]
        lines.append(
            f"final fit: the model is now that of all {final['rows']} rows after {final['epochs']} epochs; the scores "
            "are those of the model before"
        )
    # the error message has a divergence
    return lines + [str(Finding(**finding)) for finding in report["diagnosis"] if finding["name"] != "divergence"]


def write_page(
    run: Run,
    engine: Engine,
    prepared: Prepared,
    report: Mapping[str, Any],
    history: Mapping[str, Sequence[float]],
    tested: Judged | None,
) -> None:
    """Write ``report.html`` of an engine with its report, and with the predictions of its test rows, if any."""
    about, net, epochs = prepared.summary, engine.network, len(history.get("loss", ()))
    target = prepared.dataset.target_name
    network = net.title
    if report.get("models") and not report.get("diverged"):
        network = f"{len(report['models'])} models of {prepared.network.title}, merged"
    lines = [
        f"{prepared.training_rows}, {counted(about['test_rows'], 'test row')} ({about['test']}); target {target}",
        f"{network}, {net.parameter_count} parameters; {engine.loss.kind}; "
        f"{engine.optimizer.kind}, batch {engine.batch_size}; {counted(epochs, 'epoch')}"
        + (f" in {report['seconds']:.1f} s" if "seconds" in report else ""),
        read_json(run.config)["command"],
        *prepared.notes,
        *([f"temperature {report['temperature']:.4g} divides the logits"] if "temperature" in report else []),
    ]
    title = f"{about['name']}: {about['task']} of {target}"

    def content() -> bytes:
        evidence = None
        if tested is not None:
            ids = prepared.dataset.ids if prepared.dataset.test is None else {}
            evidence = Evidence(engine, prepared.preprocessor, *prepared.test_rows, ids, tested)
        return page(title, lines, report, history, evidence).encode(errors="backslashreplace")

    write_made("report", run.page, content)


def _scaled_best(run: Run, engine: Engine, history: History, temperature: Temperature | None) -> Path | None:
    """Write the checkpoint ``best`` with divided logits beside it, and return that file; None if nothing divides them.

    Those of an epoch before a resumption have been divided once. The file replaces ``best`` after the report is
    written: a run that is resumed before that comes here again.
    """
    before, number = read_json(run.report), 1.0 if temperature is None else temperature.value
    if before and history.best_epoch is not None and history.best_epoch < before["epochs"]:
        number /= before.get("temperature", 1.0)
    if number != 1.0 and run.checkpoint("best").exists():
        best = load_checkpoint(run.checkpoint("best"), backend=engine.backend, device=engine.device)
        scale_logits(best, number)
        scaled = run.checkpoint("best").with_name(".best.scaled.tmp")
        best.save_checkpoint(scaled)
        return scaled
    return None


def finish(
    run: Run,
    trained: Trained,
    scored: Callable[[Mapping[str, Any]], object] = lambda report: None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Write the final files of a training, and return the report; ``scored`` gets it before anything is drawn.

    The model of all rows is kept in place of the one that was judged, which is the best one then, as is that of several
    models. The temperature scales the best weights of a single model too. A diverged training has no model and no test:
    its engine is back at the last good epoch, in the checkpoint ``last``.
    """
    prepared, engine, scaled = trained.prepared, trained.engine, None
    history = engine.history or History()
    if trained.final is not None:
        write_training_rows(run, prepared.hashes(every=True))
    if trained.failure is None:
        kept = engine if trained.final is None else trained.final[0]
        kept.save_checkpoint(run.checkpoint("model"))
        if trained.models or trained.final is not None:
            engine.save_checkpoint(run.checkpoint("best"))
        else:
            scaled = _scaled_best(run, engine, history, trained.temperature)
        if trained.models:
            engine.save_checkpoint(run.checkpoint("last"))
    with progress.waiting("scoring", quiet=quiet, elsewhere=True):
        report, tested = report_of(trained)
    # also those of a run that goes on, whose table is read by its columns
    if left_out := {row["column"]: row["note"] for row in read_columns(run) if row["became"] == "left out"}:
        report["left_out"] = left_out
    report["commit"] = commit()
    scored(report)
    if not history.epochs:
        report["no_plot"] = "no epoch was completed"
    else:
        scores = report.get("test", {})
        figure = next((name for name in ("accuracy", "rmse") if name in scores), None)
        result = f", test {figure} {scores[figure]:.4g}" if figure else ""
        several = f"mean of {len(trained.models)} models of " if trained.models else ""
        mean, models = joint(history.history, report)
        overfitting = next((finding for finding in report["diagnosis"] if finding["name"] == "overfitting"), None)
        drawn = partial(
            curves_figure,
            mean,
            models=models,
            loss=engine.loss.kind,
            title=literal(f"{prepared.dataset.name}: {several}{prepared.network.title}{result}"),
            # the models of an ensemble have a best epoch each
            best_epoch=None if trained.models else report["best_epoch"],
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
        with progress.waiting("writing the report", quiet=quiet):
            write_page(run, engine, prepared, report, history.history, tested)
    except FusemlpError as error:
        report["no_page"] = str(error).removeprefix("report: ")
    except KeyboardInterrupt:
        report["no_page"] = f"interrupted; to make it: {command_line(['fusemlp', 'report', str(run.path)])}"
    return report
