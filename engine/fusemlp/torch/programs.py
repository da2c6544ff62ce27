"""The programs of a fused step, one for each batch size and kind of target, and how they end.

Torch's calls on the kernels' memory follow the output layer's ``linear``, are in place of the loss, or stand before the
updates. A single set of parameters uses the update that the lowering chose. Several sets use one ``update`` each, over
the same arenas, with their own segments, hyper and counters.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fusemlp.describe.losses import Loss
from fusemlp.describe.optimizers import Constant
from fusemlp.program.builder import Inputs, Step
from fusemlp.program.layout import Layout, short_names
from fusemlp.program.lowering import lower
from fusemlp.program.program import Program, resolve
from fusemlp.runtime.memory import Memory, RateTable, Workspace
from fusemlp.runtime.programs import BoundProgram
from fusemlp.torch.batches import BatchCopy, check_shapes, check_tensors
from fusemlp.torch.loop import PositiveWeights
from fusemlp.torch.modules import Reading, as_module
from fusemlp_kernels import contract
from fusemlp_kernels.contract import Segment, TensorRule, UpdateRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError
from fusemlp_kernels.pointwise import HYPERPARAMETERS

Run = Callable[[], object]


@dataclass
class Running:
    """The batch that runs: its rows and a callable loss's targets; and what torch's calls note, output and loss."""

    rows: int = 0
    targets: tuple[Tensor, ...] = ()
    output: Tensor | None = None
    loss: Tensor | None = None


def module_output(reading: Reading, y: Tensor) -> Tensor:
    """Return the module's output from that of its last layer, y (m, N)."""
    if reading.log_softmax:
        y = y.log_softmax(1)
    return y.squeeze(1) if reading.squeezes else y


def bind_writing(dz: Tensor) -> Callable[[Tensor], None]:
    """Return the function that writes the gradient of a batch into dz (capacity, N), and zeros into its padding."""
    rows, columns = dz.shape
    # the kernels read a row up to its pitch
    pitch = dz.stride(0)
    whole = dz if pitch == columns else dz.as_strided((rows, pitch), (pitch, 1))

    def write(gradient: Tensor) -> None:
        if len(gradient) < rows or pitch > columns:
            whole.zero_()
        dz[: len(gradient)] = gradient

    return write


def bind_own_loss(running: Running, reading: Reading, operands: dict[str, Any]) -> Run:
    """Return the call of a callable loss, which autograd differentiates by the output of the module's last layer."""
    y, write = torch.as_tensor(operands["y"]), bind_writing(torch.as_tensor(operands["dy"]))
    loss_fn, name = operands["function"].function, operands["function"].name

    def run() -> None:
        targets, running.targets = running.targets, ()
        outputs = y[: running.rows].detach().requires_grad_()
        # of the callable's own, which it may keep or write into
        output = module_output(reading, outputs.clone())
        loss = loss_fn(output, *targets)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            kind = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ArgumentTypeError(f"loss_fn: {name} returned {kind}; expected a 0-d tensor of floats: use .mean()")
        if loss.requires_grad:
            torch.autograd.backward(loss)
        reached = [slot for slot in reading.slots.values() if slot.parameter.grad is not None]
        for slot in reached:
            slot.parameter.grad = None
        if reached:
            raise ArgumentError(
                f"loss_fn: {name} depends on {reached[0].path} not by the output alone, and a fused step would leave "
                "out that gradient; use the optimizer's weight_decay, detach(), or FusedMLP in an eager loop"
            )
        if outputs.grad is None:
            raise ArgumentError(
                f"loss_fn: {name} has no gradient by the output; compute it by torch's functions, without detach()"
            )
        write(outputs.grad)
        running.loss, running.output = loss.detach(), output.detach()

    return torch.enable_grad()(run)


def bind_output(running: Running, reading: Reading, z: Any, slope: Any) -> Run:
    """Return the call that notes the module's output, from z (capacity, N) of the last Linear.

    ``slope``: the parameter of a PReLU at the end, else None.
    """
    z, activation = torch.as_tensor(z), as_module(reading.network.activations[-1])
    if slope is not None:
        slope = torch.as_tensor(slope)

    def run() -> None:
        y: Tensor = z[: running.rows].clone()
        y = activation(y) if slope is None else functional.prelu(y, slope)
        running.output = module_output(reading, y)

    return torch.no_grad()(run)


def bind_weighted_loss(running: Running, loss: PositiveWeights, operands: dict[str, Any]) -> Run:
    """Return a ``loss_grad`` for BCEWithLogitsLoss(pos_weight): with p for a pos_weight, s(z) for the sigmoid, the loss
    of z and its target t has the gradient (1 + (p - 1) t) s(z) - p t."""
    z, target, stats = (torch.as_tensor(operands[name]) for name in ("z", "target", "stats"))
    weight = torch.tensor(loss.pos_weight, dtype=z.dtype, device=z.device)
    less, write = weight - 1.0, bind_writing(torch.as_tensor(operands["dz"]))

    def run() -> None:
        t, logits = target[: running.rows], z[: running.rows]
        stats[contract.LAST_LOSS] = functional.binary_cross_entropy_with_logits(
            logits, t, pos_weight=weight, reduction=loss.reduction
        )
        gradient = torch.sigmoid(logits).mul_(torch.addcmul(torch.ones_like(t), less, t)).sub_(weight * t)
        if loss.reduction == "mean":
            gradient.div_(gradient.numel())
        write(gradient)

    return torch.no_grad()(run)


def bind_clipping(gradients: Sequence[Any], most: float) -> Run:
    """Return the call that clips the common norm of all gradients, for optimizers with several updates in a step."""
    views = [torch.as_tensor(one) for one in gradients]
    # torch clips the grad of its parameters
    for view in views:
        view.grad = view.detach()

    def run() -> None:
        clip_grads_with_norm_(views, most, get_total_norm(views))

    return run


# A group's own learning rate is the factor that the clock applies to this one.
UNIT_RATE = Constant(1.0)
_numbers = attrgetter(*HYPERPARAMETERS)


@dataclass
class UpdateSet:
    """Parameters with a common update: ``rules`` are those of each by short name, ``count`` the updates so far.

    ``numbers``: those of the rule, in each bound call on the host.
    """

    rule: UpdateRule
    rules: Mapping[str, TensorRule]
    count: int
    table: RateTable
    numbers: list[Any] = field(default_factory=list)

    def set_rule(self, rule: UpdateRule) -> None:
        """Set the numbers of the rule, whose kind stays, from the next update on."""
        clip_norm = self.rule.clip_norm
        self.rule = rule if clip_norm is None else replace(rule, clip_norm=clip_norm)
        for numbers in self.numbers:
            numbers[:] = _numbers(rule)
        if self.table.rule.kind == "adam":
            self.table.turn_now(rule, self.count)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate from the next update on: the clock multiplies the table's, which is 1, by it."""
        self.table.hyper[contract.RATE_SCALE] = rate
        self.table.hyper[contract.LEARNING_RATE] = rate


class Clocks:
    """Tables of rates, with hyper and counters, for any number of sets; the arrays of the first are the engine's.

    ``corrected``: the rule's bias corrections apply; else they are 1.
    """

    def __init__(self, memory: Memory, *, corrected: bool) -> None:
        self._memory = memory
        self._corrected = corrected
        self._tables: list[RateTable] = []

    def started(self, index: int, rule: UpdateRule, rate: float, count: int) -> RateTable:
        """Return the table of set ``index`` under ``rule``, from update ``count`` on at a learning rate."""
        rule = rule if self._corrected else replace(rule, kind="sgd")
        if index == len(self._tables):
            backend, shape = self._memory.backend, self._memory.rates.shape
            arrays = self._memory.hyper, self._memory.rates, self._memory.counters
            if index:
                hyper, rates = (backend.allocate(size, "float64") for size in (contract.HYPER, math.prod(shape)))
                arrays = hyper, rates.reshape(shape), backend.allocate(contract.COUNTERS, "int64")
            self._tables.append(RateTable(backend, rule, *arrays))
        table = self._tables[index]
        if table.rule != rule:
            table.turn(rule)
        table.counters[contract.UPDATE_COUNT] = count
        table.follow(UNIT_RATE, rate, count=count)
        return table


def bind_updates(bound: BoundProgram, sets: list[UpdateSet], layout: Layout) -> list[Run]:
    """Return the calls that replace the last call of ``bound``, for the current rules of ``sets``."""
    last, arrays = bound.program.calls[-1], bound.arrays
    runs: list[Run] = []
    for update_set in sets:
        if last.op == "update":
            operands = {
                "params": arrays["params"],
                "grads": arrays["grads"],
                "states": tuple(arrays[f"state{index}"] for index in range(update_set.rule.state_count)),
                "segments": tuple(
                    Segment(place.offset, place.size, update_set.rules[short])
                    for short, place in layout.places.items()
                    if short in update_set.rules
                ),
            }
            if "norm" in last.operands:
                operands["norm"] = arrays["norm"]
        else:
            operands = resolve({**last.operands, **_with_rules(last.operands, update_set.rules)}, arrays.__getitem__)
        clock = {
            "hyper": update_set.table.hyper,
            "rates": update_set.table.rates,
            "counters": update_set.table.counters,
            "rule": update_set.rule,
        }
        if bound.backend.traits.on_host:
            clock["numbers"] = update_set.numbers
        runs.append(bound.backend.bind(last.op, **{**operands, **clock}))
    return runs


def _with_rules(operands: Mapping[str, Any], rules: Mapping[str, TensorRule]) -> dict[str, Any]:
    """Return the layers and slopes of a ``grad_weight_update`` with the tensors' rules."""
    layers = []
    for layer in operands["layers"]:
        trained = {kind: ref for kind in ("w", "b") if (ref := layer[kind]) is not None}
        layers.append({**layer, **{f"{kind}_rule": rules[ref.name] for kind, ref in trained.items()}})
    slopes = tuple({**slope, "rule": rules[slope["param"].name]} for slope in operands["slopes"])
    return {"layers": tuple(layers), "slopes": slopes}


# This many batch sizes get programs of exactly their size; other batches are padded to a power of two.
EXACT_SIZES = 8


@dataclass(eq=False)
class Runnable:
    """A bound program: ``before`` are its calls up to the updates of ``sets``, its last ones."""

    bound: BoundProgram
    before: tuple[Run, ...]
    sets: list[UpdateSet] = field(default_factory=list)
    run: Run = field(init=False)

    def use(self, sets: list[UpdateSet], layout: Layout) -> None:
        """Bind the updates again, for the rules of ``sets``."""
        self.bound.use((*self.before, *bind_updates(self.bound, sets, layout)))
        self.run, self.sets = self.bound.run, sets


@dataclass(eq=False)
class Programs:
    """Makes the programs of one network, loss and partition of its parameters, each on first use."""

    memory: Memory
    reading: Reading
    loss: Loss
    sets: list[UpdateSet]
    seed: int
    clip_norm: float | None

    def __post_init__(self) -> None:
        backend, spec = self.memory.backend, self.loss.spec(accuracy=False)
        self.device = backend.device
        self.running = Running()
        self._workspace = Workspace(backend)
        self._runnables: dict[tuple[int, str, bool], Runnable] = {}
        self._inputs: dict[tuple[int, str], Any] = {}
        self._sizes: set[int] = set()
        self.ignore_index = -100 if spec.ignore_index is None else spec.ignore_index
        # Labels on a GPU are not read back, so any of them may be the ignored index.
        read = backend.traits.on_host and not 0 <= self.ignore_index < self.reading.network.sizes[-1]
        self.labels = "labels" if read else "ignored"
        self._class_weight: Any = None
        if self.loss.class_weight is not None:
            weights = np.asarray(self.loss.class_weight, f"f{self.reading.dtype.itemsize}")
            self._class_weight = backend.from_host(weights)

    @property
    def usual(self) -> str:
        """The usual kind of targets of the loss."""
        return {contract.OWN: contract.OWN, "cross_entropy": self.labels}.get(self.loss.kind, "values")

    def batch(self, x: Any, targets: Sequence[Any], returns: bool) -> BatchCopy:
        """Check a batch of a new shape, and return the object that copies it."""
        check_tensors(x, targets, self.reading.device)
        kind = check_shapes(x, targets, self.reading, self.loss)
        if kind == "soft" and self.ignore_index >= 0:
            raise ArgumentError(
                f"loss_fn: ignore_index={self.ignore_index} is a class index, and y holds probabilities; leave it out"
            )
        rows = len(x)
        exact = rows in self._sizes or len(self._sizes) < EXACT_SIZES
        if exact:
            self._sizes.add(rows)
        return BatchCopy(self, rows, rows if exact else 1 << (rows - 1).bit_length(), kind, returns)

    def runnable(self, capacity: int, kind: str, returns: bool = False) -> Runnable:
        """Return the program for batches of ``capacity`` rows; ``returns``: it notes the output."""
        key = (capacity, kind, returns)
        if key not in self._runnables:
            target = self.input(capacity, "labels" if kind == "ignored" else kind)
            given = {"x": self.input(capacity, "x"), "target": target, "function": self.loss}
            binders: dict[str, Any] = {"own_loss": partial(bind_own_loss, self.running, self.reading)}
            if isinstance(self.loss, PositiveWeights):
                binders["loss_grad"] = partial(bind_weighted_loss, self.running, self.loss)
            if self._class_weight is not None:
                given["class_weight"] = self._class_weight
            program = self.lower(capacity, kind, returns)
            # torch's calls between the kernels' depend on the number of rows, or return memory
            returning = returns or isinstance(self.loss, PositiveWeights) or program.calls_back
            plan = "graph" if "graph" in self.memory.backend.traits.plans and not returning else "eager"
            bound = BoundProgram(program, self.memory, self._workspace, given, plan=plan, binders=binders)
            self._runnables[key] = Runnable(bound, tuple(self._before_updates(bound, returns)))
        return self._runnables[key]

    def _before_updates(self, bound: BoundProgram, returns: bool) -> Iterator[Run]:
        """Yield the calls before the updates: the program's, and torch's between them."""
        arrays = bound.arrays
        for call, run in zip(bound.program.calls[:-1], bound.calls, strict=False):
            if call.op == "loss_grad" and returns:
                operands = resolve(call.operands, arrays.__getitem__)
                yield bind_output(self.running, self.reading, operands["z"], operands.get("slope_param"))
            yield run
        if self.clip_norm is not None and len(self.sets) > 1:
            trained = [short for update_set in self.sets for short in update_set.rules]
            yield bind_clipping([arrays[f"d{short}"] for short in trained], self.clip_norm)

    def input(self, capacity: int, kind: str) -> Any:
        """Return the array that programs of ``capacity`` rows read as x ("x"), or as targets of a kind but OWN."""
        if kind == contract.OWN:
            return None
        key = (capacity, kind)
        if key not in self._inputs:
            backend, sizes = self.memory.backend, self.reading.network.sizes
            if kind == "labels":
                self._inputs[key] = backend.allocate(capacity, "int64")
            else:
                width, multiple = sizes[0] if kind == "x" else sizes[-1], backend.traits.row_multiple
                pitch = -(-width // multiple) * multiple
                flat = backend.allocate(capacity * pitch, "real")
                self._inputs[key] = backend.view(flat, 0, (capacity, width), pitch)
        return self._inputs[key]

    def lower(self, capacity: int, kind: str, returns: bool = False) -> Program:
        """Return the step as data; ``returns``: the output passes through memory."""
        traits = self.memory.backend.traits
        if returns or isinstance(self.loss, PositiveWeights):
            traits = replace(traits, widest_fused_output=0)
        rules = {short: rule for update_set in self.sets for short, rule in update_set.rules.items()}
        net, spec = self.reading.network, self.loss.spec(accuracy=False)
        step = Step(
            net,
            capacity,
            traits,
            self.memory.layout,
            Inputs(capacity, class_weighted=self._class_weight is not None),
            replace(spec, ignore_index=spec.ignore_index if kind == "ignored" else None, soft=kind == "soft"),
            self.reading.dtype.itemsize,
            rule=max((update_set.rule for update_set in self.sets), key=lambda rule: rule.state_count),
            trained=tuple((short, rules[short]) for short in short_names(net) if short in rules),
            seed=self.seed,
            keep_gradients=len(self.sets) > 1,
        )
        return lower(step)
