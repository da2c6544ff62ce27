"""``--preset`` and the estimators' ``preset``: the choice, the options that it leaves alone, and whole trainings."""

import numpy as np
import pandas
import pytest

from fusemlp import MLP, ArgumentError, load_checkpoint
from fusemlp.cli.options import TrainOptions
from fusemlp.cli.session import prepared_data
from fusemlp.sklearn import TableClassifier, TableRegressor
from fusemlp.tables import recipe as presets
from fusemlp.tables.defaults import with_batch, with_patience, with_preset
from make import assert_same, frame, read, refusal, rows, run

QUICK = ("--scale", "robust", "--epochs", "4", "--quiet", "--backend", "numpy")


def table(path, count=150, target="kind"):
    frame(count, target=target, classes=2 * (target == "kind")).drop(columns="day").to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset")
    data = table(folder / "data.csv", count=400)
    told = ("--preset", "tabm", "--final-fit", *QUICK)
    assert run("train", data, "--target", "kind", *told, "--out", folder / "run") == 0
    return folder / "run"


def test_a_run_says_and_stores_what_the_recipe_chose(trained):
    config, report = read(trained / "config.json"), read(trained / "report.json")
    assert MLP.from_config(config["network"]).members == presets.MEMBERS
    assert config["network"]["sizes"][1:-1] == [128, 128] and config["batch_size"] == 32
    assert config["optimizer"]["kind"] == "adamw" and config["options"]["models"] == 1
    assert any("preset tabm: 16 members" in note for note in config["data"]["notes"])
    assert report["test"]["accuracy"] > 0.8 and report["dead_units"] == {} and "held_out" in report
    assert report["final_fit"]["rows"] == 400


def test_the_files_of_a_run_predict(trained, tmp_path):
    answers = tmp_path / "answers.csv"
    assert run("predict", trained, "--data", trained.parent / "data.csv", "--proba", "--out", answers) == 0
    engine = load_checkpoint(trained / "checkpoints" / "model.safetensors", backend="numpy")
    assert engine.network.members == presets.MEMBERS and len(rows(answers)) == 400
    assert run("evaluate", trained) == 0
    assert run("explain", trained, "--out", tmp_path / "columns.csv") == 0
    assert run("export", trained, "--onnx", tmp_path / "model.onnx") == 0
    again = tmp_path / "again.csv"
    assert run("predict", trained, "--data", trained.parent / "data.csv", "--spread", "--out", again) == 0
    spread = pandas.read_csv(again)["spread"]
    # the deviation of a probability, of members that are not the same
    assert spread.between(0.0, 0.5).all() and spread.max() > 1e-3


def test_a_run_goes_on_with_its_recipe(tmp_path):
    data = table(tmp_path / "data.csv")
    told = ("--target", "kind", "--preset", "tabm", "--scale", "robust", "--quiet", "--backend", "numpy")
    for name, epochs in (("whole", "4"), ("half", "2")):
        assert run("train", data, *told, "--epochs", epochs, "--out", tmp_path / name) == 0
    assert run("train", "--resume", tmp_path / "half", "--epochs", "4", "--quiet") == 0
    whole, half = (load_checkpoint(tmp_path / name / "checkpoints" / "last.safetensors") for name in ("whole", "half"))
    assert_same(whole, half)


LEAST = presets.LEAST_ROWS
# The rows, the options, whether the target holds classes, the members, and the beginning of the note.
CHOICES = [
    (LEAST, {"preset": "auto"}, True, 16, "preset tabm: 16 members share the weights of one network, chosen for"),
    (LEAST - 1, {"preset": "auto"}, True, 1, "preset plain: tabm is for 12,000 to 100,000 rows, and these are"),
    (presets.MOST_ROWS + 1, {"preset": "auto"}, True, 1, "preset plain: tabm is for 12,000 to 100,000 rows, and"),
    (LEAST, {"preset": "auto"}, False, 1, "preset plain: tabm is for classes, one a row, and the target"),
    (LEAST, {"preset": "auto", "models": 2}, True, 1, "preset plain: tabm does not take what was given for models"),
    (LEAST, {"preset": "plain"}, True, 1, None),
    # without the option other tables are told nothing, and a network of one's own stays
    (LEAST, {}, True, 16, "preset tabm: 16 members"),
    (LEAST, {"epochs": 3, "dropout": 0.1}, True, 16, "preset tabm: 16 members"),
    (LEAST, {"early_stopping": 30, "ema": 0.9}, True, 16, "preset tabm: 16 members"),
    *((rows, {}, classify, 1, None) for rows, classify in ((LEAST - 1, True), (LEAST, False), (0, True))),
    *((LEAST, given, True, 1, None) for given in ({"hidden": ["8"]}, {"lr": 0.01}, {"models": 1}, {"resume": "run"})),
    *((LEAST, given, True, 1, None) for given in ({"time_limit": 60.0}, {"dp_epsilon": 3.0})),
]


@pytest.mark.parametrize(("rows", "given", "classify", "members", "note"), CHOICES)
def test_rows_and_options_choose_the_preset(rows, given, classify, members, note):
    options = TrainOptions(data="data.csv", target="value", **given)
    changed, found, notes = with_preset(options, rows, classify=classify)
    assert found == members and len(notes) == (note is not None) and all(told.startswith(note) for told in notes)
    assert changed.preset == "tabm" if members > 1 else changed == options


def test_an_estimator_chooses_as_the_command_line_does(monkeypatch):
    monkeypatch.setattr(presets, "LEAST_ROWS", 120)
    X = np.random.default_rng(0).normal(size=(120, 2))
    y = (X[:, 0] > 0).astype(int)
    quick = {"scale": "robust", "epochs": 1, "backend": "numpy"}
    large = TableClassifier(**quick).fit(X, y)
    assert large.engine_.network.members == presets.MEMBERS
    assert any("chosen for classes of 120" in one for one in large.notes_)
    small = [TableClassifier(**quick).fit(X[1:], y[1:]), TableClassifier(**quick, models=1).fit(X, y)]
    for one in (*small, TableRegressor(**quick, log_target=False).fit(X, X[:, 0])):
        assert one.engine_.network.members == 1 and not any("preset" in note for note in one.notes_)


def test_auto_leaves_a_small_table_to_the_plain_recipe(tmp_path):
    made = prepared(tmp_path, preset="auto")
    assert made.network.members == 1 and made.models == 5 and made.recipe.hidden is None
    assert "preset plain: tabm is for 12,000 to 100,000 rows, and these are 120" in made.notes


def test_batches_grow_with_the_rows():
    asked, numbers = TrainOptions(preset="tabm"), (10, 1023, 1024, 2047, 4095, 4096, 10**6)
    sizes = [with_preset(asked, rows, classify=True)[0].batch_size for rows in numbers]
    assert sizes == [32, 32, 64, 64, 128, 256, 256]


def prepared(folder, **given):
    options = {"target": "value", "scale": "robust", "log_target": False, "backend": "numpy", "preset": "tabm"}
    return prepared_data(TrainOptions(data=str(table(folder / "data.csv", target="value")), **{**options, **given}))


@pytest.mark.parametrize(
    ("rows", "given", "steps"),
    [
        (14_999, {}, (32, None, None)),
        (15_000, {}, (128, 0.0015, 0.99)),
        (59_999, {}, (128, 0.0015, 0.99)),
        (60_000, {}, (256, None, 0.99)),
        (60_000, {"optimizer": "adamw"}, (256, None, 0.99)),
        (15_000, {"ema": 0.0}, (128, 0.0015, 0.0)),
        (15_000, {"batch_size": 64}, (64, None, None)),
        # a rate belongs to the rows of a step
        (15_000, {"lr": 0.01}, (32, 0.01, None)),
        (60_000, {"lr": 0.01}, (256, 0.01, 0.99)),
        # refused later
        (60_000, {"lr": 0.0}, (256, 0.0, 0.99)),
        (15_000, {"plan": "card"}, (32, None, None)),
        (60_000, {"optimizer": "sgd"}, (32, None, None)),
        (60_000, {"adversarial": "pgd"}, (32, None, None)),
        (60_000, {"dp_epsilon": 3.0}, (32, None, None)),
    ],
)
def test_large_tables_take_more_rows_a_step_with_a_rate_and_an_average(rows, given, steps):
    recipe = with_batch(presets.TableRecipe(**given), rows)
    assert (recipe.batch_size, recipe.lr, recipe.ema) == steps


@pytest.mark.parametrize(
    ("rows", "given", "validates", "patience"),
    [
        (14_999, {}, True, 20),
        (15_000, {}, True, "auto"),
        (15_000, {"early_stopping": 30}, True, 30),
        (15_000, {"early_stopping": 0}, True, None),
        (15_000, {"adversarial": "ibp"}, True, None),
        (100, {"adversarial": "ibp", "early_stopping": 5}, True, 5),
        (15_000, {"early_stopping": 5}, False, None),
        (100, {}, False, None),
    ],
)
def test_large_tables_wait_by_themselves(rows, given, validates, patience):
    recipe = with_patience(presets.TableRecipe(**given), rows, validates=validates)
    assert recipe.patience == patience


def test_what_is_given_stays(tmp_path):
    made = prepared(tmp_path, hidden=["8"], optimizer="sgd", activation="tanh")
    assert made.network.sizes[1:-1] == (8,) and made.network.members == presets.MEMBERS
    assert {one.name for one in made.network.activations[:-1]} == {"tanh"}
    # the recipe's rate and average are adamw's
    assert (made.recipe.optimizer, made.recipe.lr, made.recipe.batch_size, made.recipe.ema) == ("sgd", None, 32, None)
    choices = {}, {"early_stopping": 30, "ema": 0.0}, {"validation_fraction": 0.0}
    pace = [prepared(tmp_path, **options).recipe for options in choices]
    assert [(one.ema, one.early_stopping) for one in pace] == [(0.99, 10), (0.0, 30), (0.99, 0)]
    plain = prepared(tmp_path, preset="plain", hidden=["8"])
    assert (plain.network.members, plain.recipe.ema, plain.recipe.early_stopping) == (1, None, 20)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"models": 3}, "models: the preset tabm does not take it"),
        ({"hidden": ["none"]}, "hidden: the preset tabm does not take it"),
        ({"activation": "prelu"}, "activation: the preset tabm does not take it"),
        ({"norm": "layer"}, "norm: the preset tabm does not take it: members share no normalised layers"),
        ({"adversarial": "ibp", "attack_eps": 0.1}, "adversarial: the preset tabm does not take it"),
        ({"dp_epsilon": 3.0}, "dp_epsilon: the preset tabm does not take it"),
        ({"preset": "tabn"}, "preset: unknown name 'tabn'; did you mean 'tabm'"),
    ],
)
def test_what_the_recipe_does_not_take_is_named(tmp_path, given, said):
    with pytest.raises(ArgumentError, match=said):
        prepared(tmp_path, **given)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("evaluate", "RUN", "--attack", "pgd", "--attack-eps", "0.1"), "attack"),
        (("evaluate", "RUN", "--certify", "0.1"), "certify"),
        (("train", "DATA", "--target", "kind", "--from", "RUN", "--out", "new"), "from"),
        (("train", "DATA", "--target", "kind", "--from", "RUN", "--out", "new", "--preset", "tabm"), "from"),
    ],
)
def test_a_command_that_takes_no_members_says_so(trained, tmp_path, command, option, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": trained, "DATA": trained.parent / "data.csv"}
    said = refusal(capsys, *(places.get(word, word) for word in command))
    assert f"error: --{option}: " in said
    assert "this one has 16; make it with members=1, or by train --preset plain" in said
    assert not any(tmp_path.iterdir())


def test_the_run_of_from_is_called_by_its_option(tmp_path, capsys):
    data = table(tmp_path / "data.csv")
    plain = ("--preset", "plain", "--models", "1", "--out", tmp_path / "plain")
    assert run("train", data, "--target", "kind", *QUICK, *plain) == 0
    told = ("--preset", "tabm", "--from", tmp_path / "plain", "--out", tmp_path / "new")
    assert run("train", data, "--target", "kind", *told) == 2
    assert "error: --from: the preset tabm does not take it" in capsys.readouterr().err


def test_an_estimator_of_members_opens_a_run_gives_intervals_and_is_stored(trained, tmp_path):
    there = TableClassifier.from_run(trained, backend="numpy")
    assert there.preset == "tabm" and there.hidden == (128, 128)
    here = TableRegressor(preset="tabm", scale="robust", log_target=False, epochs=4, backend="numpy")
    made = frame(150, target="value").drop(columns="day")
    here.fit(made.drop(columns="value"), made["value"])
    assert any("preset tabm" in note for note in here.notes_)
    low, high = here.predict_interval(made, 0.8)
    # no target is below 0, and no interval
    assert (low <= here.predict(made).clip(0)).all() and (high >= low).all() and (high > low).any()
    here.save(tmp_path / "estimator")
    again = TableRegressor.load(tmp_path / "estimator", backend="numpy")
    np.testing.assert_array_equal(again.predict(made), here.predict(made))


def test_a_classifier_has_the_temperature_of_its_members():
    generator = np.random.default_rng(0)
    X = generator.normal(size=(1200, 3))
    y = (X[:, 0] + generator.normal(size=1200) > 0).astype(int)
    options = {"scale": "robust", "epochs": 30, "early_stopping": 30, "backend": "numpy", "hidden": (16,), "lr": 0.05}
    fitted = TableClassifier(preset="tabm", **options).fit(X, y)
    assert fitted.engine_.network.members == presets.MEMBERS and fitted.temperature_ != 1.0
    np.testing.assert_allclose(fitted.predict_proba(X).sum(axis=1), 1.0, rtol=1e-5)
