"""The sample has each value of each parameter, and leaves out cases."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from sample import covering, values_of
from test_kernels import LINEAR, LOSS_CASES

CASES = {
    "linear": [dict(zip(("path", "precision", "aligned"), case, strict=True)) for case in LINEAR],
    "loss": [dict(zip(("target", "precision", "loss", "aligned"), case, strict=True)) for case in LOSS_CASES],
    "a tuple": [{"variant": (target, precision)} for target in ("sm_80", "sm_90") for precision in ("fp32", "bf16")],
    "lists": [{"widths": [number, 4]} for number in range(3)],
}


@pytest.mark.parametrize(("name", "count"), [("linear", 5), ("loss", 2), ("a tuple", 2), ("lists", 3)])
def test_the_sample_has_each_value(name, count):
    cases = CASES[name]
    chosen = covering(cases)
    assert len(set(chosen)) == len(chosen) == count
    sampled = set().union(*(values_of(cases[place]) for place in chosen))
    assert sampled == set().union(*map(values_of, cases))
    # without any of them a value is gone
    for left_out in chosen:
        assert set().union(*(values_of(cases[place]) for place in chosen if place != left_out)) != sampled


def test_the_sample_does_not_depend_on_the_order_of_sets():
    """Each process has orders of its own, by the hashes of strings."""
    axes = {"target": ("sm_80", "sm_90"), "rule": ("sgd", "adam", "nesterov"), "precision": ("fp32", "bf16")}
    cases = [dict(zip(axes, case, strict=True)) for case in itertools.product(*axes.values())]
    # with 10 of the 12 cases several sums are equal but for their rounding
    code = f"from sample import covering; print(covering({cases[:10]}))"
    chosen = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": str(seed)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in range(12)
    }  # fmt: skip
    assert len(chosen) == 1
