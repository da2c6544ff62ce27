"""L-BFGS over the flat arena: SciPy proposes parameters, the engine answers with the loss and its gradient."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.optimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.optimize import _check_optimize_result

from fusemlp.inputs.arrays import Array
from fusemlp.sklearn.convergence import fit_ended, search_around
from fusemlp.sklearn.stochastic import SklearnPolicy


def minimise(policy: SklearnPolicy) -> None:
    """Minimise the loss of all rows (Liu and Nocedal, 1989); sets ``n_iter_`` and ``loss_``.

    Arena elements between the tensors have gradient zero, and so stay zero. Warns (ConvergenceWarning) if ``max_iter``
    or ``max_fun`` ended it.
    """
    estimator, model = policy.estimator, policy.model
    batches: Any = policy.batches
    memory = model.engine.memory
    backend = memory.backend

    def objective(theta: Array) -> tuple[float, Array]:
        backend.copy_into(memory.params, theta.astype(model.dtype, copy=False))
        loss = batches.loss_and_gradient()
        return loss, backend.to_host(memory.grads).astype(np.float64, copy=False)

    result = scipy.optimize.minimize(
        objective,
        backend.to_host(memory.params).astype(np.float64),
        method="L-BFGS-B",
        jac=True,
        options={"maxfun": estimator.max_fun, "maxiter": estimator.max_iter, "gtol": estimator.tol},
    )
    backend.copy_into(memory.params, result.x.astype(model.dtype, copy=False))
    estimator.loss_ = result.fun
    if search_around() is None:
        estimator.n_iter_ = _check_optimize_result("lbfgs", result, estimator.max_iter)
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ConvergenceWarning)
        estimator.n_iter_ = _check_optimize_result("lbfgs", result, estimator.max_iter)
    fit_ended(str(told[0].message) if told else None, stacklevel=1)
