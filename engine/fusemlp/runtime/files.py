"""Write files atomically, and check safetensors files by a SHA-256 of their content."""

import contextlib
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusemlp.describe.checks import WINDOWS, as_path, no_folder
from fusemlp.describe.description import reading, stored
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, CheckpointError, DivergenceError, ShapeError


class FileKind(NamedTuple):
    """A kind of file: its ``name``, the entry of the metadata with its configuration, and that one's version.

    Errors name the ``writer`` of such files, and a ``mend`` for one that is broken.
    """

    name: str
    entry: str
    version: int
    writer: str
    mend: str


CHECKPOINT = FileKind(
    "checkpoint", "fusemlp", 2, "save_checkpoint", "use another checkpoint of the run, or train again"
)
MODEL = FileKind("model", "fusemlp_model", 1, "engine.save", "copy or save it again")
# The entry with the SHA-256 of the content.
DIGEST = "sha256"

# Endings of other formats, whose readers would take the file for a broken one of theirs.
OTHERS = (".keras", ".h5", ".hdf5", ".pkl", ".pickle", ".joblib", ".pt", ".pth", ".onnx")

# Seconds before each further try to replace a file that another program has open; 2.5 in all.
WAITS = tuple(0.01 * 2.0**number for number in range(8))


def target_file(path: str | Path) -> Path:
    """Return the file to write, with symbolic links resolved."""
    target = Path(os.path.realpath(as_path("path", path)))
    if target.exists() and not target.is_file():
        raise ArgumentError(f"path: {str(path)!r} is {what_it_is(target)}; expected a file, there already or new")
    if not target.parent.is_dir():
        raise no_folder("path", target.parent, f" for {target.name!r}")
    return target


def check_ending(path: str | Path) -> None:
    """Raise ArgumentTypeError for what is no path, ArgumentError for the ending of another format."""
    as_path("path", path)
    if Path(path).suffix.lower() in OTHERS:
        hint = "; to_onnx(path) writes ONNX" if Path(path).suffix.lower() == ".onnx" else ""
        raise ArgumentError(
            f"path: the file holds safetensors; expected a name such as "
            f"{Path(path).with_suffix('.safetensors').name!r}, got {str(path)!r}{hint}"
        )


def what_it_is(path: str | os.PathLike[str]) -> str:
    return "a folder" if os.path.isdir(path) else "a device or pipe"


def check_finite(parameters: Mapping[str, Array], kind: str) -> None:
    """Raise DivergenceError if a ``kind`` of file would hold NaN or infinite parameters."""
    for name, tensor in parameters.items():
        if not np.isfinite(tensor).all():
            raise DivergenceError(
                f"{name}: it holds NaN or infinite values, so no {kind} was written and the one before is kept; "
                "go on from that one with a lower learning rate, or with clip_norm=1.0"
            )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: ``path`` is always the whole old file or the whole new one. Raises OSError.

    The data go to a file ``.{name}.*.tmp`` beside it first. Such a file left over from a SIGKILL is harmless.
    """
    # Not tempfile: only the owner could read its files. These get the mode of a new file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    if os.name == "posix":
        # The rename itself must reach the disk.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def lock_file(descriptor: int) -> None:
    """Lock an open file until it is closed; OSError if another process has the lock."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def replace_file(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``, in the place of a file that may be there.

    Windows refuses that with a PermissionError while another program has the old or the new file open, as a virus
    scanner or an indexer has for a moment.
    """
    for seconds in WAITS if WINDOWS else ():
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            time.sleep(seconds)
    os.replace(temporary, path)


def digest_of(config: str, tensors: Mapping[str, Array]) -> str:
    """Return the SHA-256 of the configuration and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype.str}\0{tensor.shape}\0".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def to_bytes(kind: FileKind, description: Mapping[str, Any], tensors: Mapping[str, Array], **entries: str) -> bytes:
    """Return the content of a file with these tensors and ``entries`` of metadata beside its configuration."""
    from safetensors.numpy import save

    config = json.dumps({"format": kind.version, **description})
    return save({**tensors}, metadata={kind.entry: config, DIGEST: digest_of(config, tensors), **entries})


def read_file(path: str | Path, kind: FileKind) -> tuple[dict[str, str], dict[str, Array]]:
    """Return metadata and tensors of a safetensors file that should be of a kind. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    as_path("path", path)
    expected = f"expected a file that {kind.writer} wrote"
    if os.path.exists(path) and not os.path.isfile(path):
        is_run = os.path.exists(os.path.join(path, "config.json"))
        mend = "; a run opens with from_run of the table estimators" if is_run else ""
        raise CheckpointError(f"path: {str(path)!r} is {what_it_is(path)}; {expected}{mend}")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            return metadata, {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise CheckpointError(f"path: there is no {kind.name} {str(path)!r}; {expected}") from error
    except (OSError, SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"path: {str(path)!r} is no readable {kind.name} ({error}); {kind.mend}") from error


def reading_file(path: str | Path | None, kind: FileKind) -> contextlib.AbstractContextManager[None]:
    """Return ``reading`` for a file of a kind, or for a pickle."""
    return reading("state: the pickle" if path is None else f"path: {str(path)!r}", kind.mend)


def checked_content(
    path: str | Path, metadata: Mapping[str, str], tensors: Mapping[str, Array], kind: FileKind
) -> dict[str, Any]:
    """Return the "config" in ``metadata`` beside the "tensors"; CheckpointError if they were altered."""
    text = metadata[kind.entry]
    if digest_of(text, tensors) != metadata.get(DIGEST):
        raise CheckpointError(f"path: {str(path)!r} is corrupted: its SHA-256 does not match; {kind.mend}")
    with reading_file(path, kind):
        config: dict[str, Any] = stored("description", json.loads(text), dict[str, Any])
    if config.get("format") != kind.version:
        raise CheckpointError(
            f"path: {str(path)!r} has format {config.get('format')!r}, written by fusemlp {config.get('version')}; "
            f"this version reads format {kind.version}"
        )
    return {"config": config, "tensors": tensors, "path": path, "kind": kind}


def check_tensors(tensors: Mapping[str, Array], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ShapeError unless there are real numbers of these shapes; what an integer's bits would be is no weight."""
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype.kind != "f":
            raise ShapeError(f"{name}: expected real numbers of shape {shape}, got {tensor.dtype} of {tensor.shape}")


def checked_metadata(given: Mapping[str, str] | None, reserved: Collection[str]) -> dict[str, str]:
    """Check the user's own entries, which must not have a ``reserved`` name."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ArgumentTypeError(f"metadata: expected a mapping from str to str, got {type(given).__name__}")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ArgumentTypeError(
                f"metadata: a file keeps str to str only, got {name!r}: {value!r}; use json.dumps for more"
            )
    taken = sorted(name for name in reserved if name in given)
    if taken:
        raise ArgumentError(f"metadata: the names {', '.join(taken)} are the file's own; choose others")
    return dict(given)
