"""Fused layers as modules, for use inside a larger network."""

from typing import Any

import torch
from torch import Tensor, nn

from fusemlp.describe.checks import as_count
from fusemlp.describe.conflicts import check_together
from fusemlp.describe.network import MLP, Activation, as_activation
from fusemlp.torch.autograd import Bindings, Chain, apply_chain
from fusemlp.torch.modules import as_module


class FusedLinear(nn.Linear):
    """``act(x @ weight.T + bias)`` in one call, with autograd: nn.Linear with its parameters and initial values.

    x (..., in_features) to (..., out_features), float32, or float64 on the CPU. ``activation`` is a name of the kernel
    contract, or ``LeakyReLU(slope)``, ``PReLU(init)`` or ``ELU(alpha)`` of fusemlp; a PReLU's slope is the parameter
    ``slope``.
    Gradients of the first order only. Works under ``torch.compile``, also with ``fullgraph=True``.
    """

    slope: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str | Activation = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        as_count("in_features", in_features, minimum=1)
        as_count("out_features", out_features, minimum=1)
        chosen = as_activation("activation", activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = chosen
        self._bindings = Bindings()
        slope = torch.full((1,), chosen.slope, device=device, dtype=dtype)
        self.register_parameter("slope", nn.Parameter(slope) if chosen.name == "prelu" else None)

    def reset_parameters(self) -> None:
        """Draw the initial values of nn.Linear: uniform in +-1 / sqrt(in_features)."""
        super().reset_parameters()
        slope = self._parameters.get("slope")
        if slope is not None:
            nn.init.constant_(slope, self.activation.slope)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        parameters = [one for one in (self.weight, self.bias, self.slope) if one is not None]
        chain = Chain((self.activation,), (0.0,), (self.bias is not None,), 0, 0, self._bindings)
        return apply_chain(chain, x, parameters, self.in_features)

    def extra_repr(self) -> str:
        """Return the options for the printed module."""
        return f"{super().extra_repr()}, activation={self.activation.name!r}"


class FusedMLP(nn.Module):
    """A multi-layer perceptron with autograd whose layers are fused; arguments as ``fusemlp.MLP``, without blocks.

    x (..., sizes[0]) to (..., sizes[-1]). ``state_dict`` has the keys of the plain ``nn.Sequential`` of Linear and
    activations: ``0.weight``, ``0.bias``, ``2.weight``, ... Dropout works in train mode; ``seed`` decides its masks
    (None draws one from torch's generator), and every call takes the next. Gradients of the first order only. Works
    under ``torch.compile``, also with ``fullgraph=True``.
    """

    def __init__(
        self,
        sizes: Any,
        *,
        activation: Any = "relu",
        output_activation: str | Activation = "identity",
        dropout: Any = 0.0,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network = MLP(
            sizes, activation=activation, output_activation=output_activation, dropout=dropout, init="torch"
        )
        check_together({**self.network.uses, "FusedMLP": True})
        self._seed: int | Tensor | None = None if seed is None else as_count("seed", seed, minimum=0)
        # A tensor: a compiled program would be compiled again for another number.
        self._calls = torch.zeros((), dtype=torch.int64, device="cpu")
        count = self.network.layers
        # without dropout
        self._chain = Chain(self.network.activations, (0.0,) * count, (True,) * count, 0, 0, Bindings())
        self._places = [name.split(".") for name in self.network.parameter_shapes()]
        for layer, (inputs, outputs) in enumerate(zip(self.network.sizes, self.network.sizes[1:], strict=False)):
            self.add_module(str(2 * layer), nn.Linear(inputs, outputs, device=device, dtype=dtype))
            chosen = self.network.activations[layer]
            if chosen.name == "prelu":
                self.add_module(str(2 * layer + 1), as_module(chosen, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., sizes[0]) to (..., sizes[-1])."""
        chain, masks, rates = self._chain, None, self.network.dropouts
        if self.training and any(rates):
            seed, calls = 0, 0
            if self._seed is None:
                self._seed = torch.randint(0, 1 << 62, (), device="cpu")
            self._calls += 1
            if torch.compiler.is_compiling():
                masks = torch.stack([torch.as_tensor(counter, device="cpu") for counter in (self._seed, self._calls)])
            else:
                seed, calls = int(self._seed), int(self._calls)
            chain = Chain(chain.activations, rates, chain.biased, seed, calls, chain.bindings)
        parts = self._modules
        parameters = [getattr(parts[part], name) for part, name in self._places]
        return apply_chain(chain, x, parameters, self.network.sizes[0], masks)

    def extra_repr(self) -> str:
        """Return the options for the printed module."""
        return repr(self.network)
