"""``fusemlp explain``: the columns that a run's model goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusemlp.cli.evaluate import before_final_fit, own_data
from fusemlp.cli.options import EXPLAIN_METHODS, ExplainOptions
from fusemlp.cli.output import check_output, show, write_output
from fusemlp.cli.predict import open_model
from fusemlp.datasets.load import load_features, load_labelled
from fusemlp.datasets.prepare import network_inputs
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.checks import as_count, check_choice
from fusemlp.engine import Engine
from fusemlp.inputs.arrays import Array
from fusemlp.report.evidence import image_shape
from fusemlp.report.explanations import column_attributions, permutation_importance
from fusemlp.report.metrics import aligned, spelled
from fusemlp.report.plots import HINT, can_plot, heat_figure, importance_figure, picture
from fusemlp.report.runs import csv_bytes
from fusemlp_kernels.errors import ArgumentError, MissingLibraryError, unknown_name

# Permutations of each column; columns that are printed and drawn; classes that are drawn.
REPEATS, MOST_COLUMNS, MOST_CLASSES = 10, 20, 30


class _Found(NamedTuple):
    """The ``importance`` of each column in ``unit``, the largest first, and a second figure of each, ``beside``.

    ``table`` is the content of the CSV file; ``maps`` are heat maps of images.
    """

    unit: str
    names: Sequence[str]
    importance: Array
    beside: str
    second: Array
    table: list[list[Any]]
    maps: Mapping[str, Array]
    completeness: Mapping[str, float] | None = None


class _Rows(NamedTuple):
    """Rows as in the data, and which of them are explained; ``background``: the network's inputs to compare with."""

    cells: Array
    labels: Any
    rows: Array
    ids: Mapping[str, Array]
    background: Array | None


def explain(options: ExplainOptions) -> None:
    """Print the most important columns, and write all of them, or the attributions of each row, and a picture."""
    for name, path, suffix in (("out", options.out, ".csv"), ("plot", options.plot, ".png")):
        if path is not None:
            check_output(name, path, (suffix,), force=options.force)
    if options.plot is not None and not can_plot():
        raise MissingLibraryError(f"plot: {HINT}")
    as_count("rows", options.rows, minimum=1)
    notes: list[str] = []
    if options.data is None:
        options = before_final_fit(options, notes)
    engine, made, config = open_model(options)
    image = image_shape(made)
    method = options.method or ("permutation" if image is None else "integrated")
    check_choice("method", method, EXPLAIN_METHODS)
    output = _output_index(options.of_class, made, method)
    given = _rows(options, made, config, method, notes)
    title = f"{len(given.rows)} {'test ' if options.data is None else ''}rows"
    if method == "permutation":
        title += f", each column permuted {REPEATS} times"
        found = _permuted(engine, made, given, image)
    else:
        title += ", gradient times input" if method == "gradient" else f", {method} gradients"
        title += f" of class {options.of_class}" if made.classes is not None and output is not None else ""
        found = _attributed(engine, made, given, image, method=method, output=output)
    names, importance, second = found.names, found.importance, found.second
    rows = [[name, *map(spelled, each)] for name, *each in zip(names, importance, second, strict=True)][:MOST_COLUMNS]
    lines = [*notes, title, aligned([["column", found.unit, found.beside], *rows])]
    lines += [f"{len(names) - len(rows)} others matter less"] if len(names) > len(rows) else []
    if found.completeness is not None:
        mean, most, difference = map(spelled, found.completeness.values())
        lines.append(
            f"completeness: the attributions of a row sum to its output less the baseline's ({difference} on average) "
            f"within {mean} on average, {most} at most"
        )
    if options.out is not None:
        write_output("out", options.out, csv_bytes(found.table))
        lines.append(f"{'importance' if method == 'permutation' else 'attributions'} {options.out}")
    if options.plot is not None:
        write_output("plot", options.plot, picture(_figure(found, title)))
        lines.append(f"plot {options.plot}")
    columns = zip(names, importance.tolist(), second.tolist(), strict=True)
    content = {
        "run": str(options.run),
        "data": options.data,
        "weights": options.weights,
        "notes": notes,
        "method": method,
        "rows": len(given.rows),
        "columns": [{"column": name, "importance": one, found.beside: other} for name, one, other in columns],
        "completeness": found.completeness,
        "out": None if options.out is None else str(options.out),
        "plot": None if options.plot is None else str(options.plot),
    }
    show(content, lines, as_json=options.as_json)


def _output_index(name: str | None, made: Preprocessor, method: str) -> int | None:
    """Return the index of the output that ``--class`` names; None for the predicted class or the only target."""
    if method == "permutation":
        if name is not None:
            raise ArgumentError(
                "class: permutation looks at the error of all classes; leave it out, or add --method integrated"
            )
        return None
    if made.classes is None and made.outputs == 1:
        if name is not None:
            raise ArgumentError(f"class: the run predicts numbers, and has no class {name!r}; leave it out")
        return None
    known = made.labels or tuple(map(str, range(made.outputs)))
    if name is None:
        if made.classes is None:
            raise ArgumentError(f"class: the run has {made.outputs} targets; give the index of one: --class 0")
        return None
    if name not in known:
        raise unknown_name("class", name, known)
    return known.index(name)


def _rows(
    options: ExplainOptions, made: Preprocessor, config: Mapping[str, Any], method: str, notes: list[str]
) -> _Rows:
    """Return the run's test rows or those of ``--data``, at most ``--rows`` of them drawn at random."""
    ids: dict[str, Array] = {}
    labels, background = None, None
    if options.data is None:
        prepared = own_data(dict(config), made)
        cells, labels, rows = prepared.test_rows
        background = prepared.train.X
        ids |= prepared.dataset.ids if prepared.dataset.test is None else {}
    else:
        read: dict[str, Any] = {"form": options.form(config["options"]), "notes": notes}
        read["ignore_unused"] = options.ignore_unused
        if method == "permutation":
            cells, labels = load_labelled(options.data, made, **read)
        else:
            cells = load_features(options.data, made, ids=ids, **read)
        rows = np.arange(len(cells))
    if len(rows) > options.rows:
        rows = np.sort(np.random.default_rng(0).choice(rows, options.rows, replace=False))
    return _Rows(cells, labels, rows, ids, background)


def _permuted(engine: Engine, made: Preprocessor, given: _Rows, image: tuple[int, int] | None) -> _Found:
    rows = given.rows
    found = permutation_importance(engine, made, given.cells[rows], given.labels[rows], repeats=REPEATS)
    unit = f"{found.metric.replace('_', ' ')} worse by"
    names, maps = found.names, {}
    if image is not None:
        places = np.array([name.split() for name in names], np.int64)
        maps[""] = np.zeros(places.max(axis=0) + 1)
        maps[""][tuple(places.T)] = found.worse
        names = [f"square {name}" for name in names]
    table = [["column", "importance", "deviation"]]
    table += map(list, zip(names, found.worse.tolist(), found.deviation.tolist(), strict=True))
    return _Found(unit, names, found.worse, "deviation", found.deviation, table, maps)


def _attributed(
    engine: Engine,
    made: Preprocessor,
    given: _Rows,
    image: tuple[int, int] | None,
    *,
    method: str,
    output: int | None,
) -> _Found:
    every = network_inputs(made, given.cells, engine.precision) if given.background is None else None
    X = network_inputs(made, given.cells, engine.precision, given.rows) if every is None else every[given.rows]
    black = np.zeros(made.width) if image is not None and method != "expected" else None
    background = given.background if every is None else every
    found = column_attributions(engine, made, X, method=method, background=background, baseline=black, output=output)
    order = np.argsort(-found.importance, kind="stable")
    known = made.labels or ([made.target_name] if made.outputs == 1 else list(map(str, range(made.outputs))))
    explained = [known[at] for at in found.chosen]
    table: list[list[Any]] = [["row", *given.ids, "explained", "output", "baseline", *found.names, "error"]]
    named = (column[given.rows].tolist() for column in given.ids.values())
    figures = (column.tolist() for column in (found.outputs, found.base, *found.values.T, found.error))
    table += map(list, zip(given.rows.tolist(), *named, explained, *figures, strict=True))
    maps = {}
    if image is not None:
        for at in np.unique(found.chosen)[:MOST_CLASSES].tolist():
            maps[known[at]] = found.values[found.chosen == at].mean(axis=0).reshape(image)
    error, completeness = np.abs(found.error), None
    if method != "gradient":
        difference = float(np.abs(found.outputs - found.base).mean())
        completeness = {"mean": float(error.mean()), "most": float(error.max()), "difference": difference}
    return _Found(
        "mean absolute attribution",
        [found.names[at] for at in order],
        found.importance[order],
        "mean",
        found.values.mean(axis=0)[order],
        table,
        maps,
        completeness,
    )


def _figure(found: _Found, title: str) -> Any:
    if found.maps:
        return heat_figure(found.maps, unit="mean attribution" if found.beside == "mean" else found.unit, title=title)
    top = slice(0, MOST_COLUMNS)
    deviations = found.second[top] if found.beside == "deviation" else None
    return importance_figure(found.names[top], found.importance[top], deviations, unit=found.unit, title=title)
