"""The parameters of a torch module and of an engine: copied from one to the other, or tied.

Tied, the torch tensors are views of the engine's arenas.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusemlp.describe.checks import as_kind
from fusemlp.describe.losses import CrossEntropy, OwnLoss
from fusemlp.describe.optimizers import SGD, Adam, AdamW, Optimizer, ParameterOptions
from fusemlp.engine import Engine
from fusemlp.program.layout import short_names
from fusemlp.runtime.memory import Memory
from fusemlp.runtime.scaling import MEAN, SCALE
from fusemlp.torch import loop, modules
from fusemlp.torch.modules import Reading
from fusemlp_kernels.contract import UPDATE_COUNT
from fusemlp_kernels.errors import ArgumentError, ShapeError


def to_torch(engine: Engine) -> nn.Sequential:
    """Return the engine's network as an ``nn.Sequential`` on the CPU with copies of its parameters, in train mode.

    Its ``state_dict`` has the keys of ``engine.state_dict()``. Layers without parameters have names such as
    ``1_dropout``, so the numbers of the others do not change. The module of an engine that normalises its inputs starts
    with a layer ``normalise``, which does so; an encoding is a layer ``encoding``. The loss is not included: a
    classifier returns logits.
    """
    as_kind("engine", engine, Engine, "a fusemlp.Engine")
    engine.scaling.check_measured()
    net = engine.network
    net.check_single("engine", "to_torch")
    state = {name: torch.from_numpy(array) for name, array in engine.state_dict().items()}
    module = modules.as_sequential(net, engine.scaling.scale, next(iter(state.values())).dtype)
    module.load_state_dict(state)
    return module


def from_torch(
    module: nn.Module, loss_fn: Any = None, optimizer: torch.optim.Optimizer | None = None, **options: Any
) -> Engine:
    """Return an ``Engine`` that continues from the torch objects: network, parameters, loss, optimizer and its moments.

    ``loss_fn`` and ``optimizer`` default to the engine's own. ``options`` are the engine's: batch_size, seed, backend,
    device, plan, normalise; ``precision`` is the module's, and the layer ``normalise`` of ``to_torch`` is read too.
    Frozen parameters, and those in no group, stay frozen. Dropout rates are those of train mode, also for a module in
    eval mode. Raises ArgumentError for anything that cannot be converted.
    """
    reading = modules.read_module(module, for_engine=True)
    _check_modes(module, reading)
    if reading.flattens or reading.squeezes:
        what = "Flatten in front" if reading.flattens else "the squeeze of its output"
        raise ArgumentError(f"module: an engine's x is (n, K) and its output (n, N): take {what} out of the module")
    net = reading.network
    names = short_names(net)
    parameters = {names[short]: slot.parameter for short, slot in reading.slots.items()}
    group_of = dict.fromkeys(parameters.values(), 0) if optimizer is None else loop.groups_of(optimizer, module)
    trained = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad and tensor in group_of}
    frozen = {name: ParameterOptions(trainable=False) for name in names.values() if name not in trained}
    described: Optimizer = Adam(per_parameter=frozen)
    if optimizer is not None:
        described = _optimizer(optimizer, {name: group_of[tensor] for name, tensor in trained.items()}, frozen)
    loss = CrossEntropy() if loss_fn is None else loop.read_loss(loss_fn, reading)
    if isinstance(loss, OwnLoss):
        raise ArgumentError(f"loss_fn: an engine has no {loss.name}, or not with these options; train with fuse")
    if isinstance(loss, loop.PositiveWeights):
        raise ArgumentError(
            "loss_fn: an engine has no pos_weight; leave it out and give fit a sample_weight, or train with fuse"
        )
    precision = options.pop("precision", "fp64" if reading.dtype == torch.float64 else "fp32")
    state = {name: tensor.detach() for name, tensor in parameters.items()}
    if reading.normalise is not None:
        options["normalise"] = True
        state |= {MEAN: reading.normalise.mean, SCALE: reading.normalise.scale}
    engine = Engine(net, loss, described, precision=precision, **options)
    # A missing bias is a frozen one of zeros.
    zeros = {name: np.zeros(shape) for name, shape in net.parameter_shapes().items()}
    engine.load_state_dict({**zeros, **{name: tensor.cpu().numpy() for name, tensor in state.items()}})
    if optimizer is not None:
        _copy_moments(engine, optimizer, trained)
    return engine


def _check_modes(module: nn.Module, reading: Reading) -> None:
    """Raise ArgumentError for a module whose forward is not that of ``reading`` in train and in eval mode."""

    def network(reading: Reading) -> tuple[Any, ...]:
        parameters = [id(slot.parameter) for slot in reading.slots.values()]
        return reading.network, reading.flattens, reading.squeezes, reading.log_softmax, parameters

    modes = [(part, part.training) for part in module.modules()]
    try:
        for mode in (True, False):
            for part, _ in modes:
                part.training = mode
            if network(modules.read_module(module, for_engine=True)) != network(reading):
                raise ArgumentError(
                    "module: its forward does different things in train and eval mode, and an engine has one network; "
                    "use nn.Dropout for dropout, and nothing else that depends on the mode"
                )
    finally:
        for part, mode in modes:
            part.training = mode


def _optimizer(
    optimizer: torch.optim.Optimizer, groups: Mapping[str, int], frozen: Mapping[str, ParameterOptions]
) -> Optimizer:
    """Return the description of a torch optimizer; ``groups`` maps each trained parameter's name here to its group."""
    kind = loop.optimizer_kind(optimizer)
    if kind == "rmsprop":
        raise ArgumentError("optimizer: an engine has no RMSprop; use SGD, Adam or AdamW, or train with fuse")
    read = [loop.read_group(kind, group, index) for index, group in enumerate(optimizer.param_groups)]
    used = sorted(set(groups.values()))
    if not used:
        raise ArgumentError("optimizer: no group has a parameter of the module that requires grad")
    rate = max(read[index].rate for index in used)
    rule, decay, _ = read[used[0]]
    for index in used:
        if read[index].rule != rule:
            raise ArgumentError(
                f"optimizer.param_groups[{index}]: an engine has one momentum (or betas and eps) for all parameters; "
                f"group {used[0]} has others"
            )
    per_parameter = dict(frozen)
    for name, index in groups.items():
        factor, weight_decay = read[index].rate / rate if rate else 1.0, read[index].weight_decay
        if factor != 1.0 or weight_decay != decay:
            per_parameter[name] = ParameterOptions(lr_factor=factor, weight_decay=weight_decay)
    common: dict[str, Any] = {"weight_decay": decay, "per_parameter": per_parameter}
    if kind == "sgd":
        return SGD(rate, momentum=rule.momentum, nesterov=rule.nesterov, **common)
    return (AdamW if rule.decoupled else Adam)(rate, betas=(rule.beta1, rule.beta2), eps=rule.eps, **common)


def _copy_moments(engine: Engine, optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor]) -> None:
    """Copy the optimizer's moments of the trained parameters, and the number of its updates."""
    kind = loop.optimizer_kind(optimizer)
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in trained.items()}
    for index in range(len(engine.memory.states)):
        tensors = engine.memory.tensors(f"state{index}")
        for name, state in states.items():
            moment = state.get(str(loop.MOMENTS[kind][index]))
            if moment is not None:
                tensors[name] = moment.detach().cpu().numpy()
        engine.memory.write(tensors, f"state{index}")
    counts = {int(state.get("step", 0)) for state in states.values()} if kind == "adam" else {0}
    if len(counts) > 1:
        raise ArgumentError(
            f"optimizer.state: parameters were updated {sorted(counts)} times; an engine counts one number for all"
        )
    engine.memory.counters[UPDATE_COUNT] = counts.pop()


class Tie:
    """The parameters of a module and the moments of its optimizer, as views of ``memory``.

    ``slots`` and the collections of ``shorts`` are by the program's short names. The optimizer never gets moments of
    frozen or absent tensors.
    """

    def __init__(self, reading: Reading, optimizer: torch.optim.Optimizer, kind: str, memory: Memory) -> None:
        self.optimizer = optimizer
        self.slots = reading.slots
        double = torch.get_default_dtype() == torch.float64
        # The count of updates in torch's own type, one element a parameter; SGD has none.
        self.steps = np.zeros(len(self.slots), np.float64 if double else np.float32)
        self._arrays = memory.arrays
        self._pointers: dict[str, int] = {}
        # The optimizer's state of each parameter: a view by torch's name.
        self._state: dict[str, dict[str, Tensor]] = {}
        for index, short in enumerate(self.slots):
            views = [torch.as_tensor(memory.arrays[f"{short}.state{i}"]) for i in range(len(memory.states))]
            named = zip(loop.MOMENTS[kind], views, strict=False)
            self._state[short] = {name: view for name, view in named if name is not None}
            if kind != "sgd":
                self._state[short]["step"] = torch.from_numpy(self.steps[index : index + 1])[0]

    def move_parameters(self) -> None:
        """Copy the parameters into the arena and make them views of it."""
        for short, (_, parameter) in self.slots.items():
            view = torch.as_tensor(self._arrays[short])
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = None
            self._pointers[short] = parameter.data_ptr()

    def check_parameters(self, reading: Reading) -> None:
        """Raise ArgumentError, with the parameter's name, unless all are the fused ones in their place in the arena."""
        for short, (path, parameter) in reading.slots.items():
            if short not in self.slots or parameter is not self.slots[short].parameter:
                raise ArgumentError(f"module: {path} is not the parameter that was fused; call fuse again")
            if parameter.data_ptr() != self._pointers.get(short, parameter.data_ptr()):
                raise ArgumentError(
                    f"module: the memory of {path} was replaced after fuse (module.to(...), param.data = ..., or "
                    "another fuse); call fuse again, or copy values in place with param.data.copy_(...)"
                )
        if len(reading.slots) != len(self.slots):
            raise ArgumentError("module: has lost parameters since it was fused; call fuse again")

    def check_state(self, shorts: Collection[str]) -> None:
        """Raise ShapeError for a moment in ``optimizer.state`` with a wrong shape."""
        for short in shorts:
            path, parameter = self.slots[short]
            state = self.optimizer.state.get(parameter, {})
            for name, view in self._state[short].items():
                found = getattr(state.get(name), "shape", view.shape)
                if found != view.shape:
                    raise ShapeError(
                        f"optimizer.state: {name} of {path} has shape {tuple(found)}, expected {tuple(view.shape)}"
                    )

    def adopt_state(self, shorts: Collection[str]) -> None:
        """Copy the optimizer's state of these parameters into the arenas and replace it with views."""
        for short in shorts:
            for name, view in self._state[short].items():
                state = self.optimizer.state[self.slots[short].parameter]
                found = state.get(name)
                if found is not view:
                    view.copy_(torch.as_tensor(0.0 if found is None else found))
                    state[name] = view
