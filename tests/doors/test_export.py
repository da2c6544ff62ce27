"""``fusemlp export``: its files predict the same from raw features as ``fusemlp predict``."""

import numpy as np
import onnx
import onnxruntime
import pandas
import pytest
from graphs import graph_outputs
from safetensors import safe_open

import fusemlp
from fusemlp.datasets.preprocessing import Preprocessor
from make import output_of, refusal, result_of, run, trained

# Two numbers and, with the word, three features.
NUMBERS = ("--drop", "day", "--drop", "word", "--epochs", "10", "--lr", "0.02", "--quiet")
WORDS = ("--drop", "day", "--epochs", "10", "--lr", "0.02", "--quiet")


def columns(path, *names):
    return pandas.read_csv(path)[list(names)].to_numpy()


def predicted(folder, data, out, *options):
    """Return what ``fusemlp predict`` answers: predictions and probabilities."""
    assert run("predict", folder, "--data", data, "--out", out, *options) == 0
    answers = pandas.read_csv(out)
    return answers["prediction"].to_numpy(), answers.iloc[:, 1:].to_numpy()


@pytest.fixture(scope="module")
def species(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("species"), *NUMBERS, target="species", classes=3)


def test_labels_from_raw_features(species, tmp_path, capsys):
    path, data = tmp_path / "m.onnx", species.parent / "data.csv"
    assert run("export", species, "--onnx", path) == 0
    takes = "  takes the 2 features as they are in the data; gives labels of the data"
    assert capsys.readouterr().out.splitlines() == [f"onnx {path}", takes]
    labels, probabilities = predicted(species, data, tmp_path / "said.csv", "--proba")
    said = graph_outputs(path, columns(data, "a", "b"))
    assert said["prediction"].tolist() == labels.tolist()
    np.testing.assert_allclose(said["probabilities"], probabilities, atol=1e-5)
    assert "--force" in refusal(capsys, "export", species, "--onnx", path)
    printed = {"run": str(species), "weights": "best", "onnx": str(path), "safetensors": None}
    found = result_of(capsys, "export", species, "--onnx", path, "--force", "--weights", "best")
    assert found == {**printed, "onnx_input": "features"}


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
    folder = trained(tmp_path, *NUMBERS, *options)
    assert run("export", folder, "--onnx", tmp_path / "m.onnx") == 0
    values, _ = predicted(folder, tmp_path / "data.csv", tmp_path / "said.csv")
    said = graph_outputs(tmp_path / "m.onnx", columns(tmp_path / "data.csv", "a", "b"))
    # sums in float32 of numbers like the largest value
    np.testing.assert_allclose(said["prediction"], values, rtol=1e-5, atol=1e-6 * np.abs(values).max())


def test_both_files_and_what_they_take(species, tmp_path, capsys):
    files = ("--onnx", tmp_path / "m.onnx", "--safetensors", tmp_path / "m.safetensors")
    shown = output_of(capsys, "export", species, *files, "--bare").splitlines()
    takes = (
        "  takes 2 columns as the run scales them (robust), gives class indices; its metadata entry 'preprocessor' "
        "has the scaling"
    )
    assert shown == [f"onnx {files[1]}", takes, f"safetensors {files[3]}", takes]
    with safe_open(files[3], framework="numpy") as file:
        preprocessor = Preprocessor.from_json(file.metadata()["preprocessor"])
    props = onnx.load(files[1]).metadata_props
    assert Preprocessor.from_json({prop.key: prop.value for prop in props}["preprocessor"]) == preprocessor
    engine = fusemlp.load(files[3])
    X = preprocessor.transform_features(columns(species.parent / "data.csv", "a", "b"))
    said = graph_outputs(tmp_path / "m.onnx", X)
    np.testing.assert_allclose(said["probabilities"], engine.predict_proba(X), atol=1e-5)
    np.testing.assert_array_equal(said["prediction"], engine.predict(X))


def test_a_run_with_words_takes_an_input_for_each_feature(tmp_path, capsys):
    folder = trained(tmp_path, *WORDS, target="species", classes=3)
    capsys.readouterr()
    assert run("export", folder, "--onnx", tmp_path / "m.onnx") == 0
    takes = "takes the 3 features as they are in the data, an input (rows, 1) for each, words as strings"
    assert f"  {takes}; gives labels of the data\n" in capsys.readouterr().out
    # A missing number, a missing word and an unseen one.
    (tmp_path / "new.csv").write_text("word,b,a\nx,-1,1.5\n,NA,0.5\nteal,-0.5,?\nNA,0,-1\n")
    labels, probabilities = predicted(folder, tmp_path / "new.csv", tmp_path / "said.csv", "--proba")
    given = {
        "word": np.array([["x"], [""], ["teal"], ["NA"]], object),
        "b": np.array([[-1], [np.nan], [-0.5], [0]], np.float32),
        "a": np.array([[1.5], [0.5], [np.nan], [-1]], np.float32),
    }
    said = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(["prediction", "probabilities"], given)
    assert said[0].tolist() == labels.tolist()
    np.testing.assert_allclose(said[1], probabilities, atol=1e-5)
    found = result_of(capsys, "export", folder, "--onnx", tmp_path / "m.onnx", "--force")
    assert found["onnx_input"] == "one input a feature"
    assert run("export", folder, "--onnx", tmp_path / "bare.onnx", "--bare") == 0
    assert graph_outputs(tmp_path / "bare.onnx", np.zeros((3, 5)))["probabilities"].shape == (3, 3)


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
    assert "is not a run folder" in refusal(capsys, "export", tmp_path, "--onnx", tmp_path / "m.onnx", code=1)
