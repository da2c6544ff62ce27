"""``report.html``: well-formed, alone on its page, and showing what it must."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from fusemlp.report import evidence as evidence_module
from fusemlp.report.metrics import in_percent, plain, scalars, scored, spelled
from fusemlp.report.page import _drawings, _importance, page, png, svg
from fusemlp.report.plots import Chart, Line
from make import QUICK, output_of, read, refusal, result_of, rows, run, trained

CALIBRATED = "a tenth of the rows at each point"
# Elements without an end.
VOID = {"meta", "img", "br"}


class Parsed(HTMLParser):
    """Checks that every element is closed in its turn; collects texts, tables by section, and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.texts = []
        self.attributes = []
        self.section = ""
        self.tables = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        elif tag in ("td", "th"):
            self.tables[self.section][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        self.texts.append(data)
        if self.open[-1:] == ["h2"]:
            self.section = data
        elif {"td", "th"} & set(self.open):
            self.tables[self.section][-1][-1] += data

    def of(self, tag, name):
        return [value for one, other, value in self.attributes if (one, other) == (tag, name)]


def parsed(folder):
    text = (folder / "report.html").read_text()
    found = Parsed(text)
    # Nothing is loaded: no address but those inside the page, no script, no import of a style.
    assert not re.search(r"https?:|//|@import|url\([^#]|<script|<link|<iframe", re.sub(r"base64,[\w+/=]+", "", text))
    addresses = [value for _, name, value in found.attributes if name in ("src", "href", "xlink:href", "action")]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in addresses)
    # Every picture has a text.
    labels = [value for _, name, value in found.attributes if name == "aria-label"]
    assert len(labels) == text.count("<svg") and all(labels) and text.count('role="img"') == len(labels)
    assert len(found.of("img", "alt")) == text.count("<img")
    assert not re.search(r"\b(nan|inf)\b", text)
    return found


def shown(value):
    """Return a score with four decimals, or six digits."""
    return f"{value:.{min(4, 6 - len(str(int(value))))}f}"


def bare(value):
    """Return a number without zeros at its end."""
    return shown(value).rstrip("0").removesuffix(".")


@pytest.fixture(scope="module")
def houses(tmp_path_factory):
    """A table with words that HTML must escape, missing cells and dates, in which ``area`` decides almost alone."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("houses")
    count = 400
    area, noise = rng.gamma(5, 20, count), rng.normal(size=count)
    city = rng.choice(["<b>Bern</b>", 'O\'Hara & "Sons"', "Zürich"], count)
    days = np.datetime64("2019-01-01") + rng.integers(0, 700, count)
    lines = ["area,city,sold,noise,price"]
    for at in range(count):
        cell = "" if at % 10 == 0 else f"{area[at]:.1f}"
        word = city[at].replace('"', '""')
        lines.append(f'{cell},"{word}",{days[at]},{noise[at]:.3f},{3000 * area[at] + 1000.5:.1f}')
    (folder / "houses.csv").write_text("\n".join(lines) + "\n")
    options = ["--target", "price", "--epochs", "30", "--metric", "r2", "--quiet"]
    assert run("train", folder / "houses.csv", *options, "--out", folder / "run") == 0
    return folder / "run"


def test_a_regression_on_a_table(houses):
    found, report = parsed(houses), read(houses / "report.json")
    for name in ("rmse", "mae", "r2"):
        assert shown(report["test"][name]) in found.texts
    table = rows(houses / "metrics.csv")
    training = found.tables["Training"]
    for epoch, row in enumerate(table, 1):
        # as far as all models train
        if epoch <= min(one["epochs"] for one in report["models"]):
            assert [str(epoch), bare(float(row["loss"])), bare(float(row["val_loss"]))] in training
            assert [str(epoch), bare(float(row["val_r2"]))] in training
    # the best epoch of an ensemble is a mean
    assert len(report["models"]) == 5 and f"best epoch {report['best_epoch']}" not in found.texts
    importance = found.tables["Importance of the columns"]
    assert [row[0] for row in importance][:2] == ["column", "area"]
    # A date is one column, and the columns before one-hot are named.
    assert {row[0] for row in importance[1:]} == {"area", "city", "sold", "noise"}
    worst = found.tables["Most wrong rows"]
    assert worst[0][:5] == ["row", "true", "predicted", "error", "area"]
    source = (houses.parent / "houses.csv").read_text().splitlines()[1:]
    errors = [float(row[3]) for row in worst[1:]]
    assert errors == sorted(errors, reverse=True) and len(errors) == 12
    for row in worst[1:]:
        cells = dict(zip(worst[0], row, strict=True))
        line = source[int(cells["row"])]
        assert cells["area"] in ("", f"{float(line.partition(',')[0] or 0):g}")
        assert (cells["area"] == "") == line.startswith(",")
        # six digits of numbers below a million
        assert float(cells["true"]) == pytest.approx(float(line.split(",")[-1]), abs=0.5)
        assert cells["city"].replace('"', '""') in line
        assert f",{cells['sold']}," in line
        difference = abs(float(cells["true"]) - float(cells["predicted"]))
        assert float(cells["error"]) == pytest.approx(difference, abs=1.5)


def test_classes_of_a_table(tmp_path):
    assert run("train", "breast_cancer", "--epochs", "5", "--quiet", "--out", tmp_path / "run") == 0
    found, test = parsed(tmp_path / "run"), read(tmp_path / "run/report.json")["test"]
    for name, value in scalars(test).items():
        assert shown(value) in found.texts, name
    names = list(test["classes"])
    assert found.tables["Confusion matrix"] == [
        ["true \\ predicted", *names],
        *([name, *map(str, counts)] for name, counts in zip(names, test["confusion_matrix"], strict=True)),
    ]
    assert any(text == f"benign (AUC {test['auc']:.4f})" for text in found.texts)
    # of each tenth of the rows, by their probability of the second class
    table = found.tables["Probabilities"]
    shares = [float(row[1]) for row in table[1 + table.index(["probability of benign", CALIBRATED]) :]]
    sizes = [len(part) for part in np.array_split(np.arange(test["rows"]), 10)]
    positive = sum(share * size for share, size in zip(shares, sizes, strict=True))
    # shares are shown with four decimals
    assert positive == pytest.approx(sum(test["confusion_matrix"][1]), abs=5e-5 * test["rows"])
    for code, (name, of) in enumerate(test["classes"].items()):
        answered, right = sum(row[code] for row in test["confusion_matrix"]), test["confusion_matrix"][code][code]
        row = [
            name,
            *(f"{of[key]:.4f}" for key in ("precision", "recall", "f1")),
            *map(str, (of["rows"], answered, right)),
        ]
        assert row in found.tables[f"Scores on {test['rows']} test rows"]
    worst = found.tables["Most wrong rows"][1:]
    assert len(worst) == min(12, test["rows"] - np.trace(test["confusion_matrix"]))
    assert all(row[1] != row[2] and float(row[3]) <= 0.5 for row in worst)


def test_images_are_shown(tmp_path):
    from sklearn.datasets import load_digits

    assert run("train", "digits", "--epochs", "2", "--quiet", "--out", tmp_path / "run") == 0
    found, images = parsed(tmp_path / "run"), load_digits().images
    assert "Importance of the pixels" in found.texts
    assert any(label.startswith("The most important square: row ") for label in found.of("svg", "aria-label"))
    assert len(found.of("rect", "fill-opacity")) == 64
    worst = found.tables["Most wrong rows"][1:]
    for row, source, alt in zip(worst, found.of("img", "src"), found.of("img", "alt"), strict=True):
        assert alt == f"{row[1]} taken for {row[2]}"
        assert base64.b64decode(source.partition(",")[2]) == png(images[int(row[0])])


def test_a_png_holds_its_pixels():
    PIL = pytest.importorskip("PIL.Image")
    picture = PIL.open(io.BytesIO(png(np.array([[0.0, 5.0], [10.0, 10.0], [2.0, 0.0]]))))
    assert np.asarray(picture).tolist() == [[0, 127], [255, 255], [51, 0]]


def test_the_page_is_made_again(houses, capsys):
    before = (houses / "report.html").read_bytes()
    (houses / "report.html").unlink()
    expected = {"run": str(houses), "report": str(houses / "report.html"), "notes": []}
    assert result_of(capsys, "report", houses) == expected
    assert (houses / "report.html").read_bytes() == before


def test_other_weights_and_changed_data(tmp_path, capsys):
    folder, data = trained(tmp_path, *QUICK, target="kind", classes=2), tmp_path / "data.csv"
    assert f"report {folder}/report.html" in output_of(capsys, "report", folder, "--weights", "best")
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert "have changed since the training" in refusal(capsys, "report", folder, code=1)


def test_baselines_stand_beside_the_model():
    report = {
        "test": {"rows": 9, "loss": 0.5, "accuracy": 0.8},
        "baselines": {"constant": {"accuracy": 0.6}, "linear": {"accuracy": 0.75}},
    }
    text = page("t", ["rows", "a command"], report, {}, None)
    assert "<dt>accuracy</dt><dd>0.8000</dd><dd>constant 0.6000</dd><dd>linear 0.7500</dd>" in text
    found = Parsed(text).texts
    words = "Right on 80.0% of 9 test rows, a linear model on 75.0%, the most frequent class alone on 60.0%."
    assert found.index(words) < found.index(
        "Its distance from the linear model may be chance: more test rows would tell."
    )
    # the preparation is folded
    assert re.search(r"<details class=\"soft\"><summary>[\w, ]+</summary>\s*<p>a command</p>", text)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (-2e-5, "-0.00002"),
        (0.0, "0"),
        (1.3, "1.3"),
        (123456.7, "123457"),
        (1234567.0, "1234567"),
        (0.0008927, "0.00089"),
        (3.76963e-05, "0.000038"),
        (0.26801234, "0.268"),
        (1e-9, "1e-09"),
        (2e20, "2e+20"),
        (100.0, "100"),
    ],
)
def test_numbers_are_rounded_for_people(value, words):
    assert plain(value) == words


def test_a_share_near_0_has_four_decimals():
    assert (scored("r2", -2e-5), scored("rmse", 2e-5), spelled(0.00089, 0.0268)) == ("0.0000", "0.000020", "0.0009")
    assert (spelled(math.nan), spelled(math.inf)) == ("nan", "inf")


def test_a_share_near_1_shows_its_distance():
    for share, score, percent in (
        (0.97731, "0.9773", "97.7%"),
        (0.9996, "0.9996", "99.96%"),
        (0.9999948, "0.999995", "99.9995%"),
        (1 - 1e-12, "1.0000", "100.0%"),
        (1.0, "1.0000", "100.0%"),
    ):
        assert (scored("r2", share), in_percent(share)) == (score, percent)


def test_a_diverged_run_has_a_page_without_a_model(tmp_path):
    options = ["--optimizer", "sgd", "--lr", "1e30", "--epochs", "3", "--quiet"]
    assert run("train", "diabetes", *options, "--out", tmp_path / "run") == 1
    found = parsed(tmp_path / "run")
    assert [text for text in found.texts if text.startswith("divergence: ")] and "Most wrong rows" not in found.texts


@pytest.mark.parametrize(
    "scale", [np.ones(20), 10.0 ** np.where(np.arange(20) == 17, 300, -300 * (np.arange(20) == 4))]
)
def test_time_bounds_the_columns_of_a_wide_table(scale, tmp_path, monkeypatch):
    """The column that varies most with the predictions comes first, also among huge and tiny numbers."""
    monkeypatch.setattr(evidence_module, "SECONDS", -1.0)
    X = np.random.default_rng(2).normal(size=(300, 20)) * scale
    np.savez(tmp_path / "wide.npz", X=X, y=(X[:, 17] > 0).astype(np.int64))
    assert run("train", tmp_path / "wide.npz", "--epochs", "10", "--quiet", "--out", tmp_path / "run") == 0
    found = parsed(tmp_path / "run")
    table = found.tables["Importance of the columns"]
    assert len(table) == 2 and table[1][0] == "x17"
    assert any("19 columns were not tried" in text for text in found.texts)


def test_columns_that_only_disturb_have_no_bars():
    found = evidence_module.Importance("rmse", ["a"], [np.array([0])], np.array([-1e30]), np.zeros(1), 9, 0)
    assert _importance(found, None)["rows"][1][-1] == {"bar": 0.0}


def test_charts_of_odd_numbers():
    assert _drawings([Chart("empty", [Line("a", [1.0], [math.nan])], "x", "y")]) == []
    odd = ([1.0], [0.0, 0.0], [1e-9, 1e9], [-5.0, math.inf, 3.0])
    for ys in (*odd, [1e-300, 1e300], [1e9, 1e9 + 2**-22], [5e-324, 1e-310], [5e-324, 1e308]):
        Parsed(svg(Chart("one", [Line("<a>", range(len(ys)), ys)], "<x>", "$y", log=True, diagonal="equal")))


def test_a_page_without_figures_says_why_and_shows_numbers(monkeypatch):
    monkeypatch.setattr("matplotlib.rc_context", lambda _: 1 / 0)
    text = page("t", [], {}, {"loss": [1.0, 0.5], "val_loss": [1.5, 0.75]}, None)
    found = Parsed(text)
    assert "no figure: ZeroDivisionError: division by zero" in found.texts and "<details open>" in text
    assert found.tables["Training"] == [["epoch", "training", "validation"], ["1", "1", "1.5"], ["2", "0.5", "0.75"]]
