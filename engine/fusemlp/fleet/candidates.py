"""The models of a fleet: a description of each, made from one and the parameters that vary; their rows and memory."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from fusemlp.datasets.rows import available_memory
from fusemlp.describe.checks import as_count
from fusemlp.describe.conflicts import check_together
from fusemlp.describe.losses import Loss
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Optimizer, Schedule
from fusemlp.describe.privacy import DPSGD
from fusemlp.engine import Engine
from fusemlp.inputs.arrays import Array, to_array
from fusemlp.runtime.memory import REAL_BYTES
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
    **dict.fromkeys(("learning_rate", "learning_rate_init", "rate"), "lr"),
    **dict.fromkeys(("alpha", "l2"), "weight_decay"),
    **dict.fromkeys(("hidden_layer_sizes", "sizes", "layers", "widths", "units"), "hidden"),
    **dict.fromkeys(("beta1", "beta2", "beta_1", "beta_2"), "betas"),
    "random_state": "seed",
}
# Names of what a fleet has in another place.
_OF_FIT = dict.fromkeys(("fold", "cv"), "fusemlp.sklearn.FleetSearchCV cuts folds, and fit(rows=...) takes them")
_OF_FIT |= dict.fromkeys(("epochs", "max_iter"), "all models have the same epochs: fit(epochs=...), --epochs")

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
        columns = []
        for name, values in vary.items():
            check_name("vary", name)
            # a 0-d array claims to be iterable
            if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
                raise ArgumentTypeError(f"vary[{name!r}]: expected a sequence, got {values!r}; give [{values!r}]")
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
        if not vary:
            raise ArgumentError("vary: it is empty; name what the models differ in, such as {'seed': range(20)}")
        return [dict(zip(vary, values, strict=True)) for values in itertools.product(*columns)]
    if isinstance(vary, str) or not isinstance(vary, Iterable):
        raise ArgumentTypeError(f"vary: expected a mapping of names to values, or one for each model, got {vary!r}")
    points = list(vary)
    for index, point in enumerate(points):
        if not isinstance(point, Mapping):
            raise ArgumentTypeError(f"vary[{index}]: expected a mapping such as {{'lr': 0.01}}, got {point!r}")
        for name in point:
            check_name(f"vary[{index}]", name)
    if not points:
        raise ArgumentError("vary: it is empty; give a mapping for each model, {} for one as it is described")
    return [dict(point) for point in points]


def check_name(argument: str, name: str) -> None:
    """Raise ArgumentError for a name that cannot vary; the message suggests the right one."""
    if name in ELSEWHERE:
        mend = f"did you mean {ELSEWHERE[name]!r}? Expected one of: {', '.join(NAMES)}"
        raise ArgumentError(f"{argument}: unknown name {name!r}; {mend}")
    if name in _OF_FIT:
        raise ArgumentError(f"{argument}: {name!r} cannot vary; {_OF_FIT[name]}")
    if name not in NAMES:
        raise unknown_name(argument, name, NAMES)


def candidate(base: Candidate, parameters: Mapping[str, Any], where: str) -> Candidate:
    """Return ``base`` with ``parameters``; messages of errors that ``base`` does not have start with ``where``."""
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
    if "hidden" not in parameters:
        return net.but(dropout=parameters["dropout"])
    check_together({**net.uses, "hidden": parameters["hidden"]})
    hidden = parameters["hidden"]
    hidden = (hidden,) if isinstance(hidden, str) or not isinstance(hidden, Iterable) else hidden
    hidden = tuple(as_count("hidden", width, minimum=1) for width in hidden)
    like = net if net.layers > 1 else MLP([1, 1, 1])
    layers = {name: _repeated(name, values, len(hidden)) for name, values in like.hidden_arguments().items()}
    dropout = {name: parameters[name] for name in ("dropout",) if name in parameters}
    return net.but(sizes=[net.sizes[0], *hidden, net.sizes[-1]], **{**layers, **dropout})


def _repeated(argument: str, values: Sequence[Any], count: int) -> Any:
    """Return the setting of ``count`` hidden layers: their one common value, or a value for each."""
    if len(set(values)) > 1:
        if len(values) != count:
            raise ArgumentError(
                f"hidden: {count} layers are wanted and {argument} differs between the {len(values)} of the network; "
                f"give the network one {argument}"
            )
        return values
    return values[0]


def _described(given: Any, changes: Mapping[str, Any]) -> Any:
    """Return ``given`` with some fields changed."""
    if not changes:
        return given
    settings = sorted(field.name for field in fields(given))
    for name in changes:
        if name not in settings:
            raise ArgumentError(f"{name}: {type(given).__name__} has no such setting; it has {', '.join(settings)}")
    return replace(given, **changes)


def _optimizer(optimizer: Optimizer, changes: dict[str, Any]) -> Optimizer:
    if "lr" in changes and isinstance(optimizer.lr, Schedule) and not isinstance(changes["lr"], Schedule):
        # a number is the rate that the schedule starts from or rises to
        name = "peak" if hasattr(optimizer.lr, "peak") else "lr"
        changes["lr"] = _described(optimizer.lr, {name: changes["lr"]})
    changed: Optimizer = _described(optimizer, changes)
    return changed


def as_rows(argument: str, rows: Sequence[Any] | None, models: int, count: int) -> list[Array] | None:
    """Return each model's row numbers (m,) int64 below ``count``, None for all rows; ArgumentError for other lists."""
    if rows is None:
        return None
    lists = list(rows)
    if len(lists) != models:
        raise ArgumentError(f"{argument}: expected a list of rows for each of the {models} models, got {len(lists)}")
    checked = []
    for index, numbers in enumerate(lists):
        name = f"{argument}[{index}]"
        array = to_array(name, numbers)
        if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
            raise ArgumentError(f"{name}: expected row numbers (m,), got {np.array2string(array, threshold=8)}")
        if array.min() < 0 or array.max() >= count:
            raise ArgumentError(f"{name}: expected numbers from 0 to {count - 1}, got {array.min()} to {array.max()}")
        checked.append(array.astype(np.int64))
    return checked


# Bytes of an engine's Python objects beside its arrays, and of a model's that is kept; measured and rounded up. The
# history is not included: its length is not known before.
ENGINE_OBJECTS = 17 << 10
KEPT_OBJECTS = 6 << 10
MIB = 1 << 20


def engine_bytes(engine: Engine) -> int:
    """Estimate the bytes of an engine: arenas, table of rates, the best weights of early stopping, its objects."""
    memory = engine.memory
    arenas = memory.gradient_parts + 2 + len(memory.states) + memory.averages
    shadow = 0 if memory.shadow is None else memory.shadow.nbytes
    return int(arenas * memory.params.nbytes + shadow + memory.rates.nbytes + ENGINE_OBJECTS)


def kept_bytes(candidates: Sequence[Candidate], precision: str) -> int:
    """Estimate the bytes that stay of all models when they have ended."""
    networks = Counter(described.net for described in candidates)
    parameters = sum(net.parameter_count * models for net, models in networks.items())
    return parameters * REAL_BYTES.get(precision, 4) + len(candidates) * KEPT_OBJECTS


def room(limit: int | None, candidates: Sequence[Candidate], precision: str, *, device: str) -> int | None:
    """Return the bytes that engines may take at once, None for no limit; ArgumentError if not even the parameters fit.

    ``limit`` is the user's, and on the host includes what stays of ended models: by default half of the free memory.
    """
    if device != "cpu":
        return limit
    available = available_memory() if limit is None else limit
    if available is None:
        return None
    kept = kept_bytes(candidates, precision)
    if kept >= available:
        there = f"{available / MIB:.4g} MiB {'free' if limit is None else 'allowed'}"
        raise ArgumentError(
            f"memory: {len(candidates)} models leave {kept / MIB:.4g} MiB of parameters, and there are {there}; train "
            "fewer models at once, or give more with memory="
        )
    return max(0, (available // 2 if limit is None else available) - kept)
