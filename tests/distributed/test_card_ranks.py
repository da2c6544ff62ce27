"""Several processes train on the Triton backend: under its interpreter, with gloo in place of NCCL."""

import os

import numpy as np
import pytest
import worlds
from card_ranks import CASES, main
from cases import trained

from make import assert_same

pytest.importorskip("torch")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("for Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return worlds.Worlds(tmp_path_factory.mktemp("cards"), (1, 2), main)


@pytest.mark.parametrize("name", [*CASES, "resumed", "overflows"])
def test_one_and_two_ranks_give_the_same_bits(found, name):
    one = found.of(1, name)
    assert_same(found.of(2, name), one)
    assert np.isfinite(one["params"]).all() and one["params"].any()


@pytest.mark.parametrize("name", ["weights", "numbers", "weights, fast"])
def test_two_ranks_train_as_one_process_does(found, name):
    """The bound: 2 updates, each of which adds lr g / (1 - momentum) at most, with an error of gamma_n |g|, n being the
    additions of a batch, the weighing of its shards and a product of 12; |g| is below 4 for these data."""
    bound = 2 * 0.05 / (1 - 0.9) * (20 + 8 + 2 + 12) * 2.0**-24 * 4
    found.assert_close(2, name, trained(CASES[name.removesuffix(", fast")]), rtol=0, atol=bound)


def test_an_overflow_skips_the_batch_on_all_ranks(found):
    assert found.of(2, "overflows")["skipped"] >= 1


def test_early_stopping_ends_both_ranks_alike(found):
    lengths = {count: len(found.of(count, "early stopping")["history val_loss"]) for count in (1, 2)}
    assert lengths[1] == lengths[2] < 5


def test_the_plan_says_that_it_is_shared(found):
    assert found.said(2, "plan")[0] == "eager"
    assert found.said(2, "reason")[0].startswith("the launches of a step, and a collective between")
