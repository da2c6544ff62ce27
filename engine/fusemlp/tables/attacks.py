"""The attack of a recipe, and of ``evaluate --attack``, on inputs that a small change of a cell can give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.adversarial import IBP, Attack
from fusemlp.describe.checks import check_choice
from fusemlp.inputs.arrays import Array
from fusemlp.report.evidence import image_shape
from fusemlp.tables.recipe import HARDENINGS, one_of
from fusemlp_kernels.errors import ArgumentError

# Fields of attacks and trainings by the options for them.
_FIELDS = {"attack_eps": "eps", "attack_steps": "steps", "attack_norm": "norm"}
# The reason why a kind has no such field.
_ABSENT = {"fgsm": "is one step in the norm inf", "ibp": "takes no steps, and the norm inf"}
# Trainings of earlier releases.
_GONE = ("free", "trades")


def chosen(
    options: Any,
    preprocessor: Preprocessor,
    X: Array,
    cells: Array,
    *,
    option: str = "adversarial",
    kinds: Mapping[str, type[Any]] = HARDENINGS,
) -> Attack | IBP | None:
    """Return the attack of the options on rows X, as the network takes them, or None; ArgumentError for what cannot be.

    ``cells`` are the rows scored under it, as in the data. Pixels that are not scaled stay within the ends of X.
    """
    kind: Any = getattr(options, option)
    values = {name: value for name in _FIELDS if (value := getattr(options, name, None)) is not None}
    if kind is None or isinstance(kind, Attack | IBP):
        for name in values:
            mend = f"give --{option} too, such as --{option} pgd" if kind is None else "the object given has it"
            raise ArgumentError(f"{name}: it is of an attack; {mend}")
        if kind is None:
            return None
        _check_columns(option, preprocessor, cells)
        return kind
    if kind in _GONE:
        raise ArgumentError(f"{option}: {kind} is gone; train against pgd, which takes its place")
    described: Callable[..., Attack | IBP] = kinds[check_choice(option, kind, kinds)]
    if "attack_eps" not in values:
        raise ArgumentError("attack_eps: say how far an input may move, in units after --scale: --attack-eps 0.1")
    for name in values:
        if not _has(kinds[kind], _FIELDS[name]):
            having = [other for other, cls in kinds.items() if _has(cls, _FIELDS[name])]
            raise ArgumentError(f"{name}: {kind} {_ABSENT[kind]}; leave it out, or take {one_of(having)}")
    _check_columns(option, preprocessor, cells)
    within = image_shape(preprocessor) is not None and preprocessor.scale == "none"
    bounds = (float(X.min()), float(X.max())) if within and X.min() < X.max() else None
    try:
        return described(**{_FIELDS[name]: value for name, value in values.items()}, bounds=bounds)
    except ArgumentError as error:
        raise ArgumentError(f"attack_{error}") from None


def _has(kind: type[Any], name: str) -> bool:
    return name in {field.name for field in fields(kind)}


def _check_columns(option: str, preprocessor: Preprocessor, cells: Array) -> None:
    """Refuse words, dates, missing cells and pieces: their inputs do not move by themselves."""
    names, sources = preprocessor.feature_names, preprocessor.sources
    gaps: Any = preprocessor.missing_inputs if any(preprocessor.missing_inputs) else np.isnan(cells).any(axis=0)
    unfit: dict[str, Iterable[bool]] = {
        "words": [words is not None for words in preprocessor.categories],
        "dates": [name != source for name, source in zip(names, sources, strict=True)],
        "missing cells": gaps,
        "pieces of numbers (--scale piecewise)": [preprocessor.pieces(at) > 1 for at in range(len(names))],
    }
    for what, columns in unfit.items():
        named = list(dict.fromkeys(repr(name) for name, holds in zip(sources, columns, strict=False) if holds))
        if named:
            raise ArgumentError(
                f"{option}: a small change of an input means nothing for {what}, which are inputs of "
                f"{one_of(named[:3], 'and')}{' and others' if len(named) > 3 else ''}; take complete "
                "columns of numbers alone, with --drop in train, and --scale standard, minmax or none"
            )
