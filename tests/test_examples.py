"""The scripts of engine/examples: each learns what its docstring says."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import recall_score

import fusemlp

FOLDER = Path(__file__).resolve().parents[1] / "engine/examples"


def load(name):
    """Return the module of a script, which its ``__main__`` part does not run in."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_focal_loss_finds_more_of_the_rare_class():
    example = load("focal_loss")
    X, X_test, y, y_test = example.data()
    outputs = np.random.default_rng(1).normal(size=(6, 2))
    assert fusemlp.check_gradient(example.focal, outputs, np.array([0, 1, 0, 0, 1, 1])) < 1e-8
    plain, focal = (
        recall_score(y_test, example.classes(example.train(loss, X, y), X_test))
        for loss in ("cross_entropy", example.focal)
    )
    # of 315 rows: five more points are 16 rows
    assert 0.3 < plain < focal - 0.05


def test_dqn_learns():
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    means = load("dqn").train()
    # random actions have 22 on average
    assert means[100] < 40 and means[-1] >= 150


def test_ppo_balances_the_pole():
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    means = load("ppo").train()
    assert means[0] < 40 and means[-1] >= 475


def test_networks_and_trees_on_the_diamonds():
    example = load("diamonds")
    errors = example.errors(example.TABLE[::5], 0)
    network, *trees = errors.values()
    assert len(trees) == 2 and 100 < network < min(trees)


def test_a_script_runs_as_typed():
    done = subprocess.run([sys.executable, FOLDER / "focal_loss.py"], capture_output=True, text=True, check=True)
    assert done.stderr == "" and "focal loss" in done.stdout


def test_an_example_of_reinforcement_learning_is_short():
    assert all(len((FOLDER / f"{name}.py").read_text().splitlines()) <= 150 for name in ("dqn", "ppo"))
