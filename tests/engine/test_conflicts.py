"""Every pair of features trains, or is lowered, or is refused with the words of its row in the table of conflicts."""

import inspect
import itertools
import re
from contextlib import nullcontext
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from lowered import training_program

from fusemlp import DPSGD, FGSM, IBP, MLP, MSE, SGD, CrossEntropy, Engine, Fleet, Frequency, ParameterOptions, Residual
from fusemlp.describe.adversarial import Adversary
from fusemlp.describe.conflicts import CONFLICTS, UNAVAILABLE, check_together
from fusemlp.describe.losses import as_loss
from fusemlp.program.passes import ClipAndNoise, SumOverRanks, passes_against
from fusemlp.program.program import Sharding
from fusemlp.program.verifier import verify
from fusemlp.runtime.memory import compute_bytes
from fusemlp.runtime.plans import ASKED, choose_plan
from fusemlp.runtime.session import Session
from fusemlp.sklearn import MLPClassifier
from fusemlp.training.trainer import FitPlan
from fusemlp_kernels.contract import MOST_PARTS, Noise
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError
from fusemlp_kernels.registry import TRAITS

pytest.importorskip("dp_accounting")

ROWS, BATCH = 24, 8
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
LABELS = np.arange(ROWS) % 3
NOTHING = MappingProxyType({})


def absolute_error(outputs, targets, weights):
    errors = outputs - targets
    return abs(errors).mean(), np.sign(errors) / errors.size


class Feature(NamedTuple):
    """The arguments that bring a feature in: of the network, the loss, the optimizer, the engine, and of ``fit``.

    ``door``: what is called in place of ``Engine.fit``. ``implies``: other features that are in use then.
    """

    net: Any = NOTHING
    loss: Any = NOTHING
    optimizer: Any = NOTHING
    engine: Any = NOTHING
    fit: Any = NOTHING
    door: str = ""
    implies: tuple[str, ...] = ()
    backends: tuple[str, ...] = tuple(TRAITS)


FEATURES = {
    "members": Feature(net={"members": 2}),
    "prelu": Feature(net={"activation": "prelu"}, implies=("falling activation",)),
    "falling activation": Feature(net={"activation": "gelu"}),
    "dropout": Feature(net={"dropout": 0.2}),
    "norm": Feature(net={"norm": "layer"}),
    "residual": Feature(net={"sizes": [4, 6, Residual(6), 3]}),
    "encoding": Feature(net={"encoding": Frequency(2)}),
    "sum": Feature(loss={"reduction": "sum"}),
    "no classes": Feature(loss={"kind": MSE}),
    "function": Feature(
        loss={"kind": lambda **_: as_loss(absolute_error), "reduction": "mean"}, implies=("no classes", "batch loss")
    ),
    "missing": Feature(loss={"kind": MSE, "missing": True}, implies=("no classes", "batch loss", "numpy loss")),
    "class weights": Feature(loss={"kind": CrossEntropy, "class_weight": (1.0, 2.0, 3.0)}),
    "clip_norm": Feature(optimizer={"clip_norm": 1.0}),
    "accumulate": Feature(optimizer={"accumulate": 2}),
    "ema": Feature(optimizer={"ema": 0.9}),
    "per_parameter": Feature(optimizer={"per_parameter": {"0.*": ParameterOptions(trainable=False)}}),
    "fp16": Feature(engine={"precision": "fp16"}, backends=("triton", "cupy")),
    "privacy": Feature(engine={"privacy": DPSGD(1.0)}),
    "measured rows": Feature(engine={"normalise": True}, implies=("normalise",)),
    "normalise": Feature(engine={"normalise": X}),
    "ranks": Feature(engine={"distributed": True}),
    "eager host": Feature(engine={"plan": "eager"}, backends=("numpy",)),
    "resident kernel": Feature(engine={"plan": "resident"}, backends=("triton",)),
    "attack": Feature(fit={"adversarial": FGSM(0.1)}, implies=("adversarial",)),
    "IBP": Feature(fit={"adversarial": IBP(0.1)}, implies=("adversarial",)),
    "batches": Feature(fit={"y": None}),
    "balanced": Feature(fit={"class_weight": "balanced"}),
    "sample_weight": Feature(fit={"sample_weight": np.ones(ROWS)}),
    "validation_data": Feature(fit={"validation_data": (X, LABELS)}),
    "validation_split": Feature(fit={"validation_split": 0.5}),
    "batch_size": Feature(fit={"batch_size": 6}),
    "row_order": Feature(fit={"row_order": lambda epoch: np.arange(ROWS)}),
    "rows in turn": Feature(fit={"shuffle": False}),
    "drop_last": Feature(fit={"drop_last": True}),
    "steps_per_epoch": Feature(fit={"steps_per_epoch": 3}),
    "followed rows": Feature(fit={"early_stopping": 1, "monitor": "loss"}),
    "probe": Feature(door="probe"),
    "lr_find": Feature(door="lr_find"),
    "step": Feature(door="step"),
    "loss by inputs": Feature(door="loss by inputs"),
    "bounds": Feature(door="bounds"),
    "fleet": Feature(door="fleet"),
}

# Refused by a state, or by the limits of a kernel.
KERNEL = "plan: the triton backend's resident kernel"
ELSEWHERE = {
    **{
        frozenset({"measured rows", name}): "normalise: no rows were measured yet"
        for name in ("step", "batches", "loss by inputs", "bounds")
    },
    frozenset({"members", "loss by inputs"}): "X: the gradient by the inputs",
    frozenset({"function", "balanced"}): "class_weight: it needs one class for each row",
    **{
        frozenset({"resident kernel", name}): KERNEL
        for name in ("privacy", "members", "function", "fp16", "norm", "residual", "encoding")
    },
}


def together(first, second):
    """Return the arguments of both; None where they set one argument, or the door of one has none of the other's."""
    sections = list(zip(first[:5], second[:5], strict=True))
    doors = {first.door, second.door} - {""}
    if any(one.keys() & other.keys() for one, other in sections) or len(doors) > 1:
        return None
    both = Feature(*({**one, **other} for one, other in sections), "".join(doors), first.implies + second.implies)
    door = {
        "loss by inputs": (),
        "bounds": (),
        "fleet": inspect.signature(Fleet.fit).parameters.keys() - {"y"},
        "step": (),
        "lr_find": (),
    }
    return both if both.fit.keys() <= set(door.get(both.door, both.fit)) else None


def row_of(names):
    """Return the first row that is hit."""
    return next((pair for pair in CONFLICTS if set(pair) <= names), None)


def as_pattern(words):
    return "^" + ".*".join(map(re.escape, re.split(r"\{.*?\}", words)))


def described(case):
    loss = {"kind": CrossEntropy, **case.loss}
    return {
        "net": MLP(**{"sizes": [4, 6, 6, 3], **case.net}),
        "loss": loss.pop("kind")(**loss),
        "optimizer": SGD(0.1, **case.optimizer),
    }


def train(case):
    """Train for an epoch on NumPy, by the door of the case."""
    model = {"batch_size": BATCH, "backend": "numpy", **case.engine, **described(case)}
    y = np.eye(3, dtype=np.float32)[LABELS] if "no classes" in model["loss"].uses else LABELS
    if case.door == "fleet":
        Fleet(**model, vary={"seed": [0, 1]}).fit(X, y, epochs=1, **case.fit)
        return
    engine, fit = Engine(**model), dict(case.fit)
    if "validation_data" in fit:
        fit["validation_data"] = X, y
    if "row_order" in fit:
        fit["row_order"] = lambda epoch: np.arange(ROWS // 2 if "validation_split" in fit else ROWS)
    if case.door == "step":
        engine.step(X[:BATCH], y[:BATCH])
    elif case.door == "loss by inputs":
        engine.input_gradient(X, y)
    elif case.door == "bounds":
        engine.bounds(X, 0.1)
    elif case.door == "lr_find":
        engine.lr_find(X, y, steps=20)
    elif "y" in fit:
        batches = [(X[start : start + BATCH], y[start : start + BATCH]) for start in range(0, ROWS, BATCH)]
        (engine.probe if case.door else engine.fit)(batches, epochs=1, **fit)
    else:
        (engine.probe if case.door else engine.fit)(X, y, epochs=1, **fit)


def lower(case, backend):
    """Lower the step of a training on a backend that need not be there, after the checks of engine and fit."""
    machine = {"plan": "auto", "precision": "fp32", "privacy": None, "normalise": None, **case.engine}
    model, precision, privacy = described(case), machine["precision"], machine["privacy"]
    net, ranks = model["net"], machine.get("distributed")
    asked = SimpleNamespace(
        network=net, loss=model["loss"], optimizer=model["optimizer"], backend=backend, precision=precision,
        plan=machine["plan"], plan_reason="" if machine["plan"] == "auto" else ASKED, privacy=privacy,
        ranks=SimpleNamespace(together=bool(ranks)), normalise=machine["normalise"] is not None,
    )  # fmt: skip
    asked.described = Session.described.fget(asked)
    fit = {name: value for name, value in case.fit.items() if name not in ("y", "sample_weight", "validation_data")}
    plan = FitPlan(epochs=1, **fit)
    beside = {name: case.fit.get(name) for name in ("sample_weight", "validation_data")}
    fits = plan.uses(model["optimizer"].schedule, batches="y" in case.fit, **beside)
    measured = {"measured rows": True} if machine["normalise"] is True else {}
    check_together({**Session.uses.fget(asked), **fits, **measured, **({case.door: True} if case.door else {})})
    traits, attacks = TRAITS[backend], passes_against(plan.adversarial)
    clips = () if privacy is None else (ClipAndNoise(1.0, Noise(1.0, float(BATCH), 0)),)
    sums = (SumOverRanks(Sharding("ordered", 2)),) if ranks else ()
    chosen = choose_plan(machine["plan"], traits, net, BATCH, precision, features=asked.described)
    program = training_program(
        net,
        model["loss"],
        model["optimizer"],
        BATCH,
        backend,
        rows=BATCH,
        weighted="sample_weight" in case.fit,
        accuracy=False,
        compute_bytes=compute_bytes(traits, precision),
        scaled=precision == "fp16",
        most_parts=MOST_PARTS,
        resident=chosen[0] == "resident" and not ranks and (traits.on_host or not attacks),
        passes=(*attacks, *clips, *sums),
    )
    verify(program)
    assert str(program)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", TRAITS)
@pytest.mark.parametrize("first", FEATURES)
def test_every_pair_trains_or_is_refused_by_its_row(first, backend):
    for second in list(FEATURES)[list(FEATURES).index(first) + 1 :]:
        features = FEATURES[first], FEATURES[second]
        case = together(*features)
        if case is None or any(backend not in feature.backends for feature in features):
            continue
        names = {first, second, *case.implies, backend, "batches" if "y" in case.fit else "arrays"}
        elsewhere = ELSEWHERE.get(frozenset({first, second}))
        row, run = row_of(names), train if backend == "numpy" and "ranks" not in names else lower
        arguments = (case,) if run is train else (case, backend)
        if row is None and (elsewhere is None or (run is lower and elsewhere != KERNEL)):
            run(*arguments)
            continue
        words = CONFLICTS[row] if row else elsewhere
        unavailable = row in UNAVAILABLE or words == KERNEL
        with pytest.raises(BackendUnavailableError if unavailable else ArgumentError, match=as_pattern(words)):
            run(*arguments)


ESTIMATORS = {
    "lbfgs": {"solver": "lbfgs"},
    "partial_fit": {},
    "early_stopping": {"early_stopping": True, "validation_fraction": 0.5},
    "dropout": {"dropout": 0.2},
    "fast products": {"precision": "tf32", "backend": "triton"},
    "attack": {"adversarial": FGSM(0.1)},
    "IBP": {"adversarial": IBP(0.1)},
    "one label": {},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first, second", [*itertools.combinations(ESTIMATORS, 2)])
def test_every_pair_of_an_estimator(first, second):
    options = {"backend": "numpy", **ESTIMATORS[first], **ESTIMATORS[second]}
    names = {first, second} | ({"adversarial"} if "adversarial" in options else set())
    row, y = row_of(names), LABELS > 0 if "one label" in names else LABELS
    if row is None and "fast products" in names:
        # of a card
        return
    estimator = MLPClassifier((6,), max_iter=1, **options)

    refusal = nullcontext()
    if row is not None:
        refusal = pytest.raises(ArgumentError, match=as_pattern(CONFLICTS[row]))
    elif {"lbfgs", "partial_fit"} <= names:
        refusal = pytest.raises(AttributeError, match="has no attribute 'partial_fit'")
    with refusal:
        estimator.partial_fit(X, y, classes=np.unique(y)) if "partial_fit" in names else estimator.fit(X, y)


def test_the_tables_features_are_walked():
    walked = {
        *FEATURES,
        *ESTIMATORS,
        *TRAITS,
        "arrays",
        "table",
        "estimator",
        "models",
        "FusedMLP",
        # tests/kernels/test_narrow.py, test_triton_resident.py
        *("narrow plan", "card plan", "chip plan"),
        # tests/doors/test_loss_doors.py
        "label_smoothing",
        # test_layer_doors.py, test_shared_weights.py
        *("columns", "hidden", "no hidden layer", "output activation"),
        # test_cli.py and test_cli_transfer.py
        *("dp_epsilon", "probed", "time_limit"),
        # tests/distributed/test_commands.py
        "final_fit",
        # tests/doors/test_table_doors.py
        *("gaps", "trained gaps", "sweep", "several targets", "quantiles", "return_std"),
        *(name for one in FEATURES.values() for name in one.implies),
    }
    assert {name for pair in CONFLICTS for name in pair} <= walked
    assert not Adversary().uses
