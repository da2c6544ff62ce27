"""``fusemlp predict``: the model of a run on new rows."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusemlp.cli.options import EvaluateOptions, PredictOptions, ReportOptions
from fusemlp.cli.output import check_output, show, write_output
from fusemlp.datasets.load import load_features
from fusemlp.datasets.prepare import network_inputs
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.engine import Engine, load_checkpoint
from fusemlp.inputs.arrays import Array
from fusemlp.report.metrics import predictions
from fusemlp.report.runs import csv_bytes, open_run, weights_path
from fusemlp_kernels.errors import ArgumentError

OUTPUTS = (".csv", ".npz")


def open_model(
    options: EvaluateOptions | PredictOptions | ReportOptions,
) -> tuple[Engine, Preprocessor, dict[str, Any]]:
    """Return the engine, the preprocessor and the configuration of a run."""
    run, config = open_run(options.run)
    engine = load_checkpoint(weights_path(run, options.weights), backend=options.backend, device=options.device)
    return engine, Preprocessor.from_config(config["preprocessor"]), config


def predict(options: PredictOptions) -> None:
    """Write the predictions for the rows of ``data`` to ``out``: labels, or values in original units."""
    data, out = options.data, options.out
    check_output("out", out, OUTPUTS, force=options.force)
    engine, preprocessor, config = open_model(options)
    if options.proba and not engine.loss.is_classification:
        raise ArgumentError(
            f"proba: the run was trained with {engine.loss.kind}, which gives no probabilities; "
            "train with cross_entropy"
        )
    notes: list[str] = []
    form = options.form(config["options"])
    ids: dict[str, Array] = {}
    features = load_features(data, preprocessor, form=form, notes=notes, ids=ids, ignore_unused=options.ignore_unused)
    X = network_inputs(preprocessor, features, engine.precision)
    predicted = predictions(engine, preprocessor, X)
    probabilities = engine.predict_proba(X) if options.proba else None
    content = _npz if out.suffix.lower() == ".npz" else _csv
    write_output("out", out, content(preprocessor, ids, predicted, probabilities))
    about = {"run": str(options.run), "data": data, "weights": options.weights, "rows": len(X), "out": str(out)}
    lines = [*notes, f"predictions of {len(X)} rows {out}"]
    show(about | {"notes": notes}, lines, as_json=options.as_json)


def _csv(preprocessor: Preprocessor, ids: Mapping[str, Array], predicted: Array, probabilities: Array | None) -> bytes:
    columns = predicted.reshape(len(predicted), -1)
    many = columns.shape[1] > 1
    names = [f"prediction_{index}" if many else "prediction" for index in range(columns.shape[1])]
    table = columns.tolist()
    if probabilities is not None:
        names += [f"probability_{label}" for label in preprocessor.classes or ()]
        table = [row + more for row, more in zip(table, probabilities.tolist(), strict=True)]
    if ids:
        names = [*ids, *names]
        named = zip(*(column.tolist() for column in ids.values()), strict=True)
        table = [[*texts, *row] for texts, row in zip(named, table, strict=True)]
    return csv_bytes([names, *table])


def _npz(preprocessor: Preprocessor, ids: Mapping[str, Array], predicted: Array, probabilities: Array | None) -> bytes:
    arrays: dict[str, Array] = {"predictions": predicted}
    if ids:
        # (rows, columns): the names of columns need not be those of arrays.
        arrays["ids"] = np.column_stack([column.astype(str) for column in ids.values()])
        arrays["id_names"] = np.array(list(ids))
    if preprocessor.classes is not None:
        arrays["classes"] = np.array(preprocessor.classes)
    if probabilities is not None:
        arrays["probabilities"] = probabilities
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()
