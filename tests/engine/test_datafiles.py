"""Reading npz, IDX, csv and parquet files: the arrays, and the errors for wrong files."""

import gzip
import io
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import feather

from fusemlp import Blocks, load_data
from fusemlp.datasets.arrays import read_idx, read_idx_pair, read_npz
from fusemlp.datasets.tables import read_names, read_table
from fusemlp.sklearn import TableClassifier
from fusemlp_kernels.errors import DataError, MissingLibraryError


def idx_bytes(array, code=0x08, dtype=">u1"):
    """Return an IDX file by the format's description."""
    array = np.asarray(array, dtype)
    return struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.tobytes()


def npz_bytes(**arrays):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


IMAGES = np.arange(24).reshape(3, 2, 4)


# npz


def test_npz(tmp_path):
    arrays = read_npz(write(tmp_path / "a.npz", npz_bytes(X=np.ones((2, 3)), y=np.array(["a", "b"]))))
    assert sorted(arrays) == ["X", "y"]
    assert arrays["y"].tolist() == ["a", "b"]


def test_a_truncated_or_damaged_npz_is_read_or_named(tmp_path):
    content = npz_bytes(X=np.arange(12.0).reshape(3, 4), y=np.array([0, 1, 2]))
    path, refused = tmp_path / "bad.npz", 0
    for length in range(0, len(content), 7):
        with pytest.raises(DataError, match=r"bad\.npz: expected an npz"):
            read_npz(write(path, content[:length]))
    for position in range(len(content)):
        write(path, content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            read_npz(path)
        except DataError:
            refused += 1
    # The time stamps and attributes of the archive's members carry no checksum; the arrays do.
    assert refused > len(content) // 2


def test_a_damaged_header_or_compression_inside_an_npz_is_named(tmp_path):
    path = tmp_path / "bad.npz"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 1) + b"["
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X.npy", header)
    with pytest.raises(DataError, match=r"bad\.npz: expected an npz"):
        read_npz(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("X.npy", npz_bytes(X=np.ones(9)))
    content = bytearray(path.read_bytes())
    # the properties of the compression, in the member's first bytes
    content[content.index(b"X.npy") + 9] ^= 0xFF
    with pytest.raises(DataError, match=r"bad\.npz: expected an npz"):
        read_npz(write(path, bytes(content)))


def test_pickles_are_never_loaded_and_a_single_array_is_no_npz(tmp_path):
    with pytest.raises(DataError, match="Python objects"):
        read_npz(write(tmp_path / "objects.npz", npz_bytes(X=np.array([{"a": 1}], dtype=object))))
    stream = io.BytesIO()
    np.save(stream, np.ones(3))
    with pytest.raises(DataError, match="found one array"):
        read_npz(write(tmp_path / "single.npz", stream.getvalue()))


def test_missing_files_are_named(tmp_path):
    for reader in (read_npz, read_idx, read_names):
        with pytest.raises(DataError, match=r"nothing\.csv"):
            reader(tmp_path / "nothing.csv")


# IDX


@pytest.mark.parametrize(
    ("code", "dtype"), [(8, ">u1"), (9, ">i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")]
)
def test_idx_element_types(tmp_path, code, dtype):
    array = read_idx(write(tmp_path / "a", idx_bytes(IMAGES, code, dtype)))
    np.testing.assert_array_equal(array, IMAGES)
    assert array.dtype == np.dtype(dtype).newbyteorder("=")


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize(("pack", "end"), [(bytes, ""), (gzip.compress, ".gz")])
def test_idx_pair(tmp_path, separator, pack, end):
    write(tmp_path / f"train-images{separator}idx3-ubyte{end}", pack(idx_bytes(IMAGES)))
    write(tmp_path / f"train-labels{separator}idx1-ubyte{end}", pack(idx_bytes([2, 0, 1])))
    images, labels = read_idx_pair(tmp_path, "train")
    np.testing.assert_array_equal(images, IMAGES)
    assert labels.tolist() == [2, 0, 1]
    assert read_idx_pair(tmp_path, "t10k") is None


@pytest.mark.parametrize(("pack", "end"), [(bytes, ""), (gzip.compress, ".gz")])
def test_every_truncation_of_an_idx_file_is_named(tmp_path, pack, end):
    content, path = pack(idx_bytes(IMAGES)), tmp_path / f"train-images-idx3-ubyte{end}"
    for length in range(len(content)):
        with pytest.raises(DataError, match="train-images-idx3-ubyte"):
            read_idx(write(path, content[:length]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", b"\x89PNG\r\n", r"00 00.*found 89 50 4e 47"),
        ("a", b"\0\0\x07\x01\0\0\0\0", r"found 00 00 07 01"),
        ("a", b"\0\0\x08\x00", r"found 00 00 08 00"),
        ("a", b"", r"an empty file"),
        ("a", idx_bytes(IMAGES) + b"\0", r"shape \(3, 2, 4\), that is 40 bytes in all, found 41"),
        ("a", struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3), r"4294967295, 4294967295"),
        ("a", struct.pack(">HBB4I", 0, 8, 4, 2**24, 0, 2**24, 2**24), r"16777216\), which no array has"),
        ("a", struct.pack(">HBB", 0, 8, 65) + bytes(4 * 65), r"which no array has"),
        ("a.gz", idx_bytes(IMAGES), r"a\.gz: expected an IDX file compressed by gzip"),
    ],
)
def test_idx_with_wrong_beginnings(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_idx(write(tmp_path / name, content))


def test_an_idx_pair_that_does_not_go_together(tmp_path):
    write(tmp_path / "train-images-idx3-ubyte", idx_bytes(IMAGES))
    with pytest.raises(DataError, match=r"no train-labels-idx1-ubyte\[\.gz\]"):
        read_idx_pair(tmp_path, "train")
    write(tmp_path / "train-labels-idx1-ubyte", idx_bytes([1, 2]))
    with pytest.raises(DataError, match=r"as many labels as images.*\(3, 2, 4\).*\(2,\)"):
        read_idx_pair(tmp_path, "train")


# csv


PLAIN = 'width,"the, colour", size\n1.5,red,3\n-2e3,"dark\nblue",4\n\n.5, red ,5\n'


def test_csv(tmp_path):
    path = write(tmp_path / "a.csv", PLAIN)
    table = read_table(path, targets=["size"])
    assert list(table) == ["width", "the, colour", "size"] == read_names(path)
    assert table["width"].tolist() == [1.5, -2000.0, 0.5]
    assert table["the, colour"].tolist() == ["red", "dark\nblue", "red"]
    assert table["size"].dtype == np.int64
    assert read_table(path, features=["size"])["size"].dtype == np.float64


@pytest.mark.parametrize("content", ["\ufeffa,b\r\n1,2\r\n", 'a;b\n1;"2"\n', "a\tb\n1\t2\n", "a,b\n1,2", "a,b\r1,2\r"])
def test_csv_dialects(tmp_path, content):
    table = read_table(write(tmp_path / "a.csv", content))
    assert {name: column.tolist() for name, column in table.items()} == {"a": [1.0], "b": [2.0]}


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
        ("", "found an empty file"),
        ("a,y\n", "no rows below the header"),
        ("1.5,2.5\n1,2\n", "there is no target column 'y'; the columns are 'column_1', 'column_2'"),
        ("a,a,y\n1,2,3\n", "several columns are called 'a'"),
        ("a,y\n1,2\n3\n", r"line 3: expected 2 fields.*found 1"),
        ("a,y\n1,2\n3,4,5\n", r"line 3: expected 2 fields.*found 3"),
        ("a,y\n1,\n2,NA\n", r"column 'y': the target is missing in all 2 rows"),
        ("a,y\n" + "".join(f"{i},2\n" for i in range(20)) + "two,4\n", r"line 22, column 'a': 'two' is not a number"),
        ('a,y\n"1\n",2\n' + "".join(f"{i},2\n" for i in range(20)) + "two,4\n", r"line 24, column 'a'"),
        ("a,y\n1,2.5\n2,few\n", r"line 3, column 'y': 'few' is not a number"),
        ("a,y\n1,2.5\n2,inf\n", r"line 3, column 'y': 'inf' is not a finite number"),
        ('a,y\n1,"2\n', "expected a csv file.*Error"),
        ("a,b\n1,2\n", r"no target column 'y'; the columns are 'a', 'b'"),
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


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1], [2], [3]], r"column 'a': expected numbers or words"),
    ],
)
def test_parquet_that_is_wrong(tmp_path, column, message):
    with pytest.raises(DataError, match=message):
        read_table(parquet(tmp_path / "a.parquet", a=column, y=[1, 2, 3]), targets=["y"])


def test_a_feather_file_whose_texts_lie_outside_it_is_named(tmp_path):
    path = tmp_path / "a.feather"
    feather.write_feather(pyarrow.table({"a": ["abc", "defg"]}), path, compression="uncompressed")
    ends = struct.pack("<3i", 0, 3, 7)
    assert path.read_bytes().count(ends) == 1
    write(path, path.read_bytes().replace(ends, struct.pack("<3i", 0, 3, 2**30)))
    with pytest.raises(DataError, match=r"a\.feather: it cannot be read as a feather file \(ArrowInvalid"):
        read_table(path)


def test_parquet_without_rows_or_in_pieces(tmp_path):
    path = parquet(tmp_path / "a.parquet", a=[1.0], y=[1])
    content = path.read_bytes()
    for length in (0, 3, len(content) // 2, len(content) - 1):
        with pytest.raises(DataError, match=r"cut\.parquet: it cannot be read as a parquet file"):
            read_table(write(tmp_path / "cut.parquet", content[:length]))
    with pytest.raises(DataError, match="no rows"):
        read_table(parquet(tmp_path / "empty.parquet", a=np.empty(0)))


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
