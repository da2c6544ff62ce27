"""The session: a network with its loss and optimizer, bound to memory on a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp._version import __version__
from fusemlp.describe.adversarial import as_attack
from fusemlp.describe.checks import as_count
from fusemlp.describe.elsewhere import knows_names
from fusemlp.describe.hardening import Hardening
from fusemlp.describe.intervals import IBP
from fusemlp.describe.losses import Loss, as_loss, loss_from_config
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Optimizer, as_optimizer, optimizer_from_config
from fusemlp.describe.privacy import DPSGD, as_privacy
from fusemlp.describe.schedules import Schedule
from fusemlp.describe.summary import bytes_text, layer_lines
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.state import checked_state
from fusemlp.program.adversarial import Attack, Intervals, lowered_attack, lowered_intervals
from fusemlp.program.layout import short_names
from fusemlp.program.lowering import Inputs, lower_training
from fusemlp.program.program import Program
from fusemlp.program.sharding import ORDERED
from fusemlp.runtime.bound import BoundProgram
from fusemlp.runtime.inference import MEAN, SCALE, Inference, InputScale, member_rows
from fusemlp.runtime.joining import Joining, open_here
from fusemlp.runtime.keeping import Keeping
from fusemlp.runtime.memory import COMPUTE_BYTES, REAL_BYTES, Memory, Workspace
from fusemlp.runtime.plans import ASKED, choose_plan, shared_plan
from fusemlp.runtime.predicting import Predicting
from fusemlp.runtime.ranks import TIMEOUT
from fusemlp.runtime.rates import RateTable
from fusemlp.runtime.sharded import ShardedProgram
from fusemlp.runtime.spending import Spending
from fusemlp_kernels.contract import (
    FIRST_LOSS_SCALE,
    LAST_LOSS,
    LEARNING_RATE,
    LOSS_SCALE,
    RATE_SCALE,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_STEP,
    SKIPPED,
    SKIPPED_IN_A_ROW,
    SKIPPED_LIMIT,
    STATS,
    UPDATE_COUNT,
    LossSpec,
    Ridge,
    UpdateRule,
    batch_parts,
)
from fusemlp_kernels.errors import (
    ArgumentError,
    ArgumentTypeError,
    DivergenceError,
    ShapeError,
)

if TYPE_CHECKING:
    from fusemlp.training.history import FitState, History


# Steps between two checks of the loss scaling in ``step``: a check waits for the device.
SCALING_CHECKS = 32
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
EXAMPLES = {"backend": "auto", "precision": "fp32", "plan": "auto"}


def arena_of(suffix: str, prefix: str) -> str:
    """Return the name of the flat array that holds the tensors with these ends of their names."""
    return suffix.removeprefix(".") or ("grads" if prefix else "params")


class Session(Predicting, Spending, Keeping, Joining):
    """A network with its loss and optimizer, bound to memory on a backend: what trains, is saved and predicts.

    ``Engine`` is its public face and documents the arguments; fitting, checkpoints, fleets and export work on this.
    """

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
        if not isinstance(net, MLP):
            raise ArgumentTypeError(f"net: expected an MLP such as MLP([784, 128, 10]), got {net!r}")
        self.network = net
        self.loss = as_loss(loss)
        self.optimizer = as_optimizer(optimizer)
        self.batch_size = as_count("batch_size", batch_size, minimum=1)
        self.seed = as_count("seed", seed, minimum=0)
        self.loss.check_network(net)
        self.optimizer.check_network(net)
        self.precision = precision
        self.privacy = as_privacy(privacy)
        if self.privacy is not None:
            self.privacy.check(net, self.loss, self.optimizer, precision=precision, normalise=normalise)
        self.start_spending([])
        self.start(backend, device, plan)
        self.start_normalising(normalise)
        self.join(distributed, reduce, timeout, shard_optimizer)
        self.write_tensors(checked_state(net.parameter_shapes(), net.initial_parameters(self.seed), self._real), "")

    def description(self) -> dict[str, Any]:
        """Return the arguments of the session, JSON-able; ``start_from`` is its inverse."""
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

    def start_from(self, config: Mapping[str, Any], *, backend: str, device: str | None) -> None:
        """Start a session whose constructor has not run from a ``description``; its parameters are zero."""
        self.network = MLP.from_config(config["network"])
        self.loss = loss_from_config(config["loss"])
        self.optimizer = optimizer_from_config(config["optimizer"])
        self.batch_size, self.seed = config["batch_size"], config["seed"]
        self.precision = config["precision"]
        # older files do not have them
        self.normalise = config.get("normalise")
        self.start_spending_from(config.get("privacy"))
        self.start(backend, device, "auto")

    def start(self, name: str, device: str | None, plan: str) -> None:
        """Choose the backend and allocate; everything that a pickle does not carry."""
        for argument, value in (("backend", name), ("precision", self.precision), ("plan", plan)):
            if not isinstance(value, str):
                raise ArgumentTypeError(f"{argument}: expected a name such as {EXAMPLES[argument]!r}, got {value!r}")
        if device is not None and not isinstance(device, str):
            raise ArgumentTypeError(f"device: expected a name such as 'cpu', or None for the default, got {device!r}")
        # until it joins others
        self.ranks = self.sharding = None
        self._backend = open_here(name, device, self.precision)
        traits = self._backend.traits
        self.backend = traits.name
        self.device = self._backend.device
        self.plan, self.plan_reason = self._chosen(plan, self.batch_size)
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
        self,
        arenas: Mapping[str, Any] | None,
        schedule: Schedule | None,
        scale: InputScale | None,
        rows: int = 0,
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
    def program(self) -> Program:
        """The kernel calls of a training step in ``fit``, as data; printing it shows a table."""
        return self._program(None, resident=self.plan == "resident")

    def program_against(self, adversarial: Any) -> Program:
        """Return ``program`` for ``fit(adversarial=...)``: the calls of the attack come first."""
        resident = self.plan == "resident" and self._backend.traits.on_host
        if isinstance(adversarial, IBP):
            return self._program(None, resident=resident, intervals=lowered_intervals(adversarial, 0, 1))
        if not isinstance(adversarial, Hardening):
            adversarial = as_attack("adversarial", adversarial)
        return self._program(lowered_attack(adversarial), resident=resident)

    def _program(self, attack: Attack | None, *, resident: bool, intervals: Intervals | None = None) -> Program:
        return self.lower(
            Inputs(self.batch_size, indexed=True),
            self.loss.spec(accuracy=self.loss.is_classification),
            self.optimizer.rule(),
            self.batch_size,
            resident=resident,
            attack=attack,
            intervals=intervals,
        )

    def lower(
        self,
        inputs: Inputs,
        spec: LossSpec,
        rule: UpdateRule,
        batch_size: int,
        *,
        keep_gradients: bool = False,
        resident: bool = False,
        ridge: Ridge | None = None,
        attack: Attack | None = None,
        intervals: Intervals | None = None,
    ) -> Program:
        """The program of a training step, or with ``resident`` of a loop over steps; with the loss's class weights."""
        if self.class_weight is not None:
            inputs = replace(inputs, class_weighted=True)
        sharding = self.sharding
        return lower_training(
            self.network,
            spec,
            rule,
            self.optimizer.options_for,
            batch_size if sharding is None else sharding.rows(batch_size),
            self._backend.traits,
            self.memory.layout,
            inputs,
            seed=self.seed,
            real_bytes=self.memory.real_bytes,
            compute_bytes=self.memory.compute_bytes,
            scaled=self._scaled,
            most_parts=self.memory.gradient_parts,
            keep_gradients=keep_gradients,
            resident=resident,
            ridge=ridge,
            privacy=self.lowered_privacy(),
            attack=attack,
            sharding=sharding,
            intervals=intervals,
        )

    def bind(
        self,
        inputs: Inputs,
        spec: LossSpec,
        rule: UpdateRule,
        batch_size: int,
        given: Mapping[str, Any],
        *,
        keep_gradients: bool = False,
        resident_batches: int | None = None,
        epochs: int = 1,
        ridge: Ridge | None = None,
        attack: Attack | None = None,
        intervals: Intervals | None = None,
    ) -> BoundProgram:
        """A training step bound to the engine's memory and to the arrays in ``given`` (x, target, weight).

        With ``keep_gradients`` the last of its ``calls`` is ``update`` alone, and the one before it leaves the
        gradients in the engine's memory. With ``resident_batches`` the steps run in one loop, over rows of ``epochs``
        epochs of this many batches, or over the data as the batch, with ``ridge`` as a penalty beside the loss.

        Raises ArgumentError for an optimizer with another state than the one that the engine was made with.
        """
        if rule.states != self._states:
            kept = [", ".join(states) or "no state" for states in (rule.states, self._states)]
            raise ArgumentError(
                f"optimizer: it keeps {kept[0]}, and the engine was made for one that keeps {kept[1]}; make a new "
                "engine, and give it the weights by load_state_dict"
            )
        self._take_rule(rule)
        arrays = dict(given)
        if self.class_weight is not None:
            arrays["class_weight"] = self.class_weight
        resident = resident_batches is not None
        if resident_batches is not None:
            allocate = self._backend.allocate
            if inputs.indexed and "rows" not in arrays:
                arrays["rows"] = allocate(epochs * resident_batches * batch_size * self.network.members, "int64")
            if epochs > 1:
                epoch_stats = allocate(epochs * STATS, "float64")
                arrays["epoch_stats"] = self._backend.view(epoch_stats, 0, (epochs, STATS), STATS)
        program = self.lower(
            *(inputs, spec, rule, batch_size),
            keep_gradients=keep_gradients,
            resident=resident,
            ridge=ridge,
            attack=attack,
            intervals=intervals,
        )
        if self.ranks is not None:
            return ShardedProgram(program, self.memory, self._workspace, arrays, self.ranks, plan=self.plan)
        plan = self.plan
        if (attack is not None or intervals is not None) and plan == "resident" and not resident:
            # a step against attacks is many launches
            plan = self._backend.traits.plans[-2]
        return BoundProgram(program, self.memory, self._workspace, arrays, plan=plan)

    def bind_fit(
        self,
        inputs: Inputs,
        spec: LossSpec,
        rule: UpdateRule,
        batch_size: int,
        data: Mapping[str, Any],
        *,
        batches: int,
        epochs: int,
        resident: bool,
        attack: Attack | None = None,
        intervals: Intervals | None = None,
    ) -> BoundProgram:
        """The steps of a fit on ``data``, with room for the rows of ``epochs`` epochs of ``batches`` batches."""

        def bound(there: Mapping[str, Any]) -> BoundProgram:
            rows = self._backend.allocate(epochs * batches * batch_size * self.network.members, "int64")
            return self.bind(
                *(inputs, spec, rule, batch_size, {**there, "rows": rows}),
                resident_batches=batches if resident else None,
                epochs=epochs,
                attack=attack,
                intervals=intervals,
            )

        self._take_rule(rule)
        told = (inputs, spec, rule, batch_size, batches, epochs, resident, attack, intervals)
        key = (told, self.optimizer, self.seed, self.lowered_privacy())
        return self.bound_again(key, data, bound)

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

    def step(self, x: Any, y: Any, sample_weight: Any = None) -> Any:
        """One update from 1 to ``batch_size`` rows: x (m, K), y as in ``fit``, sample_weight (m,).

        Arrays on the device are read in place; checking their labels waits for it (``fit`` checks them once).

        Returns the loss before the update as a 0-d array of its own (on a GPU a torch tensor); reading it is what
        waits for the device.
        Raises ShapeError, DTypeError or DataError, before anything has changed; ArgumentError if the inputs shall be
        normalised and have not been measured.
        """
        if self.privacy is not None:
            raise ArgumentError("step: a private engine draws the rows of each step at random from all; use fit")
        if self.ranks is not None:
            raise ArgumentError("step: a distributed engine trains in fit, which splits the rows; use fit")
        x = self.features("x", x, check_finite=False)
        count = len(x)
        if count > self.batch_size:
            raise ShapeError(
                f"x: expected 1 to {self.batch_size} rows (batch_size), got {count}; "
                "make the engine with a larger batch_size, or use fit"
            )
        targets = self.targets("y", y, rows=count)
        weight = self.weights("sample_weight", sample_weight, rows=count)
        if self._stepping is None or self._stepping[0] is not self.optimizer:
            self._stepping = self.optimizer, self.optimizer.schedule.over(None)
            self._staged.clear()
        if not self._staged and not self.epochs_trained:
            self.check_measured()
            self.warn_of_scale("x", x, stacklevel=3)
        bound = self._staged_program(targets.soft, weight is not None)
        try:
            self.rates.cover(self._stepping[1], 1)
            self.run_staged(bound, self.normalised(x), targets.values, weight)
        except BaseException:
            # Ctrl-C too: only the device knows whether there was an update
            self.rates.forget()
            raise
        if self._scaled:
            self._unchecked_steps += 1
            if self._unchecked_steps == SCALING_CHECKS:
                # waits for the device
                self.check_scaling(self.memory.counters, self.memory.hyper)
        return self._backend.scalar(bound.arrays["stats"], LAST_LOSS)

    def run_staged(self, bound: BoundProgram, x: Any, target: Any, weight: Any | None) -> None:
        """Copy checked rows into a program that has a batch of its own, as many as it holds or fewer, and run it."""
        copy, arrays, count = self._backend.copy_into, bound.arrays, len(x)
        short, counters = count < len(arrays["x"]), arrays["counters"]
        counters[ROW_STEP], counters[ROW_COUNT] = 0, count * self.network.members
        for name, array in (("x", x), ("target", target), ("weight", weight)):
            if array is not None:
                copy(arrays[name][:count], array)
                if short:
                    arrays[name][count:] = 0
        if "rows" not in arrays:
            bound.run()
            return
        # rows that a fit walks through: it goes on where it was
        before = counters[ROW_OFFSET] + 0
        counters[ROW_OFFSET] = 0
        try:
            bound.run()
        finally:
            counters[ROW_OFFSET] = before

    def check_scaling(self, counters: Any, hyper: Any) -> None:
        """Raise DivergenceError if the gradients overflow at every loss scale, by these counters and hyper."""
        self._unchecked_steps = 0
        skipped = int(counters[SKIPPED_IN_A_ROW])
        if skipped >= SKIPPED_LIMIT:
            raise DivergenceError(
                f"loss: the gradients overflowed in {skipped} batches in a row, down to a loss scale of "
                f"{float(hyper[LOSS_SCALE]):.3g}; lower the learning rate, scale the features, or use "
                "precision='bf16' or 'fp32'"
            )

    @property
    def skipped_batches(self) -> int:
        """The number of batches that updated nothing, because their gradients overflowed in fp16."""
        return int(self.memory.counters[SKIPPED])

    def _staged_program(self, soft: bool, weighted: bool) -> BoundProgram:
        key = (soft, weighted)
        if key not in self._staged:
            spec = self.loss.spec(accuracy=False, soft=soft)
            self._staged[key] = self.bind_staged(self.batch_size, spec, weighted=weighted)
        return self._staged[key]

    def bind_staged(self, rows: int, spec: LossSpec, *, weighted: bool) -> BoundProgram:
        """Return a training step with a batch of its own, up to ``rows`` rows, for ``run_staged``."""
        # on a GPU the resident kernel is for many steps
        batches = 1 if self.plan == "resident" and self._backend.traits.on_host else None
        members, given = self.network.members, dict[str, Any]()
        # a rank picks the rows of its shards
        picks = members > 1 or self.ranks is not None
        if picks:
            given["rows"] = member_rows(self._backend, rows, members)
        inputs = Inputs(rows, indexed=picks, weighted=weighted)
        return self.bind(inputs, spec, self.optimizer.rule(), rows, given, resident_batches=batches)

    def summary(self, print_fn: Callable[[str], object] = print) -> None:
        """Print the network, its training and the memory that it takes; ``print_fn`` gets the text instead."""
        net, memory = self.network, self.memory
        frozen = sum(
            math.prod(shape)
            for name, shape in net.parameter_shapes().items()
            if not self.optimizer.options_for(name)[0]
        )
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

    def state_dict(self) -> dict[str, Array]:
        """Copies of the parameters, by the names that torch gives them in the plain ``nn.Sequential``.

        With the optimizer's ``ema`` they are the averages that ``predict`` uses.
        With normalised inputs there are ``normalise.mean`` and ``normalise.scale`` (K,) too: the first layer takes
        (x - mean) / scale.
        """
        return {**self.evaluated_tensors(), **self.scale_tensors}

    def evaluated_tensors(self) -> dict[str, Array]:
        """Copies of what predictions use: the parameters, or their averages."""
        return self.tensors(self.memory.evaluated)

    def tensors(self, suffix: str, prefix: str = "", *, everywhere: bool = True) -> dict[str, Array]:
        """Copies of one array per parameter: the parameters (""), or another arena's (".state0"; prefix "d"). Of an
        arena of which ranks have slices there are none without ``everywhere``, but on rank 0."""
        arena = arena_of(suffix, prefix)
        flat = self.whole(arena, everywhere=everywhere)
        if flat is None:
            return {}
        views = self.memory.layout.views(self._backend, flat)
        return {name: self._backend.to_host(views[short]) for short, name in self._names.items()}

    def write_tensors(self, tensors: Mapping[str, Array], suffix: str, prefix: str = "") -> None:
        """The inverse of ``tensors``; the padding around them becomes zero again, whatever a lost step left there.

        An average of the parameters begins anew with them.
        """
        if not suffix and not prefix and self.memory.evaluated:
            self.write_tensors(tensors, self.memory.evaluated)
        arena, memory = arena_of(suffix, prefix), self.memory
        sliced = arena in memory.sliced
        flat = self._backend.allocate(memory.layout.size, "real") if sliced else memory.arrays[arena]
        flat[:] = 0.0
        views = memory.layout.views(self._backend, flat)
        for short, name in self._names.items():
            self._backend.copy_into(views[short], tensors[name])
        if sliced:
            self.put(arena, flat)
        if not prefix and not suffix:
            self.memory.refresh_shadow()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the parameters from array-likes with exactly the keys and shapes of ``state_dict``, or change nothing.

        The statistics of normalised inputs are among the keys once they are measured, and may be before.

        Raises ArgumentError for keys, ShapeError, DTypeError or DataError for values.
        """
        shapes = self.network.parameter_shapes()
        if self.normalise and (self.input_scale is not None or (isinstance(state, Mapping) and MEAN in state)):
            shapes |= dict.fromkeys((MEAN, SCALE), (self.network.sizes[0],))
        arrays = checked_state(shapes, state, self._real)
        self.take_scale({name: arrays.pop(name) for name in (MEAN, SCALE) if name in arrays})
        self.write_tensors(arrays, "")

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
