"""``--vary``: the values of one option, and the models of several."""

import numpy as np
import pytest

from fusemlp.cli.vary import combinations, parsed_axes, spelled_value


@pytest.mark.parametrize(
    ("words", "name", "values", "scale"),
    [
        ("lr=0.1,0.01", "lr", (0.1, 0.01), ""),
        ("lr=1", "lr", (1.0,), ""),
        (" weight-decay = 0 , 1e-3 ", "weight_decay", (0.0, 0.001), ""),
        ("hidden=32,64x32,none", "hidden", (32, (64, 32), ()), ""),
        ("betas=0.9x0.999", "betas", ((0.9, 0.999),), ""),
        ("seed=0:4", "seed", (0, 1, 2, 3), "linear"),
        ("dropout=0:0.5:3", "dropout", (0.0, 0.25, 0.5), "linear"),
        ("dropout=0:0.5:lin:3", "dropout", (0.0, 0.25, 0.5), "linear"),
        ("lr=0.001:0.1:log:4", "lr", (0.001, 0.00464159, 0.0215443, 0.1), "log"),
        ("lr=0.123456789:0.2:log:2", "lr", (0.123456789, 0.2), "log"),
        ("hidden=8:64:log:4", "hidden", (8, 16, 32, 64), "log"),
        ("batch_size=8:10:lin:9", "batch_size", (8, 9, 10), "linear"),
    ],
)
def test_what_words_stand_for(words, name, values, scale):
    (axis,) = parsed_axes([words])
    assert (axis.name, axis.values, axis.scale) == (name, values, scale)
    assert [type(value) for value in axis.values] == [type(value) for value in values]


@pytest.mark.parametrize("words", ["hidden=32,64x32,none", "betas=0.9x0.999,0.5x0.9", "lr=1e-07,0.1", "seed=3"])
def test_what_is_spelled_can_be_read_again(words):
    (axis,) = parsed_axes([words])
    assert f"{axis.name}={','.join(map(spelled_value, axis.values))}" == words


def test_a_product_the_last_quickest():
    found = combinations(parsed_axes(["lr=0.1,0.2", "seed=0:3"]), sample=None, seed=0)
    assert found == [{"lr": lr, "seed": seed} for lr in (0.1, 0.2) for seed in range(3)]
    assert found == combinations(parsed_axes(["lr=0.1,0.2", "seed=0:3"]), sample=100, seed=0)


def test_a_sample_has_no_model_twice_and_all_are_equally_likely():
    among = parsed_axes(["lr=0.1:1:lin:4", "seed=0:3"])
    everything = combinations(among, sample=None, seed=0)
    times = np.zeros(12)
    for seed in range(600):
        found = combinations(among, sample=5, seed=seed)
        places = [everything.index(point) for point in found]
        assert places == sorted(set(places)) and len(places) == 5
        times[places] += 1
    # hypergeometric: mean 250, standard deviation sqrt(600 * 5/12 * 7/12) = 12.1; five of them
    assert abs(times - 250).max() < 61


def test_a_sample_of_more_than_can_be_listed():
    among = parsed_axes(["lr=0.1:1:lin:100000", "seed=0:100000", "weight_decay=0:1:lin:100000"])
    assert len({tuple(point.values()) for point in combinations(among, sample=1000, seed=1)}) == 1000
