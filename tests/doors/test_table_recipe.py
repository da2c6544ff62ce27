"""One recipe behind two doors: each option of train is a parameter of the estimators, and makes the same model."""

import json
from dataclasses import fields

import numpy as np
import pandas
import pytest
from fusemlp.schedules import Cosine

import fusemlp
from fusemlp import PGD, Adam, ArgumentError
from fusemlp.sklearn import TableClassifier, TableRegressor
from fusemlp.tables.recipe import TableRecipe
from make import assert_same, read, refusal, run

GENERATOR = np.random.default_rng(3)
NUMBERS = pandas.DataFrame(GENERATOR.normal(size=(160, 3)), columns=["a", "b", "c"]).round(4)
TABLE = NUMBERS.assign(word=GENERATOR.choice([*"xyz"], 160), city=GENERATOR.integers(0, 9, 160))
KIND = np.where(NUMBERS["a"] + NUMBERS["b"] > 0, "yes", "no")
PRICE = (np.exp(NUMBERS["a"]) + TABLE["city"]).round(4)
QUICK = {"epochs": 3, "backend": "numpy", "test_fraction": 0.2}

RECIPES = {
    "defaults": (TABLE, {}),
    "optimizer": (TABLE, {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "ema": 0.9, "clip_norm": 1.0}),
    "betas": (TABLE, {"models": 2, "beta1": 0.8, "eps": 1e-6, "decay_biases": False, "accumulate": 2}),
    "schedule": (TABLE, {"models": 1, "schedule": "cosine", "lr": 0.01, "warmup": 0.5, "drop_last": True}),
    "network": (TABLE, {"models": 1, "activation": "leaky_relu", "slope": 0.3, "init": "he_normal", "hidden": (9, 5)}),
    "norm": (TABLE, {"norm": ("rms", "layer"), "hidden": (9, 5)}),
    "final fit": (TABLE, {"models": 2, "final_fit": True, "split_seed": 4, "test_fraction": 0.3}),
    "time": (TABLE, {"models": 1, "time": "a", "metric": "val_loss"}),
    "preset": (TABLE, {"preset": "tabm", "scale": "robust"}),
    "attack": (NUMBERS, {"adversarial": "pgd", "attack_eps": 0.1, "attack_steps": 2, "scale": "standard"}),
    "certified": (NUMBERS, {"adversarial": "ibp", "attack_eps": 0.05, "scale": "standard"}),
}


def trained(folder, table, target, given):
    """Return the run folder of ``train`` with the parameters as options."""
    table.assign(y=target).to_csv(folder / "data.csv", index=False)
    words = ["train", str(folder / "data.csv"), "--target", "y", "--quiet", "--out", str(folder / "run")]
    options = {field.name: field for field in fields(TableRecipe)}
    for name, value in given.items():
        option = options[name].metadata["names"] or (f"--{name.replace('_', '-')}",)
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        else:
            words += [option[0], ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    assert run(*words) == 0
    return folder / "run"


def assert_same_model(estimator, folder):
    """Compare the model, the scores and the held-out errors of an estimator with those of a run."""
    opened = type(estimator).from_run(folder, backend="numpy")
    assert_same(estimator.engine_, opened.engine_)
    assert estimator.preprocessor_.to_config() == opened.preprocessor_.to_config()
    assert opened.feature_names_in_.tolist() == estimator.feature_names_in_.tolist()
    assert opened.n_iter_ == estimator.n_iter_
    # the command alone writes files, and names the commit in them
    of_files = ("no_plot", "no_page", "commit")
    report = {name: value for name, value in read(folder / "report.json").items() if name not in of_files}
    assert json.loads(json.dumps(estimator.report_)) | {"seconds": 0} == report | {"seconds": 0}
    assert (estimator.held_out_ is None) == (opened.held_out_ is None)
    other = TableRegressor if isinstance(estimator, TableClassifier) else TableClassifier
    with pytest.raises(ArgumentError, match=rf"is of a \w+, and {other.__name__} is for"):
        other.from_run(folder)


# certified training is for classes
BOTH = [(case, kind) for case in RECIPES for kind in (TableClassifier, TableRegressor)]
BOTH.remove(("certified", TableRegressor))


@pytest.mark.parametrize(("case", "kind"), BOTH)
def test_both_doors_make_the_same_model(case, kind, tmp_path):
    table, given = RECIPES[case]
    given, target = QUICK | given, KIND if kind is TableClassifier else PRICE
    assert_same_model(kind(**given).fit(table, target), trained(tmp_path, table, target, given))


def test_a_transfer_starts_from_a_run(tmp_path):
    (tmp_path / "first").mkdir()
    first = trained(tmp_path / "first", TABLE, PRICE, QUICK | {"models": 1})
    given = QUICK | {"transfer_from": str(first), "freeze": 1, "probe": 1, "layer_decay": 0.5, "models": 2}
    folder = trained(tmp_path, TABLE, PRICE * 2, given)
    estimator = TableRegressor(**given).fit(TABLE, PRICE * 2)
    assert_same_model(estimator, folder)
    assert any("first 1 of 2 layers frozen" in note for note in estimator.notes_)


def test_objects_stand_for_the_words_of_the_command_line(tmp_path):
    words = {"optimizer": "adam", "beta1": 0.8, "schedule": "cosine", "lr": 0.01, "models": 1, "adversarial": "pgd"}
    words |= {"attack_eps": 0.1, "scale": "standard", "weight_decay": 0.0}
    by_words = TableClassifier(**QUICK, **words).fit(NUMBERS, KIND)
    steps = by_words.engine_.optimizer.lr.steps
    objects = {"optimizer": Adam(betas=(0.8, 0.999)), "lr": Cosine(0.01, steps=steps), "models": 1}
    by_objects = TableClassifier(**QUICK, **objects, adversarial=PGD(0.1), scale="standard").fit(NUMBERS, KIND)
    assert_same(by_objects.engine_, by_words.engine_)
    by_objects.save(tmp_path / "model.safetensors")
    again = TableClassifier.load(tmp_path / "model.safetensors", backend="numpy")
    assert again.get_params()["adversarial"] == PGD(0.1)
    np.testing.assert_array_equal(again.predict(NUMBERS), by_objects.predict(NUMBERS))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": Adam(), "beta1": 0.5}, "beta1: the object given as optimizer has it"),
        ({"loss": fusemlp.CrossEntropy(), "label_smoothing": 0.1}, "label_smoothing: the object given as loss has it"),
        ({"lr": Cosine(0.01, steps=5), "schedule": "step"}, "schedule: lr is a schedule already"),
        ({"adversarial": PGD(0.1), "attack_eps": 0.1}, "attack_eps: it is of an attack; the object given has it"),
        ({"attack_eps": 0.1}, "attack_eps: it is of an attack; give --adversarial too"),
        ({"freeze": 1}, "freeze: it is for layers that have learned already"),
        ({"dp_clip": 1.0}, "dp_clip: it is for private training"),
        ({"dp_epsilon": 3.0, "models": 2}, "models: private training makes one model"),
        ({"test_fraction": 1.0}, "test_fraction: expected"),
        ({"class_weight": {"maybe": 2.0}}, "class_weight: 'maybe' is none of the classes 'no' and 'yes'"),
    ],
)
def test_fields_that_do_not_go_together(given, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        TableClassifier(**{**QUICK, **given}).fit(NUMBERS, KIND)


def test_private_training_spends_its_epsilon():
    estimator = TableClassifier(**QUICK, dp_epsilon=3.0, scale="standard").fit(NUMBERS, KIND)
    assert estimator.report_["privacy"]["epsilon"] <= 3.0 and estimator.engine_.privacy is not None


def test_the_documentation_names_each_parameter():
    for name in TableClassifier().get_params():
        assert f"\n{name} : " in (TableClassifier.__doc__ or "")
    assert "--" not in (TableClassifier.__doc__ or "")


def test_a_run_without_test_rows(tmp_path, capsys):
    folder = trained(tmp_path, TABLE, KIND, QUICK | {"test_fraction": 0, "models": 1})
    assert not {"test", "baselines"} & read(folder / "report.json").keys() and (folder / "report.html").exists()
    for command in ("evaluate", "explain"):
        assert "no rows were held out for the test (--test-fraction 0)" in refusal(capsys, command, folder, code=1)
