"""What train and the table estimators take alike: the same rows give the same model by both doors."""

import json

import numpy as np
import pandas
import pytest

from fusemlp.sklearn import TableClassifier, TableRegressor
from fusemlp_kernels.errors import DataError
from make import run

ESTIMATORS = {"classification": TableClassifier, "regression": TableRegressor}
OPTIONS = {"hidden": 8, "epochs": 4, "models": 1, "scale": "robust", "backend": "numpy"}


def by_command(folder, frame, target, task, **options):
    """Return notes, predictions of the rows and the report of train and predict, or the error."""
    frame.to_parquet(folder / "a.parquet")
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    made, told = folder / "run", ["--target", target, "--task", task, "--test-fraction", 0, "--quiet"]
    assert run("train", folder / "a.parquet", *told, *words, "--out", made) == 0
    assert run("predict", made, "--data", folder / "a.parquet", "--out", folder / "p.npz") == 0
    notes = json.loads((made / "config.json").read_text())["data"]["notes"]
    with np.load(folder / "p.npz") as arrays:
        return notes, arrays["predictions"]


def by_estimator(folder, frame, target, task, **options):
    names = target.split(",")
    y = frame[names] if len(names) > 1 else frame[target]
    model = ESTIMATORS[task](**options).fit(X := frame.drop(columns=names), y)
    return list(model.notes_), model.predict(X)


DOORS = {"command": by_command, "estimator": by_estimator}


def table(rows=60, seed=0):
    random = np.random.default_rng(seed)
    size = random.uniform(50, 150, rows)
    age = random.choice(["new", "old"], rows)
    price = 1000.0 + 20 * size - 300 * (age == "old") + random.normal(size=rows)
    return pandas.DataFrame({"size": size, "age": age, "y": price, "kind": np.where(price > 2900, "big", "small")})


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("task, column, gap", [("regression", "y", np.nan), ("classification", "kind", None)])
def test_rows_without_a_target_are_left_out_and_said(door, task, column, gap, tmp_path):
    frame = table()[["size", "age", column]].rename(columns={column: "y"})
    there = np.arange(60) % 10 != 3
    gaps = frame.assign(y=frame["y"].where(there, gap))
    (tmp_path / "all").mkdir()
    notes, predicted = DOORS[door](tmp_path, gaps, "y", task, **OPTIONS)
    assert notes == ["6 of 60 rows have no 'y' and are left out"]
    _, expected = by_estimator(tmp_path, frame[there], "y", task, **OPTIONS)
    np.testing.assert_array_equal(predicted[there], expected)


@pytest.mark.parametrize("missing", [pandas.NA, None, float("nan"), pandas.NaT])
def test_any_missing_target_is_one(missing):
    frame = table()
    labels = [missing, *frame["kind"][1:]]
    for y in (labels, np.array(labels, object), pandas.Series(labels, dtype=object)):
        model = TableClassifier(**OPTIONS).fit(frame[["size"]], y)
        assert model.notes_ == ("1 of 60 rows have no 'y' and are left out",)
        assert model.classes_.tolist() == ["big", "small"]
    whole = pandas.array([None, *np.arange(59)], dtype="Int64")
    model = TableRegressor(**OPTIONS).fit(frame[["size"]], whole, X_val=frame[["size"]], y_val=whole)
    assert len(model.notes_) == 2 and model.held_out_.rows == 59
    assert 0.0 <= TableClassifier(**OPTIONS).fit(frame[["size"]], labels).certify(frame, labels, 0.0)["accuracy"] <= 1.0
    with pytest.raises(DataError, match="y: the target is missing in all 60 rows"):
        TableClassifier(**OPTIONS).fit(frame[["size"]], [missing] * 60)


@pytest.mark.parametrize("door", DOORS)
def test_infinite_numbers_are_missing_cells_and_said(door, tmp_path):
    frame = table()[["size", "age", "y"]]
    gaps = frame.assign(size=frame["size"].where(frame.index % 20 > 0, [np.inf, -np.inf] * 30))
    notes, predicted = DOORS[door](tmp_path, gaps, "y", "regression", **OPTIONS)
    assert notes == [
        "column 'size' holds infinite numbers, taken as missing cells: 3",
        "missing cells, filled in: 3 in 'size'",
    ]
    _, expected = by_estimator(tmp_path, gaps.replace([np.inf, -np.inf], np.nan), "y", "regression", **OPTIONS)
    np.testing.assert_array_equal(predicted, expected)


@pytest.mark.parametrize("door", DOORS)
def test_durations_and_periods(door, tmp_path):
    frame = table()[["age", "y"]].assign(
        wait=pandas.to_timedelta([None, *np.arange(59) ** 2], unit="h"),
        month=pandas.period_range("2024-01", periods=60, freq="M"),
    )
    # a file has the moment at which a period begins
    written = frame.assign(month=frame["month"].dt.to_timestamp()) if door == "command" else frame
    notes, predicted = DOORS[door](tmp_path, written, "y", "regression", **OPTIONS)
    assert notes[0] == "column 'wait' holds durations or times of day, taken in seconds"
    plain = frame.assign(wait=frame["wait"].dt.total_seconds(), month=frame["month"].dt.to_timestamp())
    _, expected = by_estimator(tmp_path, plain, "y", "regression", **OPTIONS)
    np.testing.assert_array_equal(predicted, expected)
