"""Columns of a table at the command line: identifiers, useless and unknown ones, and the list of all."""

import json
import re

import numpy as np
import pandas
import pytest

from fusemlp.cli.session import MOST_PRINTED
from fusemlp.datasets.load import ColumnChoices, load_data
from fusemlp_kernels.errors import ArgumentError, DataError
from make import output_of, read, refusal, result_of, rows, run

# The columns of `people`, what they become, and their inputs with a split of seed 0.
PEOPLE = {
    "name": ("id", 0),
    "number": ("id", 0),
    "age": ("number", 2),
    "years": ("left out", 0),
    "town": ("words", 3),
    "city": ("left out", 0),
    "member": ("boolean", 1),
    "joined": ("date", 4),
    "planet": ("left out", 0),
    "note": ("dropped", 0),
    "buys": ("target", 0),
}


OPTIONS = ("--target", "buys", "--id", "number", "--id", "name", "--drop", "note", "--epochs", "2")


def people(path, count=60, *, without=(), seed=0):
    """Write a table with a column of each kind; ages are missing in every tenth row."""
    generator, rows = np.random.default_rng(seed), np.arange(count)
    age = pandas.Series(generator.integers(18, 90, count), dtype="Int64").mask(rows % 10 == 0)
    town = np.array(["Bern", "Rome", "Oslo"])[rows % 3]
    table = {
        **{"name": [f"person {seed} {row}" for row in rows], "number": [f"{row:05d}" for row in rows]},
        **{"age": age, "years": age, "town": town, "city": town, "member": generator.choice(["true", "false"], count)},
        **{"joined": [f"2024-{row % 12 + 1:02d}-{row % 28 + 1:02d}" for row in rows], "planet": "Earth"},
        **{"note": generator.integers(0, 100, count), "buys": generator.choice(["yes", "no"], count)},
    }
    pandas.DataFrame(table).drop(columns=list(without)).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    assert run("train", people(folder / "people.csv"), *OPTIONS, "--quiet", "--out", folder / "run") == 0
    return folder / "run"


def test_the_list_of_columns_is_printed_and_stored(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run("train", people(tmp_path / "people.csv"), *OPTIONS, "--json", "--out", folder) == 0
    shown = capsys.readouterr()
    listed = {one["column"]: one for one in json.loads(shown.out.splitlines()[-1])["columns"]}
    assert {name: (one["became"], one["inputs"]) for name, one in listed.items()} == PEOPLE
    assert sum(one["inputs"] for one in listed.values()) == read(folder / "config.json")["network"]["sizes"][0]
    assert (listed["age"]["missing"], listed["note"]["missing"]) == (0.1, None)
    notes = {name: listed[name]["note"] for name in ("planet", "years", "city")}
    assert notes == {"planet": "constant", "years": "the same as 'age'", "city": "the same as 'town'"}
    assert {row["column"]: row["became"] for row in rows(folder / "columns.csv")} == {
        name: became for name, (became, _) in PEOPLE.items()
    }
    lines = [line.split() for line in shown.err.splitlines()]
    assert lines[0] == ["column", "became", "inputs", "missing"]
    assert ["age", "number", "2", "10.0%"] in lines
    assert ["planet", "left", "out", "(constant)"] in lines
    assert run("train", "--resume", folder, "--epochs", "3", "--json") == 0
    again = capsys.readouterr()
    assert json.loads(again.out.splitlines()[-1])["columns"] == list(listed.values())
    assert again.err.splitlines()[: len(PEOPLE) + 1] == shown.err.splitlines()[: len(PEOPLE) + 1]


def test_many_columns_are_summed_up(tmp_path, capsys):
    table = pandas.DataFrame(np.random.default_rng(0).normal(size=(60, MOST_PRINTED))).add_prefix("x")
    table.assign(y=table["x0"]).to_csv(tmp_path / "wide.csv", index=False)
    folder = tmp_path / "run"
    assert run("train", tmp_path / "wide.csv", "--target", "y", "--epochs", "1", "--out", folder) == 0
    summary = f"{MOST_PRINTED + 1} columns: {MOST_PRINTED} number ({MOST_PRINTED} inputs), 1 target; each in "
    assert capsys.readouterr().err.startswith(f"{summary}{folder / 'columns.csv'}\n")
    assert len(rows(folder / "columns.csv")) == MOST_PRINTED + 1


def test_data_without_named_columns_have_no_list(tmp_path, capsys):
    assert result_of(capsys, "train", "iris", "--epochs", "1", "--out", tmp_path / "run")["columns"] == []
    assert not (tmp_path / "run/columns.csv").exists()


def test_ids_stand_beside_the_most_wrong_rows(trained):
    page, about = (trained / "report.html").read_text(), read(trained / "report.json")
    worst = re.search(r"<h2>Most wrong rows</h2>.*?<table>(.*?)</table>", page, re.DOTALL)
    assert worst is not None
    lines = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in worst[1].split("<tr>")[1:]]
    assert lines[0][:4] == ["row", "number", "name", "true"]
    assert 1 < len(lines) <= about["test"]["rows"] + 1
    assert all(line[1:3] == [f"{int(line[0]):05d}", f"person 0 {line[0]}"] for line in lines[1:])


def test_predictions_stand_beside_the_ids(trained, tmp_path, capsys):
    new = people(tmp_path / "new.csv", 12, without=("buys", "note", "planet"), seed=1)
    assert run("predict", trained, "--data", new, "--out", tmp_path / "p.csv", "--proba") == 0
    table = rows(tmp_path / "p.csv")
    assert list(table[0]) == ["number", "name", "prediction", "probability_no", "probability_yes"]
    assert [row["number"] for row in table] == [f"{row:05d}" for row in range(12)]
    assert [row["name"] for row in table] == [f"person 1 {row}" for row in range(12)]
    assert run("predict", trained, "--data", new, "--out", tmp_path / "p.npz") == 0
    with np.load(tmp_path / "p.npz") as arrays:
        assert arrays["id_names"].tolist() == ["number", "name"]
        assert arrays["ids"][3].tolist() == ["00003", "person 1 3"]
        assert arrays["predictions"].tolist() == [row["prediction"] for row in table]
    capsys.readouterr()
    # Rows without names are answered too.
    bare = people(tmp_path / "bare.csv", 12, without=("name", "buys"), seed=1)
    assert run("predict", trained, "--data", bare, "--out", tmp_path / "b.csv") == 0
    assert "no columns 'name', which named the rows in training" in capsys.readouterr().out
    assert [row["prediction"] for row in rows(tmp_path / "b.csv")] == [row["prediction"] for row in table]


def test_unknown_columns_are_named_once_and_ignored(trained, tmp_path, capsys):
    path = people(tmp_path / "more.csv", 20, seed=2)
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{header},mood,weather", *(f"{line},1,wet" for line in lines)]))
    said = "columns that the training did not have, ignored: 'mood', 'weather'"
    predict = ["predict", trained, "--data", path, "--out", tmp_path / "p.csv", "--force"]
    for command in (predict, ["evaluate", trained, "--data", path]):
        assert said in output_of(capsys, *command)
        assert "did not have" not in output_of(capsys, *command, "--ignore-unused")
    # Columns that training dropped or left out are known.
    assert "did not have" not in output_of(capsys, "evaluate", trained, "--data", people(path))


def loaded(path, **columns):
    return load_data(path, target="y", columns=ColumnChoices(**columns))


def test_columns_with_the_same_values_are_left_out(tmp_path):
    path, row = tmp_path / "a.csv", np.arange(30)
    x, word = row % 7, np.array([*"ab"])[row % 2]
    # `other` differs from `x` in one row, `holes` in which cell is missing, `text` only in its kind.
    holes = pandas.Series(x, dtype=object).mask(row == 4)
    gaps = pandas.Series(x, dtype=object).mask(row == 9)
    table = {"x": x, "same": x * 1.0, "other": x + (row == 9), "word": word, "again": word, "holes": holes}
    pandas.DataFrame({**table, "gaps": gaps, "same gaps": gaps, "y": row % 2}).to_csv(path, index=False)
    assert loaded(path).feature_names == ("x", "other", "word", "holes", "gaps")
    left_out = "'same' (the same as 'x'), 'again' (the same as 'word'), 'same gaps' (the same as 'gaps')"
    assert f"left out, unless you --keep them: {left_out}" in loaded(path).notes
    assert loaded(path, keep=["same"]).feature_names == ("x", "same", "other", "word", "holes", "gaps")


WRONG = {
    "an unknown id": ({"ids": ["z"]}, DataError, "no columns 'z' to name the rows by; the columns are 'a', 'b', 'y'"),
    "an unknown group": ({"group": "z"}, DataError, "no columns 'z' to group the rows by"),
    "an unknown time": ({"time": "z"}, DataError, "no columns 'z' to order the rows by"),
    "the target as id": ({"ids": ["y"]}, ArgumentError, "id: 'y' is the target"),
    "the target as group": ({"group": "y"}, ArgumentError, "group: 'y' is the target"),
    "the target as time": ({"time": "y"}, ArgumentError, "time: 'y' is the target"),
    "a dropped id": ({"ids": ["a"], "drop": ["a"]}, ArgumentError, "drop: 'a' is the column of --id too"),
    "a kept group": ({"group": "a", "keep": ["a"]}, ArgumentError, "keep: 'a' is the column of --group too"),
    "dropped and kept": ({"drop": ["a"], "keep": ["a"]}, ArgumentError, "drop: 'a' is the column of --keep too"),
    "groups and times": ({"group": "a", "time": "b"}, ArgumentError, "group: rows are held out by group or"),
    "times in words": ({"time": "b"}, DataError, "takes numbers or dates such as 2024-12-31, but holds words such as"),
    "nothing left": ({"ids": ["a", "b"]}, DataError, "no feature column besides the target 'y' and the columns that"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_choices_that_do_not_fit_the_table(case, tmp_path):
    columns, error, words = WRONG[case]
    path = tmp_path / "a.csv"
    path.write_text("a,b,y\n" + "1,red,0\n2,blue,1\n3,red,1\n" * 4)
    with pytest.raises(error, match=re.escape(words)):
        loaded(path, **columns)


def test_a_time_without_a_value(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,y\n" + "1,0\n,1\n3,1\n" * 4)
    with pytest.raises(DataError, match=r"has no value in 4 of 12 rows"):
        loaded(path, time="a")


def test_a_time_that_is_no_input(tmp_path, capsys):
    """A column that counts the rows is left out of the inputs, and orders the rows nevertheless."""
    path = tmp_path / "a.csv"
    path.write_text("row,x,y\n" + "".join(f"{row},{row * 7 % 11},{row % 2}\n" for row in range(60)))
    folder = tmp_path / "run"
    options = ["--target", "y", "--time", "row", "--epochs", "1", "--batch-size", "8", "--quiet"]
    printed = result_of(capsys, "train", path, *options, "--out", folder)
    became = {one["column"]: one["became"] for one in printed["columns"]}
    assert became == {"row": "left out", "x": "number", "y": "target"}
    assert result_of(capsys, "evaluate", folder)["accuracy"] == printed["test"]["accuracy"]


def ages(path, *, each, different=42):
    """Write a table whose target is whole numbers, ``each`` in this many rows."""
    values = np.random.default_rng(0).permutation(np.arange(different).repeat(each))
    path.write_text("a,price\n" + "".join(f"{value * 0.37 % 1:.3f},{value}\n" for value in values))
    return path


@pytest.mark.parametrize(
    "command", [("train", "--epochs", "1"), ("sweep", "--epochs", "1", "--vary", "lr=0.1,0.2"), ("lr-find",)]
)
def test_a_guess_of_many_classes_is_printed_once(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    name, *options = command
    data = ages(tmp_path / "ages.csv", each=20)
    assert run(name, data, "--target", "price", "--hidden", "4", *options) == 0
    said = "".join(capsys.readouterr())
    guess = "'price': 42 different whole numbers, taken as classes (--task regression takes them as numbers)\n"
    assert said.count(guess) == 1
    assert run(name, data, "--target", "price", "--hidden", "4", "--task", "regression", *options) == 0
    assert "taken as classes" not in "".join(capsys.readouterr())


def test_a_split_that_fails_says_that_the_classes_were_guessed(tmp_path, capsys):
    data = ages(tmp_path / "ages.csv", each=8)
    options = ("--target", "price", "--models", "1", "--out", tmp_path / "run")
    said = refusal(capsys, "train", data, *options, code=1)
    assert "--validation-fraction: 0.1 of 268 rows leaves 241 rows to train on and 27 held out" in said
    assert "; 'price': 42 different whole numbers, taken as classes (--task regression" in said
    assert run("train", data, *options, "--task", "classification") == 1
    assert "--validation-fraction: 0.1 of 268" in (said := capsys.readouterr().err)
    assert "taken as classes" not in said


@pytest.mark.parametrize("command", [("train",), ("sweep", "--vary", "lr=0.1,0.2"), ("lr-find",)])
def test_measurements_are_no_classes(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    # 0 stands in 4 rows, all others in one
    targets = [0.0] * 4 + [0.5 + row for row in range(96)]
    data = tmp_path / "houses.csv"
    data.write_text("size,price\n" + "".join(f"{row % 7},{value}\n" for row, value in enumerate(targets)))
    name, *options = command
    words = (name, data, "--target", "price", "--task", "classification", *options)
    assert refusal(capsys, *words) == (
        "error: --task: 'price' holds 97 different numbers in 100 rows (96 of them in one row only), too many for "
        "classes; --task regression takes them as numbers\n"
    )
    assert not (tmp_path / "runs").exists()
    assert "--task: 'price' holds 97 different numbers" in refusal(capsys, *words, "--time", "size")


def test_numbers_of_which_some_repeat_and_names_are_no_classes(capsys, tmp_path):
    said = refusal(capsys, "train", "diabetes", "--task", "classification", "--out", tmp_path / "run")
    assert "--task: 'target' holds 214 different numbers in 442 rows" in said
    said = refusal(capsys, "train", people(tmp_path / "people.csv"), "--target", "name", "--out", tmp_path / "run")
    assert said.startswith("error: --target: 'name' holds 60 different labels in 60 rows (60 of them in one row only)")
    assert not (tmp_path / "run").exists()


def test_columns_in_other_letters_are_asked_after(tmp_path, capsys):
    data, out = ages(tmp_path / "ages.csv", each=2), tmp_path / "run"
    train, predict = ("train", data, "--out", out), ("predict", out, "--data", data, "--out", tmp_path / "p.csv")
    options = ("--target", "price", "--task", "regression", "--models", "1", "--epochs", "1")
    named, other = ("the columns are 'a', 'price'; did you mean", "the columns are 'A', 'Price'; did you mean")
    for words, table, said in (
        ((*train, "--target", "PRICE"), "a,price", f"no target column 'PRICE'; {named} 'price'?"),
        (
            (*train, "--target", "price", "--drop", "Prise"),
            "a,price",
            f"no columns 'Prise' to drop; {named}",
        ),
        ((*train, "--target", "price", "--drop", "a, price"), "a,price", f"{named} --drop a --drop price?"),
        ((*train, *options), "a,price", ""),
        (predict, "A,Price", f"no feature columns 'a'; {other} 'A'? If so, rename in the table."),
        (("evaluate", out, "--data", data), "A,Price", f"{other} 'Price'?"),
    ):
        data.write_text(data.read_text().replace("a,price", table))
        assert run(*words) == bool(said)
        assert said in capsys.readouterr().err
    data.write_text("za,price\n1,2\n")
    assert "did you mean" not in refusal(capsys, *predict, code=1)
