"""``fusemlp evaluate``: the scores of a run's model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from fusemlp.cli import attacks
from fusemlp.cli.commands import EvaluateOptions
from fusemlp.cli.configuration import options_of
from fusemlp.cli.options import UseOptions
from fusemlp.cli.output import show
from fusemlp.cli.predict import open_model
from fusemlp.cli.prepare import Prepared, labelled_hashes, prepare
from fusemlp.datasets.load import load_labelled
from fusemlp.datasets.parts import among
from fusemlp.datasets.prepare import network_inputs
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.tables import listed
from fusemlp.describe.adversarial import Attack
from fusemlp.describe.network import MLP
from fusemlp.describe.summary import aligned
from fusemlp.inputs.arrays import Array
from fusemlp.report.metrics import class_table, confusion_table, headline, score
from fusemlp.report.robustness import certified_lines, certify, robust_lines, robust_score
from fusemlp.report.runs import Run, read_json, read_training_rows
from fusemlp_kernels.errors import CheckpointError

# A terminal is too narrow for the confusion matrix of more classes.
MOST_PRINTED_CLASSES = 20

Judging = TypeVar("Judging", bound=UseOptions)


def evaluate(options: EvaluateOptions) -> None:
    """Print the scores of a run's model on its own test rows, or on the labelled ``data``."""
    notes: list[str] = []
    seen = None
    options = before_final_fit(options, notes)
    engine, preprocessor, config = open_model(options)
    if options.data is None:
        prepared = own_data(config, preprocessor)
        test, (cells, _, rows) = prepared.test, prepared.test_rows
        X, labels, weight, features = test.X, test.labels, test.weight, cells[rows]
    else:
        features, labels = load_labelled(options.data, preprocessor, **options.reading(config, notes))
        seen = _trained_on(options, preprocessor, features, labels, notes)
        X, weight = network_inputs(preprocessor, features, engine.precision), None
    if options.attack is not None:
        engine.network.check_single("attack", "an attack")
    how = attacks.chosen(options, preprocessor, X, features)
    report = score(engine, preprocessor, X, labels, weight)
    if isinstance(how, Attack):
        report["robust"] = robust_score(engine, preprocessor, X, labels, how, weight)
    if options.certify is not None:
        report["certified"] = certify(engine, preprocessor, features, labels, options.certify, argument="certify")
    lines = [*notes, *headline(report), *robust_lines(report), *certified_lines(report)]
    if "classes" in report:
        lines += ["", aligned(class_table(report))]
        if len(report["classes"]) <= MOST_PRINTED_CLASSES:
            lines += ["", aligned(confusion_table(report))]
    about: dict[str, Any] = {"run": str(options.run), "data": options.data, "weights": options.weights, "notes": notes}
    about["training_rows"] = seen
    show(about | report, lines, as_json=options.as_json)


def before_final_fit(options: Judging, notes: list[str]) -> Judging:
    """Return the options with the weights best in place of a model that ``--final-fit`` trained on the test rows too,
    unless ``--data`` gives other rows; ``notes`` takes a line on it."""
    if getattr(options, "data", None) is not None or options.weights != "model":
        return options
    if "final_fit" not in read_json(Run(options.run).report):
        return options
    notes.append("the weights best are judged: --final-fit trained the model on the test rows too")
    return replace(options, weights="best")


def _trained_on(
    options: EvaluateOptions, preprocessor: Preprocessor, X: Array, labels: Array, notes: list[str]
) -> int | None:
    """Return the number of rows that the run was trained on, with a line in ``notes``; None for an old run."""
    known = read_training_rows(Run(options.run))
    if known is None:
        return None
    count = among(labelled_hashes(preprocessor, X, labels), known)
    if count:
        which = "all" if count == len(X) else f"{count} of"
        notes.append(f"{which} {len(X)} rows are training rows of this run, so these scores flatter it")
    return count


def own_data(config: dict[str, Any], preprocessor: Preprocessor) -> Prepared:
    """Return the run's rows, computed again from the data and the seed."""
    prepared = prepare(options_of(config), preprocessor, MLP.from_config(config["network"]))
    if prepared.summary["fingerprint"] != config["data"]["fingerprint"]:
        given = config["data"]["source"], *map(config["options"].get, ("validation", "test"))
        files = listed(filter(None, given))
        raise CheckpointError(
            f"run: the data {files} have changed since the training, so its test rows are not known any more; "
            "give the rows to judge it on: --data FILE"
        )
    return prepared
