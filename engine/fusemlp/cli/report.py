"""``fusemlp report``: ``report.html`` of a run, made again; ``train`` and ``sweep`` write it at their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fusemlp.cli.evaluate import before_final_fit, own_data
from fusemlp.cli.options import ReportOptions
from fusemlp.cli.output import finite, show, write_made
from fusemlp.cli.predict import open_model
from fusemlp.engine import Engine
from fusemlp.report.evidence import Evidence
from fusemlp.report.metrics import score
from fusemlp.report.page import page
from fusemlp.report.runs import Run, read_json, read_metrics
from fusemlp.tables.preparation import Prepared


def report(options: ReportOptions) -> None:
    """Write ``report.html`` into the run folder, from the run's weights and its own test rows."""
    run = Run(options.run)
    found = read_json(run.report)
    notes: list[str] = []
    engine, preprocessor, config = open_model(before_final_fit(options, notes))
    prepared = own_data(config, preprocessor)
    # what the training tried is not tried again
    tried = tuple(note for note in config["data"].get("notes", []) if note not in prepared.notes)
    prepared = replace(prepared, tried=tried)
    test = prepared.test
    if test is not None and not found.get("diverged"):
        found["test"] = finite(score(engine, preprocessor, test.X, test.labels, test.weight))
    table = read_metrics(run)
    history = {name: [row[name] for row in table] for name in table[0] if name != "epoch"} if table else {}
    write_page(run, engine, prepared, found, history, command=config["command"])
    content = {"run": str(run.path), "report": str(run.page), "notes": notes}
    show(content, [*notes, f"report {run.page}"], as_json=options.as_json)


def write_page(
    run: Run,
    engine: Engine,
    prepared: Prepared,
    found: Mapping[str, Any],
    history: Mapping[str, Sequence[float]],
    *,
    command: str,
) -> None:
    """Write ``report.html`` of an engine whose report is ``found``; without a test no model is judged."""
    about, net, epochs = prepared.summary, engine.network, len(history.get("loss", ()))
    sizes = "-".join(map(str, net.sizes))
    if prepared.models > 1 and not found.get("diverged"):
        sizes = f"{prepared.models} models of {'-'.join(map(str, prepared.network.sizes))}, merged"
    lines = [
        f"{prepared.training_rows}, {about['test_rows']} test rows ({about['test']}); "
        f"target {prepared.dataset.target_name}",
        f"{sizes}, {net.parameter_count} parameters; {engine.loss.kind}; "
        f"{engine.optimizer.kind}, batch {engine.batch_size}; {epochs} epochs"
        + (f" in {found['seconds']:.1f} s" if "seconds" in found else ""),
        command,
        *prepared.notes,
        *([f"temperature {found['temperature']:.4g} divides the logits"] if "temperature" in found else []),
    ]
    title = f"{about['name']}: {about['task']} of {prepared.dataset.target_name}"

    def made() -> bytes:
        evidence = None
        if found.get("test"):
            ids = prepared.dataset.ids if prepared.dataset.test is None else {}
            evidence = Evidence(engine, prepared.preprocessor, *prepared.test_rows, ids)
        return page(title, lines, found, history, evidence).encode(errors="backslashreplace")

    write_made("report", run.page, made)
