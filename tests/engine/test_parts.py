"""Rows that train, validate and test: own files, whole groups, the order of time, and rows seen before."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusemlp.cli.options import SweepOptions, TrainOptions
from fusemlp.cli.session import prepared_data
from fusemlp.cli.vary import planned
from fusemlp.datasets.load import Dataset, load_data
from fusemlp.datasets.rows import among, folds, hold_out, row_hashes, with_files
from fusemlp_kernels.errors import ArgumentError, DataError
from make import output_of, read, refusal, result_of, run


def write(path, header, rows):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def visits(path):
    """Write a table of 100 visits: 20 patients with a constant class each, days in random order."""
    generator = np.random.default_rng(0)
    days, numbers = np.datetime64("2024-01-01") + generator.permutation(100), generator.normal(size=100).round(6)
    rows = [[f"p{row % 20}", days[row], numbers[row], row % 20 % 2] for row in range(100)]
    return write(path, "patient,day,x,y", rows)


def prepared(path, **options):
    return prepared_data(TrainOptions(**{"data": str(path), "target": "y", **options}))


# Groups and times


def dataset(y, **fields):
    task = "classification" if len(set(np.asarray(y).tolist())) < 5 else "regression"
    return Dataset("made", np.zeros((len(y), 1)), np.asarray(y), task, ("x",), **fields)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_group_is_on_one_side(data):
    codes = data.draw(st.lists(st.integers(0, 8), min_size=4, max_size=60).filter(lambda codes: len(set(codes)) > 1))
    groups = np.array([f"g{code}" for code in codes], object)
    y = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(codes), max_size=len(codes))))
    rows = np.arange(len(codes))[data.draw(st.integers(0, 1)) :]
    if len(set(groups[rows])) < 2:
        return
    seed, fraction = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([0.1, 0.2, 0.5]))
    kept, held = hold_out(dataset(y, groups=groups), rows, fraction=fraction, seed=seed)
    assert sorted([*kept, *held]) == rows.tolist()
    assert len(kept) and len(held)
    assert not set(groups[kept]) & set(groups[held])
    again = hold_out(dataset(y, groups=groups), rows, fraction=fraction, seed=seed)
    np.testing.assert_array_equal(again[1], held)


def test_groups_keep_the_share_of_rows_and_classes():
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 12, 200)
    groups = np.repeat([f"g{number}" for number in range(200)], sizes).astype(object)
    y = np.repeat(generator.random(200) < 0.2, sizes).astype(int)
    _, held = hold_out(dataset(y, groups=groups), np.arange(len(y)), fraction=0.2, seed=1)
    # The border lies within a group, so a side misses its share by at most the greatest group.
    assert abs(len(held) - 0.2 * len(y)) <= 12
    assert abs(y[held].mean() - y.mean()) < 0.05
    assert set(hold_out(dataset(y, groups=groups), np.arange(len(y)), fraction=0.2, seed=2)[1]) != set(held)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 15), min_size=2, max_size=50).filter(lambda times: len(set(times)) > 1),
    st.sampled_from([0.01, 0.1, 0.2, 0.5, 0.9]),
)
def test_the_last_rows_are_held_out(times, fraction):
    values = np.array(times)
    rows = np.arange(len(times))
    kept, held = hold_out(dataset(rows * 0.5, times=values), rows, fraction=fraction, seed=0)
    assert sorted([*kept, *held]) == list(range(len(times)))
    # Rows of one time stay together.
    assert values[kept].max() < values[held].min()


def test_train_splits_by_group(tmp_path, capsys):
    path = visits(tmp_path / "a.csv")
    made = prepared(path, group="patient")
    groups = made.dataset.groups
    assert made.dataset.feature_names[-1] == "x" and "patient" not in made.dataset.feature_names
    trained_on = set(groups[made.training])
    # A patient has 5 rows: 16 patients train or validate.
    assert len(made.test) == 20 and len(made.train) == 5 * len(trained_on) == 70
    assert made.summary["validation_rows"] == 10
    folder = tmp_path / "run"
    assert run("train", path, "--target", "y", "--group", "patient", "--epochs", "1", "--quiet", "--out", folder) == 0
    assert result_of(capsys, "evaluate", folder)["rows"] == 20
    assert run("train", "--resume", folder, "--epochs", "2", "--quiet") == 0


def test_train_splits_by_time(tmp_path, capsys):
    path = visits(tmp_path / "a.csv")
    for options in ({}, {"drop": ["day"]}):
        made = prepared(path, time="day", **options)
        times = made.dataset.times
        days = np.sort(times)
        np.testing.assert_array_equal(np.sort(times[made.training]), days[:72])
        assert [len(part) for part in (made.train, made.validation or (), made.test)] == [72, 8, 20]
        assert any(name.startswith("day") for name in made.dataset.feature_names) == (not options)
    folder = tmp_path / "run"
    options = ["--target", "y", "--time", "day", "--drop", "day", "--epochs", "1", "--quiet", "--out", folder]
    assert run("train", path, *options) == 0
    assert run("evaluate", folder) == 0
    capsys.readouterr()
    # The test rows are the last: the run's folder tells the same rows for the same file.
    assert read(folder / "config.json")["preprocessor"]["unused"] == ["day"]


def test_a_sweep_splits_in_the_same_way(tmp_path):
    path = visits(tmp_path / "a.csv")
    plan = planned(SweepOptions(data=str(path), target="y", group="patient", vary=["lr=0.1,0.2"], epochs=1))
    np.testing.assert_array_equal(plan.prepared.training, prepared(path, group="patient").training)


def test_rows_without_a_group_are_one(tmp_path):
    rows = [["" if row % 4 == 0 else f"g{row % 10}", row / 7, row % 2] for row in range(60)]
    made = prepared(write(tmp_path / "a.csv", "g,x,y", rows), group="g", validation_fraction=0)
    assert "15 rows without 'g' count as one group" in made.notes
    assert (made.dataset.groups[made.training] == "").sum() in (0, 15)


@pytest.mark.parametrize(
    ("option", "words"), [("group", "because all are of one group ('a')"), ("time", "because all have the same time")]
)
def test_one_group_or_time_cannot_be_split(option, words, tmp_path):
    content = [["a" if option == "group" else 3, row / 7, row % 2] for row in range(30)]
    said = re.escape(f"test rows: none of 30 rows can be held out, {words}")
    with pytest.raises(DataError, match=said):
        prepared(write(tmp_path / "a.csv", "g,x,y", content), **{option: "g"})


# Own files


def three(folder):
    generator = np.random.default_rng(0)

    def made(name, count):
        kinds = generator.integers(0, 3, count)
        numbers = generator.normal(3 * kinds).round(6)
        rows = [
            [f"id{count}-{row}", numbers[row], "abc"[kind], ("low", "mid", "high")[kind]]
            for row, kind in enumerate(kinds)
        ]
        return write(folder / name, "name,x,word,y", rows)

    return made("train.csv", 90), made("valid.csv", 25), made("test.csv", 40)


def test_own_files_are_the_validation_and_test_rows(tmp_path, capsys):
    train, valid, test = three(tmp_path)
    folder = tmp_path / "run"
    options = [
        "--target",
        "y",
        "--id",
        "name",
        "--validation",
        valid,
        "--test",
        test,
        "--epochs",
        "3",
        "--early-stopping",
        "2",
    ]
    printed = result_of(capsys, "train", train, *options, "--quiet", "--out", folder)
    assert "val_loss" in (folder / "metrics.csv").read_text()
    about = read(folder / "config.json")["data"]
    assert [about[f"{part}_rows"] for part in ("training", "validation", "test")] == [90, 25, 40]
    assert about["test"] == "a file of its own"
    assert printed["test"]["rows"] == 40
    for data in ([], ["--data", test]):
        answer = result_of(capsys, "evaluate", folder, *data)
        assert {name: answer[name] for name in printed["test"]} == printed["test"]
    # The run knows its files from any folder, and whether they change.
    stored = read(folder / "config.json")["options"]
    assert (stored["validation"], stored["test"]) == (str(valid), str(test))
    test.write_text(test.read_text().replace("mid", "low"))
    assert "have changed since the training" in refusal(capsys, "evaluate", folder, code=1)


def test_own_files_are_read_by_the_training_columns(tmp_path):
    train, valid, test = three(tmp_path)
    # Other order of columns, a further one, an unseen word, a missing number, and a row of the training file.
    first = train.read_text().splitlines()[1].split(",")
    rows = [["q", 1.5, "mid", "t1", 1], ["b", "", "low", "t2", 2], [first[2], first[1], first[3], "t3", 3]]
    write(test, "word,x,y,name,more", rows)
    made = prepared(train, id=["name"], test=str(test), validation=str(valid))
    assert len(made.test) == 3
    said = [note for note in made.notes if note.startswith("test file: ")]
    assert any("columns that the training did not have, ignored: 'more'" in note for note in said)
    assert any("words unseen in training" in note for note in said)
    assert any("1 of 3 rows stand in train.csv too" in note for note in said)


def test_one_own_file(tmp_path):
    train, valid, test = three(tmp_path)
    made = prepared(train, id=["name"], test=str(test), models=1)
    assert [len(part) for part in (made.train, made.validation or (), made.test)] == [81, 9, 40]
    made = prepared(train, id=["name"], validation=str(valid))
    assert [len(part) for part in (made.train, made.validation or (), made.test)] == [72, 25, 18]
    plan = planned(SweepOptions(data=str(train), target="y", test=str(test), vary=["lr=0.1,0.2"], epochs=1))
    assert len(plan.prepared.test) == 40


def test_own_files_of_numbers(tmp_path):
    """npz files, and a regression with whole numbers in one file and decimals in the other."""
    for name, count in (("a", 30), ("b", 7)):
        np.savez(tmp_path / f"{name}.npz", X=np.arange(2.0 * count).reshape(count, 2), y=np.arange(count) % 2)
    made = prepared_data(TrainOptions(data=str(tmp_path / "a.npz"), test=str(tmp_path / "b.npz")))
    assert len(made.test) == 7
    train = write(tmp_path / "a.csv", "x,y", [[row, row * 0.5] for row in range(30)])
    test = write(tmp_path / "b.csv", "x,y", [[row, row] for row in range(5)])
    assert prepared(train, test=str(test)).test.labels.tolist() == [0, 1, 2, 3, 4]


def test_a_label_that_only_the_test_file_has(tmp_path):
    train, _, test = three(tmp_path)
    test.write_text(test.read_text() + "t,1.5,a,new\n")
    made = prepared(train, id=["name"], test=str(test))
    assert made.preprocessor.classes == ("high", "low", "mid", "new")
    assert any("labels that train.csv does not have, so no row trains them: 'new'" in note for note in made.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test": "train.csv"}, "test: 'train.csv' is the file of DATA too; give a file with other rows"),
        ({"validation": "test.csv", "test": "test.csv"}, "test: 'test.csv' is the file of --validation too"),
        ({"data": "iris", "target": None, "drop": None, "test": "iris"}, "test: 'iris' is the file of DATA too"),
        ({"test": "nowhere.csv"}, "test: there is no file or folder 'nowhere.csv'"),
        ({"test": "columns.csv"}, "columns.csv: no feature columns 'word'; the columns are 'x', 'y'"),
        ({"test": "unlabelled.csv"}, "there is no target column 'y' to judge rows by"),
        ({"validation": "numbers.csv"}, "'y' holds"),
        ({"validation": "valid.csv", "validation_fraction": 0.3}, "validation_fraction: --validation has the"),
        ({"validation": "valid.csv", "test": "test.csv", "group": "word"}, "group: --validation and --test decide"),
        ({"validation": "valid.csv", "test": "test.csv", "time": "x"}, "time: --validation and --test decide"),
    ],
)
def test_files_that_do_not_fit(options, words, tmp_path, monkeypatch):
    three(tmp_path)
    write(tmp_path / "columns.csv", "x,y", [[1.5, "low"]])
    write(tmp_path / "unlabelled.csv", "x,word", [[1.5, "a"]])
    monkeypatch.chdir(tmp_path)
    if "numbers.csv" in options.values():
        # The training labels are numbers, the others words.
        Path("train.csv").write_text(re.sub("low|mid|high", "1", Path("train.csv").read_text()).replace("c,1", "c,2"))
        Path("numbers.csv").write_text(Path("valid.csv").read_text())
    with pytest.raises((ArgumentError, DataError), match=re.escape(words)):
        prepared(Path("train.csv"), **{"drop": ["name"], **options})


def test_data_with_a_test_set_take_no_second_one(tmp_path):
    X, y = np.arange(40.0).reshape(20, 2), np.arange(20) % 2
    np.savez(tmp_path / "a.npz", x_train=X, y_train=y, x_test=X[:4], y_test=y[:4])
    np.savez(tmp_path / "b.npz", X=X, y=y)
    with pytest.raises(ArgumentError, match=r"test: .* brings a test set of its own"):
        with_files(load_data(tmp_path / "a.npz"), str(tmp_path / "a.npz"), test=str(tmp_path / "b.npz"))


# Hashes of rows

NUMBERS = st.one_of(st.floats(allow_nan=True, allow_infinity=False), st.integers(-3, 3).map(float))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=30))
def test_rows_have_equal_hashes_if_they_are_equal(rows):
    X = np.array(rows)
    hashes = row_hashes(X[:, :2], X[:, 2])
    plain = [tuple("NaN" if value != value else value + 0.0 for value in row) for row in rows]
    for i, one in enumerate(plain):
        for j, other in enumerate(plain):
            assert (hashes[i] == hashes[j]) == (one == other)


def test_hashes_of_many_similar_rows_differ():
    # Small whole numbers differ in few bits; a good 64-bit hash of 400,000 rows has no two alike.
    first, second = np.divmod(np.arange(400_000.0), 1000)
    assert len(np.unique(row_hashes(first[:, None], second))) == 400_000
    # The place of a value counts, and so does every column.
    assert row_hashes(np.array([[1.0, 2.0]]), np.zeros(1)) != row_hashes(np.array([[2.0, 1.0]]), np.zeros(1))
    assert among(row_hashes(np.ones((5, 1)), np.zeros(5)), row_hashes(np.ones((1, 1)), np.zeros(1))) == 5


def test_hashes_are_the_same_in_every_release():
    """A run folder stores them. Computed in Python's integers after the paper."""
    values, mask = [1.0, -2.5, 3.0], 2**64 - 1
    total = 0
    for column, value in enumerate(values, 1):
        mixed = (int(np.float64(value).view(np.uint64)) + column * 0x9E3779B97F4A7C15) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        total = (total + (mixed ^ (mixed >> 31))) & mask
    assert row_hashes(np.array([values[:2]]), np.array(values[2:])).tolist() == [total]


def test_evaluate_says_which_rows_were_trained_on(tmp_path, capsys):
    train, _, test = three(tmp_path)
    folder = tmp_path / "run"
    options = ["--target", "y", "--id", "name", "--epochs", "2", "--models", "1", "--quiet"]
    assert run("train", train, *options, "--out", folder) == 0
    assert np.load(folder / "training_rows.npy").nbytes == 8 * 64
    capsys.readouterr()

    def evaluated(path):
        shown = output_of(capsys, "evaluate", folder, "--data", path)
        return result_of(capsys, "evaluate", folder, "--data", path)["training_rows"], shown

    count, shown = evaluated(train)
    assert count == 64
    assert "64 of 90 rows are training rows of this run, so these scores flatter it" in shown
    assert evaluated(test)[0] == 0
    assert "training rows" not in evaluated(test)[1]
    # Other ids, another order of columns and rows are the same rows; another label is not.
    made = prepared(train, id=["name"], models=1)
    lines = [line.split(",") for line in train.read_text().splitlines()[1:]]
    chosen = [lines[row] for row in made.training[:10]]
    moved = write(tmp_path / "moved.csv", "y,word,x,name", [[y, word, x, "new"] for _, x, word, y in reversed(chosen)])
    assert evaluated(moved)[0] == 10
    assert "all 10 rows are training rows" in evaluated(moved)[1]
    chosen[0][3] = "low" if chosen[0][3] != "low" else "mid"
    assert evaluated(write(moved, "name,x,word,y", chosen))[0] == 9
    # The test rows of the run itself, and runs of earlier releases, tell nothing.
    assert result_of(capsys, "evaluate", folder)["training_rows"] is None
    (folder / "training_rows.npy").write_bytes(b"damaged")
    assert "training_rows.npy: cannot be read" in refusal(capsys, "evaluate", folder, "--data", train, code=1)
    (folder / "training_rows.npy").unlink()
    assert evaluated(train)[0] is None


def test_evaluate_recognises_the_rows_of_a_regression(tmp_path, capsys):
    path, folder = write(tmp_path / "a.csv", "x,y", [[row, row / 7] for row in range(60)]), tmp_path / "run"
    options = ("--target", "y", "--vary", "lr=0.1,0.2", "--epochs", "1", "--quiet")
    assert run("sweep", path, *options, "--out", folder) == 0
    assert result_of(capsys, "evaluate", folder, "--data", path)["training_rows"] == 43


def test_folds_keep_the_shares_of_classes_of_any_size():
    labels = np.where(np.arange(40) % 4 == 0, 1.7e308, -1.7e308)
    huge = folds(labels, 5, seed=3, stratify=True)
    assert [float((labels[held] > 0).mean()) for _, held in huge] == [0.25] * 5
    for (trained, held), (others, other) in zip(huge, folds(np.sign(labels), 5, seed=3, stratify=True), strict=True):
        assert np.array_equal(trained, others) and np.array_equal(held, other)
