"""``Blocks``: shuffled batches of memory-mapped arrays and Parquet files, in a bounded part of the memory."""

import tracemalloc
from itertools import chain

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from fusemlp import MLP, Blocks
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, DTypeError, ShapeError
from make import assert_same, engine, halfway

RNG = np.random.default_rng(0)
ROWS = 103
X = np.concatenate([np.arange(ROWS)[:, None], RNG.normal(size=(ROWS, 3))], axis=1).astype(np.float32)
Y, W = RNG.integers(0, 3, ROWS), RNG.random(ROWS).astype(np.float32) + 0.1
SMALL = {"batch_size": 10, "block_rows": 7, "window": 3}


@pytest.fixture
def files(tmp_path):
    """The rows in .npy files, and in two Parquet files of row groups of 7."""
    for name, array in (("X", X), ("y", Y), ("w", W)):
        np.save(tmp_path / f"{name}.npy", array)
    columns = {f"x{place}": X[:, place] for place in range(4)} | {"y": Y, "w": W, "word": ["a"] * ROWS}
    for number, part in enumerate((slice(0, 63), slice(63, ROWS))):
        table = pyarrow.table({name: column[part] for name, column in columns.items()})
        parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=7)
    return {path.name: path for path in tmp_path.iterdir()}


def parquet_blocks(files, **options):
    given = {"columns": ["x0", "x1", "x2", "x3"], "weight": "w", "batch_size": 10, "window": 3, **options}
    return Blocks([files["0.parquet"], files["1.parquet"]], target="y", **given)


def rows_of(batches):
    """Return the numbers of the rows in each batch; all parts of a row must be together."""
    found = []
    for x, y, *weights in batches:
        rows = x[:, 0].astype(int)
        assert np.array_equal(x, X[rows]) and np.array_equal(y, Y[rows])
        assert all(np.array_equal(weight, W[rows]) for weight in weights)
        found.append(rows.tolist())
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_each_row_comes_once_in_an_epoch_and_in_another_order_in_the_next(weighted):
    blocks = Blocks(X, Y, W if weighted else None, seed=3, **SMALL)
    epochs = [rows_of(iter(blocks)) for _ in range(2)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [10] * 10 + [3] and len(blocks) == 11
        assert sorted(chain(*epoch)) == list(range(ROWS))
    assert epochs[0] != epochs[1]
    again = Blocks(X, Y, seed=3, **SMALL)
    assert [rows_of(iter(again)) for _ in range(2)] == epochs
    assert rows_of(iter(Blocks(X, Y, seed=4, **SMALL))) != epochs[0]


def test_the_rows_are_those_of_a_window_of_blocks():
    numbers = np.arange(105)
    rows = Blocks(numbers, numbers, **SMALL).order(0)
    for window in rows.reshape(5, 21):
        assert len(set(window // 7)) == 3 and not np.array_equal(window, np.sort(window))
    assert sorted(rows) == list(range(105))


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_cut_from_the_order(epoch, drop_last, shuffle):
    blocks = Blocks(X, Y, shuffle=shuffle, drop_last=drop_last, **SMALL)
    blocks.seek(epoch * len(blocks) + 4)
    expected = blocks.order(epoch)[40 : 100 if drop_last else ROWS]
    assert list(chain(*rows_of(iter(blocks)))) == expected.tolist()
    assert shuffle or np.array_equal(blocks.order(epoch), np.arange(ROWS))


def test_files_give_the_batches_of_arrays(files):
    expected = rows_of(iter(Blocks(X, Y, W, seed=1, **SMALL)))
    mapped = Blocks(files["X.npy"], str(files["y.npy"]), files["w.npy"], seed=1, **SMALL)
    assert rows_of(iter(mapped)) == expected
    found = parquet_blocks(files, seed=1)
    # the row groups of the two files are 9 of 7 rows, 5 of 7 and one of 5: those of the arrays
    assert rows_of(iter(found)) == expected
    x, y, weight = next(iter(found))
    assert (x.dtype, y.dtype, weight.dtype) == (np.float32, np.int64, np.float64)
    several = Blocks(files["0.parquet"], target=["w", "x1"], columns="y", batch_size=4)
    assert [array.shape for array in next(iter(several))] == [(4, 1), (4, 2)]


def make():
    return engine(net=MLP([4, 8, 3], dropout=0.2), batch_size=10, normalise=False)


def test_a_fit_on_blocks_is_that_on_arrays_in_their_order():
    """A second fit goes on with the epochs of the first; dropout depends on the row in the batch."""
    streamed, arrays = make(), make()
    blocks = Blocks(X, Y, W, **SMALL)
    for epochs in (2, 1):
        # validation reads the same rows meanwhile
        streamed.fit(blocks, epochs=epochs, validation_data=blocks)
        arrays.fit(X, Y, sample_weight=W, epochs=epochs, row_order=blocks.order)
    assert_same(streamed, arrays)


@pytest.mark.parametrize("steps", [None, 6])
def test_a_resumed_fit_reads_the_same_batches(steps, tmp_path, files):
    whole, fit = make(), {"epochs": 3, "steps_per_epoch": steps}
    resumed = halfway(whole, tmp_path / "cut.safetensors", 14, parquet_blocks(files), **fit)
    resumed.fit(parquet_blocks(files), **fit, resume=True)
    assert resumed.update_count == whole.update_count
    assert_same(resumed, whole)


def peak_of(work):
    """Return the most bytes that Python has allocated during some work."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_more_than_a_window_is_in_memory(tmp_path):
    """Memory-mapped pages are the system's; the allocator counts the windows and batches."""
    rows, width = 20_000, 64
    np.save(tmp_path / "X.npy", np.zeros((rows, width), np.float32))
    np.save(tmp_path / "y.npy", np.arange(rows) % 3)
    blocks = Blocks(tmp_path / "X.npy", tmp_path / "y.npy", batch_size=100, block_rows=200, window=4)
    assert blocks.window_bytes == (800 + 99) * (4 * width + 8)
    batch, order = 100 * (4 * width + 8), 3 * 8 * 900
    peak = peak_of(lambda: all(True for _ in blocks))
    # the batch that is yielded while the one before is alive; lists of blocks and objects of Python
    assert blocks.window_bytes < peak < blocks.window_bytes + 2 * batch + order + (32 << 10) < rows * width * 4 / 10


def test_memory_mapped_arrays_are_trained_on_where_they_are(tmp_path):
    rows, width = 20_000, 64
    np.save(tmp_path / "X.npy", np.ones((rows, width), np.float32))
    mapped, labels = np.load(tmp_path / "X.npy", mmap_mode="r"), np.arange(rows) % 3
    trained = engine((width, 8, 3), batch_size=100, normalise=False)
    trained.fit(mapped[:200], labels[:200], epochs=1)
    order = Blocks(mapped, labels).order
    assert peak_of(lambda: trained.fit(mapped, labels, epochs=1, row_order=order)) < mapped.nbytes / 2


def test_a_parquet_file_is_read_a_row_group_at_a_time(tmp_path):
    rows = 64_000
    noise = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    table = pyarrow.table({f"x{place}": noise[:, place] for place in range(4)} | {"y": np.arange(rows) % 2})
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=1000)
    del table
    held = pyarrow.total_allocated_bytes()
    blocks = Blocks(tmp_path / "data.parquet", target="y", batch_size=100, window=2)
    most = 0
    for _ in blocks:
        most = max(most, pyarrow.total_allocated_bytes() - held)
    assert blocks.window_bytes == (2000 + 99) * (16 + 8) and most < 64 * 1000 * 24 / 4


def of_file(target="y", **options):
    return lambda: Blocks("0.parquet", target=target, **options)


WRONG = [
    (lambda: Blocks(X), ArgumentTypeError, "y: it is missing; give X and y"),
    (lambda: Blocks(X.tolist(), Y), ArgumentTypeError, "X: expected an array such as numpy.load"),
    (lambda: Blocks(X, Y[:-1]), ShapeError, r"y: expected 103 rows, as many as X has, got shape \(102,\)"),
    (lambda: Blocks(X[:0], Y[:0]), DataError, "X: expected 1 or more rows, got 0"),
    (lambda: Blocks("0.parquet", Y), ArgumentError, "X: expected a .npy file, got '.*0.parquet'; with a Parquet"),
    (lambda: Blocks("missing.npy", Y), DataError, "X: 'missing.npy' cannot be read"),
    (lambda: Blocks(X, Y, batch_size=0), ArgumentError, "batch_size: expected a whole number"),
    (lambda: Blocks(X, Y, batch_size=104, drop_last=True), ArgumentError, "batch_size: 104 is more than the 103"),
    (lambda: Blocks(X, Y, columns=["a"]), ArgumentError, "columns: it names columns of a Parquet file; give"),
    (of_file(block_rows=7), ArgumentError, "block_rows: it is for arrays; leave it out"),
    (lambda: Blocks(X, Y, block_rows=-3), ArgumentError, "block_rows: expected a whole number"),
    (lambda: Blocks("0.parquet", Y, target="y"), ArgumentError, "target: it names y in a Parquet file"),
    (of_file(target="z"), ArgumentError, "target: there is no column 'z'; the file has x0, x1"),
    (of_file(), DTypeError, "columns: the column 'word' holds string"),
    (of_file(columns=[]), ArgumentError, "columns: expected the name of 1 column or more"),
    (of_file(target=5), ArgumentTypeError, "target: expected the name of a column, or a list of names"),
    (of_file(columns=5), ArgumentTypeError, "columns: expected the name of a column, or a"),
    (of_file(columns=[5]), ArgumentTypeError, r"columns: expected .*, got \[5\]"),
    (of_file(columns="x0", weight=["w"]), ArgumentTypeError, r"weight: expected the name of a column, got \['w'\]"),
    (of_file(columns=["x0", "y"]), ArgumentError, "columns: 'y' is the target, which"),
    (of_file(columns=["w"], weight="w"), ArgumentError, "columns: 'w' is the weight, which"),
    (lambda: Blocks(X, target="y"), ArgumentTypeError, "X: expected the path of a Parquet file"),
    (lambda: Blocks("X.npy", target="y"), DataError, "X: '.*X.npy' cannot be read as a Parquet file"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[row[-1] for row in WRONG])
def test_what_gives_no_batches_is_refused(call, error, message, tmp_path, files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_a_target_beyond_int64_is_refused(tmp_path):
    for most in (2**63 - 1, 2**63):
        labels = pyarrow.array([1, most], pyarrow.uint64())
        parquet.write_table(pyarrow.table({"x": [1.0, 2.0], "y": labels}), tmp_path / "large.parquet")
        blocks = Blocks(tmp_path / "large.parquet", target="y", shuffle=False)
        if most < 2**63:
            assert next(iter(blocks))[1].tolist() == [1, most]
        else:
            with pytest.raises(DataError, match=r"^y: row group 0 of '.*' has 9223372036854775808, and a target holds"):
                next(iter(blocks))


def test_missing_values_and_other_files_are_refused(tmp_path, files):
    path = tmp_path / "holes.parquet"
    parquet.write_table(pyarrow.table({"x": [1.0, None], "y": [0, 1]}), path)
    with pytest.raises(DataError, match=r"^x: row group 0 of '.*holes.parquet' has 1 missing values"):
        make().fit(Blocks(path, target="y"), epochs=1)
    with pytest.raises(DataError, match=r"^X: '.*holes.parquet' has other columns than '.*0.parquet'"):
        Blocks([files["0.parquet"], path], target="y", columns=["x0"])
