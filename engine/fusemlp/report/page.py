"""``report.html``: a training and its model on one page that needs no network, for people and screen readers."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from fusemlp.describe.metrics import METRICS, rises
from fusemlp.inputs.arrays import Array
from fusemlp.report.chart import Line, chart, table
from fusemlp.report.diagnosis import Finding
from fusemlp.report.evidence import REPEATS, Evidence, Importance
from fusemlp.report.metrics import class_table, scalars

# Classes of a confusion matrix on a screen; columns of the table of worst rows; bars of importance; points.
MOST_CLASSES, MOST_CELLS, MOST_BARS, MOST_POINTS = 30, 12, 30, 800
NAMES = {
    **{"auc": "AUC", "f1": "F1 (macro)", "balanced_accuracy": "balanced accuracy", "log_loss": "log loss"},
    **{"rmse": "RMSE", "mae": "MAE", "r2": "R²", "val_loss": "validation loss"},
}
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#59636e;--rule:#d8dee4;--card:#f6f8fa;
--c0:#0072b2;--c1:#d55e00;--c2:#00805f;--c3:#b0588f;--c4:#8a6d00;--c5:#3b3b98}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e6e9ed;--soft:#a0a8b2;--rule:#363c44;--card:#1d2127;
--c0:#56b4e9;--c1:#ff9d5c;--c2:#35c79f;--c3:#e5a3ca;--c4:#f0e442;--c5:#a7a7f5}}
*{box-sizing:border-box}body{margin:0 auto;max-width:64rem;padding:1rem;background:var(--bg);color:var(--fg);
font:1rem/1.5 system-ui,sans-serif}h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--rule)}p{margin:.4rem 0;overflow-wrap:anywhere}
.soft,figcaption,summary,.tiles dt{color:var(--soft)}code{overflow-wrap:anywhere}
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
.share{display:block;margin:-.2rem -.6rem;padding:.2rem .6rem}td.left{text-align:left}
.bar{display:inline-block;height:.7em;background:var(--c0);border-radius:2px}
td img{width:4.5rem;image-rendering:pixelated;display:block}.heat{max-width:20rem}.heat rect{fill:var(--c0)}
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
        sections += [*_answers(report, evidence), *_importance_and_worst(evidence)]
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections)
    lines = "".join(f"<p>{escape(line)}</p>" for line in about)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f'<body><header><h1>{escape(title)}</h1><div class="soft">{lines}</div></header>'
        f"<main>{body}</main></body></html>\n"
    )


def _short(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 100 else f"{value:.6g}"


def _named(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


def _scores(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    test = report.get("test")
    if not test:
        return
    found = scalars(test)
    tiles = "".join(f"<div><dt>{_named(name)}</dt><dd>{_short(value)}</dd></div>" for name, value in found.items())
    content = f'<dl class="tiles">{tiles}</dl>'
    baselines = {name: figures for name, figures in report.get("baselines", {}).items() if isinstance(figures, Mapping)}
    if baselines:
        names = [name for name in found if any(isinstance(one.get(name), float) for one in baselines.values())]
        rows = [["", "this model", *(_named(name) for name in baselines)]]
        for name in names:
            others = (one.get(name) for one in baselines.values())
            rows.append([_named(name), _short(found[name]), *("" if one is None else _short(one) for one in others)])
        content += table(rows)
    if "classes" in test:
        content += f"<details><summary>scores of each class</summary>{table(class_table(test))}</details>"
    yield f"Scores on {test['rows']} test rows", content


def _training(report: Mapping[str, Any], history: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, str]]:
    found = "".join(f"<p>{escape(str(Finding(**finding)))}</p>" for finding in report.get("diagnosis", ()))
    stopped = "" if report.get("diverged") else report.get("stopped")
    found = (f"<p>{escape(str(stopped))}</p>" if stopped else "") + found
    charts, best = [], report.get("best_epoch")
    mark = None if best is None else (f"best epoch {best}", float(best))
    for name in dict.fromkeys(name.removeprefix("val_") for name in history):
        lines = [
            Line(part, range(1, len(history[key]) + 1), history[key], colour)
            for colour, (part, key) in enumerate((("training", name), ("validation", f"val_{name}")))
            if key in history
        ]
        if name == "learning_rate" and len(set(history[name])) == 1:
            continue
        charts.append(
            chart(
                f"{_named(name)} by epoch", lines, x="epoch", y=_named(name), mark=mark, whole=True, log=not rises(name)
            )
        )
    yield "Training", f'{found}<div class="charts">{"".join(charts)}</div>'


def _answers(report: Mapping[str, Any], evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Yield confusion matrix, ROC and calibration, or predictions beside the truth."""
    charts, judged = [], evidence.judged
    if judged.scores is None:
        shown = np.random.default_rng(0).permutation(len(judged.truth))[:MOST_POINTS]
        for target in range(min(4, judged.truth.shape[1])):
            said, true = judged.predicted[shown, target].tolist(), judged.truth[shown, target].tolist()
            lines = [Line("test row" if len(shown) == len(judged.truth) else "some test rows", said, true, points=True)]
            if target == 0:
                at, mean, _ = evidence.calibration()
                lines.append(Line("mean of a tenth of the rows", at.tolist(), mean.tolist(), 1))
            number = f" of target {target}" if judged.truth.shape[1] > 1 else ""
            charts.append(
                chart(f"True values by predicted ones{number}", lines, x="predicted", y="true", diagonal="equal")
            )
        residuals = judged.truth[:, 0] - judged.predicted[:, 0]
        counts, edges = np.histogram(residuals, bins=20)
        middle = ((edges[:-1] + edges[1:]) / 2).tolist()
        lines = [Line("test rows", middle, counts.astype(np.float64).tolist())]
        charts.append(chart("Residuals (true minus predicted)", lines, x="residual", y="rows", mark=("no error", 0.0)))
        yield "Predictions beside the truth", f'<div class="charts">{"".join(charts)}</div>'
        return
    test = report["test"]
    if len(test["classes"]) <= MOST_CLASSES:
        yield "Confusion matrix", _confusion(list(test["classes"]), test["confusion_matrix"])
    rocs = evidence.rocs()
    if rocs:
        lines = [Line(name, false.tolist(), true.tolist(), colour) for colour, (name, false, true) in enumerate(rocs)]
        some = f": the {len(rocs)} classes with the least AUC" if len(rocs) < len(test["classes"]) > 2 else ""
        charts.append(chart(f"ROC{some}", lines, x="false positives", y="true positives", diagonal="by chance"))
    if evidence.probable:
        said, observed, counts = evidence.calibration()
        two = len(test["classes"]) == 2
        subject = f"probability of {list(test['classes'])[1]}" if two else "probability of the predicted class"
        lines = [Line("test rows", said.tolist(), observed.tolist())]
        drawn = chart("Calibration", lines, x=subject, y="observed share", diagonal="calibrated")
        rows = [[f"{a:.3f}", f"{b:.3f}", str(n)] for a, b, n in zip(said, observed, counts, strict=True)]
        numbers = table([[subject, "observed share", "rows"], *rows])
        charts.append(drawn.replace("</details>", f"{numbers}</details>"))
    if charts:
        yield "Probabilities", f'<div class="charts">{"".join(charts)}</div>'


def _confusion(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Return the confusion matrix, each cell shaded by its share of the true class."""
    rows = [["true \\ predicted", *map(escape, names)]]
    for name, row in zip(names, counts, strict=True):
        cells = []
        for other, count in zip(names, row, strict=True):
            colour, share = 0 if other == name else 1, 70 * count / max(1, sum(row))
            shade = f"background:color-mix(in srgb,var(--c{colour}) {share:.0f}%,transparent)"
            cells.append(f'<span class="share" style="{shade}">{count}</span>')
        rows.append([escape(name), *cells])
    return table(rows, raw=True)


def _importance_and_worst(evidence: Evidence) -> Iterator[tuple[str, str]]:
    found = evidence.importance()
    names: Sequence[str] = evidence.preprocessor.feature_names
    if found is not None:
        what = "squares of pixels" if evidence.image else "columns"
        yield f"Importance of the {what}", _importance(found, evidence)
        if not evidence.image:
            place = {name: -float(value) for name, value in zip(found.names, found.worse, strict=True)}
            # the parts of a date have the place of their column
            names = sorted(names, key=lambda name: place.get(name, place.get(name.rpartition(":")[0], 0.0)))
    worst = evidence.worst()
    classify = evidence.preprocessor.classes is not None
    if not worst:
        yield "Most wrong rows", "<p>Every test row is right.</p>"
        return
    kind = (
        ("probability of the true class" if evidence.probable else "output of the true class") if classify else "error"
    )
    shown = [] if evidence.image else list(names[:MOST_CELLS])
    columns = [evidence.preprocessor.feature_names.index(name) for name in shown]
    rows = [["row", "true", "predicted", kind, *(["image"] if evidence.image else map(escape, shown))]]
    for one in worst:
        said = [_value(one.truth), _value(one.predicted), _short(one.surprise)]
        texts = evidence.spelled(one.cells) if shown else []
        cells = [escape(texts[column]) for column in columns]
        if evidence.image:
            alt = escape(f"row {one.row}: {_value(one.truth)}, taken for {_value(one.predicted)}")
            data = base64.b64encode(png(one.cells.reshape(evidence.image))).decode()
            cells = [f'<img alt="{alt}" src="data:image/png;base64,{data}">']
        rows.append([str(one.row), *map(escape, said), *cells])
    left = len(evidence.preprocessor.feature_names) - len(shown)
    note = "Rows count from 0 in the data as read."
    if shown and left:
        note += f" The {len(shown)} most important columns are shown, {left} are not."
    yield "Most wrong rows", f'<p class="soft">{note}</p>{table(rows, raw=True)}'


def _value(value: Any) -> str:
    numbers = value if isinstance(value, list) else [value]
    return ", ".join(one if isinstance(one, str) else f"{one:.6g}" for one in numbers)


def _importance(found: Importance, evidence: Evidence) -> str:
    metric = NAMES[found.metric]
    way = "falls" if METRICS[found.metric].rises else "rises"
    note = f"How far {metric} {way} when values are permuted among {found.rows} test rows: mean and standard deviation "
    note += f"of {REPEATS} permutations."
    if found.left_out:
        note += f" {found.left_out} columns were not tried, to save time."
    most = max(float(found.worse.max()), 1e-12)
    shares = np.clip(found.worse / most, 0.0, 1.0)
    if evidence.image:
        places = [tuple(map(int, name.strip("()").split(","))) for name in found.names]
        height, width = (1 + max(place[side] for place in places) for side in (0, 1))
        squares = "".join(
            f'<rect x="{column}" y="{row}" width="1" height="1" fill-opacity="{share:.3f}"/>'
            for (row, column), share in zip(places, shares.tolist(), strict=True)
        )
        top = places[int(found.worse.argmax())]
        label = f"heat map; the most important square is row {top[0]}, column {top[1]} of {height} by {width}"
        frame = f'<rect width="{width}" height="{height}" style="fill:none;stroke:var(--rule);stroke-width:.05"/>'
        drawn = (
            f'<svg class="heat" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{squares}{frame}</svg>'
        )
        return f'<p class="soft">{note} The darkest square: {most:.4g}.</p>{drawn}'
    rows = [["column", f"{metric} {way} by", "deviation", ""]]
    for at in np.argsort(-found.worse, kind="stable")[:MOST_BARS].tolist():
        bar = f'<span class="bar" style="width:{8 * float(shares[at]):.2f}rem"></span>'
        rows.append([escape(found.names[at]), _short(found.worse[at]), f"± {_short(found.spread[at])}", bar])
    rest = max(0, len(found.names) - MOST_BARS)
    more = f'<p class="soft">The other {rest} tried columns matter less.</p>' if rest else ""
    return f'<p class="soft">{escape(note)}</p>{table(rows, raw=True)}{more}'.replace(
        "<td><span", '<td class="left"><span'
    )


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
