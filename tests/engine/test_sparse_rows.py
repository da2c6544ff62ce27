"""Sparse matrices of SciPy, and the columns of a table, as columns of codes."""

import logging

import numpy as np
import pytest
from scipy import sparse
from test_columns import assert_close

import fusemlp
import make
from fusemlp.inputs import columns
from fusemlp.inputs.columns import coding_of

RANDOM = np.random.default_rng(0)
# up to 9 of 200 words a row, some rows without one
COUNTS = [RANDOM.integers(0, 10) for _ in range(120)]
DENSE = np.zeros((120, 200))
for row, count in zip(DENSE, COUNTS, strict=True):
    row[RANDOM.choice(200, count, replace=False)] = RANDOM.integers(1, 4, count)
Y = RANDOM.integers(0, 3, 120)
FORMS = (sparse.csr_matrix, sparse.csr_array, sparse.csc_array, sparse.coo_matrix, sparse.lil_array)


def engine(**options):
    net = fusemlp.MLP([200, 17, 3], activation="tanh")
    return make.engine(net=net, **{"precision": "fp64", "normalise": False, **options})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.bool_])
def test_a_sparse_matrix_as_bags(form, dtype):
    dense = DENSE.astype(dtype)
    rows = fusemlp.Columns.from_sparse(form(dense))
    assert rows.shape == (120, 200)
    assert rows.dtype == np.result_type(dtype, np.float32)
    assert np.array_equal(rows, dense)


def test_values_of_one_place_add_up():
    matrix = sparse.csr_array((np.array([1.0, 2.0, 5.0]), np.array([3, 3, 0]), np.array([0, 2, 2, 3])), shape=(3, 4))
    assert np.array_equal(fusemlp.Columns.from_sparse(matrix), matrix.toarray())


@pytest.mark.parametrize("fullest, pairs", [(0, 1), (1, 1), (7, 7), (8, 8), (9, 10), (60, 64), (65, 80)])
def test_bags_have_few_lengths(fullest, pairs):
    matrix = sparse.csr_array(np.arange(300)[None] < [[fullest], [0]])
    assert fusemlp.Columns.from_sparse(matrix).coding.columns[0].pairs == pairs


@pytest.mark.parametrize("form", FORMS[:2])
def test_an_engine_takes_sparse_rows(form):
    results = []
    for rows in (form(DENSE), DENSE):
        trained = engine()
        history = trained.fit(rows, Y, epochs=3, validation_data=(rows[:40], Y[:40]), metrics=["auc"])
        trained.step(rows[:16], Y[:16])
        probabilities, losses = trained.predict_proba(rows), trained.evaluate(rows, Y)
        results.append({**trained.state_dict(), **losses, **history.history, "probabilities": probabilities})
        assert np.array_equal(trained.predict(rows), probabilities.argmax(1))
        assert trained.coded == (rows is not DENSE)
    assert_close(*results)


def test_batches_fleets_and_sweeps_take_sparse_rows():
    results = []
    for rows in (sparse.csr_matrix(DENSE), DENSE):
        trained = engine()
        trained.fit([(rows[:50], Y[:50]), (rows[50:], Y[50:])], epochs=2)
        fleet = fusemlp.Fleet(fusemlp.MLP([200, 8, 3]), vary={"lr": [0.01, 0.02]}, backend="numpy", precision="fp64")
        scores = fleet.fit(rows, Y, epochs=2, validation_data=(rows, Y)).members[1].scores
        sweep = trained.lr_find(rows, Y, steps=30)
        results.append({**trained.state_dict(), **scores, "mean": fleet.predict(rows).mean, "sweep": sweep.losses})
    assert_close(*results)


def test_what_needs_dense_rows_gets_them(caplog):
    caplog.set_level(logging.INFO, "fusemlp")
    matrix = sparse.csr_array(DENSE)
    full = sparse.csr_array(np.ones((16, 200)))
    for rows, options in ((matrix, {"normalise": True}), (full, {})):
        trained, other = engine(**options), engine(**options)
        trained.fit(rows, Y[: rows.shape[0]], epochs=1)
        other.fit(rows.toarray(), Y[: rows.shape[0]], epochs=1)
        make.assert_same(trained.state_dict(), other.state_dict())
    said = [record.getMessage() for record in caplog.records if "sparse" in record.getMessage()]
    assert said == [f"X: the sparse rows become dense ones, of {size}" for size in ("188 KiB", "25 KiB")]
    trained = engine()
    attacked = [trained.attack(rows, Y, fusemlp.FGSM(0.1)) for rows in (matrix, DENSE)]
    assert np.array_equal(*attacked)


def test_programs_of_steps_are_few():
    trained = engine(batch_size=4)
    for width in range(1, 20):
        trained.step(sparse.csr_array(np.arange(200)[None] < np.full((4, 1), width)), Y[:4])
    # 1 to 8, 10, 12, 14, 16, 20
    assert len(trained.programs.staged) == 13


REFUSED = [
    (lambda m: m.astype(complex), fusemlp.DTypeError, "X: expected real numbers, got dtype complex128"),
    (lambda m: m[:, :150], fusemlp.ShapeError, r"X: expected 200 columns, .* got shape \(120, 150\)"),
    (lambda m: m[:0], fusemlp.DataError, "X: expected 1 or more rows"),
]
for value in (np.nan, np.inf):
    wrong = sparse.lil_array((120, 200))
    wrong[7, 30] = value
    REFUSED.append(
        (lambda m, w=wrong: m + w.tocsr(), fusemlp.DataError, f"X: .* numbers, got {value} at row 7, column 30")
    )


@pytest.mark.parametrize("change, error, message", REFUSED)
def test_wrong_sparse_rows_are_refused(change, error, message):
    rows = change(sparse.csr_array(DENSE))
    with pytest.raises(error, match=message):
        engine().fit(rows, Y[: rows.shape[0]], epochs=1)


def test_sparse_targets_and_missing_targets_are_refused():
    matrix = sparse.csr_array(DENSE)
    with pytest.raises(fusemlp.ArgumentTypeError, match=r"y: sparse matrices are not supported; give y.toarray\(\)"):
        engine().fit(DENSE, matrix, epochs=1)
    with pytest.raises(fusemlp.ArgumentTypeError, match="y: it is missing; give X and y"):
        engine().fit(matrix, epochs=1)
    with pytest.raises(fusemlp.ArgumentTypeError, match="matrix: expected a sparse matrix of SciPy with real numbers"):
        fusemlp.Columns.from_sparse(DENSE)


def test_a_row_far_fuller_than_others_is_named(monkeypatch):
    full = DENSE.copy()
    full[5] = 1
    monkeypatch.setattr(columns, "LARGE", 1 << 16)
    with pytest.raises(
        fusemlp.DataError, match=r"matrix: row 5 has 200 numbers, and [\d.]+ are the mean: .* codes take 42\d KiB"
    ):
        fusemlp.Columns.from_sparse(sparse.csr_array(full))
    assert fusemlp.Columns.from_sparse(sparse.csr_array(DENSE)).coding.columns[0].pairs == 10


def test_the_columns_of_a_table():
    words, edges = [[1, 0], [-1, 2], [0, 1]], [[0.0, 1.0, 4.0], [10.0, 20.0]]
    pieces = [[0.5, 10.0], [4.0, 15.0], [-1.0, 22.0]]
    rows = fusemlp.Columns.of(words=words, levels=[2, 3], pieces=pieces, edges=edges, numbers=[[7.0], [8.0], [9.0]])
    expected = [
        [0, 1, 1, 0, 0, 0.5, 0, 0.0, 7],
        [0, 0, 0, 0, 1, 1.0, 1, 0.5, 8],
        [1, 0, 0, 1, 0, -1.0, 0, 1.2, 9],
    ]
    np.testing.assert_array_equal(rows, expected)
    assert coding_of(rows).slots == 7
    alone = fusemlp.Columns.of(numbers=np.eye(3))
    assert np.array_equal(alone, np.eye(3))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, fusemlp.ArgumentError, "columns: expected at least one"),
        ({"words": [[0, 1]], "levels": [2]}, fusemlp.ShapeError, r"words: expected shape \(n, 1\)"),
        (
            {"words": [[2]], "levels": [2]},
            fusemlp.DataError,
            "a whole number from 0 to 1, or -1 for none in slot 0, got 2",
        ),
        ({"pieces": [[2.0]]}, fusemlp.ShapeError, r"pieces: expected shape \(n, 0\)"),
        ({"pieces": [[2.0]], "edges": [[3.0, 3.0]]}, fusemlp.ArgumentError, r"edges\[0\]: expected two or more rising"),
        ({"pieces": [[2.0]], "edges": [[3.0]]}, fusemlp.ArgumentError, r"edges\[0\]: expected two or more rising"),
        ({"pieces": [[2.0]], "edges": [[3.0, np.inf]]}, fusemlp.ArgumentError, "rising finite numbers"),
        ({"pieces": [[2.0]], "edges": ["ab"]}, fusemlp.ArgumentError, r"edges\[0\]: expected .*, got 'ab'"),
        ({"words": [[1]], "levels": [2.0]}, fusemlp.ArgumentTypeError, r"levels\[0\]: expected a whole number"),
        ({"numbers": [1.0, 2.0]}, fusemlp.ShapeError, r"numbers: expected shape \(n, m\), got \(2,\)"),
        ({"numbers": 3.0}, fusemlp.ShapeError, r"numbers: expected shape \(n, m\), got \(\)"),
        ({"pieces": [[np.nan]], "edges": [[3.0, 4.0]]}, fusemlp.DataError, "pieces: expected finite numbers, got nan"),
        ({"words": [[0]], "levels": [2], "numbers": [[1.0], [2.0]]}, fusemlp.ShapeError, "numbers: expected 1 row"),
    ],
)
def test_wrong_columns_of_a_table_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        fusemlp.Columns.of(**arguments)
