"""Batches of tensors in memory: rows, orders, options, errors, and loops over them."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch_pair import Pair, adam, eager_step

from fusemlp.torch import Batches
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, ShapeError

X, Y = torch.arange(46.0).reshape(23, 2), torch.arange(23)


def rows_of(batches):
    """Return the labels of an epoch, a list for each batch, after a check that x belongs to y."""
    found = []
    for x, y in batches:
        assert torch.equal(x, X[y])
        found.append(y.tolist())
    return found


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [1, 5, 23, 30])
def test_an_epoch_has_every_row_once(size, drop_last):
    if size == 30 and drop_last:
        return
    batches = Batches(X, Y, batch_size=size, drop_last=drop_last)
    loader = DataLoader(TensorDataset(X, Y), batch_size=size, drop_last=drop_last)
    for epoch in range(3):
        assert batches.epoch == epoch
        found = rows_of(batches)
        assert [len(rows) for rows in found] == [len(y) for _, y in loader]
        assert len(batches) == len(loader) == len(found)
        flat = [row for rows in found for row in rows]
        assert len(set(flat)) == len(flat) and set(flat) <= set(range(23))


def test_every_epoch_has_its_own_order():
    torch.manual_seed(0)
    batches = Batches(X, Y, batch_size=5)
    first, second = rows_of(batches), rows_of(batches)
    assert first != second != sorted(second)
    torch.manual_seed(0)
    assert rows_of(Batches(X, Y, batch_size=5)) == first


def test_a_seed_decides_the_order_of_each_epoch():
    one, other = Batches(X, Y, batch_size=5, seed=3), Batches(X, Y, batch_size=5, seed=3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    orders = [rows_of(one) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({str(order) for order in orders}) == 3
    other.epoch = 2
    assert rows_of(other) == orders[2]
    assert rows_of(Batches(X, Y, batch_size=5, seed=4)) != orders[0]


def test_a_generator_draws_the_order():
    orders = [rows_of(Batches(X, Y, batch_size=5, generator=torch.Generator().manual_seed(8))) for _ in range(2)]
    assert orders[0] == orders[1]
    generator = torch.Generator().manual_seed(8)
    assert [row for rows in orders[0] for row in rows] == torch.randperm(23, generator=generator).tolist()


def test_without_shuffling_batches_are_views():
    batches = Batches(X, Y, batch_size=5, shuffle=False)
    assert rows_of(batches) == [list(range(start, min(start + 5, 23))) for start in range(0, 23, 5)]
    assert next(iter(batches))[0].data_ptr() == X.data_ptr()
    assert rows_of(Batches(X, Y, batch_size=5, shuffle=False, drop_last=True))[-1] == [15, 16, 17, 18, 19]


def test_batches_stay_after_the_next_one():
    kept = list(Batches(X, Y, batch_size=5))
    assert sorted(torch.cat([y for _, y in kept]).tolist()) == list(range(23))


def test_one_tensor_and_many():
    assert sum(len(x) for (x,) in Batches(X, batch_size=4)) == 23
    for x, y, weight in Batches(X, Y, Y * 2.0, batch_size=4):
        assert torch.equal(x, X[y]) and torch.equal(weight, y * 2.0)
    assert repr(Batches(X, Y)) == "Batches((23, 2), (23,), batch_size=32, shuffle=True, drop_last=False)"


def test_fused_and_plain_loops():
    torch.manual_seed(1)
    x, y = torch.randn(50, 6).double(), torch.randint(0, 3, (50,))
    pair = Pair(make_optimizer=adam)
    for _ in range(3):
        for batch in Batches(x, y, batch_size=16, seed=5):
            pair.step(*batch)
        for batch in Batches(x, y, batch_size=16, seed=5):
            eager_step(pair.twin, pair.eager, *batch)
    pair.same()


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: Batches(), ArgumentTypeError, "at least one"),
        (lambda: Batches(X, Y.tolist()), ArgumentTypeError, r"tensors\[1\]: .* got list; use torch\.as_tensor"),
        (lambda: Batches(np.zeros((3, 2))), ArgumentTypeError, r"tensors\[0\]: .* ndarray"),
        (lambda: Batches(TensorDataset(X, Y)), ArgumentTypeError, r"use Batches\(\*dataset\.tensors\)"),
        (lambda: Batches(X, Y[:4]), ShapeError, r"tensors\[1\]: has 4 rows, tensors\[0\] has 23"),
        (lambda: Batches(X[:0], Y[:0]), ShapeError, "at least one row"),
        (lambda: Batches(torch.tensor(1.0)), ShapeError, r"at least one row, got shape \(\)"),
        (lambda: Batches(X, Y.to("meta")), ArgumentError, r"tensors\[1\]: is on meta"),
        (lambda: Batches(X, Y, batch_size=0), ArgumentError, "batch_size"),
        (lambda: Batches(X, Y, batch_size=24, drop_last=True), ArgumentError, "24 is more than the 23 rows"),
        (lambda: Batches(X, Y, seed=-1), ArgumentError, "seed"),
        (lambda: Batches(X, Y, seed=1, generator=torch.Generator()), ArgumentError, "seed, generator: both"),
        (lambda: Batches(X, Y, generator=3), ArgumentTypeError, r"generator: expected a torch\.Generator, got 3"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
