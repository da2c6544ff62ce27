"""Attacks on the inputs of a network, and interval bounds of its outputs, as descriptions of what it trains against.

Attacks serve ``Engine.attack`` and adversarial training; interval bounds are those of Gowal et al., "On the
effectiveness of interval bound propagation for training verifiably robust models", 2018.
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar, Self, TypeAlias

from fusemlp.describe.checks import as_kind, as_number, check_choice, knows_names_of
from fusemlp.describe.conflicts import Features
from fusemlp.describe.description import Count, Description, Flag, Fraction, Positive, Seed, Share
from fusemlp_kernels.contract import Perturbation
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

NORMS = ("inf", "2")


def _as_norm(argument: str, value: object) -> str:
    known: dict[Any, Any] = {2: "2", float("inf"): "inf"}
    return check_choice(argument, known.get(value, value) if isinstance(value, Hashable) else value, NORMS)


Bounds: TypeAlias = tuple[float, float]


def as_bounds(argument: str, value: Any) -> Bounds:
    """Return a pair of numbers, the lower one first."""
    if isinstance(value, str) or not isinstance(value, Iterable) or len(pair := tuple(value)) != 2:
        raise ArgumentTypeError(f"{argument}: expected (low, high) such as (0.0, 1.0), or None, got {value!r}")
    low, high = (as_number(argument, one) for one in pair)
    if low >= high:
        raise ArgumentError(f"{argument}: expected (low, high) with low < high, got {value!r}")
    return low, high


@dataclass(frozen=True)
class Adversary(Description, family="adversarial"):
    """The base of all that a training can be against; one of this class itself changes nothing."""

    # whether its strength rises over the updates, so that something runs between gradients and update
    ramps: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Invert ``to_config``; that of a training by TRADES, of an earlier release, is its PGD."""
        if config.get("kind") == "trades":
            shared = {name: value for name, value in config.items() if name != "beta"}
            config = PGD(config["eps"]).to_config() | shared | {"kind": PGD.kind}
        return super().from_config(config)

    @property
    def bounds(self) -> Bounds | None:
        """The least and the greatest value of an input, if they are limited."""
        return None

    @property
    def uses(self) -> Features:
        """The features that a training against it uses, for ``conflicts``."""
        return {}

    @property
    def plain(self) -> "PGD | None":
        """The projected gradient steps that change the inputs, if such do."""
        return None

    def settled(self, epochs: int, planned: int | None = None) -> int:
        """Return the first of ``epochs``, from 0, that may be judged: the task no longer changes."""
        return 0


# Plain training.
NONE = Adversary()


@dataclass(frozen=True)
class Attack(Adversary):
    """Changes inputs by at most ``eps``, in their own units, to raise the loss of their labels.

    The changed inputs stay within ``bounds``, (low, high), if given.
    """

    eps: Positive
    _: KW_ONLY
    bounds: Annotated[Bounds, as_bounds] | None = None

    @property
    def uses(self) -> Features:
        return {"adversarial": self, "attack": self}

    @property
    def plain(self) -> "PGD":
        """The same attack as projected gradient steps."""
        raise NotImplementedError

    def perturbation(self) -> Perturbation:
        """Return what the kernels are told."""
        own, (low, high) = self.plain, self.bounds or (-float("inf"), float("inf"))
        return Perturbation(own.eps, own.length, own.norm, low, high, own.seed if own.random_start else None)


@dataclass(frozen=True)
class FGSM(Attack):
    """One step of ``eps`` in the direction of the sign of the gradient (Goodfellow, Shlens and Szegedy, 2015)."""

    kind = "fgsm"

    @property
    def plain(self) -> "PGD":
        return PGD(self.eps, steps=1, step_size=self.eps, random_start=False, bounds=self.bounds)


@dataclass(frozen=True)
class PGD(Attack):
    """Steps along the gradient, each projected back to ``eps`` (Madry et al., 2018): ``PGD(0.1, bounds=(0, 1))``.

    ``steps`` of ``step_size`` (None: 2.5 * eps / steps) each. ``norm``: "inf", each input changes by up to eps, or 2,
    the row by up to eps in the Euclidean norm. ``random_start``: begin at a random change of ``seed``, and not at 0.
    ``restarts``: of this many attacks from other starts, keep for each row the one with the largest loss.
    """

    kind = "pgd"

    steps: Count = 10
    step_size: Positive | None = None
    norm: Annotated[str, _as_norm] = "inf"
    _: KW_ONLY
    restarts: Count = 1
    random_start: Flag = True
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restarts > 1 and not self.random_start:
            raise ArgumentError(
                f"restarts: without a random start all {self.restarts} attacks are the same; leave out "
                "random_start=False"
            )

    @property
    def length(self) -> float:
        """The length of a step."""
        return 2.5 * self.eps / self.steps if self.step_size is None else self.step_size

    @property
    def plain(self) -> "PGD":
        return self


def as_attack(argument: str, value: object) -> Attack:
    """Return ``value`` if it is an attack; raises ArgumentTypeError."""
    return as_kind(argument, value, Attack, "an attack such as PGD(0.1) or FGSM(0.1)")


def as_adversary(argument: str, value: object) -> Adversary:
    """Return what a training is against; raises ArgumentError or ArgumentTypeError for what it cannot be."""
    how = NONE if value is None else as_kind(argument, value, Adversary, "an attack such as PGD(0.1), or IBP(0.1)")
    if how.plain is not None and how.plain.restarts > 1:
        raise ArgumentError(f"{argument}: restarts are for Engine.attack; training takes one, restarts=1")
    return how


@dataclass(frozen=True)
class IBP(Adversary):
    """Training for certified accuracy: ``fit(..., adversarial=IBP(0.1, bounds=(0, 1)))``.

    The loss is ``kappa`` times that of the rows plus 1 - kappa times the cross-entropy of their worst case: the lower
    bound of the logit of the label and the upper bounds of the others, for inputs within ``eps`` of the row, in its own
    units, and within ``bounds``, (low, high), if given.

    The first share ``warmup`` of the updates is plain training. In the share ``ramp`` after it eps rises from 0, and
    the share of the plain loss falls from 1 to kappa. ``fit(early_stopping=)``, the best epoch and ReduceOnPlateau
    judge no epoch before the end of the ramp. The callbacks EarlyStopping, ModelCheckpoint and ReduceLROnPlateau judge
    all epochs; the first has ``start_from_epoch``.
    """

    kind = "ibp"
    ramps = True

    eps: Positive
    kappa: Share = 0.5
    _: KW_ONLY
    warmup: Fraction = 0.1
    ramp: Share = 0.5
    bounds: Annotated[Bounds, as_bounds] | None = None

    @property
    def uses(self) -> Features:
        return {"adversarial": self, "IBP": self}

    def at(self, progress: float) -> tuple[float, float]:
        """Return eps and the share of the plain loss after a share of the updates."""
        risen = progress - self.warmup
        reached = float(risen >= 0.0) if not self.ramp else min(1.0, max(0.0, risen / self.ramp))
        return self.eps * reached, 1.0 - (1.0 - self.kappa) * reached

    def settled(self, epochs: int, planned: int | None = None) -> int:
        """Return the first of ``epochs`` that begins after the ramp, from 0; no later one than the last.

        ``planned``: the epochs of which the ramp is a share, if it is not ``epochs``.
        """
        # 0.1 + 0.2 is a little more than 0.3
        ramped = math.ceil(round((self.warmup + self.ramp) * (epochs if planned is None else planned), 9))
        return min(epochs - 1, ramped)


for _cls in (FGSM, PGD, IBP):
    # its error lists the names here: other libraries call them epsilon, alpha, max_iter
    knows_names_of(_cls, {})
Adversary.kinds = {attack.kind: attack for attack in (FGSM, PGD, IBP)}
