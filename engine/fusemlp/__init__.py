"""Multi-layer perceptrons trained by fused kernels.

The public names, each loaded when it is first touched (PEP 562), so that ``import fusemlp`` stays quick; and the short
and earlier module paths by which user code imports the public modules, and pickles of earlier releases their classes.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from fusemlp._version import __version__

if TYPE_CHECKING:
    from fusemlp.callbacks import Callback as Callback
    from fusemlp.callbacks import CSVLogger as CSVLogger
    from fusemlp.callbacks import EarlyStopping as EarlyStopping
    from fusemlp.callbacks import LearningRateScheduler as LearningRateScheduler
    from fusemlp.callbacks import MLflow as MLflow
    from fusemlp.callbacks import ModelCheckpoint as ModelCheckpoint
    from fusemlp.callbacks import ProgressBar as ProgressBar
    from fusemlp.callbacks import ReduceLROnPlateau as ReduceLROnPlateau
    from fusemlp.callbacks import TensorBoard as TensorBoard
    from fusemlp.callbacks import WandB as WandB
    from fusemlp.datasets.load import load_data as load_data
    from fusemlp.describe.adversarial import FGSM as FGSM
    from fusemlp.describe.adversarial import IBP as IBP
    from fusemlp.describe.adversarial import PGD as PGD
    from fusemlp.describe.blocks import Frequency as Frequency
    from fusemlp.describe.blocks import LayerNorm as LayerNorm
    from fusemlp.describe.blocks import Residual as Residual
    from fusemlp.describe.blocks import RMSNorm as RMSNorm
    from fusemlp.describe.losses import MAE as MAE
    from fusemlp.describe.losses import MSE as MSE
    from fusemlp.describe.losses import BinaryCrossEntropy as BinaryCrossEntropy
    from fusemlp.describe.losses import CrossEntropy as CrossEntropy
    from fusemlp.describe.losses import GaussianNLL as GaussianNLL
    from fusemlp.describe.losses import Huber as Huber
    from fusemlp.describe.losses import Loss as Loss
    from fusemlp.describe.losses import Poisson as Poisson
    from fusemlp.describe.losses import Quantile as Quantile
    from fusemlp.describe.losses import Quantiles as Quantiles
    from fusemlp.describe.network import ELU as ELU
    from fusemlp.describe.network import MLP as MLP
    from fusemlp.describe.network import Activation as Activation
    from fusemlp.describe.network import LeakyReLU as LeakyReLU
    from fusemlp.describe.network import PReLU as PReLU
    from fusemlp.describe.optimizers import SGD as SGD
    from fusemlp.describe.optimizers import Adam as Adam
    from fusemlp.describe.optimizers import AdamW as AdamW
    from fusemlp.describe.optimizers import Constant as Constant
    from fusemlp.describe.optimizers import Cosine as Cosine
    from fusemlp.describe.optimizers import Exponential as Exponential
    from fusemlp.describe.optimizers import OneCycle as OneCycle
    from fusemlp.describe.optimizers import Optimizer as Optimizer
    from fusemlp.describe.optimizers import ParameterOptions as ParameterOptions
    from fusemlp.describe.optimizers import ReduceOnPlateau as ReduceOnPlateau
    from fusemlp.describe.optimizers import Schedule as Schedule
    from fusemlp.describe.optimizers import StepDecay as StepDecay
    from fusemlp.describe.privacy import DPSGD as DPSGD
    from fusemlp.engine import Engine as Engine
    from fusemlp.engine import load as load
    from fusemlp.engine import load_checkpoint as load_checkpoint
    from fusemlp.fleet.fleet import Fleet as Fleet
    from fusemlp.fleet.results import Ensemble as Ensemble
    from fusemlp.fleet.results import FleetResults as FleetResults
    from fusemlp.inputs.blocks import Blocks as Blocks
    from fusemlp.inputs.columns import Columns as Columns
    from fusemlp.runtime.own_loss import check_gradient as check_gradient
    from fusemlp.runtime.scaling import InputScaleWarning as InputScaleWarning
    from fusemlp.runtime.scaling import TargetScaleWarning as TargetScaleWarning
    from fusemlp.training.lr_finder import LearningRateSweep as LearningRateSweep
    from fusemlp.training.lr_finder import lr_find as lr_find
    from fusemlp.training.trainer import History as History
    from fusemlp_kernels.errors import ArgumentError as ArgumentError
    from fusemlp_kernels.errors import ArgumentTypeError as ArgumentTypeError
    from fusemlp_kernels.errors import BackendUnavailableError as BackendUnavailableError
    from fusemlp_kernels.errors import CheckpointError as CheckpointError
    from fusemlp_kernels.errors import DataError as DataError
    from fusemlp_kernels.errors import DistributedError as DistributedError
    from fusemlp_kernels.errors import DivergenceError as DivergenceError
    from fusemlp_kernels.errors import DTypeError as DTypeError
    from fusemlp_kernels.errors import FusemlpError as FusemlpError
    from fusemlp_kernels.errors import MissingLibraryError as MissingLibraryError
    from fusemlp_kernels.errors import ShapeError as ShapeError
    from fusemlp_kernels.errors import WorkerError as WorkerError

# Short and earlier module paths: ``fusemlp.losses`` is ``fusemlp.describe.losses``.
_PATHS = {
    "callbacks.trackers": "callbacks.loggers",
    "candidates": "fleet.candidates",
    "checkpoint": "training.checkpoint",
    "data": "datasets.load",
    "describe.schedules": "describe.optimizers",
    "ensemble": "fleet.results",
    "explanations": "report.explanations",
    "fleet.merge": "fleet.results",
    "history": "training.trainer",
    "losses": "describe.losses",
    "lr_finder": "training.lr_finder",
    "network": "describe.network",
    "onnx": "report.onnx",
    "optimizers": "describe.optimizers",
    "preprocessing": "datasets.preprocessing",
    "saving": "training.checkpoint",
    "schedules": "describe.optimizers",
    "sklearn.classifier": "sklearn.estimators",
    "sklearn.regressor": "sklearn.estimators",
    "training.history": "training.trainer",
    "transfer": "training.transfer",
}
# Each module with its public names.
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
    "fusemlp.describe.blocks": "Frequency LayerNorm Residual RMSNorm",
    "fusemlp.describe.losses": "BinaryCrossEntropy CrossEntropy GaussianNLL Huber Loss MAE MSE Poisson Quantile "
    "Quantiles",
    "fusemlp.training.lr_finder": "LearningRateSweep lr_find",
    "fusemlp.describe.network": "Activation ELU LeakyReLU MLP PReLU",
    "fusemlp.describe.optimizers": "Adam AdamW Constant Cosine Exponential OneCycle Optimizer ParameterOptions "
    "ReduceOnPlateau SGD Schedule StepDecay",
    "fusemlp.describe.privacy": "DPSGD",
    "fusemlp.callbacks": "CSVLogger Callback EarlyStopping LearningRateScheduler MLflow ModelCheckpoint ProgressBar "
    "ReduceLROnPlateau TensorBoard WandB",
    "fusemlp.training.trainer": "History",
    "fusemlp_kernels.errors": "ArgumentError ArgumentTypeError BackendUnavailableError CheckpointError DTypeError "
    "DataError DistributedError DivergenceError FusemlpError MissingLibraryError ShapeError WorkerError",
}
# Names of the doors to other libraries, which are imported from there.
_DOORS = {
    "fusemlp.sklearn": "FleetRandomizedSearchCV FleetSearchCV MLPClassifier MLPRegressor TableClassifier "
    "TableRegressor",
    "fusemlp.torch": "Batches FusedLinear FusedMLP FusedStep from_torch fuse to_torch",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
_DOOR_OF = {name: module for module, names in _DOORS.items() for name in names.split()}
__all__ = ["__version__", *sorted(_MODULE_OF)]
# Modules that are attributes, as in ``fusemlp.schedules.SCHEDULES``, and the doors to other libraries.
_SUBMODULES = frozenset({*_PATHS, "callbacks", "engine", "fleet", "sklearn", "torch"})
# Names of Keras and torch, and of earlier releases, and their equivalents.
_ELSEWHERE = {
    **dict.fromkeys(("Free", "TRADES"), "it is gone; train against fusemlp.PGD(eps)"),
    **dict.fromkeys(("CosLog4", "FlatCosine"), "it is gone; use fusemlp.Cosine or a Schedule of your own"),
    "load_model": "use fusemlp.load(path)",
    **dict.fromkeys(("Sequential", "Model"), "write Engine(MLP([784, 128, 10], activation='relu'))"),
    **dict.fromkeys(("Dense", "Linear"), "layers are widths: MLP([784, 128, 10], activation='relu')"),
    "Dropout": "it is an argument: MLP([784, 128, 10], dropout=0.1)",
}


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"fusemlp.{name}")
    if name in _DOOR_OF:
        # Python hides an AttributeError from those who import the name
        raise ImportError(f"{name} is in {_DOOR_OF[name]}: from {_DOOR_OF[name]} import {name}")
    if name not in _MODULE_OF:
        hint = f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
        raise AttributeError(f"module 'fusemlp' has no attribute {name!r}{hint}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


class _Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the module behind a short path; both paths lead to one module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a short path, None for all others."""
        package, _, name = fullname.partition(".")
        if package != "fusemlp" or name not in _PATHS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The module itself, under its own name."""
        module = importlib.import_module(f"fusemlp.{_PATHS[spec.name.partition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Undo what the import system has just written: the module keeps the spec it was loaded by."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


# once, though a reload makes the class anew
if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
    sys.meta_path.append(_Alias())
