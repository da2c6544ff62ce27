"""Trainings that resist attacks without training on attacked rows alone, as descriptions."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from fusemlp.describe.adversarial import ELSEWHERE, PGD, Norm, Seed, as_bounds
from fusemlp.describe.description import Count, Description, Positive
from fusemlp.describe.elsewhere import knows_names_of
from fusemlp.describe.losses import CrossEntropy, Loss
from fusemlp.describe.network import MLP
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


@dataclass(frozen=True)
class TRADES(Hardening):
    """Training that trades accuracy for robustness: ``fit(..., adversarial=TRADES(0.1, beta=6.0))``.

    The loss is that of the rows plus ``beta`` times the divergence KL(p, q) of the probabilities q of changed rows from
    their own p; both have a gradient. ``steps`` of ``step_size`` (None: 2.5 * eps / steps) from a random change of
    ``seed`` on raise the divergence (Zhang et al., "Theoretically principled trade-off between robustness and
    accuracy", 2019). ``norm`` as in ``PGD``. A larger ``beta`` is for more robustness and less accuracy.
    """

    kind = "trades"

    steps: Count = 10
    step_size: Positive | None = None
    beta: Positive = 6.0
    norm: Norm = "inf"
    _: KW_ONLY
    seed: Seed = 0

    @property
    def plain(self) -> PGD:
        return self.attack

    @property
    def attack(self) -> PGD:
        return PGD(self.eps, self.steps, self.step_size, self.norm, seed=self.seed, bounds=self.bounds)

    def check(self, net: MLP, loss: Loss) -> None:
        """Raise ArgumentError for what it cannot train."""
        if not isinstance(loss, CrossEntropy):
            raise ArgumentError(f"adversarial: TRADES needs the loss cross_entropy, this engine has {loss.kind!r}")
        if loss.class_weight is not None or loss.ignore_index is not None:
            raise ArgumentError(
                "loss: TRADES weighs the divergence of each row like its loss; leave out class_weight and "
                "ignore_index, and give the weights to fit, class_weight=... or sample_weight=..."
            )
        if any(net.dropouts):
            raise ArgumentError(
                f"adversarial: TRADES takes no dropout, and the network has {net.dropouts}; leave it out"
            )


def _elsewhere(kind: str) -> dict[str, str]:
    return {
        name: sentence.replace("PGD(", f"{kind}(") for name, sentence in ELSEWHERE.items() if "restarts" not in sentence
    }


_REPEATS = dict.fromkeys(("m", "replays", "n_repeats", "steps"), "it is called repeats here: Free(0.1, repeats=4)")
knows_names_of(Free, _elsewhere("Free") | _REPEATS)
_OTHERS = {"perturb_steps": "it is called steps here", "distance": "it is called norm here, 'inf' or 2"}
knows_names_of(TRADES, _elsewhere("TRADES") | _OTHERS)
