"""``fit`` and ``evaluate`` take batches: generators, lists, DataLoaders, objects with a length."""

import numpy as np
import pytest

import fusemlp
from fusemlp import MLP, ArgumentError, ArgumentTypeError, DataError, DivergenceError, ShapeError
from make import assert_same, engine

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(44, 5)).astype(np.float32), RNG.integers(0, 3, 44)
W = RNG.random(44).astype(np.float32) + 0.1
SIZE = 16


def make(**options):
    return engine(net=MLP([5, 8, 3], dropout=0.2), **options)


def cut(*arrays, size=SIZE):
    return [tuple(array[at : at + size] for array in arrays) for at in range(0, len(arrays[0]), size)]


class Endless:
    """Count the passes; each yields what is in ``batches``."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


class Sequence:
    """Keras's form of a data set: a length and an index, no end of its own."""

    def __init__(self, batches):
        self.batches, self.ended = batches, 0

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]

    def on_epoch_end(self):
        self.ended += 1


def generator(batches):
    while True:
        yield from batches


FORMS = {
    "list": lambda batches: (batches, {}),
    "lists in a list": lambda batches: ([list(batch) for batch in batches], {}),
    "generator": lambda batches: (generator(batches), {"steps_per_epoch": 3}),
    "iterable": lambda batches: (Endless(batches), {"steps_per_epoch": 3}),
    "sequence": lambda batches: (Sequence(batches), {}),
}


@pytest.mark.parametrize("plan", ["resident", "eager"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [(), (W,)], ids=["plain", "weighted"])
def test_batches_train_as_the_same_rows_in_arrays(form, plan, weights):
    """The last batch has 12 rows of 16; dropout depends on the row in the batch, so all bits agree."""
    arrays, streamed = make(plan=plan), make(plan=plan)
    expected = arrays.fit(X, Y, epochs=3, shuffle=False, sample_weight=weights[0] if weights else None)
    batches, options = FORMS[form](cut(X, Y, *weights))
    history = streamed.fit(batches, epochs=3, **options)
    assert_same(arrays, streamed)
    assert history.history == expected.history
    assert streamed.update_count == 9


def test_loaders_of_torch_and_batches_beside_y():
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    arrays, streamed = make(), make()
    arrays.fit(X, Y, epochs=2, shuffle=False, validation_data=(X, Y))
    streamed.fit(DataLoader(data, batch_size=SIZE), epochs=2, validation_data=DataLoader(data, batch_size=20))
    assert_same(arrays, streamed)
    assert arrays.history.history == streamed.history.history
    with pytest.raises(ArgumentTypeError, match=r"X: TensorDataset yields single rows, of shape \(5,\).*DataLoader"):
        arrays.fit(data, epochs=1)
    for batches in (lambda: cut(X, Y), lambda: iter(cut(X, Y)), lambda: DataLoader(data, batch_size=SIZE)):
        with pytest.raises(ArgumentError, match=r"^y: leave it out: X holds batches"):
            arrays.fit(batches(), Y, epochs=1)
        with pytest.raises(ArgumentError, match=r"^y: leave it out: X holds batches"):
            arrays.evaluate(batches(), Y)
    # rows in tuples are rows
    arrays.fit([tuple(row) for row in X.tolist()], Y, epochs=1)
    with pytest.raises(ShapeError, match="X: the rows of this list differ in length"):
        arrays.fit([(1.0, 2.0), (1.0,)], Y[:2], epochs=1)


def test_an_iterable_begins_again_when_it_ends_and_not_before():
    endless, sequence = Endless(cut(X, Y)), Sequence(cut(X, Y))
    make().fit(endless, epochs=3, steps_per_epoch=2)
    assert endless.passes == 2  # six batches, three a pass
    make().fit(sequence, epochs=3)
    assert sequence.ended == 2


@pytest.mark.parametrize("parts", [False, True])
def test_batches_have_any_size(parts, monkeypatch):
    if parts:
        # as on a GPU, where the memory of the gradients depends on the rows
        monkeypatch.setattr("fusemlp.runtime.session.batch_parts", lambda traits, rows, weights: max(1, rows // 4))
    engine, twin = make(batch_size=4), make(batch_size=34)
    engine.fit([(X[:10], Y[:10]), (X[10:], Y[10:])], epochs=2)
    for _ in range(2):
        twin.step(X[:10], Y[:10])
        twin.step(X[10:], Y[10:])
    assert engine.batch_size == 4
    assert_same(engine, twin)
    # warnings are errors: a batch smaller than the engine's size is none
    make(batch_size=64).fit(cut(X, Y), epochs=1)
    # and arrays are trained on in batches of the engine's size again
    engine.fit(X, Y, epochs=1)
    assert engine.update_count == 4 + 11


def test_a_generator_may_write_into_the_arrays_that_it_has_given():
    def reused(batches):
        x, y = np.empty_like(batches[0][0]), np.empty_like(batches[0][1])
        for new_x, new_y in batches:
            x[:], y[:] = new_x, new_y
            yield x, y

    batches = cut(X[:32], Y[:32])
    assert make().evaluate(reused(batches), steps=2) == make().evaluate(X[:32], Y[:32])
    engine, twin = make(), make()
    engine.fit(reused(batches), epochs=1, steps_per_epoch=2)
    twin.fit(batches, epochs=1)
    assert_same(engine, twin)


def test_validation_and_evaluation_collect_batches():
    engine = make()
    engine.fit(X, Y, epochs=2)
    expected = engine.evaluate(X, Y, W, metrics=["f1"])
    assert engine.evaluate(cut(X, Y, W), metrics=["f1"]) == expected
    assert engine.evaluate(generator(cut(X, Y, W)), steps=3, metrics=["f1"]) == expected
    one, other = make(), make()
    ours = one.fit(X, Y, epochs=2, validation_data=(X, Y, W), metrics=["f1"]).history
    loader = generator(cut(X, Y, W))
    assert other.fit(X, Y, epochs=2, validation_data=loader, validation_steps=3, metrics=["f1"]).history == ours


def test_class_weights_of_batches():
    arrays, streamed = make(), make()
    arrays.fit(X, Y, epochs=2, shuffle=False, sample_weight=W, class_weight={1: 3.0})
    streamed.fit(cut(X, Y, W), epochs=2, class_weight={1: 3.0})
    assert_same(arrays, streamed)


def test_divergence_returns_to_the_last_good_epoch():
    linear = engine((5, 3), "mse", fusemlp.SGD(0.01), normalise=False)
    targets = np.zeros((44, 3), np.float32)
    linear.fit(cut(X, targets), epochs=1)
    before = linear.state_dict()
    with pytest.raises(DivergenceError, match="epoch 2"):
        linear.fit(cut(X * np.float32(1e18), targets), epochs=2)
    assert_same(linear.state_dict(), before)


BATCHES = cut(X, Y)
REFUSED = [
    (lambda: generator(BATCHES), {}, ArgumentError, "steps_per_epoch: a generator has no length"),
    (lambda: X, {}, ArgumentTypeError, "y: it is missing; give X and y.*got ndarray"),
    (lambda: 3, {}, ArgumentTypeError, "y: it is missing.*got int"),
    (lambda: (X, Y), {}, ArgumentTypeError, "X: got a tuple of 2 arrays; give them one by one"),
    (lambda: [], {}, DataError, "X: this list holds no batch"),
    (lambda: iter(()), {"steps_per_epoch": 1}, DataError, "X: this .* ended after 0 batches"),
    (lambda: [X, X], {}, ArgumentTypeError, "X: expected batches .*, batch 1 is ndarray"),
    (lambda: [(X, Y, W, W)], {}, ArgumentTypeError, "batch 1 is 4 in a tuple"),
    (lambda: cut(X[:, :4], Y), {}, ShapeError, "x of batch 1: expected 5 columns"),
    (lambda: cut(X, Y + 1), {}, DataError, "y of batch 1: label 3"),
    (lambda: BATCHES, {"sample_weight": W}, ArgumentError, r"sample_weight: .*let them be \(x, y, sample"),
    (lambda: BATCHES, {"validation_split": 0.2}, ArgumentError, "validation_split: .*give validation_data"),
    (lambda: BATCHES, {"batch_size": 8}, ArgumentError, "batch_size: .*that of the batches"),
    (lambda: BATCHES, {"row_order": lambda epoch: range(44)}, ArgumentError, "row_order: .*own order"),
    (lambda: BATCHES, {"drop_last": True}, ArgumentError, "drop_last: .*leave the last one out"),
    (lambda: BATCHES, {"steps_per_epoch": 0}, ArgumentError, "steps_per_epoch: expected a whole number"),
    (lambda: BATCHES, {"class_weight": "balanced"}, ArgumentError, "class_weight: 'balanced' needs all"),
    (
        lambda: BATCHES,
        {"validation_data": generator(BATCHES)},
        ArgumentError,
        "validation_steps: a generator has no",
    ),
    (lambda: BATCHES, {"validation_data": [(X, Y), (X, Y, W)]}, DataError, "validation_data: batch 2 has other parts"),
]


@pytest.mark.parametrize(("batches", "options", "error", "message"), REFUSED, ids=[row[-1] for row in REFUSED])
def test_refusals_come_before_the_training(batches, options, error, message):
    engine = make(batch_size=7)
    with pytest.raises(error, match=message):
        engine.fit(batches(), epochs=2, **options)
    assert engine.batch_size == 7 and engine.update_count == 0
    assert_same(engine, make(batch_size=7))


def test_later_batches_are_checked_when_they_come():
    for second, message in (
        ((X, Y, W), "X: batch 2 has other parts than batch 1"),
        ((X * np.nan, Y), "x of batch 2: expected finite numbers"),
    ):
        with pytest.raises(DataError, match=message):
            make().fit([BATCHES[0], second], epochs=1)
    engine = make()
    with pytest.raises(DataError, match=r"X: this .* ended after 3 batches, and 2 an epoch are needed"):
        engine.fit(iter(BATCHES), epochs=2, steps_per_epoch=2)
    assert engine.epochs_trained == 1
