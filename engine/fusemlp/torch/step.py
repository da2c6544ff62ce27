"""``fuse``: a PyTorch training step as one call over the module's own parameters."""

import math
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fusemlp.callbacks.progress import compilations_shown
from fusemlp.describe.checks import as_count, as_number, knows_names
from fusemlp.describe.losses import Loss, OwnLoss
from fusemlp.program.program import Program
from fusemlp.runtime.memory import Memory
from fusemlp.runtime.plans import TRAITS, open_backend, torch_backend
from fusemlp.torch import loop, modules
from fusemlp.torch.batches import BatchCopy, check_tensors
from fusemlp.torch.loop import Group, Watch, other_hooks, warn_of_autocast, watch_clipping
from fusemlp.torch.modules import Reading
from fusemlp.torch.parameters import Tie
from fusemlp.torch.programs import UNIT_RATE, Clocks, Programs, UpdateSet
from fusemlp_kernels.contract import LAST_LOSS, ROW_COUNT, Backend, TensorRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DTypeError

_FORM = attrgetter("shape", "dtype", "device", "layout")
# Names of torch and of the engine for the same.
_NAMES = dict.fromkeys(("max_norm", "clip_norm"), "it is called clip_grad_norm here")
# Stands for y in a step without targets.
NO_TARGET = torch.empty(0, device="meta")


class FusedStep:
    """A fused training step: ``step = fuse(module, loss_fn, optimizer)``, then ``loss = step(x, y)``.

    It replaces ``optimizer.zero_grad(); loss = loss_fn(module(x), y); loss.backward(); optimizer.step()``. From this
    call on the module's parameters and the optimizer's moments are views of the kernels' memory: ``module(x)``,
    ``state_dict()``, ``load_state_dict()``, learning-rate schedulers and ``optimizer.step()`` itself keep working. The
    next step follows every change: train and eval mode, ``requires_grad``, the options of ``param_groups``, loaded
    states. Gradients are not stored: ``grad`` is None after a step.

    - module: an ``nn.Sequential`` (nested too) of the layers of an ``MLP``, with Flatten where it needs it, or a module
      whose ``forward`` torch.fx can trace to such a chain; float32, or float64 on the CPU
    - loss_fn: CrossEntropyLoss, NLLLoss after LogSoftmax, BCEWithLogitsLoss, MSELoss, L1Loss, HuberLoss or
      PoissonNLLLoss, mean or sum, which the kernels compute; or any callable ``loss_fn(output, *targets)`` that returns
      a 0-d tensor. Torch's autograd differentiates a callable by the output, which takes longer; ``print(step)`` says
      "by autograd". It must depend on the module's parameters by the output alone: another gradient by them is an
      error. Other tensors that it depends on get theirs, as by ``loss.backward()``
    - optimizer: SGD, Adam, AdamW or RMSprop; parameters that are frozen or in no group are not updated
    - clip_grad_norm: clips the common norm of the gradients of all updated parameters, as
      ``torch.nn.utils.clip_grad_norm_`` before an eager step; None does not
    - batch_size: the usual number of rows, to prepare the step at once; batches of any other size work too
    - backend: "auto" (numpy for a module on the CPU, triton on a GPU) or a name
    - precision: "auto" (the module's type), or "tf32" for one TF32 pass in the matrix products of a GPU
    - seed: of the dropout masks, which are not torch's; None draws one from torch's generator

    Raises ArgumentError or ArgumentTypeError, with the path of the part that cannot be fused, before any change.
    """

    @knows_names(_NAMES, call="fuse(module, loss_fn, optimizer, clip_grad_norm=1.0)")
    def __init__(
        self,
        module: nn.Module,
        loss_fn: Any,
        optimizer: Optimizer,
        *,
        clip_grad_norm: float | None = None,
        batch_size: int | None = None,
        backend: str = "auto",
        precision: str = "auto",
        seed: int | None = None,
    ) -> None:
        self.module = module
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        reading = modules.read_module(module)
        self._kind = loop.optimizer_kind(optimizer)
        self._most_states: float = math.inf
        if clip_grad_norm is not None:
            clip_grad_norm = as_number("clip_grad_norm", clip_grad_norm, low=0.0, low_open=True)
        self._clip_norm = clip_grad_norm
        loss, trained, groups = self._read(reading)
        rows = None if batch_size is None else as_count("batch_size", batch_size, minimum=1)
        self._seed = None if seed is None else as_count("seed", seed, minimum=0)
        opened = _open(reading, backend, precision)
        self.backend = opened.traits.name
        largest = max((group.rule for group in groups), key=lambda rule: rule.state_count)
        self._most_states = largest.state_count
        memory = Memory(reading.network, opened, "fp64" if reading.dtype == torch.float64 else "fp32", largest)
        self._memory = memory
        self._tie = Tie(reading, optimizer, self._kind, memory)
        self._tie.check_state(trained)
        self._clocks = Clocks(memory, corrected=self._kind == "adam")
        self._on_host = isinstance(memory.params, np.ndarray)
        # A memoryview reads or writes one item in half the time.
        self._stats: Any = memory.stats.data if self._on_host else memory.stats
        self._counters: Any = memory.counters.data if self._on_host else memory.counters
        self._row_count = 0
        self._sets: list[UpdateSet] = []
        self._key: tuple[Any, ...] = ()
        self._batches: dict[Any, BatchCopy] = {}
        self._warned = False

        self._tie.move_parameters()
        self._follow(reading, loss, trained, groups)
        if rows is not None:
            self._programs.runnable(rows, self._programs.usual)
        watch_clipping(self, self._parameters)

    @overload
    def __call__(
        self, x: Tensor, y: Tensor = ..., *more: Tensor, return_output: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(self, x: Tensor, y: Tensor = ..., *more: Tensor, return_output: Literal[False] = ...) -> Tensor: ...

    def __call__(self, x: Tensor, y: Tensor = NO_TARGET, *more: Tensor, return_output: bool = False) -> Any:
        """Update once from x (m, K) and y; return the loss before the update, a 0-d tensor without a graph.

        y has the form of the loss's targets: class indices (m,) int64, or values shaped like the module's output. A
        callable loss gets the output and then y and ``more`` as they are, any number of tensors (m, ...). Its errors
        leave the module and the optimizer as they were; its NaN does not, as in an eager loop.
        With ``return_output`` return the loss and the output of the module in this step, such as logits, a tensor
        without a graph.

        Raises ShapeError, DTypeError, DataError or ArgumentError before anything has changed.
        """
        if not self._on_host:
            self._memory.backend.follow()
        if not self._watch.unchanged():
            self._refresh()
        self._follow_groups()
        if torch.is_autocast_enabled(self._device_type) and not self._warned:
            self._warned = True
            warn_of_autocast(self._reading.dtype)
        targets = () if y is NO_TARGET else (y, *more)
        if more or not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.requires_grad or y.requires_grad:
            check_tensors(x, targets, self._reading.device)
        key: Any = (x.shape, x.dtype, x.device, x.layout, y.shape, y.dtype, y.device, y.layout, return_output)
        if more:
            key = (*key, *map(_FORM, more))
        batch = self._batches.get(key)
        first = batch is None
        if batch is None:
            batch = self._batches[key] = self._programs.batch(x, targets, return_output)
        runnable = batch.stage(x, targets)
        if runnable.sets is not self._sets:
            runnable.use(self._sets, self._memory.layout)
        if batch.rows != self._row_count:
            self._counters[ROW_COUNT] = self._row_count = batch.rows
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad = None
        try:
            for update_set in self._sets:
                update_set.table.cover(UNIT_RATE, 1)
            if first:
                with compilations_shown():
                    runnable.run()
            else:
                runnable.run()
        except BaseException:
            # Ctrl-C too: only the device knows whether there was an update
            for update_set in self._sets:
                update_set.table.forget()
            raise
        loss = self._after_step(batch)
        if not return_output:
            return loss
        running = self._programs.running
        output, running.output = running.output, None
        assert output is not None
        return loss, output

    def _after_step(self, batch: BatchCopy) -> Tensor:
        """Report the update to torch, and return the loss."""
        if self._kind != "sgd":
            steps = self._tie.steps
            np.add(steps, self._increments, steps)
            for update_set in self._sets:
                update_set.count += 1
        # As torch's own step: schedulers check that they are called after it.
        self.optimizer.__dict__["_opt_called"] = True
        # As torch's own step: a graph over the old parameters can no longer be differentiated.
        torch.autograd.graph.increment_version(self._updated)
        if (loss := self._programs.running.loss) is not None:
            return loss
        if batch.nothing_scored:
            # The mean over no rows: the kernels return 0, torch NaN.
            return torch.full((), self._no_rows, dtype=self._reading.dtype, device=self._reading.device)
        if self._on_host:
            return torch.from_numpy(np.array(self._stats[LAST_LOSS], self._real))
        recorded: Tensor = self._stats[LAST_LOSS].to(self._reading.dtype)
        return recorded

    @property
    def program(self) -> Program:
        """The kernel calls of a step with the last batch size (32 rows before the first), as printable data."""
        rows = next(reversed(self._batches.values())).rows if self._batches else 32
        return self._programs.lower(rows, self._programs.usual)

    def __reduce__(self) -> Any:
        raise ArgumentTypeError(
            "step: a fused step cannot be copied or pickled, as its module and optimizer have the kernels' memory; "
            "copy or save those two, and fuse the copies"
        )

    def __repr__(self) -> str:
        loss = f"{self._loss.name} by autograd" if isinstance(self._loss, OwnLoss) else repr(self._loss)
        return (
            f"FusedStep({type(self.module).__name__}, {loss}, {type(self.optimizer).__name__}, "
            f"backend={self.backend!r})"
        )

    # The parts of the step.

    def _read(self, reading: Reading) -> tuple[Loss, dict[str, int], list[Group]]:
        """Return the loss, the place of each trained parameter's group by short name, and the groups."""
        loss = loop.read_loss(self.loss_fn, reading)
        for owner, containers in other_hooks(self.loss_fn, self.optimizer).items():
            modules.refuse_hooks(owner, *containers)
        loss.check_network(reading.network)
        group_of = loop.groups_of(self.optimizer, self.module)
        trained = {
            short: group_of[parameter]
            for short, (_, parameter) in reading.slots.items()
            if parameter.requires_grad and parameter in group_of
        }
        if not trained:
            raise ArgumentError(
                "module: no parameter requires grad and is in a group of the optimizer; there is nothing to train"
            )
        return loss, trained, self._read_groups(self.optimizer.param_groups)

    def _read_groups(self, param_groups: Sequence[dict[str, Any]]) -> list[Group]:
        groups = [loop.read_group(self._kind, group, index) for index, group in enumerate(param_groups)]
        for index, (rule, _, _) in enumerate(groups):
            if rule.state_count > self._most_states:
                raise ArgumentError(
                    f"optimizer.param_groups[{index}]['momentum']: is {rule.momentum}, and was 0 in all groups when "
                    "the step was fused; call fuse again"
                )
        return groups

    def _refresh(self) -> None:
        """Read module, loss and optimizer again and follow their changes, or raise and change nothing."""
        reading = modules.read_module(self.module)
        self._tie.check_parameters(reading)
        loss, trained, groups = self._read(reading)
        self._tie.check_state(trained)
        self._follow(reading, loss, trained, groups)

    def _follow(self, reading: Reading, loss: Loss, trained: dict[str, int], groups: list[Group]) -> None:
        if any(reading.network.dropouts) and self._seed is None:
            self._seed = int(torch.randint(0, 1 << 62, ()))
        self._reading, self._loss, self._trained = reading, loss, trained
        self._device_type = reading.device.type
        self._real = np.dtype(f"f{reading.dtype.itemsize}")
        self._no_rows = math.nan if loss.reduction == "mean" else 0.0
        self._tie.adopt_state(trained)
        self._parameters = [slot.parameter for slot in reading.slots.values()]
        self._updated = [reading.slots[short].parameter for short in trained]
        self._increments = np.array([short in trained for short in reading.slots], self._tie.steps.dtype)
        self._partition(groups)
        self._watch = Watch(self.module, self.loss_fn, self.optimizer)

    def _partition(self, groups: list[Group]) -> None:
        """Divide the parameters into sets with equal rules, rates and numbers of updates."""
        self._groups, self._rates = groups, [group.rate for group in groups]
        self._values = [*map(loop.OPTIONS[self._kind], self.optimizer.param_groups)]
        self._form = loop.form(groups, of_numbers=not self._on_host)
        positions = {short: position for position, short in enumerate(self._reading.slots)}
        members: dict[Any, dict[str, TensorRule]] = {}
        for short, place in self._trained.items():
            rule, decay, rate = groups[place]
            key = (rule, rate, int(self._tie.steps[positions[short]]))
            members.setdefault(key, {})[short] = TensorRule(1.0, decay)
        sets = []
        self._places = [self._trained[next(iter(tensors))] for tensors in members.values()]
        for index, ((rule, rate, count), tensors) in enumerate(members.items()):
            if len(members) == 1:
                # one update knows the norm of all gradients
                rule = replace(rule, clip_norm=self._clip_norm)
            sets.append(UpdateSet(rule, tensors, count, self._clocks.started(index, rule, rate, count)))
        if [(new.rule, new.rules) for new in sets] == [(old.rule, old.rules) for old in self._sets]:
            # The bound updates stay valid.
            for new, old in zip(sets, self._sets, strict=True):
                new.numbers = old.numbers
            self._sets[:] = sets
        else:
            self._sets = sets
        # SGD counts no updates.
        self._counted = [
            (update_set, positions[next(iter(update_set.rules))])
            for update_set in sets
            if update_set.rule.kind == "adam"
        ]
        network, flattens, squeezes = self._reading.network, self._reading.flattens, self._reading.squeezes
        states = max(update_set.rule.state_count for update_set in sets)
        program_key = (network, flattens, squeezes, self._loss, frozenset(self._trained), states, len(sets) > 1)
        if program_key != self._key:
            self._key = program_key
            self._batches.clear()
            arguments = self._sets, self._seed or 0, self._clip_norm
            self._programs = Programs(self._memory, self._reading, self._loss, *arguments)
        self._programs.sets = self._sets

    def _follow_groups(self) -> None:
        """Follow changes in ``param_groups`` and updates by the optimizer's own ``step``."""
        groups = self.optimizer.param_groups
        rates = [rate if (rate := group["lr"]).__class__ is float else float(rate) for group in groups]
        values = [*map(loop.OPTIONS[self._kind], groups)]
        if values != self._values or rates != self._rates:
            self._follow_numbers(values, rates)
        steps = self._tie.steps
        for update_set, position in self._counted:
            if update_set.count != steps[position]:
                self._partition(self._groups)
                return

    def _follow_numbers(self, values: list[tuple[Any, ...]], rates: list[float]) -> None:
        """Give each set the numbers of its group, or divide the parameters anew."""
        groups = []
        for index, (before, old, new, rate) in enumerate(zip(self._groups, self._values, values, rates, strict=True)):
            rule = before.rule if new == old else loop.cycled(before.rule, new[0]) if new[1:] == old[1:] else None
            if rule is None:
                groups = self._read_groups(self.optimizer.param_groups)
                break
            groups.append(Group(rule, before.weight_decay, loop.read_rate(rate, index)))
        if loop.form(groups, of_numbers=not self._on_host) != self._form:
            self._partition(groups)
            return
        for update_set, place in zip(self._sets, self._places, strict=True):
            update_set.set_rate(rates[place])
            if groups[place].rule is not self._groups[place].rule:
                update_set.set_rule(groups[place].rule)
        self._groups, self._values, self._rates = groups, values, rates


def _open(reading: Reading, name: str, precision: str) -> Backend:
    """Return the backend for a module's element type and device; raises ArgumentError if none fits."""
    dtype, device = reading.dtype, reading.device
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"module: is on {device}, expected 'cpu' or 'cuda'; use module.to('cpu')")
    name = torch_backend(device.type) if name == "auto" else name
    traits = TRAITS.get(name)
    if traits is not None and traits.on_host and device.type != "cpu":
        raise ArgumentError(f"backend: {name!r} runs on the CPU, the module is on {device}; use module.to('cpu')")
    fitting = ("fp64",) if dtype == torch.float64 else ("fp32", "tf32")
    precision = fitting[0] if precision == "auto" else precision
    if precision not in fitting:
        raise ArgumentError(f"precision: a module in {dtype} can have {' or '.join(fitting)}, got {precision!r}")
    if precision == "fp64" and traits is not None and precision not in traits.precisions:
        raise DTypeError(
            f"module: torch.float64 needs fp64, which the {name} backend does not have; use module.float()"
        )
    return open_backend(name, str(device), precision)


fuse = FusedStep
