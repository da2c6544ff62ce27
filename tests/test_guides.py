"""The guides: each runs from top to bottom in a folder of its own, prints what it shows, and ends as it says."""

import guides
import numpy as np
import pytest


def sure(names):
    """Quantiles and deviations have a width for each row; the interval around a plain model has one for all."""
    rush, plain, bands = names["rush"], names["plain"], names["bands"]
    width = bands["q95"] - bands["q5"]
    assert np.ptp(plain["high"] - plain["low"]) < 1e-3 * (plain["high"] - plain["low"]).mean()
    assert width[rush].mean() > 2 * width[~rush].mean()
    # the share of 1,000 rows has a standard deviation of a hundredth; the model is of 240 validation rows
    for low, high in ((plain["low"], plain["high"]), (bands["q5"], bands["q95"])):
        assert 0.84 < np.mean((low <= names["new"]["minutes"]) & (names["new"]["minutes"] <= high)) < 0.96
    assert np.mean(names["mean"] - 1.64 * names["std"] < 5 + 2 * names["new"]["distance"]) > 0.5


def rare(names):
    found, rows = names["probability"] > 1 / 21, names["y_new"] == 1
    assert np.mean(found[rows]) > np.mean(names["plain"].predict(names["X_new"])[rows] == 1)
    assert max(names["auc"]) - min(names["auc"]) < 0.03


# Facts about the names that the Python blocks of a guide leave.
FACTS = {
    "from-keras": lambda names: names["model"].evaluate(names["X_new"], names["y_new"])["accuracy"] > 0.94,
    "from-pytorch": lambda names: names["right"] > 0.94 and names["after"] < names["before"],
    "from-scikit-learn": lambda names: names["gap"] < 1e-6 and names["ours"].n_iter_ == names["theirs"].n_iter_,
    "gpu": lambda names: names["history"].history["accuracy"][-1] > 0.8,
    "imbalance": lambda names: rare(names) is None,
    "many-models": lambda names: min(names["alone"]) < names["accuracy"] and names["search"].best_score_ > 0.93,
    "messy-table": lambda names: names["model"].score(names["table"][1200:], names["price"][1200:]) > 0.7,
    "own-loss": lambda names: names["engine"].loss.name == "cost",
    "own-metric": lambda names: max(names["history"].history["val_top_2_accuracy"]) > 0.97,
    "production": lambda names: (
        np.abs(names["answer"](names["new"].to_dict("records")) - names["expected"]).max() < 1e-3
    ),
    "several-targets": lambda names: names["engine"].predict(names["X_new"]).shape == (300, 2),
    "smooth-function": lambda names: (
        np.sqrt((names["error"] ** 2).mean()) < 0.006 * names["spread"]
        and np.abs(names["one_percent"]).mean(axis=0).argmax() == 0
    ),
    "uncertainty": lambda names: sure(names) is None,
}


@pytest.mark.parametrize("name", guides.NAMES)
def test_a_guide_runs_and_prints_what_it_shows(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block, printed in guides.run(name, names):
        guides.current(block[3] or "", printed)
    assert FACTS[name](names)


def test_a_line_that_is_not_printed_is_named():
    assert guides.current("a 1.5\n...\nc 2\n", "a 1.25\nb\nc 3\n") == "a 1.25\n...\nc 3\n"
    with pytest.raises(ValueError, match="is not printed: b 4"):
        guides.current("c 2\nb 4\n", "a 1.25\nb 5\nc 3\n")
