"""``report.html``: a training and its model on one page that needs no network, for people and screen readers.

The template ``page.html`` lays it out: its sections have a title and, in this order, tiles, lines, a note, a table, a
folded table, drawings and a heat map, each if there is one.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fusemlp.datasets.tables import reason
from fusemlp.describe.checks import counted
from fusemlp.describe.metrics import Judged, rises
from fusemlp.inputs.arrays import Array
from fusemlp.report.diagnosis import Finding
from fusemlp.report.evidence import REPEATS, Evidence, Importance, guarantee_lines
from fusemlp.report.metrics import class_table, confusion_table, plain, scalars, scored, spelled, verdict
from fusemlp.report.plots import GRID, Chart, Line, by_epoch
from fusemlp.report.runs import joint

Section = dict[str, Any]

# Classes of a confusion matrix, and of an open table; columns of the most wrong rows; bars of importance; points and
# targets of a regression.
MOST_CLASSES, MOST_OPEN, MOST_CELLS, MOST_BARS, MOST_POINTS, MOST_TARGETS = 30, 12, 12, 30, 800, 4
NAMES = {
    **{"auc": "AUC", "f1": "F1 (macro)", "balanced_accuracy": "balanced accuracy", "log_loss": "log loss"},
    **{"rmse": "RMSE", "mae": "MAE", "r2": "R²"},
}


def page(
    title: str,
    about: Sequence[str],
    report: Mapping[str, Any],
    history: Mapping[str, Sequence[float]],
    evidence: Evidence | None,
) -> str:
    """Return the page as HTML: ``about`` are lines on the run, ``report`` is that of ``report.json``.

    ``history`` has a list for each quantity, one entry an epoch. Without ``evidence`` the page has no model to judge.
    A figure that cannot be drawn says why, and shows its numbers.
    """
    from jinja2 import Environment, PackageLoader

    sections = [*_scores(report), _training(report, history)]
    if evidence is not None:
        sections += [_numbers(evidence)] if evidence.judged.scores is None else _classes(report["test"], evidence)
        importance = evidence.importance()
        sections += [] if importance is None else [_importance(importance, evidence.image)]
        sections.append(_worst(evidence, importance))
    loader = PackageLoader("fusemlp.report", "")
    template = Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("page.html")
    return template.render(title=title, about=about, sections=sections, colours=len(COLOURS))


def _drawings(charts: Iterable[Chart]) -> list[Section]:
    """Return charts that have points, drawn, or with the reason why they cannot be drawn."""
    drawings = []
    for chart in charts:
        if not any(len(line.finite) for line in chart.lines):
            continue
        drawing = {"chart": chart, "numbers": numbers_of(chart)}
        try:
            drawings.append({**drawing, "svg": svg(chart)})
        # the settings of matplotlib may be anything, and so are the errors
        except Exception as error:
            drawings.append({**drawing, "reason": reason(error)})
    return drawings


def _scores(report: Mapping[str, Any]) -> Iterator[Section]:
    """Yield the verdict on the model, and its scores on the test rows beside those of the baselines."""
    if not report.get("test"):
        return
    test, others = report["test"], report.get("baselines", {})
    scores = scalars(test)
    # the loss, which means least to people, last
    names = sorted(scores, key=lambda name: name == "loss")
    tiles = [
        [_named(name), scored(name, scores[name])]
        + [f"{model} {scored(name, of[name])}" for model, of in others.items() if of.get(name) is not None]
        for name in names
    ]
    if sizes := report.get("intervals"):
        level, covered = f"{sizes['level']:.0%}", f"{sizes['coverage']:.0%}"
        of = {"width": f"width of {level} intervals", "classes": f"classes in {level} sets"}
        shown = [[of[name], spelled(sizes[name]), f"cover {covered} of test rows"] for name in of if name in sizes]
        tiles += shown or [[f"cover of {level} intervals", covered]]
    lines = [f"{line[0].upper()}{line[1:]}." for line in verdict(report)]
    section: Section = {"title": f"Scores on {counted(test['rows'], 'test row')}", "verdict": lines, "tiles": tiles}
    if "classes" in test:
        section["folded"] = "scores of each class", class_table(test), len(test["classes"]) <= MOST_OPEN
    if "targets" in test:
        keys = list(scalars(next(iter(test["targets"].values()))))
        rows = [[target, *(scored(key, figures[key]) for key in keys)] for target, figures in test["targets"].items()]
        section["folded"] = "scores of each target", [["target", *map(_named, keys)], *rows], len(rows) <= MOST_OPEN
    if "quantiles" in test:
        section["folded"] = "scores of each quantile", _quantile_table(report), True
    yield section


def _quantile_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the pinball loss of each quantile, and the targets below it, as rows of text below a header."""
    constant = report.get("baselines", {}).get("constant", {}).get("quantiles", {})
    rows = [["quantile", "pinball", "constant", "targets below"]]
    for name, scores in report["test"]["quantiles"].items():
        alone = spelled(constant[name]["pinball"]) if name in constant else ""
        rows.append([name, spelled(scores["pinball"]), alone, f"{scores['below']:.1%}"])
    return rows


def _training(report: Mapping[str, Any], history: Mapping[str, Sequence[float]]) -> Section:
    """Return the end of the training, its diagnosis, and each quantity over the epochs."""
    lines = [] if report.get("diverged") else [report.get("stopped", "")]
    lines += [str(Finding(**finding)) for finding in report.get("diagnosis", ())]
    lines += guarantee_lines(report)
    history, models = joint(history, report)
    if models:
        lines.append(f"Faint lines are the {len(models)} models, the others their mean while all of them train.")
    # the models of an ensemble have a best epoch each
    best, charts = None if report.get("models") else report.get("best_epoch"), []
    mark = None if best is None else (f"best epoch {best}", float(best))
    for name in dict.fromkeys(name.removeprefix("val_") for name in history):
        if name == "learning_rate" and len(set(history[name])) == 1:
            continue
        charts.append(by_epoch(name, [*models, history], _named(name), mark))
    return {"title": "Training", "lines": filter(None, lines), "drawings": _drawings(charts)}


def _numbers(evidence: Evidence) -> Section:
    """Return the true values over the predicted ones, and the residuals."""
    judged, charts = evidence.judged, []
    shown = np.random.default_rng(0).permutation(len(judged.truth))[:MOST_POINTS]
    for target in range(min(MOST_TARGETS, judged.truth.shape[1])):
        name = f" of target {evidence.preprocessor.targets[target]}" if judged.truth.shape[1] > 1 else ""
        residuals = judged.truth[:, target] - judged.predicted[:, target]
        points = shown[~np.isnan(residuals[shown])]
        if not len(points):
            continue
        lines = [Line("test row", judged.predicted[points, target], judged.truth[points, target], points=True)]
        if not name:
            lines.append(Line("mean of each tenth", *evidence.calibration(), 1))
        charts.append(Chart(f"True values over predictions{name}", lines, "predicted", "true", diagonal="equal"))
        residuals = residuals[~np.isnan(residuals)]
        # wide enough for bins whose edges differ
        margin = max(0.5 * (np.ptp(residuals) == 0.0), 20 * np.spacing(np.abs(residuals).max()))
        counts, edges = np.histogram(residuals, 20, (residuals.min() - margin, residuals.max() + margin))
        lines = [Line("test rows", (edges[:-1] + edges[1:]) / 2, counts)]
        charts.append(Chart(f"Residuals{name}", lines, "true minus predicted", "rows", mark=("no error", 0.0)))
    return {"title": "Predictions", "drawings": _drawings(charts)}


def _classes(test: Mapping[str, Any], evidence: Evidence) -> Iterator[Section]:
    """Yield confusion matrix, ROC and calibration."""
    names = evidence.names
    if "confusion_matrix" in test and len(names) <= MOST_CLASSES:
        yield {"title": "Confusion matrix", "rows": confusion_table(test), "counts": test["confusion_matrix"]}
    lines = [Line(*roc, colour) for colour, roc in enumerate(evidence.rocs())]
    some = f": the {len(lines)} with the least AUC" if len(lines) < len(names) > 2 else ""
    charts = [Chart(f"ROC{some}", lines, "false positives", "true positives", diagonal="by chance")]
    if evidence.probable:
        of = names[1] if len(names) == 2 else "the predicted class"
        of = "each label" if evidence.judged.truth.ndim == 2 else of
        lines = [Line("a tenth of the rows at each point", *evidence.calibration())]
        charts.append(Chart("Calibration", lines, f"probability of {of}", "observed share", diagonal="calibrated"))
    if drawings := _drawings(charts):
        yield {"title": "Probabilities", "drawings": drawings}


def _importance(importance: Importance, image: tuple[int, int] | None) -> Section:
    """Return a bar for each column, or for an image a heat map."""
    metric, way = _named(importance.metric), "falls" if rises(importance.metric) else "rises"
    note = f"How far {metric} {way} when values are permuted among {counted(importance.rows, 'test row')}; "
    note += f"mean and deviation of {REPEATS} permutations."
    worse = np.maximum(importance.worse, 0.0)
    greatest = max(float(worse.max()), 1e-300)
    shares = worse / greatest
    if image is not None:
        places = [tuple(map(int, name.split())) for name in importance.names]
        label = "The most important square: row {}, column {}, ".format(*places[0]) + f"{spelled(importance.worse[0])}."
        height, width = (1 + max(place[axis] for place in places) for axis in (0, 1))
        squares = [(*place, f"{share:.3f}") for place, share in zip(places, shares.tolist(), strict=True)]
        heat = {"width": width, "height": height, "label": label, "squares": squares}
        return {"title": "Importance of the pixels", "note": f"{note} {label}", "heat": heat}
    rows: list[list[Any]] = [["column", f"{metric} {way} by", "deviation", ""]]
    for at in range(len(importance.names))[:MOST_BARS]:
        size, deviation = (spelled(values[at], greatest) for values in (importance.worse, importance.deviation))
        rows.append([importance.names[at], size, f"± {deviation}", {"bar": float(shares[at])}])
    hidden = len(importance.names) - len(rows) + 1
    note += f" {hidden} others matter less." if hidden else ""
    note += f" {importance.left_out} columns were not tried, to save time." if importance.left_out else ""
    return {"title": "Importance of the columns", "note": note, "rows": rows}


def _worst(evidence: Evidence, importance: Importance | None) -> Section:
    """Return the most wrong rows, with their most important cells or as pictures."""
    preprocessor, judged, surprise = evidence.preprocessor, evidence.judged, evidence.surprise()
    # the last part of a date, its elapsed days, is the whole
    whole = {source: at for at, source in enumerate(preprocessor.sources)}
    order = list(dict.fromkeys([*([] if importance is None else importance.names), *whole]))
    shown = ["image"] if evidence.image else order[:MOST_CELLS]
    kind = "error" if judged.scores is None else "probability" if evidence.probable else "output"
    kind += "" if len(preprocessor.targets) == 1 else " in deviations" if judged.scores is None else " of what is true"
    kind += "" if preprocessor.classes is None else " of the true class"
    rows: list[list[Any]] = [["row", *evidence.ids, "true", "predicted", kind, *shown]]
    for at in evidence.worst():
        values = [_value(source[at], evidence.names, judged) for source in (judged.truth, judged.predicted)]
        if evidence.image:
            image = base64.b64encode(png(evidence.cells[at].reshape(evidence.image))).decode()
            cells: list[Any] = [{"image": image, "alt": f"{values[0]} taken for {values[1]}"}]
        else:
            cells = [evidence.spelled(at, whole[name]) for name in shown]
        ids = [str(column[evidence.rows[at]]) for column in evidence.ids.values()]
        rows.append([str(evidence.rows[at]), *ids, *values, spelled(surprise[at]), *cells])
    if len(rows) == 1:
        return {"title": "Most wrong rows", "lines": ["Every row is right."]}
    note = "Rows count from 0 in the data as read."
    note += f" {len(order) - len(shown)} less important columns are left out." if set(shown) < set(order) else ""
    return {"title": "Most wrong rows", "note": note, "rows": rows}


def _named(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


def _value(value: Any, names: Sequence[str], judged: Judged) -> str:
    """Return a class, the labels that apply, or numbers, as text."""
    if judged.scores is None:
        return ", ".join(map(plain, value))
    return names[value] if judged.truth.ndim == 1 else ", ".join(np.array(names)[value == 1].tolist())


def png(pixels: Array) -> bytes:
    """Return a grey picture (h, w) as a PNG file, its darkest value black and its lightest white."""
    # matplotlib needs it too
    from PIL import Image

    low, high, stream = float(np.nanmin(pixels)), float(np.nanmax(pixels)), io.BytesIO()
    grey = np.nan_to_num((pixels - low) / ((high - low) or 1.0) * 255).astype(np.uint8)
    Image.fromarray(grey).save(stream, format="png")
    return stream.getvalue()


# Colours of a figure, and the variables of the page's style that take their places, in the light and in the dark.
COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b0588f", "#8a6d00", "#3b3b98")
TEXT = "#59636e"
VARIABLES = {TEXT: "--soft", GRID: "--rule", **{colour: f"--c{number}" for number, colour in enumerate(COLOURS)}}
SIZE = 4.4, 2.8
STYLE: Any = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
    **{"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0},
    "axes.formatter.limits": (-4, 5),
    # text as text, and ids that stay the same when the page is made again
    **{"svg.fonttype": "none", "svg.hashsalt": "fusemlp"},
}


def numbers_of(chart: Chart) -> list[list[list[str]]]:
    """Return the numbers of the joined lines: for each list of x that they share a header and rows."""
    joined = [line for line in chart.named if not line.points]
    tables = []
    for xs in dict.fromkeys(tuple(line.xs) for line in joined):
        shared = [line for line in joined if tuple(line.xs) == xs]
        numbers = zip(xs, *(line.ys for line in shared), strict=True)
        tables.append([[chart.x, *(line.name for line in shared)], *([plain(n) for n in row] for row in numbers)])
    return tables


def svg(chart: Chart) -> str:
    """Return the drawing of a chart as an element of a page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), warnings.catch_warnings(), np.errstate(all="ignore"):
        # numbers may be anything
        warnings.simplefilter("ignore")
        figure = Figure(figsize=SIZE)
        chart.draw(figure.add_axes((0.15, 0.17, 0.82, 0.75)), COLOURS, TEXT)
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return _inline(stream.getvalue())


def _inline(document: str) -> str:
    """Return the root of an SVG document without names of namespaces, ids of groups and fixed colours."""
    root = document[document.index("<svg") :]
    root = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"|font-family: [^;"]*; ', "", root)
    return re.sub(r"(?<=: )#[0-9a-f]{6}", lambda match: f"var({VARIABLES.get(match[0], '--soft')})", root)
