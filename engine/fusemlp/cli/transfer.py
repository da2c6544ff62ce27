"""``train --from RUN``: the parts of another run that a training takes over, and the probe before it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.cli import recipe
from fusemlp.cli.defaults import is_a_table
from fusemlp.cli.options import TrainOptions
from fusemlp.datasets.dates import part_names
from fusemlp.datasets.load import Dataset
from fusemlp.datasets.prepare import fit_preprocessor, network_ends
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.sources import is_table
from fusemlp.datasets.tables import listed
from fusemlp.describe.checks import as_count
from fusemlp.describe.network import MLP
from fusemlp.engine import Engine, load
from fusemlp.inputs.arrays import Array
from fusemlp.report.runs import Run, open_run, read_training_rows, weights_path
from fusemlp.training.transfer import taken_over
from fusemlp_kernels.errors import ArgumentError, DivergenceError

if TYPE_CHECKING:
    from fusemlp.cli.prepare import Prepared

# Options that decide what the run has decided.
_DECIDED = ("hidden", "activation", "slope", "output_activation", "init", "scale", "drop", "keep", "categorical")
_LOSS = ("loss", "label_smoothing", "delta", "quantile")


@dataclass(frozen=True, eq=False)
class Start:
    """The ``parameters`` that a training starts with, of the network in ``engine``; ``about`` them, for the report."""

    parameters: Mapping[str, Array]
    engine: Engine
    about: dict[str, Any]

    def write(self, run: Run) -> None:
        """Keep the network in the run's folder: a training that was cut off may have to start anew."""
        self.engine.save(run.checkpoint("start"))

    @classmethod
    def stored(cls, run: Run, about: dict[str, Any], net: MLP, options: TrainOptions) -> Start:
        """Return the start of a run for its network."""
        engine = _loaded(run.checkpoint("start"), options)
        return cls(taken_over(net, engine.state_dict(), about["layers"])[0], engine, about)


@dataclass(frozen=True, eq=False)
class Source:
    """The run of ``--from``."""

    run: Run
    config: dict[str, Any]
    preprocessor: Preprocessor
    engine: Engine

    @classmethod
    def opened(cls, options: TrainOptions) -> Source | None:
        """Return the run of the options, None without ``--from``; refuse options that do not go with it."""
        if options.from_run is None:
            for name in ("freeze", "probe", "layer_decay"):
                if getattr(options, name) != getattr(TrainOptions, name):
                    raise ArgumentError(
                        f"{name}: it is for layers that are learned already; say of which run: --from RUN"
                    )
            return None
        for name in _DECIDED:
            if getattr(options, name) != getattr(TrainOptions, name):
                raise ArgumentError(
                    f"{name}: the run of --from decides it, with its network and the preparation of its columns; leave "
                    "one of the options out"
                )
        as_count("probe", options.probe, minimum=0)
        run, config = open_run(options.from_run)
        engine = _loaded(weights_path(run, "model"), options)
        if options.probe and engine.network.layers == 1:
            raise ArgumentError(f"probe: {options.from_run!r} has no hidden layer, so the output layer is all there is")
        return cls(run, config, Preprocessor.from_config(config["preprocessor"]), engine)

    def filled_in(self, options: TrainOptions) -> TrainOptions:
        """Return the options with the run's target, and of the same target its task and its loss, unless given."""
        changes: dict[str, Any] = {}
        name = self.preprocessor.target_name
        inputs = self.columns
        if is_a_table(options) and is_table(Path(self.config["data"]["source"])):
            if options.target in (None, name):
                changes = {"target": name, "task": options.task or self.preprocessor.task}
                if changes["task"] == self.preprocessor.task and options.loss is None:
                    changes |= {one: self.config["options"][one] for one in _LOSS if getattr(options, one) is None}
            for option in ("target", "group", *(["id"] if options.id else [])):
                given = getattr(options, option)
                for one in given if isinstance(given, list) else [given]:
                    if one in inputs:
                        raise ArgumentError(
                            f"{option}: {one!r} is an input of the network of {str(self.run.path)!r}; choose another "
                            "column, or train without --from"
                        )
        if options.models is None and any(one.name == "prelu" for one in self.engine.network.activations):
            # such networks cannot be merged
            changes["models"] = 1
        return replace(options, **changes)

    @property
    def trained_on(self) -> Array | None:
        """The hashes of the run's training rows; None for a run of an earlier release."""
        return read_training_rows(self.run)

    @property
    def columns(self) -> set[str]:
        """The columns of a table that are inputs."""
        parts = part_names(name for name, _ in self.preprocessor.dates)
        return {parts.get(name, name) for name in self.preprocessor.feature_names}

    def noted(self, dataset: Dataset) -> Dataset:
        """Return the data set with a note on columns that the run did not have."""
        known = {*self.columns, *self.preprocessor.ids, *self.preprocessor.unused}
        strange = [role.name for role in dataset.roles if role.kind == "dropped" and role.name not in known]
        note = f"columns that {self.run.path} did not have, ignored: {listed(strange)}"
        return replace(dataset, notes=(*dataset.notes, note)) if strange else dataset

    def start(self, dataset: Dataset, rows: Array, options: TrainOptions, loss: str) -> tuple[Preprocessor, MLP, Start]:
        """Return preprocessor and network for a data set with these training rows, and the start of the training.

        The output layer, with the scale of a regression's targets, is the run's if the target means the same.
        """
        like, known = self.preprocessor, self.engine.network
        other = self._difference(dataset, loss, options)
        made = fit_preprocessor(dataset, rows, loss=loss, like=like, log_targets=bool(other and options.log_target))
        if not other:
            names = ("target_shift", "target_scale", "target_log", "target_low")
            made = replace(made, **{name: getattr(like, name) for name in names})
        elif known.layers == 1:
            raise ArgumentError(f"from: {str(self.run.path)!r} has an output layer alone, and it is of no use: {other}")
        sizes = (*known.sizes[:-1], network_ends(made, loss)[1])
        dropouts = (
            known.dropouts if options.dropout == TrainOptions.dropout else recipe.network(sizes, options).dropouts
        )
        net = MLP(
            sizes,
            activation=known.activations[:-1],
            output_activation="identity" if other else known.activations[-1],
            dropout=dropouts[:-1],
            init=known.init,
        )
        kept = known.layers - 1 if other else known.layers
        parameters, _ = taken_over(net, self.engine.state_dict(), kept)
        about = {
            "run": str(self.run.path.absolute()),
            "layers": kept,
            "of_layers": known.layers,
            "new_output_layer": other or None,
            **{name: getattr(options, name) for name in ("freeze", "probe", "layer_decay")},
        }
        return made, net, Start(parameters, self.engine, about)

    def _difference(self, dataset: Dataset, loss: str, options: TrainOptions) -> str:
        """Return the reason for which the target is not that of the run; empty if it means the same."""
        like, kind = self.preprocessor, self.config["loss"]["kind"]
        if dataset.roles and dataset.target_name != like.target_name:
            return f"the target there is {like.target_name!r}"
        if dataset.task != like.task:
            return f"the target there is of a {like.task}"
        if like.classes is not None and tuple(dataset.classes.tolist()) != like.classes:
            return f"the classes there are {listed(like.classes)}"
        if like.classes is None and (1 if dataset.y.ndim == 1 else dataset.y.shape[1]) != like.outputs:
            return f"there are {like.outputs} targets there"
        if loss != kind:
            return f"the loss there is {kind}"
        if options.log_target not in (None, like.target_log):
            return f"targets there are learned {'in logarithms' if like.target_log else 'as they are'}"
        return ""


def lines(start: Start, net: MLP) -> list[str]:
    """Return lines on the parts that a training with this network takes over."""
    about, freeze = start.about, start.about["freeze"]
    hidden = ", ".join(
        f"{width} {activation.name}" for width, activation in zip(net.sizes[1:-1], net.activations, strict=False)
    )
    head = about["new_output_layer"]
    said = [
        f"from {about['run']}: the preparation of the columns; hidden layers: {hidden or 'none'}; "
        + (f"a new output layer, since {head}" if head else "the output layer, since the target is the same")
    ]
    if freeze:
        said.append(f"frozen: {'layer 1' if freeze == 1 else f'layers 1 to {freeze}'} of {net.layers}")
    if about["probe"]:
        said.append(f"the output layer is trained alone first, for up to {about['probe']} epochs")
    if about["layer_decay"] != 1:
        said.append(f"learning rate of a layer: {about['layer_decay']:g} times that of the next")
    return said


def initial(
    prepared: Prepared, options: TrainOptions, data: Mapping[str, Any], watched: Mapping[str, Any], models: int
) -> Sequence[Mapping[str, Array]]:
    """Return the parameters that each model starts with, none without ``--from``; with ``--probe`` after the probe.

    ``data`` are the arguments of ``Fleet.fit`` that hold rows, ``watched`` those for ``--metric``.
    """
    start = prepared.start
    if start is None:
        return ()
    if not options.probe:
        return [start.parameters] * models
    found, losses = [], []
    for index in range(models):
        kept, held = (data[name][index] if name in data else None for name in ("rows", "validation_rows"))
        X, y, weight = (_picked(data[name], kept) for name in ("X", "y", "sample_weight"))
        validation = data.get("validation_data")
        if held is not None:
            validation = tuple(_picked(data[name], held) for name in ("X", "y", "sample_weight"))
        schedule = recipe.schedule(options, rows=len(X), epochs=options.probe)
        engine = prepared.engine(replace(options, seed=options.seed + index), schedule)
        try:
            history = engine.probe(
                X,
                y,
                epochs=options.probe,
                batch_size=min(options.batch_size, len(X)),
                sample_weight=weight,
                validation_data=validation,
                early_stopping=None if validation is None else options.early_stopping or None,
                drop_last=options.drop_last,
                **watched,
            )
            losses.append(min(history.history["loss" if validation is None else "val_loss"]))
        except DivergenceError as error:
            print(f"the probe diverged, and the training starts where it was before: {error}", file=sys.stderr)
        found.append(engine.state_dict())
    if losses and not options.quiet:
        print(f"probe: {'val_' if validation is not None else ''}loss {np.mean(losses):.4g}", file=sys.stderr)
    return found


def _picked(array: Array | None, rows: Array | None) -> Any:
    return array if array is None or rows is None else array[rows]


def _loaded(path: Path, options: TrainOptions) -> Engine:
    return load(path, backend=options.backend, device=options.device, precision=options.precision)
