"""The sample has each value of each parameter, and leaves out cases."""

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
