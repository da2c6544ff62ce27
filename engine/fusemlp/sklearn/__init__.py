"""scikit-learn's multi-layer perceptrons, trained by fusemlp: changing the import is the whole migration.

``from fusemlp.sklearn import MLPClassifier, MLPRegressor`` in place of ``from sklearn.neural_network import ...``.
``TableClassifier`` and ``TableRegressor`` take tables as they are, and train as ``fusemlp train`` does.
``FleetSearchCV`` and ``FleetRandomizedSearchCV`` are scikit-learn's searches with candidates trained side by side.

Differences, apart from what the estimators add:

- ``loss_`` is the cross-entropy itself, even if a probability rounds to 0 or 1; scikit-learn stops at 36 a row.
- L-BFGS magnifies rounding: after dozens of iterations two implementations, like two BLAS libraries, may differ.
- Sparse rows are trained on as a dense copy, and predicted in dense blocks.
- A batch whose sample weights are all zero updates nothing; scikit-learn ends with a ZeroDivisionError.
- Negative targets of the Poisson loss are refused, and a call that is refused leaves a fitted model as it was.
- ``partial_fit`` and warm starts with layers of other sizes raise a ValueError that names the sizes.
- A search of fleets gives one ConvergenceWarning, which counts the fits.
- On a machine with a GPU models train there in fp32, unless ``backend="numpy"``.
"""

from __future__ import annotations

from inspect import getattr_static, isfunction

from fusemlp.describe.checks import knows_names_of, names_absent
from fusemlp.engine import knows_names_of_predict
from fusemlp.sklearn.estimators import MLPClassifier, MLPRegressor
from fusemlp.sklearn.search import FleetRandomizedSearchCV, FleetSearchCV
from fusemlp.sklearn.table import RETRAINED, TableClassifier, TableRegressor

__all__ = [
    "FleetRandomizedSearchCV",
    "FleetSearchCV",
    "MLPClassifier",
    "MLPRegressor",
    "TableClassifier",
    "TableRegressor",
]

# Names in other libraries, and those in the MLP and in the table estimators.
_NAMES = {
    "epochs n_epochs max_epochs max_iter": ("max_iter", "epochs"),
    "hidden hidden_dim hidden_layer_sizes": ("hidden_layer_sizes", "hidden"),
    "lr learning_rate learning_rate_init": ("learning_rate_init", "lr"),
    "optimizer solver": ("solver", "optimizer"),
    "weight_decay alpha": ("alpha", "weight_decay"),
}
for _cls, _at in ((MLPClassifier, 0), (MLPRegressor, 0), (TableClassifier, 1), (TableRegressor, 1)):
    _elsewhere = dict.fromkeys(("n_estimators", "max_depth", "num_leaves"), "a network has no trees; leave it out")
    _elsewhere["warm_start"] = RETRAINED
    for _names, _here in _NAMES.items():
        _elsewhere |= dict.fromkeys(_names.split(), f"it is called {_here[_at]} here")
    knows_names_of(_cls, _elsewhere)
    for _method in ("predict", "predict_proba", "score"):
        if isfunction(_function := getattr_static(_cls, _method, None)):
            setattr(_cls, _method, knows_names_of_predict(call=f"{_method}(X)")(_function))

names_absent(
    TableClassifier, {"partial_fit": RETRAINED, "predict_interval": "predict_set(X) returns sets of classes for rows"}
)
names_absent(
    TableRegressor,
    {
        "partial_fit": RETRAINED,
        "predict_set": "predict_interval(X) returns intervals for rows",
        "predict_proba": "predict(X, return_std=True), predict_interval(X) and predict_quantiles(X) say how sure it is",
    },
)
