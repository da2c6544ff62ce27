"""The models of a fleet: a description of each, made from one and the parameters that vary, and the rows of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from fusemlp.describe.checks import as_count
from fusemlp.describe.losses import Loss
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Optimizer
from fusemlp.describe.privacy import DPSGD
from fusemlp.describe.schedules import Schedule
from fusemlp.engine import Engine
from fusemlp.inputs.arrays import Array, to_array
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, unknown_name

# The parameters that may vary, by the description that has them.
OF_OPTIMIZER = ("lr", "momentum", "betas", "weight_decay")
OF_LOSS = ("label_smoothing",)
OF_NETWORK = ("dropout", "hidden")
OF_ENGINE = ("seed", "batch_size")
# More models than this are a mistake: each has an engine and takes time to train.
MOST_MODELS = 100_000
NAMES = (*OF_OPTIMIZER, *OF_NETWORK, *OF_LOSS, *OF_ENGINE)
# Other libraries' names, where the spelling does not lead to ours.
ELSEWHERE = {
    "learning_rate": "lr",
    "learning_rate_init": "lr",
    "alpha": "weight_decay",
    "l2": "weight_decay",
    "hidden_layer_sizes": "hidden",
    "sizes": "hidden",
    "layers": "hidden",
    "beta1": "betas",
    "beta2": "betas",
    "beta_1": "betas",
    "beta_2": "betas",
    "random_state": "seed",
}

Vary = Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Candidate:
    """One model of a fleet; ``parameters`` are those that vary."""

    parameters: dict[str, Any]
    net: MLP
    loss: Loss
    optimizer: Optimizer
    batch_size: int
    seed: int
    privacy: DPSGD | None = None

    def engine(self, machine: Mapping[str, Any]) -> Engine:
        """Return a new engine of the model; ``machine``: the arguments of ``Engine`` that are no part of a model."""
        return Engine(self.net, self.loss, self.optimizer, self.batch_size, self.seed, privacy=self.privacy, **machine)


def combinations(vary: Vary) -> list[dict[str, Any]]:
    """Return each model's parameters: a list's entries, or the product of a mapping's values, the last varying fastest.

    Raises ArgumentError for an unknown name or where there is no model, ArgumentTypeError for anything else.
    """
    if isinstance(vary, Mapping):
        _check_names("vary", vary)
        columns = []
        for name, values in vary.items():
            # a 0-d array claims to be iterable
            if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
                raise ArgumentTypeError(
                    f"vary[{name!r}]: expected a sequence of values, got {values!r}; give [{values!r}]"
                )
            columns.append(list(values))
            if not columns[-1]:
                raise ArgumentError(f"vary[{name!r}]: there are no values, so the fleet would have no model")
        total = math.prod(len(values) for values in columns)
        if total > MOST_MODELS:
            product = " x ".join(f"{len(values)} {name}" for name, values in zip(vary, columns, strict=True))
            raise ArgumentError(
                f"vary: {product} are {total} models, and at most {MOST_MODELS} are trained; give fewer values, or a "
                "list with some of the combinations"
            )
        found = [dict(zip(vary, values, strict=True)) for values in itertools.product(*columns)]
        if not vary:
            raise ArgumentError("vary: it is empty; name what the models differ in, such as {'seed': range(20)}")
        return found
    if isinstance(vary, str) or not isinstance(vary, Iterable):
        raise ArgumentTypeError(
            f"vary: expected a mapping of names to values, or a list of mappings, one a model, got {vary!r}"
        )
    found = []
    for index, one in enumerate(vary):
        if not isinstance(one, Mapping):
            raise ArgumentTypeError(f"vary[{index}]: expected a mapping such as {{'lr': 0.01}}, got {one!r}")
        _check_names(f"vary[{index}]", one)
        found.append(dict(one))
    if not found:
        raise ArgumentError("vary: it is empty; give a mapping for each model, {} for one as it is described")
    return found


def check_name(argument: str, name: str) -> None:
    """Raise ArgumentError for a name that cannot vary; the message suggests the right one."""
    if name in NAMES:
        return
    if name in ELSEWHERE:
        raise ArgumentError(
            f"{argument}: unknown name {name!r}; did you mean {ELSEWHERE[name]!r}? Expected one of: {', '.join(NAMES)}"
        )
    raise unknown_name(argument, name, NAMES)


def _check_names(argument: str, given: Mapping[str, Any]) -> None:
    for name in given:
        check_name(argument, name)


def candidate(base: Candidate, parameters: Mapping[str, Any], where: str) -> Candidate:
    """Return ``base`` with ``parameters``; messages of errors that ``base`` does not have start with ``where``.

    Raises ArgumentError or ArgumentTypeError for an impossible value, or for a parameter that the optimizer or the loss
    does not have.
    """
    try:
        return _candidate(base, parameters)
    except (ArgumentError, ArgumentTypeError) as error:
        first = "" if str(error) == _fault(base) else f"{where}: "
        raise type(error)(f"{first}{error}") from None


def _candidate(base: Candidate, parameters: Mapping[str, Any]) -> Candidate:
    described = Candidate(
        dict(parameters),
        _network(base.net, parameters),
        _described(base.loss, {name: parameters[name] for name in OF_LOSS if name in parameters}),
        _optimizer(base.optimizer, {name: parameters[name] for name in OF_OPTIMIZER if name in parameters}),
        as_count("batch_size", parameters.get("batch_size", base.batch_size), minimum=1),
        as_count("seed", parameters.get("seed", base.seed), minimum=0),
        base.privacy,
    )
    described.loss.check_network(described.net)
    described.optimizer.check_network(described.net)
    return described


def _fault(base: Candidate) -> str:
    """Return the error of ``base`` itself, "" if it has none."""
    try:
        _candidate(base, {})
    except (ArgumentError, ArgumentTypeError) as error:
        return str(error)
    return ""


def _network(net: MLP, parameters: Mapping[str, Any]) -> MLP:
    if not parameters.keys() & set(OF_NETWORK):
        return net
    hidden = parameters.get("hidden", net.sizes[1:-1])
    if isinstance(hidden, str) or not isinstance(hidden, Iterable):
        hidden = (hidden,)
    hidden = tuple(as_count("hidden", width, minimum=1) for width in hidden)
    sizes = [net.sizes[0], *hidden, net.sizes[-1]]
    return MLP(
        sizes,
        activation=_repeated("activation", net.activations[:-1], len(sizes) - 2, "relu"),
        output_activation=net.activations[-1],
        dropout=parameters.get("dropout", _repeated("dropout", net.dropouts[:-1], len(sizes) - 2, 0.0)),
        init=net.init,
    )


def _repeated(argument: str, values: Sequence[Any], count: int, default: Any) -> Any:
    """Return the setting of ``count`` hidden layers: their one common value, or a value for each."""
    if len(set(values)) > 1:
        if len(values) != count:
            raise ArgumentError(
                f"hidden: {count} layers are wanted and {argument} differs between the {len(values)} of the network; "
                f"give the network one {argument}"
            )
        return values
    return values[0] if values else default


def _described(given: Any, changes: Mapping[str, Any]) -> Any:
    """Return ``given`` with some fields changed."""
    if not changes:
        return given
    own = {field.name for field in fields(given)}
    for name in changes:
        if name not in own:
            raise ArgumentError(f"{name}: {type(given).__name__} has no such setting; it has {', '.join(sorted(own))}")
    return replace(given, **changes)


def _optimizer(optimizer: Optimizer, changes: dict[str, Any]) -> Optimizer:
    if "lr" in changes and isinstance(optimizer.lr, Schedule) and not isinstance(changes["lr"], Schedule):
        # a number is the rate that the schedule starts from or rises to
        name = "peak" if any(field.name == "peak" for field in fields(optimizer.lr)) else "lr"
        changes["lr"] = _described(optimizer.lr, {name: changes["lr"]})
    changed: Optimizer = _described(optimizer, changes)
    return changed


def as_rows(argument: str, given: Sequence[Any] | None, models: int, count: int) -> list[Array] | None:
    """Return the row numbers (m,) int64 of each model, of ``count`` rows; None for all rows.

    Raises ArgumentError for a number of lists other than ``models``, or for what are no row numbers.
    """
    if given is None:
        return None
    lists = list(given)
    if len(lists) != models:
        raise ArgumentError(f"{argument}: expected a list of rows for each of the {models} models, got {len(lists)}")
    checked = []
    for index, one in enumerate(lists):
        array = to_array(f"{argument}[{index}]", one)
        if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
            raise ArgumentError(
                f"{argument}[{index}]: expected row numbers (m,), got {np.array2string(array, threshold=8)}"
            )
        if array.min() < 0 or array.max() >= count:
            raise ArgumentError(
                f"{argument}[{index}]: expected numbers from 0 to {count - 1}, got {array.min()} to {array.max()}"
            )
        checked.append(array.astype(np.int64))
    return checked
