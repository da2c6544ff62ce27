"""``fusemlp evaluate`` and ``fusemlp predict``: the model of a run on other rows."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp.cli.finish import finite
from fusemlp.cli.options import TrainOptions
from fusemlp.cli.prepare import prepare
from fusemlp.datasets.load import load_features, load_labelled
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.engine import Engine, load_checkpoint
from fusemlp.inputs.arrays import Array
from fusemlp.report.metrics import aligned, class_table, confusion_table, headline, predictions, score
from fusemlp.report.runs import open_run, weights_path
from fusemlp.runtime.files import write_atomically
from fusemlp_kernels.errors import ArgumentError, CheckpointError

# A terminal is too narrow for the confusion matrix of more classes.
MOST_PRINTED_CLASSES = 20
OUTPUTS = (".csv", ".npz")


def open_model(
    path: Path, *, weights: str, backend: str, device: str | None
) -> tuple[Engine, Preprocessor, dict[str, Any]]:
    """Return the engine, the preprocessor and the configuration of a run."""
    run, config = open_run(path)
    engine = load_checkpoint(weights_path(run, weights), backend=backend, device=device)
    return engine, Preprocessor.from_config(config["preprocessor"]), config


def evaluate(path: Path, data: str | None, *, weights: str, backend: str, device: str | None, as_json: bool) -> None:
    """Print the scores of a run's model on its own test rows, or on the labelled ``data``."""
    engine, preprocessor, config = open_model(path, weights=weights, backend=backend, device=device)
    if data is None:
        X, labels, weight = _own_test_rows(config)
    else:
        features, labels = load_labelled(data, preprocessor)
        X, weight = preprocessor.transform_features(features), None
    report = score(engine, preprocessor, X, labels, weight)
    if as_json:
        print(json.dumps(finite({"run": str(path), "data": data, "weights": weights, **report})))
        return
    for line in headline(report):
        print(line)
    if "classes" in report:
        print(f"\n{aligned(class_table(report))}")
        if len(report["classes"]) <= MOST_PRINTED_CLASSES:
            print(f"\n{aligned(confusion_table(report))}")


def _own_test_rows(config: dict[str, Any]) -> tuple[Array, Array, Array | None]:
    """Return the run's test rows, computed again from the data and the seed."""
    source = config["data"]["source"]
    prepared = prepare(TrainOptions(**{**config["options"], "data": source}))
    if prepared.summary["fingerprint"] != config["data"]["fingerprint"]:
        raise CheckpointError(
            f"run: the data {source!r} have changed since the training, so its test rows are not known any more; "
            "give the rows to judge it on: --data FILE"
        )
    return prepared.test.X, prepared.test.labels, prepared.test.weight


def predict(
    path: Path,
    data: str,
    out: Path,
    *,
    proba: bool,
    weights: str,
    force: bool,
    backend: str,
    device: str | None,
    as_json: bool,
) -> None:
    """Write the predictions for the rows of ``data`` to ``out``: labels, or values in original units."""
    check_output("out", out, OUTPUTS, force=force)
    engine, preprocessor, _ = open_model(path, weights=weights, backend=backend, device=device)
    if proba and not engine.loss.is_classification:
        raise ArgumentError(
            f"proba: the run was trained with {engine.loss.kind}, which gives no probabilities; "
            "train with cross_entropy"
        )
    X = preprocessor.transform_features(load_features(data, preprocessor))
    predicted = predictions(engine, preprocessor, X)
    probabilities = engine.predict_proba(X) if proba else None
    content = _npz if out.suffix.lower() == ".npz" else _csv
    write_output("out", out, content(preprocessor, predicted, probabilities))
    if as_json:
        print(json.dumps({"run": str(path), "data": data, "weights": weights, "rows": len(X), "out": str(out)}))
        return
    print(f"predictions of {len(X)} rows {out}")


def check_output(argument: str, path: Path, suffixes: tuple[str, ...], *, force: bool) -> None:
    """Raise ArgumentError unless a file of this name may be written; call it before the work."""
    if path.suffix.lower() not in suffixes:
        raise ArgumentError(f"{argument}: expected a file name ending in {' or '.join(suffixes)}, got {str(path)!r}")
    if path.is_dir() or (path.exists() and not force):
        raise ArgumentError(f"{argument}: {str(path)!r} exists; give another name, or --force to overwrite a file")
    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"{argument}: there is no folder {str(path.parent)!r}; make it first")


def write_output(argument: str, path: Path, content: bytes) -> None:
    """Write a file atomically; ArgumentError if it cannot be written."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ArgumentError(f"{argument}: {str(path)!r} cannot be written ({error.strerror})") from error


def _csv(preprocessor: Preprocessor, predicted: Array, probabilities: Array | None) -> bytes:
    columns = predicted.reshape(len(predicted), -1)
    many = columns.shape[1] > 1
    names = [f"prediction_{index}" if many else "prediction" for index in range(columns.shape[1])]
    table = columns.tolist()
    if probabilities is not None:
        names += [f"probability_{label}" for label in map(str, preprocessor.classes or ())]
        table = [row + more for row, more in zip(table, probabilities.tolist(), strict=True)]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(table)
    return stream.getvalue().encode()


def _npz(preprocessor: Preprocessor, predicted: Array, probabilities: Array | None) -> bytes:
    arrays: dict[str, Array] = {"predictions": predicted}
    if preprocessor.classes is not None:
        arrays["classes"] = np.array(preprocessor.classes)
    if probabilities is not None:
        arrays["probabilities"] = probabilities
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()
