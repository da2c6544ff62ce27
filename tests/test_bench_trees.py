"""Whole commands beside LightGBM: the generated table, the child's figures, and the report of rounds."""

import hashlib
import subprocess

import numpy as np
import pytest

from bench import boosted, child, generate, tables, trees
from fusemlp.datasets.rows import folds

ROWS = 20_000


@pytest.fixture(scope="module")
def generated():
    return generate.table(ROWS, seed=3)


def test_a_seed_gives_the_same_table_and_another_seed_another(generated):
    again, other = generate.table(ROWS, seed=3), generate.table(ROWS, seed=4)
    assert generated.equals(again)
    assert all(not generated[name].equals(other[name]) for name in generated)


def test_the_words_of_a_seed_stay_those_of_the_recorded_figures():
    codes = np.stack([generate.table(1000, seed=0)[f"w{place}"].cat.codes for place in range(1, 6)])
    assert hashlib.sha256(codes.astype(np.int16).tobytes()).hexdigest()[:16] == "d3693f70988adb7c"


def test_the_table_has_five_columns_of_words_fifteen_of_numbers_and_the_target(generated):
    words = [name for name in generated if generated[name].dtype == "category"]
    assert words == ["w1", "w2", "w3", "w4", "w5"] and list(generated)[-1] == "y"
    assert [len(generated[name].cat.categories) for name in words] == [3, 8, 30, 120, 500]
    assert generated.shape == (ROWS, 5 + 15 + 1)
    # each share is binomial: five standard deviations
    for name, missing in generated.isna().mean().items():
        share = generate.MISSING.get(name, 0)
        assert abs(missing - share) <= 5 * np.sqrt(share * (1 - share) / ROWS), name


def test_the_noise_of_the_target_has_a_fifth_of_its_variance(generated):
    # var(y) of a signal of variance 1 and noise of 0.25; the error of a variance is below 5 sqrt(kurtosis / rows)
    y = generated["y"]
    assert abs(y.var() - 1.25) < 5 * y.var() * np.sqrt((y.kurt() + 2) / ROWS)


def test_a_child_is_charged_for_its_work_and_not_for_its_parents_memory():
    held = np.ones(300 << 20, np.uint8)
    used = child.usage(["timeit", "-n", "1", "-r", "1", "-s", "x = b'1' * (100 << 20)", "sum(range(5_000_000))"])
    assert used["memory"] < held.nbytes
    assert used["memory"] > 100 << 20
    assert min(used["processor"], used["seconds"]) > 0


def test_a_child_that_fails_is_an_error():
    with pytest.raises(subprocess.CalledProcessError):
        child.usage(["no_such_module_of_python"])


def test_folds_are_those_of_fusemlp():
    frame = generate.table(200, seed=0)[["x1", "y"]]
    trained, tested, numbers = tables.rows_of(tables.Table("", "", "y", tables.NUMBERS), frame, seed=1)
    assert sorted([*trained, *tested]) == list(range(200)) and len(tested) == 40
    for number, (kept, validated) in enumerate(folds(frame["y"].to_numpy()[trained], 5, seed=1, stratify=False)):
        assert np.array_equal(np.flatnonzero(numbers != number), kept)
        assert np.array_equal(np.flatnonzero(numbers == number), validated)


@pytest.mark.parametrize("classes", [0, 2, 3])
def test_five_folds_predict_the_mean_of_five_models(classes):
    pytest.importorskip("lightgbm")
    frame = generate.table(400, seed=0)
    X, y = boosted.categories(frame.drop(columns="y")), frame["y"].to_numpy()
    if classes:
        y = np.array(["a", "b", "c"])[np.digitize(y, np.quantile(y, np.arange(1, classes) / classes))]
    model = boosted.FiveFolds(np.arange(400) % 5, classify=bool(classes)).fit(X, y)
    assert len(model.models_) == 5
    if classes:
        probability = model.predict_proba(X)
        assert probability.shape == (400, classes) and np.allclose(probability.sum(axis=1), 1)
        assert np.array_equal(model.predict(X), np.array(["a", "b", "c"])[probability.argmax(axis=1)])
    else:
        parts = [part.predict(X.set_axis(range(X.shape[1]), axis=1)) for part in model.models_]
        assert np.allclose(model.predict(X), np.mean(parts, axis=0))


def line(model, turn, processor, memory, **score):
    about = {"table": "a", "task": "regression", "seed": 0, "rows": 1000, "columns": 4}
    return {**about, "model": model, "round": turn, "processor": processor, "memory": memory, "seconds": 1.0, **score}


def test_the_report_pairs_the_rounds():
    lines = [
        line("fusemlp", 0, 20.0, 4e9, r2=0.75),
        line("lightgbm", 0, 10.0, 1e9, r2=0.5),
        line("fusemlp", 1, 40.0, 3e9, r2=0.75),
        line("lightgbm", 1, 10.0, 2e9, r2=0.5),
    ]
    row = "| a | 1,000 | 30.00 (20.00 to 40.00) | 10.00 (10.00 to 10.00) | 3.00 (2.00 to 4.00) | 4.00 | 2.00 | r2 |"
    assert f"{row} 0.7500 | 0.5000 |" in trees.text(lines)
    assert "2 paired rounds" in trees.text(lines)
