"""``fusemlp evaluate``: the scores of a run's model."""

from __future__ import annotations

from typing import Any

from fusemlp.cli.options import EvaluateOptions, TrainOptions
from fusemlp.cli.output import show
from fusemlp.cli.predict import open_model
from fusemlp.cli.prepare import network_inputs, prepare
from fusemlp.datasets.load import load_labelled
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.inputs.arrays import Array
from fusemlp.report.metrics import aligned, class_table, confusion_table, headline, score
from fusemlp_kernels.errors import CheckpointError

# A terminal is too narrow for the confusion matrix of more classes.
MOST_PRINTED_CLASSES = 20


def evaluate(options: EvaluateOptions) -> None:
    """Print the scores of a run's model on its own test rows, or on the labelled ``data``."""
    engine, preprocessor, config = open_model(options)
    notes: list[str] = []
    if options.data is None:
        X, labels, weight = _own_test_rows(config, preprocessor)
        if config["options"].get("final_fit") and options.weights == "model":
            notes.append(
                "--final-fit trained the model on these rows too: the scores say nothing of new rows; those of the "
                "model before are in report.json, under test"
            )
    else:
        form = options.form(config["options"])
        features, labels = load_labelled(options.data, preprocessor, form=form, notes=notes)
        X, weight = network_inputs(preprocessor, features, engine.precision), None
    report = score(engine, preprocessor, X, labels, weight)
    lines = [*notes, *headline(report)]
    if "classes" in report:
        lines += ["", aligned(class_table(report))]
        if len(report["classes"]) <= MOST_PRINTED_CLASSES:
            lines += ["", aligned(confusion_table(report))]
    about = {"run": str(options.run), "data": options.data, "weights": options.weights, "notes": notes}
    show(about | report, lines, as_json=options.as_json)


def _own_test_rows(config: dict[str, Any], preprocessor: Preprocessor) -> tuple[Array, Array, Array | None]:
    """Return the run's test rows, computed again from the data and the seed."""
    source = config["data"]["source"]
    prepared = prepare(TrainOptions(**{**config["options"], "data": source}), preprocessor)
    if prepared.summary["fingerprint"] != config["data"]["fingerprint"]:
        raise CheckpointError(
            f"run: the data {source!r} have changed since the training, so its test rows are not known any more; "
            "give the rows to judge it on: --data FILE"
        )
    return prepared.test.X, prepared.test.labels, prepared.test.weight
