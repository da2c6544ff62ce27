"""Fleets: n models end as n engines trained alone do, bit for bit; what varies, what fails, what they say together."""

import json
import math
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

import fusemlp
from fusemlp import MLP, SGD, Adam, Cosine, Engine, Fleet, FleetResults, OneCycle, PReLU
from fusemlp.fleet.results import Member
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, DivergenceError
from make import assert_same_state, data

ROWS, WIDTH, CLASSES, BATCH, EPOCHS = 90, 6, 3, 16, 6
NET = MLP([WIDTH, 8, CLASSES])
X, y = data(ROWS, WIDTH, CLASSES, seed=1)
X = X.astype(np.float64)
XV, YV = X[60:], y[60:]
FOLDS = [np.setdiff1d(np.arange(ROWS), np.arange(start, ROWS, 3)) for start in range(3)]
HELD_OUT = [np.arange(start, ROWS, 3) for start in range(3)]
# with a rate of 1e30 it diverges
MOMENTUM = SGD(0.1, momentum=0.9)


def fleet(vary, net=NET, **options):
    return Fleet(net, vary=vary, **{"batch_size": BATCH, "backend": "numpy", **options})


def alone(net=NET, optimizer=None, batch_size=BATCH, **options):
    return Engine(net, optimizer=optimizer or Adam(), batch_size=batch_size, backend="numpy", **options)


@pytest.mark.parametrize(
    "machine",
    [
        {"plan": "resident", "precision": "fp32"},
        {"plan": "resident", "precision": "fp64", "normalise": True},
        {"plan": "eager", "precision": "fp32", "normalise": True},
        {"plan": "eager", "precision": "fp64"},
    ],
)
def test_a_fleet_is_so_many_engines_trained_alone(machine):
    pairs = [
        ({}, {}),
        ({"lr": 0.05, "seed": 3}, {"optimizer": Adam(0.05), "seed": 3}),
        ({"betas": (0.5, 0.9), "weight_decay": 0.1}, {"optimizer": Adam(betas=(0.5, 0.9), weight_decay=0.1)}),
        ({"dropout": 0.5, "batch_size": 7}, {"net": MLP([WIDTH, 8, CLASSES], dropout=0.5), "batch_size": 7}),
        (
            {"hidden": [5, 4], "label_smoothing": 0.2, "seed": 4},
            {"net": MLP([WIDTH, 5, 4, CLASSES]), "loss": fusemlp.CrossEntropy(label_smoothing=0.2), "seed": 4},
        ),
        ({"hidden": 12}, {"net": MLP([WIDTH, 12, CLASSES])}),
        ({"hidden": []}, {"net": MLP([WIDTH, CLASSES])}),
    ]
    fit = {"epochs": EPOCHS, "validation_data": (XV, YV), "early_stopping": 2}
    results = fleet([vary for vary, _ in pairs], **machine).fit(X, y, **fit)
    for index, (_, options) in enumerate(pairs):
        engine = alone(**options, **machine)
        engine.fit(X, y, **fit)
        assert results.engine(index).plan == machine["plan"]
        assert_same_state(results.engine(index), engine)


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(jobs):
    first, second = (fleet({"seed": range(5)}) for _ in range(2))
    first.fit(X, y, epochs=3, jobs=jobs)
    second.fit(X, y, epochs=3)
    for engine, other in zip(first.engines, second.engines, strict=True):
        assert_same_state(engine, other)


def test_folds_are_lists_of_rows():
    weight, fit = np.linspace(0.5, 1.5, ROWS), {"epochs": EPOCHS, "early_stopping": 2}
    results = fleet([{}] * 3).fit(X, y, sample_weight=weight, rows=FOLDS, validation_rows=HELD_OUT, **fit)
    for member, rows, held_out in zip(results.members, FOLDS, HELD_OUT, strict=True):
        engine, validation_data = alone(), (X[held_out], y[held_out], weight[held_out])
        engine.fit(X[rows], y[rows], sample_weight=weight[rows], validation_data=validation_data, **fit)
        assert_same_state(member.engine, engine)


def test_a_short_last_batch_is_left_out_of_all():
    results = fleet({"batch_size": [16, 20]}).fit(X, y, epochs=2, drop_last=True)
    for member, size in zip(results.members, (16, 20), strict=True):
        engine = alone(batch_size=size)
        engine.fit(X, y, epochs=2, drop_last=True)
        assert_same_state(member.engine, engine)


def test_a_mapping_is_a_product_the_last_quickest():
    made = fleet({"lr": [0.1, 0.2], "hidden": [4, (5, 6)], "seed": range(2)}, optimizer=SGD())
    assert len(made) == 8
    assert [one.parameters for one in made.candidates[:3]] == [
        {"lr": 0.1, "hidden": 4, "seed": 0},
        {"lr": 0.1, "hidden": 4, "seed": 1},
        {"lr": 0.1, "hidden": (5, 6), "seed": 0},
    ]
    assert [engine.network.sizes for engine in made.engines[1:3]] == [(WIDTH, 4, CLASSES), (WIDTH, 5, 6, CLASSES)]


def test_a_rate_is_put_into_a_schedule():
    for own, rate, expected in (
        (Cosine(0.5, final=0.01), 0.1, Cosine(0.1, final=0.01)),
        (OneCycle(0.5), 0.1, OneCycle(0.1)),
        (0.5, Cosine(0.2), Cosine(0.2)),
    ):
        assert fleet({"lr": [rate]}, optimizer=SGD(own)).engines[0].optimizer == SGD(expected)


def test_activations_are_repeated_for_other_depths():
    made = fleet({"hidden": [(5, 5, 5)]}, MLP([WIDTH, 8, CLASSES], activation=PReLU(0.1), dropout=0.2))
    assert made.engines[0].network == MLP([WIDTH, 5, 5, 5, CLASSES], activation=PReLU(0.1), dropout=0.2)
    assert fleet({"hidden": [(5, 5)]}, MLP([WIDTH, 8, 8, CLASSES], activation=["relu", "tanh"])).engines


class TestDivergence:
    def test_a_model_that_diverges_is_marked_and_harms_no_other(self):
        made = fleet([{"seed": 0}, {"lr": 1e30}, {"seed": 2}], optimizer=MOMENTUM)
        results = made.fit(X, y, epochs=EPOCHS)
        assert [member.status for member in results.members] == ["trained", "diverged", "trained"]
        assert "NaN or infinite in epoch 1" in results.members[1].reason
        start = NET.initial_parameters(0)
        for name, tensor in results.engine(1).state_dict().items():
            assert np.array_equal(tensor, start[name].astype(np.float32)), name
        for seed in (0, 2):
            engine = alone(optimizer=MOMENTUM, seed=seed)
            engine.fit(X, y, epochs=EPOCHS)
            assert_same_state(results.engine(seed), engine)
        assert results.ranked()[-1].index == 1
        assert results.table().splitlines()[-1].split()[-1] == "diverged"
        assert made.predict(X).votes.sum(axis=1).tolist() == [2] * ROWS

    def test_a_validation_loss_that_is_not_finite(self):
        # one update, which leaves finite parameters
        made = fleet([{}, {"lr": 1e30, "batch_size": ROWS}], optimizer=SGD(0.1))
        results = made.fit(X, y, epochs=1, validation_data=(XV, YV))
        assert [member.status for member in results.members] == ["trained", "diverged"]
        assert "val_loss: it became NaN or infinite in epoch 1" in results.members[1].reason
        assert results.best().index == 0

    def test_where_all_diverge_there_is_no_best(self):
        made = fleet({"lr": [1e30, 1e31]}, optimizer=MOMENTUM)
        results = made.fit(X, y, epochs=2)
        for call in (results.best, lambda: made.predict(X)):
            with pytest.raises(DivergenceError, match="all 2 models diverged"):
                call()


def member(index, lr, seed, loss):
    status, scores = ("diverged", {}) if math.isnan(loss) else ("trained", {"loss": loss})
    return Member(index, {"lr": lr, "seed": seed}, None, fusemlp.History(), status, "", scores)


@pytest.fixture(scope="module")
def results():
    return fleet({"lr": [0.1, 1e30], "seed": range(2)}, optimizer=SGD(0.1)).fit(X, y, epochs=3)


class TestResults:
    def test_ranking_and_the_table(self):
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

    def test_without_validation_the_training_loss_decides(self):
        results = fleet({"lr": [1e-6, 0.05]}).fit(X, y, epochs=EPOCHS)
        assert results.metric == "loss"
        assert results.best().index == 1

    def test_they_are_short_in_print(self, results):
        best = results.best()
        loss, accuracy = (f"{best.scores[name]:.5g}" for name in ("loss", "accuracy"))
        said = f"Member({best.index}: {best.parameters}, trained, epochs=3, loss={loss}, accuracy={accuracy})"
        assert repr(best) == said
        assert repr(results) == f"FleetResults(2 diverged, 2 trained; best: {said})"
        failed = results.members[3]
        assert repr(failed) == "Member(3: {'lr': 1e+30, 'seed': 1}, diverged, epochs=0)"
        assert repr(FleetResults((failed,))) == "FleetResults(1 diverged)"

    def test_a_lucky_seed_does_not_decide(self):
        # 0.1 has the best model of all, 0.2 the better mean, and one of 0.3 diverged
        losses = [[0.1, 0.9, 0.8], [0.5, 0.4, 0.45], [0.2, 0.2, math.nan]]
        cells = [(row, seed) for row in range(3) for seed in range(3)]
        members = [member(3 * row + seed, (0.1, 0.2, 0.3)[row], seed, losses[row][seed]) for row, seed in cells]
        results = FleetResults(tuple(members))
        assert results.ranked()[0].index == 0
        assert results.best().index == 4
        first = results.combinations()[0]
        assert first.parameters == {"lr": 0.2} and [one.index for one in first.members] == [4, 5, 3]
        assert first.mean("loss") == pytest.approx(0.45, rel=1e-15)
        assert [line.split() for line in results.table(means=True).splitlines()] == [
            ["model", "lr", "loss", "spread(loss)", "seeds", "epochs", "status"],
            ["4", "0.2", "0.45", "0.05", "3", "0", "trained"],
            ["0", "0.1", "0.6", "0.43589", "3", "0", "trained"],
            ["6", "0.3", "0.2", "0", "2", "0", "1", "diverged"],
        ]
        # Seeds alone are models of an ensemble: each has its row.
        seeds = FleetResults(tuple(replace(one, parameters={"seed": one.index}) for one in members))
        assert seeds.best().index == 0
        assert seeds.table(means=True) == seeds.table()
        # 0.4 lacks a seed after Ctrl-C; of accuracies the largest is the best
        points = [{"lr": lr, "seed": seed} for lr in (0.1, 0.2, 0.3, 0.4) for seed in range(3)]
        cut = FleetResults((*members, member(9, 0.4, 0, 0.01), member(10, 0.4, 1, 0.02)))
        assert [one.parameters["lr"] for one in cut.combinations("loss", points)] == [0.2, 0.1, 0.4, 0.3]
        for one in cut.members:
            one.scores["accuracy"] = one.scores.get("loss", math.nan)
        assert cut.combinations("accuracy", points)[0].parameters["lr"] == 0.1

    def test_a_table_of_models_with_different_parameters(self):
        lines = fleet([{"lr": 0.1}, {"seed": 3}, {}]).fit(X, y, epochs=1).table().splitlines()
        assert lines[0].split() == ["model", "lr", "seed", "loss", "accuracy", "epochs", "status"]
        assert sorted(" ".join(line.split()[:3]) for line in lines[1:]) == ["0 0.1 -", "1 - 3", "2 - -"]

    @pytest.mark.parametrize(
        ("ask", "error", "message"),
        [
            (lambda results: results.table(limit=-1), ArgumentError, "limit: expected a whole number of at least 0"),
            (lambda results: results.engine(4), ArgumentError, "index: expected 0 to 3, got 4"),
            (lambda results: results.engine("0"), ArgumentTypeError, "index: expected the number of a model, got '0'"),
            (lambda results: results.engine(1.0), ArgumentTypeError, "index: expected the number of a model, got 1.0"),
            (lambda results: results.engine(True), ArgumentTypeError, "index: expected the number of a model, got Tru"),
        ],
    )
    def test_a_wrong_question(self, results, ask, error, message):
        with pytest.raises(error, match=f"^{message}"):
            ask(results)
        assert results.engine(np.int64(-1)) is results.engine(3)


def test_an_ensemble_of_classifiers():
    made = fleet({"seed": range(4)})
    made.fit(X, y, epochs=EPOCHS)
    said = made.predict(X)
    each = np.array([engine.predict_proba(X) for engine in made.engines], np.float64)
    # four numbers of at most one are added in float64
    np.testing.assert_allclose(said.mean, each.mean(axis=0), rtol=0, atol=1e-15)
    np.testing.assert_allclose(said.spread, each.std(axis=0), rtol=0, atol=1e-12)
    assert np.array_equal(said.votes, np.array([np.bincount(v, minlength=CLASSES) for v in each.argmax(axis=2).T]))
    assert np.array_equal(said.prediction, said.mean.argmax(axis=1))


def test_an_ensemble_of_regressors_and_of_labels():
    made = fleet({"seed": range(3)}, MLP([WIDTH, 5, 1]), loss="mse")
    made.fit(X, X[:, :1] * 2 + 1, epochs=2)
    said = made.predict(X)
    each = np.array([engine.predict(X) for engine in made.engines], np.float64)
    np.testing.assert_allclose(said.prediction, each.mean(axis=0), rtol=0, atol=1e-14)
    assert said.votes is None and said.spread.shape == (ROWS,)
    made = fleet({"seed": range(3)}, MLP([WIDTH, 5, 2]), loss="binary_cross_entropy")
    made.fit(X, (X[:, :2] > 0).astype(float), epochs=2)
    said = made.predict(X)
    each = np.array([engine.predict(X) for engine in made.engines])
    assert np.array_equal(said.votes, each.sum(axis=0))
    assert set(np.unique(said.prediction)) <= {0, 1}


class TestCallback:
    """``Fleet.fit(callback=...)``: each model is handed over as it has ended, and an error there ends the others."""

    @pytest.mark.parametrize("jobs", [1, 3])
    def test_each_model_is_handed_over_once_as_it_ended(self, jobs):
        handed, threads = [], set()

        def callback(member):
            handed.append(member)
            threads.add(threading.current_thread())

        made = fleet({"lr": [0.1, 1e30], "seed": range(3)}, optimizer=MOMENTUM)
        results = made.fit(X, y, epochs=3, jobs=jobs, callback=callback)
        assert sorted(member.index for member in handed) == list(range(6))
        assert all(results.members[member.index] is member for member in handed)
        assert [member.status for member in results.members] == ["trained"] * 3 + ["diverged"] * 3
        assert threads == {threading.main_thread()}
        if jobs == 1:
            assert [member.index for member in handed] == list(range(6))

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
    def test_an_error_there_ends_the_training_and_leaves_no_results(self, error):
        def callback(member):
            raise error

        made = fleet([{"lr": 1e30}, *[{}] * 5], optimizer=MOMENTUM)
        made.fit(X, y, epochs=1)
        with pytest.raises(ArgumentError, match=r"^epochs:"):
            made.fit(X, y, epochs=0)
        # nothing has changed
        assert made.results is not None
        with pytest.raises(error):
            made.fit(X, y, epochs=10**7, jobs=2, callback=callback)
        assert made.results is None
        with pytest.raises(ArgumentError, match=r"^predict: the models are not trained, or not to the end"):
            made.predict(X)

    def test_models_that_had_ended_before_ctrl_c_are_whole(self):
        kept = []

        def callback(member):
            kept.append(member)
            if len(kept) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fleet({"seed": range(20)}).fit(X, y, epochs=3, jobs=1, callback=callback)
        for member in kept:
            engine = alone(seed=member.index)
            engine.fit(X, y, epochs=3)
            assert_same_state(member.engine, engine)


@pytest.mark.parametrize(
    ("vary", "options", "error", "message"),
    [
        ({"learning_rate": [1]}, {}, ArgumentError, r"^vary: unknown name 'learning_rate'; did you mean 'lr'\?"),
        ({"rate": [1]}, {}, ArgumentError, r"^vary: unknown name 'rate'; did you mean 'lr'\?"),
        ([{"alpha": 1}], {}, ArgumentError, r"^vary\[0\]: unknown name 'alpha'; did you mean 'weight_decay'\?"),
        ({"hidden": [8, (8, 0)]}, {}, ArgumentError, r"^vary, model 1: hidden: expected a whole number of at least 1"),
        ({"lr": np.array(0.1)}, {}, ArgumentTypeError, r"^vary\['lr'\]: expected a sequence, got"),
        ({"momentun": [1]}, {}, ArgumentError, r"^vary: .*did you mean 'momentum'\?"),
        ([{"sed": 1}], {}, ArgumentError, r"^vary\[0\]: .*did you mean 'seed'\?"),
        ({"fold": [1]}, {}, ArgumentError, r"^vary: 'fold' cannot vary; fusemlp.sklearn.FleetSearchCV cuts folds"),
        (
            [{"max_iter": 9}],
            {},
            ArgumentError,
            r"^vary\[0\]: 'max_iter' cannot vary; .* fit\(epochs=\.\.\.\), --epochs$",
        ),
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
        (
            {"lr": [0.1] * 1000, "seed": range(200)},
            {},
            ArgumentError,
            r"^vary: 1000 lr x 200 seed are 200000 models, and at most 100000 are",
        ),
    ],
)
def test_what_cannot_vary(vary, options, error, message):
    with pytest.raises(error, match=message):
        fleet(vary, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, ArgumentError, "epochs"),
        ({"y": y[:-1]}, ArgumentError, "y"),
        ({"X": np.full_like(X, np.nan)}, DataError, "X"),
        ({"early_stopping": 2}, ArgumentError, "early_stopping: it watches val_loss"),
        ({"rows": FOLDS[:2]}, ArgumentError, "rows: expected a list of rows for each of the 3 models, got 2"),
        ({"rows": [[0], [1], [ROWS]]}, ArgumentError, r"rows\[2\]: expected numbers from 0 to 89, got 90"),
        ({"rows": [[0], [1], []]}, ArgumentError, r"rows\[2\]: expected row numbers"),
        ({"rows": [[0.5]] * 3}, ArgumentError, r"rows\[0\]: expected row numbers"),
        ({"validation_rows": HELD_OUT, "validation_data": (XV, YV)}, ArgumentError, "validation_rows: they take the"),
        ({"jobs": 0}, ArgumentError, "jobs"),
        ({"callback": 3}, ArgumentTypeError, "callback: expected a function of a Member, got 3"),
        ({"drop_last": 1}, ArgumentTypeError, "drop_last: expected True or False, got 1"),
        ({"drop_last": True}, ArgumentError, "drop_last: 90 rows do not fill one batch of 100, and model 2 would not"),
    ],
)
def test_bad_data_changes_nothing(arguments, error, message):
    made = fleet([{}, {}, {"batch_size": 100}])
    with pytest.raises(error, match=f"^{message}"):
        made.fit(**{"X": X, "y": y, "epochs": 2, **arguments})
    assert all(engine.update_count == 0 for engine in made.engines)
    with pytest.raises(ArgumentError, match=r"^predict: the models are not trained, or not to the end"):
        made.predict(X)


def test_ctrl_c_stops_all_models_after_their_batches():
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


def test_layers_that_memory_has_no_room_for_are_named():
    with pytest.raises(MemoryError, match=r"^net: there is no room for [0-9,]+ parameters, .* make layers narrower"):
        Engine(MLP([4, 10**15, 5], init="zeros"), backend="numpy")
