"""``--preset``: the options of a recipe by its name."""

from __future__ import annotations

from dataclasses import replace

from fusemlp.cli import recipe
from fusemlp.cli.commands import TrainOptions
from fusemlp.cli.defaults import is_a_table
from fusemlp.cli.fields import given_options
from fusemlp.cli.options import ModelOptions
from fusemlp.describe import presets
from fusemlp.runtime.ranks import started

# Options of other trainings than the recipe's.
_OTHERS = {
    "from_run": "that run has its own network",
    "dp_epsilon": "private training takes plain networks",
    "adversarial": "adversarial training takes plain networks",
}


def with_preset(options: ModelOptions, rows: int, *, classify: bool) -> tuple[ModelOptions, int, list[str]]:
    """Return the options with those of ``--preset``, the number of members, and a note on the choice.

    ``rows`` are those beside the test rows; ``classify``: the target holds classes.
    """
    if not isinstance(options, TrainOptions):
        return options, 1, []
    changed = given_options(options)
    given = {name: name in changed for name in presets.TABM}
    widths, activations = recipe.hidden_widths(options.hidden), options.activation.split(",")
    against = presets.obstacles(options, activations=activations, widths=widths)
    for name, reason in _OTHERS.items():
        if getattr(options, name) is not None:
            against[name] = f"{reason}; leave it out"
    if options.output_activation != "identity":
        against["output_activation"] = "members have linear outputs; leave it out"
    if started():
        against["preset"] = "several processes of torchrun train a plain network; leave it out"
    # a resumed run has its recipe in its options; the members' training is the longer one
    own = any(given.values()) or any(one is not None for one in (options.models, options.resume, options.time_limit))
    rows = rows if is_a_table(options) else 0
    name, note = presets.chosen(options.preset, rows, against, classify=classify, own=own)
    if name == "plain":
        return options, 1, [note] if note else []
    changes = presets.changes(given, rows)
    if "hidden" in changes:
        changes["hidden"] = [",".join(map(str, changes["hidden"]))]
    told = ", ".join(f"{name} {value[0] if name == 'hidden' else value}" for name, value in changes.items())
    note += f"; in place of defaults it has {told}" if told else ""
    return replace(options, preset=name, models=1, **changes), presets.MEMBERS, [note]
