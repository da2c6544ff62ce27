"""Score privacy, robustness, transfer and explanations on scikit-learn's digits: ``python -m bench examples``.

Each seed draws the network's weights; the rows that are held out are the same. Pixels are divided by 16. The table has
means over the seeds, so that the figures of the pages can be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fusemlp.explanations import attributions

from bench.report import Record
from bench.study import count, finish, parse, parser, table
from fusemlp import DPSGD, IBP, MLP, PGD, SGD, Adam, Engine

Array = np.ndarray[Any, Any]
Rows = tuple[Array, Array]
EPS, HIDDEN, EPOCHS = 0.1, (64, 64), 60
EPSILONS = (8.0, 3.0, 1.0)
# Rows that transfer has, and pixels that explanations blank out.
FEW, BLANKED = 30, 8
TITLES = ("robustness", "privacy", "transfer", "explanations")


def digits() -> tuple[Rows, Rows]:
    """Return rows for training and the fifth that is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    X, y = load_digits(return_X_y=True)
    X = (X / 16.0).astype(np.float32)
    a, b, c, d = train_test_split(X, y, test_size=0.2, stratify=y, random_state=0)
    return (a, c), (b, d)


def robustness(train: Rows, held: Rows, seed: int) -> list[Record]:
    """Return, for each way of training, the scores of rows unchanged, attacked and certified."""
    strongest = PGD(EPS, steps=40, restarts=3, bounds=(0, 1), seed=seed)
    within: dict[str, Any] = {"bounds": (0, 1)}
    ways: dict[str, Any] = {"plain": None, "PGD": PGD(EPS, steps=10, **within), "IBP": IBP(EPS, **within)}
    lines = []
    for name, way in ways.items():
        engine = Engine(MLP([64, *HIDDEN, 10]), optimizer=Adam(lr=0.003), seed=seed)
        engine.fit(*train, epochs=EPOCHS, adversarial=way)
        attacked = engine.attack(*held, strongest)
        scores = {"accuracy": accuracy(engine, held), "under PGD-40": accuracy(engine, (attacked, held[1]))}
        scores["certified"] = float(engine.certified(*held, EPS, bounds=(0, 1)).mean())
        lines.append({"way": name, **scores})
    return lines


def privacy(train: Rows, held: Rows, seed: int) -> list[Record]:
    """Return the accuracy without privacy and with each epsilon."""
    lines = []
    for epsilon in (None, *EPSILONS):
        how = epsilon and DPSGD.for_epsilon(epsilon, rows=len(train[0]), batch_size=256, epochs=30)
        engine = Engine(MLP([64, 64, 10]), optimizer=SGD(lr=1.0), batch_size=256, seed=seed, privacy=how or None)
        engine.fit(*train, epochs=30)
        lines.append({"way": f"epsilon {epsilon:g}" if epsilon else "not private", "accuracy": accuracy(engine, held)})
    return lines


def transfer(train: Rows, held: Rows, seed: int) -> list[Record]:
    """Return the accuracy of odd or even from ``FEW`` rows, alone and from a network of the other rows' digits."""
    chosen = np.random.default_rng(seed).permutation(len(train[0]))
    (X, y), (few, digit) = ([array[part] for array in train] for part in (chosen[FEW:], chosen[:FEW]))
    odd, new = digit % 2, (held[0], held[1] % 2)
    source = Engine(MLP([64, *HIDDEN, 10]), seed=seed)
    source.fit(X, y, epochs=EPOCHS)
    alone = Engine(MLP([64, *HIDDEN, 2]), batch_size=FEW, seed=seed)
    tuned = Engine.from_pretrained(source, head=2, batch_size=FEW, seed=seed)
    tuned.probe(few, odd, epochs=4 * EPOCHS)
    lines = [{"way": "a new output layer", "accuracy": accuracy(tuned, new)}]
    for name, engine in {"a new output layer, then all layers": tuned, "without transfer": alone}.items():
        engine.fit(few, odd, epochs=2 * EPOCHS)
        lines.append({"way": name, "accuracy": accuracy(engine, new)})
    return lines[::-1]


def explanations(train: Rows, held: Rows, seed: int) -> list[Record]:
    """Return the accuracy with pixels made zero: those of the largest attributions to the label, and any others."""
    engine = Engine(MLP([64, *HIDDEN, 10]), optimizer=Adam(lr=0.003), seed=seed)
    engine.fit(*train, epochs=EPOCHS)
    X, y = held
    generator = np.random.default_rng(seed)
    # zero pixels have no attribution, and blanking them changes nothing
    ways = {
        "integrated gradients": attributions(engine, X, output=y).values,
        "gradient x input": attributions(engine, X, output=y, method="gradient").values,
        "at random, of those that are not zero": np.where(X > 0, generator.uniform(size=X.shape), -1.0),
    }
    lines = [{"way": "no pixel is zero", "accuracy": accuracy(engine, held)}]
    for name, values in ways.items():
        blank = X.copy()
        np.put_along_axis(blank, np.argsort(-values, axis=1)[:, :BLANKED], 0.0, axis=1)
        lines.append({"way": name, "accuracy": accuracy(engine, (blank, y))})
    return lines


def accuracy(engine: Engine, rows: Rows) -> float:
    """Return the share of rows that are right."""
    return float(engine.evaluate(*rows)["accuracy"])


def text(lines: Sequence[Record]) -> str:
    """Return a table for each part, as Markdown."""
    parts = []
    for title in TITLES:
        own = [line for line in lines if line["part"] == title]
        names = [name for name in ("accuracy", "under PGD-40", "certified") if name in own[0]]
        rows = []
        for way in dict.fromkeys(line["way"] for line in own):
            means = (np.mean([line[name] for line in own if line["way"] == way]) for name in names)
            rows.append([way, *(f"{mean:.1%}" for mean in means)])
        parts.append(table([title, *names], rows))
    seeds = len({line["seed"] for line in lines})
    caption = (
        f"Means over {seeds} seeds on 360 held-out digits. Robustness: each pixel, of 0 to 1, moves by up to {EPS}. "
        f"Transfer: odd or even from {FEW} rows, from a network that has learned the digits of the others. "
        f"Explanations: the {BLANKED} pixels with the largest attributions to the label are made zero. To repeat: "
        "`python -m bench examples`."
    )
    return "\n\n".join([*parts, caption])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and return its exit code."""
    made = parser("examples", (__doc__ or "").partition("\n")[0])
    made.add_argument("--seeds", type=count, default=5, metavar="N", help="default: %(default)s")
    options = parse(made, arguments)
    train, held = digits()
    parts: tuple[Callable[[Rows, Rows, int], list[Record]], ...] = (robustness, privacy, transfer, explanations)
    lines = [
        {"part": part.__name__, "seed": seed, **line}
        for part in parts
        for seed in range(options.seeds)
        for line in part(train, held, seed)
    ]
    finish("examples", options, lines, text(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
