"""Lines on a training: on data and network before it, on its end and its scores after it."""

from __future__ import annotations

from typing import Any

from fusemlp.cli import recipe
from fusemlp.cli.prepare import Prepared
from fusemlp.cli.session import Session
from fusemlp.engine import Engine
from fusemlp.report.diagnosis import Finding
from fusemlp.report.metrics import baseline_line, headline, privacy_line, spelled
from fusemlp.report.robustness import certified_lines, robust_lines
from fusemlp.report.runs import Run


def describe(session: Session) -> str:
    """Return two or three lines on network, optimizer and data."""
    engine, net = session.engine, session.engine.network
    rate = engine.optimizer.schedule
    interpreted = engine.device == "cpu" and not engine.memory.backend.traits.on_host
    several = ""
    if session.prepared.models > 1:
        shared = "" if session.prepared.validation is None else ", which share these validation rows,"
        several = f"{session.prepared.models} models{shared} of "
    note = "\nTriton's interpreter runs the kernels on the CPU, slowly: this checks them, it does not time them"
    return (
        f"{describe_data(session.prepared)}\n"
        f"{several}{'-'.join(map(str, net.sizes))}, {f'{net.members} members, ' if net.members > 1 else ''}"
        f"{net.parameter_count} parameters; {engine.loss.kind}; "
        f"{engine.optimizer.kind}, {rate.kind} lr {recipe.learning_rate(session.options):g}; "
        f"batch {engine.batch_size}; {engine.backend} {engine.precision}, plan {engine.plan}"
        f"{'' if engine.sharding is None else f', {engine.sharding}'}"
        f"{note if interpreted else ''}{private_note(engine)}"
    )


def private_note(engine: Engine) -> str:
    """Return lines on private training."""
    if engine.privacy is None:
        return ""
    privacy = engine.privacy
    return (
        f"\nprivate training: noise {privacy.noise:.4g}, clip {privacy.clip:g}, delta {privacy.delta:g}; it covers the "
        "parameters and each training row. Not covered: scaling and categories, curves, baselines and scores, and the "
        "validation rows, which decide when to stop. Share the exported model, not the run folder"
    )


def describe_data(prepared: Prepared) -> str:
    """Return one line on the rows, after those on the reading of a table."""
    about, classes = prepared.summary, prepared.preprocessor.classes
    target = f"{len(classes)} classes" if classes is not None else "1 target"
    if classes is None and prepared.preprocessor.outputs > 1:
        target = f"{prepared.preprocessor.outputs} targets"
    notes = "".join(f"{note}\n" for note in prepared.notes)
    inputs = prepared.network.sizes[0]
    return (
        f"{notes}{about['name']}: {prepared.training_rows}, {about['test_rows']} test rows; {inputs} inputs, {target}"
    )


def interval_line(report: dict[str, Any]) -> list[str]:
    """Return a line on the intervals or sets of classes of the test rows."""
    if "intervals" not in report:
        return []
    found = report["intervals"]
    size = f"{found['classes']:.2f} classes" if "classes" in found else f"width {spelled(found['width'])}"
    level, share = found["level"], found["coverage"]
    return [f"predict --interval {level:g}: {size} on average, which cover {share:.0%} of the test rows"]


def written(report: dict[str, Any], run: Run) -> list[str]:
    """Return a line for the page and one for the picture of a run, or why there is none."""
    files = ("report", "no_page", run.page), ("plot", "no_plot", run.curves)
    return [f"no {name}: {report[key]}" if key in report else f"{name} {path}" for name, key, path in files]


def outcome(report: dict[str, Any]) -> list[str]:
    """Return lines on the end of the training, the scores and the diagnosis."""
    lines = []
    if report["interrupted"]:
        lines.append(f"interrupted after epoch {report['epochs']}")
    elif report.get("models"):
        epochs = [one["epochs"] for one in report["models"]]
        spread = f"{min(epochs)}" if min(epochs) == max(epochs) else f"{min(epochs)} to {max(epochs)}"
        lines.append(
            f"{len(epochs)} models after {spread} epochs{': ' if report['stopped'] else ''}{report['stopped']}"
        )
    elif report["stopped"]:
        lines.append(f"stopped after epoch {report['epochs']}: {report['stopped']}")
    lines += headline(report.get("test", {}))
    lines += [
        *baseline_line(report),
        *interval_line(report),
        *privacy_line(report),
        *robust_lines(report),
        *certified_lines(report),
    ]
    if report.get("final_fit"):
        final = report["final_fit"]
        lines.append(
            f"final fit: the model is now that of all {final['rows']} rows after {final['epochs']} epochs; the scores "
            "are those of the model before"
        )
    for finding in report["diagnosis"]:
        # The error message has a divergence.
        if finding["name"] != "divergence":
            lines.append(str(Finding(**finding)))
    return lines
