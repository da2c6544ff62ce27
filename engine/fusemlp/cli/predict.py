"""``fusemlp predict``: the model of a run on new rows."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusemlp.cli.options import PredictOptions, UseOptions
from fusemlp.cli.output import check_output, show
from fusemlp.datasets.load import load_features
from fusemlp.datasets.prepare import network_inputs
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.description import reading
from fusemlp.engine import Engine, load_checkpoint
from fusemlp.fleet.merge import members
from fusemlp.inputs.arrays import Array
from fusemlp.report.metrics import class_scores, predicted_codes, predictions
from fusemlp.report.runs import Run, csv_bytes, open_run, read_json, weights_path
from fusemlp.report.uncertainty import HeldOut, intervals, sets, spread
from fusemlp.runtime.files import write_atomically
from fusemlp_kernels.errors import ArgumentError, CheckpointError

OUTPUTS = (".csv", ".npz")


def open_model(options: UseOptions) -> tuple[Engine, Preprocessor, dict[str, Any]]:
    """Return the engine, the preprocessor and the configuration of a run."""
    run, config = open_run(options.run)
    engine = load_checkpoint(weights_path(run, options.weights), backend=options.backend, device=options.device)
    preprocessor = Preprocessor.from_config(config["preprocessor"])
    if preprocessor.one_hot_targets and engine.loss.is_classification:
        raise CheckpointError(
            f"{run.config}: one_hot_targets: expected False with the loss {engine.loss.kind}, got True"
        )
    return engine, preprocessor, config


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
    held = None if options.interval is None else _held_out(options, options.interval, config)
    models = members(engine, "spread") if options.spread else []
    notes: list[str] = []
    ids: dict[str, Array] = {}
    features = load_features(data, preprocessor, ids=ids, **options.reading(config, notes))
    X = network_inputs(preprocessor, features, engine.precision)
    predicted = predictions(engine, preprocessor, X)
    more = {} if held is None else _ends(engine, preprocessor, X, predicted, held, float(options.interval or 0))
    if models:
        more["spread"] = spread(models, preprocessor, X, predicted_codes(engine, preprocessor, X))
    if options.proba:
        more["probabilities"] = engine.predict_proba(X)
    parts = preprocessor, ids, predicted, more
    write_atomically(out, _npz(*parts) if out.suffix.lower() == ".npz" else csv_bytes(_csv(*parts), notes))
    about = {"run": str(options.run), "data": data, "weights": options.weights, "rows": len(X), "out": str(out)}
    lines = [*notes, f"predictions of {len(X)} rows {out}"]
    show(about | {"notes": notes}, lines, as_json=options.as_json)


def _held_out(options: PredictOptions, coverage: float, config: Mapping[str, Any]) -> HeldOut:
    """Return the errors of held-out rows that the run's report keeps, enough of them for the coverage."""
    report = read_json(Run(options.run).report)
    if "held_out" not in report:
        given = config["options"]
        if not report:
            reason = "is missing: the training has not come to its end; go on with fusemlp train --resume"
        elif given.get("validation") is None and given["validation_fraction"] == 0:
            reason = (
                "has no errors of held-out rows, because of --validation-fraction 0; train again without that option"
            )
        elif report["interrupted"]:
            reason = "has no errors of held-out rows, because Ctrl-C cut the training off; train to the end"
        else:
            reason = "has no errors of held-out rows, because an earlier release wrote it; train again with this one"
        raise ArgumentError(f"interval: the report of {str(options.run)!r} {reason}")
    with reading(str(Run(options.run).report), "train again, or leave out --interval"):
        held = HeldOut.from_config(report["held_out"])
    try:
        held.bound(coverage)
    except ArgumentError as error:
        raise ArgumentError(f"interval: {str(error).removeprefix('coverage: ')}") from None
    return held


def _ends(
    engine: Engine, preprocessor: Preprocessor, X: Array, predicted: Array, held: HeldOut, coverage: float
) -> dict[str, Array]:
    """Return the ends of intervals, or which classes are in each set."""
    if preprocessor.classes is None:
        low, high = intervals(engine, preprocessor, predicted, held, coverage)
        return {"low": low, "high": high}
    return {"in_set": sets(class_scores(engine, X), held, coverage)}


def _csv(preprocessor: Preprocessor, ids: Mapping[str, Array], predicted: Array, more: Mapping[str, Array]) -> Any:
    columns = predicted.reshape(len(predicted), -1)
    count, classes = columns.shape[1], preprocessor.classes or ()
    blocks = [(["prediction"] if count == 1 else [f"prediction_{index}" for index in range(count)], columns.tolist())]
    for name in ("low", "high", "spread"):
        if name in more:
            ends = more[name].reshape(len(predicted), -1)
            blocks.append(([name] if count == 1 else [f"{name}_{index}" for index in range(count)], ends.tolist()))
    if "in_set" in more:
        words = ["|".join(str(label) for label, one in zip(classes, row, strict=True) if one) for row in more["in_set"]]
        blocks.append((["set"], [[text] for text in words]))
    if "probabilities" in more:
        blocks.append(([f"probability_{label}" for label in classes], more["probabilities"].tolist()))
    if ids:
        named = [list(row) for row in zip(*(column.tolist() for column in ids.values()), strict=True)]
        blocks.insert(0, ([*ids], named))
    names = [name for header, _ in blocks for name in header]
    rows = zip(*(part for _, part in blocks), strict=True)
    return [names, *([cell for cells in row for cell in cells] for row in rows)]


def _npz(preprocessor: Preprocessor, ids: Mapping[str, Array], predicted: Array, more: Mapping[str, Array]) -> bytes:
    arrays: dict[str, Array] = {"predictions": predicted, **more}
    if ids:
        # (rows, columns): the names of columns need not be those of arrays.
        arrays["ids"] = np.column_stack([column.astype(str) for column in ids.values()])
        arrays["id_names"] = np.array(list(ids))
    if preprocessor.classes is not None:
        arrays["classes"] = np.array(preprocessor.classes)
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()
