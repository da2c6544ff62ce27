"""Readers of arrays in files: NumPy's npz and MNIST's IDX format.

Every error is a DataError with the file's name, the expectation and the content found.
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import DataError

# Readers raise these for damaged archives, and for damaged content, of XML SyntaxError too. RuntimeError stands for
# encryption and unknown versions.
ARCHIVE = OSError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error
CONTENT = ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, SyntaxError


def read_npz(path: Path) -> dict[str, Array]:
    """Return all arrays of an npz file by name; pickled objects are never loaded."""
    try:
        with path.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.lib.npyio.NpzFile):
                with archive:
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
    raise DataError(f"{path}: expected an npz archive as numpy.savez writes it, found one array")


def read_idx(path: Path) -> Array:
    """Return the array of one IDX file, plain or compressed by gzip (``.gz``).

    The MNIST distribution describes the format: two zero bytes, a type code, the number of
    dimensions, a 32-bit length for each, then the elements in row-major order; all big-endian.
    """
    types = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
    content = _read_bytes(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in types or not content[3]:
        raise DataError(
            f"{path}: expected an IDX file, beginning with the bytes 00 00, a type code (08 for bytes) and "
            f"the number of dimensions, found {content[:4].hex(' ') or 'an empty file'}"
        )
    dtype, dimensions = np.dtype(types[content[2]]), content[3]
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise DataError(
            f"{path}: its header announces shape {shape}, that is {expected} bytes in all, found "
            f"{len(content)}; the file is incomplete or damaged: fetch it again"
        )
    elements = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return elements.astype(dtype.newbyteorder("="))


def read_idx_pair(folder: Path, prefix: str) -> tuple[Array, Array] | None:
    """Return images and labels of a folder in MNIST's layout, None if it has neither; ``prefix`` is "train" or
    "t10k".

    The file names are ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, with "-" or "." before
    "idx", plain or with ``.gz``.
    """
    names = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
    found = []
    for name in names:
        spellings = (name, name.replace("-idx", ".idx"))
        candidates = (folder / (spelling + end) for spelling in spellings for end in ("", ".gz"))
        found.append(next((path for path in candidates if path.is_file()), None))
    images_path, labels_path = found
    if images_path is None and labels_path is None:
        return None
    if images_path is None or labels_path is None:
        lacking = names[found.index(None)]
        raise DataError(f"{folder}: there is no {lacking}[.gz] beside {images_path or labels_path}")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim < 2 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"{folder}: expected as many labels as images, found images of shape {images.shape} in "
            f"{images_path.name} and labels of shape {labels.shape} in {labels_path.name}"
        )
    return images, labels


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: expected an IDX file{' compressed by gzip' if path.suffix == '.gz' else ''}, but it "
            f"cannot be read ({reason(error)}); fetch it again"
        ) from error


def reason(error: Exception) -> str:
    """Return kind and message of an error in one line."""
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
