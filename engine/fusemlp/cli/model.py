"""The model of a run: ``fusemlp evaluate``, ``predict``, ``report`` and ``export``."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fusemlp.cli.options import EvaluateOptions, ExportOptions, PredictOptions, ReportOptions, UseOptions
from fusemlp.cli.output import check_output, finite, show, write_made
from fusemlp.cli.report import write_page
from fusemlp.cli.session import options_of, prepared_data
from fusemlp.datasets.cells import BLOCK
from fusemlp.datasets.load import load_features, load_labelled
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import among, network_inputs
from fusemlp.datasets.tables import ARROW, TABLES, excel, is_table
from fusemlp.describe.checks import aligned, counted, listed
from fusemlp.describe.description import reading, stored
from fusemlp.describe.network import MLP
from fusemlp.engine import Engine, load
from fusemlp.fleet.results import members
from fusemlp.inputs.arrays import Array
from fusemlp.report import metrics, runs
from fusemlp.report.evidence import certify, guarantee_lines, guarantees
from fusemlp.report.onnx import onnx_bytes
from fusemlp.report.onnx_graph import has_words
from fusemlp.report.runs import Run, csv_bytes, guarded, open_run, read_json, read_training_rows, weights_path
from fusemlp.report.uncertainty import HeldOut, intervals, sets, spread
from fusemlp.runtime.files import write_atomically
from fusemlp.tables import descriptions
from fusemlp.tables.preparation import Prepared, labelled_hashes
from fusemlp.training.checkpoint import model_bytes
from fusemlp_kernels.errors import ArgumentError, CheckpointError, DataError

_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": partial(gzip.compress, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
# The digits of a number that a sheet of Excel keeps.
EXCEL_DIGITS = 15
# Files whose cells have types, and all.
TYPED = (*ARROW, ".xlsx")
SUFFIXES = (".csv", ".tsv", *(f"{text}{packed}" for text in (".csv", ".tsv") for packed in _PACKERS), *TYPED)
OUTPUTS = (*SUFFIXES, ".npz")


def open_model(options: UseOptions) -> tuple[Engine, Preprocessor, dict[str, Any]]:
    """Return the engine, the preprocessor and the configuration of a run."""
    run, config = open_run(options.run)
    path = weights_path(run, options.weights)
    engine = load(path, backend=options.backend, device=options.device, precision=options.precision)
    preprocessor = Preprocessor.from_config(config["preprocessor"])
    if preprocessor.one_hot_targets and engine.loss.is_classification:
        raise CheckpointError(f"{run.config}: one_hot_targets: expected False with {engine.loss.kind}, got True")
    return engine, preprocessor, config


def predict(options: PredictOptions) -> None:
    """Write the predictions for the rows of ``data`` to ``out``: labels, or values in original units."""
    data, out, to_stdout = options.data, options.out, str(options.out) == "-"
    if not to_stdout:
        check_output("out", out, OUTPUTS, force=options.force)
        if out.suffix.lower() == ".xlsx":
            excel(out)
    elif options.as_json:
        raise ArgumentError("json: with --out - the predictions are on stdout; leave it out, or give --out a file")
    if options.with_data and options.id:
        raise ArgumentError(f"id: --with-data writes all columns, {listed(options.id)} too; leave out one of both")
    carried = None if options.with_data else options.id or ()
    if carried != () and not is_table(Path(data)):
        option = "with_data" if options.with_data else "id"
        raise ArgumentError(f"{option}: only tables ({', '.join(TABLES)}) have columns with names, not {data!r}")
    engine, preprocessor, config = open_model(options)
    if options.proba and not engine.loss.is_classification:
        reason = f"the run was trained with {engine.loss.kind}, which gives no probabilities"
        raise ArgumentError(f"proba: {reason}; train with cross_entropy")
    held = None if options.interval is None else _held_out(options, options.interval, config)
    models = members(engine, "spread") if options.spread else []
    notes: list[str] = []
    ids: dict[str, Any] = {}
    reads = options.reading(config, notes) | {"carried": carried, "typed": out.suffix.lower() in TYPED}
    reads["ignore_unused"] |= options.with_data
    codes = engine.inputs.reads_codes
    X = network_inputs(preprocessor, load_features(data, preprocessor, ids=ids, **reads), engine.precision, codes=codes)
    beside = metrics.distribution(engine, preprocessor, X)
    predicted = metrics.predictions(engine, preprocessor, X)
    more: dict[str, Array] = {}
    if held is not None and options.interval is not None and preprocessor.classes is None:
        more["low"], more["high"] = intervals(engine, preprocessor, X, held, options.interval)
        endless = np.array(preprocessor.targets)[np.isinf(held.bound(options.interval))].tolist()
        if endless:
            notes.append(f"too few held-out rows have {listed(endless)}: its intervals have no ends")
    elif held is not None and options.interval is not None:
        more["in_set"] = sets(metrics.class_scores(engine, X), held, options.interval)
    if models:
        more["spread"] = spread(models, preprocessor, X, metrics.predicted_codes(engine, preprocessor, X))
    if options.proba:
        more["probabilities"] = engine.predict_proba(X)
    if out.suffix.lower() == ".npz":
        make = partial(_npz, preprocessor, ids, {"predictions": predicted, **beside, **more})
    else:
        columns = _columns(preprocessor, {**(beside or {"prediction": predicted}), **more})
        twice = [name for name in columns if name in ids]
        if twice:
            mend = "rename them there, or choose columns with --id"
            raise DataError(f"{data}: predictions have columns {listed(twice)} too; {mend}")
        make = partial(table_bytes, "stdout.csv" if to_stdout else out.name, {**ids, **columns}, notes)
    line = f"predictions of {counted(len(X), 'row')} {'on stdout' if to_stdout else f'in {out}'}"
    if to_stdout:
        sys.stdout.buffer.write(make())
        print(*notes, line, sep="\n", file=sys.stderr)
        return
    write_made("out", out, make)
    about = {"run": str(options.run), "data": data, "weights": options.weights, "rows": len(X), "out": str(out)}
    show(about | {"notes": notes}, [*notes, line], as_json=options.as_json)


def _held_out(options: PredictOptions, coverage: float, config: Mapping[str, Any]) -> HeldOut:
    """Return the errors of held-out rows that the run's report keeps, enough of them for the coverage."""
    report = read_json(Run(options.run).report)
    if config["preprocessor"]["task"] == "multilabel":
        raise ArgumentError("interval: several labels a row have none; --proba writes the probability of each")
    if "held_out" not in report:
        trained_with = config["options"]
        if not report:
            reason = "is missing: the training has not come to its end; go on with fusemlp train --resume"
        else:
            cause = "an earlier release wrote it; train again with this one"
            if trained_with.get("validation") is None and trained_with["validation_fraction"] == 0:
                cause = "of --validation-fraction 0; train again without that option"
            elif report["interrupted"]:
                cause = "Ctrl-C cut the training off; train to the end"
            reason = f"has no errors of held-out rows, because {cause}"
        raise ArgumentError(f"interval: the report of {str(options.run)!r} {reason}")
    with reading(str(Run(options.run).report), "train again, or leave out --interval"):
        held: HeldOut = stored("held_out", report["held_out"], HeldOut)
    try:
        held.bound(coverage)
    except ArgumentError as error:
        raise ArgumentError(f"interval: {str(error).removeprefix('coverage: ')}") from None
    return held


def _columns(preprocessor: Preprocessor, predicted: Mapping[str, Array]) -> dict[str, Sequence[Any] | Array]:
    """Return the predictions (rows, ...) by the names of a table's columns."""
    classes = preprocessor.classes or preprocessor.targets
    columns: list[tuple[str, Sequence[Any] | Array]] = []
    for name, values in predicted.items():
        # as Parquet has them, whatever the precision
        values = values.astype(np.float64) if values.dtype == np.float32 else values
        if name == "in_set":
            sets_of = ([str(label) for label, inside in zip(classes, row, strict=True) if inside] for row in values)
            columns.append(("set", ["|".join(labels) for labels in sets_of]))
        elif name == "probabilities":
            columns += zip([f"probability_{label}" for label in classes], values.T, strict=True)
        else:
            targets = values.reshape(len(values), -1).T
            names = [name] if len(targets) == 1 else [f"{name}_{target}" for target in preprocessor.targets]
            columns += zip(names, targets, strict=True)
    return dict(columns)


def _npz(preprocessor: Preprocessor, ids: Mapping[str, Any], arrays: dict[str, Array]) -> bytes:
    if ids:
        # (rows, columns): the names of columns need not be those of arrays.
        arrays["ids"] = np.column_stack([np.array(column).astype(str) for column in ids.values()])
        arrays["id_names"] = np.array(list(ids))
    if preprocessor.classes is not None:
        arrays["classes"] = np.array(preprocessor.classes)
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def _excel_cell(cell: Any) -> Any:
    """Return a guarded cell; as text what Excel cannot hold: long whole numbers, times with a zone, lists, bytes."""
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    long = isinstance(cell, int) and abs(cell) >= 10**EXCEL_DIGITS
    if long or getattr(cell, "tzinfo", None) is not None or isinstance(cell, list | tuple | dict | bytes):
        cell = str(cell)
    if isinstance(cell, str):
        cell = ILLEGAL_CHARACTERS_RE.sub(lambda match: ascii(match[0])[1:-1], cell)
    return guarded(cell)


def table_bytes(name: str, columns: Mapping[str, Any], notes: list[str]) -> bytes:
    """Return columns, of Python or Arrow, as the content of a file whose ``name`` ends in one of ``SUFFIXES``."""
    suffix, stream = Path(name).suffix.lower(), io.BytesIO()
    if suffix in _PACKERS:
        return _PACKERS[suffix](table_bytes(Path(name).stem, columns, notes))
    if suffix in ARROW:
        import pyarrow
        from pyarrow import feather, parquet

        write = parquet.write_table if ARROW[suffix] == "parquet" else feather.write_feather
        write(pyarrow.table(dict(columns)), stream)
        return stream.getvalue()
    # a row at a time: of millions the cells would take gigabytes
    rows = chain([[*columns]], zip(*map(_cells, columns.values()), strict=True))
    if suffix != ".xlsx":
        return csv_bytes(rows, notes, "\t" if suffix == ".tsv" else ",")
    book = excel(name).Workbook(write_only=True)
    sheet = book.create_sheet("predictions")
    for row in rows:
        sheet.append([*map(_excel_cell, row)])
    book.save(stream)
    return stream.getvalue()


def _cells(column: Any) -> Iterator[Any]:
    """Return the cells of a column of Python, NumPy or Arrow as Python's."""
    for start in range(0, len(column), BLOCK):
        piece = column[start : start + BLOCK]
        yield from piece.to_pylist() if hasattr(piece, "to_pylist") else np.asarray(piece, object).tolist()


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
        (cells, _, rows), test = prepared.test_rows, prepared.test
        assert test is not None, "checked by test_rows"
        X, labels, weight, features = test.X, test.labels, test.weight, cells[rows]
    else:
        features, labels = load_labelled(options.data, preprocessor, **options.reading(config, notes))
        seen = _trained_on(options, preprocessor, features, labels, notes)
        codes, weight = engine.inputs.reads_codes, None
        X = network_inputs(preprocessor, features, engine.precision, codes=codes)
    if options.attack is not None:
        engine.network.check_single("attack", "an attack")
    how = descriptions.attack(options, preprocessor, X, features, "attack")
    report, _ = metrics.score(engine, preprocessor, X, labels, weight)
    report |= guarantees(engine, preprocessor, how, X, features, labels, weight)
    if options.certify is not None:
        report["certified"] = certify(engine, preprocessor, features, labels, options.certify, argument="certify")
    lines = [*notes, *metrics.headline(report), *guarantee_lines(report)]
    if "classes" in report:
        lines += ["", aligned(metrics.class_table(report))]
        if len(report["classes"]) <= MOST_PRINTED_CLASSES:
            lines += ["", aligned(metrics.confusion_table(report))]
    about: dict[str, Any] = {"run": str(options.run), "data": options.data, "weights": options.weights, "notes": notes}
    about["training_rows"] = seen
    show(about | report, lines, as_json=options.as_json)


def before_final_fit(options: Judging, notes: list[str]) -> Judging:
    """Return the options, with the weights best, noted, if ``--final-fit`` trained the model on the test rows too."""
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
    prepared = prepared_data(options_of(config), preprocessor, MLP.from_config(config["network"]))
    if prepared.summary["fingerprint"] != config["data"]["fingerprint"]:
        sources = config["data"]["source"], *map(config["options"].get, ("validation", "test"))
        files = listed(filter(None, sources))
        raise CheckpointError(
            f"run: the data {files} have changed since the training, so its test rows are not known any more; "
            "give the rows to judge it on: --data FILE"
        )
    return prepared


def report(options: ReportOptions) -> None:
    """Write ``report.html`` into the run folder, from the run's weights and its own test rows."""
    run = Run(options.run)
    scores = read_json(run.report)
    notes: list[str] = []
    engine, preprocessor, config = open_model(before_final_fit(options, notes))
    prepared = own_data(config, preprocessor)
    # what the training tried is not tried again
    tried = tuple(note for note in config["data"].get("notes", []) if note not in prepared.notes)
    prepared = replace(prepared, tried=tried)
    test, tested = prepared.test, None
    if test is not None and not scores.get("diverged"):
        figures, tested = metrics.score(engine, preprocessor, test.X, test.labels, test.weight)
        scores["test"] = finite(figures)
    write_page(run, engine, prepared, scores, runs.read_history(run), tested)
    content = {"run": str(run.path), "report": str(run.page), "notes": notes}
    show(content, [*notes, f"report {run.page}"], as_json=options.as_json)


def export(options: ExportOptions) -> None:
    """Write the requested files, and print the inputs and outputs of their models."""
    bare = options.bare
    files = {"onnx": options.onnx, "safetensors": options.safetensors}
    wanted = {argument: file for argument, file in files.items() if file is not None}
    if not wanted:
        raise ArgumentError("onnx: say what to write: --onnx FILE, --safetensors FILE, or both")
    if bare and "onnx" not in wanted:
        raise ArgumentError("bare: it is for --onnx FILE; a safetensors file never holds the scaling of the features")
    for argument, file in wanted.items():
        check_output(argument, file, (f".{argument}",), force=options.force)
    run, config = open_run(options.run)
    preprocessor = Preprocessor.from_config(config["preprocessor"])
    # Any machine can export: 16-bit precisions have float32 parameters too.
    precision = "fp64" if config["precision"] == "fp64" else "fp32"
    engine = load(weights_path(run, options.weights), backend="numpy", precision=precision)
    about = {"preprocessor": preprocessor.to_json()}
    contents: dict[str, Callable[[], bytes]] = {
        "onnx": lambda: onnx_bytes(engine, None, about) if bare else onnx_bytes(engine, preprocessor),
        "safetensors": lambda: model_bytes(engine, about),
    }
    # Make both before writing either.
    written = {argument: contents[argument]() for argument in wanted}
    lines = []
    for argument, file in wanted.items():
        write_atomically(file, written[argument])
        lines += [f"{argument} {file}", f"  {_inputs(engine, preprocessor, scaled=bare or argument == 'safetensors')}"]
    shown: dict[str, Any] = {"run": str(options.run), "weights": options.weights}
    shown |= {argument: None if file is None else str(file) for argument, file in files.items()}
    kind = "scaled columns" if bare else "one input a feature" if has_words(preprocessor) else "features"
    show({**shown, "onnx_input": kind if "onnx" in wanted else None}, lines, as_json=options.as_json)


def _inputs(engine: Engine, preprocessor: Preprocessor, *, scaled: bool) -> str:
    """Return one line on the inputs and outputs of the exported model."""
    width = engine.network.sizes[0] if scaled else len(preprocessor.feature_names)
    answers, units = "labels", "of the data" if preprocessor.classes else "0 or 1"
    if preprocessor.task == "regression":
        answers, units = "values", "in original units"
    if not scaled:
        features = zip(preprocessor.feature_names, preprocessor.sources, strict=True)
        named = ", ".join(repr(name) for name, source in features if name != source)
        dates = f"; of dates the numbers {named}, elapsed days since 1970-01-01" if named else ""
        each = ", an input (rows, 1) for each, words as strings" if has_words(preprocessor) else ""
        return f"takes the {counted(width, 'feature')} as they are in the data{each}{dates}; gives {answers} {units}"
    if preprocessor.task == "multilabel":
        gives = "0 or 1 for each label"
    elif preprocessor.classes is None:
        gives = "values as the run scales them"
    else:
        gives = "a value for each class" if preprocessor.one_hot_targets else "class indices"
    return (
        f"takes {counted(width, 'column')} as the run scales them ({preprocessor.scale}), gives {gives}; "
        "its metadata entry 'preprocessor' has the scaling"
    )
