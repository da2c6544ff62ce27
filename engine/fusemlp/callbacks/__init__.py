"""Callbacks: objects that ``fit`` calls at its stages, in the library's form or in Keras's, and some ready-made ones.

``EarlyStopping``, ``ModelCheckpoint``, ``ReduceLROnPlateau``, ``LearningRateScheduler``, ``CSVLogger`` and
``TensorBoard`` take Keras's arguments with Keras's meanings. ``ProgressBar`` shows the progress of a training.
``MLflow`` and ``WandB`` record it with a tracker.
"""

from __future__ import annotations

from fusemlp.callbacks.forms import Callback
from fusemlp.callbacks.loggers import CSVLogger, MLflow, TensorBoard, WandB
from fusemlp.callbacks.monitors import EarlyStopping, LearningRateScheduler, ModelCheckpoint, ReduceLROnPlateau
from fusemlp.callbacks.progress import ProgressBar

__all__ = [
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "LearningRateScheduler",
    "MLflow",
    "ModelCheckpoint",
    "ProgressBar",
    "ReduceLROnPlateau",
    "TensorBoard",
    "WandB",
]

# Callbacks of Keras that are not here.
_ELSEWHERE = {
    "BackupAndRestore": "ModelCheckpoint(path) writes, and fusemlp.load_checkpoint(path).fit(..., resume=True) goes on",
    "LambdaCallback": "write a class with on_epoch_end(epoch, logs) and others of its methods",
    "TerminateOnNaN": "fit does it by itself and raises DivergenceError; leave it out",
}


def __getattr__(name: str) -> object:
    if name in _ELSEWHERE:
        # Python hides an AttributeError from those who import the name
        raise ImportError(f"{name}: {_ELSEWHERE[name]}")
    raise AttributeError(f"module 'fusemlp.callbacks' has no attribute {name!r}")
