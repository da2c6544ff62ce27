"""Time adversarial and private training steps and integrated gradients beside torch's libraries.

``python -m bench trust`` prints a table, for 784-128-10 and 128 rows. Both sides run once in each round, in alternating
order, in one process. PGD-10 training beside a plain torch loop, and integrated gradients beside captum, must agree in
their results. Private steps are beside plain ones, and beside Opacus, which draws other noise. Libraries that are not
installed are named as left out.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fusemlp.explanations import attributions
from torch import Tensor, nn

from bench.doors import finish, in_turn, line, parser
from bench.measure import AGREEMENT
from bench.report import Record
from fusemlp import DPSGD, MLP, PGD, SGD, Engine

SIZES, ROWS, BATCHES, RATE = (784, 128, 10), 128, 20, 0.05
EPS, STEPS, POINTS = 0.1, 10, 50
NOISE, CLIP = 1.0, 1.0
# Epsilon is computed once an epoch; private steps are compared with plain ones in epochs longer by this factor.
LONG = 10
# Libraries by the names of their modes here.
LIBRARIES = {"opacus": ("Opacus, hooks", "Opacus, ghost clipping"), "captum": ("captum",)}
Turn = Callable[[], Any]


def rows(times: int = 1) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return pixels from 0 to 1, and labels from a random linear teacher."""
    generator = np.random.default_rng(0)
    X = generator.uniform(size=(ROWS * BATCHES * times, SIZES[0])).astype(np.float32)
    return X, (X @ generator.normal(size=(SIZES[0], SIZES[-1])) - X.sum(axis=1, keepdims=True)).argmax(axis=1)


def made(privacy: DPSGD | None = None) -> Engine:
    """Return the engine of a turn."""
    return Engine(MLP(list(SIZES)), optimizer=SGD(lr=RATE), batch_size=ROWS, backend="numpy", privacy=privacy)


def module_of(engine: Engine) -> nn.Sequential:
    """Return the same network in torch."""
    module = nn.Sequential(nn.Linear(*SIZES[:2]), nn.ReLU(), nn.Linear(*SIZES[1:]))
    module.load_state_dict({name: torch.from_numpy(array) for name, array in engine.state_dict().items()})
    return module


def own_turn(times: int = 1, **given: Any) -> Turn:
    """Return an epoch of fusemlp; it returns the parameters."""
    engine, (X, y) = made(given.pop("privacy", None)), rows(times)
    order = {} if engine.privacy else {"shuffle": False}

    def turn() -> Any:
        engine.fit(X, y, epochs=1, **order, **given)
        return engine.state_dict()["0.weight"]

    return turn


def torch_turn(step: Callable[[nn.Module, Tensor, Tensor], Tensor], module: nn.Module, optimizer: Any) -> Turn:
    """Return an epoch of torch: ``step`` returns a loss whose gradients are then applied; it returns the parameters."""
    X, y = map(torch.from_numpy, rows())

    def turn() -> Any:
        for x, t in zip(X.split(ROWS), y.split(ROWS), strict=True):
            optimizer.zero_grad()
            step(module, x, t).backward()
            optimizer.step()
        return next(module.parameters()).detach().numpy()

    return turn


def attacked(module: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Return the loss of a batch after projected gradient steps (Madry et al., 2018)."""
    adv = x
    for _ in range(STEPS):
        adv = adv.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(module(adv), t), adv)
        adv = torch.clamp(adv.detach() + 2.5 * EPS / STEPS * gradient.sign() - x, -EPS, EPS)
        adv = torch.clamp(x + adv, 0.0, 1.0)
    return nn.functional.cross_entropy(module(adv), t)


def pgd() -> tuple[Turn, Turn]:
    """Return PGD-10 training in torch and here."""
    module = module_of(made())
    how = PGD(EPS, steps=STEPS, random_start=False, bounds=(0, 1))
    theirs = torch_turn(attacked, module, torch.optim.SGD(module.parameters(), lr=RATE))
    return theirs, own_turn(adversarial=how)


def opacus(mode: str) -> tuple[Turn, Turn]:
    """Return private training in Opacus and here, with the same noise and clip."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    module, (X, y) = module_of(made()), rows()
    loader = DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(y)), batch_size=ROWS)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    private, optimizer, *others = PrivacyEngine().make_private(
        module=module, optimizer=optimizer, data_loader=loader, noise_multiplier=NOISE, max_grad_norm=CLIP,
        poisson_sampling=False, grad_sample_mode=mode, criterion=nn.CrossEntropyLoss(),
    )  # fmt: skip
    criterion = others[0] if mode == "ghost" else nn.CrossEntropyLoss()
    theirs = torch_turn(lambda module, x, t: criterion(module(x), t), private, optimizer)
    return theirs, own_turn(privacy=DPSGD(NOISE, CLIP, seed=0))


def captum() -> tuple[Turn, Turn]:
    """Return integrated gradients in captum and here."""
    from captum.attr import IntegratedGradients

    engine, (X, y) = made(), rows()
    X, y = X[:ROWS], y[:ROWS]
    explained, x, t = IntegratedGradients(module_of(engine)), torch.from_numpy(X), torch.from_numpy(y)
    return (
        lambda: explained.attribute(x, target=t, n_steps=POINTS).numpy(),
        lambda: attributions(engine, X, output=y, steps=POINTS).values,
    )


def compare(label: str, sides: Sequence[Turn], *, rounds: int, calls: int = 1, agree: bool = False) -> Record:
    """Return a row of the table; a turn of ``sides`` is ``calls`` steps. With ``agree`` their first results do."""
    first = [copy.deepcopy(side()) for side in sides]
    worst = float(np.abs(first[0] - first[1]).max())
    if agree and not worst <= AGREEMENT:
        raise RuntimeError(f"{label}: results differ by {worst}: these are not the same computation")
    seconds, _ = in_turn(sides, rounds)
    return line(label, *([one / calls for one in side] for side in seconds))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the lines, print the table."""
    options = parser("trust", (__doc__ or "").partition("\n")[0], 15).parse_args(arguments)
    # Opacus warns of its generator, and torch of Opacus's hooks
    warnings.simplefilter("ignore")
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    told: dict[str, Any] = {"rounds": options.rounds, "calls": BATCHES}
    lines = [
        compare(f"PGD-{STEPS} training step: torch", pgd(), agree=True, **told),
        compare(
            "DP-SGD step: fusemlp's plain step",
            (own_turn(LONG), own_turn(LONG, privacy=DPSGD(NOISE, CLIP, seed=0))),
            rounds=options.rounds,
            calls=LONG * BATCHES,
        ),
    ]
    if "opacus" not in missing:
        for name, mode in zip(LIBRARIES["opacus"], ("hooks", "ghost"), strict=True):
            lines.append(compare(f"DP-SGD step: {name}", opacus(mode), **told))
    if "captum" not in missing:
        label = f"integrated gradients, {POINTS} points: captum"
        lines.append(compare(label, captum(), rounds=options.rounds, agree=True))
    for name in missing:
        print(f"bench: left out: {', '.join(LIBRARIES[name])}: not installed; pip install {name}", file=sys.stderr)
    packages = ("torch", *(name for name in LIBRARIES if name not in missing))
    finish("trust", packages, lines, options.out, headers=["784-128-10@128: beside", "theirs", "fusemlp"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
