"""Fleets: n models end as n engines trained alone do, bit for bit; what varies, what fails, what they say together."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from fusemlp import (
    MLP,
    MSE,
    SGD,
    Adam,
    ArgumentError,
    ArgumentTypeError,
    Cosine,
    CrossEntropy,
    DataError,
    DivergenceError,
    Engine,
    Fleet,
    OneCycle,
    PReLU,
)
from make import assert_same_state

Array = np.ndarray[Any, Any]
ROWS, WIDTH, CLASSES, BATCH, EPOCHS = 90, 6, 3, 16, 6
NET = MLP([WIDTH, 8, CLASSES])

random = np.random.default_rng(1)
X = random.standard_normal((ROWS, WIDTH))
y = (X @ random.standard_normal((WIDTH, CLASSES))).argmax(axis=1)
XV, YV = X[60:], y[60:]
FOLDS = [np.setdiff1d(np.arange(ROWS), np.arange(start, ROWS, 3)) for start in range(3)]
HELD_OUT = [np.arange(start, ROWS, 3) for start in range(3)]


def fleet(vary: Any, net: MLP = NET, **options: Any) -> Fleet:
    return Fleet(net, vary=vary, **{"batch_size": BATCH, "backend": "numpy", **options})


@pytest.mark.parametrize("plan", ["resident", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_a_fleet_is_so_many_engines_trained_alone(plan: str, precision: str) -> None:
    vary = [
        {},
        {"lr": 0.05, "seed": 3},
        {"betas": (0.5, 0.9), "weight_decay": 0.1},
        {"dropout": 0.5, "batch_size": 7},
        {"hidden": [5, 4], "label_smoothing": 0.2, "seed": 4},
        {"hidden": 12},
        {"hidden": []},
    ]
    alone = [
        Engine(NET, "cross_entropy", Adam(), BATCH),
        Engine(NET, "cross_entropy", Adam(0.05), BATCH, seed=3),
        Engine(NET, "cross_entropy", Adam(betas=(0.5, 0.9), weight_decay=0.1), BATCH),
        Engine(MLP([WIDTH, 8, CLASSES], dropout=0.5), "cross_entropy", Adam(), 7),
        Engine(MLP([WIDTH, 5, 4, CLASSES]), CrossEntropy(label_smoothing=0.2), Adam(), BATCH, seed=4),
        Engine(MLP([WIDTH, 12, CLASSES]), "cross_entropy", Adam(), BATCH),
        Engine(MLP([WIDTH, CLASSES]), "cross_entropy", Adam(), BATCH),
    ]
    data = {"epochs": EPOCHS, "validation_data": (XV, YV), "early_stopping": 2}
    made = fleet(vary, precision=precision, plan=plan)
    results = made.fit(X, y, **data)
    for index, one in enumerate(alone):
        engine = Engine(
            one.network, one.loss, one.optimizer, one.batch_size, one.seed, "numpy", precision=precision, plan=plan
        )
        engine.fit(X, y, **data)
        assert results.engine(index).plan == plan
        assert_same_state(results.engine(index), engine)


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(jobs: int) -> None:
    first, second = (fleet({"seed": range(5)}) for _ in range(2))
    first.fit(X, y, epochs=3, jobs=jobs)
    second.fit(X, y, epochs=3)
    for one, other in zip(first.engines, second.engines, strict=True):
        assert_same_state(one, other)


def test_folds_are_lists_of_rows() -> None:
    weight = np.linspace(0.5, 1.5, ROWS)
    results = fleet([{}, {}, {}]).fit(
        X, y, epochs=EPOCHS, sample_weight=weight, rows=FOLDS, validation_rows=HELD_OUT, early_stopping=2
    )
    for member, rows, held_out in zip(results.members, FOLDS, HELD_OUT, strict=True):
        engine = Engine(NET, "cross_entropy", Adam(), BATCH, backend="numpy")
        engine.fit(
            X[rows],
            y[rows],
            epochs=EPOCHS,
            sample_weight=weight[rows],
            validation_data=(X[held_out], y[held_out], weight[held_out]),
            early_stopping=2,
        )
        assert_same_state(member.engine, engine)


def test_a_mapping_is_a_product_the_last_quickest() -> None:
    made = fleet({"lr": [0.1, 0.2], "hidden": [4, (5, 6)], "seed": range(2)}, optimizer=SGD())
    assert len(made) == 8
    assert [one.parameters for one in made.candidates[:3]] == [
        {"lr": 0.1, "hidden": 4, "seed": 0},
        {"lr": 0.1, "hidden": 4, "seed": 1},
        {"lr": 0.1, "hidden": (5, 6), "seed": 0},
    ]
    assert [engine.network.sizes for engine in made.engines[1:3]] == [(WIDTH, 4, CLASSES), (WIDTH, 5, 6, CLASSES)]


def test_a_rate_is_put_into_a_schedule() -> None:
    cosine = fleet({"lr": [0.1]}, optimizer=SGD(Cosine(0.5, final=0.01))).engines[0].optimizer
    assert cosine == SGD(Cosine(0.1, final=0.01))
    assert fleet({"lr": [0.1]}, optimizer=SGD(OneCycle(0.5))).engines[0].optimizer == SGD(OneCycle(0.1))
    assert fleet({"lr": [Cosine(0.2)]}, optimizer=SGD(0.5)).engines[0].optimizer == SGD(Cosine(0.2))


def test_activations_are_repeated_for_other_depths() -> None:
    made = fleet({"hidden": [(5, 5, 5)]}, MLP([WIDTH, 8, CLASSES], activation=PReLU(0.1), dropout=0.2))
    assert made.engines[0].network == MLP([WIDTH, 5, 5, 5, CLASSES], activation=PReLU(0.1), dropout=0.2)
    assert fleet({"hidden": [(5, 5)]}, MLP([WIDTH, 8, 8, CLASSES], activation=["relu", "tanh"])).engines


def test_a_model_that_diverges_is_marked_and_harms_no_other() -> None:
    made = fleet([{"seed": 0}, {"lr": 1e30}, {"seed": 2}], optimizer=SGD(0.1, momentum=0.9))
    results = made.fit(X, y, epochs=EPOCHS)
    assert [member.status for member in results.members] == ["trained", "diverged", "trained"]
    assert "NaN or infinite in epoch 1" in results.members[1].reason
    start = NET.initial_parameters(0)
    for name, tensor in results.engine(1).state_dict().items():
        assert np.array_equal(tensor, start[name].astype(np.float32)), name
    for index, seed in ((0, 0), (2, 2)):
        engine = Engine(NET, optimizer=SGD(0.1, momentum=0.9), batch_size=BATCH, seed=seed, backend="numpy")
        engine.fit(X, y, epochs=EPOCHS)
        assert_same_state(results.engine(index), engine)
    assert results.ranked()[-1].index == 1
    assert results.table().splitlines()[-1].split()[-1] == "diverged"
    assert made.predict(X).votes.sum(axis=1).tolist() == [2] * ROWS


def test_a_model_whose_validation_loss_is_not_finite_has_diverged() -> None:
    # one update, which leaves finite parameters
    made = fleet([{}, {"lr": 1e30, "batch_size": ROWS}], optimizer=SGD(0.1))
    results = made.fit(X, y, epochs=1, validation_data=(XV, YV))
    assert [member.status for member in results.members] == ["trained", "diverged"]
    assert "val_loss: it became NaN or infinite in epoch 1" in results.members[1].reason
    assert results.best().index == 0


def test_where_all_diverge_there_is_no_best() -> None:
    made = fleet({"lr": [1e30, 1e31]}, optimizer=SGD(momentum=0.9))
    results = made.fit(X, y, epochs=2)
    for call in (results.best, lambda: made.predict(X)):
        with pytest.raises(DivergenceError, match="all 2 models diverged"):
            call()


def test_ranking_and_the_table() -> None:
    results = fleet({"lr": [1e-6, 0.05], "seed": range(2)}).fit(X, y, epochs=EPOCHS, validation_data=(XV, YV))
    losses = [member.scores["val_loss"] for member in results.members]
    best = results.best()
    assert best.scores["val_loss"] == min(losses) == best.engine.evaluate(XV, YV)["loss"]
    assert best.parameters["lr"] == 0.05
    accuracies = [record["val_accuracy"] for record in results.records("val_accuracy")]
    assert accuracies == sorted(accuracies, reverse=True)
    lines = results.table(limit=2).splitlines()
    assert " ".join(lines[0].split()) == "model lr seed loss accuracy val_loss val_accuracy epochs status"
    assert len(lines) == 4 and lines[-1] == "... and 2 more"
    with pytest.raises(ArgumentError, match=r"^metric: unknown name 'val_los'; did you mean 'val_loss'\?"):
        results.best("val_los")
    with pytest.raises(ArgumentError, match=r"^index: expected 0 to 3, got 4"):
        results.engine(4)


def test_without_validation_the_training_loss_decides() -> None:
    results = fleet({"lr": [1e-6, 0.05]}).fit(X, y, epochs=EPOCHS)
    assert results.metric == "loss"
    assert results.best().index == 1


def test_an_ensemble_of_classifiers() -> None:
    made = fleet({"seed": range(4)})
    made.fit(X, y, epochs=EPOCHS)
    said = made.predict(X)
    each = np.array([engine.predict_proba(X) for engine in made.engines], np.float64)
    # four numbers of at most one are added in float64
    np.testing.assert_allclose(said.mean, each.mean(axis=0), rtol=0, atol=1e-15)
    np.testing.assert_allclose(said.spread, each.std(axis=0), rtol=0, atol=1e-12)
    assert np.array_equal(said.votes, np.array([np.bincount(v, minlength=CLASSES) for v in each.argmax(axis=2).T]))
    assert np.array_equal(said.prediction, said.mean.argmax(axis=1))


def test_an_ensemble_of_regressors_and_of_labels() -> None:
    values = X[:, :1] * 2 + 1
    made = Fleet(MLP([WIDTH, 5, 1]), MSE(), vary={"seed": range(3)}, backend="numpy")
    made.fit(X, values, epochs=2)
    said = made.predict(X)
    each = np.array([engine.predict(X) for engine in made.engines], np.float64)
    np.testing.assert_allclose(said.prediction, each.mean(axis=0), rtol=0, atol=1e-14)
    assert said.votes is None and said.spread.shape == (ROWS,)
    labels = (X[:, :2] > 0).astype(float)
    made = Fleet(MLP([WIDTH, 5, 2]), "binary_cross_entropy", vary={"seed": range(3)}, backend="numpy")
    made.fit(X, labels, epochs=2)
    said = made.predict(X)
    each = np.array([engine.predict(X) for engine in made.engines])
    assert np.array_equal(said.votes, each.sum(axis=0))
    assert set(np.unique(said.prediction)) <= {0, 1}


@pytest.mark.parametrize(
    ("vary", "options", "error", "message"),
    [
        ({"learning_rate": [1]}, {}, ArgumentError, r"^vary: unknown name 'learning_rate'; did you mean 'lr'\?"),
        ([{"alpha": 1}], {}, ArgumentError, r"^vary\[0\]: unknown name 'alpha'; did you mean 'weight_decay'\?"),
        ({"hidden": [8, (8, 0)]}, {}, ArgumentError, r"^vary, model 1: hidden: expected a whole number of at least 1"),
        ({"lr": np.array(0.1)}, {}, ArgumentTypeError, r"^vary\['lr'\]: expected a sequence of values"),
        ({"momentun": [1]}, {}, ArgumentError, r"^vary: .*did you mean 'momentum'\?"),
        ([{"sed": 1}], {}, ArgumentError, r"^vary\[0\]: .*did you mean 'seed'\?"),
        ({}, {}, ArgumentError, r"^vary: it is empty"),
        ([], {}, ArgumentError, r"^vary: it is empty"),
        ({"lr": []}, {}, ArgumentError, r"^vary\['lr'\]: there are no values"),
        ({"lr": 0.1}, {}, ArgumentTypeError, r"^vary\['lr'\]: .*give \[0\.1\]"),
        ("lr", {}, ArgumentTypeError, r"^vary: expected a mapping"),
        (3, {}, ArgumentTypeError, r"^vary: expected a mapping"),
        ([0.1], {}, ArgumentTypeError, r"^vary\[0\]: expected a mapping"),
        ({"lr": [0.1, -1]}, {}, ArgumentError, r"^vary, model 1: lr: .*-1"),
        ({"lr": ["0.1"]}, {}, ArgumentTypeError, r"^vary, model 0: lr"),
        ({"momentum": [0.9]}, {}, ArgumentError, r"^vary, model 0: momentum: Adam has no such setting"),
        ({"label_smoothing": [0.1]}, {"loss": "mse"}, ArgumentError, r"label_smoothing: MSE has no such setting"),
        ({"hidden": [0]}, {}, ArgumentError, r"^vary, model 0: hidden: expected a whole number"),
        ({"hidden": ["8"]}, {}, ArgumentTypeError, r"^vary, model 0: hidden: expected a whole number"),
        ({"batch_size": [0]}, {}, ArgumentError, r"^vary, model 0: batch_size"),
        ({"seed": [-1]}, {}, ArgumentError, r"^vary, model 0: seed"),
        ({"lr": [0.1]}, {"batch_size": 0}, ArgumentError, r"^batch_size: .*got 0"),
        ({"seed": [1]}, {"loss": "mse", "batch_size": "8"}, ArgumentTypeError, r"^batch_size"),
        ({"batch_size": [-1]}, {"batch_size": 0}, ArgumentError, r"^vary, model 0: batch_size: .*got -1"),
        (
            {"hidden": [(4, 4, 4)]},
            {"net": MLP([WIDTH, 8, 8, CLASSES], activation=["relu", "tanh"])},
            ArgumentError,
            r"hidden: 3 layers are wanted and activation differs",
        ),
    ],
)
def test_what_cannot_vary(vary: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fleet(vary, **options)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"epochs": 0}, ArgumentError, r"^epochs"),
        ({"y": y[:-1]}, ArgumentError, r"^y"),
        ({"X": np.full_like(X, np.nan)}, DataError, r"^X"),
        ({"early_stopping": 2}, ArgumentError, r"^early_stopping: it watches val_loss"),
        ({"rows": FOLDS[:2]}, ArgumentError, r"^rows: expected a list of rows for each of the 3 models, got 2"),
        ({"rows": [[0], [1], [ROWS]]}, ArgumentError, r"^rows\[2\]: expected numbers from 0 to 89, got 90"),
        ({"rows": [[0], [1], []]}, ArgumentError, r"^rows\[2\]: expected row numbers"),
        ({"rows": [[0.5]] * 3}, ArgumentError, r"^rows\[0\]: expected row numbers"),
        (
            {"validation_rows": HELD_OUT, "validation_data": (XV, YV)},
            ArgumentError,
            r"^validation_rows: they take the place",
        ),
        ({"jobs": 0}, ArgumentError, r"^jobs"),
    ],
)
def test_bad_data_changes_nothing(data: Any, error: type[Exception], message: str) -> None:
    made = fleet([{}, {}, {}])
    with pytest.raises(error, match=message):
        made.fit(**{"X": X, "y": y, "epochs": 2, **data})
    assert all(engine.update_count == 0 for engine in made.engines)
    with pytest.raises(ArgumentError, match=r"^predict: the models are not trained, or not to the end"):
        made.predict(X)


def test_ctrl_c_stops_all_models_after_their_batches() -> None:
    code = (
        "import json, os, signal, threading, numpy as np\n"
        "from fusemlp import Fleet, MLP\n"
        "X = np.random.default_rng(0).standard_normal((64, 8)); y = np.arange(64) % 3\n"
        "fleet = Fleet(MLP([8, 6, 3]), vary={'seed': range(3)}, backend='numpy')\n"
        "fleet.fit(X, y, epochs=1)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try: fleet.fit(X, y, epochs=10**7)\n"
        "except KeyboardInterrupt: print(json.dumps([e.update_count for e in fleet.engines]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    counts = json.loads(done.stdout)
    # some had begun, and none went on to the end
    assert max(counts) > 2 and max(counts) < 2 * 10**7


def test_there_are_no_more_models_than_anybody_waits_for() -> None:
    with pytest.raises(ArgumentError, match=r"^vary: 1000 lr x 200 seed are 200000 models, and at most 100000 are"):
        Fleet(MLP([4, 2]), vary={"lr": [0.1] * 1000, "seed": range(200)})


def test_layers_that_memory_has_no_room_for_are_named() -> None:
    with pytest.raises(MemoryError, match=r"^net: there is no room for [0-9,]+ parameters, .* make layers narrower"):
        Engine(MLP([4, 10**15, 5], init="zeros"), backend="numpy")
