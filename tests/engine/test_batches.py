"""``fit`` and ``evaluate`` take batches: generators, lists, DataLoaders, objects with a length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusemlp import (
    MLP,
    MSE,
    SGD,
    ArgumentError,
    ArgumentTypeError,
    Callback,
    DataError,
    DivergenceError,
    Engine,
    FusemlpError,
    ShapeError,
    load_checkpoint,
)

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(44, 5)).astype(np.float32), RNG.integers(0, 3, 44)
W = RNG.random(44).astype(np.float32) + 0.1
SIZE = 16


def make(**options: Any) -> Engine:
    return Engine(MLP([5, 8, 3], dropout=0.2), **{"batch_size": SIZE, "seed": 1, "backend": "numpy", **options})


def cut(*arrays: Any, size: int = SIZE) -> list[tuple[Any, ...]]:
    return [tuple(array[at : at + size] for array in arrays) for at in range(0, len(arrays[0]), size)]


def same(one: Engine, other: Engine) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(np.array_equal(ours[name], theirs[name]) for name in ours)


class Endless:
    """Count the passes; each yields what is in ``batches``, and forgets nothing of them."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.batches)


class Sequence:
    """Keras's form of a data set: a length and an index, no end of its own."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.ended = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]

    def on_epoch_end(self) -> None:
        self.ended += 1


def generator(batches: list[Any]) -> Iterator[Any]:
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
def test_batches_train_as_the_same_rows_in_arrays(form: str, plan: str, weights: tuple[Any, ...]) -> None:
    """The last batch has 12 rows of 16; dropout depends on the row in the batch, so all bits agree."""
    arrays, streamed = make(plan=plan), make(plan=plan)
    expected = arrays.fit(X, Y, epochs=3, shuffle=False, sample_weight=weights[0] if weights else None)
    batches, options = FORMS[form](cut(X, Y, *weights))
    history = streamed.fit(batches, epochs=3, **options)
    assert same(arrays, streamed)
    assert history.history == expected.history
    assert streamed.update_count == 9


def test_a_loader_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    arrays, streamed = make(), make()
    arrays.fit(X, Y, epochs=2, shuffle=False, validation_data=(X, Y))
    streamed.fit(DataLoader(data, batch_size=SIZE), epochs=2, validation_data=DataLoader(data, batch_size=20))
    assert same(arrays, streamed)
    assert arrays.history is not None and streamed.history is not None
    assert arrays.history.history == streamed.history.history
    with pytest.raises(ArgumentTypeError, match=r"X: TensorDataset yields single rows, of shape \(5,\).*DataLoader"):
        make().fit(data, epochs=1)


@pytest.mark.parametrize("kind", ["list", "generator", "loader"])
def test_batches_beside_y_are_refused(kind: str) -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, TensorDataset

    given = {
        "list": lambda: cut(X, Y),
        "generator": lambda: iter(cut(X, Y)),
        "loader": lambda: DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=SIZE),
    }[kind]
    engine = make()
    for call in (lambda: engine.fit(given(), Y, epochs=1), lambda: engine.evaluate(given(), Y)):
        with pytest.raises(ArgumentError, match=r"^y: leave it out: X holds batches"):
            call()
    # rows in tuples are rows
    engine.fit([tuple(row) for row in X.tolist()], Y, epochs=1)
    with pytest.raises(ShapeError, match="X: the rows of this list differ in length"):
        engine.fit([(1.0, 2.0), (1.0,)], Y[:2], epochs=1)


def test_an_iterable_begins_again_when_it_ends_and_not_before() -> None:
    endless, sequence = Endless(cut(X, Y)), Sequence(cut(X, Y))
    make().fit(endless, epochs=3, steps_per_epoch=2)
    assert endless.passes == 2  # six batches, three a pass
    make().fit(sequence, epochs=3)
    assert sequence.ended == 2


@pytest.mark.parametrize("parts", [False, True])
def test_batches_have_any_size(parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if parts:
        # as on a GPU, where the memory of the gradients depends on the rows
        monkeypatch.setattr("fusemlp.runtime.session.batch_parts", lambda traits, rows, weights: max(1, rows // 4))
    engine, twin = make(batch_size=4), make(batch_size=34)
    engine.fit([(X[:10], Y[:10]), (X[10:], Y[10:])], epochs=2)
    for _ in range(2):
        twin.step(X[:10], Y[:10])
        twin.step(X[10:], Y[10:])
    assert engine.batch_size == 4 and same(engine, twin)
    # warnings are errors: a batch smaller than the engine's size is none
    make(batch_size=64).fit(cut(X, Y), epochs=1)
    # and arrays are trained on in batches of the engine's size again
    engine.fit(X, Y, epochs=1)
    assert engine.update_count == 4 + 11


def test_a_generator_may_write_into_the_arrays_that_it_has_given() -> None:
    def reused(batches: list[Any]) -> Iterator[Any]:
        x, y = np.empty_like(batches[0][0]), np.empty_like(batches[0][1])
        for new_x, new_y in batches:
            x[:], y[:] = new_x, new_y
            yield x, y

    batches = cut(X[:32], Y[:32])
    assert make().evaluate(reused(batches), steps=2) == make().evaluate(X[:32], Y[:32])
    engine, twin = make(), make()
    engine.fit(reused(batches), epochs=1, steps_per_epoch=2)
    twin.fit(batches, epochs=1)
    assert same(engine, twin)


def test_validation_and_evaluation_collect_batches() -> None:
    engine = make()
    engine.fit(X, Y, epochs=2)
    expected = engine.evaluate(X, Y, W, metrics=["f1"])
    assert engine.evaluate(cut(X, Y, W), metrics=["f1"]) == expected
    assert engine.evaluate(generator(cut(X, Y, W)), steps=3, metrics=["f1"]) == expected
    one, other = make(), make()
    ours = one.fit(X, Y, epochs=2, validation_data=(X, Y, W), metrics=["f1"]).history
    loader = generator(cut(X, Y, W))
    assert other.fit(X, Y, epochs=2, validation_data=loader, validation_steps=3, metrics=["f1"]).history == ours


def test_class_weights_of_batches() -> None:
    arrays, streamed = make(), make()
    arrays.fit(X, Y, epochs=2, shuffle=False, sample_weight=W, class_weight={1: 3.0})
    streamed.fit(cut(X, Y, W), epochs=2, class_weight={1: 3.0})
    assert same(arrays, streamed)


def test_a_resumed_fit_leaves_out_the_batches_of_its_epoch(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_batch_end(self, engine: Engine, batch: int) -> None:
            if engine.update_count == 4:
                engine.save_checkpoint(tmp_path / "c.safetensors")

    whole = make()
    expected = whole.fit(cut(X, Y), epochs=3, callbacks=Stop())
    resumed = load_checkpoint(tmp_path / "c.safetensors", backend="numpy")
    history = resumed.fit(cut(X, Y), epochs=3, resume=True)
    assert same(whole, resumed)
    assert history.history == expected.history


def test_divergence_returns_to_the_last_good_epoch() -> None:
    engine = Engine(MLP([5, 3]), loss=MSE(), optimizer=SGD(0.01), batch_size=SIZE, backend="numpy", normalise=False)
    targets = np.zeros((44, 3), np.float32)
    engine.fit(cut(X, targets), epochs=1)
    before = engine.state_dict()
    with pytest.raises(DivergenceError, match="epoch 2"):
        engine.fit(cut(X * np.float32(1e18), targets), epochs=2)
    assert all(np.array_equal(before[name], value) for name, value in engine.state_dict().items())


REFUSED: dict[str, tuple[Any, dict[str, Any], type[FusemlpError], str]] = {
    "no length": (lambda: generator(cut(X, Y)), {}, ArgumentError, "steps_per_epoch: a generator has no length"),
    "arrays without y": (lambda: X, {}, ArgumentTypeError, "y: it is missing; give X and y.*got ndarray"),
    "a number": (lambda: 3, {}, ArgumentTypeError, "y: it is missing.*got int"),
    "a tuple": (lambda: (X, Y), {}, ArgumentTypeError, "X: got a tuple of 2 arrays; give them one by one"),
    "empty": (lambda: [], {}, DataError, "X: this list holds no batch"),
    "ends at once": (lambda: iter(()), {"steps_per_epoch": 1}, DataError, "X: this .* ended after 0 batches"),
    "no pairs": (lambda: [X, X], {}, ArgumentTypeError, "X: expected batches .*, batch 1 is ndarray"),
    "four parts": (lambda: [(X, Y, W, W)], {}, ArgumentTypeError, "batch 1 is 4 in a tuple"),
    "wrong width": (lambda: cut(X[:, :4], Y), {}, ShapeError, "x of batch 1: expected 5 columns"),
    "wrong labels": (lambda: cut(X, Y + 1), {}, DataError, "y of batch 1: label 3"),
    "weights": (lambda: cut(X, Y), {"sample_weight": W}, ArgumentError, r"sample_weight: .*let them be \(x, y, sample"),
    "split": (lambda: cut(X, Y), {"validation_split": 0.2}, ArgumentError, "validation_split: .*give validation_data"),
    "batch_size": (lambda: cut(X, Y), {"batch_size": 8}, ArgumentError, "batch_size: .*that of the batches"),
    "row_order": (lambda: cut(X, Y), {"row_order": lambda epoch: range(44)}, ArgumentError, "row_order: .*own order"),
    "drop_last": (lambda: cut(X, Y), {"drop_last": True}, ArgumentError, "drop_last: .*leave the last one out"),
    "no steps": (lambda: cut(X, Y), {"steps_per_epoch": 0}, ArgumentError, "steps_per_epoch: expected a whole number"),
    "balanced": (lambda: cut(X, Y), {"class_weight": "balanced"}, ArgumentError, "class_weight: 'balanced' needs all"),
    "validation": (
        lambda: cut(X, Y),
        {"validation_data": generator(cut(X, Y))},
        ArgumentError,
        "validation_steps: a generator has no length",
    ),
    "mixed validation": (
        lambda: cut(X, Y),
        {"validation_data": [(X, Y), (X, Y, W)]},
        DataError,
        "validation_data: batch 2 has other parts than batch 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_come_before_the_training(case: str) -> None:
    given, options, kind, message = REFUSED[case]
    engine, twin = make(batch_size=7), make(batch_size=7)
    with pytest.raises(kind, match=message):
        engine.fit(given(), epochs=2, **options)
    assert engine.batch_size == 7 and engine.update_count == 0 and same(engine, twin)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([*cut(X, Y)[:1], (X, Y, W)], "X: batch 2 has other parts than batch 1"),
        ([*cut(X, Y)[:1], (X * np.nan, Y)], "x of batch 2: expected finite numbers"),
    ],
    ids=["parts", "nan"],
)
def test_later_batches_are_checked_when_they_come(batches: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make().fit(batches, epochs=1)


def test_a_generator_that_ends_too_early_says_how_many_it_had() -> None:
    engine = make()
    with pytest.raises(DataError, match=r"X: this .* ended after 3 batches, and 2 an epoch are needed"):
        engine.fit(iter(cut(X, Y)), epochs=2, steps_per_epoch=2)
    assert engine.epochs_trained == 1
