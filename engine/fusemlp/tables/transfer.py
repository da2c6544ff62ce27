"""Transfer: the parts of another run that a training takes over, and the probe before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fusemlp.datasets.dataset import Dataset
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import fit_preprocessor, network_ends
from fusemlp.describe.checks import as_count, listed
from fusemlp.describe.conflicts import check_together, in_use
from fusemlp.describe.network import MLP
from fusemlp.engine import Engine, load
from fusemlp.fleet.results import LEAST_ROWS, default_models, members
from fusemlp.inputs.arrays import Array
from fusemlp.report.runs import Run, open_run, weights_path
from fusemlp.tables import descriptions
from fusemlp.tables.recipe import ModelRecipe, TableRecipe
from fusemlp.training.transfer import taken_over
from fusemlp_kernels.errors import ArgumentError

Recipe = TypeVar("Recipe", bound=TableRecipe)

# Options that need a run, and options that decide what the run has decided.
_OWN = ("freeze", "probe", "layer_decay")
_DECIDED = (
    *(field.name for field in fields(ModelRecipe) if field.metadata["panel"] == "Network" and field.name != "dropout"),
    *("scale", "drop", "keep", "categorical"),
)
_LOSS = ("loss", "label_smoothing", "delta", "quantile")
# Fields of a preprocessor that the new data decide, the last of them unless the target means the same.
_OF_DATA = ("task", "target_name", "classes", "class_names", "one_hot_targets", "ids", "unused", "missing_words")
_OF_TARGET = ("target_shift", "target_scale", "target_log", "target_low")


class Start(NamedTuple):
    """Each model's initial ``parameters``, ``about`` them for ``report.json``, and the ``engine`` of the run."""

    parameters: Sequence[Mapping[str, Array]]
    about: dict[str, Any]
    engine: Engine

    def lines(self, net: MLP) -> list[str]:
        """Return lines on it and on the layers of its network that are frozen or slower."""
        about, parts, models = self.about, parts_of(self.engine), len(self.parameters)
        units = zip(net.sizes[1:-1], net.activations, strict=False)
        hidden = ", ".join(f"{width} {activation.name}" for width, activation in units) or "none"
        new = about["new_output_layer"]
        head = f"a new output layer, since {new}" if new else "the output layer, since the target is the same"
        words = {
            "freeze": f"first {about['freeze']} of {net.layers} layers frozen",
            "probe": f"the output layer alone is trained first, for up to {about['probe']} epochs",
            "layer_decay": f"learning rate of each layer {about['layer_decay']:g} times that of the next",
        }
        changed = [words[name] for name in _OWN if about[name] != getattr(TableRecipe, name)]
        lines = [f"from {about['run']}: the preparation of the columns; hidden layers: {hidden}; {head}"]
        if parts:
            how = f"each of the {models} models starts from one" if models > 1 else "the model starts from all of them"
            lines.append(f"{parts} models were merged there, and {how}")
        return lines + (["; ".join(changed)] if changed else [])


def stored(run: Run, config: Mapping[str, Any], net: MLP, recipe: TableRecipe) -> Start | None:
    """Return the start of a run that began with ``--from``: its folder keeps the network."""
    if "from" not in config:
        return None
    engine, about = _loaded(run.checkpoint("start"), recipe), config["from"]
    parameters = [taken_over(net, part.state_dict(), about["layers"])[0] for part in _starts(engine, recipe)]
    return Start(parameters, about, engine)


def parts_of(engine: Engine) -> int:
    """Return the number of models in whose place a merged network stands, 0 for a single model."""
    return 0 if engine.merged_biases is None or engine.network.layers == 1 else len(engine.merged_biases)


def _starts(engine: Engine, recipe: TableRecipe) -> list[Engine]:
    """Return the engine that each model of the recipe starts from: several from the parts of an ensemble in turn."""
    models = recipe.models or 1
    parts = members(engine, "from") if models > 1 and parts_of(engine) else [engine]
    return [parts[model % len(parts)] for model in range(models)]


@dataclass(frozen=True, eq=False)
class Source:
    """The run of ``--from``."""

    run: Run
    config: dict[str, Any]
    preprocessor: Preprocessor
    engine: Engine

    def noted(self, dataset: Dataset) -> Dataset:
        """Return the data set with a note on columns that the run did not have."""
        known = {*self.preprocessor.sources, *self.preprocessor.ids, *self.preprocessor.unused}
        strange = [role.name for role in dataset.roles if role.kind == "dropped" and role.name not in known]
        note = f"columns that {self.run.path} did not have, ignored: {listed(strange)}"
        return replace(dataset, notes=(*dataset.notes, note)) if strange else dataset

    def filled(self, recipe: Recipe, *, same_target: bool) -> Recipe:
        """Return the recipe with what the run decides where nothing is given: of the same target the loss."""
        changes: dict[str, Any] = {}
        if same_target and recipe.loss is None:
            known = self.config["options"]
            changes = {name: known[name] for name in _LOSS if getattr(recipe, name) is None}
        if recipe.models is None and default_models(LEAST_ROWS, self.engine.network) == 1:
            changes["models"] = 1
        return replace(recipe, **changes)

    def start(self, dataset: Dataset, rows: Array, recipe: TableRecipe, loss: str) -> tuple[Preprocessor, MLP, Start]:
        """Return preprocessor and network for a data set with these training rows, and the start of all models.

        The output layer, with the scale of a regression's targets, is the run's if the target means the same.
        """
        engines = _starts(self.engine, recipe)
        like, known = self.preprocessor, engines[0].network
        new = self._difference(dataset, loss, recipe)
        if new and known.layers == 1:
            raise ArgumentError(f"from: {str(self.run.path)!r} has an output layer alone, and it is of no use: {new}")
        log_targets = bool(new and recipe.log_target)
        fitted = fit_preprocessor(dataset, rows, loss=loss, scale=like.scale, log_targets=log_targets)
        names = (*_OF_DATA, *(_OF_TARGET if new else ()))
        preprocessor = replace(like, **{name: getattr(fitted, name) for name in names})
        last = network_ends(preprocessor, loss)[1] * descriptions.loss(recipe, loss, None).width
        sizes, dropouts = (*known.sizes[:-1], last), known.dropouts
        if descriptions.by_layers("dropout", recipe.dropout):
            dropouts = descriptions.network(sizes, recipe).dropouts
        net = known.but(
            sizes=sizes, output_activation="identity" if new else known.activations[-1], dropout=dropouts[:-1]
        )
        kept = known.layers - 1 if new else known.layers
        parameters = [taken_over(net, engine.state_dict(), kept)[0] for engine in engines]
        about = {"run": str(self.run.path.absolute()), "layers": kept, "of_layers": known.layers}
        about |= {"new_output_layer": new or None, **{name: getattr(recipe, name) for name in _OWN}}
        return preprocessor, net, Start(parameters, about, self.engine)

    def _difference(self, dataset: Dataset, loss: str, recipe: TableRecipe) -> str:
        """Return the reason for which the target is not that of the run; empty if it means the same."""
        like, kind = self.preprocessor, self.config["loss"]["kind"]
        if dataset.roles and dataset.target_name != like.target_name:
            return f"the target there is {like.target_name!r}"
        if dataset.task != like.task:
            return f"the target there is of a {like.task}"
        if like.classes is not None and tuple(dataset.classes.tolist()) != like.classes:
            return f"the classes there are {listed(like.classes)}"
        if like.classes is None and dataset.y[0].size != like.outputs:
            return f"there are {like.outputs} targets there"
        if loss != kind:
            return f"the loss there is {kind}"
        if recipe.log_target not in (None, like.target_log):
            return f"targets there are learned {'in logarithms' if like.target_log else 'as they are'}"
        return ""


def opened(recipe: TableRecipe) -> Source | None:
    """Return the run that the recipe starts from, or None; ArgumentError for fields that do not go together."""
    for name in _OWN if recipe.transfer_from is None else _DECIDED:
        if getattr(recipe, name) != getattr(TableRecipe, name):
            reason = "the run of --from decides it, with its network and the preparation of its columns; leave one out"
            if recipe.transfer_from is None:
                reason = "it is for layers that have learned already; say of which run: --from RUN"
            raise ArgumentError(f"{name}: {reason}")
    if recipe.transfer_from is None:
        return None
    as_count("probe", recipe.probe, minimum=0)
    run, config = open_run(recipe.transfer_from)
    preprocessor = Preprocessor.from_config(config["preprocessor"])
    source = Source(run, config, preprocessor, _loaded(weights_path(run, "model"), recipe))
    net = source.engine.network
    net.check_single("from", "transfer")
    check_together(in_use(probed=recipe.probe or None, time_limit=recipe.time_limit, dp_epsilon=recipe.dp_epsilon))
    if recipe.probe and net.layers == 1:
        raise ArgumentError(f"probe: {recipe.transfer_from!r} has no hidden layer, so the output layer is all there is")
    return source


def _loaded(path: Path, recipe: TableRecipe) -> Engine:
    return load(path, backend=recipe.backend, device=recipe.device, precision=recipe.precision)
