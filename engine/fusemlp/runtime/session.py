"""The session: a network with its loss and optimizer, bound to memory on a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from fusemlp._version import __version__
from fusemlp.describe.checks import as_count, as_number, check_choice, check_flag, knows_names
from fusemlp.describe.conflicts import Features, check_together, in_use, refused_by
from fusemlp.describe.description import Machine, stored
from fusemlp.describe.losses import Loss, LossLike, OwnLoss, as_loss
from fusemlp.describe.network import MLP, as_network
from fusemlp.describe.optimizers import Optimizer, Schedule, as_optimizer
from fusemlp.describe.privacy import DPSGD, as_privacy
from fusemlp.inputs.arrays import Array, checked_state
from fusemlp.inputs.examples import DeviceInputs
from fusemlp.program.builder import Pass
from fusemlp.program.passes import Narrow, sums_over
from fusemlp.program.program import ALONE, ORDERED, REDUCTIONS, Sharding
from fusemlp.runtime.inference import Inference
from fusemlp.runtime.ledger import Ledger
from fusemlp.runtime.memory import REAL_BYTES, Memory, RateTable
from fusemlp.runtime.plans import ASKED, PRECISIONS, choose_plan, first_available, open_here, shared_plan, was_asked
from fusemlp.runtime.programs import KeptPrograms
from fusemlp.runtime.ranks import TIMEOUT, Single, check_nccl, joined, versions
from fusemlp.runtime.scaling import MEAN, SCALE, Scaling, as_normalise
from fusemlp_kernels import contract
from fusemlp_kernels.coding import Coding
from fusemlp_kernels.contract import UpdateRule, batch_parts
from fusemlp_kernels.errors import ArgumentError, CheckpointError, FusemlpError

Made = TypeVar("Made", bound="Session")

# Features whose first layer does not read codes: each of these needs or changes the inputs themselves.
_DENSE = ("privacy", "normalise", "encoding")

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
    **dict.fromkeys(("network", "model"), "it is called net here: Engine(net)"),
    "loss_fn": "it is called loss here: Engine(net, loss='mse')",
    "random_state": "it is called seed here: Engine(net, seed=0)",
    "dtype": "it is called precision here: Engine(net, precision='fp32')",
    # of earlier releases
    "shard_optimizer": "it is gone: each process keeps the whole state of the optimizer now; leave it out",
}


class Session:
    """A network with its loss and optimizer, bound to memory on a backend: what trains, is saved and predicts.

    ``Engine`` is its public face and documents the arguments; fitting, checkpoints, fleets and export work on this.
    """

    @knows_names(ELSEWHERE, call="Engine(net, loss='mse', optimizer=Adam(lr=0.001), batch_size=32)")
    def __init__(
        self,
        net: MLP,
        loss: LossLike = "cross_entropy",
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
    ) -> None:
        self._describe(as_network("net", net), as_loss(loss), as_optimizer(optimizer), batch_size, seed)
        self.ledger = Ledger.of(as_privacy(privacy), self.batch_size)
        self.normalise = as_normalise(normalise, self.network.sizes[0])
        check_together(in_use(privacy=self.privacy, **{"measured rows": normalise is True}))
        self.start(Machine(backend, device, precision, plan))
        if normalise is not None and not isinstance(normalise, bool | np.bool_):
            self.scaling.scale = self.scaling.measured(self.inputs.features("normalise", normalise))
        self.join(distributed, reduce, timeout)
        drawn = net.initial_parameters(self.seed)
        self.memory.write(checked_state(net.parameter_shapes(), drawn, self.inputs.real))

    def _describe(self, network: MLP, loss: Loss, optimizer: Optimizer, batch_size: int, seed: int) -> None:
        self.network, self.loss, self.optimizer = network, loss, optimizer
        self.batch_size, self.seed = as_count("batch_size", batch_size), as_count("seed", seed, minimum=0)
        loss.check_network(network)
        optimizer.check_network(network)

    def like(self, kind: type[Made], **changes: Any) -> Made:
        """Return a new ``kind`` of session with the network, loss, optimizer, batch size, seed and machine of this one.

        ``changes`` are arguments of the constructor that differ. It trains alone; its seed draws its parameters.
        """
        names = ("loss", "optimizer", "batch_size", "seed", "backend", "device", "precision")
        return kind(**{"net": self.network, **{name: getattr(self, name) for name in names}, **changes})

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
            "privacy": self.ledger.to_config(self.update_count),
        }

    def describe_from(self, config: Mapping[str, Any]) -> None:
        """Take a ``description``; what is left to do for a session whose constructor has not run is ``start``."""
        network, loss = MLP.from_config(config["network"]), Loss.from_config(config["loss"])
        optimizer = Optimizer.from_config(config["optimizer"])
        self._describe(network, loss, optimizer, config["batch_size"], config["seed"])
        self.precision = check_choice("precision", config["precision"], PRECISIONS)
        # older files do not have them
        self.normalise = stored("normalise", config.get("normalise"), bool | None)
        self.ledger = Ledger.from_config(config.get("privacy"), self.batch_size)
        check_together(self.described)

    def start(self, machine: Machine) -> None:
        """Choose the backend and allocate; everything that a pickle does not carry."""
        self.precision = machine.precision
        # until it joins others
        self.ranks = Single()
        self.sharding = ALONE
        auto = machine.backend == "auto"
        self.backend = first_available(partial(refused_by, self.described)) if auto else machine.backend
        self.plan, self.plan_reason = machine.plan, "" if machine.plan == "auto" else ASKED
        check_together(self.uses)
        self.ledger.check(self.precision)
        backend = open_here(self.backend, machine.device, self.precision)
        real = np.dtype(f"f{REAL_BYTES.get(self.precision, 4)}")
        self.device = backend.device
        # the others have a first layer of dense inputs
        reads = backend.traits.reads_codes and not {*_DENSE} & self.described.keys()
        self.inputs = DeviceInputs(self.network, self.loss, backend, real, reads_codes=reads)
        # whether the weights of the first layer lie as codes read them
        self.coded = False
        self.plan, self.plan_reason = self.plan_for(machine.plan, self.batch_size)
        self.scaling = Scaling(self.inputs, self.normalise)
        self._use_loss(self.loss)
        self._use_memory(None, None)
        self.memory.hyper[contract.RATE_SCALE] = 1.0
        self.memory.hyper[contract.LOSS_SCALE] = contract.FIRST_LOSS_SCALE
        # the ``merged_biases`` of an engine that was merged
        self.merged: Array | None = None

    def join(self, distributed: bool, reduce: str, timeout: float) -> None:
        """With ``distributed`` train together with the other processes that torchrun has started.

        Raises what ``Ranks`` does, and ArgumentError or BackendUnavailableError for what cannot be trained so.
        """
        check_choice("reduce", reduce, REDUCTIONS)
        limit = as_number("timeout", timeout, low=0.0, low_open=True)
        if not check_flag("distributed", distributed):
            if reduce != ORDERED:
                raise ArgumentError(
                    f"reduce: {reduce!r} adds the gradients of several processes, and this one trains alone; start it "
                    "by torchrun, a script with distributed=True, or leave reduce out"
                )
            return
        # refused before the processes meet
        check_together({**self.uses, "ranks": "distributed"})
        if not any(self.optimizer.options_for(name)[0] for name in self.network.parameter_shapes()):
            raise ArgumentError("distributed: the optimizer trains no parameter, so there is no gradient to add")
        device = self.memory.backend.device
        if device != "cpu":
            check_nccl()
        ranks = joined(limit)
        sharding = Sharding(reduce, ranks.world).check()
        traits = self.memory.backend.traits
        plan = shared_plan((self.plan, self.plan_reason), traits, sharding, ranks.uncaptured())
        self.ranks, self.sharding = ranks, sharding
        self.plan, self.plan_reason = plan
        machine = {"reduce": sharding, "backend": self.backend, "plan": self.plan}
        ranks.check_same({**versions(), **self.description(), **machine})
        # after that: with another backend a rank has no card
        if device != "cpu":
            ranks.take_card(device)

    def _use_loss(self, loss: Loss) -> None:
        self.loss = self.inputs.loss = loss
        # the loss's class weights, on the device
        self.class_weight: Any | None = None
        if loss.class_weight is not None:
            self.class_weight = self.inputs.backend.from_host(np.asarray(loss.class_weight, self.inputs.real))

    def take_loss(self, loss: LossLike) -> None:
        """Change the loss: the engine trains on, predicts and evaluates as one that was made with it.

        Raises ArgumentError, ArgumentTypeError or BackendUnavailableError, before anything has changed.
        """
        before = self.loss
        # the same function at each step
        if loss is getattr(before, "function", before):
            return
        chosen = as_loss(loss)
        if isinstance(chosen, OwnLoss) and isinstance(before, OwnLoss) and before.like is not None:
            # of the function that a file names, predictions stay classes
            chosen = replace(chosen, like=before.like)
        if chosen == before:
            return
        chosen.check_network(self.network)
        self.loss = chosen
        try:
            check_together(self.uses)
            if chosen.on_host != before.on_host:
                self.plan, self.plan_reason = self._plan_of(self.batch_size)
        except FusemlpError:
            self.loss = before
            raise
        self._use_loss(chosen)
        self.inference.loss, self.inference.class_weight = chosen, self.class_weight
        if not (chosen.on_host and before.on_host):
            self.release()

    @contextmanager
    def taking(self, loss: LossLike | None) -> Iterator[None]:
        """Take the loss, if there is one; an error inside takes the one before again."""
        before = self.loss
        if loss is not None:
            self.take_loss(loss)
        try:
            yield
        except BaseException:
            self.take_loss(before)
            raise

    def release(self) -> None:
        """Give back the memory that fits, steps and predictions work in, and on a GPU the data of the last fit; the
        next ones make it anew."""
        self._memory.marked = {}
        self.programs.release()
        self.inference.forward.release()

    def _use_memory(self, arenas: Mapping[str, Any] | None, schedule: Schedule | None, rows: int = 0) -> None:
        rule, backend = self.optimizer.rule(), self.inputs.backend
        self._memory = memory = Memory(
            self.network,
            backend,
            self.precision,
            rule,
            gradient_parts=self._parts(rows or self.batch_size),
            arenas=arenas,
            coded=self.coded,
        )
        self._rates = self._rate_table(rule)
        self._rates.schedule = schedule
        self._inference = Inference(
            self.network, self.loss, memory, self.inputs, self.scaling, self.class_weight, self._narrow
        )
        self.programs = KeptPrograms(backend)

    def take_named(self, loss: Callable[..., Any] | Loss | None) -> None:
        """Take the function of the name that a file has; raises CheckpointError for others. None: it is given later."""
        if loss is None:
            return
        named = as_loss(loss)
        if "function" not in self.loss.uses or named.uses != self.loss.uses:
            names = [getattr(known, "name", known.kind) for known in (self.loss, named)]
            raise CheckpointError(
                f"loss: the file was trained with {names[0]!r}, got {names[1]!r}; give that one, or this to fit"
            )
        self.take_loss(named)

    def move_into(self, arenas: Mapping[str, Any]) -> None:
        """Keep what the engine keeps in these arrays from now on: flat ones like those of ``new_arenas``."""
        before = self.memory.arrays
        for name, array in arenas.items():
            # the table of rates is filled again
            if name != "rates":
                array[:] = before[name]
        self._use_memory(arenas, self.rates.schedule)

    def take_batches_of(self, batch_size: int) -> None:
        """Change ``batch_size``: the engine trains on as one that was made with it.

        Raises BackendUnavailableError, before anything has changed, if the plan that was asked for is not there.
        """
        if batch_size == self.batch_size:
            return
        chosen = self._plan_of(batch_size)
        self.make_room_for(batch_size)
        self.batch_size = batch_size
        self.plan, self.plan_reason = chosen
        self.programs.staged.clear()

    def _plan_of(self, batch_size: int) -> tuple[str, str]:
        """Return the plan for batches of this size under what was asked for, and why."""
        return self.plan_for(self.plan if was_asked(self.plan_reason) else "auto", batch_size)

    def plan_for(self, plan: str, batch_size: int, models: int = 1) -> tuple[str, str]:
        """Return the plan that ``plan`` comes to for ``models`` like this that train at once, and why."""
        traits, features = self.inputs.backend.traits, self.described
        chosen = choose_plan(plan, traits, self.network, batch_size, self.precision, models, features=features)
        return shared_plan(chosen, traits, self.sharding, self.ranks.uncaptured()) if self.sharding else chosen

    def _parts(self, rows: int) -> int:
        """The parts in which the gradients of a batch of ``rows`` are summed."""
        traits = self.inputs.backend.traits
        if self.plan == "narrow" and traits.narrow is not None:
            return traits.narrow.parts(rows)
        return batch_parts(traits, rows, self.network.parameter_count)

    def make_room_for(self, rows: int) -> None:
        """Let the gradients of a batch of ``rows`` be summed in as many parts as in an engine made for such batches."""
        if self._parts(rows) > self.memory.gradient_parts:
            before = self.memory
            self._use_memory(None, self.rates.schedule, rows)
            self.memory.take(before)
        # the plan may be another one by now
        self.inference.forward.passes = self._narrow

    def lay_out(self, coding: Coding | None) -> None:
        """Lay out the weights of the first layer for rows with a coding, or for dense ones with None."""
        if self.coded == (coding is not None):
            return
        before, self.coded = self.memory, coding is not None
        self._use_memory(None, self.rates.schedule)
        self.memory.take(before)

    @property
    def memory(self) -> Memory:
        """The memory between steps, for work on the current stream, which waits for the work on the stream before."""
        self._memory.backend.follow()
        return self._memory

    @property
    def rates(self) -> RateTable:
        """The learning rates of the updates to come, for those who launch steps."""
        self._memory.backend.follow()
        return self._rates

    @property
    def inference(self) -> Inference:
        """The inference of the session, on the current stream."""
        self._memory.backend.follow()
        return self._inference

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes that the program of each of its steps has."""
        return (*self.ledger.passes(self.precision), *sums_over(self.sharding), *self._narrow)

    @property
    def _narrow(self) -> tuple[Pass, ...]:
        return (Narrow(),) if self.plan == "narrow" else ()

    @property
    def described(self) -> Features:
        """The features of its description, for ``conflicts``."""
        features = in_use(privacy=self.privacy, normalise=self.normalise, **{self.precision: True})
        return {**self.network.uses, **self.loss.uses, **self.optimizer.uses, **features}

    @property
    def uses(self) -> Features:
        """The features that it uses where it trains, for ``conflicts``."""
        on_host, asked = self.backend == "numpy", was_asked(self.plan_reason)
        features = {
            "ranks": "distributed" if self.ranks.together else None,
            self.backend: True,
            "eager host": on_host and self.plan == "eager",
            "resident kernel": asked and not on_host and self.plan == "resident",
            f"{self.plan} plan": asked,
        }
        return {**self.described, **in_use(**features)}

    @property
    def merged_biases(self) -> Array | None:
        """The distances of merged models' last biases from their mean, (models, N); None once they learn together."""
        return None if self.update_count else self.merged

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go back to a snapshot of the memory, or to what it remembered."""
        self.memory.restore(snapshot)
        self.rates.forget()

    def state_dict(self) -> dict[str, Array]:
        """Copies of the parameters, by the names that torch gives them in the plain ``nn.Sequential``.

        With the optimizer's ``ema`` they are the averages that ``predict`` uses.
        With normalised inputs there are ``normalise.mean`` and ``normalise.scale`` (K,) too: the first layer takes
        (x - mean) / scale.
        """
        return {**self.memory.evaluated_tensors(), **self.scaling.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the parameters from array-likes with exactly the keys and shapes of ``state_dict``, or change nothing.

        The statistics of normalised inputs are among the keys once they are measured, and may be before.

        Raises ArgumentError for keys, ShapeError, DTypeError or DataError for values.
        """
        shapes = self.network.parameter_shapes()
        if self.normalise and (self.scaling.scale is not None or (isinstance(state, Mapping) and MEAN in state)):
            shapes |= dict.fromkeys((MEAN, SCALE), (self.network.sizes[0],))
        arrays = checked_state(shapes, state, self.inputs.real)
        self.scaling.take_tensors({name: arrays.pop(name) for name in (MEAN, SCALE) if name in arrays})
        self.memory.write(arrays)
        self.merged = None

    def take_rule(self, rule: UpdateRule) -> None:
        """Fill the table of rates for the steps of ``rule``: the optimizer may be another than in the last fit.

        Raises ArgumentError for an optimizer with another state than the one that the engine was made with.
        """
        before = self._rates.rule
        if rule == before:
            return
        if rule.states != before.states:
            kept = [", ".join(states) or "no state" for states in (rule.states, before.states)]
            raise ArgumentError(
                f"optimizer: it keeps {kept[0]}, and the engine was made for one that keeps {kept[1]}; make a new "
                "engine, and give it the weights by load_state_dict"
            )
        self._rates = self._rate_table(rule)

    def _rate_table(self, rule: UpdateRule) -> RateTable:
        memory = self._memory
        memory.accumulates = rule.accumulate > 1
        return RateTable(
            memory.backend, rule, memory.hyper, memory.rates, memory.counters, skips=self.precision == "fp16"
        )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        if self.rates.schedule is None:
            self.rates.follow(self.optimizer.schedule.over(None))
        return float(self.memory.hyper[contract.LEARNING_RATE])

    @property
    def privacy(self) -> DPSGD | None:
        """The differential privacy that it trains with; None without."""
        return self.ledger.privacy

    @property
    def update_count(self) -> int:
        """The number of updates applied so far."""
        return int(self.memory.counters[contract.UPDATE_COUNT])

    @property
    def skipped_batches(self) -> int:
        """The number of batches that updated nothing, because their gradients overflowed in fp16."""
        return int(self.memory.counters[contract.SKIPPED])

    def __repr__(self) -> str:
        options = {"normalise": self.normalise, "privacy": self.privacy}
        more = "".join(f", {name}={value}" for name, value in options.items() if value is not None)
        return (
            f"{type(self).__name__}({self.network!r}, loss={self.loss!r}, optimizer={self.optimizer!r}, "
            f"batch_size={self.batch_size}, seed={self.seed}, backend={self.backend!r}, device={self.device!r}, "
            f"precision={self.precision!r}, plan={self.plan!r}{more})"
        )
