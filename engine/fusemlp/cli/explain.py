"""``fusemlp explain``: the columns that a run's model goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fusemlp.cli.model import before_final_fit, open_model, own_data
from fusemlp.cli.options import EXPLAIN_METHODS, ExplainOptions
from fusemlp.cli.output import check_output, show, write_picture
from fusemlp.datasets.load import load_features, load_labelled
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import network_inputs
from fusemlp.describe.checks import as_count, check_choice
from fusemlp.describe.text import aligned
from fusemlp.engine import Engine
from fusemlp.inputs.arrays import Array
from fusemlp.report.evidence import image_shape
from fusemlp.report.explanations import Attributions, column_attributions, permutation_importance
from fusemlp.report.metrics import spelled
from fusemlp.report.plots import check_plots, heat_figure, importance_figure, literal
from fusemlp.report.runs import csv_bytes
from fusemlp.runtime.files import write_atomically
from fusemlp_kernels.errors import ArgumentError, FusemlpError, unknown_name

# Permutations of each column; columns that are printed and drawn; classes that are drawn.
REPEATS, MOST_COLUMNS, MOST_CLASSES = 10, 20, 30


class _Rows(NamedTuple):
    """Rows as in the data, the indices of those that are explained, and columns that name these."""

    cells: Array
    labels: Any
    chosen: Array
    ids: Mapping[str, Array]
    # inputs of the network, for baselines
    background: Array | None


def explain(options: ExplainOptions) -> None:
    """Print the most important columns, and write all of them, or the attributions of each row, and a picture."""
    for name, path, suffix in (("out", options.out, ".csv"), ("plot", options.plot, ".png")):
        if path is not None:
            check_output(name, path, (suffix,), force=options.force)
    if options.plot is not None:
        check_plots()
    as_count("rows", options.rows, minimum=1)
    notes: list[str] = []
    options = before_final_fit(options, notes)
    engine, preprocessor, config = open_model(options)
    image = image_shape(preprocessor)
    method = options.method or ("permutation" if image is None else "integrated")
    permuted = check_choice("method", method, EXPLAIN_METHODS) == "permutation"
    known = preprocessor.labels or tuple(map(str, range(preprocessor.outputs)))
    output = _output_index(options.of_class, known, preprocessor, permuted=permuted)
    explained_rows = _rows(options, preprocessor, config, notes, labelled=permuted)
    content: dict[str, Any] = {"run": str(options.run), "data": options.data, "weights": options.weights}
    content |= {"notes": notes, "method": method, "rows": len(explained_rows.chosen)}
    title = f"{len(explained_rows.chosen)} {'test ' if options.data is None else ''}rows, "
    maps: dict[str, Array] = {}
    if permuted:
        chosen = explained_rows.chosen
        moved = permutation_importance(
            engine, preprocessor, explained_rows.cells[chosen], explained_rows.labels[chosen], repeats=REPEATS
        )
        title += f"each column permuted {REPEATS} times"
        unit, beside = f"{moved.metric.replace('_', ' ')} worse by", "deviation"
        names = moved.names if image is None else [f"square {name}" for name in moved.names]
        columns = list(zip(names, moved.worse.tolist(), moved.deviation.tolist(), strict=True))
        table: list[Sequence[Any]] = [("column", "importance", beside), *columns]
    else:
        X = network_inputs(preprocessor, explained_rows.cells, engine.precision, explained_rows.chosen)
        # from zeros of the inputs, which are black
        black = np.zeros(preprocessor.width) if image is not None and method != "expected" else None
        from_where: dict[str, Any] = {"background": explained_rows.background, "baseline": black}
        attributions = column_attributions(engine, preprocessor, X, method=method, output=output, **from_where)
        title += "gradient times input" if method == "gradient" else f"{method} gradients"
        title += f" of {_of_output(engine, preprocessor, known, output)}"
        unit, beside = "mean absolute attribution", "mean"
        figures = attributions.importance.tolist(), attributions.values.mean(axis=0).tolist()
        columns = sorted(zip(attributions.names, *figures, strict=True), key=lambda column: -column[1])
        explained = (
            [known[at] for at in attributions.chosen]
            if len(known) > 1
            else [preprocessor.target_name] * len(explained_rows.chosen)
        )
        table = _table(attributions, explained_rows, explained)
        for at in np.unique(attributions.chosen)[:MOST_CLASSES].tolist() if image is not None else ():
            maps[known[at]] = attributions.values[attributions.chosen == at].mean(axis=0).reshape(image)
    shown = columns[:MOST_COLUMNS]
    most = max((abs(importance) for _, importance, _ in shown), default=0.0)
    rows = [[name, spelled(importance, most), spelled(other, most)] for name, importance, other in shown]
    lines = [title, aligned([["column", unit, beside], *rows])]
    lines += [f"{len(columns) - len(shown)} others matter less"] if len(columns) > len(shown) else []
    content["columns"] = [
        {"column": name, "importance": importance_of, beside: other} for name, importance_of, other in columns
    ]
    if not permuted and method != "gradient":
        error = np.abs(attributions.error)
        summed = {
            "mean": error.mean(),
            "most": error.max(),
            "difference": np.abs(attributions.outputs - attributions.base).mean(),
        }
        content["completeness"] = {name: float(value) for name, value in summed.items()}
        mean, worst, difference = map(spelled, content["completeness"].values())
        lines.append(
            f"completeness: the attributions of a row sum to its output less the baseline's ({difference} on average) "
            f"within {mean} on average, {worst} at most"
        )
    if options.out is not None:
        write_atomically(options.out, csv_bytes(table, notes))
        lines.append(f"{'importance' if permuted else 'attributions'} {options.out}")
        content["out"] = str(options.out)
    try:
        if options.plot is not None:
            drawn = partial(importance_figure, shown, unit=unit, title=literal(title), deviations=permuted)
            if maps:
                drawn = partial(heat_figure, maps, unit="mean attribution", title=literal(title))
            write_picture(options.plot, drawn)
            lines.append(f"plot {options.plot}")
            content["plot"] = str(options.plot)
    finally:
        show(content, [*notes, *lines], as_json=options.as_json)


def _output_index(name: str | None, known: Sequence[str], made: Preprocessor, *, permuted: bool) -> int | None:
    """Return the index of the output that ``--class`` names; None for the predicted class or the only target."""
    if permuted and name is not None:
        raise ArgumentError("class: permutation reads the error of all classes; leave it out, or --method integrated")
    if name is None:
        if made.classes is None and len(known) > 1 and not permuted:
            raise ArgumentError(f"class: the run has {len(known)} targets; give the index of one: --class 0")
        return None
    if made.classes is None and len(known) == 1:
        raise ArgumentError(f"class: the run predicts numbers, and has no class {name!r}; leave it out")
    if name not in known:
        raise unknown_name("class", name, known)
    return known.index(name)


def _of_output(engine: Engine, made: Preprocessor, known: Sequence[str], output: int | None) -> str:
    """Return words for the explained output, with its unit."""
    if made.classes is None:
        return repr(made.target_name) if output is None else f"target {output}"
    kind = "logit" if engine.loss.kind.endswith("cross_entropy") else "output"
    return f"the {kind} of " + ("each row's predicted class" if output is None else repr(known[output]))


def _rows(
    options: ExplainOptions, preprocessor: Preprocessor, config: dict[str, Any], notes: list[str], *, labelled: bool
) -> _Rows:
    """Return the run's test rows or those of ``--data``, at most ``--rows`` of them drawn at random."""
    ids: dict[str, Array] = {}
    labels, background = None, None
    if options.data is None:
        prepared = own_data(config, preprocessor)
        cells, labels, rows = prepared.test_rows
        background = prepared.train.X
        ids |= prepared.dataset.ids if prepared.dataset.test is None else {}
    else:
        read = options.reading(config, notes)
        if labelled:
            cells, labels = load_labelled(options.data, preprocessor, **read)
        else:
            cells = load_features(options.data, preprocessor, ids=ids, **read)
            try:
                background = own_data(config, preprocessor).train.X
            except FusemlpError as error:
                # several rows are baselines of each other
                notes.append(f"baselines are these rows, since the training rows are not to be had: {error}")
        rows = np.arange(len(cells))
    if len(rows) > options.rows:
        rows = np.sort(np.random.default_rng(0).choice(rows, options.rows, replace=False))
    return _Rows(cells, labels, rows, {name: column[rows] for name, column in ids.items()}, background)


def _table(found: Attributions, given: _Rows, explained: Sequence[str]) -> list[Sequence[Any]]:
    """Return a row of text for each explained row, below a header."""
    figures = (column.tolist() for column in (found.outputs, found.base, *found.values.T, found.error))
    named = (column.tolist() for column in given.ids.values())
    header = ["row", *given.ids, "explained", "output", "baseline", *found.names, "error"]
    return [header, *zip(given.chosen.tolist(), *named, explained, *figures, strict=True)]
