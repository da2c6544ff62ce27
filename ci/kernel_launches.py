"""The launches of the Triton backend for training steps, recorded without starting them, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import kernel_variants
import numpy as np
import torch

from fusemlp import MLP, SGD, Adam, Engine
from fusemlp.program.builder import Inputs
from fusemlp.runtime.steps import TrainingStep, bind
from fusemlp_kernels.triton import backend, configs
from fusemlp_kernels.triton.launch import TritonDevice


@dataclass(frozen=True)
class Recorded:
    """A launch: the kernel, its number of programs, its arguments by name, its constants and tile."""

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    tile: configs.Tile

    @property
    def name(self) -> str:
        """The kernel's name in ``kernel_variants``."""
        return next(name for name, kernel in kernel_variants.KERNELS.items() if kernel is self.kernel)

    def variant(self, precision: str) -> kernel_variants.Variant:
        """The kernel as it is compiled ahead."""
        kind = precision if self.name in kernel_variants.PRODUCTS else kernel_variants.ELEMENTS[precision]
        kind = "fp32" if self.name in ("norm", "advance", "turn") else kind
        return kernel_variants.Variant(self.name, kind, self.tile, self.constants)


class Recorder(TritonDevice):
    """A CPU device that poses as another, and records launches."""

    launches: list[Recorded]

    def launch(
        self, kernel: Any, programs: int, arguments: Mapping[str, Any], constants: Mapping[str, Any], tile: configs.Tile
    ) -> Callable[[], object]:
        """Record a launch."""
        self.launches.append(Recorded(kernel, programs, arguments, constants, tile))
        return lambda: None


@contextlib.contextmanager
def recording(target: str, precision: str, processors: int = 132) -> Iterator[list[Recorded]]:
    """Let engines of the Triton backend record their launches for ``target``; yield the list of them."""
    arch = configs.Architecture(configs.family_of(target), processors)
    # As under the interpreter, there is no card to wait for.
    device = Recorder(torch.device("cpu"), arch, precision, backend.COMPUTE[precision], True)
    object.__setattr__(device, "launches", [])
    with (
        mock.patch("fusemlp_kernels.registry._triton_reason", lambda: None),
        mock.patch.object(backend, "open_device", lambda *_: device),
    ):
        yield device.launches


@dataclass(frozen=True)
class Goal:
    """A network with a bound for its step in kernels/README.md, and ``aim`` microseconds as the aim of that bound. All
    ``models`` train at once."""

    sizes: tuple[int, ...]
    batch_size: int
    aim: int
    precision: str = "fp32"
    plan: str = "eager"
    optimizer: str = "sgd"
    models: int = 1

    @property
    def name(self) -> str:
        """Such as 784-10-10 b32 fp32 resident."""
        layers = "-".join(map(str, self.sizes))
        if len(set(self.sizes)) == 1:
            layers = f"{len(self.sizes) - 1} x {self.sizes[0]}"
        words = [layers, f"b{self.batch_size}", self.precision, *(["Adam"] if self.optimizer == "adam" else [])]
        words += [self.plan] if self.plan != "eager" else []
        return " ".join([*([f"{self.models} models of"] if self.models > 1 else []), *words])


GOALS = (
    Goal((784, 10, 10), 32, 8, plan="resident"),
    Goal((784, 128, 10), 128, 10),
    Goal((784, 512, 256, 10), 128, 18),
    Goal((1024,) * 5, 4096, 170, "bf16"),
    Goal((4096,) * 5, 8192, 4400, "bf16"),
    Goal((64, 32, 10), 32, 20, plan="resident", optimizer="adam", models=512),
)
# The card of the goals.
GOAL_TARGET, GOAL_PROCESSORS = "sm_90", 132


def _zeros(net: MLP, seed: int) -> dict[str, Any]:
    """Return parameters in place of those that a seed draws, which takes seconds for the largest network."""
    return {name: np.zeros(shape, np.float32) for name, shape in net.parameter_shapes().items()}


@functools.cache
def launches_of(goal: Goal) -> tuple[Recorded, ...]:
    """Return the launches of a step on the goals' card; the resident one is of one model."""
    made = recording(GOAL_TARGET, goal.precision, GOAL_PROCESSORS)
    with mock.patch.object(MLP, "initial_parameters", _zeros), made as found:
        optimizer = Adam() if goal.optimizer == "adam" else SGD()
        machine: dict[str, Any] = {"backend": "triton", "precision": goal.precision, "plan": goal.plan}
        engine = Engine(MLP(goal.sizes), optimizer=optimizer, batch_size=goal.batch_size, **machine)
        x = np.zeros((goal.batch_size, goal.sizes[0]), np.float32)
        target = np.arange(goal.batch_size) % goal.sizes[-1]
        if goal.plan in ("resident", "card", "chip"):
            engine.fit(x, target, epochs=1)
        else:
            arrays = {
                "x": engine.memory.backend.from_host(x, "compute"),
                "target": engine.memory.backend.from_host(target),
            }
            inputs = Inputs(goal.batch_size, indexed=True)
            spec, rule = engine.loss.spec(accuracy=False), engine.optimizer.rule()
            bind(engine, TrainingStep(inputs, spec, rule, goal.batch_size), arrays)
    # the operands' memory is not needed
    return tuple(dataclasses.replace(one, arguments=_numbers(one)) for one in found)


def _numbers(launch: Recorded) -> dict[str, Any]:
    """Return the numbers among a launch's arguments, and the tables of its tasks, layers or loss."""
    tables = ("table", "layers", "settings")
    return {name: value for name, value in launch.arguments.items() if name in tables or isinstance(value, int)}


def goal_variants(target: str) -> list[kernel_variants.Variant]:
    """Return the kernels of the goals' steps, if ``target`` is theirs."""
    goals = GOALS if target == GOAL_TARGET else ()
    found = [launch.variant(goal.precision) for goal in goals for launch in launches_of(goal)]
    return list({(one.kernel, one.name): one for one in found}.values())
