"""The session: a network with its loss and optimizer, bound to memory on a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fusemlp._version import __version__
from fusemlp.describe.checks import as_count, check_choice
from fusemlp.describe.conflicts import Features, check_together, in_use
from fusemlp.describe.description import stored
from fusemlp.describe.elsewhere import knows_names
from fusemlp.describe.losses import Loss, as_loss, loss_from_config
from fusemlp.describe.machine import Machine
from fusemlp.describe.network import MLP, as_network
from fusemlp.describe.optimizers import Optimizer, as_optimizer, optimizer_from_config
from fusemlp.describe.privacy import DPSGD, as_privacy
from fusemlp.describe.schedules import Schedule
from fusemlp.describe.summary import bytes_text, layer_lines
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.state import checked_state
from fusemlp.program.layout import short_names
from fusemlp.program.program import Program
from fusemlp.program.sharding import ORDERED, Sharding
from fusemlp.runtime import binding, joining, parameters, stepping
from fusemlp.runtime.backends import PRECISIONS, first_available
from fusemlp.runtime.bound import BoundProgram
from fusemlp.runtime.inference import Inference, InputScale
from fusemlp.runtime.keeping import Keeping
from fusemlp.runtime.memory import COMPUTE_BYTES, REAL_BYTES, Memory, Workspace
from fusemlp.runtime.plans import ASKED, choose_plan, shared_plan
from fusemlp.runtime.predicting import Predicting
from fusemlp.runtime.ranks import TIMEOUT, Ranks
from fusemlp.runtime.rates import RateTable
from fusemlp.runtime.spending import Spending
from fusemlp_kernels.contract import (
    FIRST_LOSS_SCALE,
    LEARNING_RATE,
    LOSS_SCALE,
    RATE_SCALE,
    SKIPPED,
    UPDATE_COUNT,
    UpdateRule,
    batch_parts,
)
from fusemlp_kernels.errors import ArgumentError

if TYPE_CHECKING:
    from fusemlp.training.history import FitState, History

Made = TypeVar("Made", bound="Session")

_TO_OPTIMIZER = "it belongs to the optimizer: Engine(net, optimizer=Adam(lr=0.001))"
_TO_FIT = "it belongs to fit: engine.fit(X, y, epochs=20)"
# Arguments of the constructor in other libraries.
ELSEWHERE = {
    **dict.fromkeys(("lr", "learning_rate", "weight_decay", "momentum", "clip_norm", "schedule"), _TO_OPTIMIZER),
    **dict.fromkeys(("epochs", "callbacks", "validation_data", "validation_split", "verbose", "shuffle"), _TO_FIT),
    "metrics": "it belongs to fit and evaluate: engine.fit(X, y, epochs=20, metrics=['auc'])",
    "class_weight": "it belongs to fit, or to the loss: CrossEntropy(class_weight=[1.0, 5.0])",
    "early_stopping": _TO_FIT,
    "dropout": "it belongs to the network: MLP([784, 128, 10], dropout=0.1)",
    "activation": "it belongs to the network: MLP([784, 128, 10], activation='relu')",
    "hidden": "the network has all widths: Engine(MLP([784, 128, 10]))",
    "network": "it is called net here: Engine(net)",
    "model": "it is called net here: Engine(net)",
    "loss_fn": "it is called loss here: Engine(net, loss='mse')",
    "random_state": "it is called seed here: Engine(net, seed=0)",
    "dtype": "it is called precision here: Engine(net, precision='fp32')",
}


class Session(Predicting, Spending, Keeping):
    """A network with its loss and optimizer, bound to memory on a backend: what trains, is saved and predicts.

    ``Engine`` is its public face and documents the arguments; fitting, checkpoints, fleets and export work on this.
    """

    program_against = binding.program_against
    lower = binding.lower
    bind = binding.bind
    bind_fit = binding.bind_fit
    bind_staged = binding.bind_staged
    step = stepping.step
    run_staged = stepping.run_staged
    check_scaling = stepping.check_scaling
    state_dict = parameters.state_dict
    load_state_dict = parameters.load_state_dict
    evaluated_tensors = parameters.evaluated_tensors
    tensors = parameters.tensors
    write_tensors = parameters.write_tensors
    join = joining.join
    keep_whole_state = joining.keep_whole_state
    whole = joining.whole
    put = joining.put

    @knows_names(ELSEWHERE, call="Engine(net, loss='mse', optimizer=Adam(lr=0.001), batch_size=32)")
    def __init__(
        self,
        net: MLP,
        loss: str | Loss = "cross_entropy",
        optimizer: str | Optimizer = "adam",
        batch_size: int = 32,
        seed: int = 0,
        backend: str = "auto",
        device: str | None = None,
        precision: str = "fp32",
        plan: str = "auto",
        normalise: Any = None,
        privacy: DPSGD | None = None,
        distributed: bool = False,
        reduce: str = ORDERED,
        timeout: float = TIMEOUT,
        shard_optimizer: bool = False,
    ) -> None:
        self.network = as_network("net", net)
        self.loss = as_loss(loss)
        self.optimizer = as_optimizer(optimizer)
        self.batch_size = as_count("batch_size", batch_size, minimum=1)
        self.seed = as_count("seed", seed, minimum=0)
        self.loss.check_network(net)
        self.optimizer.check_network(net)
        self.privacy = as_privacy(privacy)
        check_together(in_use(privacy=self.privacy, **{"measured rows": normalise is True}))
        self.start_spending([])
        self.start(Machine(backend, device, precision, plan))
        self.start_normalising(normalise)
        self.join(distributed, reduce, timeout, shard_optimizer)
        self.write_tensors(checked_state(net.parameter_shapes(), net.initial_parameters(self.seed), self._real), "")

    def like(self, kind: type[Made], **changes: Any) -> Made:
        """Return a new ``kind`` of session with the network, loss, optimizer, batch size, seed and machine of this one.

        ``changes`` are arguments of the constructor that differ. It trains alone; its seed draws its parameters.
        """
        given = {name: getattr(self, name) for name in ("loss", "optimizer", "batch_size", "seed")}
        machine = {name: getattr(self, name) for name in ("backend", "device", "precision")}
        return kind(**{"net": self.network, **given, **machine, **changes})

    def description(self) -> dict[str, Any]:
        """Return the arguments of the session, JSON-able; ``describe_from`` is its inverse."""
        return {
            "version": __version__,
            "network": self.network.to_config(),
            "loss": self.loss.to_config(),
            "optimizer": self.optimizer.to_config(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "precision": self.precision,
            "normalise": self.normalise,
            "privacy": self.privacy_config(),
        }

    def describe_from(self, config: Mapping[str, Any]) -> None:
        """Take a ``description``; what is left to do for a session whose constructor has not run is ``start``."""
        self.network = MLP.from_config(config["network"])
        self.loss = loss_from_config(config["loss"])
        self.optimizer = optimizer_from_config(config["optimizer"])
        self.loss.check_network(self.network)
        self.optimizer.check_network(self.network)
        self.batch_size = as_count("batch_size", config["batch_size"], minimum=1)
        self.seed = as_count("seed", config["seed"], minimum=0)
        self.precision = check_choice("precision", config["precision"], PRECISIONS)
        # older files do not have them
        self.normalise = stored("normalise", config.get("normalise"), bool | None)
        self.start_spending_from(config.get("privacy"))

    def start(self, machine: Machine) -> None:
        """Choose the backend and allocate; everything that a pickle does not carry."""
        self.precision = machine.precision
        # until it joins others
        self.ranks: Ranks | None = None
        self.sharding: Sharding | None = None
        self.backend = first_available() if machine.backend == "auto" else machine.backend
        self.plan, self.plan_reason = machine.plan, "" if machine.plan == "auto" else ASKED
        check_together(self.uses)
        if self.privacy is not None:
            self.privacy.check_size(self.precision)
        self._backend = joining.open_here(self.backend, machine.device, self.precision)
        self.device = self._backend.device
        self.plan, self.plan_reason = self._chosen(machine.plan, self.batch_size)
        self._scaled = self.precision == "fp16"
        self._real = np.dtype(f"f{REAL_BYTES.get(self.precision, 4)}")
        self._use_memory(None, None, None)
        self.memory.hyper[RATE_SCALE] = 1.0
        self.memory.hyper[LOSS_SCALE] = FIRST_LOSS_SCALE
        self._unchecked_steps = 0
        # the optimizer of ``step``, and its schedule, which knows of no end
        self._stepping: tuple[Optimizer, Schedule] | None = None
        # the loss's class weights, on the device
        self.class_weight: Any | None = None
        if self.loss.class_weight is not None:
            self.class_weight = self._backend.from_host(np.asarray(self.loss.class_weight, self._real))
        self.history: History | None = None
        self.fit_state: FitState | None = None
        self.best_parameters = None
        # (models, N): how far the last biases of merged models lie from their mean
        self.merged_biases: Array | None = None
        self.epochs_trained = 0
        self.stop_training = False

    def _use_memory(
        self, arenas: Mapping[str, Any] | None, schedule: Schedule | None, scale: InputScale | None, rows: int = 0
    ) -> None:
        rule = self.optimizer.rule()
        self._states = rule.states
        self.memory = memory = Memory(
            self.network,
            self._backend,
            rule.state_count,
            item_bytes=self._real.itemsize,
            compute_bytes=COMPUTE_BYTES.get(self.precision),
            gradient_parts=batch_parts(self._backend.traits, rows or self.batch_size, self.network.parameter_count),
            arenas=arenas,
            average=rule.average,
            rank=(self.ranks.rank, self.ranks.world)
            if self.ranks is not None and self.sharding is not None and self.sharding.slices
            else (0, 1),
        )
        # the learning rates of the updates to come, for those who launch steps
        self.rates = self._rate_table(rule)
        self.rates.schedule = schedule
        self._names = short_names(self.network)
        self._workspace = Workspace(self._backend)
        self._inference = Inference(self.network, memory, scale)
        self._staged: dict[tuple[bool, bool], BoundProgram] = {}
        self._last_fit = None

    def move_into(self, arenas: Mapping[str, Any]) -> None:
        """Keep what the engine keeps in these arrays from now on: flat ones like those of ``new_arenas``."""
        before = self.memory.arrays
        for name, array in arenas.items():
            # the table of rates is filled again
            if name != "rates":
                array[:] = before[name]
        self._use_memory(arenas, self.rates.schedule, self.input_scale)

    def take_batches_of(self, batch_size: int) -> None:
        """Change ``batch_size``: the engine trains on as one that was made with it.

        Raises BackendUnavailableError, before anything has changed, if the plan that was asked for is not there.
        """
        if batch_size == self.batch_size:
            return
        plan = self.plan if self.plan_reason == ASKED else "auto"
        chosen = self._chosen(plan, batch_size)
        self.make_room_for(batch_size)
        self.batch_size = batch_size
        self.plan, self.plan_reason = chosen
        self._staged.clear()

    def _chosen(self, plan: str, batch_size: int) -> tuple[str, str]:
        """The plan that ``plan`` comes to for batches of this size, and why."""
        traits, private, net = self._backend.traits, self.privacy is not None, self.network
        chosen = choose_plan(plan, traits, net.sizes, batch_size, self.precision, private=private, members=net.members)
        if self.ranks is None or self.sharding is None:
            return chosen
        return shared_plan(chosen, traits, self.sharding, self.ranks.uncaptured())

    def make_room_for(self, rows: int) -> None:
        """Let the gradients of a batch of ``rows`` be summed in as many parts as in an engine made for such batches."""
        if batch_parts(self._backend.traits, rows, self.network.parameter_count) > self.memory.gradient_parts:
            before = self.snapshot()
            self._use_memory(None, self.rates.schedule, self.input_scale, rows)
            self.restore(before)

    @property
    def uses(self) -> Features:
        """The features that it uses, for ``conflicts``."""
        on_host, asked = self.backend == "numpy", self.plan_reason == ASKED
        own = in_use(
            privacy=self.privacy,
            ranks=None if self.ranks is None else "distributed",
            normalise=self.normalise,
            **{
                self.precision: True,
                self.backend: True,
                "eager host": on_host and self.plan == "eager",
                "resident kernel": asked and not on_host and self.plan == "resident",
            },
        )
        return {**self.network.uses, **self.loss.uses, **self.optimizer.uses, **own}

    @property
    def program(self) -> Program:
        """The kernel calls of a training step in ``fit``, as data; printing it shows a table."""
        return binding.program_of_fit(self, resident=self.plan == "resident")

    def _take_rule(self, rule: UpdateRule) -> None:
        if rule != self.rates.rule:
            # another optimizer since the last fit
            self.rates = self._rate_table(rule)

    def _rate_table(self, rule: UpdateRule) -> RateTable:
        memory = self.memory
        return RateTable(
            self._backend, rule, memory.hyper, memory.rates, memory.counters, skips=self.precision == "fp16"
        )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        if self.rates.schedule is None:
            self.rates.follow(self.optimizer.schedule.over(None))
        return float(self.memory.hyper[LEARNING_RATE])

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the rates of the running ``fit`` by ``factor`` from the next update on; checkpoints keep it."""
        self._take_rate_scale(float(self.memory.hyper[RATE_SCALE]) * factor)

    def set_learning_rate(self, rate: float) -> None:
        """Let the next update have this rate, and those after it the rates of the schedule in the same proportion.

        Raises ArgumentError if the rate of the optimizer's own schedule is 0 now.
        """
        base = self.rates.base
        if not base:
            raise ArgumentError(
                f"rate: the optimizer's own rate is 0 now, and {rate!r} no multiple of it; give it one, Adam(lr=0.001)"
            )
        self._take_rate_scale(rate / base)

    def _take_rate_scale(self, scale: float) -> None:
        self.rates.rescale(scale)
        state = self.fit_state
        if state is not None:
            best, waited, _ = state.plateau
            state.plateau = best, waited, scale

    @property
    def update_count(self) -> int:
        """The number of updates applied so far."""
        return int(self.memory.counters[UPDATE_COUNT])

    @property
    def skipped_batches(self) -> int:
        """The number of batches that updated nothing, because their gradients overflowed in fp16."""
        return int(self.memory.counters[SKIPPED])

    def summary(self, print_fn: Callable[[str], object] = print) -> None:
        """Print the network, its training and the memory that it takes; ``print_fn`` gets the text instead."""
        net, memory = self.network, self.memory
        options = self.optimizer.options_for
        frozen = sum(math.prod(shape) for name, shape in net.parameter_shapes().items() if not options(name)[0])
        size = memory.layout.size * memory.real_bytes
        held = {
            "parameters": size,
            "optimizer state": sum(len(state) for state in memory.states) * memory.real_bytes,
            "gradients": size * memory.gradient_parts,
            "copy of the average": size * bool(memory.evaluated),
            "16-bit copy": memory.layout.size * (memory.compute_bytes or 0),
        }
        lines = layer_lines(net)
        lines[-1] += f", {frozen:,} of them frozen" if frozen else ""
        lines += [
            f"loss {self.loss.kind}, optimizer {self.optimizer.kind} with lr {self.optimizer.lr!r}, batch_size "
            f"{self.batch_size}, seed {self.seed}",
            f"{self.precision} on {self.backend} ({self.device}), plan {self.plan}: {self.plan_reason}; "
            f"{len(self.program.calls)} kernel calls a step",
            f"memory with padding: {', '.join(f'{name} {bytes_text(count)}' for name, count in held.items() if count)} "
            f"({bytes_text(sum(held.values()))}); {self.epochs_trained} epochs, {self.update_count} updates trained",
        ]
        print_fn("\n".join(lines))

    def release(self) -> None:
        """Give back the memory that steps and predictions work in, and on a GPU the data of the last fit; the next
        ones make it anew."""
        self._workspace = Workspace(self._backend)
        self._staged.clear()
        self._last_fit = None
        self._inference.release()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.network!r}, loss={self.loss!r}, optimizer={self.optimizer!r}, "
            f"batch_size={self.batch_size}, seed={self.seed}, backend={self.backend!r}, device={self.device!r}, "
            f"precision={self.precision!r}, plan={self.plan!r}"
            + ("" if self.normalise is None else f", normalise={self.normalise}")
            + ("" if self.privacy is None else f", privacy={self.privacy}")
            + ")"
        )
