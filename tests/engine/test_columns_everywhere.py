"""Each thing that takes rows takes columns of codes, with the results of the dense rows that they stand for."""

import copy
import pickle

import numpy as np
import pytest
from test_columns import assert_close, columns

import fusemlp
import make
from fusemlp.inputs.columns import Columns
from fusemlp_kernels.coding import BAG, WORD, Coding, Column

X = columns(150)
DENSE = np.asarray(X)
RANDOM = np.random.default_rng(1)
Y, CLASSES = RANDOM.normal(size=(150, 1)), RANDOM.integers(0, 2, 150)
HELD = slice(110, 150)


def engine(outputs=1, loss="mse", optimizer=None, hidden=(16, 8), **options):
    network = {name: options.pop(name) for name in ("activation", "dropout", "norm") if name in options}
    net = fusemlp.MLP([X.shape[1], *hidden, outputs], **{"activation": "gelu", **network})
    options = {"batch_size": 32, "precision": "fp64", **options}
    return make.engine(net=net, loss=loss, optimizer=optimizer or fusemlp.Adam(0.01), **options)


def fitted(rows, y=Y, epochs=2, fit=None, **options):
    trained = engine(**options)
    trained.fit(rows, y, epochs=epochs, **(fit or {}))
    return trained.state_dict()


def dropout(rows):
    return fitted(rows, hidden=(130, 17), activation="relu", dropout=0.5)


def prelu(rows):
    return fitted(rows, activation="prelu")


def single_layer(rows):
    return fitted(rows, hidden=())


def normalised(rows):
    trained = engine(hidden=(16, fusemlp.Residual(9)), activation="relu", norm="layer")
    trained.fit(rows, Y, epochs=2, validation_data=(rows, Y))
    trained.probe(rows, Y, epochs=1)
    return {**trained.state_dict(), "outputs": trained.predict(rows), **trained.dead_units(rows)}


def frozen(rows):
    by_name = {"0.weight": fusemlp.ParameterOptions(trainable=False)}
    return fitted(rows, optimizer=fusemlp.Adam(0.01, per_parameter=by_name))


def own_rate_and_decay(rows):
    by_name = {"0.weight": fusemlp.ParameterOptions(lr_factor=0.5, weight_decay=0.3)}
    return fitted(rows, optimizer=fusemlp.AdamW(0.01, weight_decay=0.1, per_parameter=by_name))


def early_stopping(rows):
    held = {"validation_data": (rows[HELD], Y[HELD]), "early_stopping": 1}
    return fitted(rows[:110], Y[:110], 12, held, optimizer=fusemlp.Adam(0.05, ema=0.9))


def held_out(rows):
    return fitted(rows, fit={"validation_split": 0.2, "drop_last": True, "shuffle": False})


def class_weights(rows):
    trained = engine(2, "cross_entropy")
    trained.fit(rows, CLASSES, epochs=2, class_weight="balanced", validation_data=(rows, CLASSES), metrics=["auc"])
    figures = trained.evaluate(rows, CLASSES, sample_weight=np.arange(1.0, 151.0), metrics=["f1", "log_loss"])
    return {**trained.state_dict(), **figures, "val_auc": trained.history.history["val_auc"]}


@pytest.mark.parametrize("adversarial", [fusemlp.PGD(0.1), fusemlp.IBP(0.1)], ids=["PGD", "IBP"])
def test_attacks_change_dense_rows(adversarial):
    results = []
    for rows in (X, DENSE):
        trained = engine(3, "cross_entropy", activation="relu")
        trained.fit(rows, CLASSES, epochs=2, adversarial=adversarial, validation_data=(rows, CLASSES))
        losses = trained.history.history["val_loss"]
        attacked = trained.attack(rows[:20], CLASSES[:20], fusemlp.FGSM(0.1))
        results.append({**trained.state_dict(), "losses": losses, "attacked": attacked})
    assert_close(*results)


def short_and_weighted_steps(rows):
    trained = engine()
    trained.step(rows[:32], Y[:32])
    trained.step(rows[:1], Y[:1])
    trained.step(rows[5:12], Y[5:12], sample_weight=np.arange(1.0, 8.0))
    trained.fit(rows, Y, epochs=1)
    trained.step(rows[:20], Y[:20])
    return trained.state_dict()


def batches(rows):
    parts = [slice(0, 20), slice(20, 110), slice(110, 150)]
    held = [(rows[part], Y[part]) for part in parts[:2]]
    trained = engine()
    trained.fit([(rows[part], Y[part]) for part in parts], epochs=3, validation_data=held, early_stopping=2)
    return {**trained.state_dict(), **trained.evaluate(held), "losses": trained.history.history["val_loss"]}


def rate_sweep(rows):
    return {"losses": engine().lr_find(rows, Y, steps=30).losses}


def probe(rows):
    trained = engine(hidden=(16,))
    trained.probe(rows, Y, epochs=2, validation_data=(rows, Y))
    return trained.state_dict()


def transfer(rows):
    source = engine()
    source.fit(rows, Y, epochs=1)
    tuned = fusemlp.Engine.from_pretrained(source, head=2, loss="cross_entropy", precision="fp64", backend="numpy")
    tuned.fit(rows, CLASSES, epochs=1)
    return {**tuned.state_dict(), "probabilities": tuned.predict_proba(rows)}


def explanations(rows):
    trained = engine()
    trained.fit(rows, Y, epochs=1)
    gradient = trained.inference.input_gradient(rows[:9], Y[:9])
    return {"gradient": gradient, "outputs": trained.predict(rows), **trained.inference.dead_units(rows)}


def fleet(rows):
    trained = fusemlp.Fleet(
        fusemlp.MLP([X.shape[1], 8, 1]), "mse", batch_size=32, vary={"lr": [0.01, 0.02, 0.05]}, precision="fp64",
        backend="numpy",
    )  # fmt: skip
    results = trained.fit(rows, Y, epochs=4, validation_data=(rows[HELD], Y[HELD]), early_stopping=2)
    arrays = {
        f"{member.index} {name}": array
        for member in results.members
        for name, array in member.engine.state_dict().items()
    }
    return {**arrays, "predicted": trained.predict(rows).mean}


def fleet_of_folds(rows):
    trained = fusemlp.Fleet(fusemlp.MLP([X.shape[1], 8, 1]), "mse", vary={"lr": [0.01, 0.02]}, precision="fp64")
    folds = np.arange(75), np.arange(75, 150)
    results = trained.fit(rows, Y, epochs=2, rows=folds, validation_rows=folds[::-1])
    return {f"{member.index} {name}": value for member in results.members for name, value in member.scores.items()}


CASES = (
    dropout, prelu, single_layer, normalised, frozen, own_rate_and_decay, early_stopping, held_out, class_weights,
    short_and_weighted_steps, batches, rate_sweep, probe, transfer, explanations, fleet, fleet_of_folds,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_columns_are_as_dense_rows(case):
    assert_close(case(X), case(DENSE))


def test_workers_train_on_columns():
    arguments = fusemlp.MLP([X.shape[1], 8, 1]), "mse"
    here, there = (fusemlp.Fleet(*arguments, vary={"lr": [0.01, 0.02]}, backend="numpy") for _ in range(2))
    rows = X.astype(np.float32)
    for trained, workers in ((here, {}), (there, {"workers": "loky", "jobs": 2})):
        trained.fit(rows, Y, epochs=2, validation_data=(rows[HELD], Y[HELD]), **workers)
    for left, right in zip(here.results.members, there.results.members, strict=True):
        make.assert_same(left.engine.state_dict(), right.engine.state_dict())


def test_models_of_a_fleet_are_trained_on_alone():
    states = []
    for rows in (X, DENSE):
        trained = fusemlp.Fleet(fusemlp.MLP([X.shape[1], 8, 1]), "mse", vary={"lr": [0.01, 0.02]}, precision="fp64")
        first = trained.fit(rows, Y, epochs=1).members[0].engine
        first.fit(DENSE, Y, epochs=1)
        members = trained.fit(rows, Y, epochs=1).members
        states.append(
            {f"{member.index} {name}": a for member in members for name, a in member.engine.state_dict().items()}
        )
    assert_close(*states)


@pytest.mark.parametrize("given", ["arrays", "batches"])
@pytest.mark.parametrize("after", [7, 10])
def test_a_resumed_fit_ends_as_if_it_had_not_stopped(after, given, tmp_path):
    optimizer = fusemlp.Adam(0.05, ema=0.9, accumulate=2)
    parts = [slice(start, start + 32) for start in range(0, 150, 32)]
    data = {"X": X, "y": Y} if given == "arrays" else {"X": [(X[part], Y[part]) for part in parts]}
    data |= {"epochs": 5, "validation_data": (X[HELD], Y[HELD]), "early_stopping": 2}
    whole = engine(optimizer=optimizer)
    resumed = make.halfway(whole, tmp_path / "checkpoint.safetensors", after, **data)
    resumed.fit(**data, resume=True)
    make.assert_same(resumed.state_dict(), whole.state_dict())
    assert resumed.history.history == whole.history.history


def test_the_best_weights_outlive_steps_on_dense_rows(tmp_path):
    trained = engine(optimizer=fusemlp.Adam(0.05))
    trained.fit(X[:110], Y[:110], epochs=12, early_stopping=1, validation_data=(X[HELD], Y[HELD]))
    best = trained.best_parameters
    trained.step(DENSE[:8], Y[:8])
    make.assert_same(trained.best_parameters, best)


@pytest.mark.parametrize("through", ["pickle", "deepcopy", "save", "checkpoint"])
def test_a_copy_predicts_and_trains_on(through, tmp_path):
    trained = engine()
    trained.fit(X, Y, epochs=2)
    path = tmp_path / "model.safetensors"
    if through == "pickle":
        other = pickle.loads(pickle.dumps(trained))
    elif through == "deepcopy":
        other = copy.deepcopy(trained)
    elif through == "save":
        trained.save(path)
        other = fusemlp.load(path)
    else:
        trained.save_checkpoint(path)
        other = fusemlp.load_checkpoint(path)
    assert all(array.flags.c_contiguous for array in trained.state_dict().values())
    make.assert_same(other.state_dict(), trained.state_dict())
    assert_close({"": other.predict(X)}, {"": trained.predict(X)})
    assert_close({"": other.predict(DENSE)}, {"": trained.predict(X)})
    assert_close(other.evaluate(X, Y), trained.evaluate(DENSE, Y))
    if through != "save":
        for one in (trained, other):
            one.fit(X, Y, epochs=1)
        make.assert_same(other.state_dict(), trained.state_dict())


def test_a_divergence_does_not_take_codes_for_features():
    rows = columns(150, (Column(WORD, 900), Column(BAG, 500, 3)))
    trained = make.engine((1400, 8, 1), "mse", fusemlp.SGD(1e30))
    with pytest.raises(fusemlp.DivergenceError, match="a learning rate of 1e\\+30 is too high"):
        trained.fit(rows, Y, epochs=3)


def test_large_numbers_warn():
    rows = Columns(Coding((Column("numbers", 2),)), 1e4 * RANDOM.normal(size=(50, 2)))
    with pytest.warns(fusemlp.InputScaleWarning):
        make.engine((2, 4, 1), "mse").fit(rows, Y[:50], epochs=1)


def test_batches_have_one_coding():
    others = columns(20, (Column(WORD, X.shape[1]),))
    for second in (others, DENSE[:20]):
        with pytest.raises(fusemlp.DataError, match="X: batch 2 has other columns than batch 1; give all batches"):
            engine().fit([(X[:20], Y[:20]), (second, Y[:20])], epochs=1)


CODES = np.array([[2, 1, 0.25, -7, 1, 0.5, 1, 2], [-1, 3, 1.5, 8, -1, 4, 0, 3]])
SMALL = Coding((Column("word", 3), Column("pieces", 4), Column("numbers", 1), Column("bag", 3, 2)))
# a slot, a code that it does not take, and what the error says
WRONG = [
    (0, 3, "a whole number from 0 to 2, or -1 for none in slot 0, got 3.0 at row 1"),
    (0, -2, "a whole number from 0 to 2, or -1 for none in slot 0, got -2.0 at row 1"),
    (1, 4, "a whole number from 0 to 3 in slot 1, got 4.0 at row 1"),
    (1, -1, "a whole number from 0 to 3 in slot 1, got -1.0 at row 1"),
    (4, 3, "a whole number from 0 to 2, or -1 for none in slot 4, got 3.0 at row 1"),
    (6, 0.5, "a whole number from 0 to 2, or -1 for none in slot 6, got 0.5 at row 1"),
    *((slot, value, f"in slot {slot}, got {value} at row 1") for slot in range(8) for value in (np.nan, np.inf)),
    (2, -np.inf, "a finite number in slot 2, got -inf at row 1"),
]


@pytest.mark.parametrize("slot, value, message", WRONG)
def test_codes_that_no_input_has_are_refused(slot, value, message):
    codes = CODES.copy()
    codes[1, slot] = value
    with pytest.raises(fusemlp.DataError, match="codes: expected .*" + message):
        Columns(SMALL, codes)


def test_columns_are_checked():
    with pytest.raises(
        fusemlp.ShapeError, match=r"codes: expected shape \(n, 8\), the slots of the coding, got \(2, 7\)"
    ):
        Columns(SMALL, CODES[:, 1:])
    with pytest.raises(fusemlp.ArgumentTypeError, match=r"coding: expected a Coding, got list; Columns.of"):
        Columns([4, 4], np.zeros((2, 8)))
    with pytest.raises(fusemlp.DTypeError, match="codes: expected real numbers, got dtype complex128"):
        Columns(SMALL, CODES + 0j)
    for column in (("wrod", 3), ("word", 0), ("word", 1 << 25), ("bag", 3), ("word", 3, 1)):
        with pytest.raises(fusemlp.ArgumentError, match="columns: expected a kind of numbers, word, pieces, bag"):
            Coding((Column(*column),))
    with pytest.raises(fusemlp.ArgumentError, match="columns: expected at least one"):
        Coding(())
    with pytest.raises(ValueError, match="read-only"):
        Columns(SMALL, CODES).codes[0] = 9


def test_rows_of_columns():
    rows = Columns(SMALL, CODES)
    dense = np.asarray(rows)
    for picked in (1, [1, 0, 1], np.array([True, False]), slice(1, None)):
        assert np.array_equal(rows[picked], np.atleast_2d(dense[picked]))
    with pytest.raises(fusemlp.ShapeError, match="columns: expected the numbers of rows"):
        rows[:, 0]


@pytest.mark.parametrize("call", ["fit", "step", "predict"])
def test_columns_of_another_width_are_refused(call):
    trained = make.engine((12, 4, 1), "mse")
    others = [] if call == "predict" else [Y[:2]]
    epochs = {"epochs": 1} if call == "fit" else {}
    with pytest.raises(
        fusemlp.ShapeError, match=r"expected 12 columns, as many as the network has inputs, got shape \(2, 11\)"
    ):
        getattr(trained, call)(Columns(SMALL, CODES), *others, **epochs)
    with pytest.raises(fusemlp.DataError, match="expected 1 or more rows"):
        getattr(make.engine((11, 4, 1), "mse"), call)(Columns(SMALL, CODES[:0]), *(a[:0] for a in others), **epochs)


def test_numbers_beyond_the_precision_are_refused():
    codes = CODES.copy()
    codes[0, 3] = 1e300
    with pytest.raises(fusemlp.DataError, match="a finite number in slot 3, got inf at row 0"):
        make.engine((11, 4, 1), "mse").fit(Columns(SMALL, codes), Y[:2], epochs=1)
