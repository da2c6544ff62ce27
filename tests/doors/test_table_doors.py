"""Options that train and the table estimators share: the same rows give the same model by both doors."""

import re
import shutil

import numpy as np
import onnxruntime
import pandas
import pytest
from sklearn.base import clone
from sklearn.metrics import r2_score
from sklearn.model_selection import cross_val_score, train_test_split

from fusemlp.datasets.load import ColumnChoices, load_data
from fusemlp.sklearn import MLPClassifier, MLPRegressor, TableClassifier, TableRegressor
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError
from make import output_of, read, refusal, result_of, run, words

ESTIMATORS = {"classification": TableClassifier, "regression": TableRegressor}
OPTIONS = {"hidden": 8, "epochs": 4, "models": 1, "scale": "robust", "backend": "numpy"}


def by_command(folder, frame, target, task, **options):
    """Return notes, predictions of the rows and the report of train and predict, or the error."""
    frame.to_parquet(folder / "a.parquet")
    shutil.rmtree(folder / "run", ignore_errors=True)
    made, told = folder / "run", ["--target", target, "--task", task, "--test-fraction", 0, "--quiet"]
    assert run("train", folder / "a.parquet", *told, *words(**options), "--out", made) == 0
    assert run("predict", made, "--data", folder / "a.parquet", "--out", folder / "p.npz", "--force") == 0
    with np.load(folder / "p.npz") as arrays:
        return read(made / "config.json")["data"]["notes"], arrays["predictions"]


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
    notes, predicted = DOORS[door](tmp_path, gaps, "y", task, **OPTIONS)
    assert notes == ["rows without 'y', left out: 6 of 60"]
    _, expected = by_estimator(tmp_path, frame[there], "y", task, **OPTIONS)
    np.testing.assert_array_equal(predicted[there], expected)


@pytest.mark.parametrize("missing", [pandas.NA, None, float("nan"), pandas.NaT])
def test_any_missing_target_is_one(missing):
    frame = table()
    labels = [missing, *frame["kind"][1:]]
    for y in (labels, np.array(labels, object), pandas.Series(labels, dtype=object)):
        model = TableClassifier(**OPTIONS).fit(frame[["size"]], y)
        assert model.notes_ == ("rows without 'y', left out: 1 of 60",)
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


def with_gaps():
    frame = table(200).drop(columns="kind").rename(columns={"y": "price"})
    frame["rent"] = frame["size"] / 10 + (frame["age"] == "new")
    gaps = frame.copy()
    gaps.loc[frame.index % 5 == 1, "price"] = np.nan
    gaps.loc[frame.index % 4 == 1, "rent"] = np.nan
    return frame, gaps


@pytest.mark.parametrize("door", DOORS)
def test_several_targets_with_gaps_are_one_network(door, tmp_path):
    whole, gaps = with_gaps()
    notes, predicted = DOORS[door](tmp_path, gaps, "price,rent", "regression", **OPTIONS | {"epochs": 60, "lr": 0.02})
    assert notes[0].startswith("rows without ") and notes[0].endswith(", left out: 10 of 200")
    assert "missing targets, which weigh nothing: 30 in 'price', 40 in 'rent'" in notes
    truth = whole[["price", "rent"]].to_numpy()
    # each target counts in its own deviations
    assert (np.sqrt(np.mean((predicted - truth) ** 2, axis=0)) < 0.2 * truth.std(axis=0)).all()
    there = gaps.assign(price=gaps["price"].fillna(0.0), rent=gaps["rent"].fillna(1e6))
    _, filled = DOORS[door](tmp_path, there, "price,rent", "regression", **OPTIONS | {"epochs": 60, "lr": 0.02})
    assert (np.abs(filled - truth) > np.abs(predicted - truth)).mean() > 0.9


def test_both_doors_give_one_model_of_several_targets(tmp_path):
    for frame in with_gaps():
        notes, predicted = by_command(tmp_path, frame, "price,rent", "regression", **OPTIONS)
        told, expected = by_estimator(tmp_path, frame, "price,rent", "regression", **OPTIONS)
        np.testing.assert_array_equal(predicted, expected)
        assert [note.replace("'price', 'rent'", "'y'") for note in notes] == told


def test_scores_of_several_targets_are_those_of_the_rows_that_have_them(tmp_path, capsys):
    _, gaps = with_gaps()
    gaps.to_csv(tmp_path / "a.csv", index=False)
    # the trials of scale run too
    quick, made = words(**{name: value for name, value in OPTIONS.items() if name != "scale"}), tmp_path / "run"
    assert run("train", tmp_path / "a.csv", "--target", "price,rent", "--quiet", *quick, "--out", made) == 0
    report, config = read(made / "report.json"), read(made / "config.json")
    assert config["preprocessor"]["target_name"] == "price,rent" and config["loss"]["missing"]
    model = TableRegressor.from_run(made)
    rows = gaps.dropna(how="all", subset=["price", "rent"]).reset_index(drop=True)
    test = rows.iloc[np.sort(train_test_split(np.arange(len(rows)), test_size=0.2, random_state=0)[1])]
    errors = model.predict(test) - test[["price", "rent"]].to_numpy()
    for at, name in enumerate(("price", "rent")):
        own = errors[~np.isnan(errors[:, at]), at]
        assert report["test"]["targets"][name]["mae"] == pytest.approx(np.abs(own).mean(), rel=1e-6)
    means = [np.mean([scores[name] for scores in report["test"]["targets"].values()]) for name in ("rmse", "r2")]
    assert [report["test"]["rmse"], report["test"]["r2"]] == pytest.approx(means)
    assert np.isfinite([scores["r2"] for scores in report["baselines"].values()]).all()
    assert report["held_out"]["rows"] > 0 and 0.5 < report["intervals"]["coverage"] <= 1.0
    capsys.readouterr()
    assert run("evaluate", made) == 0
    assert re.search(r"^test 'rent': rmse [\d.]+, mae [\d.]+, r2 -?[\d.]+$", capsys.readouterr().out, re.MULTILINE)
    assert run("predict", made, "--data", tmp_path / "a.csv", "--out", tmp_path / "p.csv", "--interval", "0.8") == 0
    columns = [f"{kind}_{name}" for kind in ("prediction", "low", "high") for name in ("price", "rent")]
    assert list(pandas.read_csv(tmp_path / "p.csv")) == columns
    assert "of target rent" in output_of(capsys, "explain", made, "--method", "integrated", "--class", "rent")
    assert run("explain", made, "--method", "integrated") == 2
    assert "--class: the run has 2 targets; give one: --class price" in capsys.readouterr().err
    assert run("export", made, "--onnx", tmp_path / "a.onnx") == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    fed = {"size": np.float32([[70.0]]), "age": np.array([["new"]], object)}
    (values,) = session.run(["prediction"], fed)
    expected = model.predict(pandas.DataFrame({"size": [70.0], "age": ["new"]}))
    np.testing.assert_allclose(values, expected, rtol=1e-4)


@pytest.mark.parametrize("loss", ["mse", "gaussian"])
def test_a_model_of_whole_targets_is_evaluated_on_rows_with_gaps(loss, tmp_path, capsys):
    whole, gaps = with_gaps()
    by_command(tmp_path, whole, "price,rent", "regression", **OPTIONS, loss=loss)
    model = TableRegressor.from_run(tmp_path / "run")
    gaps.dropna(how="all", subset=["price", "rent"]).to_csv(tmp_path / "gaps.csv", index=False)
    scores = result_of(capsys, "evaluate", tmp_path / "run", "--data", tmp_path / "gaps.csv")
    unit, truth = np.array(model.preprocessor_.target_scale), gaps[["price", "rent"]].to_numpy()
    losses = ((model.predict(whole) - truth) / unit) ** 2
    if loss == "gaussian":
        std = model.predict(whole, return_std=True)[1] / unit
        losses = (2 * np.log(std) + losses / std**2) / 2
    assert scores["loss"] == pytest.approx(np.nanmean(losses), rel=1e-4)


def test_gaps_in_rows_that_are_drawn_for_the_test_leave_all_models():
    frame = with_gaps()[0].iloc[:100]
    tested = train_test_split(np.arange(100), test_size=0.2, random_state=0)[1]
    frame.loc[tested[:7], "rent"] = np.nan
    for final_fit in (False, True):
        options = {"hidden": 4, "epochs": 2, "scale": "robust", "test_fraction": 0.2, "final_fit": final_fit}
        model = TableRegressor(**options).fit(frame[["size", "age"]], frame[["price", "rent"]])
        note = "missing targets, which weigh nothing: 7 in 'rent'"
        # a final fit trains on the test rows too
        fewer = "1 model instead of 5, because targets are missing"
        assert model.notes_ == ((note, fewer) if final_fit else (note,))
        assert model.engine_.loss.missing == final_fit
        assert np.isfinite(model.report_["test"]["loss"]) and model.held_out_.rows > 0


def test_trials_that_have_too_few_rows_with_all_targets_say_so():
    frame = pandas.concat([with_gaps()[0]] * 2, ignore_index=True)
    frame.loc[:209, "price"] = np.nan
    model = TableRegressor(hidden=4, epochs=1).fit(frame[["size", "age"]], frame[["price", "rent"]])
    said = "no trials decide --scale: they take 200 rows with all targets, and 1[0-9]{2} of 360 have them; choose it"
    assert any(re.match(said, note) for note in model.notes_), model.notes_


@pytest.mark.parametrize("labels", [[0, 1], [False, True]])
def test_labels_beside_a_gap_stay_what_they_are(labels):
    frame = table()
    y = [None, *labels * 29, labels[1]]
    whole = pandas.array(y, dtype="boolean" if labels[1] is True else "Int64")
    for given in (y, np.array(y, object), pandas.Series(y, dtype=object), pandas.Series(whole), whole):
        model = TableClassifier(**OPTIONS).fit(frame[["size"]], given)
        assert model.classes_.tolist() == labels and model.classes_.dtype == np.array(labels).dtype
        assert model.notes_ == ("rows without 'y', left out: 1 of 60",)


def test_rows_may_be_mappings():
    frame = table()
    X, rows = frame[["size", "age"]], frame[["size", "age"]].to_dict("records")
    model = TableRegressor(**OPTIONS).fit(rows, frame["y"])
    expected = TableRegressor(**OPTIONS).fit(X, frame["y"]).predict(X)
    np.testing.assert_array_equal(model.predict(rows), expected)
    assert list(model.feature_names_in_) == ["size", "age"]
    # in any order, with gaps and further entries
    few = [{"age": "new", "more": 1, "size": 70}, {"size": None, "age": "old"}, {"age": "new", "size": "80"}]
    wanted = model.predict(pandas.DataFrame({"size": [70, None, 80], "age": ["new", "old", "new"]}))
    np.testing.assert_array_equal(model.predict(few), wanted)
    for row, key in (({0: 1.0}, "the key 0"), ({"size": 70, None: ["new"]}, "the key None"), ({}, "rows without keys")):
        with pytest.raises(ArgumentTypeError, match=f"^X: expected rows whose keys are names of columns, got {key}"):
            model.predict([row])
    for wrong in (rows[0], X.iloc[0], "table.csv"):
        with pytest.raises(
            ArgumentTypeError, match=r"^X: expected a data frame, .* got \w+; give a single row as \[\{"
        ):
            model.predict(wrong)


def test_quantiles_that_are_close_have_names_of_their_own(tmp_path):
    options = OPTIONS | {"loss": "quantiles", "quantile": "0.001,0.07,0.5,0.9999995,0.9999996"}
    by_command(tmp_path, table(200).drop(columns="kind"), "y", "regression", **options)
    names = ["q0.1", "q7", "q50", "q99.99995", "q99.99996"]
    report = read(tmp_path / "run" / "report.json")
    assert list(TableRegressor.from_run(tmp_path / "run").engine_.loss.names) == names and not report.get("test")
    with np.load(tmp_path / "p.npz") as arrays:
        assert set(names) <= set(arrays)


def test_gaps_leave_one_model_with_a_note_and_those_of_a_test_file_all(tmp_path):
    whole, gaps = with_gaps()
    whole.loc[:99].to_csv(tmp_path / "whole.csv", index=False)
    gaps.loc[:99].dropna(how="all", subset=["price", "rent"]).to_csv(tmp_path / "gaps.csv", index=False)
    note = "1 model instead of 5, because targets are missing"
    asked = ("--target", "price,rent", "--epochs", 2, "--hidden", 4, "--scale", "robust", "--quiet")
    for data, test, models in (("whole", "gaps", 5), ("gaps", "whole", 1)):
        made, files = tmp_path / data, [tmp_path / f"{name}.csv" for name in (data, test)]
        assert run("train", files[0], "--test", files[1], *asked, "--out", made) == 0
        config, report = read(made / "config.json"), read(made / "report.json")
        assert (note in config["data"]["notes"]) == (models == 1)
        assert config["loss"].get("missing", False) == (models == 1)
        assert np.isfinite(report["test"]["loss"]) and report["held_out"]["rows"] > 0
        model = TableRegressor.from_run(made)
        assert np.ptp(model.predict(whole, return_std=True)[1]) > 0 if models > 1 else model.models in (None, 1)


def test_a_sweep_refuses_gaps_by_their_name(tmp_path, capsys):
    with_gaps()[1].to_csv(tmp_path / "a.csv", index=False)
    asked = ("--target", "price,rent", "--vary", "lr=0.1,0.01", "--scale", "robust", "--out", tmp_path / "run")
    assert run("sweep", tmp_path / "a.csv", *asked) == 2
    message = "--vary: the models of a sweep take rows with all targets, and some are missing: 30 in 'price', 40 in"
    assert message in capsys.readouterr().err


# The data, the options and the message, of which the command spells options.
REFUSED = {
    "quantiles": ("whole", {"loss": "quantiles"}, "loss: quantiles learns one target, and there are 2"),
    "models": ("gaps", {"models": 3}, "models: several models take rows with all targets, and some are missing: 30 in"),
    "members": ("gaps", {"preset": "tabm"}, "preset: members that share weights take rows with all targets"),
    "privacy": ("gaps", {"dp_epsilon": 3.0}, "dp_epsilon: private training takes rows with all targets"),
    "attacks": ("gaps", {"adversarial": "pgd"}, "adversarial: adversarial training takes rows with all targets"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_losses_and_trainings_that_take_no_gaps_refuse_them(case, tmp_path, capsys):
    data, options, message = REFUSED[case]
    whole, gaps = with_gaps()
    frame = whole if data == "whole" else gaps
    frame.to_csv(tmp_path / "a.csv", index=False)
    said = refusal(
        capsys, "train", tmp_path / "a.csv", "--target", "price,rent", *words(**options), "--out", tmp_path / "run"
    )
    argument, _, rest = message.partition(":")
    assert f"error: --{argument.replace('_', '-')}:{rest}" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(ArgumentError, match=f"^{message}"):
        TableRegressor(**options).fit(frame[["size", "age"]], frame[["price", "rent"]])


@pytest.mark.parametrize(
    "target, options, message",
    [
        ("price,age", (), "column 'age': several targets are numbers, or yes and no, and it holds words such as 'new'"),
        ("price,rnt", (), "there is no target column 'rnt'; the columns are 'size', 'age', 'price', 'rent'; did you"),
        ("price,rent", ("--drop", "rent"), "--drop: 'rent' is the target"),
        ("price,rent", ("--task", "classification"), "several labels are 0 or 1 each, yes or no, true or false; found"),
    ],
)
def test_wrong_targets(target, options, message, tmp_path, capsys):
    with_gaps()[0].to_csv(tmp_path / "a.csv", index=False)
    assert run("train", tmp_path / "a.csv", "--target", target, *options, "--out", tmp_path / "run") > 0
    assert message in capsys.readouterr().err


def test_a_regressor_is_scored_on_the_targets_that_rows_have():
    frame, gaps = with_gaps()
    X, y = frame[["size", "age"]], gaps[["price", "rent"]]
    model, weight = TableRegressor(**OPTIONS).fit(X, y), np.linspace(0.5, 2.0, len(X))
    for weights in (None, weight):
        whole = r2_score(frame[["price", "rent"]], model.predict(X), sample_weight=weights)
        assert model.score(X, frame[["price", "rent"]], weights) == pytest.approx(whole, rel=1e-12)
    there = y.notna().to_numpy()
    predicted = model.predict(X)
    each = [r2_score(y.iloc[rows, at], predicted[rows, at]) for at, rows in enumerate(there.T)]
    assert model.score(X, y) == pytest.approx(np.mean(each), rel=1e-12)
    assert np.isfinite(cross_val_score(TableRegressor(**OPTIONS), X, y, cv=2)).all()


def test_targets_to_validate_on_are_as_many_as_those_to_train_on():
    frame = with_gaps()[0]
    X, y = frame[["size", "age"]], frame[["price", "rent"]]
    for part, of_val in ((y, y["price"]), (y["price"], y)):
        with pytest.raises(ShapeError, match=r"^y_val: expected [12] targets, as y has, got [12];"):
            TableRegressor(**OPTIONS).fit(X, part, X_val=X, y_val=of_val)
    TableRegressor(**OPTIONS).fit(X, y[["price"]], X_val=X, y_val=y["price"])


def test_messages_name_the_target_that_is_wrong(tmp_path, capsys):
    frame = with_gaps()[0].assign(empty=np.nan)
    frame.loc[3, "rent"] = -7.0
    frame.to_csv(tmp_path / "a.csv", index=False)
    for target, option, message in (
        ("price,empty", "--quiet", "a target of ('price', 'empty') has no value in the training rows"),
        ("price,rent", "--log-target", "the target 'rent' holds -7, and has no logarithm"),
    ):
        assert run("train", tmp_path / "a.csv", "--target", target, option, "--out", tmp_path / "run") > 0
        assert message in capsys.readouterr().err


def test_a_column_with_a_comma_in_its_name_is_one_target(tmp_path):
    frame = with_gaps()[0].rename(columns={"price": "price,net"})
    dataset = load_data(frame, target="price,net")
    assert dataset.targets == ("price,net",) and dataset.y.shape == (200,)
    assert load_data(frame, target="rent, rent").targets == ("rent",)
    assert load_data(frame.assign(empty=np.nan), target="rent, empty").gaps == "200 in 'empty'"
    with pytest.raises(DataError, match=r"a target of \('rent', 'empty'\) has no value"):
        TableRegressor(**OPTIONS).fit(frame[["size"]], frame[["rent"]].assign(empty=np.nan))


@pytest.mark.parametrize("door", DOORS)
def test_a_column_of_weights(door, tmp_path):
    frame = table()[["size", "age", "y"]]
    weight = np.where(frame["age"] == "old", 3.0, 0.5)
    _, predicted = DOORS[door](tmp_path, frame.assign(w=weight), "y", "regression", **OPTIONS, weight="w")
    X = frame[["size", "age"]]
    model = TableRegressor(**OPTIONS).fit(X, frame["y"], sample_weight=weight)
    np.testing.assert_array_equal(predicted, model.predict(X))
    assert (predicted != TableRegressor(**OPTIONS).fit(X, frame["y"]).predict(X)).any()
    if door == "command":
        opened = TableRegressor.from_run(tmp_path / "run")
        assert opened.weight == "w" and opened.preprocessor_.feature_names == ("size", "age")
        logged = pandas.read_csv(tmp_path / "run" / "metrics.csv")["val_loss"]
        np.testing.assert_array_equal(logged, model.history_.history["val_loss"])
        columns = pandas.read_csv(tmp_path / "run" / "columns.csv").set_index("column")
        assert columns.loc["w", "became"] == "weight"


@pytest.mark.parametrize("door", DOORS)
def test_rows_of_weight_0_are_left_out(door, tmp_path):
    frame = table()[["size", "age", "y"]]
    weight = np.where(frame.index % 3 == 0, 0.0, 2.0)
    _, predicted = DOORS[door](tmp_path, frame.assign(w=weight), "y", "regression", **OPTIONS, weight="w")
    model = TableRegressor(**OPTIONS).fit(frame[["size", "age"]], frame["y"], sample_weight=weight)
    np.testing.assert_array_equal(predicted, model.predict(frame[["size", "age"]]))
    dataset = load_data(frame.assign(w=weight), target="y", columns=ColumnChoices(weight="w", ids=["age"]))
    assert len(dataset.y) == len(dataset.X) == len(dataset.ids["age"]) == np.count_nonzero(weight)
    assert "rows without a weight, left out: 20 of 60" in dataset.notes


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1.0, -2.0], "row 1, column 'w': expected a weight, a finite number of at least 0, found -2.0"),
        ([None, 1.0], "row 0, column 'w': expected a weight, a finite number of at least 0, found none"),
        ([np.inf, 1.0], "row 0, column 'w': expected a weight, a finite number of at least 0, found none"),
        ([0.0, 0.0], "'w' of rows with a target: expected weights of at least 0, of which at least one is a non-zero"),
        (["much", "less"], "row 0, column 'w': expected a weight, a finite number of at least 0, found much"),
    ],
)
@pytest.mark.parametrize("door", DOORS)
def test_wrong_weights_name_the_row(door, weights, message, tmp_path, capsys):
    frame = table()[["size", "y"]].assign(w=weights * 30)
    with pytest.raises((DataError, AssertionError)) as caught:
        DOORS[door](tmp_path, frame, "y", "regression", **OPTIONS, weight="w")
    told = capsys.readouterr().err if door == "command" else str(caught.value)
    assert message in told
    assert not (tmp_path / "run").exists()


def test_wrong_weights_are_numbered_with_the_rows_that_have_no_target(tmp_path):
    (tmp_path / "a.csv").write_text("x,y,w\n1,,-1\n2,,\n3,1,2\n4,2,-1\n5,3,1\n")
    for source, place in ((tmp_path / "a.csv", "line 5"), (pandas.read_csv(tmp_path / "a.csv"), "row 3")):
        with pytest.raises(DataError, match=f"{place}, column 'w': expected a weight, .*, found -1") as caught:
            load_data(source, target="y", columns=ColumnChoices(weight="w"))
        assert "mistakes" not in str(caught.value)


def test_weights_stand_alone_and_beside_other_rows(tmp_path, capsys):
    frame = table()[["size", "age", "y"]].assign(w=1.0)
    with pytest.raises(DataError, match=r"^sample_weight: expected weights of at least 0, .*; row 5 holds -1\.0"):
        TableRegressor(**OPTIONS).fit(frame[["size"]], frame["y"], sample_weight=np.where(frame.index == 5, -1, 1))
    gaps = frame["y"].where(frame.index > 5)
    with pytest.raises(DataError, match=r"^sample_weight of rows with a target: expected .*; every row holds 0"):
        TableRegressor(**OPTIONS).fit(frame[["size"]], gaps, sample_weight=np.where(frame.index > 5, 0, 1))
    with pytest.raises(ArgumentError, match="weight: fit got sample_weight too, beside the column 'w'; give one"):
        TableRegressor(**OPTIONS, weight="w").fit(frame.drop(columns="y"), frame["y"], sample_weight=np.ones(60))
    with pytest.raises(ArgumentError, match="keep: 'w' is the column of --weight too"):
        TableRegressor(**OPTIONS, weight="w", keep=["w"]).fit(frame.drop(columns="y"), frame["y"])
    for option, other in (
        ("group", ColumnChoices(weight="w", group="w")),
        ("id", ColumnChoices(weight="w", ids=["w"])),
    ):
        with pytest.raises(ArgumentError, match=f"weight: 'w' is the column of --{option} too; give one of them"):
            load_data(frame, target="y", columns=other)
    with pytest.raises(DataError, match="no columns 'v' to weigh the rows by"):
        TableRegressor(**OPTIONS, weight="v").fit(frame.drop(columns="y"), frame["y"])
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame[::2].to_csv(tmp_path / "v.csv", index=False)
    files = "--validation", tmp_path / "v.csv", "--weight", "w", "--final-fit", "--quiet"
    assert run("train", tmp_path / "a.csv", "--target", "y", *words(**OPTIONS), *files, "--out", tmp_path / "run") == 0
    assert read(tmp_path / "run" / "report.json")["final_fit"]["rows"] == 90
    assert run("evaluate", tmp_path / "run", "--data", tmp_path / "a.csv") == 0
    assert "columns that the training did not have" not in capsys.readouterr().out


# The estimator, its parameter in another library, and the message.
NAMED = {
    "epochs": (MLPClassifier, {"epochs": 5}, "epochs: it is called max_iter here"),
    "rate": (MLPRegressor, {"lr": 0.1}, "lr: it is called learning_rate_init here"),
    "width": (MLPRegressor, {"hidden_dim": 8}, "hidden_dim: it is called hidden_layer_sizes here"),
    "iterations": (TableClassifier, {"max_iter": 5}, "max_iter: it is called epochs here"),
    "rate of a table": (TableRegressor, {"learning_rate": 0.1}, "learning_rate: it is called lr here"),
    "trees": (TableClassifier, {"n_estimators": 5}, "n_estimators: a network has no trees; leave it out"),
    "a mistake": (TableRegressor, {"droput": 5}, "droput: there is no such argument; did you mean 'dropout'"),
}


@pytest.mark.parametrize("case", NAMED)
def test_names_of_other_libraries(case):
    estimator, options, message = NAMED[case]
    with pytest.raises(TypeError, match=f"^{message}"):
        estimator(**options)
    assert clone(estimator(batch_size=7)).batch_size == 7


@pytest.mark.parametrize("door", DOORS)
def test_several_quantiles_name_their_loss(door, tmp_path, capsys):
    frame = table()[["size", "y"]]
    with pytest.raises((ArgumentError, AssertionError)) as caught:
        DOORS[door](tmp_path, frame, "y", "regression", **OPTIONS, loss="quantile", quantile="0.1,0.9")
    told = capsys.readouterr().err if door == "command" else str(caught.value)
    assert "quantile: the loss quantile learns one; for several take --loss quantiles" in told
    if door == "estimator":
        model = TableRegressor(**OPTIONS, loss="quantiles").fit(frame[["size"]], frame["y"])
        with pytest.raises(
            ArgumentError, match="return_std: the loss quantiles learns no deviation; use predict_quant"
        ):
            model.predict(frame[["size"]], return_std=True)
