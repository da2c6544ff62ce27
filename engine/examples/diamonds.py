"""Compare networks with trees on the table of diamonds, over five random test sets: root mean square errors in dollars.

Every model has its defaults. Run it with ``python engine/examples/diamonds.py``; it takes a minute.
"""

from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.metrics import root_mean_squared_error
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from fusemlp.sklearn import TableRegressor

TABLE = pd.read_csv(files("fusemlp.datasets") / "diamonds.csv")
WORDS = ["cut", "color", "clarity"]


def models(seed: int) -> dict[str, Any]:
    """Return an untrained model for each line of the result; TableRegressor needs no preparation of the columns."""
    columns = make_column_transformer((OneHotEncoder(), WORDS), remainder="passthrough")
    boosted = HistGradientBoostingRegressor(categorical_features="from_dtype", random_state=seed)
    return {
        "fusemlp TableRegressor": TableRegressor(random_state=seed),
        "HistGradientBoostingRegressor": boosted,
        "RandomForestRegressor": make_pipeline(columns, RandomForestRegressor(random_state=seed)),
    }


def errors(table: Any, seed: int) -> dict[str, float]:
    """Return the error of each model on the fifth of the table that it has not seen."""
    X, y = table.drop(columns="price").astype(dict.fromkeys(WORDS, "category")), table["price"]
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.2, random_state=seed)
    return {
        name: root_mean_squared_error(y_test, model.fit(X, y).predict(X_test)) for name, model in models(seed).items()
    }


if __name__ == "__main__":
    rounds = [errors(TABLE, seed) for seed in range(5)]
    for name in rounds[0]:
        column = [row[name] for row in rounds]
        print(f"{name:30} {np.mean(column):5.0f}   {'  '.join(f'{error:.0f}' for error in column)}")
