"""Intervals and sets of classes: their coverage on new rows, what is kept of the errors, and the commands."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas
import pytest
from scipy.stats import binom

from fusemlp.describe.description import stored
from fusemlp.report.uncertainty import KEPT, HeldOut, intervals
from fusemlp.sklearn import TableClassifier, TableRegressor
from fusemlp_kernels.errors import ArgumentError
from make import read, refusal, rows, run


def numbers(count, seed):
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(count, 2))
    return X, X @ [2.0, -1.0] + generator.standard_t(4, size=count)


def least(count, share):
    """Return the number of ``count`` new rows that are covered with all but a chance of one in 100,000."""
    return int(binom.ppf(1e-5, count, share))


@pytest.mark.parametrize("models", [1, 4])
@pytest.mark.parametrize("log_target", [False, True])
def test_intervals_cover_their_share_of_new_rows(models, log_target):
    X, y = numbers(900, 0)
    new, truth = numbers(4000, 1)
    if log_target:
        y, truth = np.exp(y), np.exp(truth)
    model = TableRegressor(models=models, log_target=log_target, epochs=30, validation_fraction=0.4).fit(X, y)
    widths = []
    for coverage in (0.5, 0.9):
        low, high = model.predict_interval(new, coverage=coverage)
        predicted = model.predict(new)
        # in float64, around a prediction that exponentials may have rounded
        assert (low <= predicted * (1 + 1e-12) + 1e-12).all() and (predicted <= high * (1 + 1e-12) + 1e-12).all()
        covered = np.count_nonzero((low <= truth) & (truth <= high))
        # the share that some 360 held-out rows give is itself uncertain
        assert least(4000, coverage - 4 * math.sqrt(coverage * (1 - coverage) / 360)) <= covered
        assert covered <= 4000 - least(4000, 1 - coverage - 4 * math.sqrt(coverage * (1 - coverage) / 360))
        widths.append(np.median(high - low))
    assert widths[0] < widths[1]
    if log_target:
        assert (model.predict_interval(new)[0] > 0).all()
    np.testing.assert_array_equal(model.predict_interval(new, 0.5), model.predict_interval(new, coverage=0.5))


@pytest.mark.parametrize("loss, targets", [("quantiles", 1), ("gaussian", 1), ("gaussian", 2)])
def test_intervals_of_a_distribution_are_as_wide_as_a_row_needs(loss, targets):
    def noisy(count, seed):
        generator = np.random.default_rng(seed)
        X = generator.normal(size=(count, 2))
        noise = generator.normal(size=(count, targets)) * np.where(X[:, :1] > 0, 4.0, 0.5)
        return X, (X[:, 1:] + noise) * [10.0, 1.0][:targets]

    (X, y), (held_X, held_y), (new, truth) = noisy(720, 0), noisy(480, 2), noisy(4000, 1)
    if targets == 1:
        y, held_y = y[:, 0], held_y[:, 0]
    model = TableRegressor(loss=loss, epochs=30).fit(X, y, X_val=held_X, y_val=held_y)
    held = model.held_out_
    assert held.adaptive and stored("held_out", held.to_config(), HeldOut) == held
    # the share that 480 held-out rows give is itself uncertain
    error, loud = 4 * math.sqrt(0.8 * 0.2 / 480), new[:, 0] > 0

    def ends_and_gap():
        low, high = (end.reshape(4000, targets) for end in model.predict_interval(new, 0.8))
        inside = (low <= truth) & (truth <= high)
        for count in np.count_nonzero(inside, axis=0):
            assert least(4000, 0.8 - error) <= count <= 4000 - least(4000, 0.2 - error)
        return high - low, inside[~loud].mean() - inside[loud].mean()

    widths, gap = ends_and_gap()
    assert (np.median(widths[loud], axis=0) > 2 * np.median(widths[~loud], axis=0)).all()
    # the record of an earlier release: distances from the median or the mean, and one width for all rows
    model.held_out_ = HeldOut.of(np.abs(model.predict(held_X) - held_y))
    widths, gap_of_one_width = ends_and_gap()
    assert np.ptp(widths, axis=0) == pytest.approx(0, abs=1e-4)
    assert gap < 0.75 * gap_of_one_width


def test_quantiles_too_far_out_move_in_and_never_cross():
    X, y = numbers(400, 0)
    model = TableRegressor(loss="quantiles", quantile=(0.01, 0.5, 0.99), epochs=20, validation_fraction=0.4).fit(X, y)
    bands, (low, high) = model.predict_quantiles(X), model.predict_interval(X, 0.3)
    assert model.held_out_.bound(0.3)[0] < 0
    assert (bands[:, 0] <= low).all() and (low <= high).all() and (high <= bands[:, -1]).all()


def test_intervals_of_counts_begin_at_zero_at_least_and_without_held_out_rows_there_are_none():
    generator = np.random.default_rng(0)
    X = generator.normal(size=(300, 2))
    y = generator.poisson(np.exp(X[:, 0]))
    model = TableRegressor(models=1, loss="poisson", epochs=20).fit(X, y)
    low, high = model.predict_interval(X, coverage=0.9)
    assert low.min() == 0.0 and (low < high).all()
    model = TableRegressor(early_stopping=None, epochs=2).fit(X, y)
    with pytest.raises(ArgumentError, match=r"^coverage: no held-out rows came with fit"):
        model.predict_interval(X)


def test_intervals_of_targets_that_are_never_negative_begin_at_zero_and_lose_no_coverage():
    X, y = numbers(900, 0)
    new, truth = numbers(4000, 1)
    signs = np.array([1.0, -1.0])
    model = TableRegressor(models=1, epochs=30).fit(X, np.exp(0.5 * y)[:, None] * signs)
    assert model.held_out_.nonnegative == (True, False)
    truth = np.exp(0.5 * truth)[:, None] * signs
    low, high = model.predict_interval(new)
    unbounded = replace(model.held_out_, nonnegative=())
    wide = intervals(model.engine_, model.preprocessor_, model._inputs(new), unbounded, 0.9)
    assert wide[0][:, 0].min() < 0.0 == low[:, 0].min() and (low <= high).all() and high[:, 0].min() >= 0.0
    # what is cut off holds no truth
    inside, before = (((ends[0] <= truth) & (truth <= ends[1])).sum(axis=0) for ends in ((low, high), wide))
    np.testing.assert_array_equal(inside, before)
    np.testing.assert_array_equal(low[:, 1], wide[0][:, 1])
    assert stored("held_out", model.held_out_.to_config(), HeldOut) == model.held_out_


def test_sets_of_classes_cover_their_share_and_hold_the_predicted_class():
    generator = np.random.default_rng(0)
    X = generator.normal(size=(1200, 2))
    y = np.array([*"abc"])[(X @ generator.normal(size=(2, 3)) + generator.gumbel(size=(1200, 3))).argmax(axis=1)]
    model = TableClassifier(models=4, epochs=30).fit(X[:800], y[:800])
    predicted = model.predict(X[800:])
    codes = np.searchsorted(model.classes_, y[800:])
    for coverage in (0.6, 0.95):
        sets = model.predict_set(X[800:], coverage=coverage)
        assert sets.dtype == bool and sets.shape == (400, 3)
        assert sets[np.arange(400), np.searchsorted(model.classes_, predicted)].all()
        share = coverage - 4 * math.sqrt(coverage * (1 - coverage) / 800)
        assert np.count_nonzero(sets[np.arange(400), codes]) >= least(400, share)
    assert sets.sum() > model.predict_set(X[800:], 0.6).sum()


def test_bounds_are_the_order_statistics_of_all_errors_or_the_next_ones_kept():
    errors = np.random.default_rng(0).exponential(size=(300, 2))
    held = HeldOut.of(errors)
    assert stored("held_out", held.to_config(), HeldOut) == held
    np.testing.assert_array_equal(held.bound(0.9), np.sort(errors, axis=0)[math.ceil(301 * 0.9) - 1])
    many = np.random.default_rng(0).exponential(size=50_000)
    kept = HeldOut.of(many)
    assert len(kept.ranks) == KEPT
    rank = math.ceil(50_001 * 0.9)
    assert np.sort(many)[rank - 1] <= kept.bound(0.9)[0] <= np.sort(many)[rank - 1 + 50]
    with pytest.raises(ArgumentError, match=r"^coverage: 0.9 needs at least 9 held-out rows, and the model has 8;"):
        HeldOut.of(errors[:8]).bound(0.9)
    assert HeldOut.of(errors[:9]).bound(0.9)[0] == errors[:9, 0].max()
    with pytest.raises(ArgumentError, match=r"^coverage: .*1.0"):
        held.bound(1.0)


def test_each_target_has_the_bound_of_its_own_rows():
    errors = np.random.default_rng(0).exponential(size=(3000, 3))
    errors[200:, 1] = np.nan
    errors[5:, 2] = np.nan
    held = HeldOut.of(errors)
    assert stored("held_out", held.to_config(), HeldOut) == held and held.rows == 3000
    bound = held.bound(0.9)
    assert bound[0] == HeldOut.of(errors[:, 0]).bound(0.9)[0]
    assert bound[1] == np.sort(errors[:200, 1])[math.ceil(201 * 0.9) - 1]
    assert bound[2] == np.inf and held.bound(0.8)[2] == errors[:5, 2].max()
    errors[:, 2] = np.nan
    assert HeldOut.of(errors).bound(0.1)[2] == np.inf
    with pytest.raises(ArgumentError, match="and the model has 5;"):
        HeldOut.of(errors[:5]).bound(0.9)


def test_a_sparse_target_leaves_the_others_their_intervals(tmp_path, capsys):
    X, y = numbers(400, 0)
    frame = pandas.DataFrame(X, columns=["a", "b"]).assign(y=y, sparse=y)
    frame.loc[frame.index % 100 > 0, "sparse"] = np.nan
    frame.to_csv(data := tmp_path / "data.csv", index=False)
    asked = ("--hidden", 8, "--epochs", 4, "--scale", "robust", "--quiet", "--out", tmp_path / "run")
    assert run("train", data, "--target", "y,sparse", *asked) == 0
    report = read(tmp_path / "run" / "report.json")
    # targets of several units have no width in common
    assert 0.5 < report["intervals"]["coverage"] <= 1.0 and "width" not in report["intervals"]
    capsys.readouterr()
    out = tmp_path / "out.csv"
    assert run("predict", tmp_path / "run", "--data", data, "--out", out, "--interval", "0.9") == 0
    assert "too few held-out rows have 'sparse': its intervals have no ends" in capsys.readouterr().out
    ends = pandas.read_csv(out)
    assert np.isfinite(ends[["low_y", "high_y"]]).all(axis=None) and np.isinf(ends["high_sparse"]).all()


def test_the_command_writes_intervals(tmp_path, capsys):
    X, y = numbers(400, 0)
    lines = ["a,b,y", *(f"{a:.4f},{b:.4f},{value:.4f}" for (a, b), value in zip(X, y, strict=True))]
    data, out = tmp_path / "data.csv", tmp_path / "out.csv"
    data.write_text("\n".join(lines) + "\n")
    assert run("train", data, "--target", "y", "--hidden", "8", "--epochs", "40", "--out", tmp_path / "run") == 0
    shown = capsys.readouterr().out
    report = read(tmp_path / "run" / "report.json")
    assert report["held_out"]["rows"] == 320 and report["intervals"]["level"] == 0.9
    assert report["intervals"]["coverage"] * 80 >= least(80, 0.9 - 4 * math.sqrt(0.09 / 320))
    assert f"cover {report['intervals']['coverage']:.0%} of the test rows" in shown
    assert run("predict", tmp_path / "run", "--data", data, "--out", out, "--interval", "0.8") == 0
    table = rows(out)
    assert list(table[0]) == ["prediction", "low", "high"]
    said = np.array([[float(row[name]) for name in ("low", "prediction", "high")] for row in table])
    bound = stored("held_out", report["held_out"], HeldOut).bound(0.8)[0]
    np.testing.assert_allclose(np.diff(said, axis=1), bound, rtol=1e-9)
    estimator = TableRegressor.from_run(tmp_path / "run")
    intervals = estimator.predict_interval(pandas.read_csv(data)[["a", "b"]], coverage=0.8)
    np.testing.assert_allclose(np.transpose(intervals), said[:, [0, 2]])
    estimator.save(tmp_path / "estimator.safetensors")
    assert TableRegressor.load(tmp_path / "estimator.safetensors").held_out_ == estimator.held_out_
    capsys.readouterr()
    arguments = ("predict", tmp_path / "run", "--data", data, "--out", tmp_path / "more.npz", "--interval")
    assert run(*arguments, "0.999") == 2
    assert "--interval: 0.999 needs at least 999 held-out rows, and the model has 320" in capsys.readouterr().err
    assert run(*arguments, "0.8") == 0
    with np.load(tmp_path / "more.npz") as found:
        np.testing.assert_array_equal(found["low"], said[:, 0])
    changed = read(tmp_path / "run" / "report.json")
    del changed["held_out"]
    (tmp_path / "run" / "report.json").write_text(json.dumps(changed))
    assert run(*arguments, "0.8", "--force") == 2
    because = "has no errors of held-out rows, because"
    assert f"{because} an earlier release wrote it" in capsys.readouterr().err
    config = read(tmp_path / "run" / "config.json")
    report = tmp_path / "run" / "report.json"
    for causes, said in (
        ({}, f"{because} Ctrl-C cut the training off"),
        ({"validation_fraction": 0.0}, f"{because} of --validation-fraction 0"),
        ({"validation_fraction": 0.0, "validation": "other.csv"}, f"{because} Ctrl-C"),
    ):
        report.write_text(json.dumps(changed | {"interrupted": True}))
        (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"options": config["options"] | causes}))
        assert said in refusal(capsys, *arguments, "0.8", "--force")
    report.unlink()
    assert run(*arguments, "0.8", "--force") == 2
    assert re.search(r"--interval: the report of .* is missing: .*train --resume", capsys.readouterr().err)


def test_the_command_writes_sets_of_classes(tmp_path):
    out = tmp_path / "out.csv"
    assert run("train", "iris", "--epochs", "30", "--quiet", "--out", tmp_path / "run") == 0
    names = read(tmp_path / "run" / "config.json")["preprocessor"]["feature_names"]
    (tmp_path / "new.csv").write_text(",".join(names) + "\n5.1,3.5,1.4,0.2\n6.3,2.7,4.9,1.7\n")
    arguments = ("predict", tmp_path / "run", "--data", tmp_path / "new.csv", "--out", out, "--interval", "0.9")
    assert run(*arguments, "--proba") == 0
    first, second = rows(out)
    assert first["set"] == first["prediction"] and second["prediction"] in second["set"].split("|")
    assert list(first)[:2] == ["prediction", "set"] and len(first) == 5


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_the_coverage_of_the_report_is_that_of_what_predict_writes(kind, tmp_path, capsys):
    X, y = numbers(400, 0)
    # classes so far apart that 90 % need fewer rows than are right, so that the predicted class alone adds some;
    # numbers of which some count as the least training row, and lie below every interval of logarithms
    line = X @ [2.0, -1.0]
    words = np.where(line > 0, "up", "down") if kind == "classes" else np.exp(np.maximum(y, -3) / 4).astype(str)
    if kind == "numbers":
        words[300:][line[300:] < -3] = "-1.0"
    data, test, out = (tmp_path / f"{name}.csv" for name in ("data", "test", "out"))
    for path, part in ((data, slice(0, 300)), (test, slice(300, 400))):
        pandas.DataFrame({"a": X[part, 0], "b": X[part, 1], "y": words[part]}).to_csv(path, index=False)
    options = [] if kind == "classes" else ["--log-target"]
    arguments = ("--target", "y", "--test", test, "--hidden", "8", "--models", "1", "--epochs", "60", *options)
    assert run("train", data, *arguments, "--out", tmp_path / "run") == 0
    shown, report = capsys.readouterr().out, read(tmp_path / "run" / "report.json")["intervals"]
    assert run("predict", tmp_path / "run", "--data", test, "--interval", "0.9", "--out", out) == 0
    table, truths = rows(out), words[300:]
    if kind == "classes":
        sets = [row["set"].split("|") for row in table]
        inside = [truth in labels for truth, labels in zip(truths, sets, strict=True)]
        size, about = np.mean([len(labels) for labels in sets]), "classes"
    else:
        low, high = np.array([[float(row["low"]), float(row["high"])] for row in table]).T
        inside = (low <= truths.astype(float)) & (truths.astype(float) <= high)
        size, about = (high - low).mean(), "width"
    assert report["coverage"] == np.mean(inside)
    assert report[about] == pytest.approx(size)
    assert f"on average, which cover {np.mean(inside):.0%} of the test rows" in shown
    assert f"<dd>cover {np.mean(inside):.0%} of test rows</dd>" in (tmp_path / "run" / "report.html").read_text()
