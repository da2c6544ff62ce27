"""Run scikit-learn's own tests of its networks, as installed, on these classes.

Their source is read here and run as this module, so that pytest collects them. Five of them read private names and
are left out; their facts are tested in ``test_sklearn_stopping``.
"""

import importlib.util
from pathlib import Path

import pytest

ORIGINAL = Path(importlib.util.find_spec("sklearn.neural_network.tests.test_mlp").origin)
IMPORT = "from sklearn.neural_network import MLPClassifier, MLPRegressor\n"
EXCLUDED = (
    "test_gradient",
    "test_learning_rate_warmstart",
    "test_adaptive_learning_rate",
    "test_n_iter_no_change",
    "test_n_iter_no_change_inf",
)

source = ORIGINAL.read_text(encoding="utf-8")
assert source.count(IMPORT) == 1, f"{ORIGINAL} imports its classes in another way than expected"
exec(compile(source.replace(IMPORT, IMPORT.replace("sklearn.neural_network", "fusemlp.sklearn")), ORIGINAL, "exec"))
for name in EXCLUDED:
    del globals()[name]

# scikit-learn's suite does not turn warnings into errors.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def global_random_seed():
    """Return the default of scikit-learn's own suite."""
    return 42
