"""Several labels a row: columns of yes and no by the command, y (n, labels) by the estimator."""

import json

import numpy as np
import onnxruntime
import pandas
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from fusemlp.sklearn import TableClassifier, TableRegressor
from fusemlp_kernels.errors import ArgumentError, DataError
from make import read, refusal, run, words

# each label with its words
LABELS = {"red": ("yes", "no"), "round": ("1", "0"), "ripe": ("True", "False")}
OPTIONS = {"models": 1, "epochs": 40, "scale": "robust", "backend": "numpy"}


def fruit(count=240):
    """Return a table, its labels as words, and as numbers."""
    random = np.random.default_rng(0)
    X = random.normal(size=(count, 3))
    codes = (X @ random.normal(size=(3, 3)) + random.normal(size=(count, 3)) / 3 > [0, 0.5, -0.5]).astype(int)
    spelled = {name: np.where(codes[:, at], *LABELS[name]) for at, name in enumerate(LABELS)}
    frame = pandas.DataFrame(X, columns=["a", "b", "c"]).assign(kind=random.choice(["x", "y"], count))
    return frame, pandas.DataFrame(spelled), codes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a table and of a run that was trained on it."""
    folder = tmp_path_factory.mktemp("fruit")
    frame, spelled, _ = fruit()
    frame.join(spelled).to_csv(folder / "a.csv", index=False)
    options = ("--target", ",".join(LABELS), *words(**OPTIONS), "--quiet", "--out", folder / "run")
    assert run("train", folder / "a.csv", *options) == 0
    return folder


def test_a_run_is_judged_label_by_label(trained, capsys):
    codes, path = fruit()[2], trained / "p.csv"
    report, page = read(trained / "run" / "report.json"), (trained / "run" / "report.html").read_text()
    test, baselines = report["test"], report["baselines"]
    assert report["task"] == "multilabel" and list(test["targets"]) == list(LABELS)
    for figure in ("accuracy", "f1", "auc"):
        assert test[figure] == pytest.approx(np.mean([scores[figure] for scores in test["targets"].values()]))
    assert min(test["accuracy"], baselines["linear"]["accuracy"]) > baselines["constant"]["accuracy"] > 0.4
    assert (
        "scores of each target" in page
        and "probability of each label" in page
        and "of the labels of 48 test rows" in page
    )
    assert run("predict", trained / "run", "--data", trained / "a.csv", "--out", path, "--proba", "--force") == 0
    table = pandas.read_csv(path)
    said, chances = (table[[f"{part}_{name}" for name in LABELS]].to_numpy() for part in ("prediction", "probability"))
    assert np.array_equal(said, chances > 0.5) and said.dtype == np.int64
    capsys.readouterr()
    assert run("evaluate", trained / "run", "--data", trained / "a.csv", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["subset_accuracy"] == pytest.approx(accuracy_score(codes, said))
    assert scores["accuracy"] == pytest.approx(np.mean(codes == said))
    assert scores["f1"] == pytest.approx(f1_score(codes, said, average="macro"))
    assert scores["targets"]["ripe"]["f1"] == pytest.approx(f1_score(codes[:, 2], said[:, 2]))
    assert scores["targets"]["ripe"]["auc"] == pytest.approx(roc_auc_score(codes[:, 2], chances[:, 2]), abs=1e-6)


@pytest.mark.parametrize("options", [(), ("--method", "integrated", "--class", "ripe")])
def test_a_label_is_explained(options, trained, capsys):
    assert run("explain", trained / "run", *options, "--json") == 0
    columns = {row["column"]: row["importance"] for row in json.loads(capsys.readouterr().out)["columns"]}
    assert columns.keys() == {"a", "b", "c", "kind"} and min(columns, key=columns.get) == "kind"


def test_the_estimator_is_the_command(trained, tmp_path):
    frame, spelled, codes = fruit()
    model = TableClassifier(**OPTIONS, test_fraction=0.2).fit(frame, spelled)
    opened = TableClassifier.from_run(trained / "run")
    saved = tmp_path / "m.safetensors"
    model.save(saved)
    model.to_onnx(tmp_path / "m.onnx")
    for other in (opened, TableClassifier.load(saved)):
        assert np.array_equal(other.predict_proba(frame), model.predict_proba(frame))
    assert list(model.classes_) == list(opened.classes_) == list(LABELS)
    assert model.score(frame, codes) == accuracy_score(codes, model.predict(frame)) > 0.5
    feed = {name: frame[[name]].to_numpy(object if name == "kind" else np.float32) for name in frame}
    names = ("prediction", "probabilities")
    said, chances = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(names, feed)
    assert np.array_equal(said, model.predict(frame))
    assert np.allclose(chances, model.predict_proba(frame), rtol=0, atol=1e-5)
    with pytest.raises(ArgumentError, match="coverage: several labels a row have no sets"):
        model.predict_set(frame)
    with pytest.raises(ArgumentError, match=r"run: .* is of a multilabel, and TableRegressor is for a regression"):
        TableRegressor.from_run(trained / "run")


def test_several_models_are_merged_and_a_missing_label_weighs_nothing():
    frame, _, codes = fruit()
    merged = TableClassifier(**OPTIONS | {"models": 3}).fit(frame, codes)
    assert merged.temperature_ == 1.0 and merged.predict(frame).shape == codes.shape
    gaps = codes.astype(float)
    gaps[::3, 1] = np.nan
    model = TableClassifier(**OPTIONS).fit(frame, gaps)
    assert "missing targets, which weigh nothing: 80 in '1'" in model.notes_
    assert np.mean(codes == model.predict(frame)) > 0.7
    filled = TableClassifier(**OPTIONS).fit(frame, np.nan_to_num(gaps))
    assert not np.array_equal(filled.predict_proba(frame), model.predict_proba(frame))


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("red,round", ("--loss", "mse"), "--loss: 'mse' is not for several labels a row; leave it out"),
        ("red,round", ("--class-weight", "balanced"), "--class-weight: only classes, one a row, have weights"),
        ("red,round", ("--log-target",), "--log-target: only numbers have logarithms"),
        ("red,kind", (), "numbers, or yes and no, and it holds words such as 'x'; train a run for each"),
        ("red,a", ("--task", "classification"), "several labels are 0 or 1 each, yes or no, true or false; found"),
        ("red", ("--task", "multilabel"), "multilabel takes several targets"),
    ],
)
def test_other_trainings_are_refused(target, options, message, trained, capsys):
    assert run("train", trained / "a.csv", "--target", target, *options, "--out", trained / "new") > 0
    assert message in capsys.readouterr().err and not (trained / "new").exists()


def test_an_interval_is_refused(trained, capsys):
    files = ("--data", trained / "a.csv", "--out", trained / "i.csv")
    assert "--proba writes" in refusal(capsys, "predict", trained / "run", *files, "--interval", "0.9")


def test_numbers_beside_labels_are_a_regression(trained):
    frame, spelled, _ = fruit()
    out = trained / "numbers"
    assert run("train", trained / "a.csv", "--target", "a,red", *words(**OPTIONS), "--quiet", "--out", out) == 0
    assert read(out / "report.json")["task"] == "regression"
    with pytest.raises(DataError, match=r"y: several labels are 0 or 1 each, .* found 2"):
        TableClassifier(**OPTIONS).fit(frame, spelled.assign(red=2, round=1, ripe=1))
