"""The defaults of ``train`` on a table: a cross-validated ensemble, baselines, logarithms; and ``--final-fit``."""

from dataclasses import replace

import numpy as np
import pandas
import pytest

from fusemlp import MLP, Engine, load_checkpoint
from fusemlp.cli import runs
from fusemlp.cli.options import TrainOptions
from fusemlp.cli.session import prepared_data
from fusemlp.datasets.load import ColumnChoices, load_data, load_features
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import folds
from fusemlp.fleet.fleet import Fleet
from fusemlp.fleet.results import mean_history, members, merged
from fusemlp.report.metrics import verdict, worse_than
from fusemlp.report.plots import curves_figure
from fusemlp.report.runs import Run, joint, read_history
from fusemlp.sklearn import TableRegressor
from fusemlp.tables import defaults, training
from fusemlp.training.trainer import History
from fusemlp_kernels.errors import ArgumentError, DivergenceError
from make import output_of, read, refusal, rows, run

# The scores of a class, for a verdict that counts.
SHARES = dict.fromkeys(("precision", "recall", "f1"), 0.0)
QUICK = ("--hidden", "8", "--lr", "0.02", "--quiet")


def table(path, *, count=120, target="kind"):
    """Write two numbers, a word, and a target that depends on them: a class, or a positive skewed number."""
    generator = np.random.default_rng(0)
    lines = [f"a,b,word,{target}"]
    for a, b in generator.normal(size=(count, 2)):
        word = "xyz"[int(generator.integers(3))]
        value = ("no", "yes")[int(a + b > 0)] if target == "kind" else f"{np.exp(2 + 1.5 * a + 0.3 * b):.5f}"
        lines.append(f"{a:.4f},{b:.4f},{word},{value}")
    path.write_text("\n".join(lines) + "\n")
    return path


def fit(data, out, *options):
    """Train quickly on the classes of a table, and return the run's folder."""
    assert run("train", data, "--target", "kind", *QUICK, *options, "--out", out) == 0
    return out


def model_of(folder, name="model"):
    return load_checkpoint(folder / "checkpoints" / f"{name}.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return table(tmp_path_factory.mktemp("ensemble") / "data.csv")


@pytest.fixture(scope="module")
def trained(data):
    return fit(data, data.parent / "run")


def test_folds_validate_each_row_once_and_keep_the_shares_of_classes():
    labels = np.array(["a"] * 40 + ["b"] * 10)
    parts = folds(labels, 5, seed=3, stratify=True)
    assert sorted(np.concatenate([held for _, held in parts])) == list(range(50))
    for kept, held in parts:
        assert sorted([*kept, *held]) == list(range(50))
        assert (labels[held] == "b").sum() == 2
    # Two models have two of five folds; a class too small for the folds is no error.
    assert [len(held) for _, held in folds(labels, 2, seed=3, stratify=True)] == [10, 10]
    assert len(folds(np.array(list("aaaaaaaaab")), 5, seed=0, stratify=True)) == 5


def test_a_table_trains_an_ensemble_that_all_commands_take(data, trained, tmp_path):
    config, report = read(trained / "config.json"), read(trained / "report.json")
    assert (config["options"]["models"], config["options"]["early_stopping"], config["epochs"]) == (5, 20, 200)
    # The command as it was typed, without what the table decided.
    assert not {"--models", "--early-stopping", "--epochs"} & set(config["command"].split())
    assert [one["seed"] for one in report["models"]] == [0, 1, 2, 3, 4]
    assert len(rows(trained / "metrics.csv")) == report["epochs"] == max(one["epochs"] for one in report["models"])
    assert model_of(trained).network.sizes[1] == 5 * 8
    assert run("predict", trained, "--data", data, "--out", tmp_path / "out.csv", "--proba") == 0
    said = pandas.read_csv(tmp_path / "out.csv")["prediction"]
    assert (said == pandas.read_csv(data)["kind"]).mean() > 0.9
    for weights in ("model", "best", "last"):
        assert run("evaluate", trained, "--weights", weights) == 0
    assert run("export", trained, "--safetensors", tmp_path / "m.safetensors") == 0
    assert run("plot", trained, "--out", tmp_path / "p.png") == 0


def test_an_ensemble_repeats_and_resumes_by_training_anew(data, tmp_path):
    cut = fit(data, tmp_path / "cut", "--epochs", "4")
    assert run("train", "--resume", cut, "--epochs", "7", "--quiet") == 0
    first, second = model_of(cut), model_of(fit(data, tmp_path / "whole", "--epochs", "7"))
    X = np.random.default_rng(1).normal(size=(9, first.network.sizes[0])).astype(np.float32)
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))
    assert len(rows(cut / "metrics.csv")) == 7


def test_models_1_is_a_single_run_with_early_stopping(data, tmp_path):
    folder = fit(data, tmp_path / "run", "--models", "1")
    report = read(folder / "report.json")
    assert "models" not in report and "best_epoch" in report
    assert read(folder / "config.json")["data"]["validation_rows"] > 0
    # 0 turns early stopping off.
    folder = fit(data, tmp_path / "all", "--models", "1", "--early-stopping", "0", "--epochs", "25")
    assert (read(folder / "report.json")["stopped"], len(rows(folder / "metrics.csv"))) == ("", 25)
    # other data take several models too, also without validation rows
    options = ("--models", "3", "--epochs", "3", "--validation-fraction", "0")
    assert run("train", "iris", *QUICK, *options, "--out", tmp_path / "iris") == 0
    report = read(tmp_path / "iris/report.json")
    assert [one["epochs"] for one in report["models"]] == [3, 3, 3]
    assert "val_loss" not in report["final"]


def test_prelu_is_one_model_by_default_and_refused_for_several(data, tmp_path, capsys):
    options, out = ("--target", "kind", *QUICK, "--epochs", "2", "--activation", "prelu"), tmp_path / "run"
    said = refusal(capsys, "train", data, *options, "--models", "2", "--out", out)
    assert "--models: 2 networks with prelu cannot be merged; use leaky_relu, or a single model" in said
    assert not out.exists()
    assert run("train", data, *options, "--out", out) == 0
    assert "models" not in read(out / "report.json")


def test_final_fit_keeps_the_model_of_all_rows(data, trained, tmp_path, capsys):
    folder = fit(data, tmp_path / "run", "--final-fit")
    shown = capsys.readouterr().out
    report, before = read(folder / "report.json"), read(trained / "report.json")
    assert report["final_fit"] == {"epochs": before["best_epoch"], "rows": 120}
    assert "the model is now that of all 120 rows" in shown
    assert report["test"] == before["test"]
    assert not np.array_equal(*(model_of(folder, name).state_dict()["0.weight"] for name in ("model", "best")))
    scores = f"test auc {report['test']['auc']:.4f}"
    shown = output_of(capsys, "evaluate", folder)
    assert "the weights best are judged: --final-fit trained the model on the test rows too" in shown
    assert scores in shown
    shown = output_of(capsys, "evaluate", folder, "--weights", "best")
    assert "--final-fit" not in shown and scores in shown
    page = (folder / "report.html").read_text()
    assert run("report", folder) == 0
    assert (folder / "report.html").read_text() == page


def test_a_final_fit_that_diverges_leaves_the_model_before_it(data, tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise DivergenceError("final_fit: the loss became NaN; the model of the training rows is kept")

    monkeypatch.setattr(training, "_fit_to_all_rows", refused)
    folder = tmp_path / "run"
    assert run("train", data, "--target", "kind", *QUICK, "--epochs", "2", "--final-fit", "--out", folder) == 1
    assert "error: final_fit: the loss became NaN" in capsys.readouterr().err
    assert "final_fit" not in read(folder / "report.json")
    assert len(np.load(folder / "training_rows.npy")) == 96
    assert run("evaluate", folder) == 0


def test_baselines_stand_beside_the_score_and_a_worse_model_says_so(data, tmp_path, capsys):
    words = "train", data, "--target", "kind", "--hidden", "8", "--lr", "1e-9", "--epochs", "1", "--quiet"
    assert run(*words, "--out", tmp_path / "run") == 0
    shown = capsys.readouterr()
    report = read(tmp_path / "run" / "report.json")
    linear = report["baselines"]["linear"]["accuracy"]
    assert linear > 0.8 > report["test"]["accuracy"]
    assert f"a linear model on {linear:.1%}, the most frequent class alone on" in shown.out
    last = shown.out.splitlines()[-1]
    assert last.startswith("warning: the model is worse than the linear one: test accuracy ")
    assert "linear" in report["worse_than"][-1]
    # once, also where 2>&1 joins both; --json leaves no lines on stdout
    assert "worse" not in shown.err and shown.out.count(last) == 1
    assert run(*words, "--json", "--out", tmp_path / "json") == 0
    assert capsys.readouterr().err.splitlines().count(last) == 1


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ({"accuracy": 0.5}, ["constant"]),
        ({"accuracy": 0.6}, []),
        ({"rmse": 3.0, "r2": 0.4}, ["linear"]),
        # chance; targets of several units; a high quantile
        ({"rmse": 2.01, "r2": 0.74}, []),
        ({"rmse": 3.0, "r2": 0.8, "targets": {}}, []),
        ({"rmse": 3.0, "r2": 0.4, "mae": 1.0, "pinball": 0.2}, []),
    ],
)
def test_worse_than(test, expected):
    figures = {"constant": {"accuracy": 0.6, "rmse": 4.0, "r2": 0.0}, "linear": {"accuracy": 0.5, "rmse": 2.0}}
    figures["linear"]["r2"] = 0.75
    report = {"test": {"rows": 1000, "mae": 1.0, **test}, "baselines": figures}
    found = list(worse_than(report))
    # the verdict judges by the same rule
    advice = "".join(list(verdict(report | {"baselines": {n: {"mae": 2.0, **f} for n, f in figures.items()}}))[1:])
    assert "accuracy" in test or ("linear model is better" in advice) == ("linear" in expected)
    assert len(found) == len(expected)
    assert all(f"the {name} one" in sentence for name, sentence in zip(expected, found, strict=True))


def test_a_skewed_target_is_learned_in_logarithms_where_they_help(tmp_path, capsys):
    data, run_folder = table(tmp_path / "data.csv", count=300, target="price"), tmp_path / "run"
    assert run("train", data, "--target", "price", "--out", run_folder) == 0
    config, report = read(run_folder / "config.json"), read(run_folder / "report.json")
    assert config["preprocessor"]["target_log"] and config["options"]["log_target"] is True
    assert "the target is learned in logarithms: rmse of held-out rows" in capsys.readouterr().err
    plain = tmp_path / "plain"
    assert run("train", data, "--target", "price", "--no-log-target", "--quiet", "--out", plain) == 0
    assert not read(plain / "config.json")["preprocessor"]["target_log"]
    assert report["test"]["rmse"] < read(plain / "report.json")["test"]["rmse"]
    page = (run_folder / "report.html").read_text()
    assert "the target is learned in logarithms" in page
    assert run("report", run_folder) == 0
    assert (run_folder / "report.html").read_text() == page
    # evaluate prepares the same rows again, predict returns original units
    assert run("evaluate", run_folder) == 0
    assert run("predict", run_folder, "--data", data, "--out", tmp_path / "out.csv") == 0
    said, truth = pandas.read_csv(tmp_path / "out.csv")["prediction"], pandas.read_csv(data)["price"]
    assert np.corrcoef(np.log(said), np.log(truth))[0, 1] > 0.95


def test_numbers_are_cut_into_pieces_where_that_helps(tmp_path, capsys):
    generator = np.random.default_rng(0)
    a, b, noise = generator.normal(size=(3, 400))
    steps = np.where(a > 0.3, 3.0, 0.0) + np.where((b > 0) & (b < 0.5), 2.0, 0.0) + 0.1 * noise
    frame = pandas.DataFrame({"a": a, "b": b, "y": steps}).round(4)
    frame.to_csv(tmp_path / "data.csv", index=False)
    r2 = {}
    for name, options in (("tried", ()), ("robust", ("--scale", "robust"))):
        assert run("train", tmp_path / "data.csv", "--target", "y", "--out", tmp_path / name, *options) == 0
        assert ("numbers are cut into pieces: rmse of held-out rows" in capsys.readouterr().err) == (name == "tried")
        r2[name] = read(tmp_path / name / "report.json")["test"]["r2"]
    config = read(tmp_path / "tried/config.json")
    assert config["options"]["scale"] == config["preprocessor"]["scale"] == "piecewise"
    assert r2["tried"] > r2["robust"] + 0.05
    estimator = TableRegressor().fit(frame[["a", "b"]], frame["y"])
    assert estimator.preprocessor_.scale == "piecewise"


def test_logarithms_are_for_positive_numbers(data, tmp_path, capsys):
    words = ("train", data, "--log-target", "--out", tmp_path / "run", "--target")
    assert "--log-target: only numbers have logarithms" in refusal(capsys, *words, "kind")
    assert "'a' holds -" in refusal(capsys, *words, "a", code=1)


def test_a_mean_history_counts_a_stopped_model_with_its_best_epoch():
    short = History({"loss": [3.0, 1.0, 2.0]}, [0, 1, 2], [0.1, 0.1, 0.1], best_epoch=1)
    long = History({"loss": [5.0, 4.0, 3.0, 2.0]}, [0, 1, 2, 3], [0.1] * 4, best_epoch=3)
    mean = mean_history([short, long])
    assert mean.history["loss"] == [4.0, 2.5, 2.5, 1.5]
    assert mean.best_epoch == 2


def test_interrupted_models_are_merged_as_they_are(data, tmp_path, monkeypatch):
    whole = Fleet.fit

    def cut_off(fleet, *arguments, **options):
        whole(fleet, *arguments, **options | {"epochs": 2})
        raise KeyboardInterrupt

    monkeypatch.setattr(Fleet, "fit", cut_off)
    folder = fit(data, tmp_path / "run", "--scale", "robust")
    report = read(folder / "report.json")
    assert (report["interrupted"], report["epochs"]) == (True, 2)
    assert (folder / "checkpoints/model.safetensors").exists()


def test_groups_and_own_files_decide_the_rows_of_an_ensemble(data, tmp_path, capsys):
    """Folds would put rows of one group on both sides, so the models share the validation rows."""
    other, loud = table(tmp_path / "other.csv", count=60), ("train", data, "--target", "kind", *QUICK[:-1])
    for option, value in (("--group", "word"), ("--time", "a"), ("--validation", other)):
        out = tmp_path / option.strip("-")
        assert run(*loud, "--epochs", "2", option, value, "--out", out) == 0
        assert "\n5 models, which share these validation rows, of " in capsys.readouterr().err
        assert read(out / "config.json")["data"]["validation_rows"] > 0
        assert len(read(out / "report.json")["models"]) == 5
    assert run(*loud, "--epochs", "1", "--out", tmp_path / "folds") == 0
    assert "\n5 models of " in capsys.readouterr().err
    final = fit(data, tmp_path / "final", "--epochs", "2", "--validation", other, "--final-fit")
    # Some rows stand in both files.
    assert 120 < len(np.load(final / "training_rows.npy")) <= 180


def test_an_ensemble_stops_by_a_metric_and_knows_all_rows_of_a_final_fit(data, trained, tmp_path):
    folder = fit(data, tmp_path / "run", "--metric", "auc", "--final-fit")
    assert all("val_auc" in one for one in read(folder / "report.json")["models"])
    assert len(np.load(folder / "training_rows.npy")) == 120
    assert len(np.load(trained / "training_rows.npy")) == 96


def test_baselines_learn_from_a_bounded_share_of_the_rows():
    made = prepared_data(TrainOptions(data="iris"))
    X, labels = made.seen(10**9)
    assert X.shape == (120, 4) and len(labels) == 120
    fewer, some = made.seen(100)
    assert fewer.size <= 104 and len(some) == len(fewer)


def test_the_report_says_that_the_model_is_an_ensemble(trained):
    report, sizes = read(trained / "report.json"), read(trained / "config.json")["network"]["sizes"]
    for again in (False, True):
        if again:
            assert run("report", trained) == 0
        text = (trained / "report.html").read_text()
        assert f"5 models of {sizes[0]}-8-{sizes[-1]}, merged, " in text
        assert "96 training rows, in 5 folds to validate on, 24 test rows" in text
        assert "0 validation" not in text and "best epoch" not in text
        assert "Faint lines are the 5 models, the others their mean while all of them train." in text
        size, covered = f"{report['intervals']['classes']:.4f}", f"{report['intervals']['coverage']:.0%}"
        assert f"<dt>classes in 90% sets</dt><dd>{size}</dd><dd>cover {covered} of test rows</dd>" in text


def test_the_mean_is_drawn_as_far_as_all_models_train(trained, monkeypatch):
    report, history = read(trained / "report.json"), read_history(Run(trained))
    fewest = min(one["epochs"] for one in report["models"])
    assert fewest < len(history["loss"])
    mean, models = joint(history, report)
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(mean[name], np.mean([one[name][:fewest] for one in models], axis=0), rtol=1e-12)
    drawn = []
    monkeypatch.setattr(runs, "write_picture", lambda path, make, argument: drawn.append(make()))
    assert run("plot", trained, "--force") == 0
    assert [len(line.get_xdata()) for line in drawn[0].axes[0].get_lines()] == [fewest, fewest]
    # one of an earlier release has no curves of its models
    for one in report["models"]:
        del one["history"]
    assert joint(history, report) == (mean, [])


@pytest.mark.parametrize(
    ("mine", "linear", "advice"),
    [
        ({"accuracy": 0.9}, 0.8, "its gain over the linear model is more than chance"),
        ({"accuracy": 0.8}, 0.9, "the linear model is better"),
        ({"accuracy": 0.8}, 0.82, "its distance from the linear model may be chance"),
        ({"accuracy": 0.5}, 0.5, "it has learned nothing of use"),
        ({"r2": 0.5, "mae": 1.0}, 0.3, "its gain over the linear model is more than chance"),
        ({"r2": -0.1, "mae": 1.0}, 0.3, "it has learned nothing of use"),
        ({"r2": 0.31, "mae": 1.0}, 0.3, "its distance from the linear model may be chance"),
        (
            {
                "accuracy": 0.6,
                "classes": {name: dict(SHARES, rows=rows) for name, rows in (("a", 600), ("b", 400))},
                "confusion_matrix": [[600, 0], [400, 0]],
            },
            0.6,
            "it never answers 'b' (true of 400 rows): train with --class-weight balanced",
        ),
        (
            {
                "accuracy": 0.998,
                "classes": {name: dict(SHARES, rows=rows) for name, rows in (("a", 998), ("b", 2))},
                "confusion_matrix": [[998, 0], [2, 0]],
            },
            0.6,
            "its gain over the linear model",
        ),
    ],
)
def test_a_verdict_says_what_to_do(mine, linear, advice):
    name = "accuracy" if "accuracy" in mine else "r2"
    others = {"constant": {name: 0.5 if name == "accuracy" else -1e-5, "mae": 2.0}, "linear": {name: linear}}
    fact, follows = verdict({"test": {"rows": 1000, **mine}, "baselines": others})
    assert f"{max(0.0, mine[name]):.1%} of " in fact and f"{linear:.1%}" in fact
    assert follows.startswith(advice)


@pytest.mark.parametrize(
    ("linear", "advice"),
    [
        # of 900 and of 25 rows: two standard errors are 0.1
        (0.72, "its distance from the linear model may be chance"),
        (0.6, "its gain over the linear model is more than chance"),
    ],
)
def test_balanced_classes_are_judged_by_the_balanced_accuracy(linear, advice):
    classes = {"a": {"recall": 0.99, "rows": 900}, "b": {"recall": 0.51, "rows": 25}, "c": {"recall": 0, "rows": 0}}
    classes = {name: SHARES | figures for name, figures in classes.items()}
    test = {"rows": 925, "accuracy": 0.97, "balanced_accuracy": 0.75, "classes": classes}
    test["confusion_matrix"] = [[891, 9, 0], [12, 13, 0], [0, 0, 0]]
    figures = {"constant": (0.97, 0.5), "linear": (0.9, linear)}
    others = {name: dict(zip(("accuracy", "balanced_accuracy"), of, strict=True)) for name, of in figures.items()}
    report = {"test": test, "baselines": others, "judged_by": "balanced_accuracy"}
    fact, follows = verdict(report)
    assert fact.startswith("right on 75.0% of the rows of a class on average, 925 test rows in all, a linear model on")
    assert follows.startswith(advice)
    others["linear"]["balanced_accuracy"] = 0.9
    assert [*worse_than(report)] == ["the model is worse than the linear one: test balanced_accuracy 0.75 against 0.9"]


def test_a_rare_class_is_learned_and_judged_as_others(tmp_path, capsys):
    random = np.random.default_rng(0)
    table = pandas.DataFrame({"a": random.normal(size=600), "id": np.arange(600), "b": 1})
    table["y"] = np.where(table["a"] + 0.3 * random.normal(size=600) > 2.0, "rare", "common")
    table.to_csv(tmp_path / "a.csv", index=False)
    words = "train", tmp_path / "a.csv", "--target", "y", "--models", "1", "--scale", "robust", "--epochs", "30"
    assert run(*words, "--class-weight", "balanced", "--quiet", "--out", tmp_path / "run") == 0
    report, shown = read(tmp_path / "run/report.json"), capsys.readouterr().out
    assert report["judged_by"] == "balanced_accuracy" and report["left_out"] == {
        "id": "counts the rows",
        "b": "constant",
    }
    assert report["baselines"]["constant"]["balanced_accuracy"] == 0.5
    # classes of the linear model weigh alike too
    assert report["baselines"]["linear"]["balanced_accuracy"] > 0.8
    assert "it leaves out 'id' (counts the rows), 'b' (constant); --keep COLUMN takes one in" in shown
    assert run("train", "--resume", tmp_path / "run", "--epochs", "31", "--quiet") == 0
    assert read(tmp_path / "run/report.json")["left_out"] == report["left_out"]
    assert "It leaves out &#39;id&#39;" in (tmp_path / "run/report.html").read_text()


def test_a_verdict_on_several_targets_adds_no_units():
    others = {"constant": {"r2": -0.1, "mae": 2.0}, "linear": {"r2": 0.3}}
    fact, _ = verdict({"test": {"rows": 1000, "r2": 0.5, "mae": 1.0, "targets": {}}, "baselines": others})
    assert fact == "explains 50.0% of the variation in 1000 test rows, a linear model 30.0%"


def test_no_verdict_without_baselines_or_variation():
    others = {"constant": {"r2": None}, "linear": {"r2": None}}
    for report in ({}, {"test": {"rows": 9, "accuracy": 1.0}}, {"test": {"rows": 9, "r2": None}, "baselines": others}):
        assert list(verdict(report)) == []


@pytest.mark.parametrize("models", [1, 3])
def test_the_picture_marks_the_best_epoch_of_a_single_model(tmp_path, monkeypatch, models):
    drawn = []

    def kept(*given, **options):
        drawn.append(curves_figure(*given, **options))
        return drawn[0]

    monkeypatch.setattr("fusemlp.cli.report.curves_figure", kept)
    data = table(tmp_path / "data.csv", target="price")
    options = ("--target", "price", "--models", models, "--epochs", "3", *QUICK)
    assert run("train", data, *options, "--out", tmp_path / "run") == 0
    (figure,) = drawn
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert any("best epoch" in label for label in labels) is (models == 1)
    assert ("mean of 3 models of 5-8-1" in figure.get_suptitle()) is (models == 3)
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<dt>width of 90% intervals</dt>" in text
    assert (f"best epoch {read(tmp_path / 'run' / 'report.json')['best_epoch']}<" in text) is (models == 1)


def test_trials_hold_out_whole_groups_and_the_last_rows():
    generator = np.random.default_rng(0)
    groups, values = generator.integers(0, 40, 300), generator.normal(size=300)
    frame = pandas.DataFrame({"group": groups.astype(str), "when": np.arange(300), "x": values, "y": values})
    rows = np.random.default_rng(1).permutation(300)[:200]
    grouped = load_data(frame, target="y", columns=ColumnChoices(group="group"))
    for kept, held in defaults._parts(grouped, rows, 0):
        assert not set(grouped.groups[rows[kept]]) & set(grouped.groups[rows[held]]) and len(kept) + len(held) == 200
    timed = load_data(frame, target="y", columns=ColumnChoices(time="when"))
    for kept, held in defaults._parts(timed, rows, 0):
        assert timed.times[rows[kept]].max() < timed.times[rows[held]].min()
    assert defaults._parts(replace(grouped, groups=np.zeros(300)), rows, 0) == []


def test_a_rate_that_diverges_in_the_trial_ends_as_a_training_that_diverges(tmp_path, capsys):
    data = table(tmp_path / "data.csv", count=300)
    shown = refusal(capsys, "train", data, "--target", "kind", "--lr", "1e30", "--out", tmp_path / "run", code=1)
    assert "error: loss: it became NaN or infinite" in shown and "held-out rows" not in shown
    assert read(tmp_path / "run" / "report.json")["diverged"]


@pytest.mark.parametrize("sizes", [(3, 2), (3, 5, 2), (3, 5, 4, 2)])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_merged_engine_computes_the_mean_and_members_undo_it_also_from_a_file(sizes, normalise, tmp_path):
    X = np.random.default_rng(0).normal(3.0, 2.0, size=(20, 3))
    options = {"loss": "mse", "precision": "fp64", "normalise": normalise and X}
    engines = [Engine(MLP(sizes, activation="tanh"), seed=seed, **options) for seed in range(3)]
    for seed, engine in enumerate(engines):
        # biases start at zero
        state = engine.state_dict()
        engine.load_state_dict(state | {name: one + seed for name, one in state.items() if name.endswith("bias")})
    # sums of at most 15 products of numbers below 4, in float64
    close = {"rtol": 0, "atol": 64 * 15 * 4 * 2.0**-53}
    whole, mean = merged(engines), np.mean([engine.predict(X) for engine in engines], axis=0)
    np.testing.assert_allclose(whole.predict(X), mean, **close)
    if len(sizes) == 2:
        return
    whole.save_checkpoint(tmp_path / "m.safetensors")
    for one, engine in zip(members(load_checkpoint(tmp_path / "m.safetensors")), engines, strict=True):
        np.testing.assert_allclose(one.predict(X), engine.predict(X), **close)
    for name, tensor in merged(members(whole)).state_dict().items():
        np.testing.assert_allclose(tensor, whole.state_dict()[name], **close)


@pytest.mark.parametrize("change", [
    lambda engine, X, y: engine.step(X[:10], y[:10]),
    lambda engine, X, y: engine.fit(X, y, epochs=1),
    lambda engine, X, y: engine.probe(X, y, epochs=1),
    lambda engine, X, y: engine.load_state_dict(engine.state_dict() | {"2.bias": np.zeros(2)}),
], ids=["step", "fit", "probe", "load"])  # fmt: skip
def test_what_changes_a_merged_engine_makes_it_a_single_one(change, tmp_path):
    X, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20.0)
    whole = merged([Engine(MLP([3, 5, 2]), loss="gaussian", seed=seed, batch_size=10) for seed in range(3)])
    assert len(members(whole)) == 3
    change(whole, X, y)
    # of its own outputs, not of a mixture
    np.testing.assert_array_equal(whole.predict(X, return_std=True)[1], whole.loss.std(whole.outputs(X))[:, 0])
    whole.save_checkpoint(tmp_path / "m.safetensors")
    for engine in (whole, load_checkpoint(tmp_path / "m.safetensors")):
        with pytest.raises(ArgumentError, match=r"^engine: the model is a single one, was trained after its parts"):
            members(engine)


def test_the_spread_is_that_of_the_models(data, trained, tmp_path):
    words = ("predict", trained, "--data", data, "--spread", "--out")
    assert run(*words, tmp_path / "out.csv", "--proba") == 0
    answers = pandas.read_csv(tmp_path / "out.csv")
    assert list(answers) == ["prediction", "spread", "probability_no", "probability_yes"]
    made = Preprocessor.from_config(read(trained / "config.json")["preprocessor"])
    X = made.transform_features(load_features(str(data), made))
    each = np.stack([one.predict_proba(X) for one in members(model_of(trained))])
    codes = (answers["prediction"] == "yes").to_numpy(int)
    assert len(each) == 5
    np.testing.assert_allclose(answers["spread"], each[:, np.arange(len(X)), codes].std(axis=0), atol=1e-6)
    assert run(*words, tmp_path / "out.npz") == 0
    assert np.load(tmp_path / "out.npz")["spread"].shape == (len(X),)


def test_the_spread_of_numbers_is_in_their_units(tmp_path):
    X = np.random.default_rng(0).normal(size=(90, 2))
    y = 1000.0 * X + 50.0
    model = TableRegressor(hidden=8, models=3, epochs=5, scale="standard").fit(X, y)
    values, deviation = model.predict(X, return_std=True)
    np.testing.assert_array_equal(values, model.predict(X))
    each = [TableRegressor(hidden=8, models=1, epochs=5, scale="standard", random_state=seed) for seed in range(3)]
    inputs = model.preprocessor_.transform_features(X)
    decoded = [model.preprocessor_.decode_predictions(one.predict(inputs)) for one in members(model.engine_)]
    np.testing.assert_allclose(deviation, np.std(decoded, axis=0), rtol=1e-5)
    assert values.shape == deviation.shape == (90, 2) and 1.0 < deviation.mean() < 3000.0
    with pytest.raises(ArgumentError, match=r"^return_std: the model is a single one.*train an ensemble"):
        each[0].fit(X, y).predict(X, return_std=True)
    linear = TableRegressor(hidden=(), models=3, epochs=2, scale="standard").fit(X, y)
    with pytest.raises(ArgumentError, match=r"^return_std: the model has no hidden layers"):
        linear.predict(X, return_std=True)
