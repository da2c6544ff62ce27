"""``train`` and ``predict`` with the losses quantiles and gaussian: columns in the units of the data, or a refusal."""

import re

import numpy as np
import onnxruntime
import pandas
import pytest
from fusemlp.losses import GaussianNLL, Quantiles
from scipy.stats import norm

from fusemlp.engine import load_checkpoint
from fusemlp.fleet.results import members
from fusemlp.report.metrics import distribution
from fusemlp.report.runs import Run, weights_path
from fusemlp.sklearn import TableRegressor
from fusemlp_kernels.errors import ArgumentError
from make import read, run

QUIET = ("--quiet", "--epochs", "30", "--target")
PRICE = (*QUIET, "price")


def houses(count, seed):
    """Return a table, and the mean and the deviation of its normal prices."""
    random = np.random.default_rng(seed)
    size, old = random.uniform(50, 150, count), random.choice(["new", "old"], count)
    mean = 1000.0 + 20 * size - 300 * (old == "old")
    std = 2 * size - 60
    table = pandas.DataFrame({"size": size, "age": old, "price": mean + std * random.normal(size=count)})
    return table, mean, std


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("houses")
    houses(1500, 0)[0].to_csv(folder / "train.csv", index=False)
    houses(400, 1)[0].to_csv(folder / "new.csv", index=False)
    for loss in ("quantiles", "gaussian"):
        assert run("train", folder / "train.csv", *PRICE, "--loss", loss, "--out", folder / loss) == 0
    return folder


def predicted(folder, name, *options):
    path = folder / f"{name}.csv"
    assert run("predict", folder / name, "--data", folder / "new.csv", "--out", path, "--force", *options) == 0
    return pandas.read_csv(path)


def test_predict_writes_quantiles_in_the_units_of_the_data(folder):
    _, mean, std = houses(400, 1)
    columns = predicted(folder, "quantiles", "--interval", "0.9")
    assert list(columns) == ["q10", "q50", "q90", "low", "high"]
    assert (np.diff(columns[["q10", "q50", "q90"]], axis=1) >= 0).all()
    for name, level in (("q10", 0.1), ("q50", 0.5), ("q90", 0.9)):
        # about 1000 training rows
        assert np.sqrt(np.mean(((columns[name] - mean) / std - norm.ppf(level)) ** 2)) < 0.4
    assert ((columns["low"] < columns["q50"]) & (columns["q50"] < columns["high"])).all()
    path = folder / "quantiles.npz"
    assert run("predict", folder / "quantiles", "--data", folder / "new.csv", "--out", path, "--force") == 0
    with np.load(path) as arrays:
        np.testing.assert_allclose(arrays["predictions"], columns["q50"])
        np.testing.assert_allclose(arrays["q90"], columns["q90"])


def test_predict_writes_mean_and_deviation(folder):
    _, mean, std = houses(400, 1)
    columns = predicted(folder, "gaussian")
    assert list(columns) == ["mean", "std"]
    assert np.sqrt(np.mean(((columns["mean"] - mean) / std) ** 2)) < 0.4
    assert np.sqrt(np.mean(((columns["std"] - std) / std) ** 2)) < 0.4


@pytest.mark.parametrize("loss, described", [("quantiles", Quantiles()), ("gaussian", GaussianNLL())])
def test_the_run_is_judged_explained_and_goes_on(folder, loss, described, tmp_path, capsys):
    report, table = read(folder / loss / "report.json"), folder / "train.csv"
    assert report["test"]["r2"] > 0.9 and 0.7 < report["intervals"]["coverage"] <= 1
    assert load_checkpoint(weights_path(Run(folder / loss), "model")).loss == described
    assert run("evaluate", folder / loss, "--certify", "0.01") == 0
    assert run("explain", folder / loss, "--data", table, "--method", "integrated", "--out", tmp_path / "e.csv") == 0
    assert (
        run("train", table, *PRICE, "--loss", loss, "--final-fit", "--from", folder / loss, "--out", tmp_path / "f")
        == 0
    )
    assert "final_fit" in read(tmp_path / "f" / "report.json")
    capsys.readouterr()


@pytest.mark.parametrize("loss, names", [("quantiles", ["q10", "q50", "q90"]), ("gaussian", ["mean", "std"])])
def test_the_graph_predicts_as_the_command(folder, loss, names, tmp_path):
    assert run("export", folder / loss, "--onnx", tmp_path / "m.onnx") == 0
    columns, table = predicted(folder, loss), houses(400, 1)[0]
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    cells = {"size": table[["size"]].to_numpy(np.float32), "age": table[["age"]].to_numpy(object)}
    outputs = session.run(["prediction"] if loss == "quantiles" else ["prediction", "std"], cells)
    # columns of the graph are float32, and sizes have a distance of 100 beside a deviation of 30
    np.testing.assert_allclose(np.column_stack(outputs), columns[names], rtol=1e-5)


def test_each_quantile_is_scored_beside_the_constant_one(folder, capsys):
    report = read(folder / "quantiles" / "report.json")
    scores, constant = report["test"]["quantiles"], report["baselines"]["constant"]["quantiles"]
    assert list(scores) == list(constant) == ["q10", "q50", "q90"]
    for name, level in (("q10", 0.1), ("q50", 0.5), ("q90", 0.9)):
        assert scores[name]["pinball"] < 0.5 * constant[name]["pinball"]
        # 300 test rows: four standard errors, and as much for the fit
        error = 8 * np.sqrt(level * (1 - level) / 300)
        assert abs(scores[name]["below"] - level) < error and abs(constant[name]["below"] - level) < error
    # of the median it is half of the mean absolute error
    assert scores["q50"]["pinball"] == pytest.approx(report["test"]["mae"] / 2, rel=1e-5)
    assert run("evaluate", folder / "quantiles") == 0
    assert re.search(r"test q10: pinball \S+, \d+\.\d% of the targets below", capsys.readouterr().out)
    page = (folder / "quantiles" / "report.html").read_text()
    assert "scores of each quantile" in page and "targets below" in page


REFUSED = {
    "log": (("--loss", "gaussian", "--log-target"), "log-target: the loss gaussian learns the deviation of the target"),
    "other option": (("--loss", "gaussian", "--quantile", "0.1"), "quantile: only quantile and quantiles have it"),
    "order": (("--loss", "quantiles", "--quantile", "0.9,0.1"), "quantile: expected at least one number, in rising"),
    "several": (("--loss", "quantile", "--quantile", "0.1,0.9"), "quantile: the loss quantile learns one; for several"),
    "private": (("--loss", "gaussian", "--dp-epsilon", "3"), "loss: gaussian is not supported yet with privacy"),
    "members": (("--loss", "quantiles", "--preset", "tabm"), "loss: quantiles takes a network without members"),
    "classes": (("--loss", "gaussian"), "loss: 'gaussian' is for numbers, and the target holds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_no_folder(folder, name, tmp_path, capsys):
    options, words = REFUSED[name]
    target = ("age",) if name == "classes" else ("price",)
    assert run("train", folder / "train.csv", *QUIET, *target, *options, "--out", tmp_path / "run") == 2
    assert f"error: --{words}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_the_estimator(tmp_path):
    table, mean, std = houses(1000, 0)
    X, y = table[["size", "age"]], table["price"]
    bands = TableRegressor(loss=Quantiles([0.2, 0.8]), epochs=10).fit(X, y)
    quantiles = bands.predict_quantiles(X)
    assert quantiles.shape == (1000, 2) and (quantiles[:, 0] <= quantiles[:, 1]).all()
    # the first is as near to the median as the second
    np.testing.assert_allclose(bands.predict(X), quantiles[:, 0])
    bands.save(tmp_path / "m.safetensors")
    np.testing.assert_allclose(TableRegressor.load(tmp_path / "m.safetensors").predict_quantiles(X), quantiles)
    normal = TableRegressor(loss="gaussian", epochs=30, metric="rmse").fit(X, np.column_stack([y, -2 * y]))
    centre, spread = normal.predict(X, return_std=True)
    assert centre.shape == spread.shape == (1000, 2)
    assert np.array_equal(centre, normal.predict(X))
    assert np.sqrt(np.mean(((spread / [1, 2]).T / std - 1) ** 2)) < 0.4
    assert np.sqrt(np.mean(((centre / [1, -2]).T - mean) ** 2 / std**2)) < 0.4
    with pytest.raises(ArgumentError, match="loss: expected 'quantiles', the model was trained with 'gaussian'"):
        normal.predict_quantiles(X)


@pytest.mark.parametrize("hidden", [(), (16,), (16, 8)])
def test_an_ensemble_has_the_deviation_of_the_mixture(hidden, tmp_path):
    table = houses(300, 0)[0]
    X, Y = table[["size"]], table[["price"]].assign(double=2 * table["price"] + 100 * (table["age"] == "old"))
    options = {"loss": "gaussian", "models": 3, "epochs": 20, "scale": "robust", "random_state": 0}
    model = TableRegressor(hidden=hidden, **options).fit(X, Y)
    mean, std = model.predict(X, return_std=True)
    model.to_onnx(tmp_path / "m.onnx")
    graph = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    drawn = graph.run(["prediction", "std"], {"x": X.to_numpy(np.float32)})
    assert np.allclose(drawn, (mean, std), rtol=1e-4)
    model.save(tmp_path / "m.safetensors")
    assert np.array_equal(TableRegressor.load(tmp_path / "m.safetensors").predict(X, return_std=True)[1], std)
    if hidden:
        inputs = model._inputs(X)
        parts = [distribution(part, model.preprocessor_, inputs) for part in members(model.engine_)]
        means, stds = (np.array([part[name] for part in parts]) for name in ("mean", "std"))
        assert np.allclose(mean, means.mean(axis=0), rtol=1e-5)
        assert np.allclose(std, np.sqrt(np.mean(stds**2, axis=0) + means.var(axis=0)), rtol=1e-4)
        assert (std > stds.mean(axis=0)).all()
