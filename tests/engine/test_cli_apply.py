"""``fusemlp evaluate`` and ``fusemlp predict``: answers in the labels and units of the data."""

import json

import numpy as np
import pandas
import pytest

from fusemlp.cli.options import TrainOptions
from fusemlp.cli.session import prepared_data
from make import output_of, read, refusal, result_of, run

NAMES = ["daisy", "rose", "tulip"]


def trained(folder, *options):
    """Train a run without progress, and return its folder."""
    assert run("train", *options, "--quiet", "--out", folder) == 0
    return folder


def flowers(path, count, *, with_label=True, seed=0):
    """Write a table of two numbers, a word, and a label in words that follows from them."""
    generator = np.random.default_rng(seed)
    kinds = generator.integers(0, 3, count)
    numbers = generator.normal(np.stack([10.0 * kinds, -5.0 * kinds], axis=1), 1.0).round(4)
    table = pandas.DataFrame(numbers, columns=["height", "width"])
    table["colour"] = np.array(["white", "red", "yellow"])[kinds]
    if with_label:
        table["species"] = np.array(NAMES)[kinds]
    table.to_csv(path, index=False)
    return path


def predicted(path, *arguments):
    """Return the table that ``fusemlp predict`` writes."""
    assert run("predict", *arguments, "--out", path) == 0
    return pandas.read_csv(path)


@pytest.fixture(scope="module")
def species(tmp_path_factory):
    folder = tmp_path_factory.mktemp("species")
    table = flowers(folder / "flowers.csv", 150)
    return trained(folder / "run", table, "--target", "species", "--epochs", "30", "--lr", "0.01")


def test_evaluate_repeats_the_test_of_the_training_and_takes_other_rows(species, tmp_path, capsys):
    answer, report = result_of(capsys, "evaluate", species), read(species / "report.json")
    assert {name: answer[name] for name in report["test"]} == report["test"]
    assert list(answer["classes"]) == NAMES
    answer = result_of(capsys, "evaluate", species, "--data", flowers(tmp_path / "other.csv", 40, seed=1))
    assert (answer["rows"], answer["accuracy"]) == (40, 1.0)


def test_evaluate_prints_the_figures_of_each_class(species, capsys):
    shown = output_of(capsys, "evaluate", species)
    assert "test accuracy 1.0000" in shown and "true \\ predicted" in shown
    assert [line.split()[0] for line in shown.splitlines() if line.startswith(tuple(NAMES))] == NAMES * 2


@pytest.mark.parametrize("weights", ["model", "best", "last"])
def test_predict_in_the_words_of_the_data(species, weights, tmp_path):
    labelled = pandas.read_csv(flowers(tmp_path / "labelled.csv", 40, seed=2))["species"].tolist()
    bare = flowers(tmp_path / "bare.csv", 40, with_label=False, seed=2)
    answers = predicted(tmp_path / "out.csv", species, "--data", bare, "--proba", "--weights", weights)
    assert list(answers) == ["prediction", *(f"probability_{name}" for name in NAMES)]
    assert answers["prediction"].tolist() == labelled
    probabilities = answers.iloc[:, 1:].to_numpy()
    assert np.allclose(probabilities.sum(axis=1), 1.0, atol=1e-6)
    assert np.array(NAMES)[probabilities.argmax(axis=1)].tolist() == labelled


def test_predict_never_overwrites_unless_told(species, tmp_path, capsys):
    bare = flowers(tmp_path / "bare.csv", 5, with_label=False)
    out = tmp_path / "out.csv"
    out.write_text("precious")
    assert "--force to overwrite" in refusal(capsys, "predict", species, "--data", bare, "--out", out)
    assert out.read_text() == "precious"
    assert result_of(capsys, "predict", species, "--data", bare, "--out", out, "--force")["rows"] == 5
    assert len(pandas.read_csv(out)) == 5


def test_values_come_back_in_original_units(tmp_path, capsys):
    X = np.random.default_rng(0).normal(size=(300, 3)) * [1.0, 100.0, 0.01]
    # targets far from zero, of very different sizes
    y = np.stack([5000.0 + 1000.0 * X[:, 0], 1e-3 * X[:, 1]], axis=1)
    data = tmp_path / "data.npz"
    np.savez(data, X=X, y=y)
    folder = trained(tmp_path / "run", data, "--epochs", "40", "--lr", "0.01")
    answer = result_of(capsys, "evaluate", folder)
    assert answer["r2"] > 0.95
    assert 0 < answer["mae"] <= answer["rmse"] < 200.0
    answers = predicted(tmp_path / "out.csv", folder, "--data", data)
    assert list(answers) == ["prediction_0", "prediction_1"]
    first = answers["prediction_0"]
    assert np.corrcoef(first, y[:, 0])[0, 1] > 0.97
    assert abs(first.mean() - 5000.0) < 200.0


def test_counts_of_a_poisson_loss(tmp_path):
    generator = np.random.default_rng(0)
    X, data = generator.normal(size=(400, 1)), tmp_path / "data.npz"
    np.savez(data, X=X, y=generator.poisson(np.exp(1.0 + 0.5 * X[:, 0])))
    folder = trained(tmp_path / "run", data, "--task", "regression", "--loss", "poisson", "--epochs", "20")
    rates = predicted(tmp_path / "out.csv", folder, "--data", data)["prediction"]
    assert (rates > 0.0).all()
    assert np.corrcoef(rates, np.exp(1.0 + 0.5 * X[:, 0]))[0, 1] > 0.95


TWO_CLASSES = {
    "one logit": ["--loss", "binary_cross_entropy"],
    "one logit, weighted rows": ["--loss", "binary_cross_entropy", "--class-weight", "balanced"],
    "two logits, weighted": ["--class-weight", "1,2"],
    "one-hot huber": ["--loss", "huber", "--delta", "0.5"],
    "one-hot mae, weighted rows": ["--loss", "mae", "--class-weight", "balanced"],
}


@pytest.mark.parametrize("options", TWO_CLASSES.values(), ids=TWO_CLASSES.keys())
def test_two_classes(options, tmp_path, capsys):
    folder = trained(tmp_path / "run", "breast_cancer", "--epochs", "20", *options)
    answer = result_of(capsys, "evaluate", folder)
    assert answer["accuracy"] > 0.9
    assert answer["confusion_matrix"] == read(folder / "report.json")["test"]["confusion_matrix"]
    outputs = read(folder / "config.json")["network"]["sizes"][-1]
    assert outputs == (1 if "binary_cross_entropy" in options else 2)
    code = run("predict", folder, "--data", "breast_cancer", "--out", tmp_path / "p.npz", "--proba")
    assert code == (2 if {"huber", "mae"} & set(options) else 0)
    if code == 0:
        with np.load(tmp_path / "p.npz") as found:
            assert (found["probabilities"].argmax(axis=1) == found["predictions"]).all()
            assert found["classes"].tolist() == [0, 1]


def test_a_run_that_was_moved_still_answers(species, tmp_path):
    (tmp_path / "moved/checkpoints").mkdir(parents=True)
    for path in ("config.json", "checkpoints/model.safetensors"):
        (tmp_path / "moved" / path).write_bytes((species / path).read_bytes())
    bare = flowers(tmp_path / "bare.csv", 5, with_label=False)
    predicted(tmp_path / "out.csv", tmp_path / "moved", "--data", bare)


# A call, its exit code, and a part of the error. RUN stands for a run, BARE for a table without labels.
WRONG = {
    "no run": (["evaluate", "nowhere"], 1, "there is no such folder"),
    "weights": (["evaluate", "RUN", "--weights", "bset"], 2, "--weights: unknown name 'bset'; did you mean 'best'"),
    "no data to read": (["evaluate", "RUN", "--sep", ";"], 2, "--sep: it tells how --data is read; give --data too"),
    "no data to explain": (["explain", "RUN", "--sheet", "a"], 2, "--sheet: it tells how --data is read"),
    "backend": (["evaluate", "RUN", "--backend", "nunpy"], 2, "did you mean 'numpy'"),
    "no labels": (["evaluate", "RUN", "--data", "BARE"], 1, "no target column 'species'"),
    "other data": (["evaluate", "RUN", "--data", "iris"], 1, "4 features a row, and training had 3"),
    "format": (["predict", "RUN", "--data", "BARE", "--out", "x.txt"], 2, "--out: expected a file name ending in .csv"),
    "no folder": (["predict", "RUN", "--data", "BARE", "--out", "no/x.csv"], 2, "there is no folder 'no'"),
    "no data": (["predict", "RUN", "--data", "x.csv", "--out", "y.csv"], 1, "there is no file or folder 'x.csv'"),
    "no out": (["predict", "RUN", "--data", "BARE"], 2, "Missing option"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_call_says_what_is_wrong(species, arguments, code, words, tmp_path, monkeypatch, capsys):
    bare = flowers(tmp_path / "bare.csv", 5, with_label=False)
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(species), "BARE": str(bare)}
    assert run(*(places.get(word, word) for word in arguments)) == code
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [bare]


def test_changed_data_are_no_test_rows_any_more(tmp_path, capsys):
    table = flowers(tmp_path / "flowers.csv", 60)
    folder = trained(tmp_path / "run", table, "--target", "species", "--epochs", "1")
    flowers(table, 60, seed=9)
    assert "have changed since the training" in refusal(capsys, "evaluate", folder, code=1)


def test_the_test_set_that_comes_with_the_data(tmp_path, capsys):
    generator = np.random.default_rng(0)
    arrays = {"x_train": generator.normal(size=(50, 2, 2)), "x_test": generator.normal(size=(7, 2, 2))}
    arrays |= {"y_train": np.arange(50) % 3, "y_test": np.array([0, 1, 2, 0, 1, 2, 0])}
    np.savez(tmp_path / "data.npz", **arrays)
    folder = trained(tmp_path / "run", tmp_path / "data.npz", "--epochs", "1", "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["test"]["rows"] == 7
    data = read(folder / "config.json")["data"]
    assert (data["training_rows"], data["validation_rows"], data["test_rows"]) == (45, 5, 7)


def test_the_same_rows_are_held_out_whatever_else_is_asked():
    plain = prepared_data(TrainOptions(data="wine"))
    other = prepared_data(TrainOptions(data="wine", validation_fraction=0.3, loss="mse", scale="none", hidden=["none"]))
    assert np.array_equal(plain.test.labels, other.test.labels)
    assert other.network.layers == 1
    assert len(plain.test) == 36
    assert plain.validation is not None
    assert len(plain.train) + len(plain.validation) + len(plain.test) == 178
