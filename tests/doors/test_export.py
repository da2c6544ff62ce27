"""``fusemlp export``: its files predict the same from raw features as ``fusemlp predict``."""

import json
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors import safe_open

import fusemlp
from fusemlp import cli
from fusemlp.datasets.preprocessing import Preprocessor

Array = np.ndarray[Any, Any]


def run(*arguments):
    """Return the exit code of ``fusemlp`` with these arguments."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def table(path, *, words=False):
    """Write a table with two numbers far from zero, maybe a word, a label in words and a value in its own units."""
    generator = np.random.default_rng(0)
    kind = generator.integers(0, 3, 90)
    columns = generator.normal(np.stack([100.0 + 10.0 * kind, -5.0 * kind], axis=1), 1.0)
    lines = ["height,width,species,price" + (",colour" if words else "")]
    for k, (height, width) in zip(kind, columns, strict=True):
        colour = f",{('white', 'red')[k % 2]}" if words else ""
        lines.append(f"{height:.3f},{width:.3f},{('daisy', 'rose', 'tulip')[k]},{900.0 + 50.0 * k:.1f}{colour}")
    path.write_text("\n".join(lines) + "\n")
    return path


def columns(path, *names):
    header, *rows = [line.split(",") for line in path.read_text().splitlines()]
    return [[row[header.index(name)] for name in names] for row in rows]


def trained(folder, target, *options, words=False):
    data = table(folder / "data.csv", words=words)
    # Leave the other target out of the features.
    header, *rows = [line.split(",") for line in data.read_text().splitlines()]
    left_out = header.index({"species": "price", "price": "species"}[target])
    kept = [",".join(cell for k, cell in enumerate(row) if k != left_out) for row in (header, *rows)]
    data.write_text("\n".join(kept) + "\n")
    arguments = ("train", data, "--target", target, "--epochs", "10", "--lr", "0.02", "--quiet", *options)
    assert run(*arguments, "--out", folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def species(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("species"), "species")


def infer(path, X):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": X.astype(np.float32)}), strict=True))


def test_labels_from_raw_features(species, tmp_path, capsys):
    assert run("export", species, "--onnx", tmp_path / "m.onnx") == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == [
        f"onnx {tmp_path / 'm.onnx'}",
        "  takes the 2 features as they are in the data, gives labels of the data",
    ]
    data = species.parent / "data.csv"
    arguments = ("predict", species, "--data", data, "--out", tmp_path / "said.csv", "--proba")
    assert run(*arguments) == 0
    said = infer(tmp_path / "m.onnx", np.array(columns(data, "height", "width"), float))
    names = ("daisy", "rose", "tulip")
    assert [[label] for label in said["prediction"]] == columns(tmp_path / "said.csv", "prediction")
    expected = np.array(columns(tmp_path / "said.csv", *(f"probability_{name}" for name in names)), float)
    np.testing.assert_allclose(said["probabilities"], expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--loss", "poisson"),
        *(("--scale", scale) for scale in ("piecewise", "quantile", "standard", "minmax", "none")),
        ("--models", "1", "--log-target"),
    ],
    ids=" ".join,
)
def test_values_in_original_units_from_raw_features(options, tmp_path):
    folder = trained(tmp_path, "price", "--task", "regression", *options)
    assert run("export", folder, "--onnx", tmp_path / "m.onnx") == 0
    data = tmp_path / "data.csv"
    assert run("predict", folder, "--data", data, "--out", tmp_path / "said.csv") == 0
    said = infer(tmp_path / "m.onnx", np.array(columns(data, "height", "width"), float))
    expected = np.array(columns(tmp_path / "said.csv", "prediction"), float)[:, 0]
    np.testing.assert_allclose(said["prediction"], expected, rtol=1e-5)


def test_both_files_and_what_they_take(species, tmp_path, capsys):
    files = ("--onnx", tmp_path / "m.onnx", "--safetensors", tmp_path / "m.safetensors")
    assert run("export", species, *files, "--bare") == 0
    shown = capsys.readouterr().out.splitlines()
    takes = (
        "  takes 2 columns as the run scales them (robust), gives class indices; its metadata entry 'preprocessor' "
        "has the scaling"
    )
    assert shown == [f"onnx {files[1]}", takes, f"safetensors {files[3]}", takes]
    with safe_open(files[3], framework="numpy") as file:
        preprocessor = Preprocessor.from_json(file.metadata()["preprocessor"])
    props = onnx.load(files[1]).metadata_props
    assert Preprocessor.from_json({prop.key: prop.value for prop in props}["preprocessor"]) == preprocessor
    raw = np.array(columns(species.parent / "data.csv", "height", "width"), float)
    engine = fusemlp.load(files[3])
    X = preprocessor.transform_features(raw)
    said = infer(tmp_path / "m.onnx", X)
    np.testing.assert_allclose(said["probabilities"], engine.predict_proba(X), atol=1e-5)
    np.testing.assert_array_equal(said["prediction"], engine.predict(X))


def test_for_machines(species, tmp_path, capsys):
    assert run("export", species, "--onnx", tmp_path / "m.onnx", "--weights", "best", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "run": str(species),
        "weights": "best",
        "onnx": str(tmp_path / "m.onnx"),
        "safetensors": None,
        "onnx_input": "features",
    }


def test_a_run_with_words_takes_an_input_for_each_feature(tmp_path, capsys):
    folder = trained(tmp_path, "species", words=True)
    capsys.readouterr()
    assert run("export", folder, "--onnx", tmp_path / "m.onnx") == 0
    takes = "takes the 3 features as they are in the data, an input (rows, 1) for each, words as strings"
    assert f"  {takes}, gives labels of the data\n" in capsys.readouterr().out
    # A missing number, a missing word and an unseen one.
    (tmp_path / "new.csv").write_text("colour,width,height\nred,-5,110.5\n,NA,100\nteal,-10,?\nNA,0,120\n")
    assert run("predict", folder, "--data", tmp_path / "new.csv", "--out", tmp_path / "said.csv", "--proba") == 0
    given = {
        "colour": np.array([["red"], [""], ["teal"], ["NA"]], object),
        "width": np.array([[-5], [np.nan], [-10], [0]], np.float32),
        "height": np.array([[110.5], [100], [np.nan], [120]], np.float32),
    }
    said = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(["prediction", "probabilities"], given)
    names = ("daisy", "rose", "tulip")
    assert [[label] for label in said[0]] == columns(tmp_path / "said.csv", "prediction")
    expected = np.array(columns(tmp_path / "said.csv", *(f"probability_{name}" for name in names)), float)
    np.testing.assert_allclose(said[1], expected, atol=1e-5)
    capsys.readouterr()
    assert run("export", folder, "--onnx", tmp_path / "m.onnx", "--force", "--json") == 0
    assert json.loads(capsys.readouterr().out)["onnx_input"] == "one input a feature"
    assert run("export", folder, "--onnx", tmp_path / "bare.onnx", "--bare") == 0
    assert infer(tmp_path / "bare.onnx", np.zeros((3, 4)))["probabilities"].shape == (3, 3)


# Arguments after ``export RUN``, the exit code, and a part of the error.
WRONG = {
    "nothing": ([], 2, "--onnx: say what to write: --onnx FILE, --safetensors FILE, or both"),
    "suffix": (["--onnx", "m.pt"], 2, "--onnx: expected a file name ending in .onnx, got 'm.pt'"),
    "other suffix": (["--safetensors", "m.onnx"], 2, "--safetensors: expected a file name ending in .safetensors"),
    "no folder": (["--onnx", "nowhere/m.onnx"], 2, "--onnx: there is no folder 'nowhere'"),
    "exists": (["--onnx", "there.onnx"], 2, "'there.onnx' exists; give another name, or --force"),
    "weights": (["--onnx", "m.onnx", "--weights", "bets"], 2, "--weights: unknown name 'bets'; did you mean 'best'"),
    "bare alone": (["--safetensors", "m.safetensors", "--bare"], 2, "--bare: it is for --onnx FILE"),
    "no path": (["--onnx"], 2, "requires an argument"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_call_says_what_is_wrong(arguments, code, words, species, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.onnx").write_text("old")
    assert run("export", species, *arguments) == code
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]
    assert (tmp_path / "there.onnx").read_text() == "old"


def test_what_is_no_run(tmp_path, capsys):
    assert run("export", tmp_path, "--onnx", tmp_path / "m.onnx") == 1
    assert "is not a run folder" in capsys.readouterr().err


def test_force_overwrites(species, tmp_path):
    (tmp_path / "m.onnx").write_text("old")
    assert run("export", species, "--onnx", tmp_path / "m.onnx", "--force") == 0
    assert "prediction" in infer(tmp_path / "m.onnx", np.zeros((1, 2)))
