"""Encodings, normalisation and residual blocks, as descriptions of parts of a network."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from fusemlp.describe.checks import as_count, check_choice
from fusemlp.describe.description import Count, Description, Flag, Positive


@dataclass(frozen=True)
class Normalisation(Description, family="norm"):
    """The base of ``LayerNorm`` and ``RMSNorm``: what a layer's rows are normalised by before its activation."""

    # the module of torch
    torch: ClassVar[str] = ""
    # whether the mean of a row is taken from it first
    centred: ClassVar[bool] = False
    # the letter of a tensor's name in a program, its name in torch, and the number that fills it at the start
    tensors: ClassVar[tuple[tuple[str, str, float], ...]] = (("g", "weight", 1.0),)
    eps: Positive = 1e-5


@dataclass(frozen=True)
class LayerNorm(Normalisation):
    """``(z - mean) / sqrt(variance + eps) * weight + bias`` over the N values of a row (Ba, Kiros and Hinton, 2016)."""

    kind = "layer"
    torch = "LayerNorm"
    centred = True
    tensors = ("g", "weight", 1.0), ("c", "bias", 0.0)


@dataclass(frozen=True)
class RMSNorm(Normalisation):
    """``z / sqrt(mean(z**2) + eps) * weight`` over the N values of a row (Zhang and Sennrich, 2019); it has no bias."""

    kind = "rms"
    torch = "RMSNorm"


NORMS: dict[str, type[Normalisation]] = {cls.kind: cls for cls in (LayerNorm, RMSNorm)}
Normalisation.kinds = NORMS
_NAMES_ELSEWHERE = {"layer_norm": "layer", "layernorm": "layer", "ln": "layer", "rms_norm": "rms", "rmsnorm": "rms"}


def as_norm(argument: str, value: Any) -> Normalisation | None:
    """Return the normalisation for a name, an object or None; errors call it ``argument``."""
    if value is None or isinstance(value, Normalisation):
        return value
    expected = "'layer', 'rms', an object such as LayerNorm(eps=1e-5), or None"
    return NORMS[check_choice(argument, value, NORMS, expected=expected, elsewhere=_NAMES_ELSEWHERE)]()


@dataclass(frozen=True)
class Residual(Description):
    """An entry of ``sizes``: ``depth`` layers whose result is added to their input (He et al., 2016).

    The inner layers have ``width`` units and are like other hidden layers. The last goes back to the width of the
    input, without activation, normalisation and dropout: ``MLP([20, 64, Residual(128), 1])`` is
    ``h = act(linear(20, 64))``, ``h + linear(act(linear(h, 64, 128)), 128, 64)``, then ``linear(64, 1)``.
    """

    width: Count
    depth: Annotated[int, partial(as_count, minimum=2)] = 2


@dataclass(frozen=True)
class Frequency(Description, family="encoding"):
    """Inputs as waves: ``sin(2**k * pi * x)`` and ``cos(2**k * pi * x)`` for each k from 0 to before ``octaves``.

    So a network learns detail in few coordinates, those of a picture or of a scene (Mildenhall et al., "NeRF", 2020).
    Each of K inputs has its ``2 * octaves`` waves side by side, sine before cosine, as in tiny-cuda-nn. The slowest
    repeats after 2, so that -1 and 1 are one point: scale coordinates to 0 to 1. With ``inputs`` the K inputs come
    first, as in NeRF's code (``include_input``).
    """

    kind = "frequency"

    octaves: Annotated[int, partial(as_count, minimum=1, maximum=32)] = 10
    inputs: Flag = False

    def width(self, inputs: int) -> int:
        """Return the number of inputs of the first layer."""
        return inputs * (2 * self.octaves + self.inputs)


Frequency.kinds = {Frequency.kind: Frequency}
