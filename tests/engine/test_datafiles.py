"""Reading csv and parquet files: the columns, and the errors for wrong files."""

import struct
import sys
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import feather

from fusemlp import Blocks, load_data
from fusemlp.datasets.tables import read_names, read_table
from fusemlp.sklearn import TableClassifier
from fusemlp_kernels.errors import DataError, MissingLibraryError


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


PLAIN = 'width,"the, colour", size\n1.5,red,3\n-2e3,"dark\nblue",4\n\n.5, red ,5\n'


def test_csv(tmp_path):
    path = write(tmp_path / "a.csv", PLAIN)
    table = read_table(path, targets=["size"])
    assert list(table) == ["width", "the, colour", "size"] == read_names(path)
    assert table["width"].tolist() == [1.5, -2000.0, 0.5]
    assert table["the, colour"].tolist() == ["red", "dark\nblue", "red"]
    assert table["size"].dtype == np.int64
    assert read_table(path, features=["size"])["size"].dtype == np.float64


def test_csv_of_one_column_numbered_columns_and_columns_that_nobody_reads(tmp_path):
    assert read_table(write(tmp_path / "a.csv", "a\n1\n2\n"))["a"].tolist() == [1, 2]
    assert list(read_table(write(tmp_path / "a.csv", "0,1,2\n1,2,3\n"))) == ["0", "1", "2"]
    path = write(tmp_path / "a.csv", "id,a\n,1\nx7,2\n")
    assert read_table(path, features=["a"])["a"].tolist() == [1, 2]
    with pytest.raises(DataError, match=r"no feature columns 'c', 'd'; the columns are 'id', 'a'"):
        read_table(path, features=["a", "c", "d"])


@pytest.mark.parametrize(
    ("column", "labels", "kind"),
    [
        (["1", "-2", "+3"], [1, -2, 3], "i"),
        (["1", "2.0", "3"], [1.0, 2.0, 3.0], "f"),
        (["1.5", "2e3", "3"], [1.5, 2000.0, 3.0], "f"),
        (["red", "2", "3"], ["red", "2", "3"], "U"),
        (["True", "False", "True"], ["True", "False", "True"], "U"),
        (["123456789012345678901", "2", "3"], ["123456789012345678901", "2", "3"], "U"),
    ],
)
def test_csv_labels(tmp_path, column, labels, kind):
    path = write(tmp_path / "a.csv", "y,x\n" + "".join(f"{label},1\n" for label in column))
    y = read_table(path, targets=["y"])["y"]
    assert y.dtype.kind == kind
    assert y.tolist() == labels
    assert read_table(path, targets=["y"], words=True)["y"].tolist() == column


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1.5,2.5\n1,2\n", "there is no target column 'y'; the columns are 'column_1', 'column_2'"),
        ("a,y\n1,\n2,NA\n", r"column 'y': the target is missing in all 2 rows"),
        ("a,y\n" + "".join(f"{i},2\n" for i in range(20)) + "two,4\n", r"line 22, column 'a': 'two' is not a number"),
        ('a,y\n"1\n",2\n' + "".join(f"{i},2\n" for i in range(20)) + "two,4\n", r"line 24, column 'a'"),
        ("a,y\n1,2.5\n2,few\n", r"line 3, column 'y': 'few' is not a number"),
        ("a,y\n1,2.5\n2,inf\n", r"line 3, column 'y': 'inf' is not a finite number"),
    ],
)
def test_csv_that_is_wrong(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_table(write(tmp_path / "wrong.csv", content), targets=["y"])
    assert "wrong.csv" in str(caught.value)


def test_infinite_numbers_of_text_are_missing(tmp_path):
    for text in ("inf", "-Infinity", "+INF"):
        notes = []
        read = read_table(write(tmp_path / "a.csv", f"a,y\n1,2\n{text},4\n"), targets=["y"], notes=notes)
        np.testing.assert_array_equal(read["a"], [1.0, np.nan])
        assert notes == ["column 'a' holds infinite numbers, taken as missing cells: 1"]


# parquet


def parquet(path, **columns):
    pandas.DataFrame(columns).to_parquet(path, engine="pyarrow")
    return path


# A column, as it is read, and the kind of its labels.
COLUMNS = {
    "whole": (np.array([1, 2, 3], np.int16), [1.0, 2.0, 3.0], "i"),
    "half": (np.array([0.5, 1.5, 2.5], np.float32), [0.5, 1.5, 2.5], "f"),
    "flag": ([True, False, True], [1.0, 0.0, 1.0], "b"),
    "word": (["a", "b", "a"], ["a", "b", "a"], "U"),
    "group": (pandas.Categorical(["u", "v", "u"]), ["u", "v", "u"], "U"),
    "grade": (pandas.Categorical([3, 1, 3]), [3.0, 1.0, 3.0], "i"),
    "count": (pandas.array([4, 5, 6], dtype="Int64"), [4.0, 5.0, 6.0], "i"),
}


def test_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", **{name: column for name, (column, _, _) in COLUMNS.items()})
    assert read_names(path) == list(COLUMNS)
    assert {name: column.tolist() for name, column in read_table(path).items()} == {
        name: values for name, (_, values, _) in COLUMNS.items()
    }
    for name, (_, _, kind) in COLUMNS.items():
        assert read_table(path, targets=[name])[name].dtype.kind == kind
    assert read_table(path, targets=["whole"], words=True)["whole"].tolist() == ["1", "2", "3"]


def test_a_feather_file_whose_texts_lie_outside_it_is_named(tmp_path):
    path = tmp_path / "a.feather"
    feather.write_feather(pyarrow.table({"a": ["abc", "defg"]}), path, compression="uncompressed")
    ends = struct.pack("<3i", 0, 3, 7)
    assert path.read_bytes().count(ends) == 1
    write(path, path.read_bytes().replace(ends, struct.pack("<3i", 0, 3, 2**30)))
    with pytest.raises(DataError, match=r"a\.feather: it cannot be read as a feather file \(ArrowInvalid"):
        read_table(path)


def test_parquet_without_rows_in_pieces_or_with_lists(tmp_path):
    path = parquet(tmp_path / "a.parquet", a=[1.0], y=[1])
    content = path.read_bytes()
    for length in (0, 3, len(content) // 2, len(content) - 1):
        with pytest.raises(DataError, match=r"cut\.parquet: it cannot be read as a parquet file"):
            read_table(write(tmp_path / "cut.parquet", content[:length]))
    with pytest.raises(DataError, match="no rows"):
        read_table(parquet(tmp_path / "empty.parquet", a=np.empty(0)))
    with pytest.raises(DataError, match="column 'a': expected numbers or words"):
        read_table(parquet(tmp_path / "lists.parquet", a=[[1], [2], [3]]))


def test_parquet_needs_no_pandas(tmp_path, monkeypatch):
    frame = pandas.DataFrame({"a": [1.0], "t": pandas.to_datetime(["2024-01-02"]), "y": [1]}, index=["row"])
    frame.to_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert list(read_table(tmp_path / "a.parquet", targets=["y"])) == ["a", "t", "y"]


# Doors that take a table, each in a folder with a file of it.
TABLE_DOORS = {
    "CSV": lambda frame: load_data("a.csv", target="b"),
    "Parquet": lambda frame: read_names(Path("a.parquet")),
    "DataFrame": lambda frame: load_data(frame, target="b"),
    "estimator": lambda frame: TableClassifier().fit(frame[["a"]], frame["b"]),
    "array": lambda frame: TableClassifier().fit(frame[["a"]].to_numpy(), frame["b"].to_numpy()),
    "blocks": lambda frame: Blocks("a.parquet", target="b"),
}


@pytest.mark.parametrize("door", TABLE_DOORS.values(), ids=TABLE_DOORS)
def test_without_pyarrow_tables_name_the_mend_and_arrays_train(door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame = pandas.DataFrame({"a": [1.0, 2.0, 3.0], "b": ["x", "y", "x"]})
    frame.to_csv("a.csv")
    frame.to_parquet("a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingLibraryError, match="pyarrow: tables and Parquet files need it: pip install pyarrow"):
        door(frame)
    assert load_data("digits").X.shape == (1797, 64)
