"""Differentially private training as a description, and the privacy that it spends.

Abadi et al., "Deep learning with differential privacy", 2016. The accountant is the library dp-accounting, with privacy
loss distributions (Koskela, Jaelkoe, Honkela, 2020; Doroshenko et al., "Connect the dots", 2022), rounded up. They have
no bound for a very small delta or very little noise; that of zero-concentrated privacy, without sampling, holds for all
(Bun and Steinke, "Concentrated differential privacy", 2016, proposition 1.3).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

from fusemlp.describe.checks import as_count, as_kind, as_number, knows_names_of
from fusemlp.describe.description import Description, OpenFraction, Positive, Seed
from fusemlp_kernels.errors import ArgumentError, MissingLibraryError

# Steps, and the probability with which each took each row.
Spent: TypeAlias = Sequence[tuple[float, int]]
# The accountant rounds a privacy loss up to a multiple of the first; a tail of the second weight is unbounded loss.
ROUNDING, NEGLECTED = 1e-3, 1e-15
# With less noise than this the distribution's numbers overflow.
LEAST_KNOWN = 2e-3
# Figures of the private rows, which no choice may follow.
OF_TRAINING_ROWS = ("loss", "accuracy")
# Noise for a given epsilon is sought from the first up to the second number.
LEAST_NOISE, MOST_NOISE = 0.25, 1e4


@dataclass(frozen=True)
class DPSGD(Description):
    """Private training by clipped gradients and noise, with any optimizer: ``Engine(..., privacy=DPSGD(noise=1.1))``.

    A step takes each row with probability batch_size / rows (Poisson sampling), scales the gradient of each row's loss
    to the norm ``clip`` at most, adds normal noise of the standard deviation ``noise * clip`` to their sum and divides
    by batch_size. The parameters then reveal little about any one row: they are (epsilon, ``delta``)-differentially
    private against adding or removing a row. ``delta`` None: the largest power of ten below 1 / rows.

    ``seed`` is that of sampling and noise. None takes one from the operating system, anew in each process, and no file
    holds it; a seed that is known undoes the privacy, and is for tests.
    """

    noise: Positive
    clip: Positive = 1.0
    _: KW_ONLY
    delta: OpenFraction | None = None
    seed: Seed | None = None

    @classmethod
    def for_epsilon(
        cls,
        epsilon: float,
        *,
        rows: int,
        batch_size: int,
        epochs: int,
        delta: float | None = None,
        clip: float = 1.0,
        seed: int | None = None,
    ) -> "DPSGD":
        """Return the privacy whose training on ``rows`` rows for ``epochs`` epochs spends ``epsilon`` at most.

        Raises ArgumentError if no noise is enough, MissingLibraryError without dp-accounting.
        """
        epsilon = as_number("epsilon", epsilon, low=0.0, low_open=True)
        rows, batch_size = as_count("rows", rows), as_count("batch_size", batch_size)
        steps = as_count("epochs", epochs) * steps_of_an_epoch(rows, batch_size)
        spent, checked = [(sampling_rate(rows, batch_size), steps)], cls(LEAST_NOISE, clip, delta=delta, seed=seed)
        least = usual_delta(rows) if checked.delta is None else checked.delta

        def is_enough(noise: float) -> bool:
            return Accountant(noise).epsilon(spent, least) <= epsilon

        low = high = LEAST_NOISE
        while not is_enough(high):
            low, high = high, 2.0 * high
            if high > MOST_NOISE:
                raise ArgumentError(
                    f"epsilon: no noise up to {MOST_NOISE:g} times clip reaches {epsilon:g} in {steps} steps; give a "
                    "larger epsilon, or fewer epochs"
                )
        # to a thousandth of it
        while high > 1.001 * low and high > LEAST_NOISE:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if is_enough(middle) else (middle, high)
        return replace(checked, noise=high, delta=least)

    def of_model(self, index: int) -> "DPSGD":
        """Return the privacy of a model of a fleet: each has a seed of its own."""
        return self if self.seed is None else replace(self, seed=self.seed + index)

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-able description, without the seed: a file that held it would undo the privacy."""
        return {name: value for name, value in super().to_config().items() if name != "seed"}

    def check_size(self, precision: str) -> None:
        """Raise ArgumentError unless sums of draws are finite in this precision, and no draw is rounded to zero."""
        high, deviation = 1e120 if precision == "fp64" else 1e30, self.noise * self.clip
        if not all(1.0 / high <= size <= high for size in (self.clip, deviation)):
            raise ArgumentError(
                f"privacy: in {precision} clip and noise * clip may be from {1.0 / high:g} to {high:g}, got "
                f"{self.clip:g} and {deviation:g}; give a clip near the norm of a row's gradient, and a noise near 1"
            )


# Arguments of Opacus and TensorFlow Privacy.
_ELSEWHERE = {
    "noise_multiplier": "it is called noise here: DPSGD(noise=1.1)",
    **dict.fromkeys(("max_grad_norm", "l2_norm_clip"), "it is called clip here: DPSGD(noise=1.1, clip=1.0)"),
    "epsilon": "it decides the noise: DPSGD.for_epsilon(3.0, rows=60000, batch_size=256, epochs=20)",
}
knows_names_of(DPSGD, _ELSEWHERE)


def as_privacy(value: object) -> DPSGD | None:
    """Return ``value`` if it is a privacy or None; raises ArgumentTypeError."""
    expected = "a DPSGD such as DPSGD(noise=1.1, clip=1.0), or None"
    return None if value is None else as_kind("privacy", value, DPSGD, expected)


def usual_delta(rows: int) -> float:
    """Return the largest power of ten below 1 / rows."""
    return float(f"1e-{len(str(rows))}")


def sampling_rate(rows: int, batch_size: int) -> float:
    """Return the probability with which a step takes a row."""
    return min(1.0, batch_size / rows)


def steps_of_an_epoch(rows: int, batch_size: int) -> int:
    """Return the steps in which a row is expected once, about."""
    return max(1, round(rows / batch_size))


def joined(spent: Iterable[tuple[float, int]]) -> list[tuple[float, int]]:
    """Return the steps by their sampling rates, each rate once."""
    steps: dict[float, int] = {}
    for rate, count in spent:
        steps[rate] = steps.get(rate, 0) + count
    return [(rate, count) for rate, count in steps.items() if count]


# Epsilons by noise, parts and delta: the models of a fleet ask for the same. At most ``REMEMBERED`` of them.
_KNOWN: dict[tuple[float, tuple[tuple[float, int], ...], float], float] = {}
REMEMBERED = 1000


class Accountant:
    """Computes epsilon for the steps of one noise; from one call to the next it adds the steps in between."""

    def __init__(self, noise: float) -> None:
        self.noise = noise
        self._begin()

    def _begin(self) -> None:
        self._done: dict[float, int] = {}
        # what one call after another has added, and how many of these the total holds
        self._parts: tuple[tuple[float, int], ...] = ()
        self._composed = 0
        self._total: Any = None

    def epsilon(self, spent: Spent, delta: float) -> float:
        """Return an upper bound after these steps. Raises MissingLibraryError without dp-accounting."""
        steps = dict(joined(spent))
        if any(steps.get(rate, 0) < count for rate, count in self._done.items()):
            # training has gone back
            self._begin()
        added = ((rate, count - self._done.get(rate, 0)) for rate, count in steps.items())
        self._parts += tuple((rate, more) for rate, more in added if more)
        self._done = steps
        key = self.noise, self._parts, delta
        epsilon = _KNOWN.get(key)
        if epsilon is None:
            epsilon = self._computed(delta)
            if len(_KNOWN) >= REMEMBERED:
                _KNOWN.clear()
            _KNOWN[key] = epsilon
        return epsilon

    def _computed(self, delta: float) -> float:
        # half the square of what a row changes, in deviations of the noise: sampling makes no loss larger
        rho = 0.5 * sum(self._done.values()) / self.noise / self.noise
        bound = rho + 2.0 * math.sqrt(-rho * math.log(delta))
        if self.noise < LEAST_KNOWN:
            return bound
        for rate, more in self._parts[self._composed :]:
            part = _loss_of_steps(self.noise, rate, more)
            self._total = part if self._total is None else self._total.compose(part, NEGLECTED)
        self._composed = len(self._parts)
        return 0.0 if self._total is None else min(bound, float(self._total.get_epsilon_for_delta(delta)))


@lru_cache(maxsize=16)
def _loss_of_steps(noise: float, rate: float, steps: int) -> Any:
    """The distribution of the privacy loss of ``steps`` steps."""
    try:
        from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
    except ImportError as error:
        raise MissingLibraryError(
            f"privacy: epsilon needs dp-accounting, which cannot be imported ({error}); pip install 'fusemlp[privacy]'"
        ) from error
    # little noise has large losses
    rounding = ROUNDING * max(1.0, noise**-2)
    one = from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=rounding)
    return one.self_compose(steps, NEGLECTED)


def check_accountant() -> None:
    """Raise MissingLibraryError without dp-accounting."""
    _loss_of_steps(1.0, 1.0, 1)
