"""Transfer learning: the layers of another network, frozen or slowed down, and the probe of the head."""

import re

import numpy as np
import pytest
import torch
from devices import CUPY_GPU, GPU, INTERPRETER, NUMPY, STAND_IN, places, usable
from safetensors.numpy import save_file
from torch import nn

import fusemlp
import fusemlp.torch
from fusemlp import MLP, ArgumentError, ArgumentTypeError, Engine, ParameterOptions, ShapeError
from fusemlp.training.transfer import by_layers, in_sequence
from make import assert_same

SIZES = [6, 9, 7, 4]
ROWS = 40
# Steps of two ways of computing the same doubles.
WHOLE_RUN = 1e-9


def task(outputs=3, rows=ROWS):
    random = np.random.default_rng(outputs)
    return random.standard_normal((rows, SIZES[0])), random.integers(0, outputs, rows)


@pytest.fixture(scope="module")
def source():
    engine = Engine(MLP(SIZES, activation="tanh"), precision="fp64", seed=3, normalise=False)
    engine.fit(*task(4), epochs=5)
    return engine


def sequential(engine):
    """Return the layers of SIZES in torch with the first two of the engine, a Dropout after them and a new head."""
    kept = fusemlp.torch.to_torch(engine)
    return nn.Sequential(*list(kept)[:4], nn.Linear(7, 3, dtype=torch.float64))


@pytest.mark.parametrize("plan", ["eager", "resident"])
@pytest.mark.parametrize(("freeze", "decay"), [(0, 1.0), (1, 1.0), (0, 0.4), (1, 0.4), (2, 0.4)])
def test_fine_tuning_is_that_of_torch(source, plan, freeze, decay):
    X, y = task()
    optimizer = fusemlp.AdamW(0.02, weight_decay=0.1)
    made = {"freeze": freeze, "layer_decay": decay, "optimizer": optimizer, "plan": plan, "batch_size": 16, "seed": 5}
    engine = Engine.from_pretrained(source, head=3, **made)
    module = sequential(source)
    with torch.no_grad():
        for name, array in engine.state_dict().items():
            if name in ("4.weight", "4.bias"):
                module.state_dict()[name].copy_(torch.from_numpy(array))
    layers = [module[0], module[2], module[4]]
    groups = [
        {"params": list(layer.parameters()), "lr": 0.02 * decay ** (2 - place)}
        for place, layer in enumerate(layers)
        if place >= freeze
    ]
    steps = torch.optim.AdamW(groups, weight_decay=0.1)
    engine.fit(X, y, epochs=10, shuffle=False)
    for _ in range(10):
        for first in range(0, ROWS, 16):
            steps.zero_grad()
            rows = slice(first, first + 16)
            nn.functional.cross_entropy(module(torch.from_numpy(X[rows])), torch.from_numpy(y[rows])).backward()
            steps.step()
    for name, array in module.state_dict().items():
        np.testing.assert_allclose(engine.state_dict()[name], array.numpy(), rtol=WHOLE_RUN, atol=WHOLE_RUN)


@pytest.mark.parametrize("device", places(NUMPY, INTERPRETER, GPU, STAND_IN, CUPY_GPU))
def test_frozen_layers_keep_their_bits(source, device):
    X, y = task()
    with usable(device):
        plans = ["eager", "resident"] if device is NUMPY else ["auto"]
        for plan in plans:
            optimizer = fusemlp.AdamW(0.1, weight_decay=0.1)
            options = {"optimizer": optimizer, "precision": "fp32", "backend": device.backend, "plan": plan}
            engine = Engine.from_pretrained(source, head=3, freeze=2, **options)
            start = engine.state_dict()
            engine.probe(X, y, epochs=1)
            before = engine.state_dict()
            assert [name for name, array in before.items() if (array != start[name]).any()] == ["4.weight", "4.bias"]
            engine.fit(X, y, epochs=2)
            for name, array in engine.state_dict().items():
                kept = name in ("0.weight", "0.bias", "2.weight", "2.bias")
                assert np.array_equal(array, before[name]) == kept, (plan, name)
                if kept:
                    np.testing.assert_array_equal(array, source.state_dict()[name].astype(np.float32))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_probe_is_a_fit_with_frozen_layers(source, layers, normalise):
    X, y = task()
    rate = {"4.*": ParameterOptions(lr_factor=0.5), "2.bias": ParameterOptions(weight_decay=0.0)}
    optimizer = fusemlp.SGD(0.1, momentum=0.9, weight_decay=0.02, per_parameter=rate)
    given = {"validation_data": (X[:9], y[:9]), "sample_weight": np.linspace(0.5, 2.0, ROWS), "epochs": 6}
    fitted, probed = (
        Engine.from_pretrained(source, head=3, freeze=freeze, optimizer=optimizer, normalise=normalise)
        for freeze in (layers, 0)
    )
    before = probed.state_dict()
    wanted, found = fitted.fit(X, y, **given), probed.probe(X, y, layers=layers, **given)
    for name in ("loss", "val_loss", "accuracy", "val_accuracy"):
        np.testing.assert_allclose(found.history[name], wanted.history[name], rtol=0, atol=1e-12)
    for name, array in probed.state_dict().items():
        np.testing.assert_allclose(array, fitted.state_dict()[name], rtol=0, atol=1e-12)
        if name.startswith("0.") or (layers == 2 and name.startswith("2.")):
            np.testing.assert_array_equal(array, before[name])
    # the fit that follows starts anew
    assert (probed.update_count, probed.epochs_trained, probed.history) == (0, 0, None)


def test_a_probe_in_single_precision_differs_by_rounding(source):
    X, y = task()
    options = {"head": 3, "precision": "fp32", "optimizer": fusemlp.SGD(0.1)}
    wanted = Engine.from_pretrained(source, freeze=2, **options).fit(X, y, epochs=4)
    found = Engine.from_pretrained(source, **options).probe(X, y, epochs=4)
    # each of 8 steps adds two rounded sums of 9 products of order 1
    bound = 8 * 2 * (2 * 9**0.5 + 4) * 2.0**-24
    np.testing.assert_allclose(found.history["loss"], wanted.history["loss"], rtol=0, atol=bound)


def test_a_probe_leaves_the_dropout_of_the_first_layers_out(source):
    X, y = task()
    dropped = MLP([*SIZES[:3], 3], activation="tanh", dropout=0.5)
    losses = [
        Engine.from_pretrained(source.state_dict(), net).probe(X, y, epochs=3).history["loss"]
        for net in (dropped, MLP([*SIZES[:3], 3], activation="tanh"))
    ]
    assert losses[0] == losses[1]


def test_a_probe_that_ends_early_keeps_what_was_reached(source):
    X, y = task()
    engine = Engine.from_pretrained(source, head=3)

    class Stop:
        def on_epoch_end(self, engine, epoch, logs):
            if epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.probe(X, y, epochs=5, callbacks=[Stop()])
    other = Engine.from_pretrained(source, head=3)
    other.probe(X, y, epochs=2)
    np.testing.assert_array_equal(engine.state_dict()["4.weight"], other.state_dict()["4.weight"])
    diverging = Engine.from_pretrained(source, head=3, loss="mse", optimizer=fusemlp.SGD(1e30), precision="fp32")
    before = diverging.state_dict()
    with pytest.raises(fusemlp.DivergenceError):
        diverging.probe(X, np.eye(3)[y], epochs=5)
    assert_same(diverging.state_dict(), before)


def test_wrong_arguments_of_a_probe_change_nothing(source):
    X, y = task()
    engine = Engine(MLP(SIZES), normalise=True)
    for wrong, error, message in (
        ({"layers": 3}, ArgumentError, "layers: expected 1 to 2, so that some of the 3 layers stay"),
        ({"epochs": 0}, ArgumentError, "epochs: expected"),
        ({"y": y[:5]}, ShapeError, "y: "),
        ({"X": X[:, :2]}, ShapeError, r"X: expected"),
        ({"validation_data": [(X, y)]}, ArgumentError, "X: a probe computes"),
        ({"lr": 0.1}, TypeError, "lr"),
    ):
        with pytest.raises(error, match=message):
            engine.probe(**{"X": X, "y": y, "epochs": 1, **wrong})
    assert engine.input_scale is None
    with pytest.raises(ArgumentError, match="layers: expected 1 to 0"):
        Engine(MLP([6, 3])).probe(X, y, epochs=1)


def test_every_kind_of_source_gives_the_same_layers(source, tmp_path):
    source.save(tmp_path / "model.safetensors")
    source.save_checkpoint(tmp_path / "checkpoint.safetensors")
    layers = nn.Linear(6, 9), nn.Tanh(), nn.Dropout(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)
    module = nn.Sequential(*layers).double()
    names = {"0": "0", "2": "3", "4": "5"}
    state = {f"{names[name[0]]}{name[1:]}": torch.from_numpy(a) for name, a in source.state_dict().items()}
    module.load_state_dict(state)
    save_file({name: array.numpy() for name, array in state.items()}, tmp_path / "plain.safetensors")
    net = MLP([6, 9, 7, 3], activation="tanh")
    for given, ends in (
        (source, {"head": 3}),
        (str(tmp_path / "model.safetensors"), {"head": 3}),
        (tmp_path / "checkpoint.safetensors", {"head": [3]}),
        (tmp_path / "plain.safetensors", {"net": net}),
        (module.state_dict(), {"net": net}),
        (fusemlp.torch.from_torch(module), {"head": 3}),
    ):
        engine = Engine.from_pretrained(given, precision="fp64", seed=8, **ends)
        assert engine.network.sizes == net.sizes
        fresh = Engine(engine.network, precision="fp64", seed=8).state_dict()
        for name, array in engine.state_dict().items():
            np.testing.assert_array_equal(array, fresh[name] if name[0] == "4" else source.state_dict()[name])
    same = Engine.from_pretrained(module.state_dict(), MLP(SIZES, activation="tanh"), precision="fp64")
    np.testing.assert_array_equal(same.state_dict()["4.bias"], source.state_dict()["4.bias"])


def test_the_kept_layers_decide_the_network(source):
    whole = Engine.from_pretrained(source)
    assert_same(whole, source)
    assert (whole.network, whole.precision, whole.normalise) == (source.network, "fp64", False)
    assert whole.loss == fusemlp.CrossEntropy()
    first = Engine.from_pretrained(source, layers=1, seed=9)
    assert first.network == source.network
    np.testing.assert_array_equal(first.state_dict()["0.bias"], source.state_dict()["0.bias"])
    np.testing.assert_array_equal(first.state_dict()["2.weight"], source.network.initial_parameters(9)["2.weight"])
    assert Engine.from_pretrained(source, layers=1, head=(5, 2)).network == MLP([6, 9, 5, 2], activation="tanh")
    assert Engine.from_pretrained(source, head=2, loss="mse", precision="fp32").loss.kind == "mse"
    slopes = Engine(MLP([6, 5, 2], activation=fusemlp.PReLU(0.1)), seed=1)
    kept = Engine.from_pretrained(slopes.state_dict(), MLP([6, 5, 3], activation="prelu"), layers=1)
    np.testing.assert_array_equal(kept.state_dict()["1.weight"], slopes.state_dict()["1.weight"])


def test_the_scale_of_the_inputs_goes_along():
    X, y = task(4)
    measured = Engine(MLP(SIZES), normalise=True)
    measured.fit(100 * X + 3, y, epochs=1)
    for source, net in ((measured, None), (measured.state_dict(), MLP(SIZES))):
        engine = Engine.from_pretrained(source, net)
        np.testing.assert_array_equal(engine.predict_proba(100 * X + 3), measured.predict_proba(100 * X + 3))
        with pytest.raises(ArgumentError, match="normalise: the source scales its inputs"):
            Engine.from_pretrained(source, net, normalise=X)


def test_by_layers_multiplies_what_parameters_have():
    net = MLP([4, 3, 3, 2], activation=["prelu", "relu"])
    rules = {"*.bias": ParameterOptions(lr_factor=2.0, weight_decay=0.0), "4.*": ParameterOptions(False)}
    found = by_layers(fusemlp.Adam(0.1, per_parameter=rules), net, freeze=1, layer_decay=0.5)
    assert {name: found.options_for(name)[0] for name in net.parameter_shapes()} == {
        **dict.fromkeys(("0.weight", "0.bias", "1.weight", "4.weight"), False),
        **dict.fromkeys(("2.weight", "2.bias", "4.bias"), True),
    }
    factors = {name: found.options_for(name)[1].lr_factor for name in ("0.weight", "0.bias", "2.weight", "4.bias")}
    assert factors == {"0.weight": 0.25, "0.bias": 0.5, "2.weight": 0.5, "4.bias": 2.0}
    assert by_layers(fusemlp.Adam(0.1), net) == fusemlp.Adam(0.1)


def test_a_fleet_starts_from_given_parameters(source):
    X, y = task(4)
    start = {name: array for name, array in source.state_dict().items() if not name.startswith("4.")}
    options = {"precision": "fp64", "normalise": False}
    for memory in (None, 400_000):
        fleet = fusemlp.Fleet(source.network, vary={"seed": [3, 4]}, initial=[start, start], memory=memory, **options)
        results = fleet.fit(X, y, epochs=2)
        for index, seed in enumerate((3, 4)):
            alone = Engine(source.network, seed=seed, **options)
            alone.load_state_dict({**alone.state_dict(), **start})
            alone.fit(X, y, epochs=2)
            assert_same(results.engine(index), alone)
    one = {"0.weight": start["0.weight"]}
    for net, initial, error, message in (
        (source.network, [start], ArgumentError, "initial: expected parameters for each of the 2 models, got 1"),
        (source.network, start, ArgumentTypeError, r"for one start of all give \[engine.state_dict\(\)\] \* 2"),
        (MLP([6, 3, 4]), [one, one], ShapeError, r"state\['0.weight'\]: expected shape \(3, 6\), got \(9, 6\)"),
    ):
        with pytest.raises(error, match=message):
            fusemlp.Fleet(net, vary={"seed": [3, 4]}, initial=initial)


def test_wrong_sources_and_arguments_are_refused(source, tmp_path):
    state, net, one = source.state_dict(), MLP(SIZES, activation="tanh"), {"0.weight": source.state_dict()["0.weight"]}
    conv, folder, narrow = tmp_path / "conv.safetensors", tmp_path / "folder", MLP([6, 9, 8, 4], activation="tanh")
    save_file({"conv.weight": np.zeros((2, 2, 2))}, conv)
    folder.mkdir()
    one_of_both = "net: parameters alone need their network, net=MLP([784, 128, 10], activation='relu'), and no head"
    prelu, more = MLP(SIZES, activation="prelu"), {**state, "1.weight": np.ones(1)}
    wrong = {
        ArgumentError: [
            ((conv, net), {}, "source: expected the parameters of an nn.Sequential"),
            (({}, net), {}, "source: expected the parameters of an nn.Sequential"),
            ((state,), {}, one_of_both),
            ((state, "net"), {}, one_of_both),
            ((state, net), {"head": 3}, one_of_both),
            ((source, net), {}, one_of_both),
            ((source,), {"head": []}, "head: expected the width of at least an output layer"),
            ((source,), {"head": 0}, "head: expected"),
            ((Engine(MLP([6, 4])),), {"head": 3}, "head: expected the width of at least an output layer, and"),
            ((source,), {"layers": 0}, "layers: expected"),
            ((source,), {"layers": 4}, "layers: expected 1 to 3, which source and network have, got 4"),
            ((source,), {"layers": 4, "head": 3}, "layers: expected 1 to 3, which source and network have"),
            ((state, MLP([6, 2])), {"layers": 2}, "layers: expected 1 to 1, which source and network have"),
            ((one, net), {"layers": 1}, "source or network lacks 0.bias; give"),
            ((state, prelu), {}, "source or network lacks 1.weight, 3.weight; give"),
            ((more, net), {}, "source or network lacks 1.weight; give zeros for"),
            ((source,), {"freeze": 3}, "freeze: expected 0 to 2, since the last of the 3 layers is trained"),
            ((source,), {"freeze": 2, "layers": 1}, "freeze: expected 0 to 1, the number of layers"),
            ((source,), {"layer_decay": 0}, "layer_decay: expected"),
            ((source,), {"layer_decay": 1.5}, "layer_decay: expected"),
        ],
        ArgumentTypeError: [
            ((3,), {}, "source: expected an Engine, a path, or a mapping of names to arrays, got int"),
            ((nn.Linear(2, 2),), {}, "for a module give fusemlp.torch.from_torch(module)"),
            ((source,), {"head": "3"}, "head: expected"),
            ((source,), {"heads": 2}, "heads: there is no such argument; did you mean 'head'? There are"),
        ],
        fusemlp.CheckpointError: [
            ((tmp_path / "none",), {}, "source: there is no model"),
            ((folder,), {}, "is not a run folder"),
        ],
        ShapeError: [
            (
                (state, narrow),
                {},
                "source: 2.weight is (7, 9) and in net (8, 9), 2.bias is (7,) and in net (8,); let the widths of net "
                "begin with [6, 9, 7]; or keep the layers before them alone, layers=1",
            ),
            ((state, MLP([5, 9, 7, 3])), {}, "0.weight is (9, 6) and in net (9, 5); let the widths of net begin"),
        ],
        TypeError: [((source,), {"lr": 0.1}, "lr")],
    }
    for error, rows in wrong.items():
        for arguments, options, message in rows:
            with pytest.raises(error, match=re.escape(message)):
                Engine.from_pretrained(*arguments, **options)


def test_names_of_a_sequential_need_not_be_in_order():
    state = {"10.weight": np.zeros((2, 3)), "2.bias": np.zeros(3), "3.weight": np.ones(1), "2.weight": np.zeros((3, 4))}
    assert set(in_sequence(state)) == {"0.weight", "0.bias", "1.weight", "2.weight"}
    assert in_sequence(state)["2.weight"].shape == (2, 3)
