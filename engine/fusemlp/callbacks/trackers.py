"""The place of the trackers in pickled estimators of earlier releases."""

from fusemlp.callbacks.loggers import MLflow, WandB

__all__ = ["MLflow", "WandB"]
