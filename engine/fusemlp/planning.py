"""The program of a network on a backend that need not be there."""

from __future__ import annotations

from fusemlp.buffers import parameter_layout
from fusemlp.execution import choose_plan, open_backend
from fusemlp.losses import Loss, as_loss
from fusemlp.lowering import Inputs, lower_training
from fusemlp.network import MLP
from fusemlp.optimizers import Optimizer, as_optimizer
from fusemlp.validation import as_count
from fusemlp_kernels.contract import MOST_PARTS, Traits
from fusemlp_kernels.errors import unknown_name
from fusemlp_kernels.registry import TRAITS, availability

# Bytes of an element of the parameters, where they are not four.
REAL_BYTES = {"fp64": 8}
# Precisions whose matrix products read another type than the parameters have.
COMPUTE_BYTES = {"bf16": 2, "fp16": 2}


def _traits(backend: str, precision: str) -> Traits:
    if backend == "auto":
        backend = next(name for name, reason in availability().items() if reason is None)
    if backend not in TRAITS:
        raise unknown_name("backend", backend, ["auto", *TRAITS])
    traits: Traits = TRAITS[backend]
    if precision not in traits.precisions:
        raise unknown_name("precision", precision, traits.precisions)
    return traits


def trains_together(backend: str) -> bool:
    """Whether a backend, which need not be there, trains several models in one launch; of an unknown one: no."""
    if backend not in ("auto", *TRAITS):
        return False
    traits = _traits(backend, "fp32")
    if traits.name == "numpy":
        # what it does depends on the libraries that are there
        traits = open_backend("numpy", None, "fp32").traits
    return bool(traits.fleets) or (traits.resident is not None and "resident" in traits.plans)


def chosen_plan(
    net: MLP, *, batch_size: int = 32, backend: str = "auto", precision: str = "fp32"
) -> tuple[str, str] | None:
    """What ``plan="auto"`` comes to in ``fit``, and why; None where that is not a matter of the network."""
    traits = _traits(backend, precision)
    if traits.resident is None:
        return None
    return choose_plan("auto", traits, net.sizes, batch_size, precision)


def plan_text(
    net: MLP,
    *,
    loss: str | Loss = "cross_entropy",
    optimizer: str | Optimizer = "sgd",
    batch_size: int = 32,
    backend: str = "auto",
    precision: str = "fp32",
) -> str:
    """The step program of a network on a backend that need not be installed, as text.

    Raises ArgumentError for impossible values.
    """
    traits = _traits(backend, precision)
    chosen_loss, chosen_optimizer = as_loss(loss), as_optimizer(optimizer)
    chosen_loss.check_network(net)
    chosen_optimizer.check_network(net)
    real_bytes = REAL_BYTES.get(precision, 4)
    batch_size = as_count("batch_size", batch_size, minimum=1)
    program = lower_training(
        net,
        chosen_loss.spec(accuracy=chosen_loss.is_classification),
        chosen_optimizer.rule(total_updates=1),
        chosen_optimizer.options_for,
        batch_size,
        traits,
        parameter_layout(net, row_multiple=traits.row_multiple, item_bytes=real_bytes),
        Inputs(batch_size, indexed=True, class_weighted=chosen_loss.class_weight is not None),
        seed=0,
        real_bytes=real_bytes,
        compute_bytes=COMPUTE_BYTES.get(precision),
        scaled=precision == "fp16",
        most_parts=MOST_PARTS,
    )
    return str(program)
