"""Reading npz, IDX, csv and parquet files: the arrays, and the errors for wrong files."""

from __future__ import annotations

import csv
import gzip
import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusemlp.datasets.arrays import read_idx, read_idx_pair, read_npz
from fusemlp.datasets.tables import read_names, read_table
from fusemlp_kernels.errors import DataError


def idx_bytes(array: Any, code: int = 0x08, dtype: str = ">u1") -> bytes:
    """Return an IDX file by the format's description."""
    array = np.asarray(array, dtype)
    return struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.tobytes()


def npz_bytes(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


IMAGES = np.arange(24).reshape(3, 2, 4)


# npz


def test_npz(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", npz_bytes(X=np.ones((2, 3)), y=np.array(["a", "b"])))
    arrays = read_npz(path)
    assert sorted(arrays) == ["X", "y"]
    assert arrays["y"].tolist() == ["a", "b"]


def test_every_truncation_of_an_npz_is_named(tmp_path: Path) -> None:
    content = npz_bytes(X=np.arange(12.0).reshape(3, 4), y=np.array([0, 1, 2]))
    path = tmp_path / "cut.npz"
    for length in range(0, len(content), 7):
        write(path, content[:length])
        with pytest.raises(DataError, match=r"cut\.npz: expected an npz"):
            read_npz(path)


def test_a_damaged_npz_is_read_or_named(tmp_path: Path) -> None:
    content = npz_bytes(X=np.arange(12.0).reshape(3, 4), y=np.array([0, 1, 2]))
    path = tmp_path / "bad.npz"
    refused = 0
    for position in range(len(content)):
        write(path, content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            read_npz(path)
        except DataError:
            refused += 1
    # The time stamps and attributes of the archive's members carry no checksum; the arrays do.
    assert refused > len(content) // 2


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "objects.npz"
    np.savez(path, X=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="Python objects"):
        read_npz(path)


def test_a_single_array_is_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "single.npz"
    with path.open("wb") as stream:
        np.save(stream, np.ones(3))
    with pytest.raises(DataError, match="found one array"):
        read_npz(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for reader in (read_npz, read_idx, read_names):
        with pytest.raises(DataError, match=r"nothing\.csv"):
            reader(tmp_path / "nothing.csv")


# IDX


@pytest.mark.parametrize(
    ("code", "dtype"), [(8, ">u1"), (9, ">i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")]
)
def test_idx_element_types(tmp_path: Path, code: int, dtype: str) -> None:
    array = read_idx(write(tmp_path / "a", idx_bytes(IMAGES, code, dtype)))
    np.testing.assert_array_equal(array, IMAGES)
    assert array.dtype == np.dtype(dtype).newbyteorder("=")


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_pair(tmp_path: Path, separator: str, compressed: bool) -> None:
    pack, end = (gzip.compress, ".gz") if compressed else (bytes, "")
    write(tmp_path / f"train-images{separator}idx3-ubyte{end}", pack(idx_bytes(IMAGES)))
    write(tmp_path / f"train-labels{separator}idx1-ubyte{end}", pack(idx_bytes([2, 0, 1])))
    pair = read_idx_pair(tmp_path, "train")
    assert pair is not None
    np.testing.assert_array_equal(pair[0], IMAGES)
    assert pair[1].tolist() == [2, 0, 1]
    assert read_idx_pair(tmp_path, "t10k") is None


@pytest.mark.parametrize("compressed", [False, True])
def test_every_truncation_of_an_idx_file_is_named(tmp_path: Path, compressed: bool) -> None:
    content = gzip.compress(idx_bytes(IMAGES)) if compressed else idx_bytes(IMAGES)
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if compressed else ''}"
    for length in range(len(content)):
        write(path, content[:length])
        with pytest.raises(DataError, match="train-images-idx3-ubyte"):
            read_idx(path)


def test_idx_with_wrong_beginnings(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content, message in (
        (b"\x89PNG\r\n", r"00 00.*found 89 50 4e 47"),
        (b"\0\0\x07\x01\0\0\0\0", r"found 00 00 07 01"),
        (b"\0\0\x08\x00", r"found 00 00 08 00"),
        (b"", r"an empty file"),
        (idx_bytes(IMAGES) + b"\0", r"shape \(3, 2, 4\), that is 40 bytes in all, found 41"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), r"4294967295, 4294967295"),
    ):
        with pytest.raises(DataError, match=message):
            read_idx(write(path, content))


def test_gz_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.gz: expected an IDX file compressed by gzip"):
        read_idx(write(tmp_path / "a.gz", idx_bytes(IMAGES)))


def test_an_idx_pair_that_does_not_go_together(tmp_path: Path) -> None:
    write(tmp_path / "train-images-idx3-ubyte", idx_bytes(IMAGES))
    with pytest.raises(DataError, match=r"no train-labels-idx1-ubyte\[\.gz\]"):
        read_idx_pair(tmp_path, "train")
    write(tmp_path / "train-labels-idx1-ubyte", idx_bytes([1, 2]))
    with pytest.raises(DataError, match=r"as many labels as images.*\(3, 2, 4\).*\(2,\)"):
        read_idx_pair(tmp_path, "train")


# csv


PLAIN = 'width,"the, colour", size\n1.5,red,3\n-2e3,"dark\nblue",4\n\n.5, red ,5\n'


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", PLAIN)
    table = read_table(path, target="size")
    assert list(table) == ["width", "the, colour", "size"] == read_names(path)
    assert table["width"].tolist() == [1.5, -2000.0, 0.5]
    assert table["the, colour"].tolist() == ["red", "dark\nblue", "red"]
    assert table["size"].dtype == np.int64
    assert read_table(path, features=["size"])["size"].dtype == np.float64


@pytest.mark.parametrize("content", ["\ufeffa,b\r\n1,2\r\n", 'a;b\n1;"2"\n', "a\tb\n1\t2\n", "a,b\n1,2", "a,b\r1,2\r"])
def test_csv_dialects(tmp_path: Path, content: str) -> None:
    table = read_table(write(tmp_path / "a.csv", content))
    assert {name: column.tolist() for name, column in table.items()} == {"a": [1.0], "b": [2.0]}


def test_csv_of_one_column_and_numbered_columns(tmp_path: Path) -> None:
    assert read_table(write(tmp_path / "a.csv", "a\n1\n2\n"))["a"].tolist() == [1, 2]
    assert list(read_table(write(tmp_path / "b.csv", "0,1,2\n1,2,3\n"))) == ["0", "1", "2"]


def test_long_csv_is_read_piecewise(tmp_path: Path) -> None:
    lines = "".join(f"{i},{'even' if i % 2 == 0 else 'odd'},{i}\n" for i in range(10_001))
    path = write(tmp_path / "a.csv", "a,parity,y\n" + lines)
    table = read_table(path, target="y")
    np.testing.assert_array_equal(table["a"], np.arange(10_001))
    np.testing.assert_array_equal(table["y"], np.arange(10_001))
    assert table["parity"][9_999:].tolist() == ["odd", "even"]
    with pytest.raises(DataError, match=r"line 10003, column 'a': 'x' is not a number.*--categorical"):
        read_table(write(path, "a,parity,y\n" + lines + "x,odd,1\n"))


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
def test_csv_labels(tmp_path: Path, column: list[str], labels: list[Any], kind: str) -> None:
    path = write(tmp_path / "a.csv", "y,x\n" + "".join(f"{label},1\n" for label in column))
    y = read_table(path, target="y")["y"]
    assert y.dtype.kind == kind
    assert y.tolist() == labels
    assert read_table(path, target="y", words=True)["y"].tolist() == column


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found an empty file"),
        ("a,y\n", "no rows below the header"),
        ("1.5,2.5\n1,2\n", "there is no target column 'y'; the columns are 'column_1', 'column_2'"),
        ("a,a,y\n1,2,3\n", "several columns are called 'a'"),
        ("a,y\n1,2\n3\n", r"line 3: expected 2 fields.*found 1"),
        ("a,y\n1,2\n3,4,5\n", r"line 3: expected 2 fields.*found 3"),
        ("a,y\n1,\n2,NA\n", r"column 'y': the target is missing in all 2 rows"),
        ("a,y\n1,2\ninf,4\n", r"line 3, column 'a': 'inf' is not a finite number"),
        ("a,y\n" + "".join(f"{i},2\n" for i in range(20)) + "two,4\n", r"line 22, column 'a': 'two' is not a number"),
        ('a,y\n"1\n",2\n' + "".join(f"{i},2\n" for i in range(20)) + "two,4\n", r"line 24, column 'a'"),
        ("a,y\n1,2.5\n2,few\n", r"line 3, column 'y': 'few' is not a number"),
        ("a,y\n1,2.5\n2,inf\n", r"line 3, column 'y': 'inf' is not a finite number"),
        ('a,y\n1,"2\n', "expected a csv file.*Error"),
        ("a,b\n1,2\n", r"no target column 'y'; the columns are 'a', 'b'"),
    ],
)
def test_csv_that_is_wrong(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_table(write(tmp_path / "wrong.csv", content), target="y")
    assert "wrong.csv" in str(caught.value)


def test_missing_feature_columns_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,b\n1,2\n")
    with pytest.raises(DataError, match=r"no feature columns 'c', 'd'; the columns are 'a', 'b'"):
        read_table(path, features=["a", "c", "d"])


def test_other_columns_are_not_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,a\n,1\nx7,2\n")
    assert read_table(path, features=["a"])["a"].tolist() == [1, 2]


WORDS = st.text(st.characters(codec="utf-8"))


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.floats(allow_nan=False, allow_infinity=False), WORDS), min_size=1))
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, str]]) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    rows = [(number, f"<{word}>") for number, word in rows]
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("number", "word"), *rows])
    table = read_table(path)
    assert list(zip(table["number"].tolist(), table["word"].tolist(), strict=True)) == rows


# parquet


def parquet(path: Path, **columns: Any) -> Path:
    pandas.DataFrame(columns).to_parquet(path, engine="pyarrow")
    return path


def test_parquet(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet",
        whole=np.array([1, 2, 3], np.int16),
        half=np.array([0.5, 1.5, 2.5], np.float32),
        flag=[True, False, True],
        word=["a", "b", "a"],
        group=pandas.Categorical(["u", "v", "u"]),
        grade=pandas.Categorical([3, 1, 3]),
        count=pandas.array([4, 5, 6], dtype="Int64"),
    )
    table = read_table(path)
    assert read_names(path) == list(table)
    assert {name: column.tolist() for name, column in table.items()} == {
        "whole": [1.0, 2.0, 3.0],
        "half": [0.5, 1.5, 2.5],
        "flag": [1.0, 0.0, 1.0],
        "word": ["a", "b", "a"],
        "group": ["u", "v", "u"],
        "grade": [3.0, 1.0, 3.0],
        "count": [4.0, 5.0, 6.0],
    }
    kinds = {"whole": "i", "half": "f", "flag": "b", "word": "U", "group": "U", "grade": "i", "count": "i"}
    assert {name: read_table(path, target=name)[name].dtype.kind for name in kinds} == kinds
    assert read_table(path, target="whole", words=True)["whole"].tolist() == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([1.0, 2.0, np.inf], r"row 2, column 'a': inf is not a finite number"),
        (pandas.timedelta_range(1, periods=3), r"column 'a': expected numbers or words, found Arrow's type duration"),
        ([[1], [2], [3]], r"column 'a': expected numbers or words"),
    ],
)
def test_parquet_that_is_wrong(tmp_path: Path, column: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_table(parquet(tmp_path / "a.parquet", a=column, y=[1, 2, 3]), target="y")


def test_parquet_without_rows_or_in_pieces(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", a=[1.0], y=[1])
    content = path.read_bytes()
    for length in (0, 3, len(content) // 2, len(content) - 1):
        with pytest.raises(DataError, match=r"cut\.parquet: it cannot be read as a parquet file"):
            read_table(write(tmp_path / "cut.parquet", content[:length]))
    with pytest.raises(DataError, match="no rows"):
        read_table(parquet(tmp_path / "empty.parquet", a=np.empty(0)))


def test_parquet_needs_no_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pandas.DataFrame({"a": [1.0], "t": pandas.to_datetime(["2024-01-02"]), "y": [1]}, index=["row"])
    frame.to_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert list(read_table(tmp_path / "a.parquet", target="y")) == ["a", "t", "y"]
