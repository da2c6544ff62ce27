"""The network description: accepted options, names and initial values of parameters."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
from torch import nn

from fusemlp.describe.network import ELU, INITS, MLP, Activation, LeakyReLU, PReLU, as_activation
from fusemlp_kernels.contract import ACTIVATIONS
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

NETWORKS = [
    MLP([3, 2]),
    MLP([784, 128, 10], dropout=0.1),
    MLP([4, 5, 6, 7], activation=["tanh", PReLU(0.1)], dropout=[0.0, 0.5], init="torch"),
    MLP([4, 5, 6, 7], activation=LeakyReLU(0.2), output_activation="sigmoid", init="lecun_normal"),
    MLP([2, 3, 1], activation="gelu", output_activation=PReLU()),
]


def test_one_activation_and_dropout_serve_all_hidden_layers_or_each_has_its_own():
    net = MLP(np.array([8, 6, 4, 2], np.int32), activation="silu", output_activation="tanh", dropout=0.25)
    assert net.layers == 3 and net.sizes == (8, 6, 4, 2)
    assert all(type(size) is int for size in net.sizes)
    assert [activation.name for activation in net.activations] == ["silu", "silu", "tanh"]
    assert net.dropouts == (0.25, 0.25, 0.0)
    net = MLP([8, 6, 4, 2], activation=["relu", LeakyReLU(0.3)], dropout=[0.5, 0])
    assert net.activations == (Activation("relu"), Activation("leaky_relu", 0.3), Activation("identity"))
    assert net.dropouts == (0.5, 0.0, 0.0)


def test_every_activation_of_the_contract_has_a_name():
    for name in ACTIVATIONS:
        assert as_activation("activation", name).name == name
    assert as_activation("activation", "leaky_relu") == Activation("leaky_relu") == LeakyReLU() == LeakyReLU(0.01)
    assert as_activation("activation", "elu") == Activation("elu") == ELU() == ELU(1.0)
    assert as_activation("activation", "prelu") == Activation("prelu") == PReLU() == PReLU(0.25)


def test_a_module_of_torch_is_no_activation():
    with pytest.raises(ArgumentTypeError, match=r"or fusemlp.ELU\(1.0\), got ELU\(alpha=1.0\)"):
        as_activation("activation", nn.ELU())


def test_parameters_have_the_names_shapes_and_order_of_torch():
    net = MLP([5, 4, 3, 2], activation=["relu", PReLU()], output_activation=PReLU(), dropout=0.5)
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 2), nn.PReLU())
    expected = [(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]
    assert list(net.parameter_shapes().items()) == expected
    assert net.parameter_count == sum(tensor.numel() for tensor in module.parameters())


@pytest.mark.parametrize("net", NETWORKS, ids=repr)
@pytest.mark.parametrize("init", INITS)
def test_initial_parameters_fill_the_shapes_in_float64(net, init):
    parameters = MLP.from_config({**net.to_config(), "init": init}).initial_parameters(3)
    assert [(name, array.shape) for name, array in parameters.items()] == list(net.parameter_shapes().items())
    assert {array.dtype for array in parameters.values()} == {np.dtype(np.float64)}


def test_initial_parameters_are_a_function_of_the_seed_and_their_layer():
    """A layer's numbers do not depend on other layers' widths or activations, and no two layers are equal."""
    net = MLP([6, 6, 6, 3], init="torch")
    first, again, other = (net.initial_parameters(seed) for seed in (7, 7, 8))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.any(first[name] == other[name])
    wider = MLP([6, 6, 6, 9], activation=["relu", "tanh"], init="torch").initial_parameters(7)
    np.testing.assert_array_equal(first["0.weight"], wider["0.weight"])
    assert not np.any(first["0.weight"] == first["2.weight"])


# The variance that each initialisation gives a weight, from fan_in, fan_out and the slope of the activation.
VARIANCES = {
    "he": lambda fan_in, fan_out, slope: 2 / ((1 + slope**2) * fan_in),
    "glorot": lambda fan_in, fan_out, slope: 2 / (fan_in + fan_out),
    "lecun": lambda fan_in, fan_out, slope: 1 / fan_in,
    "torch": lambda fan_in, fan_out, slope: 1 / (3 * fan_in),
}


@pytest.mark.parametrize("activation", ["relu", LeakyReLU(0.5), PReLU(1.0), "tanh"], ids=repr)
@pytest.mark.parametrize("init", [name for name in INITS if name not in ("auto", "zeros")])
def test_weights_have_the_stated_distribution(init, activation):
    """The sample variance of n numbers has the relative standard deviation sqrt((kurtosis - 1) / n)."""
    fan_in, fan_out = 300, 200
    net = MLP([fan_in, fan_out, 1], activation=activation, init=init)
    parameters = net.initial_parameters(1)
    weight = parameters["0.weight"]
    variance = VARIANCES[init.split("_")[0]](fan_in, fan_out, net.activations[0].slope)
    kurtosis = 3.0 if init.endswith("normal") else 9 / 5
    six_sigma = 6 * math.sqrt((kurtosis - 1) / weight.size)
    assert abs(np.mean(weight**2) / variance - 1) <= six_sigma
    assert abs(np.mean(weight)) <= 6 * math.sqrt(variance / weight.size)
    bound = math.sqrt(3 * variance)
    # 8 % of a normal distribution lie beyond the bound of the uniform one of the same variance
    assert (np.abs(weight).max() <= bound * (1 + 1e-12)) == (not init.endswith("normal"))
    bias = parameters["0.bias"]
    if init == "torch":
        assert 0 < np.abs(bias).max() <= bound * (1 + 1e-12)
    else:
        assert not bias.any()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_auto_is_he_before_rectifiers_lecun_before_selu_and_glorot_before_the_others(name):
    rectifier = name in ("relu", "leaky_relu", "prelu", "gelu", "silu", "elu", "mish")
    other = "lecun_normal" if name == "selu" else "glorot_uniform"
    auto = MLP([5, 4], output_activation=name).initial_parameters(0)
    chosen = MLP([5, 4], output_activation=name, init="he_normal" if rectifier else other)
    np.testing.assert_array_equal(auto["0.weight"], chosen.initial_parameters(0)["0.weight"])


def test_zeros_leave_only_the_slope():
    parameters = MLP([3, 2, 1], activation=PReLU(-0.5), init="zeros").initial_parameters(0)
    assert parameters["1.weight"].tolist() == [-0.5]
    assert not any(parameters[name].any() for name in ("0.weight", "0.bias", "2.weight", "2.bias"))


@pytest.mark.parametrize("net", NETWORKS, ids=repr)
def test_a_network_survives_json_pickle_copy_and_repr(net):
    assert MLP.from_config(json.loads(json.dumps(net.to_config()))) == net
    assert pickle.loads(pickle.dumps(net)) == net
    assert copy.deepcopy(net) == net
    assert eval(repr(net)) == net
    assert len({net, copy.copy(net)}) == 1


def test_repr_shows_what_differs():
    shown = "MLP([784, 128, 10], activation='relu', output_activation='identity', dropout=0.1, init='auto')"
    assert repr(MLP([784, 128, 10], dropout=0.1)) == shown
    shown = "MLP([4, 3, 2, 1], activation=['relu', LeakyReLU(0.0)], output_activation='identity', init='auto')"
    assert repr(MLP([4, 3, 2, 1], activation=["relu", LeakyReLU(0.0)])) == shown


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"sizes": 10}, ArgumentTypeError, r"sizes: .*\[784, 128, 10\], got 10"),
        ({"sizes": "784"}, ArgumentTypeError, "sizes: .*got '784'"),
        ({"sizes": []}, ArgumentError, r"sizes: expected at least 2 widths .*got \[\]"),
        ({"sizes": [4]}, ArgumentError, r"sizes: expected at least 2 widths .*got \[4\]"),
        ({"sizes": [4, 0, 2]}, ArgumentError, r"sizes\[1\]: .*at least 1, got 0"),
        ({"sizes": [4, True]}, ArgumentTypeError, r"sizes\[1\]: .*got True"),
        ({"sizes": [4, 2.0]}, ArgumentTypeError, r"sizes\[1\]: .*got 2\.0 \(float\); write 2"),
        ({"activation": "rellu"}, ArgumentError, "activation: .*'rellu'; did you mean 'relu'"),
        ({"sizes": [4, 3], "activation": "sigmoidd"}, ArgumentError, "did you mean 'sigmoid'"),
        ({"activation": None}, ArgumentTypeError, "activation: .*got None"),
        ({"activation": LeakyReLU}, ArgumentTypeError, "activation: .*got <function LeakyReLU"),
        ({"activation": ["relu", "tanh"]}, ArgumentError, "activation: .*1 .one per hidden layer., got 2"),
        ({"output_activation": "softmax"}, ArgumentError, "output_activation: .*use 'identity'.*predict_proba"),
        ({"output_activation": "linar"}, ArgumentError, "output_activation: unknown name .linar."),
        ({"output_activation": ["relu"]}, ArgumentTypeError, "output_activation: "),
        ({"dropout": 1.5}, ArgumentError, "dropout: .*below 1, got 1.5"),
        ({"sizes": [4, 3], "dropout": 1.5}, ArgumentError, "dropout: .*got 1.5"),
        ({"dropout": -0.1}, ArgumentError, "dropout: .*got -0.1"),
        ({"dropout": "0.1"}, ArgumentTypeError, "dropout: .*got '0.1'"),
        ({"dropout": True}, ArgumentTypeError, "dropout: .*got True"),
        ({"dropout": [0.1, 0.2]}, ArgumentError, r"dropout: .*1 \(one per hidden layer\), got 2: \[0\.1, 0\.2\]"),
        ({"init": "he_norml"}, ArgumentError, "init: unknown name 'he_norml'; did you mean 'he_normal'"),
        ({"init": None}, ArgumentTypeError, "init: .*got None"),
    ],
)
def test_impossible_networks_are_refused(arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        MLP(**{"sizes": [4, 3, 2], **arguments})
    assert caught.type is error


@pytest.mark.parametrize(
    ("name", "slope", "error", "words"),
    [
        ("leaky_relu", -0.1, ArgumentError, "slope of leaky_relu: .*at least 0, got -0.1"),
        ("elu", -0.1, ArgumentError, "slope of elu: .*at least 0, got -0.1"),
        ("prelu", math.nan, ArgumentError, "slope of prelu: .*got nan"),
        ("prelu", math.inf, ArgumentError, "slope of prelu: .*got inf"),
        ("prelu", "a", ArgumentTypeError, "slope of prelu: .*got 'a'"),
        ("relu", 0.1, ArgumentError, "slope: relu has none, got 0.1"),
        ("softsign", 0.0, ArgumentError, "activation: unknown name 'softsign'"),
    ],
)
def test_impossible_activations_are_refused(name, slope, error, words):
    with pytest.raises(error, match=words):
        Activation(name, slope)


@pytest.mark.parametrize(("seed", "error"), [(-1, ArgumentError), (1.5, ArgumentTypeError)])
def test_impossible_seeds_are_refused(seed, error):
    with pytest.raises(error, match="seed: "):
        NETWORKS[0].initial_parameters(seed)


def test_a_configuration_with_other_keys_is_refused():
    config = NETWORKS[0].to_config()
    for key, wrong in (("depth", {**config, "depth": 3}), ("init", {k: v for k, v in config.items() if k != "init"})):
        with pytest.raises(ArgumentError, match=f"network: .*wrong keys: .*{key}"):
            MLP.from_config(wrong)
