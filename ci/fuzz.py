"""Read random and damaged files for a while: each gives the project's own error or the right numbers.

usage: ci/fuzz [--seconds 60] [--seed 0] [--only TARGET] [--round N]

The targets take turns, a round of examples each, until the time is over. Seed and round choose the examples, so a
failure is repeated by the command that is printed below it, with the smallest example that hypothesis finds.
ci/test makes the environment.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import faulthandler
import gzip
import io
import itertools
import json
import lzma
import math
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openpyxl
import pyarrow
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from pyarrow import feather, parquet

import fusemlp
from fusemlp import MLP, Adam, CheckpointError, DataError, Engine, LayerNorm, Residual, RMSNorm, load, load_checkpoint
from fusemlp.datasets.arrays import read_idx, read_npz
from fusemlp.datasets.cells import parse_date
from fusemlp.datasets.load import load_data
from fusemlp.datasets.tables import read_names, read_table
from fusemlp.datasets.textfiles import MISSING, SEPARATORS, Form, number
from fusemlp.report.onnx import onnx_bytes
from fusemlp.sklearn import TableClassifier
from fusemlp_kernels.contract import ACTIVATIONS

# Examples of a target in one turn.
EXAMPLES = 40
TEMPORARY = tempfile.TemporaryDirectory(prefix="fusemlp-fuzz-")
FOLDER = Path(TEMPORARY.name)


def written(name: str, content: bytes) -> Path:
    """Return the path of a file with this content."""
    path = FOLDER / name
    path.write_bytes(content)
    return path


def refused(read: Callable[[], Any], error: type[Exception] = DataError) -> Any:
    """Return what ``read`` returns, None if it raises this error; the message names a mend or the place."""
    try:
        return read()
    except error as caught:
        assert len(str(caught)) > 10, f"a bare message: {caught}"
        return None


@st.composite
def damaged(draw: Callable[..., Any], content: bytes) -> bytes:
    """Draw a file in which some bytes were changed, added or lost, or whose end is missing."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(changed)))
        piece = draw(st.binary(max_size=4))
        lost = draw(st.sampled_from((0, 1, len(piece), 4, 64)))
        changed[place : place + lost] = piece
    end = draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
    return bytes(changed[:end])


# Tables of text.

LINES = st.lists(
    st.lists(
        st.one_of(st.text(max_size=6), st.sampled_from(("1,5", "1.234", '"', '"a', "-", "NA", "2024-01-02", "0x1")))
    ).flatmap(lambda cells: st.sampled_from((",", ";", "\t", "|", '","')).map(lambda sep: sep.join(cells))),
    max_size=8,
)
PACKED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@given(
    LINES, st.sampled_from(("\n", "\r\n", "\r")), st.sampled_from(("utf-8", "utf-16", "cp1252", "utf-32")), st.data()
)
def any_text(lines: list[str], end: str, encoding: str, data: Any) -> None:
    """Text that may be a table, as it is, damaged or compressed."""
    content = end.join(lines).encode(encoding, errors="replace")
    suffix = data.draw(st.sampled_from(("", "", *PACKED)))
    content = PACKED[suffix](content) if suffix else content
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    path = written(f"any.csv{suffix}", content)
    names = refused(partial(read_names, path))
    target = names[-1] if names else "a"
    refused(partial(load_data, path, target=target))
    refused(partial(read_table, path, form=Form(sep=";", decimal=",", header=data.draw(st.booleans()))))


@st.composite
def spelled(draw: Callable[..., Any], decimal: str) -> tuple[str, float]:
    """Draw the text of a number as people and programs write it, and its value."""
    whole, part = draw(st.integers(0, 10**12)), draw(st.text("0123456789", max_size=9))
    digits = str(whole)
    if draw(st.booleans()):
        digits = f"{whole:,}".replace(
            ",", draw(st.sampled_from(("." if decimal == "," else ",", "'", "\u00a0", "\u202f")))
        )
    power = draw(st.one_of(st.just(0), st.integers(-40, 40)))
    percent = draw(st.sampled_from(("", "", "%", " %")))
    value = float(Decimal(f"{whole}.{part or '0'}e{power}"))
    value = value / 100 if percent else value
    sign = draw(st.sampled_from(("", "-", "+", "\u2212")))
    currency = draw(st.sampled_from(("", "", "$", "€ ", "EUR")))
    text = f"{sign}{currency}{digits}{decimal if part else ''}{part}{f'e{power}' if power else ''}{percent}"
    return text, -value if sign in ("-", "\u2212") else value


@given(st.sampled_from((".", ",")).flatmap(lambda mark: st.tuples(st.just(mark), st.lists(spelled(mark), min_size=1))))
def numbers(drawn: tuple[str, list[tuple[str, float]]]) -> None:
    """A column of numbers, in a cell and in a file."""
    decimal, cells = drawn
    for text, value in cells:
        assert number(text, decimal) == value, (text, number(text, decimal), value)
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=";").writerows([("a", "b"), *((text, "x") for text, _ in cells)])
    path = written("numbers.csv", stream.getvalue().encode())
    table = read_table(path, form=Form(sep=";", decimal=decimal), kinds={"a": "number"})
    assert table["a"].tolist() == [value for _, value in cells], (table["a"].tolist(), cells)


@given(st.text("0123456789.,-+eE$%€ '\u2212_nafitNyx", max_size=12), st.sampled_from((".", ",")))
def any_number(text: str, decimal: str) -> None:
    """A cell that may be a number: a column reads it as the function does."""
    value = number(text, decimal)
    path = written("number.csv", f'a;b\n"{text}";x\n'.encode())
    table = refused(partial(read_table, path, form=Form(sep=";", decimal=decimal), kinds={"a": "number"}))
    missing = text.strip() in MISSING or (value is not None and math.isnan(value))
    if table is None:
        assert value is None or math.isinf(value), (text, value)
    elif text.strip().lower().lstrip("+-") in ("inf", "infinity"):
        # A note counts them, with either decimal mark.
        assert np.isnan(table["a"]).all(), (text, table["a"])
    elif not missing:
        assert table["a"].tolist() == [value], (text, table["a"], value)


STYLES = ("{a}{m}{b:02}{m}{c:02}", "{a}{m}{b}{m}{c}")
TIMES = ("", " {h}:{n:02}", "T{h:02}:{n:02}:{s:02}", " {h:02}:{n:02}:{s:02}.{f:06}", "T{h:02}:{n:02}:{s:02}{z}")


@given(
    st.lists(st.datetimes(datetime(1000, 2, 1), datetime(9999, 11, 30)), min_size=1, max_size=8),
    st.sampled_from(("ymd", "dmy", "mdy")),
    st.sampled_from(("-", "/", ".")),
    st.sampled_from(STYLES),
    st.sampled_from(TIMES),
    st.integers(-14 * 60, 14 * 60),
)
def dates(moments: list[datetime], order: str, mark: str, style: str, clock: str, offset: int) -> None:
    """A column of dates, in a cell and in a file."""
    mark = "/" if order == "mdy" else mark
    hours, minutes = divmod(abs(offset), 60)
    zone, sign = ("Z", 0) if offset == 0 else (f"{'-+'[offset > 0]}{hours:02}:{minutes:02}", offset)
    texts, expected = [], []
    for moment in moments:
        parts = {"y": moment.year, "m": moment.month, "d": moment.day}
        a, b, c = (parts[letter] for letter in order)
        text = style.format(a=a, b=b, c=c, m=mark)
        text += clock.format(h=moment.hour, n=moment.minute, s=moment.second, f=moment.microsecond, z=zone)
        kept = {"hour": "h", "minute": "n", "second": "s", "microsecond": "f"}
        value = moment.replace(**{name: 0 for name, letter in kept.items() if f"{{{letter}" not in clock})
        expected.append(value - timedelta(minutes=sign) if "{z}" in clock else value)
        texts.append(text)
        assert parse_date(text, order) == expected[-1], (text, order, parse_date(text, order))
    path = written("dates.csv", "\n".join(["a;b", *(f"{text};x" for text in texts)]).encode())
    table = read_table(path, form=Form(sep=";"), kinds={"a": order})
    assert table["a"].tolist() == expected, (table["a"].tolist(), texts)


@given(st.text("0123456789-/.:T Z+apmAPM,", max_size=30), st.sampled_from(("ymd", "dmy", "mdy")))
def any_date(text: str, order: str) -> None:
    """A cell that may be a date: a column reads it as the function does."""
    value = parse_date(text.strip(), order)
    path = written("date.csv", f"a;b\n{text};x\n".encode())
    table = refused(partial(read_table, path, form=Form(sep=";"), kinds={"a": order}))
    if table is not None and text.strip():
        assert table["a"].tolist() == [value], (text, table["a"], value)


@st.composite
def sniffed(draw: Callable[..., Any]) -> tuple[bytes, list[tuple[str, float]]]:
    """Draw a file whose separator, mark and encoding must be recognised, and its rows."""
    sep = draw(st.sampled_from((*SEPARATORS,)))
    decimal = draw(st.sampled_from((".",) if sep == "," else (".", ",")))
    # Two digits after the mark: three may be thousands.
    value = st.decimals(-(10**6), 10**6, places=2).filter(lambda drawn: drawn % 1 != 0)
    word = st.text("abcdéü' ", min_size=1, max_size=8).map(lambda text: f"w{text}w")
    rows = draw(st.lists(st.tuples(word, value), min_size=2, max_size=12))
    quoting = draw(st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
    stream = io.StringIO(newline="")
    writer = csv.writer(
        stream, delimiter=sep, quoting=quoting, lineterminator=draw(st.sampled_from(("\n", "\r\n", "\r")))
    )
    writer.writerows([("name", "size"), *((name, str(size).replace(".", decimal)) for name, size in rows)])
    encoding = draw(st.sampled_from(("utf-8", "utf-8-sig", "utf-16", "cp1252")))
    return stream.getvalue().encode(encoding), [(name, float(size)) for name, size in rows]


@given(sniffed())
def forms(drawn: tuple[bytes, list[tuple[str, float]]]) -> None:
    """A table in a form that is recognised."""
    content, rows = drawn
    table = read_table(written("form.csv", content))
    assert list(zip(table["name"].tolist(), table["size"].tolist(), strict=True)) == rows, table


# Files of arrays.

CODES = {0x08: ">B", 0x09: ">b", 0x0B: ">h", 0x0C: ">i", 0x0D: ">f", 0x0E: ">d"}


@given(st.sampled_from([*CODES]), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data())
def idx(code: int, shape: list[int], data: Any) -> None:
    """An IDX file, whole or damaged: what is read is what the struct module reads."""
    size = math.prod(shape) * struct.calcsize(CODES[code])
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape)
    content = header + data.draw(st.binary(min_size=size, max_size=size))
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    packed = data.draw(st.booleans())
    array = refused(
        partial(read_idx, written(f"x{'.gz' if packed else ''}", gzip.compress(content) if packed else content))
    )
    if array is not None:
        start = 4 + 4 * content[3]
        kind = CODES[content[2]]
        values = [value for (value,) in struct.iter_unpack(kind, content[start:])]
        lengths = struct.unpack(f">{content[3]}I", content[4:start])
        assert array.shape == lengths and np.array_equal(array.ravel(), np.array(values), equal_nan=True)


ARRAYS = {"X": np.arange(12.0).reshape(4, 3), "y": np.array(["a", "b", "a", "b"])}
STREAM = io.BytesIO()
np.savez_compressed(STREAM, **ARRAYS)
NPZ = STREAM.getvalue()


@given(damaged(NPZ))
def npz(content: bytes) -> None:
    """A damaged npz file."""
    arrays = refused(partial(read_npz, written("x.npz", content))) or {}
    for name, array in arrays.items():
        assert name not in ARRAYS or np.array_equal(array, ARRAYS[name]), (name, array)


DESCRIBED = st.fixed_dictionaries(
    {
        "descr": st.sampled_from(("<f8", ">f4", "|O", "<U3", "<M8[us]", "<c16", [("a", "<f8")], "<f16", 3, "")),
        "fortran_order": st.sampled_from((True, False, 0, "x")),
        "shape": st.one_of(
            st.lists(st.sampled_from((0, 1, 2, -1, 2**31, 2**62, 1.5, "x")), max_size=3).map(tuple), st.just(4)
        ),
    },
    optional={"extra": st.just(1)},
)


@given(st.one_of(DESCRIBED.map(repr), st.text(max_size=20)), st.binary(max_size=64), st.sampled_from((1, 2, 3, 9)))
def npy_headers(header: str, body: bytes, version: int) -> None:
    """An npz file with a forged header of an array and a fitting checksum."""
    text = header.encode()
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("X.npy", b"\x93NUMPY" + bytes((version, 0)) + length + text + body)
        archive.writestr("y.npy", b"\x93NUMPY\x01\x00")
    path = written("forged.npz", stream.getvalue())
    refused(partial(read_npz, path))
    refused(partial(load_data, path))


# Tables with types.

TABLE = pyarrow.table({"a": [1.5, None, 3.0], "b": ["x", "y", None], "y": [1, 2, 3]})
TYPED: dict[str, bytes] = {}
for suffix, write in ((".parquet", parquet.write_table), (".feather", feather.write_feather)):
    write(TABLE, FOLDER / f"made{suffix}")
    TYPED[suffix] = (FOLDER / f"made{suffix}").read_bytes()
BOOK, SHEET = openpyxl.Workbook(), io.BytesIO()
for row in (TABLE.column_names, *zip(*TABLE.to_pydict().values(), strict=True)):
    BOOK.active.append(row)
BOOK.save(SHEET)
TYPED[".xlsx"] = SHEET.getvalue()


@given(st.sampled_from([*TYPED]).flatmap(lambda suffix: st.tuples(st.just(suffix), damaged(TYPED[suffix]))))
def typed(drawn: tuple[str, bytes]) -> None:
    """A damaged file of Arrow's, or a damaged workbook."""
    suffix, content = drawn
    refused(partial(load_data, written(f"x{suffix}", content), target="y"))


# Files of models.


def states() -> dict[str, tuple[bytes, Callable[[Path], Any]]]:
    """Return the content of a file of each kind, and what reads it."""
    rng = np.random.default_rng(0)
    X, labels = rng.normal(size=(24, 3)).astype(np.float32), np.arange(24) % 2
    engine = Engine(MLP([3, 4, 2]), optimizer=Adam(), batch_size=8, normalise=True)
    engine.fit(X, labels, epochs=1)
    engine.save(FOLDER / "model")
    engine.save_checkpoint(FOLDER / "checkpoint")
    TableClassifier(hidden=(4,), epochs=2).fit(X, labels).save(FOLDER / "estimator")

    def judged(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        return lambda path: np.asarray(read(path).predict_proba(X))

    readers: dict[str, Any] = {"model": load, "checkpoint": load_checkpoint, "estimator": TableClassifier.load}
    return {name: ((FOLDER / name).read_bytes(), judged(read)) for name, read in readers.items()}


STATES = states()


@given(st.sampled_from([*STATES]).flatmap(lambda name: st.tuples(st.just(name), damaged(STATES[name][0]))))
def models(drawn: tuple[str, bytes]) -> None:
    """A damaged model, checkpoint or estimator: it is refused, or predicts the same."""
    name, content = drawn
    original, read = STATES[name]
    values = refused(partial(read, written(f"x.{name}", content)), CheckpointError)
    assert values is None or np.array_equal(values, read(written(f"y.{name}", original)))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**64), 2**64), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
)
TENSOR = st.fixed_dictionaries(
    {"dtype": st.sampled_from(("F32", "F64", "BF16", "I64", "x", 3)), "shape": JSON, "data_offsets": JSON}
)


@given(st.one_of(JSON, st.dictionaries(st.sampled_from(("0.weight", "0.bias", "__metadata__")), TENSOR)), st.data())
def safetensors(header: Any, data: Any) -> None:
    """A safetensors file with a forged header."""
    text = json.dumps(header).encode()
    length = data.draw(st.one_of(st.just(len(text)), st.integers(0, 2**64 - 1)))
    path = written("forged.safetensors", struct.pack("<Q", length) + text + data.draw(st.binary(max_size=32)))
    for _, read in STATES.values():
        assert refused(partial(read, path), CheckpointError) is None


# Graphs that are written.

# A graph keeps slopes and eps as attributes in float32, each off by 6e-8 at most; two of a layer, seven layers.
ROUNDING = 14 * 2.0**-24
LAYERS = st.one_of(st.integers(1, 6), st.builds(Residual, st.integers(1, 5), st.integers(2, 3)))


@given(
    st.lists(LAYERS, max_size=3),
    st.sampled_from([*ACTIVATIONS]),
    st.sampled_from((None, LayerNorm(), RMSNorm(0.5))),
    st.sampled_from((1, 1, 3)),
    st.sampled_from((("cross_entropy", 3), ("binary_cross_entropy", 1), ("mse", 2), ("poisson", 1), ("quantile", 1))),
    st.integers(0, 2**32 - 1),
)
def graphs(hidden: list[Any], activation: str, norm: Any, members: int, ends: tuple[str, int], start: int) -> None:
    """A graph of a random network, checked and run: it gives the engine's outputs."""
    loss, outputs = ends
    try:
        net = MLP([4, *hidden, outputs], activation=activation, norm=norm if hidden else None, members=members)
        engine = Engine(net, loss=loss, precision="fp64", backend="numpy", seed=start % 1000)
    except fusemlp.ArgumentError as error:
        # a combination that the table of conflicts refuses
        raise UnsatisfiedAssumption from error
    rng = np.random.default_rng(start)
    state = {name: value + 0.3 * rng.normal(size=value.shape) for name, value in engine.state_dict().items()}
    engine.load_state_dict(state)
    content, X = onnx_bytes(engine), rng.normal(size=(5, 4))
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    name = "logits" if "cross_entropy" in loss else "output"
    (values,) = session.run([name], {session.get_inputs()[0].name: X})
    expected = engine.outputs(X)
    difference = np.abs(values.reshape(expected.shape) - expected).max()
    assert difference <= ROUNDING * max(1.0, np.abs(expected).max()), difference


# A health check would judge how the examples are drawn.
settings.register_profile(
    "fuzz",
    max_examples=EXAMPLES,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[*HealthCheck],
)
TARGETS: dict[str, Callable[[], None]] = {
    target.__name__: settings(settings.get_profile("fuzz"))(target)
    for target in (
        *(any_text, forms, numbers, any_number, dates, any_date),
        *(idx, npz, npy_headers, typed, models, safetensors, graphs),
    )
}


def play(name: str, first: int, turn: int, counts: Counter[str]) -> None:
    """Run one turn of a target; the seed and the number of the round choose its examples."""
    target = TARGETS[name]
    inner = target.hypothesis.inner_test  # type: ignore[attr-defined]

    @wraps(inner)
    def counted(*drawn: Any, **named: Any) -> None:
        counts[name] += 1
        inner(*drawn, **named)

    target.hypothesis.inner_test = counted  # type: ignore[attr-defined]
    try:
        seed(first * 1_000_003 + turn)(target)()
    finally:
        target.hypothesis.inner_test = inner  # type: ignore[attr-defined]


def main() -> None:
    about, _, _ = (__doc__ or "").partition("\n\nusage")
    parser = argparse.ArgumentParser(prog="ci/fuzz", description=about)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="one of the targets")
    parser.add_argument("--round", type=int, help="one round")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"ci/fuzz: seed {given.seed}, {given.seconds:g} s, files in {FOLDER}", flush=True)
    # A parser in C that crashes leaves the line of Python and, in the folder, its file.
    faulthandler.enable()
    began, counts = time.monotonic(), Counter[str]()
    for turn in itertools.count() if given.round is None else (given.round,):
        for name in TARGETS if given.only is None else (given.only,):
            if time.monotonic() - began > given.seconds:
                break
            try:
                play(name, given.seed, turn, counts)
            except Exception:
                traceback.print_exc()
                sys.exit(f"ci/fuzz: repeat it with ci/fuzz --seed {given.seed} --only {name} --round {turn}")
        else:
            continue
        break
    print(f"ci/fuzz: no fault in {sum(counts.values())} examples: {', '.join(f'{n} {k}' for k, n in counts.items())}")


if __name__ == "__main__":
    main()
