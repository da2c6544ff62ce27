"""Trainings that resist attacks without training on attacked rows alone, as descriptions."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from fusemlp.describe.adversarial import ELSEWHERE, PGD, Norm, as_bounds
from fusemlp.describe.description import Count, Description, Positive
from fusemlp.describe.elsewhere import knows_names_of
from fusemlp.describe.optimizers import Optimizer
from fusemlp_kernels.errors import ArgumentError


@dataclass(frozen=True)
class Hardening(Description):
    """Training for inputs that change by at most ``eps``, in their own units, within ``bounds``, (low, high)."""

    eps: Positive
    _: KW_ONLY
    bounds: Annotated[tuple[float, float], as_bounds] | None = None

    @property
    def plain(self) -> PGD:
        """The steps of the training, as those of an attack."""
        raise NotImplementedError

    @property
    def attack(self) -> PGD:
        """An attack that shows how far the training resists."""
        raise NotImplementedError


@dataclass(frozen=True)
class Free(Hardening):
    """Training against an attack that takes no passes of its own: ``fit(..., adversarial=Free(0.1, repeats=4))``.

    Each batch has ``repeats`` updates, one after another. The backward pass of an update gives the gradient by the
    inputs too; a step of ``step_size`` (None: eps) along it changes what the next update adds to its inputs, also to
    those of the next batch (Shafahi et al., "Adversarial training for free!", 2019). An epoch takes ``repeats`` times
    as long as plain training: train for fewer epochs. ``norm`` as in ``PGD``.
    """

    kind = "free"

    repeats: Count = 4
    step_size: Positive | None = None
    norm: Norm = "inf"

    @property
    def plain(self) -> PGD:
        step = self.eps if self.step_size is None else self.step_size
        return PGD(self.eps, 1, step, self.norm, random_start=False, bounds=self.bounds)

    @property
    def attack(self) -> PGD:
        return PGD(self.eps, norm=self.norm, bounds=self.bounds)

    def check(self, optimizer: Optimizer) -> None:
        """Raise ArgumentError for what it cannot train with."""
        if optimizer.accumulate > 1:
            raise ArgumentError(
                f"accumulate: Free updates at each of its {self.repeats} passes over a batch, got "
                f"{optimizer.accumulate}; use a larger batch_size"
            )


knows_names_of(
    Free,
    {
        **{
            name: sentence.replace("PGD(", "Free(")
            for name, sentence in ELSEWHERE.items()
            if "restarts" not in sentence
        },
        **dict.fromkeys(("m", "replays", "n_repeats", "steps"), "it is called repeats here: Free(0.1, repeats=4)"),
    },
)
