"""The backend of scikit-learn's estimators."""

import pytest

from fusemlp.sklearn import settings


@pytest.fixture(autouse=True)
def numpy_by_default(monkeypatch):
    """Keep scikit-learn's estimators on NumPy on a machine with a card too: the tests compare bits and float64."""
    monkeypatch.setattr(settings, "working_backend", lambda: "numpy")
