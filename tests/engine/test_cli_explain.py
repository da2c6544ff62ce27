"""``fusemlp explain`` and the table estimators' ``explain``: the columns that a model goes by."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

import fusemlp
from fusemlp.report import explanations
from fusemlp.report.evidence import Importance
from fusemlp.report.explanations import Attributions, attributions
from fusemlp.sklearn import TableClassifier, TableRegressor
from make import output_of, read, refusal, result_of, rows, run

COLUMNS = ["noise", "only", "word", "when"]


def table(count, *, seed=0):
    """Return rows whose target follows from ``only`` alone, beside a column with missing cells, words and dates."""
    random = np.random.default_rng(seed)
    only = random.normal(size=count)
    noise = np.where(random.random(count) < 0.2, np.nan, random.normal(size=count))
    when = pd.Timestamp("2020-01-01") + pd.to_timedelta(random.integers(0, 900, count), "D")
    words = random.choice(["red", "green", "blue"], count)
    frame = pd.DataFrame({"name": np.arange(count) + 100, "noise": noise, "only": only, "word": words, "when": when})
    return frame.assign(price=1000.0 + 50.0 * only)


@pytest.fixture(scope="module")
def prices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prices")
    table(300).to_csv(folder / "prices.csv", index=False)
    options = ["--target", "price", "--id", "name", "--models", "2", "--scale", "piecewise", "--epochs", "40"]
    assert run("train", folder / "prices.csv", *options, "--lr", "0.01", "--quiet", "--out", folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert run("train", "digits", "--hidden", "16", "--epochs", "3", "--quiet", "--out", folder) == 0
    return folder


# The mean of a date's pieces is like no row: a baseline that gives the date a share.
@pytest.mark.parametrize(
    ("method", "share"), [("permutation", 0.05), ("expected", 0.1), ("integrated", 0.4), ("gradient", 0.5)]
)
def test_the_only_column_that_matters_comes_first(prices, method, share, capsys):
    found = result_of(capsys, "explain", prices, "--method", method)
    importance = {one["column"]: one["importance"] for one in found["columns"]}
    assert next(iter(importance)) == "only" and sorted(importance) == sorted(COLUMNS)
    assert all(importance[name] < share * importance["only"] for name in COLUMNS if name != "only")
    assert found["rows"] == 60
    if method == "permutation":
        # the values of two independent normal rows differ by a standard deviation of sqrt(2)
        assert 0.5 * 70 < importance["only"] < 1.3 * 70


def test_prints_and_writes_the_columns(prices, tmp_path, capsys):
    out, plot = tmp_path / "importance.csv", tmp_path / "importance.png"
    shown = output_of(capsys, "explain", prices, "--out", out, "--plot", plot, "--rows", "40")
    assert shown.startswith("40 of 60 rows are drawn (--rows 60 takes all)\n")
    assert "40 test rows, each column permuted 10 times" in shown and "rmse worse by" in shown
    written = rows(out)
    assert [row["column"] for row in written] == [line.split()[0] for line in shown.splitlines()[3:7]]
    assert list(written[0]) == ["column", "importance", "deviation"] and float(written[0]["deviation"]) > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "--force" in refusal(capsys, "explain", prices, "--out", out)


def test_attributions_of_new_rows_add_up_to_their_predictions(prices, tmp_path, capsys):
    new, out, predicted = tmp_path / "new.csv", tmp_path / "out.csv", tmp_path / "predicted.csv"
    table(30, seed=1).drop(columns="price").to_csv(new, index=False)
    found = result_of(capsys, "explain", prices, "--method", "integrated", "--data", new, "--out", out)
    assert run("predict", prices, "--data", new, "--out", predicted) == 0
    written = rows(out)
    assert list(written[0]) == ["row", "name", "explained", "output", "baseline", *COLUMNS, "error"]
    for row, other in zip(written, rows(predicted), strict=True):
        assert row["name"] == other["name"] and row["explained"] == "price"
        output = float(row["output"])
        assert output == pytest.approx(float(other["prediction"]), rel=1e-6)
        # the columns of a table get everything: words, marks of missing cells, parts of dates, pieces
        missing = output - float(row["baseline"]) - sum(float(row[name]) for name in COLUMNS)
        assert missing == pytest.approx(float(row["error"]), abs=1e-6)
    assert found["completeness"]["most"] < 0.02 * found["completeness"]["difference"]
    said = refusal(capsys, "explain", prices, "--data", new, code=1)
    assert "no target column 'price'" in said and "--method integrated" in said


def test_prints_how_exact_the_sums_are_and_no_columns_of_wrong_ones(prices, tmp_path, capsys, monkeypatch):
    for method, printed in (("integrated", True), ("expected", True), ("gradient", False)):
        shown = output_of(capsys, "explain", prices, "--method", method)
        assert ("completeness: the attributions of a row sum to its output less the baseline's" in shown) is printed
    # kinks leave an error that is larger than this
    monkeypatch.setattr(explanations, "INEXACT", 1e-9)
    out = tmp_path / "out.csv"
    assert run("explain", prices, "--method", "integrated", "--out", out) == 1
    shown = capsys.readouterr()
    assert "X: integrated gradients are not exact enough with 800 steps" in shown.err
    assert "only" not in shown.out and not out.exists()


def test_images_get_a_heat_map_for_each_class(digits, tmp_path, capsys):
    plot, out = tmp_path / "digits.png", tmp_path / "digits.csv"
    found = result_of(capsys, "explain", digits, "--rows", "50", "--plot", plot, "--out", out)
    assert found["method"] == "integrated" and found["rows"] == 50 and len(found["columns"]) == 64
    assert found["completeness"]["most"] < 0.1 * found["completeness"]["difference"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len({row["explained"] for row in rows(out)}) > 5
    found = result_of(capsys, "explain", digits, "--rows", "50", "--class", "3", "--out", out, "--force")
    assert {row["explained"] for row in rows(out)} == {"3"}
    found = result_of(capsys, "explain", digits, "--rows", "50", "--method", "permutation", "--plot", plot, "--force")
    assert {one["column"] for one in found["columns"]} == {f"square {at // 8} {at % 8}" for at in range(64)}


MISTAKES = {
    "method": (["--method", "integratd"], "--method: unknown name 'integratd'; did you mean 'integrated'"),
    "class": (["--class", "three"], "--class: unknown name 'three'"),
    "class of a permutation": (["--class", "3", "--method", "permutation"], "--class: permutation reads the error"),
    "rows": (["--rows", "0"], "--rows: "),
    "out": (["--out", "x.txt"], "--out: expected a file name ending in .csv"),
    "plot": (["--plot", "x.pdf"], "--plot: expected a file name ending in .png"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(digits, options, message, capsys):
    assert message in refusal(capsys, "explain", digits, *options)


def test_a_single_row_or_none(prices, tmp_path, capsys):
    none, new = "there are no rows", tmp_path / "rows.csv"
    for count, method, mistake in ((1, "permutation", "X: permutation mixes"), (0, "permutation", none)):
        table(count).to_csv(new, index=False)
        assert run("explain", prices, "--data", new, "--method", method) != 0
        assert mistake in capsys.readouterr().err
    assert run("explain", prices, "--data", new, "--method", "integrated") != 0
    assert none in capsys.readouterr().err
    # Its baseline is the mean of the run's training rows, and where these are gone there is none.
    table(1).to_csv(new, index=False)
    found = result_of(capsys, "explain", prices, "--data", new, "--method", "integrated")
    assert found["completeness"]["difference"] > 0
    gone = tmp_path / "run"
    shutil.copytree(prices, gone)
    config = read(gone / "config.json")
    config["data"]["source"] = str(tmp_path / "gone.csv")
    (gone / "config.json").write_text(json.dumps(config))
    assert run("explain", gone, "--data", new, "--method", "integrated") != 0
    assert "background: a single row" in capsys.readouterr().err
    table(9).to_csv(new, index=False)
    assert "baselines are these rows" in output_of(capsys, "explain", gone, "--data", new, "--method", "integrated")


def test_the_title_names_the_explained_output(prices, digits, tmp_path, capsys):
    for given, title in (
        ((prices, "--method", "integrated"), "60 test rows, integrated gradients of 'price'"),
        ((digits, "--rows", "9"), "9 test rows, integrated gradients of the logit of each row's predicted class"),
        ((digits, "--rows", "9", "--class", "3"), "9 test rows, integrated gradients of the logit of '3'"),
    ):
        assert title in output_of(capsys, "explain", *given).splitlines()
    said = refusal(capsys, "explain", prices, "--method", "integrated", "--class", "red")
    assert "--class: the run predicts numbers" in said


@pytest.mark.parametrize("scale", ["robust", "piecewise"])
def test_attributions_of_columns_are_sums_of_their_inputs(scale):
    frame = table(80)
    model = TableRegressor(hidden=(8,), epochs=3, scale=scale, early_stopping=None).fit(frame[COLUMNS], frame["price"])
    made, engine = model.preprocessor_, model.engine_
    found = model.explain(frame[COLUMNS], method="integrated")
    assert isinstance(found, Attributions) and found.names == tuple(COLUMNS)
    X = np.asarray(model._inputs(frame[COLUMNS]))
    inputs = attributions(engine, X, baseline=X.mean(axis=0, dtype=np.float64))
    start, widths = 0, dict.fromkeys(COLUMNS, 0)
    for name, width in zip(made.sources, made.widths, strict=True):
        widths[name] += width
    assert widths["when"] > 3 and widths["word"] == 3 and widths["noise"] > (2 if scale == "piecewise" else 1)
    for at, name in enumerate(COLUMNS):
        own = inputs.values[:, start : start + widths[name]].sum(axis=1, dtype=np.float64) * made.target_scale[0]
        np.testing.assert_allclose(found.values[:, at], own, rtol=1e-4, atol=1e-4)
        start += widths[name]
    np.testing.assert_allclose(found.outputs, model.predict(frame[COLUMNS]), rtol=1e-5)


def test_estimators_permute_the_columns_of_a_table():
    frame = table(120)
    labels = np.where(frame["only"] > 0, "high", "low")
    model = TableClassifier(hidden=(8,), epochs=30, lr=0.01, scale="robust", early_stopping=None)
    model.fit(frame[COLUMNS], labels)
    found = model.explain(frame[COLUMNS], labels, repeats=3, seed=1)
    assert isinstance(found, Importance) and found.metric == "log_loss" and found.names[0] == "only"
    again = model.explain(frame[COLUMNS], labels, repeats=3, seed=1)
    assert isinstance(again, Importance)
    np.testing.assert_array_equal(again.worse, found.worse)
    expected = model.explain(frame[:5][COLUMNS], method="expected", background=frame[COLUMNS], steps=3, output=0)
    assert isinstance(expected, Attributions) and (expected.chosen == 0).all()
    named = model.explain(frame[:5][COLUMNS], method="integrated", output="low")
    assert isinstance(named, Attributions) and (named.chosen == 1).all()
    for given, options, message in (
        ((), {}, "y: permutation needs the targets"),
        ((labels,), {"method": "integrated"}, "y: the method 'integrated' reads no targets"),
        ((), {"method": "permutatoin"}, "did you mean 'permutation'"),
        ((), {"method": "integrated", "output": "lo"}, "output: unknown name 'lo'; did you mean 'low'"),
    ):
        with pytest.raises(fusemlp.ArgumentError, match=message):
            model.explain(frame[COLUMNS], *given, **options)


def test_targets_of_several_units_count_alike(tmp_path, capsys):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(300, 2))
    cells = np.column_stack([x, x[:, 0] + 0.1 * draw.normal(size=300), 1000.0 * x[:, 1]])
    np.savetxt(tmp_path / "data.csv", cells, delimiter=",", header="x1,x2,a,b", comments="")
    run_folder = tmp_path / "run"
    options = ("--target", "a,b", "--models", "1", "--epochs", "60", "--quiet", "--out", run_folder)
    assert run("train", tmp_path / "data.csv", *options) == 0
    columns = result_of(capsys, "explain", run_folder)["columns"]
    importance = {column["column"]: column["importance"] for column in columns}
    assert 0.5 < importance["x1"] / importance["x2"] < 2.0
    intervals = read(run_folder / "report.json")["intervals"]
    assert "width" not in intervals
    page = (run_folder / "report.html").read_text()
    assert "cover of 90% intervals" in page and "error in deviations" in page
