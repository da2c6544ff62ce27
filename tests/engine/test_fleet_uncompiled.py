"""Fleets on NumPy without numba: steps made together, and the bits of engines that train alone."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import pytest
from same_state import assert_same_state

from fusemlp import (
    MLP,
    SGD,
    Adam,
    AdamW,
    BinaryCrossEntropy,
    Cosine,
    CrossEntropy,
    Engine,
    Fleet,
    Huber,
    LeakyReLU,
    OneCycle,
    ParameterOptions,
    PReLU,
    Quantile,
    ReduceOnPlateau,
)
from fusemlp.fleet import launches as lockstep
from fusemlp.fleet import memory as waves

ROWS, WIDTH, CLASSES, BATCH = 90, 6, 3, 16
random = np.random.default_rng(1)
X = random.standard_normal((ROWS, WIDTH))
y = (X @ random.standard_normal((WIDTH, CLASSES))).argmax(axis=1)
VALUES = np.column_stack([X[:, 0] * 2 + 1, np.abs(X[:, 1]), X[:, 2] * X[:, 3]])
SOFT = random.dirichlet(np.ones(CLASSES), ROWS)
WEIGHT = random.random(ROWS)
IGNORED = np.where(np.arange(ROWS) % 4, y, -1)
NET = MLP([WIDTH, 8, CLASSES])


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusemlp_kernels.numpy.backend.numba_is_installed", lambda: False)


def fleet(vary: Any, net: MLP = NET, **options: Any) -> Fleet:
    return Fleet(net, **{"batch_size": BATCH, **options}, backend="numpy", vary=vary)


def alone(made: Fleet, index: int) -> Engine:
    one, first = made.candidates[index], made.engines[0]
    return Engine(
        one.net, one.loss, one.optimizer, one.batch_size, one.seed, "numpy", precision=first.precision, plan="eager"
    )


def assert_as_alone(made: Fleet, target: Any, *, X: Any = X, fits: int = 1, **data: Any) -> None:
    """All models make their steps together, and end as engines do that are trained alone."""
    assert all("at once" in engine.plan_reason for engine in made.engines)
    engines = [alone(made, index) for index in range(len(made))]
    for _ in range(fits):
        results = made.fit(X, target, **data)
        for index, engine in enumerate(engines):
            engine.fit(X, target, **data)
            assert_same_state(results.engine(index), engine)
            # all of them, for the files that they are written to
            assert np.array_equal(results.engine(index).memory.counters, engine.memory.counters)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("models", [2, 3, 17])
def test_models_that_differ_in_their_seeds(models: int, precision: str) -> None:
    assert_as_alone(fleet({"seed": range(models)}, precision=precision), y, epochs=3, fits=2)


def test_one_model_has_nobody_to_go_together_with() -> None:
    made = fleet({"seed": [3]})
    results = made.fit(X, y, epochs=2)
    assert "at once" not in made.engines[0].plan_reason
    engine = alone(made, 0)
    engine.fit(X, y, epochs=2)
    assert_same_state(results.engine(0), engine)


FROZEN = {"0.*": ParameterOptions(trainable=False)}
SIGMOID = MLP([WIDTH, 8, CLASSES], activation="sigmoid", dropout=0.2)
PRELU = MLP([WIDTH, 7, 3], activation=PReLU(), output_activation=PReLU(0.1))
GELU = MLP([WIDTH, 7, 3], activation="gelu", output_activation="gelu")
RATES = {"lr": [0.03, 0.1, 0.3], "seed": range(2)}
MOMENTA = {"momentum": [0.0, 0.5, 0.9], "seed": range(2)}
DROPPED = {"dropout": [0.0, 0.3, 0.5], "seed": range(2)}
CASES: dict[str, tuple[Any, MLP, Any, Any, dict[str, Any]]] = {
    "rates": (y, NET, "cross_entropy", SGD(), {"vary": RATES}),
    "momentum": (y, NET, "cross_entropy", SGD(weight_decay=0.01), {"vary": MOMENTA}),
    "nesterov": (y, NET, "cross_entropy", SGD(Cosine(0.1), momentum=0.9, nesterov=True), {"vary": RATES}),
    "scikit-learn's momentum": (
        *(y, NET, "cross_entropy", SGD(0.1, momentum=0.9, nesterov=True, convention="scikit-learn")),
        {"vary": RATES},
    ),
    "decays": (y, NET, "cross_entropy", AdamW(0.05), {"vary": {"weight_decay": [0.0, 0.1, 0.2]}}),
    "betas": (y, NET, "cross_entropy", Adam(OneCycle(0.05)), {"vary": {"betas": [(0.9, 0.99), (0.5, 0.9)]}}),
    "scikit-learn's Adam": (y, NET, "cross_entropy", Adam(convention="scikit-learn"), {"vary": RATES}),
    "clipped": (y, NET, "cross_entropy", SGD(clip_norm=0.3), {"vary": RATES}),
    "accumulated": (y, NET, "cross_entropy", Adam(accumulate=4, clip_norm=0.5), {"vary": RATES}),
    "frozen": (y, MLP([WIDTH, 8, 5, CLASSES]), "cross_entropy", Adam(per_parameter=FROZEN), {}),
    "plateau": (y, NET, "cross_entropy", Adam(ReduceOnPlateau(0.1, patience=1)), {"vary": RATES}),
    "masks": (y, MLP([WIDTH, 8, 9, CLASSES], dropout=0.2), "cross_entropy", Adam(), {"vary": DROPPED}),
    "masks behind sigmoid": (y, SIGMOID, "cross_entropy", Adam(), {}),
    "smoothing": (y, NET, "cross_entropy", Adam(), {"vary": {"label_smoothing": [0.0, 0.1, 0.1, 0.2]}}),
    "weighted": (y, NET, CrossEntropy(class_weight=(1.0, 2.0, 0.5)), Adam(), {"sample_weight": WEIGHT}),
    "ignored": (IGNORED, NET, CrossEntropy(ignore_index=-1, reduction="sum"), Adam(), {}),
    "soft": (SOFT, NET, CrossEntropy(label_smoothing=0.1), Adam(), {"sample_weight": WEIGHT}),
    "many classes": (y * 30, MLP([WIDTH, 8, 80]), CrossEntropy(), Adam(), {"sample_weight": WEIGHT}),
    "many smoothed classes": (y * 30, MLP([WIDTH, 8, 80]), CrossEntropy(label_smoothing=0.1), Adam(), {}),
    "mse behind tanh": (VALUES, MLP([WIDTH, 7, 3], output_activation="tanh"), "mse", Adam(), {"sample_weight": WEIGHT}),
    "mae behind prelu": (VALUES, PRELU, "mae", Adam(), {}),
    "huber behind gelu": (VALUES, GELU, Huber(0.5), SGD(), {}),
    "quantile": (VALUES, MLP([WIDTH, 7, 3], activation=LeakyReLU(0.2)), Quantile(0.3, reduction="sum"), SGD(0.001), {}),
    "poisson": (np.abs(VALUES), MLP([WIDTH, 7, 3], activation="silu"), "poisson", SGD(0.01), {}),
    "binary": ((VALUES > 0).astype(float), MLP([WIDTH, 7, 3]), BinaryCrossEntropy(), Adam(), {}),
    "no hidden layer": (y, MLP([WIDTH, CLASSES]), "cross_entropy", SGD(momentum=0.9), {}),
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("name", CASES)
def test_numbers_losses_activations_and_optimizers(name: str, precision: str) -> None:
    target, net, loss, optimizer, rest = CASES[name]
    vary = rest.get("vary", {"seed": range(3)})
    made = fleet(vary, net, loss=loss, optimizer=optimizer, precision=precision)
    data = {"sample_weight": rest["sample_weight"]} if "sample_weight" in rest else {}
    assert_as_alone(
        made, np.asarray(target, np.float64) if target is not y and target.ndim > 1 else target, epochs=3, **data
    )


def test_a_batch_of_all_rows_is_no_longer_than_they_are() -> None:
    with pytest.warns(UserWarning, match="batch_size: 16 is more than the 11 rows"):
        assert_as_alone(fleet({"seed": range(3)}), y[:11], X=X[:11], epochs=3)


def test_models_stop_early_each_by_itself() -> None:
    made = fleet({"lr": [0.001, 0.1, 0.5], "seed": range(4)})
    data = {"validation_data": (X[60:], y[60:]), "early_stopping": 2}
    assert_as_alone(made, y, epochs=12, **data)
    assert made.results is not None
    ends = {len(member.history.history["loss"]) for member in made.results.members}
    assert len(ends) > 2


@pytest.mark.filterwarnings("ignore:batch_size. 16 is more than the 10 rows")
def test_folds_of_several_lengths() -> None:
    rows = [np.arange(ROWS)[: ROWS - 20 * index] for index in range(4)] + [np.arange(10)]
    held_out = np.arange(ROWS - 10, ROWS)
    data = {"epochs": 4, "early_stopping": 2}
    results = fleet([{}] * 5).fit(X, y, sample_weight=WEIGHT, rows=rows, validation_rows=[held_out] * 5, **data)
    for member, own in zip(results.members, rows, strict=True):
        engine = Engine(NET, batch_size=BATCH, backend="numpy", plan="eager")
        check = X[held_out], y[held_out], WEIGHT[held_out]
        engine.fit(X[own], y[own], sample_weight=WEIGHT[own], validation_data=check, **data)
        assert_same_state(member.engine, engine)


def test_a_model_that_diverges_harms_no_other() -> None:
    for optimizer in (SGD(0.1, momentum=0.9), SGD(0.1, momentum=0.9, clip_norm=1.0), Adam(0.1)):
        made = fleet([{"seed": 0}, {"lr": 1e30}, {"seed": 2}, {"lr": 1e30, "seed": 1}], optimizer=optimizer)
        results = made.fit(X, y, epochs=5)
        assert [member.status for member in results.members] == ["trained", "diverged", "trained", "diverged"]
        for index in (0, 2):
            engine = alone(made, index)
            engine.fit(X, y, epochs=5)
            assert_same_state(results.engine(index), engine)


def test_waves(caplog: pytest.LogCaptureFixture) -> None:
    one = fleet([{}])
    memory = 3 * waves.engine_bytes(one.engines[0]) + waves.kept_bytes(one.candidates * 8, "fp32")
    with caplog.at_level(logging.WARNING, "fusemlp"):
        made = fleet({"seed": range(8)}, memory=memory)
        results = made.fit(X, y, epochs=3)
    assert "trained in waves" in caplog.text
    for index in range(8):
        engine = Engine(NET, batch_size=BATCH, seed=index, backend="numpy", plan="eager")
        engine.fit(X, y, epochs=3)
        assert results.engine(index).state_dict().keys() == engine.state_dict().keys()
        for name, tensor in results.engine(index).state_dict().items():
            assert tensor.tobytes() == engine.state_dict()[name].tobytes(), name


def test_who_goes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []
    together = lockstep.train_together

    def noted(given: Any, *arguments: Any, **options: Any) -> None:
        groups.append([places for _, places in given])
        together(given, *arguments, **options)

    monkeypatch.setattr("fusemlp.fleet.fleet.train_together", noted)
    made = fleet([{}, {"hidden": 5}, {"seed": 1}, {"hidden": 5, "seed": 1}, {"batch_size": 8}, {"hidden": 4000}])
    made.fit(X, y, epochs=1)
    assert groups == [[[0, 2], [1, 3]]]
    assert [engine.plan for engine in made.engines] == ["eager"] * 6
    assert ["at once" in engine.plan_reason for engine in made.engines] == [True] * 4 + [False] * 2
    assert all("with numba" in engine.plan_reason for engine in made.engines)
    fleet({"hidden": [4000], "seed": [0, 1]}).fit(X, y, epochs=1)
    fleet({"seed": [0, 1]}, plan="eager").fit(X, y, epochs=1)
    assert len(groups) == 1


def test_models_with_few_rows_do_not_make_the_lists_of_others_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes through as many epochs in a launch as there is room for; the longest list is what all have room for."""
    monkeypatch.setattr("fusemlp.fleet.launches.ROWS_AT_ONCE", 150)
    made, lists = [], lockstep.fleet_rows
    monkeypatch.setattr("fusemlp.fleet.launches.fleet_rows", lambda *given: made.append(lists(*given)) or made[-1])
    own = [np.arange(4), np.arange(40), np.arange(90)]
    results = fleet([{"lr": 0.01}] * 3).fit(X, y, epochs=50, rows=own)
    ((rows, history),) = made
    # 37 epochs of 4 rows, 3 of 40 in batches of 16, 1 of 90
    assert rows.shape == (3, 37 * 4) and history.shape[:2] == (3, 37)
    monkeypatch.undo()
    for index, mine in enumerate(own):
        engine = alone(fleet([{"lr": 0.01}] * 3), index)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.fit(X[mine], y[mine], epochs=50)
        assert results.engine(index).history.history["loss"] == engine.history.history["loss"]
