"""A multi-layer perceptron as a frozen description: widths, activations, dropout, initialisation; no arrays.

Layer ``l`` of ``L`` computes ``dropout(act(x @ w.T + b))`` with ``w`` of shape ``(sizes[l + 1], sizes[l])``.
Parameters bear the names that torch gives them in the plain ``nn.Sequential``: ``{2l}.weight``,
``{2l}.bias``, and ``{2l + 1}.weight`` for the one slope of a PReLU behind layer ``l``. A normalisation behind it has
``{2l}_norm.weight`` and ``{2l}_norm.bias``. A network with members has their factors too, ``{2l}.r`` and ``{2l}.s``.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar

import numpy as np

from fusemlp.describe.blocks import Frequency, Normalisation, Residual, as_norm
from fusemlp.describe.checks import (
    aligned,
    as_count,
    as_kind,
    as_number,
    bytes_text,
    check_choice,
    check_keys,
    freeze,
    knows_names,
    names_absent,
)
from fusemlp.describe.conflicts import SINGLE, Features, check_together, in_use
from fusemlp.describe.description import Description
from fusemlp_kernels import pointwise
from fusemlp_kernels.contract import ACTIVATIONS
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Checked = TypeVar("Checked")

_FAMILIES = ("he", "glorot", "lecun")
# The entries of a configuration that earlier releases lack.
ABSENT: dict[str, Any] = {"members": 1, "norms": [], "blocks": [], "encoding": None}
INITS = ("auto", *(f"{family}_{shape}" for family in _FAMILIES for shape in ("normal", "uniform")), "torch", "zeros")
# The slopes of the activations that have one.
SLOPES = {name: row.slope for name, row in pointwise.ACTIVATIONS.items() if row.slope is not None}
_WITH_SLOPE = " or ".join(f"fusemlp.{pointwise.ACTIVATIONS[name].torch}({slope})" for name, slope in SLOPES.items())
_ENCODING = "an object such as Frequency(10), or None"
_NAMES_ELSEWHERE = {"linear": "identity", "none": "identity", "logistic": "sigmoid", "swish": "silu"}


@dataclass(frozen=True, init=False, repr=False)
class Activation(Description, family="activation"):
    """An activation by its name in the kernel contract; ``slope`` is leaky_relu's, prelu's initial one, or elu's alpha.

    By default the slope is that of ``SLOPES``, and 0 for an activation without one. leaky_relu and elu need
    ``slope >= 0``, because their derivative follows from the sign of the output.
    """

    name: str
    slope: float

    def __init__(self, name: str, slope: float | None = None) -> None:
        row = pointwise.ACTIVATIONS[check_choice("activation", name, ACTIVATIONS)]
        low = None if row.slope is None or row.needs_z else 0.0
        number = as_number(f"slope of {name}", SLOPES.get(name, 0.0) if slope is None else slope, low=low)
        if number and row.slope is None:
            raise ArgumentError(f"slope: {name} has none, got {number!r}; use {_WITH_SLOPE} for one")
        freeze(self, name=name, slope=number)

    @property
    def fixed_slope(self) -> float | None:
        """The slope, or None if the activation has none or learns it."""
        return self.slope if self.name in SLOPES and not pointwise.ACTIVATIONS[self.name].learned else None

    def __repr__(self) -> str:
        if self.name in SLOPES:
            return f"{pointwise.ACTIVATIONS[self.name].torch}({self.slope!r})"
        return f"Activation({self.name!r})"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Invert ``to_config``."""
        check_keys("activation", config, ("name", "slope"))
        return cls(config["name"], config["slope"])


def LeakyReLU(negative_slope: float = 0.01) -> Activation:
    """``z if z > 0 else negative_slope * z``, with a fixed ``negative_slope >= 0`` (Maas et al., 2013)."""
    return Activation("leaky_relu", negative_slope)


def PReLU(init: float = 0.25) -> Activation:
    """``z if z > 0 else a * z``, one learned ``a`` a layer, starting at ``init`` (He et al., 2015)."""
    return Activation("prelu", init)


def ELU(alpha: float = 1.0) -> Activation:
    """``z if z > 0 else alpha * (exp(z) - 1)``, with a fixed ``alpha >= 0`` (Clevert et al., 2016)."""
    return Activation("elu", alpha)


def as_activation(argument: str, value: str | Activation) -> Activation:
    """Return the activation for a name or an object; errors call it ``argument``."""
    if isinstance(value, Activation):
        return value
    if value == "softmax":
        raise ArgumentError(
            f"{argument}: 'softmax' is part of the loss: cross_entropy takes logits, so use 'identity' here; "
            "predict_proba applies the softmax"
        )
    expected = f"a name such as 'relu', or {_WITH_SLOPE}"
    return Activation(check_choice(argument, value, ACTIVATIONS, expected=expected, elsewhere=_NAMES_ELSEWHERE))


def _one_per_hidden_layer(
    argument: str, value: Any, hidden: int, check: Callable[[str, Any], Checked], ends: Sequence[int], at_end: Checked
) -> list[Checked]:
    """Return one checked value for each hidden layer: repeat a single one, or check the number of several.

    The layers ``ends``, the last of residual blocks, have the value ``at_end``.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        common = check(argument, value)
        return [at_end if layer in ends else common for layer in range(hidden)]
    values = list(value)
    if len(values) != hidden:
        raise ArgumentError(
            f"{argument}: expected one value, or {hidden} (one per hidden layer), got {len(values)}: {values!r}"
        )
    checked = [check(argument, one) for one in values]
    for layer in ends:
        if checked[layer] != at_end:
            raise ArgumentError(
                f"{argument}[{layer}]: the last layer of a residual block has {at_end!r}, got {checked[layer]!r}; give "
                f"that, or one {argument} for all hidden layers"
            )
    return checked


def _unrolled(entries: Sequence[Any]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Return the widths of all layers, and the first and the last layer of each residual block."""
    widths: list[int] = []
    blocks = []
    for place, entry in enumerate(entries):
        if not isinstance(entry, Residual):
            widths.append(as_count(f"sizes[{place}]", entry, minimum=1))
            continue
        if len(widths) < 2 or place == len(entries) - 1:
            raise ArgumentError(
                f"sizes[{place}]: a residual block stands behind a hidden layer and before the output layer, as in "
                f"MLP([20, 64, Residual(128), 1]), got {list(entries)!r}"
            )
        blocks.append((len(widths) - 1, len(widths) + entry.depth - 2))
        widths += [*[entry.width] * (entry.depth - 1), widths[-1]]
    return tuple(widths), tuple(blocks)


def rolled(sizes: Sequence[int], blocks: Sequence[Sequence[int]]) -> list[int | Residual]:
    """Invert ``_unrolled``."""
    entries: list[int | Residual] = list(sizes)
    for first, last in reversed(blocks):
        entries[first + 1 : last + 2] = [Residual(sizes[first + 1], last - first + 1)]
    return entries


# The arguments of which each hidden layer may have its own, and their fields.
BY_LAYER = {"activation": "activations", "dropout": "dropouts", "norm": "norms"}
FIELDS = ("sizes", "activations", "dropouts", "init", "members", "norms", "blocks", "encoding")


def _arguments(
    *, sizes: Any, blocks: Any, activations: Any, dropouts: Any, norms: Any, **others: Any
) -> dict[str, Any]:
    """Return the arguments of the constructor that make a network with these fields."""
    *hidden, output = activations
    layers = {"activation": hidden, "output_activation": output, "dropout": dropouts[:-1], "norm": norms[:-1] or None}
    return {"sizes": rolled(sizes, blocks), **layers, **others}


def layer_of(name: str) -> int:
    """Return the layer of a parameter by its name in ``state_dict``."""
    return int(name.partition(".")[0].removesuffix(NORM)) // 2


def names_in_sequence(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return the names that the parameters of an ``nn.Sequential`` have in ``state_dict``, by their names and shapes.

    Modules without parameters, such as Dropout, have numbers there and none here. Vectors of the width of a matrix
    after it are those of a normalisation. Raises ArgumentError for names and shapes that are no Linear layers,
    normalisations and PReLU slopes.
    """
    places = {name: (int(match[1]), *match.group(2, 3)) for name in shapes if (match := _IN_SEQUENCE.fullmatch(name))}
    matrices = sorted(place[0] for name, place in places.items() if place[2] == "weight" and len(shapes[name]) == 2)
    names: dict[str, str] = {}
    for name, (number, of_norm, kind) in places.items():
        # the last matrix up to this number
        layer = bisect_right(matrices, number) - 1
        if layer < 0:
            continue
        shape, width = shapes[name], shapes[f"{matrices[layer]}.weight"][:1]
        if matrices[layer] == number and not of_norm:
            names[name] = f"{2 * layer}.{kind}"
        elif shape == width and (of_norm or width != (1,)):
            names[name] = f"{2 * layer}{NORM}.{kind}"
        elif kind == "weight" and shape == (1,):
            names[name] = f"{2 * layer + 1}.weight"
    strange = [name for name in shapes if name not in names]
    if strange or not matrices:
        raise ArgumentError(
            "source: expected the parameters of an nn.Sequential of Linear layers, 0.weight, 0.bias, 2.weight, ..., "
            f"got {', '.join(strange) or 'none'}; rename them, or leave them out"
        )
    return names


# Behind the number of a layer, in the names of the parameters of its normalisation.
NORM = "_norm"
_IN_SEQUENCE = re.compile(rf"(\d+)({NORM})?\.(weight|bias)")
# The mend for a network that has other parameters.
ALIKE = "give zeros for a missing bias, and the network PReLU() for a slope (1,) and its norm, 'layer' or 'rms'"
_INPUTS = "the first of sizes is the number of inputs: MLP([784, 128, 10])"
_ARGUMENTS = {
    **dict.fromkeys(("hidden", "units"), "sizes has all widths: MLP([784, 128, 10])"),
    "hidden_layer_sizes": "sizes has all widths, inputs and outputs too: MLP([784, 128, 10])",
    **dict.fromkeys(("input_dim", "input_shape", "in_features"), _INPUTS),
    "kernel_initializer": "it is called init here: MLP([784, 128, 10], init='he_normal')",
    "rate": "it is called dropout here: MLP([784, 128, 10], dropout=0.2)",
    "seed": "it belongs to the engine: Engine(net, seed=0)",
}


class Parameter(NamedTuple):
    """A learned tensor: its names in a program and in ``state_dict``, and the number that fills it at the start, None
    for one that is drawn.

    Programs call weight, bias and slope of layer 0 w0, b0 and s0, those of its norm g0 and c0, factors r0 and s0.
    """

    short: str
    name: str
    shape: tuple[int, ...]
    start: float | None = None


_OF_ENGINE = "a network is a description, without parameters; make an engine: Engine(net, loss=..., optimizer=...)"


@dataclass(frozen=True, init=False, repr=False)
class MLP(Description):
    """A fully connected network of L layers; ``sizes`` are its L + 1 widths, from the input to the output.

    ``activation`` and ``dropout`` are one for all hidden layers or one per hidden layer. ``dropout`` is the
    probability, in [0, 1), that an output of a hidden layer is set to zero in training. The attributes
    ``activations`` and ``dropouts`` have L entries: the last are the output layer's, which has no dropout.

    ``init`` names the distribution of the initial weights; biases start at zero except with "torch".

    - he_normal, he_uniform: variance ``2 / fan_in``, before leaky_relu and prelu ``2 / ((1 + slope**2) * fan_in)``
      (He et al., Delving deep into rectifiers, 2015)
    - glorot_normal, glorot_uniform: variance ``2 / (fan_in + fan_out)`` (Glorot and Bengio, 2010)
    - lecun_normal, lecun_uniform: variance ``1 / fan_in`` (LeCun et al., Efficient BackProp, 1998)
    - torch: weights and biases uniform in ``+-1 / sqrt(fan_in)``, the default of ``torch.nn.Linear``
    - zeros: all zero
    - auto: he_normal before relu, leaky_relu, prelu, gelu, silu, elu and mish, lecun_normal before selu
      (Klambauer et al., Self-normalizing neural networks, 2017), glorot_uniform before the others

    ``norm`` normalises the rows of hidden layers before the activation: "layer" or "rms", ``LayerNorm(eps)`` or
    ``RMSNorm(eps)``, one for all hidden layers or one (or None) per hidden layer. An entry ``Residual(width, depth)``
    of ``sizes`` is a block of layers whose result is added to their input; the attribute ``sizes`` has the widths of
    all its layers, and ``blocks`` its first and last layer.

    ``members``: this many networks share the weights of the hidden layers (TabM: Gorishniy et al., 2025). Layer ``l``
    of member m is ``act(((x * r[m]) @ w.T) * s[m] + b[m])`` with its own r (members, K), s and b (members, N): the
    first r starts with random signs, the others and s at 1. Each member has its own output layer; its weight has the
    shape (members * N, K), member after member. Training minimises the mean of the members' losses. A prediction is the
    mean of their probabilities or values. Dropout masks differ from member to member.

    ``encoding``: the first layer takes waves of the inputs, such as ``Frequency(10)``; ``sizes`` begins with the number
    of inputs as they are given, 2 for the coordinates of a picture.

    Raises ArgumentError or ArgumentTypeError for impossible values.
    """

    sizes: tuple[int, ...]
    activations: tuple[Activation, ...]
    dropouts: tuple[float, ...]
    init: str
    # what pickles of older releases lack; norms is empty or has L entries
    members: int = 1
    norms: tuple[Normalisation | None, ...] = ()
    blocks: tuple[tuple[int, int], ...] = ()
    encoding: Frequency | None = None

    @knows_names(_ARGUMENTS, call="MLP([784, 128, 10], activation='relu')")
    def __init__(
        self,
        sizes: Iterable[int | Residual],
        *,
        activation: str | Activation | Iterable[str | Activation] = "relu",
        output_activation: str | Activation = "identity",
        dropout: float | Iterable[float] = 0.0,
        init: str = "auto",
        members: int = 1,
        norm: str | Normalisation | Iterable[str | Normalisation | None] | None = None,
        encoding: Frequency | None = None,
    ) -> None:
        if isinstance(sizes, str) or not isinstance(sizes, Iterable):
            raise ArgumentTypeError(f"sizes: expected a sequence of widths such as [784, 128, 10], got {sizes!r}")
        entries = list(sizes)
        widths, blocks = _unrolled(entries)
        if len(widths) < 2:
            raise ArgumentError(
                f"sizes: expected at least 2 widths (inputs and outputs, such as [784, 10]), got {entries!r}"
            )
        check_dropout = partial(as_number, low=0.0, high=1.0, high_open=True)
        hidden, ends = len(widths) - 2, [last for _, last in blocks]
        activations = _one_per_hidden_layer(
            "activation", activation, hidden, as_activation, ends, Activation("identity")
        )
        dropouts = _one_per_hidden_layer("dropout", dropout, hidden, check_dropout, ends, 0.0)
        norms = _one_per_hidden_layer("norm", norm, hidden, as_norm, ends, None)
        freeze(
            self,
            sizes=widths,
            activations=(*activations, as_activation("output_activation", output_activation)),
            dropouts=(*dropouts, 0.0),
            init=check_choice("init", init, INITS),
            members=as_count("members", members, minimum=1),
            norms=(*norms, None) if any(norms) else (),
            blocks=blocks,
            encoding=None if encoding is None else as_kind("encoding", encoding, Frequency, _ENCODING),
        )
        check_together(self.uses)

    def check_single(self, argument: str, what: str) -> None:
        """Raise ArgumentError for a network with members, for which ``what`` is not there."""
        if "members" in self.uses:
            raise ArgumentError(f"{argument}: {what}{SINGLE.format_map(self.uses)}")

    @cached_property
    def uses(self) -> Features:
        """The features that it uses, for ``conflicts``."""
        names = [one.name for one in self.activations]
        falling = next(filter(None, map(_fall, names)), None)
        return in_use(
            members=self.members if self.members > 1 else None,
            prelu="prelu" in names,
            dropout=self.dropouts if any(self.dropouts) else None,
            norm=self.norms or None,
            residual=self.blocks or None,
            encoding=self.encoding,
            **{"falling activation": falling, "no hidden layer": self.layers == 1},
            **{"output activation": None if names[-1] == "identity" else names[-1]},
        )

    def but(self, **changes: Any) -> MLP:
        """Return the network with other arguments of the constructor."""
        return MLP(**{**_arguments(**{name: getattr(self, name) for name in FIELDS}), **changes})

    def key_without(self, *names: str) -> tuple[Any, ...]:
        """Return what networks have in common that are equal but for these fields."""
        # a generator would take twice as long
        return tuple([getattr(self, name) for name in FIELDS if name not in names])

    def hidden_arguments(self, start: int = 0, stop: int = -1) -> dict[str, Any]:
        """Return the arguments that each hidden layer has its own of, for those from ``start`` to before ``stop``."""
        values = {name: getattr(self, field) for name, field in BY_LAYER.items()}
        return {name: own[start:stop] for name, own in values.items() if own}

    def part(self, start: int, stop: int, *widths: int) -> MLP:
        """Return the network of the layers from ``start`` to before ``stop``, and of new ones of ``widths`` after them.

        The new hidden layers are like the last hidden one that ends no block, without dropout. Raises ArgumentError if
        ``start`` or ``stop`` cuts a block, or parts it from the layer before it.
        """
        for first, last in self.blocks:
            if first <= start <= last or first < stop <= last:
                cut = start if first <= start <= last else stop
                raise ArgumentError(
                    f"layers: {cut} cuts the residual block of layers {first + 1} to {last + 1}; take {last + 1}"
                )
        blocks = [(first - start, last - start) for first, last in self.blocks if start <= first and last < stop]
        sizes = [*rolled(self.sizes[start : stop + 1], blocks), *widths]
        hidden, new = self.hidden_arguments(start, stop if widths else stop - 1), range(1, len(widths))
        like = max({*range(start, stop)} - {last for _, last in self.blocks}) - start
        layers = {name: [*values, *(values[like] for _ in new)] for name, values in hidden.items()}
        layers["dropout"] = [*hidden["dropout"], *(0.0 for _ in new)]
        return self.but(sizes=sizes, **layers, encoding=None if start else self.encoding)

    def shares(self, layer: int) -> bool:
        """Return whether members share the weights of a layer."""
        return "members" in self.uses and layer < self.layers - 1

    def norm(self, layer: int) -> Normalisation | None:
        """Return what the rows of a layer are normalised by before its activation; None if by nothing."""
        return self.norms[layer] if self.norms else None

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The widths that the layers have: ``sizes``, but first that of the encoded inputs."""
        return self.sizes if self.encoding is None else (self.encoding.width(self.sizes[0]), *self.sizes[1:])

    @cached_property
    def without_encoding(self) -> MLP:
        """The network that takes the encoded inputs."""
        return self if self.encoding is None else self.but(sizes=rolled(self.widths, self.blocks), encoding=None)

    @property
    def title(self) -> str:
        """The widths, members and encoding as text: 784-128-10, 16 members."""
        members = [f"{self.members} members"] if "members" in self.uses else []
        encoding = [] if self.encoding is None else [repr(self.encoding)]
        return ", ".join(["-".join(map(str, self.sizes)), *members, *encoding])

    @property
    def layers(self) -> int:
        """The number of layers with weights."""
        return len(self.sizes) - 1

    @property
    def parameter_count(self) -> int:
        """The number of learned values: weights, biases and PReLU slopes."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    @property
    def tensors(self) -> tuple[Parameter, ...]:
        """The parameters in the order of ``state_dict``."""
        rows: list[Parameter] = []
        for layer, activation in enumerate(self.activations):
            (inputs, outputs), number, many = self.widths[layer : layer + 2], 2 * layer, self.members
            norm, shared = self.norm(layer), self.shares(layer)
            # each member has an output layer
            weight = outputs if shared else many * outputs, inputs
            bias = (many, outputs) if shared else weight[:1]
            if shared:
                rows.append(Parameter(f"r{layer}", f"{number}.r", (many, inputs), 1.0 if layer else None))
            rows.append(Parameter(f"w{layer}", f"{number}.weight", weight))
            if shared:
                rows.append(Parameter(f"s{layer}", f"{number}.s", (many, outputs), 1.0))
            rows.append(Parameter(f"b{layer}", f"{number}.bias", bias))
            for kind, name, start in () if norm is None else norm.tensors:
                rows.append(Parameter(f"{kind}{layer}", f"{number}{NORM}.{name}", (outputs,), start))
            if activation.name == "prelu":
                rows.append(Parameter(f"s{layer}", f"{number + 1}.weight", (1,), activation.slope))
        return tuple(rows)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter by its name, in the order of ``state_dict``."""
        return {parameter.name: parameter.shape for parameter in self.tensors}

    def summary(self, print_fn: Callable[[str], object] = print) -> None:
        """Print layers, shapes, parameters and their memory; ``print_fn`` gets the text instead, as in Keras."""
        size = 4 * self.parameter_count
        states = ", ".join(f"{bytes_text(size * (1 + count))} ({name})" for name, count in STATES.items())
        memory = f"memory in fp32: {bytes_text(size)}; with the state of the optimizer: {states}"
        print_fn("\n".join([*layer_lines(self), memory]))

    def init_of(self, layer: int) -> str:
        """Return the distribution of a layer's initial weights; "auto" depends on the activation."""
        if self.init != "auto":
            return self.init
        return pointwise.ACTIVATIONS[self.activations[layer].name].init

    def initial_parameters(self, seed: int) -> dict[str, Array]:
        """Return initial parameters in float64, named and ordered as in ``state_dict``, drawn with ``seed >= 0``.

        Each layer draws from its own random stream, so its numbers do not depend on another layer's width.
        """
        streams = np.random.SeedSequence(as_count("seed", seed, minimum=0)).spawn(self.layers)
        drawn: dict[str, Array] = {}
        for layer, (stream, activation) in enumerate(zip(streams, self.activations, strict=True)):
            generator = np.random.Generator(np.random.PCG64(stream))
            inputs, outputs = self.widths[layer : layer + 2]
            heads = 1 if self.shares(layer) else self.members
            layers = [_draw(generator, self.init_of(layer), activation, inputs, outputs) for _ in range(heads)]
            drawn[f"w{layer}"], drawn[f"b{layer}"] = map(np.concatenate, zip(*layers, strict=True))
            if self.shares(0) and layer == 0:
                drawn["r0"] = generator.choice([-1.0, 1.0], (self.members, inputs))
        return {
            name: np.array(np.broadcast_to(drawn[short] if start is None else start, shape), np.float64)
            for short, name, shape, start in self.tensors
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the network of a description from ``to_config``."""
        config = {**ABSENT, **config}
        check_keys("network", config, FIELDS)
        encoding = config["encoding"]
        parts = {
            "activations": [Activation.from_config(part) for part in config["activations"]],
            "norms": [None if norm is None else Normalisation.from_config(norm) for norm in config["norms"]],
            "encoding": None if encoding is None else Frequency.from_config(encoding),
        }
        net = cls(**_arguments(**{**config, **parts}))
        if config["norms"] and len(config["norms"]) != net.layers:
            raise ArgumentError(f"norms: expected {net.layers}, one a layer, or none, got {config['norms']}")
        if list(net.sizes) != list(config["sizes"]):
            raise ArgumentError(f"blocks: expected residual blocks of {config['sizes']}, got {config['blocks']}")
        return net

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-able description; earlier releases read one without what they lack."""
        config = super().to_config()
        return {name: value for name, value in config.items() if name not in ABSENT or value != ABSENT[name]}

    def __repr__(self) -> str:
        shown = [activation if activation.name in SLOPES else activation.name for activation in self.activations]
        options = [f"activation={_compact(shown[:-1])}"] if self.layers > 1 else []
        uses = {"init": self.init, **self.uses}
        options.append(f"output_activation={shown[-1]!r}")
        options += [f"{name}={_compact(uses[name][:-1])}" for name in ("dropout", "norm") if name in uses]
        options += [f"{name}={uses[name]!r}" for name in ("encoding", "init", "members") if name in uses]
        return f"MLP({rolled(self.sizes, self.blocks)!r}, {', '.join(options)})"


names_absent(
    MLP,
    {
        **dict.fromkeys(("compile", "fit", "predict", "evaluate", "save", "state_dict", "parameters"), _OF_ENGINE),
        "add": "sizes has all widths at once: MLP([784, 128, 10])",
        "count_params": "it is net.parameter_count",
    },
)


def _fall(activation: str) -> str | None:
    """Return how an activation does not rise everywhere; None if it does."""
    row = pointwise.ACTIVATIONS[activation]
    if row.learned:
        return f"{activation} has a slope that may turn negative"
    return f"{activation} falls before it rises" if row.turn > -math.inf else None


def _compact(values: Iterable[object]) -> str:
    """Return the common value if all are equal, else the list."""
    several = list(values)
    return repr(several[0] if len(set(several)) == 1 else several)


def _draw(
    generator: np.random.Generator, init: str, activation: Activation, fan_in: int, fan_out: int
) -> tuple[Array, Array]:
    """Draw a layer's weight (fan_out, fan_in) and bias (fan_out,); ``MLP`` explains ``init``."""
    shape = (fan_out, fan_in)
    if init == "zeros":
        return np.zeros(shape), np.zeros(fan_out)
    if init == "torch":
        bound = 1.0 / math.sqrt(fan_in)
        return generator.uniform(-bound, bound, shape), generator.uniform(-bound, bound, fan_out)
    family, distribution = init.split("_")
    # The output below zero is the slope times z only then.
    slope = activation.slope if pointwise.ACTIVATIONS[activation.name].homogeneous else 0.0
    variance = {
        "he": 2.0 / ((1.0 + slope**2) * fan_in),
        "glorot": 2.0 / (fan_in + fan_out),
        "lecun": 1.0 / fan_in,
    }[family]
    if distribution == "normal":
        return generator.normal(0.0, math.sqrt(variance), shape), np.zeros(fan_out)
    # U(-b, b) has the variance b**2 / 3.
    bound = math.sqrt(3.0 * variance)
    return generator.uniform(-bound, bound, shape), np.zeros(fan_out)


def as_network(argument: str, value: object) -> MLP:
    """Return a network; errors call it ``argument``."""
    if not isinstance(value, MLP):
        raise ArgumentTypeError(f"{argument}: expected an MLP such as MLP([784, 128, 10]), got {value!r}")
    return value


HEADER = ("layer", "shape", "activation", "dropout", "initial weights", "parameters")
# Arrays of the size of the parameters that an optimizer keeps beside them.
STATES = {"SGD": 0, "SGD with momentum": 1, "Adam": 2}


def layer_lines(net: MLP) -> list[str]:
    """Return a table of the layers and the number of parameters."""
    counts = [0] * net.layers
    for name, shape in net.parameter_shapes().items():
        counts[layer_of(name)] += math.prod(shape)
    rows: list[Sequence[str]] = [HEADER]
    starts = {last: first for first, last in net.blocks}
    for layer, activation in enumerate(net.activations):
        inputs, outputs = net.widths[layer : layer + 2]
        slope = f" {activation.slope:g}" if activation.slope else ""
        dropout = f"{net.dropouts[layer]:g}" if net.dropouts[layer] else "-"
        norm = net.norm(layer)
        before = f"{norm.kind} norm, " if norm is not None else ""
        behind = f" + input of layer {starts[layer] + 1}" if layer in starts else ""
        rows.append(
            (
                str(layer + 1),
                f"{inputs} -> {outputs}",
                f"{before}{activation.name}{slope}{behind}",
                dropout,
                net.init_of(layer),
                f"{counts[layer]:,}",
            )
        )
    lines = aligned(rows, left=range(len(HEADER) - 1)).split("\n")
    return [f"MLP {net.title}", *lines, f"{net.parameter_count:,} parameters"]
