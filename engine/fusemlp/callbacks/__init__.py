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
