"""Convert torch modules to engines and back, by copying the values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fusemlp.describe.optimizers import SGD, Adam, AdamW, Optimizer, ParameterOptions
from fusemlp.engine import Engine
from fusemlp.program.layout import short_names
from fusemlp.torch import losses, modules, optimizers
from fusemlp_kernels.contract import UPDATE_COUNT
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

MODULES = {name: kind for kind, name in modules.PLAIN.items()}


def to_torch(engine: Engine) -> nn.Sequential:
    """Return the engine's network as an ``nn.Sequential`` on the CPU with copies of its parameters, in train mode.

    Its ``state_dict`` has the keys of ``engine.state_dict()``. Dropout layers have names such as ``1_dropout``, so the
    numbers of the other layers do not change. The loss is not included: a classifier returns logits.
    """
    if not isinstance(engine, Engine):
        raise ArgumentTypeError(f"engine: expected a fusemlp.Engine, got {engine!r}")
    net = engine.network
    state = {name: torch.from_numpy(array) for name, array in engine.state_dict().items()}
    dtype = next(iter(state.values())).dtype
    module = nn.Sequential()
    for layer, (inputs, outputs) in enumerate(zip(net.sizes, net.sizes[1:], strict=False)):
        module.add_module(str(2 * layer), nn.Linear(inputs, outputs, dtype=dtype))
        chosen, name = net.activations[layer], str(2 * layer + 1)
        if chosen.name == "leaky_relu":
            module.add_module(name, nn.LeakyReLU(chosen.slope))
        elif chosen.name == "prelu":
            module.add_module(name, nn.PReLU(dtype=dtype))
        elif chosen.name != "identity":
            module.add_module(name, MODULES[chosen.name]())
        if net.dropouts[layer]:
            module.add_module(f"{name}_dropout", nn.Dropout(net.dropouts[layer]))
    module.load_state_dict(state)
    return module


def from_torch(
    module: nn.Module, loss_fn: Any = None, optimizer: torch.optim.Optimizer | None = None, **options: Any
) -> Engine:
    """Return an ``Engine`` that continues from the torch objects: network, parameters, loss, optimizer and its moments.

    ``loss_fn`` and ``optimizer`` default to the engine's own. ``options`` are the engine's: batch_size, seed, backend,
    device, plan; ``precision`` is the module's. Frozen parameters, and those in no group, stay frozen. Dropout rates
    are those of train mode, also for a module in eval mode. Raises ArgumentError for anything that cannot be converted.
    """
    reading = modules.read_module(module, always_drops=True)
    dtype, _ = modules.check_tensors(reading)
    if reading.flattens or reading.squeezes:
        what = "Flatten in front" if reading.flattens else "the squeeze of its output"
        raise ArgumentError(f"module: an engine's x is (n, K) and its output (n, N): take {what} out of the module")
    net = reading.network
    names = short_names(net)
    slots = {short: reading.slots.get(short) for short in names}
    state = {
        name: np.zeros(shape) if slot is None else slot.parameter.detach().cpu().numpy()
        for (name, shape), slot in zip(net.parameter_shapes().items(), slots.values(), strict=True)
    }
    described: str | Optimizer = "adam"
    frozen = [
        name for short, name in names.items() if (slot := slots[short]) is None or not slot.parameter.requires_grad
    ]
    groups: dict[str, int] = {}
    if optimizer is not None:
        optimizers.check_parameters(optimizer, {id(parameter) for parameter in module.parameters()})
        group_of = optimizers.group_of_parameter(optimizer)
        for short, name in names.items():
            slot = slots[short]
            if name not in frozen and slot is not None and id(slot.parameter) in group_of:
                groups[name] = group_of[id(slot.parameter)]
        frozen = [name for name in names.values() if name not in groups]
        described = _optimizer(optimizer, groups, frozen)
    elif frozen:
        described = Adam(per_parameter={name: ParameterOptions(trainable=False) for name in frozen})
    loss = "cross_entropy" if loss_fn is None else losses.read_loss(loss_fn)
    precision = options.pop("precision", "fp64" if dtype == torch.float64 else "fp32")
    engine = Engine(net, loss, described, precision=precision, **options)
    engine.load_state_dict(state)
    if optimizer is not None:
        _copy_moments(engine, optimizer, {name: slots[short] for short, name in names.items() if name in groups})
    return engine


def _optimizer(optimizer: torch.optim.Optimizer, groups: dict[str, int], frozen: list[str]) -> Optimizer:
    """Return the description of a torch optimizer; ``groups`` maps each trained parameter's name here to its group."""
    kind = optimizers.optimizer_kind(optimizer)
    rules = [optimizers.read_group(kind, group, index) for index, group in enumerate(optimizer.param_groups)]
    rates = [optimizers.read_rate(group["lr"], index) for index, group in enumerate(optimizer.param_groups)]
    used = sorted(set(groups.values()))
    if not used:
        raise ArgumentError("optimizer: no group has a parameter of the module that requires grad")
    rate = max(rates[index] for index in used)
    for index in used:
        if rules[index].rule != rules[used[0]].rule:
            raise ArgumentError(
                f"optimizer.param_groups[{index}]: an engine has one momentum (or betas and eps) for all parameters; "
                f"group {used[0]} has others"
            )
    rule, decay = rules[used[0]].rule, rules[used[0]].weight_decay
    per_parameter = {name: ParameterOptions(trainable=False) for name in frozen}
    for name, index in groups.items():
        factor = rates[index] / rate if rate else 1.0
        if factor != 1.0 or rules[index].weight_decay != decay:
            per_parameter[name] = ParameterOptions(lr_factor=factor, weight_decay=rules[index].weight_decay)
    if kind == "sgd":
        return SGD(
            rate, momentum=rule.momentum, nesterov=rule.nesterov, weight_decay=decay, per_parameter=per_parameter
        )
    make = AdamW if rule.decoupled else Adam
    betas = (rule.beta1, rule.beta2)
    return make(rate, betas=betas, eps=rule.eps, weight_decay=decay, per_parameter=per_parameter)


def _copy_moments(engine: Engine, optimizer: torch.optim.Optimizer, slots: dict[str, Any]) -> None:
    """Copy the optimizer's moments and the number of its updates; ``slots``: the places of the trained parameters."""
    kind = optimizers.optimizer_kind(optimizer)
    states = {name: optimizer.state.get(slot.parameter, {}) for name, slot in slots.items()}
    for index in range(len(engine.memory.states)):
        tensors = engine.tensors(f".state{index}")
        for name, state in states.items():
            found = state.get(optimizers.MOMENTS[kind][index])
            if found is not None:
                tensors[name] = found.detach().cpu().numpy()
        engine.write_tensors(tensors, f".state{index}")
    counts = {int(state.get("step", 0)) for state in states.values()} if kind == "adam" else {0}
    if len(counts) > 1:
        raise ArgumentError(
            f"optimizer.state: parameters were updated {sorted(counts)} times; an engine counts one number for all"
        )
    engine.memory.counters[UPDATE_COUNT] = counts.pop()
