"""``fuse``: a PyTorch training step as one call over the module's own parameters."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fusemlp.describe.checks import as_count
from fusemlp.program.program import Program
from fusemlp.runtime.backends import TRAITS, open_backend, torch_backend
from fusemlp.runtime.memory import Memory
from fusemlp.torch import losses, modules, optimizers
from fusemlp.torch.arena import Tie
from fusemlp.torch.batches import check_tensors
from fusemlp.torch.optimizers import GroupRule
from fusemlp.torch.programs import Batch, Programs, program_key
from fusemlp.torch.updates import Clocks, UpdateSet
from fusemlp.torch.watch import Watch
from fusemlp_kernels.contract import LAST_LOSS, ROW_COUNT, Backend
from fusemlp_kernels.errors import ArgumentError, DTypeError, unknown_name


class FusedStep:
    """A fused training step; see ``fuse``."""

    def __init__(
        self,
        module: nn.Module,
        loss_fn: Any,
        optimizer: Optimizer,
        *,
        batch_size: int | None = None,
        backend: str = "auto",
        precision: str = "auto",
        seed: int | None = None,
    ) -> None:
        reading = modules.read_module(module)
        self._dtype, self._device = modules.check_tensors(reading)
        self._kind = optimizers.optimizer_kind(optimizer)
        self.module = module
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        trained = self._trained_of(reading)
        rules, _ = self._read_groups()
        losses.read_loss(loss_fn).check_network(reading.network)
        rows = None if batch_size is None else as_count("batch_size", batch_size, minimum=1)
        self._seed = None if seed is None else as_count("seed", seed, minimum=0)
        self._real = np.dtype(np.float64 if self._dtype == torch.float64 else np.float32)
        opened = _open(self._dtype, self._device, backend, precision)
        self.backend = opened.traits.name
        state_count = max(rule.rule.state_count for rule in rules)
        memory = Memory(reading.network, opened, state_count, item_bytes=self._real.itemsize)
        self._memory = memory
        self._tie = Tie(reading, optimizer, self._kind, memory)
        self._tie.check_state(trained)
        self._clocks = Clocks(memory)
        self._on_host = isinstance(memory.params, np.ndarray)
        # A memoryview reads or writes one item in half the time.
        self._stats: Any = memory.stats.data if self._on_host else memory.stats
        self._counters: Any = memory.counters.data if self._on_host else memory.counters
        self._row_count = 0
        self._version = 0
        self._sets: list[UpdateSet] = []
        self._key: tuple[Any, ...] = ()
        self._batches: dict[Any, Batch] = {}

        self._tie.move_parameters()
        self._refresh()
        if rows is not None:
            self._programs.build(rows)
        _follow_loading(optimizer, weakref.ref(self))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Update once from x (m, K) and y; return the loss before the update, a 0-d tensor without a graph.

        y has the form of the loss's targets: class indices (m,) int64, or values shaped like the module's output.
        Raises ShapeError, DTypeError, DataError or ArgumentError before anything has changed.
        """
        if not self._watch.unchanged():
            self._refresh()
        self._follow_groups()
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.requires_grad or y.requires_grad:
            check_tensors(x, y, self._device)
        key = (x.shape, x.dtype, x.device, x.layout, y.shape, y.dtype, y.device, y.layout)
        batch = self._batches.get(key)
        if batch is None:
            batch = self._batches[key] = self._programs.batch(x, y, self._dtype, self._device)
        runnable = batch.stage(x, y)
        if runnable.version != self._version:
            runnable.use(self._sets, self._memory.layout, self._version)
        if batch.rows != self._row_count:
            self._counters[ROW_COUNT] = self._row_count = batch.rows
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad = None
        for one in self._sets:
            one.cover()
        with np.errstate(all="ignore"):
            for call in runnable.calls:
                call()
        return self._after_step(batch)

    def _after_step(self, batch: Batch) -> Tensor:
        """Report the update to torch, and return the loss."""
        if self._kind == "adam":
            steps = self._tie.steps
            np.add(steps, self._increments, steps)
            for one in self._sets:
                one.count += 1
        # As torch's own step: schedulers check that they are called after it.
        self.optimizer.__dict__["_opt_called"] = True
        # As torch's own step: a graph over the old parameters can no longer be differentiated.
        torch.autograd.graph.increment_version(self._updated)
        if batch.nothing_scored:
            # The mean over no rows: the kernels return 0, torch NaN.
            return torch.full((), self._no_rows, dtype=self._dtype, device=self._device)
        if self._on_host:
            return torch.from_numpy(np.array(self._stats[LAST_LOSS], self._real))
        loss: Tensor = self._stats[LAST_LOSS].to(self._dtype)
        return loss

    @property
    def program(self) -> Program:
        """The kernel calls of a step with the last batch size (32 rows before the first), as printable data."""
        rows = next(reversed(self._batches.values())).rows if self._batches else 32
        kind = "labels" if self._loss.kind == "cross_entropy" else "values"
        return self._programs.lower(rows, kind, kind == "labels" and self._programs.always_ignores)

    def __repr__(self) -> str:
        return (
            f"FusedStep({type(self.module).__name__}, {self._loss!r}, {type(self.optimizer).__name__}, "
            f"backend={self.backend!r})"
        )

    # The parts of the step.

    def _trained_of(self, reading: modules.Reading) -> dict[str, int]:
        """Return the group of each trained parameter, by short name; raises ArgumentError if there is none."""
        optimizers.check_parameters(self.optimizer, {id(parameter) for parameter in self.module.parameters()})
        group_of = optimizers.group_of_parameter(self.optimizer)
        trained = {
            short: group_of[id(slot.parameter)]
            for short, slot in reading.slots.items()
            if slot.parameter.requires_grad and id(slot.parameter) in group_of
        }
        if not trained:
            raise ArgumentError(
                "module: no parameter requires grad and is in a group of the optimizer; there is nothing to train"
            )
        return trained

    def _read_groups(self) -> tuple[list[GroupRule], list[float]]:
        """Return rule and learning rate of each parameter group."""
        groups = self.optimizer.param_groups
        rules = [optimizers.read_group(self._kind, group, index) for index, group in enumerate(groups)]
        return rules, [optimizers.read_rate(group["lr"], index) for index, group in enumerate(groups)]

    def _check_state_count(self, rules: list[GroupRule]) -> None:
        for index, rule in enumerate(rules):
            if rule.rule.state_count > len(self._memory.states):
                raise ArgumentError(
                    f"optimizer.param_groups[{index}]['momentum']: is {rule.rule.momentum}, and was 0 in all groups "
                    "when the step was fused; call fuse again"
                )

    def _refresh(self) -> None:
        """Read module, loss and optimizer again and follow their changes, or raise and change nothing."""
        reading = modules.read_module(self.module)
        self._tie.check_parameters(reading)
        loss = losses.read_loss(self.loss_fn)
        loss.check_network(reading.network)
        trained = self._trained_of(reading)
        rules, rates = self._read_groups()
        self._check_state_count(rules)
        self._tie.check_state(trained)
        if any(reading.network.dropouts) and self._seed is None:
            self._seed = int(torch.randint(0, 1 << 62, ()))
        self._reading, self._loss, self._trained = reading, loss, trained
        self._no_rows = float("nan") if loss.reduction == "mean" else 0.0
        self._tie.adopt_state(trained)
        self._parameters = list(self._tie.parameters.values())
        self._updated = [self._tie.parameters[short] for short in trained]
        self._increments = np.array([short in trained for short in self._tie.slots], self._tie.steps.dtype)
        self._partition(rules, rates)
        self._watch = Watch(self.module, self.loss_fn, self.optimizer, self._tie, trained)

    def _partition(self, rules: list[GroupRule], rates: list[float]) -> None:
        """Group the parameters into sets with equal rules, rates and numbers of updates."""
        members: dict[Any, dict[str, float]] = {}
        for short, group in self._trained.items():
            key = (rules[group].rule, rates[group], self._tie.count(short))
            members.setdefault(key, {})[short] = rules[group].weight_decay
        sets = []
        for index, ((rule, rate, count), decays) in enumerate(members.items()):
            sets.append(UpdateSet(rule, rate, count, decays, self._clocks.get(index, rule)))
        if [(one.rule, one.decays) for one in sets] != [(one.rule, one.decays) for one in self._sets]:
            self._version += 1
        self._sets = sets
        self._rules, self._rates = rules, rates
        self._values = [optimizers.group_values(self._kind, group) for group in self.optimizer.param_groups]
        self._counted = [(one, self._tie.position[next(iter(one.decays))]) for one in sets]
        key = program_key(self._reading, self._loss, sets)
        if key != self._key:
            self._key = key
            self._batches.clear()
            self._programs = Programs(
                self._memory, self._reading, self._loss, sets, self._seed or 0, self._real.itemsize
            )

    def _follow_groups(self) -> None:
        """Follow changes in ``param_groups`` and updates by the optimizer's own ``step``."""
        rates = []
        for group in self.optimizer.param_groups:
            rate = group["lr"]
            rates.append(rate if rate.__class__ is float else float(rate))
        values = [optimizers.group_values(self._kind, group) for group in self.optimizer.param_groups]
        if values != self._values:
            rules, rates = self._read_groups()
            self._check_state_count(rules)
            self._partition(rules, rates)
        elif rates != self._rates:
            rates = [optimizers.read_rate(rate, index) for index, rate in enumerate(rates)]
            if len(rates) == 1:
                self._sets[0].set_rate(rates[0])
                self._rates = rates
            else:
                self._partition(self._rules, rates)
        steps = self._tie.steps
        for one, position in self._counted:
            if one.count != steps[position]:
                self._partition(self._rules, self._rates)
                return

    def before_loading(self, state: dict[str, Any]) -> None:
        """Refuse a state of ``load_state_dict`` that cannot be fused, before the load."""
        if self._tie.holds():
            groups = state["param_groups"]
            self._check_state_count(
                [optimizers.read_group(self._kind, group, index) for index, group in enumerate(groups)]
            )

    def after_loading(self) -> None:
        """Copy the state from ``load_state_dict`` into the arenas."""
        if self._tie.holds():
            self._refresh()


def _open(dtype: torch.dtype, device: torch.device, name: str, precision: str) -> Backend:
    """Return the backend for a module's element type and device; raises ArgumentError if none fits."""
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"module: is on {device}, expected 'cpu' or 'cuda'; use module.to('cpu')")
    if name == "auto":
        name = torch_backend(device.type)
    traits = TRAITS.get(name)
    if traits is None:
        raise unknown_name("backend", name, ["auto", *TRAITS])
    if traits.on_host and device.type != "cpu":
        raise ArgumentError(f"backend: {name!r} runs on the CPU, the module is on {device}; use module.to('cpu')")
    fitting = ("fp64",) if dtype == torch.float64 else ("fp32", "tf32")
    if precision == "auto":
        precision = fitting[0]
    if precision not in fitting:
        raise ArgumentError(f"precision: a module in {dtype} can have {' or '.join(fitting)}, got {precision!r}")
    if precision == "fp64" and precision not in traits.precisions:
        raise DTypeError(
            f"module: torch.float64 needs fp64, which the {name} backend does not have; use module.float()"
        )
    return open_backend(name, str(device), precision)


def _follow_loading(optimizer: Optimizer, reference: weakref.ref[FusedStep]) -> None:
    """Notify a step of every ``load_state_dict`` of its optimizer; hold the step by a weak reference."""

    def before(optimizer: Optimizer, state: dict[str, Any]) -> None:
        step = reference()
        if step is not None:
            step.before_loading(state)

    def after(optimizer: Optimizer) -> None:
        step = reference()
        if step is not None:
            step.after_loading()

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)


def fuse(
    module: nn.Module,
    loss_fn: Any,
    optimizer: Optimizer,
    *,
    batch_size: int | None = None,
    backend: str = "auto",
    precision: str = "auto",
    seed: int | None = None,
) -> FusedStep:
    """Fuse a training step: ``step = fuse(module, loss_fn, optimizer)``, then ``loss = step(x, y)``.

    It replaces ``optimizer.zero_grad(); loss = loss_fn(module(x), y); loss.backward(); optimizer.step()``. From this
    call on the module's parameters and the optimizer's moments are views of the kernels' memory: ``module(x)``,
    ``state_dict()``, ``load_state_dict()``, learning-rate schedulers and ``optimizer.step()`` itself keep working. The
    next step follows every change: train and eval mode, ``requires_grad``, the options of ``param_groups``, loaded
    states. Gradients are not stored: ``grad`` is None after a step.

    - module: Linear, activations, Dropout and Flatten in ``nn.Sequential`` (nested too), or a module whose ``forward``
      torch.fx can trace to such a chain; float32, or float64 on the CPU
    - loss_fn: CrossEntropyLoss, BCEWithLogitsLoss, MSELoss, L1Loss, HuberLoss or PoissonNLLLoss; mean or sum
    - optimizer: SGD, Adam or AdamW; parameters that are frozen or in no group are not updated
    - batch_size: the usual number of rows, to prepare the step at once; batches of any other size work too
    - backend: "auto" (numpy for a module on the CPU, triton on a GPU) or a name
    - precision: "auto" (the module's type), or "tf32" for one TF32 pass in the matrix products of a GPU
    - seed: of the dropout masks, which are not torch's; None draws one from torch's generator

    Raises ArgumentError or ArgumentTypeError, with the path of the part that cannot be fused, before any change.
    """
    return FusedStep(module, loss_fn, optimizer, batch_size=batch_size, backend=backend, precision=precision, seed=seed)
