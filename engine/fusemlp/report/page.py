"""``report.html``: a training and its model on one page that needs no network, for people and screen readers."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from fusemlp.describe.metrics import rises
from fusemlp.inputs.arrays import Array
from fusemlp.report.certification import certified_lines
from fusemlp.report.chart import Line, chart, table
from fusemlp.report.diagnosis import Finding
from fusemlp.report.evidence import REPEATS, Evidence, Importance
from fusemlp.report.metrics import class_table, privacy_line, scalars
from fusemlp.report.robustness import robust_lines

# Classes of a confusion matrix; columns of the most wrong rows; bars of importance; points and targets of a regression.
MOST_CLASSES, MOST_CELLS, MOST_BARS, MOST_POINTS, MOST_TARGETS = 30, 12, 30, 800, 4
NAMES = {
    **{"auc": "AUC", "f1": "F1 (macro)", "balanced_accuracy": "balanced accuracy", "log_loss": "log loss"},
    **{"rmse": "RMSE", "mae": "MAE", "r2": "R²"},
}
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#59636e;--rule:#d8dee4;--card:#f6f8fa;
--c0:#0072b2;--c1:#d55e00;--c2:#00805f;--c3:#b0588f;--c4:#8a6d00;--c5:#3b3b98}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e6e9ed;--soft:#a0a8b2;--rule:#363c44;--card:#1d2127;
--c0:#56b4e9;--c1:#ff9d5c;--c2:#35c79f;--c3:#e5a3ca;--c4:#f0e442;--c5:#a7a7f5}}
*{box-sizing:border-box}body{margin:0 auto;max-width:64rem;padding:1rem;background:var(--bg);color:var(--fg);
font:1rem/1.5 system-ui,sans-serif}h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--rule)}p{margin:.4rem 0;overflow-wrap:anywhere}
.soft,figcaption,summary,.tiles dt{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(8rem,1fr));gap:.6rem;margin:.6rem 0}
.tiles div{background:var(--card);border-radius:.5rem;padding:.5rem .8rem}.tiles dd{margin:0;font-size:1.4rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr));gap:1rem}
figure{margin:0;min-width:0}svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:12px}
.grid{stroke:var(--rule)}.mark{stroke:var(--soft);stroke-dasharray:5 4}polyline{fill:none;stroke-width:2}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;list-style:none;margin:.3rem 0;padding:0;font-size:.9rem}
.legend i{display:inline-block;width:1.4rem;border-top:3px solid;margin-right:.4rem;vertical-align:middle}
.legend .mark{border-top:2px dashed var(--soft)}
.wide{overflow-x:auto;margin:.4rem 0}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child{text-align:left}thead th{color:var(--soft);font-weight:normal}details .wide{max-height:20rem}
.share{display:block;margin:-.2rem -.6rem;padding:.2rem .6rem}
.bar{display:block;height:.7em;background:var(--c0);border-radius:2px}
td img{width:4.5rem;image-rendering:pixelated;display:block}.heat{max-width:20rem;border:1px solid var(--rule)}
.heat rect{fill:var(--c0)}
""" + "".join(
    f".c{n}{{color:var(--c{n})}}polyline.c{n}{{stroke:var(--c{n})}}circle.c{n}{{fill:var(--c{n})}}" for n in range(6)
)
STYLE += "polyline.c1{stroke-dasharray:7 3}circle.c0{fill-opacity:.55}"


def page(
    title: str,
    about: Sequence[str],
    report: Mapping[str, Any],
    history: Mapping[str, Sequence[float]],
    evidence: Evidence | None,
) -> str:
    """Return the page as HTML: ``about`` are lines on the run, ``report`` is that of ``report.json``.

    ``history`` has a list for each quantity, one entry an epoch. Without ``evidence`` the page has no model to judge.
    """
    sections = [*_scores(report), *_training(report, history)]
    if evidence is not None:
        sections += _numbers(evidence) if evidence.judged.scores is None else _classes(report["test"], evidence)
        importance = evidence.importance()
        sections += [] if importance is None else [_importance(importance, evidence.image)]
        sections += _worst(evidence, importance)
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections)
    lines = "".join(f"<p>{escape(line)}</p>" for line in about)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f'<body><header><h1>{escape(title)}</h1><div class="soft">{lines}</div></header>'
        f"<main>{body}</main></body></html>\n"
    )


def _scores(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the scores on the test rows, beside those of the baselines."""
    if not report.get("test"):
        return
    found = scalars(report["test"])
    shown = {_named(name): value for name, value in found.items()} | _intervals(report.get("intervals", {}))
    tiles = "".join(f"<div><dt>{name}</dt><dd>{_short(value)}</dd></div>" for name, value in shown.items())
    content = f'<dl class="tiles">{tiles}</dl>'
    models = {"this model": found, **report.get("baselines", {})}
    if len(models) > 1:
        rows = [["", *models]]
        for name in found:
            scores = [model.get(name) for model in models.values()]
            if any(one is not None for one in scores[1:]):
                rows.append([_named(name), *("" if one is None else _short(one) for one in scores)])
        content += table(rows)
    if "classes" in report["test"]:
        content += f"<details><summary>scores of each class</summary>{table(class_table(report['test']))}</details>"
    yield f"Scores on {report['test']['rows']} test rows", content


def _intervals(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean size of the intervals, or sets of classes, of the test rows, and the share that they cover."""
    if not found:
        return {}
    level = f"{found['level']:.0%}"
    size = {f"width of {level} intervals": found["width"]} if "width" in found else {}
    size |= {f"classes in {level} sets": found["classes"]} if "classes" in found else {}
    return {name: one for name, one in {**size, "their coverage": found["coverage"]}.items() if one is not None}


def _training(report: Mapping[str, Any], history: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, str]]:
    """Yield the end of the training, its diagnosis, and each quantity over the epochs."""
    said = [] if report.get("diverged") else [report.get("stopped", "")]
    said += [str(Finding(**finding)) for finding in report.get("diagnosis", ())]
    said += [*privacy_line(report), *robust_lines(report), *certified_lines(report)]
    # the models of an ensemble have a best epoch each
    several = len(report.get("models", ()))
    said += [f"The curves are the mean of {several} models."] if several else []
    best, charts = None if several else report.get("best_epoch"), []
    mark = None if best is None else (f"best epoch {best}", float(best))
    for name in dict.fromkeys(name.removeprefix("val_") for name in history):
        if name == "learning_rate" and len(set(history[name])) == 1:
            continue
        series = [("training", name), ("validation", f"val_{name}")]
        lines = [
            Line(part, range(1, len(history[key]) + 1), history[key], colour)
            for colour, (part, key) in enumerate(series)
            if key in history
        ]
        shown = _named(name)
        charts.append(chart(f"{shown} by epoch", lines, x="epoch", y=shown, mark=mark, whole=True, log=not rises(name)))
    yield "Training", "".join(f"<p>{escape(one)}</p>" for one in said if one) + _beside(charts)


def _numbers(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Yield the true values over the predicted ones, and the residuals."""
    judged, charts = evidence.judged, []
    shown = np.random.default_rng(0).permutation(len(judged.truth))[:MOST_POINTS]
    for target in range(min(MOST_TARGETS, judged.truth.shape[1])):
        name = f" of target {target}" if judged.truth.shape[1] > 1 else ""
        lines = [Line("test row", judged.predicted[shown, target], judged.truth[shown, target], points=True)]
        if not name:
            lines.append(Line("mean of each tenth", *evidence.calibration(), 1))
        charts.append(chart(f"True values over predictions{name}", lines, x="predicted", y="true", diagonal="equal"))
        residuals = judged.truth[:, target] - judged.predicted[:, target]
        # wide enough for bins whose edges differ
        margin = max(0.5 * (np.ptp(residuals) == 0.0), 20 * np.spacing(np.abs(residuals).max()))
        counts, edges = np.histogram(residuals, 20, (residuals.min() - margin, residuals.max() + margin))
        lines = [Line("test rows", (edges[:-1] + edges[1:]) / 2, counts)]
        charts.append(chart(f"Residuals{name}", lines, x="true minus predicted", y="rows", mark=("no error", 0.0)))
    yield "Predictions", _beside(charts)


def _classes(test: Mapping[str, Any], evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Yield confusion matrix, ROC and calibration."""
    names, charts = list(test["classes"]), []
    if len(names) <= MOST_CLASSES:
        rows = [["true \\ predicted", *map(escape, names)]]
        for name, counts in zip(names, test["confusion_matrix"], strict=True):
            rows.append([escape(name)])
            for other, count in zip(names, counts, strict=True):
                colour, share = 0 if other == name else 1, 70 * count / max(1, sum(counts))
                shade = f"background:color-mix(in srgb,var(--c{colour}) {share:.0f}%,transparent)"
                rows[-1].append(f'<span class="share" style="{shade}">{count}</span>')
        yield "Confusion matrix", table(rows, raw=True)
    lines = [Line(*roc, colour) for colour, roc in enumerate(evidence.rocs())]
    some = f": the {len(lines)} classes with the least AUC" if len(lines) < len(names) > 2 else ""
    charts.append(chart(f"ROC{some}", lines, x="false positives", y="true positives", diagonal="by chance"))
    if evidence.probable:
        of = names[1] if len(names) == 2 else "the predicted class"
        lines = [Line("a tenth of the rows at each point", *evidence.calibration())]
        charts.append(chart("Calibration", lines, x=f"probability of {of}", y="observed share", diagonal="calibrated"))
    if any(charts):
        yield "Probabilities", _beside(charts)


def _importance(found: Importance, image: tuple[int, int] | None) -> tuple[str, str]:
    """Return a bar for each column, or for an image a heat map."""
    metric, way = _named(found.metric), "falls" if rises(found.metric) else "rises"
    note = (
        f"How far {metric} {way} when values are permuted among {found.rows} test rows; mean and deviation of {REPEATS}"
    )
    note += " permutations."
    worse = np.maximum(found.worse, 0.0)
    shares = worse / max(float(worse.max()), 1e-300)
    if image is not None:
        places = [tuple(map(int, name.split())) for name in found.names]
        squares = "".join(
            f'<rect x="{column}" y="{row}" width="1" height="1" fill-opacity="{share:.3f}"/>'
            for (row, column), share in zip(places, shares.tolist(), strict=True)
        )
        height, width = (1 + max(place[axis] for place in places) for axis in (0, 1))
        told = "The most important square: row {}, column {}, ".format(*places[0]) + f"{_short(found.worse[0])}."
        drawn = f'<svg class="heat" viewBox="0 0 {width} {height}" role="img" aria-label="{told}">{squares}</svg>'
        return "Importance of the pixels", f'<p class="soft">{note} {told}</p>{drawn}'
    rows = [["column", f"{metric} {way} by", "deviation", ""]]
    for at in range(len(found.names))[:MOST_BARS]:
        bar = f'<span class="bar" style="width:{6 * float(shares[at]):.2f}rem"></span>'
        rows.append([escape(found.names[at]), _short(found.worse[at]), f"± {_short(found.deviation[at])}", bar])
    note += f" {len(found.names) - len(rows) + 1} others matter less." if len(found.names) >= len(rows) else ""
    note += f" {found.left_out} columns were not tried, to save time." if found.left_out else ""
    return "Importance of the columns", f'<p class="soft">{note}</p>{table(rows, raw=True)}'


def _worst(evidence: Evidence, importance: Importance | None) -> Iterator[tuple[str, str]]:
    """Yield the most wrong rows, with their most important cells or as pictures."""
    made, judged, surprise = evidence.preprocessor, evidence.judged, evidence.surprise()
    ranked = [] if importance is None else np.concatenate(importance.features).tolist()
    order = list(dict.fromkeys([*ranked, *range(len(made.feature_names))]))
    shown = [] if evidence.image else order[:MOST_CELLS]
    kind = "error" if made.classes is None else "probability" if evidence.probable else "output"
    kind += "" if made.classes is None else " of the true class"
    cells = ["image"] if evidence.image else [escape(made.feature_names[at]) for at in shown]
    rows = [["row", *map(escape, evidence.ids), "true", "predicted", kind, *cells]]
    for at in evidence.worst():
        said = [_value(values[at], made.labels) for values in (judged.truth, judged.predicted)]
        cells = [escape(evidence.spelled(at, feature)) for feature in shown]
        if evidence.image:
            data = base64.b64encode(png(evidence.cells[at].reshape(evidence.image))).decode()
            cells = [f'<img alt="{escape(said[0])} taken for {escape(said[1])}" src="data:image/png;base64,{data}">']
        named = [escape(str(column[evidence.rows[at]])) for column in evidence.ids.values()]
        rows.append([str(evidence.rows[at]), *named, *map(escape, said), _short(surprise[at]), *cells])
    note = "Rows count from 0 in the data as read."
    note += f" {len(order) - len(shown)} less important columns are left out." if 0 < len(shown) < len(order) else ""
    content = f'<p class="soft">{note}</p>{table(rows, raw=True)}' if len(rows) > 1 else "<p>Every row is right.</p>"
    yield "Most wrong rows", content


def _beside(charts: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _short(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 100 else f"{value:.6g}"


def _named(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


def _value(value: Any, labels: Sequence[str]) -> str:
    """Return a class, or numbers, as text."""
    return labels[value] if labels else ", ".join(f"{one:.6g}" for one in value)


def png(pixels: Array) -> bytes:
    """Return a grey picture (h, w) as a PNG file, its darkest value black and its lightest white."""
    low, high = float(np.nanmin(pixels)), float(np.nanmax(pixels))
    grey = np.nan_to_num((pixels - low) / ((high - low) or 1.0) * 255).astype(np.uint8)
    lines = b"".join(b"\0" + line.tobytes() for line in grey)
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
