"""Training with interval bounds as a description (Gowal et al., "On the effectiveness of interval bound propagation for
training verifiably robust models", 2018)."""

import math
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Annotated

from fusemlp.describe.adversarial import Adversary, Bounds, as_bounds
from fusemlp.describe.checks import as_number
from fusemlp.describe.conflicts import Features
from fusemlp.describe.description import Fraction, Positive
from fusemlp.describe.elsewhere import knows_names_of

Share = Annotated[float, partial(as_number, low=0.0, high=1.0)]


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


# Arguments of other implementations.
_ELSEWHERE = {
    **dict.fromkeys(("epsilon", "eps_max", "radius"), "it is called eps here: IBP(0.1)"),
    **dict.fromkeys(("clip_min", "clip_max", "clip_values"), "it is called bounds here: bounds=(0.0, 1.0)"),
    **dict.fromkeys(("warmup_epochs", "warm_up"), "it is called warmup here, a share of the updates: warmup=0.1"),
    **dict.fromkeys(("ramp_epochs", "rampup"), "it is called ramp here, a share of the updates: ramp=0.5"),
}
knows_names_of(IBP, _ELSEWHERE)
