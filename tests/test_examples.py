"""The scripts of engine/examples: each learns what its docstring says."""

import importlib.util
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import fusemlp

FOLDER = Path(__file__).resolve().parents[1] / "engine/examples"


def load(name):
    """Return the module of a script, which its ``__main__`` part does not run in."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_focal_loss_finds_more_of_the_rare_class(capsys):
    example = runpy.run_path(str(FOLDER / "focal_loss.py"), run_name="__main__")
    shown = capsys.readouterr()
    # of 315 rows: five more points are 16 rows
    plain, focal = (float(share) for share in re.findall(r"([\d.]+)% of class 1", shown.out))
    assert 30 < plain < focal - 5 and shown.err == ""
    outputs = np.random.default_rng(1).normal(size=(6, 2))
    assert fusemlp.check_gradient(example["focal"], outputs, np.array([0, 1, 0, 0, 1, 1])) < 1e-8


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


def test_an_example_of_reinforcement_learning_is_short():
    assert all(len((FOLDER / f"{name}.py").read_text().splitlines()) <= 150 for name in ("dqn", "ppo"))
