"""Multi-layer perceptrons trained by fused kernels.

The public names, each loaded when it is first touched (PEP 562), so that ``import fusemlp`` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fusemlp._paths import PATHS, install
from fusemlp._version import __version__

install()

if TYPE_CHECKING:
    from fusemlp.callbacks import (
        Callback,
        CSVLogger,
        EarlyStopping,
        LearningRateScheduler,
        MLflow,
        ModelCheckpoint,
        ProgressBar,
        ReduceLROnPlateau,
        TensorBoard,
        WandB,
    )
    from fusemlp.datasets.load import load_data
    from fusemlp.describe.adversarial import FGSM, IBP, PGD
    from fusemlp.describe.blocks import LayerNorm, Residual, RMSNorm
    from fusemlp.describe.losses import (
        MAE,
        MSE,
        BinaryCrossEntropy,
        CrossEntropy,
        GaussianNLL,
        Huber,
        Loss,
        Poisson,
        Quantile,
        Quantiles,
    )
    from fusemlp.describe.network import ELU, MLP, Activation, LeakyReLU, PReLU
    from fusemlp.describe.optimizers import SGD, Adam, AdamW, Optimizer, ParameterOptions
    from fusemlp.describe.privacy import DPSGD
    from fusemlp.describe.schedules import (
        Constant,
        Cosine,
        CosLog4,
        Exponential,
        FlatCosine,
        OneCycle,
        ReduceOnPlateau,
        Schedule,
        StepDecay,
    )
    from fusemlp.engine import Engine, load, load_checkpoint
    from fusemlp.fleet.fleet import Fleet
    from fusemlp.fleet.results import Ensemble, FleetResults
    from fusemlp.inputs.blocks import Blocks
    from fusemlp.inputs.columns import Columns
    from fusemlp.runtime.own_loss import check_gradient
    from fusemlp.runtime.scaling import InputScaleWarning, TargetScaleWarning
    from fusemlp.training.history import History
    from fusemlp.training.lr_finder import LearningRateSweep, lr_find
    from fusemlp_kernels.errors import (
        ArgumentError,
        ArgumentTypeError,
        BackendUnavailableError,
        CheckpointError,
        DataError,
        DistributedError,
        DivergenceError,
        DTypeError,
        FusemlpError,
        MissingLibraryError,
        ShapeError,
        WorkerError,
    )

__all__ = [
    "DPSGD",
    "ELU",
    "FGSM",
    "IBP",
    "MAE",
    "MLP",
    "MSE",
    "PGD",
    "SGD",
    "Activation",
    "Adam",
    "AdamW",
    "ArgumentError",
    "ArgumentTypeError",
    "BackendUnavailableError",
    "BinaryCrossEntropy",
    "Blocks",
    "CSVLogger",
    "Callback",
    "CheckpointError",
    "Columns",
    "Constant",
    "CosLog4",
    "Cosine",
    "CrossEntropy",
    "DTypeError",
    "DataError",
    "DistributedError",
    "DivergenceError",
    "EarlyStopping",
    "Engine",
    "Ensemble",
    "Exponential",
    "FlatCosine",
    "Fleet",
    "FleetResults",
    "FusemlpError",
    "GaussianNLL",
    "History",
    "Huber",
    "InputScaleWarning",
    "LayerNorm",
    "LeakyReLU",
    "LearningRateScheduler",
    "LearningRateSweep",
    "Loss",
    "MLflow",
    "MissingLibraryError",
    "ModelCheckpoint",
    "OneCycle",
    "Optimizer",
    "PReLU",
    "ParameterOptions",
    "Poisson",
    "ProgressBar",
    "Quantile",
    "Quantiles",
    "RMSNorm",
    "ReduceLROnPlateau",
    "ReduceOnPlateau",
    "Residual",
    "Schedule",
    "ShapeError",
    "StepDecay",
    "TargetScaleWarning",
    "TensorBoard",
    "WandB",
    "WorkerError",
    "__version__",
    "check_gradient",
    "load",
    "load_checkpoint",
    "load_data",
    "lr_find",
]

# Each module with its names, the doors to other libraries too; the others of ``__all__`` are errors.
_NAMES = {
    "fusemlp.datasets.load": "load_data",
    "fusemlp.inputs.blocks": "Blocks",
    "fusemlp.inputs.columns": "Columns",
    "fusemlp.engine": "Engine load load_checkpoint",
    "fusemlp.fleet.results": "Ensemble FleetResults",
    "fusemlp.fleet.fleet": "Fleet",
    "fusemlp.runtime.own_loss": "check_gradient",
    "fusemlp.runtime.scaling": "InputScaleWarning TargetScaleWarning",
    "fusemlp.describe.adversarial": "FGSM IBP PGD",
    "fusemlp.describe.blocks": "LayerNorm Residual RMSNorm",
    "fusemlp.describe.losses": "BinaryCrossEntropy CrossEntropy GaussianNLL Huber Loss MAE MSE Poisson Quantile "
    "Quantiles",
    "fusemlp.training.lr_finder": "LearningRateSweep lr_find",
    "fusemlp.describe.network": "Activation ELU LeakyReLU MLP PReLU",
    "fusemlp.describe.optimizers": "Adam AdamW Optimizer ParameterOptions SGD",
    "fusemlp.describe.privacy": "DPSGD",
    "fusemlp.describe.schedules": (
        "Constant CosLog4 Cosine Exponential FlatCosine OneCycle ReduceOnPlateau Schedule StepDecay"
    ),
    "fusemlp.callbacks": "CSVLogger Callback EarlyStopping LearningRateScheduler MLflow ModelCheckpoint ProgressBar "
    "ReduceLROnPlateau TensorBoard WandB",
    "fusemlp.training.history": "History",
    "fusemlp.sklearn": "FleetRandomizedSearchCV FleetSearchCV MLPClassifier MLPRegressor TableClassifier "
    "TableRegressor",
    "fusemlp.torch": "Batches FusedLinear FusedMLP FusedStep from_torch fuse to_torch",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
# Modules that are attributes, as in ``fusemlp.schedules.SCHEDULES``, and the doors to other libraries.
_SUBMODULES = frozenset({*PATHS, "callbacks", "engine", "fleet", "sklearn", "torch"})
# Names of Keras and torch, and of earlier releases, and their equivalents.
_ELSEWHERE = {
    **dict.fromkeys(("Free", "TRADES"), "it is gone; train against fusemlp.PGD(eps)"),
    "load_model": "use fusemlp.load(path)",
    **dict.fromkeys(("Sequential", "Model"), "write Engine(MLP([784, 128, 10], activation='relu'))"),
    **dict.fromkeys(("Dense", "Linear"), "layers are widths: MLP([784, 128, 10], activation='relu')"),
    "Dropout": "it is an argument: MLP([784, 128, 10], dropout=0.1)",
}


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"fusemlp.{name}")
    if name not in __all__:
        if name in _MODULE_OF:
            # Python hides an AttributeError from those who import the name
            raise ImportError(f"{name} is in {_MODULE_OF[name]}: from {_MODULE_OF[name]} import {name}")
        hint = f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
        raise AttributeError(f"module 'fusemlp' has no attribute {name!r}{hint}")
    value = getattr(importlib.import_module(_MODULE_OF.get(name, "fusemlp_kernels.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
