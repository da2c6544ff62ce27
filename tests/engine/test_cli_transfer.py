"""``fusemlp train --from RUN``: a run that starts from another one."""

import json
import shutil

import numpy as np
import pandas
import pytest
from sklearn.datasets import load_digits

from fusemlp import load, load_checkpoint
from make import QUICK, assert_same, read, refusal, run

# the command line prints them, and most sources here were trained on the same rows
pytestmark = pytest.mark.filterwarnings("default:.*training rows of|.*held out rows|.*weigh rows")
FEW = 60


def table(path, count, seed, *, gap=0.0, target="price", **more):
    """Write five numbers, a word, and a target that depends on them in a way that takes many rows to learn."""
    random, same = np.random.default_rng(seed), np.random.default_rng(42)
    numbers, zones = random.normal(size=(count, 5)), random.integers(0, 3, count)
    values = np.tanh(numbers @ same.normal(size=(5, 6))) @ same.normal(size=6) + np.array([-1.0, 0.0, 1.0])[zones]
    values = (1 - gap) * values + gap * values**2 + gap
    frame = pandas.DataFrame(numbers, columns=[*"abcde"]).assign(zone=np.array([*"xyz"])[zones])
    frame[target] = np.where(values > 0, "high", "low") if target == "level" else values
    frame.assign(**more).round(4).to_csv(path, index=False)
    return path


def arrays_of(folder):
    return load_checkpoint(folder / "checkpoints/model.safetensors").state_dict()


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """The run of a large table: one model of 32 units, whose numbers are not cut into pieces."""
    folder = tmp_path_factory.mktemp("transfer")
    data = table(folder / "big.csv", 1500, 0)
    options = ("--hidden", "32", "--activation", "tanh", "--models", "1", "--lr", "0.01", "--scale", "robust")
    assert run("train", data, "--target", "price", *options, "--epochs", "60", "--quiet", "--out", folder / "big") == 0
    return folder / "big"


@pytest.fixture
def small(tmp_path):
    return table(tmp_path / "small.csv", FEW, 1, gap=0.05)


def test_transfer_to_few_rows_beats_a_training_from_scratch(big, small, tmp_path):
    test = table(tmp_path / "test.csv", 500, 2, gap=0.05)
    errors = []
    for name, options in (("scratch", ()), ("from", ("--from", big))):
        assert run("train", small, "--target", "price", *options, "--quiet", "--out", tmp_path / name) == 0
        assert run("predict", tmp_path / name, "--data", test, "--out", tmp_path / f"{name}.csv") == 0
        predicted, truth = pandas.read_csv(tmp_path / f"{name}.csv")["prediction"], pandas.read_csv(test)["price"]
        errors.append(np.sqrt(((predicted - truth) ** 2).mean()))
    assert errors[1] < 0.6 * errors[0]


def test_a_run_takes_over_preparation_layers_and_head(big, small, tmp_path, capsys):
    out = tmp_path / "run"
    options = ("--from", big, "--freeze", "1", "--layer-decay", "0.5", "--probe", "3", "--epochs", "4")
    assert run("train", small, *options, "--out", out) == 0
    said = capsys.readouterr().err
    assert f"from {big}: the preparation of the columns; hidden layers: 32 tanh; the output layer, since the" in said
    assert "\nfirst 1 of 2 layers frozen; the output layer alone is trained first, for up to 3 epochs; " in said
    assert "probe: val_loss " in said
    config, report, before = read(out / "config.json"), read(out / "report.json"), read(big / "config.json")
    about = {"run": str(big), "layers": 2, "of_layers": 2, "new_output_layer": None}
    assert report["from"] == config["from"] == {**about, "freeze": 1, "probe": 3, "layer_decay": 0.5}
    prepared, source = config["preprocessor"], before["preprocessor"]
    assert all(prepared[name] == source[name] for name in source)
    assert config["network"]["sizes"] == [8, 32, 1]
    assert f"--from {big} --freeze 1 --layer-decay 0.5 --probe 3" in config["command"]
    # five models, whose hidden layers stand side by side, each with the bits of the source
    kept, found = arrays_of(big), arrays_of(out)
    np.testing.assert_array_equal(found["0.weight"], np.tile(kept["0.weight"], (5, 1)))
    assert not np.array_equal(found["2.weight"][:, :32] * 5, kept["2.weight"])


@pytest.mark.parametrize("classes", [False, True])
def test_the_model_of_the_run_is_judged_on_the_same_rows(classes, tmp_path, capsys):
    target = "level" if classes else "price"
    for name, rows, seed in (("old", 300, 0), ("new", FEW, 1), ("test", 200, 2)):
        table(tmp_path / f"{name}.csv", rows, seed, target=target, **({"b": 0.0} if name == "new" else {}))
    words = ("--quiet", "--test", tmp_path / "test.csv")
    assert (
        run("train", tmp_path / "old.csv", "--target", target, "--epochs", "20", *words, "--out", tmp_path / "a") == 0
    )
    # a rate that spoils it
    again = ("--from", tmp_path / "a", "--lr", "0.3", "--epochs", "2", "--out", tmp_path / "b")
    assert run("train", tmp_path / "new.csv", *again, *words) == 0
    said, report = capsys.readouterr().out, read(tmp_path / "b/report.json")
    before, earlier = read(tmp_path / "a/report.json")["test"], report["baselines"]["earlier"]
    assert earlier == pytest.approx({name: before[name] for name in earlier}, rel=1e-5)
    figure = "accuracy" if classes else "rmse"
    line = "he model it started from, on these rows: loss "
    assert line in said and f"warning: the model is worse than the earlier one: test {figure}" in said
    assert line in (tmp_path / "b/report.html").read_text()


@pytest.mark.parametrize("models", ["1", "2"])
def test_all_commands_take_such_a_run_without_its_source(big, small, tmp_path, models):
    source = tmp_path / "source"
    shutil.copytree(big, source)
    options = ("--from", source, "--models", models, "--probe", "2", "--final-fit", "--freeze", "1", "--quiet")
    assert run("train", small, *options, "--epochs", "3", "--out", tmp_path / "cut") == 0
    assert run("train", small, *options, "--epochs", "5", "--out", tmp_path / "whole") == 0
    shutil.rmtree(source)
    cut = tmp_path / "cut"
    assert run("train", "--resume", cut, "--epochs", "5", "--quiet") == 0
    assert_same(arrays_of(cut), arrays_of(tmp_path / "whole"))
    for words in (("evaluate", cut), ("evaluate", cut, "--data", small), ("report", cut)):
        assert run(*words) == 0
    assert run("predict", cut, "--data", small, "--out", tmp_path / "out.csv") == 0
    assert run("export", cut, "--safetensors", tmp_path / "m.safetensors") == 0
    assert load(tmp_path / "m.safetensors").network.sizes[0] == 8
    # the merged network can be a source in its turn
    assert run("train", small, "--from", cut, "--models", "1", "--epochs", "1", "--out", tmp_path / "next") == 0
    assert read(tmp_path / "next" / "config.json")["network"]["sizes"][1] == 32 * int(models)


@pytest.mark.parametrize(
    ("target", "options", "reason", "outputs"),
    [
        ("rent", (), "the target there is 'price'", 1),
        ("level", (), "the target there is 'price'", 2),
        ("price", ("--loss", "mae"), "the loss there is mse", 1),
        ("price", ("--task", "classification"), "the target there is of a regression", 2),
    ],
)
def test_another_target_gets_a_new_output_layer(big, tmp_path, target, options, reason, outputs):
    classes = {"price": np.arange(FEW) % 2} if "--task" in options else {}
    data = table(tmp_path / "data.csv", FEW, 1, target=target, **classes)
    words = ("--target", target, "--from", big, "--models", "1", "--epochs", "2", "--quiet", *options)
    assert run("train", data, *words, "--out", tmp_path / "run") == 0
    config = read(tmp_path / "run/config.json")
    assert (config["from"]["new_output_layer"], config["from"]["layers"]) == (reason, 1)
    assert config["network"]["sizes"] == [8, 32, outputs]
    assert config["preprocessor"]["target_shift"] != read(big / "config.json")["preprocessor"]["target_shift"]
    assert "earlier" not in read(tmp_path / "run/report.json")["baselines"]
    assert run("evaluate", tmp_path / "run") == 0


def test_the_same_classes_keep_their_output_layer(tmp_path):
    quick = ("--models", "1", "--epochs", "1", "--quiet")
    data = table(tmp_path / "data.csv", FEW, 1, target="level")
    assert run("train", data, "--target", "level", *quick, "--out", tmp_path / "a") == 0
    more = table(tmp_path / "more.csv", FEW, 2, target="level")
    assert run("train", more, "--from", tmp_path / "a", "--lr", "1e-60", *quick, "--out", tmp_path / "b") == 0
    assert read(tmp_path / "b" / "config.json")["from"]["new_output_layer"] is None
    assert_same(arrays_of(tmp_path / "a"), arrays_of(tmp_path / "b"))


def test_each_model_starts_from_its_part_of_an_ensemble(tmp_path, capsys):
    data = table(tmp_path / "data.csv", FEW, 1)
    three = ("--target", "price", "--models", "3", "--hidden", "8,6", *QUICK)
    assert run("train", data, *three, "--out", tmp_path / "a") == 0
    still = ("--lr", "1e-60", "--epochs", "1")
    for models, sizes, note in (
        (None, [24, 18], "3 models were merged there, and each of the 3 models starts from one\n"),
        ("2", [16, 12], "3 models were merged there, and each of the 2 models starts from one\n"),
        ("4", [32, 24], "3 models were merged there, and each of the 4 models starts from one\n"),
        ("1", [24, 18], "3 models were merged there, and the model starts from all of them\n"),
    ):
        out, options = tmp_path / str(models), () if models is None else ("--models", models)
        assert run("train", data, "--from", tmp_path / "a", *options, *still, "--out", out) == 0
        assert note in capsys.readouterr().err
        assert load_checkpoint(out / "checkpoints/model.safetensors").network.sizes[1:-1] == tuple(sizes)
    source, same, several = (arrays_of(tmp_path / name) for name in ("a", "None", "4"))
    for name, array in source.items():
        # the last layer is divided by the number of models, and multiplied by it
        np.testing.assert_allclose(same[name], array, rtol=3e-7, atol=1e-8)
    np.testing.assert_array_equal(several["0.weight"][-8:], source["0.weight"][:8])
    assert run("predict", tmp_path / "None", "--data", data, "--spread", "--out", tmp_path / "p.csv") == 0


def test_ids_and_groups_are_those_of_the_run_unless_given(tmp_path, capsys):
    names = np.array([f"n{row}" for row in range(FEW)])
    data = table(tmp_path / "data.csv", FEW, 1, customer=names, shop=np.char.add("s", names))
    with_shops = table(tmp_path / "shops.csv", FEW, 1, customer=names, shop=np.arange(FEW) // 4)
    quick = ("--models", "1", "--epochs", "1", "--quiet")
    columns = ("--id", "customer", "--group", "shop")
    assert run("train", with_shops, "--target", "price", *columns, *quick, "--out", tmp_path / "a") == 0
    for name, options, (ids, group) in (
        ("same", (), (["customer"], "shop")),
        ("other", ("--id", "shop", "--time", "a"), (["shop"], None)),
    ):
        assert run("train", data, "--from", tmp_path / "a", *options, *quick, "--out", tmp_path / name) == 0
        chosen = read(tmp_path / name / "config.json")["options"]
        assert (chosen["id"], chosen["group"]) == (ids, group)
    assert run("predict", tmp_path / "same", "--data", data, "--out", tmp_path / "p.csv") == 0
    assert pandas.read_csv(tmp_path / "p.csv")["customer"].tolist() == names.tolist()
    both = ("--target", "price, shop")
    assert run("train", with_shops, "--from", tmp_path / "a", *both, *quick, "--out", tmp_path / "both") == 0
    assert read(tmp_path / "both" / "config.json")["options"]["group"] is None
    without = table(tmp_path / "without.csv", FEW, 1)
    assert run("train", without, "--from", tmp_path / "a", *quick, "--out", tmp_path / "none") == 0
    expected = (
        f"warning: {without}: no column 'shop', by which {tmp_path / 'a'} held out rows: they are drawn at random"
    )
    assert expected in capsys.readouterr().err
    chosen = read(tmp_path / "none" / "config.json")["options"]
    assert (chosen["id"], chosen["group"]) == (None, None)


def test_weights_are_those_of_the_run_unless_given(tmp_path, capsys):
    weights = {"w": np.arange(FEW) % 3, "v": np.ones(FEW)}
    data, without = table(tmp_path / "data.csv", FEW, 1, **weights), table(tmp_path / "without.csv", FEW, 1)
    quick = ("--models", "1", "--epochs", "1", "--quiet")
    assert run("train", data, "--target", "price", "--weight", "w", "--drop", "v", *quick, "--out", tmp_path / "a") == 0
    for file, options, weight in (
        (data, (), "w"),
        (data, ("--weight", "v"), "v"),
        (data, ("--group", "w"), None),
        (without, (), None),
    ):
        out = tmp_path / f"{file.stem} {' '.join(options)}"
        assert run("train", file, "--from", tmp_path / "a", *options, *quick, "--out", out) == 0
        assert read(out / "config.json")["options"]["weight"] == weight
        warning = f"no column 'w' to weigh rows by, as {tmp_path / 'a'} did: they weigh alike"
        assert (warning in capsys.readouterr().err) == (weight is None)


@pytest.mark.parametrize("release", ["0.2.0", "today"])
def test_missing_cells_are_those_of_the_run_too(release, tmp_path):
    """A table of numbers without names, in which -999 and unknown stand for missing cells, as in one where they are."""
    random = np.random.default_rng(0)
    frame = pandas.DataFrame(random.uniform(1, 9, (80, 3)).round(2)).assign(target=range(80))
    frame.iloc[::7, 0] = np.nan
    frame.iloc[3::7, 1] = np.nan
    frame.to_csv(tmp_path / "empty.csv", index=False, header=False)
    frame.astype(object).fillna({0: -999, 1: "unknown"}).to_csv(
        tmp_path / "words.csv", index=False, header=False, sep=":"
    )
    target = ("--target", "column_4", *QUICK)
    words = ("--missing", "unknown", "--missing", "-999", "--no-header", "--sep", ":")
    assert run("train", tmp_path / "words.csv", *target, *words, "--out", tmp_path / "words") == 0
    assert run("train", tmp_path / "empty.csv", *target, "--no-header", "--out", tmp_path / "empty") == 0
    if release == "0.2.0":
        config = read(tmp_path / "words/config.json")
        del config["preprocessor"]["missing_words"]
        (tmp_path / "words/config.json").write_text(json.dumps(config))
    for name in ("words", "empty"):
        data, out = tmp_path / f"{name}.csv", tmp_path / f"{name}2"
        assert run("train", data, "--from", tmp_path / name, "--epochs", "3", "--quiet", "--out", out) == 0
        assert run("predict", out, "--data", data, "--out", tmp_path / f"{name}_predicted.csv") == 0
        assert run("evaluate", out) == 0
    assert_same(arrays_of(tmp_path / "words2"), arrays_of(tmp_path / "empty2"))
    predicted = (pandas.read_csv(tmp_path / f"{name}_predicted.csv")["prediction"] for name in ("words", "empty"))
    np.testing.assert_array_equal(*predicted)
    assert read(tmp_path / "words2/config.json")["preprocessor"]["missing_words"] == ["unknown", "-999"]


def test_the_loss_of_the_same_target_is_taken_over(small, tmp_path):
    loss = ("--loss", "huber", "--delta", "0.5", "--models", "1", "--epochs", "2", "--quiet")
    assert run("train", small, "--target", "price", *loss, "--out", tmp_path / "huber") == 0
    assert run("train", small, "--from", tmp_path / "huber", "--epochs", "1", "--out", tmp_path / "run") == 0
    config = read(tmp_path / "run" / "config.json")
    assert (config["loss"]["kind"], config["loss"]["delta"]) == ("huber", 0.5)
    assert config["from"]["new_output_layer"] is None


def test_columns_that_lack_or_are_new_are_told(big, tmp_path, capsys):
    data = table(tmp_path / "more.csv", FEW, 1, colour=1.5)
    assert run("train", data, "--from", big, "--models", "1", "--epochs", "1", "--out", tmp_path / "run") == 0
    assert f"columns that {big} did not have, ignored: 'colour'" in capsys.readouterr().err
    lacks = tmp_path / "less.csv"
    lacks.write_text(data.read_text().replace("a,b,c,", "a,b,see,", 1))
    assert run("train", lacks, "--from", big, "--out", tmp_path / "none") == 1
    assert "no feature columns 'c'; the columns are 'a', 'b', 'see'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--hidden 8", "--hidden: the run of --from decides it"),
        ("--activation gelu", "--activation: the run of --from decides it"),
        ("--scale minmax", "--scale: the run of --from decides it"),
        ("--drop a", "--drop: the run of --from decides it"),
        ("--target a", "--target: 'a' is an input of the network of"),
        ("--group zone", "--group: 'zone' is an input of the network of"),
        ("--weight a", "--weight: 'a' is an input of the network of"),
        ("--id a", "--id: 'a' is an input of the network of"),
        ("--freeze 2", "--freeze: expected 0 to 1, since the last of the 2 layers is trained, got 2"),
        ("--layer-decay 2", "--layer-decay: expected"),
        ("--probe -1", "--probe: expected"),
        ("--probe 2 --time-limit 9", "--probe: --time-limit does not count its epochs"),
        ("--probe 2 --dp-epsilon 3", "--probe: it trains without noise"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, message, big, small, tmp_path, capsys):
    assert message in refusal(capsys, "train", small, "--from", big, *options.split(), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_source_that_lacks_or_that_a_resumed_run_has_is_refused(big, small, tmp_path, capsys):
    train = ("train", small, "--target", "price", "--out", tmp_path / "run")
    assert "--freeze: it is for layers that have learned already" in refusal(capsys, *train, "--freeze", "1")
    assert run(*train, "--from", tmp_path / "none") == 1
    assert "is not a run folder (there is no such folder); give one that" in capsys.readouterr().err
    assert run(*train, "--from", big.with_name(f"{big.name}s")) == 1
    assert f"(there is no such folder); did you mean '{big.name}'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert "--from: a resumed run keeps its own" in refusal(capsys, "train", "--resume", big, "--from", big)


def test_test_rows_that_trained_the_source_are_told(big, tmp_path, capsys):
    data, options = big.parent / "big.csv", ("--from", big, "--models", "1", "--epochs", "1")
    said = f"of 300 test rows are training rows of {big}, so the test scores flatter"
    for name, quiet in (("quiet", ["-q"]), ("other", [])):
        # it is a warning, which is given with --quiet too, and once
        assert run("train", data, *options, "--seed", "1", *quiet, "--out", tmp_path / name) == 0
        assert capsys.readouterr().err.count(said) == 1
        assert said in (tmp_path / name / "report.html").read_text(encoding="utf-8")
    # the same seed holds the same rows out
    assert run("train", data, *options, "--out", tmp_path / "same") == 0
    assert "flatter" not in capsys.readouterr().err


def test_a_model_of_five_digits_learns_the_other_five(tmp_path, capsys):
    X, y = load_digits(return_X_y=True)
    for name, chosen in (("first", y < 5), ("second", y >= 5)):
        np.savez(tmp_path / f"{name}.npz", X=X[chosen], y=y[chosen])
    quick = ("--epochs", "5", "--lr", "0.01", "--quiet")
    assert run("train", tmp_path / "first.npz", "--hidden", "64,32", *quick, "--out", tmp_path / "a") == 0
    options = ("--from", tmp_path / "a", "--probe", "5", "--freeze", "1")
    assert run("train", tmp_path / "second.npz", *options, *quick, "--out", tmp_path / "b") == 0
    config, report = read(tmp_path / "b" / "config.json"), read(tmp_path / "b" / "report.json")
    assert config["from"]["new_output_layer"] == "the classes there are 0, 1, 2, 3, 4"
    assert config["preprocessor"]["classes"] == [5, 6, 7, 8, 9]
    assert report["test"]["accuracy"] > 0.9
    assert run("evaluate", tmp_path / "b", "--data", tmp_path / "second.npz") == 0
    source, end = (arrays_of(tmp_path / name)["0.weight"] for name in "ab")
    np.testing.assert_array_equal(source, end)
    assert run("train", "digits", "--from", tmp_path / "a", "--epochs", "1", "--out", tmp_path / "all") == 0
    assert run("train", "iris", "--from", tmp_path / "a", "--out", tmp_path / "none") == 1
    assert "has 4 features a row, and training had 64" in capsys.readouterr().err


def test_a_source_of_prelu_trains_one_model(small, tmp_path):
    options = ("--activation", "prelu", "--hidden", "8", "--epochs", "2", "--quiet")
    assert run("train", small, "--target", "price", *options, "--out", tmp_path / "a") == 0
    assert run("train", small, "--from", tmp_path / "a", "--epochs", "2", "--quiet", "--out", tmp_path / "b") == 0
    assert "models" not in read(tmp_path / "b" / "report.json")


def test_a_source_without_hidden_layers_gives_its_output_layer_alone(small, tmp_path, capsys):
    options = ("--hidden", "none", "--epochs", "2", "--quiet")
    assert run("train", small, "--target", "price", *options, "--out", tmp_path / "a") == 0
    again = ("--from", tmp_path / "a", "--epochs", "1", "--quiet", "--out", tmp_path / "b")
    assert run("train", small, *again) == 0
    other = table(tmp_path / "other.csv", FEW, 1, target="level")
    said = refusal(capsys, "train", other, "--target", "level", *again[:-1], tmp_path / "c")
    assert "--from: " in said and "the target there is 'price'" in said
    assert "--probe: " in refusal(capsys, "train", small, "--probe", "2", *again[:-1], tmp_path / "c")
