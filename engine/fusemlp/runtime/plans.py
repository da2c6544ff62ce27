"""The kernels' backends, which this folder alone of the engine knows; the plan of a step, and the program of one.

The program may be for a backend that is absent.
"""

from collections.abc import Sequence

from fusemlp.describe.checks import as_count
from fusemlp.describe.conflicts import BESIDE, Features, check_together
from fusemlp.describe.losses import Loss, as_loss
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Optimizer, as_optimizer
from fusemlp.inputs.arrays import Array
from fusemlp.program.builder import Inputs, Step
from fusemlp.program.layout import parameter_layout, short_names
from fusemlp.program.lowering import lower, trained_by
from fusemlp.program.passes import sums_over
from fusemlp.program.program import ALONE, ORDERED, Program, Sharding
from fusemlp.runtime.memory import REAL_BYTES, compute_bytes
from fusemlp.runtime.ranks import own_card
from fusemlp_kernels import registry
from fusemlp_kernels.contract import MOST_PARTS, Backend, Traits, narrow_refusal, resident_refusal, step_flops
from fusemlp_kernels.errors import BackendUnavailableError, unknown_name
from fusemlp_kernels.numpy import launches
from fusemlp_kernels.philox import row_order as shuffled_rows
from fusemlp_kernels.registry import PLANS

TRAITS, availability = registry.TRAITS, registry.availability
open_backend, first_available = registry.backend, registry.choose
# The threads that the calling thread may use on the CPU now; the limits by name, whose least they are; and a context in
# which launches of the calling thread on the numpy backend have no other threads.
cpu_threads, thread_limits, one_thread = launches.threads, launches.limits, launches.one_thread

# of all backends
PRECISIONS = {precision for traits in TRAITS.values() for precision in traits.precisions}

# The reason for a plan that the user named.
ASKED = "asked for"
UNPROVEN = f"{ASKED}; no card has run it yet"
CALLS = "a loss of the caller's is called between the launches of a step, from Python"
# Steps between two checks for Ctrl-C. On the host they have this many floating-point operations: a tenth of a second on
# two cores with AVX2, a second on a slow one.
UNINTERRUPTED = 256
COMPILED_UNINTERRUPTED = 4096
UNINTERRUPTED_FLOPS = 1e10
# Steps that call a function of the caller's, which may take long.
CALLED_BACK = 16
# The longest that a launch of many steps may take on a GPU.
LAUNCH_SECONDS = 0.05
# On a card the plans of which a launch has many steps.
LOOPED = ("card", "chip", "resident")
# And those of which a launch has many models.
AT_ONCE = ("chip", "resident")


def open_here(name: str, device: str | None, precision: str) -> Backend:
    """Return a backend on a device: by default, in a process of torchrun, on the card of its number if it sees that."""
    found, card = open_backend(name, device, precision), own_card()
    if device is not None or card is None or not found.device.startswith("cuda"):
        return found
    try:
        return open_backend(found.traits.name, card, precision)
    except BackendUnavailableError:
        # it may see its own card alone; ranks with one card refuse to train together
        return found


def torch_backend(device_type: str) -> str:
    """Return the name of the backend that computes on torch's tensors of a device, "cpu" or "cuda", in their memory."""
    return "numpy" if device_type == "cpu" else "triton"


def row_order(backend_name: str, plan: str, n: int, seed: int, epoch: int) -> Array:
    """The order of the rows in an epoch, (n,) int64: the same for all, and compiled where numba compiles the plan."""
    if backend_name == "numpy" and plan == "resident":
        return launches.row_order(n, seed, epoch)
    return shuffled_rows(n, seed, epoch)


def was_asked(reason: str) -> bool:
    """Return True if a plan's reason is that the user named it."""
    return reason.startswith(ASKED)


def has_plan(traits: Traits, plan: str, net: MLP, precision: str) -> bool:
    """Return True if a backend can go on with a plan of another engine for such a network."""
    if plan not in traits.plans:
        return False
    if plan == "narrow":
        return narrow_refusal(traits, net.sizes, net.activations[:-1], precision) is None
    # for batches as long as those of the other
    limits = traits.looped(plan) if plan in LOOPED else None
    return resident_refusal(limits, traits.name, net.widths, 1, precision, ()) is None


def choose_plan(
    plan: str,
    traits: Traits,
    net: MLP,
    batch: int,
    precision: str,
    models: int = 1,
    *,
    features: Features | None = None,
) -> tuple[str, str]:
    """The plan that ``plan`` ("auto" or a name) comes to on a backend, for ``models`` networks like ``net`` that train
    at once, and why; ``features``: those of the training, by default the network's.

    Raises ArgumentError for an unknown name, BackendUnavailableError for a plan that the backend does not have, or not
    for such a network.
    """
    if plan not in ("auto", *PLANS):
        raise unknown_name("plan", plan, ["auto", *PLANS])
    if plan == "narrow" and plan in traits.plans:
        reason = narrow_refusal(traits, net.sizes, net.activations[:-1], precision)
        if reason is not None:
            raise BackendUnavailableError(f"plan: {reason}; use plan='auto'")
        return plan, UNPROVEN
    features = net.uses if features is None else features
    if "function" in features and not traits.on_host and plan in ("auto", "graph"):
        return "eager", CALLS
    beside = [words for feature, words in BESIDE.items() if feature in features]
    refusal = resident_refusal(traits.looped(plan), traits.name, net.widths, batch, precision, beside)
    if plan == "auto":
        return _fastest(traits, refusal, net.widths, batch * net.members, models)
    if plan not in traits.plans:
        raise BackendUnavailableError(
            f"plan: the {traits.name} backend has {', '.join(traits.plans)}, got {plan!r}; use plan='auto'"
        )
    if plan in LOOPED and refusal is not None:
        raise BackendUnavailableError(f"plan: {refusal}; use plan='auto'")
    return plan, UNPROVEN if plan in ("card", "chip") else ASKED


def _fastest(traits: Traits, refusal: str | None, sizes: Sequence[int], rows: int, models: int) -> tuple[str, str]:
    best = traits.plans[-1]
    if best == "eager":
        return best, f"the {traits.name} backend starts its calls one after another"
    if traits.name == "numpy":
        return best, "fit runs its steps in a loop that numba has compiled"
    if best != "resident" or traits.resident is None:
        return best, f"the fastest plan of the {traits.name} backend"
    if refusal is not None:
        return traits.stepwise, refusal
    # a multiprocessor a model; the launches of one model after those of another
    resident = traits.resident.resident_seconds(step_flops(sizes, rows))
    other = traits.resident.graph_seconds(sizes, rows) * models
    said = "a step" if models == 1 else f"a step of {models} models"
    said += f" is estimated to take {resident * 1e6:.3g} us in the resident kernel and {other * 1e6:.3g} us in launches"
    if resident > other:
        return traits.stepwise, said
    return best, f"{said}: fit runs many steps in one launch"


def resident_chunk(traits: Traits, flops: int, plan: str = "resident") -> int:
    """Return the steps of one launch of a plan with many steps a launch, a step having ``flops`` operations.

    A launch takes about a tenth of a second or less, so that the display and Ctrl-C need not wait.
    """
    limits = traits.looped(plan)
    if limits is None:
        return max(1, min(COMPILED_UNINTERRUPTED, int(UNINTERRUPTED_FLOPS / flops)))
    return max(1, int(LAUNCH_SECONDS / limits.resident_seconds(flops)))


def shared_plan(
    alone: tuple[str, str], traits: Traits, sharding: Sharding, uncaptured: str | None = None
) -> tuple[str, str]:
    """Return the plan of several processes on a backend, whose plan of one is ``alone``, and why. ``uncaptured``: why
    collectives cannot be part of a graph, if they cannot.

    Raises BackendUnavailableError for a graph asked for that they do not have; ``conflicts`` has other refusals.
    """
    plan, reason = alone
    between = f"a collective between them ({sharding})"
    if traits.on_host:
        return plan, f"two launches a step, and {between}"
    # not by a checkpoint, whose engine may have been alone
    asked = reason in (ASKED, UNPROVEN, CALLS)
    if asked and plan == "graph" and uncaptured is not None:
        raise BackendUnavailableError(f"plan: there is no graph of a distributed step: {uncaptured}; leave plan out")
    if asked:
        return alone
    if "graph" in traits.plans and uncaptured is None:
        return "graph", f"the launches of a step, and {between}, in a graph"
    why = "" if uncaptured is None else f": {uncaptured}"
    return "eager", f"the launches of a step, and {between}, one after another{why}"


def shares_launches(traits: Traits) -> bool:
    """Return True if the resident plan of several models is one launch."""
    return traits.resident is not None and "resident" in traits.plans


def planned(
    net: MLP,
    *,
    loss: str | Loss = "cross_entropy",
    optimizer: str | Optimizer = "sgd",
    batch_size: int = 32,
    backend: str = "auto",
    precision: str = "fp32",
    devices: int | None = None,
    reduce: str = ORDERED,
) -> tuple[Program, tuple[str, str] | None]:
    """Return the step program that ``fit`` runs on a backend that need not be installed, under ``plan="auto"``.

    With ``devices`` it is that of one of this many processes which train together. The second is the plan and why, None
    if it does not depend on the network.

    Raises ArgumentError or ArgumentTypeError for impossible values, BackendUnavailableError for ``devices`` of a
    backend that trains in one process.
    """
    if backend == "auto":
        backend = next(name for name, reason in availability().items() if reason is None)
    if backend not in TRAITS:
        raise unknown_name("backend", backend, ["auto", *TRAITS])
    traits, sharding = TRAITS[backend], ALONE
    if precision not in traits.precisions:
        raise unknown_name("precision", precision, traits.precisions)
    check_together({**net.uses, traits.name: True})
    if devices is not None:
        check_together({**net.uses, "ranks": "devices", traits.name: True})
        sharding = Sharding(reduce, as_count("devices", devices)).check()
    chosen_loss, chosen_optimizer = as_loss(loss), as_optimizer(optimizer)
    features = {**net.uses, **chosen_loss.uses}
    check_together({**features, traits.name: True})
    chosen_loss.check_network(net)
    chosen_optimizer.check_network(net)
    real_bytes = REAL_BYTES.get(precision, 4)
    rows = sharding.rows(as_count("batch_size", batch_size, minimum=1))
    alone = choose_plan("auto", traits, net, batch_size, precision, features=features)
    step = Step(
        net,
        rows,
        traits,
        parameter_layout(net, row_multiple=traits.row_multiple, item_bytes=real_bytes),
        Inputs(rows, indexed=True, class_weighted=chosen_loss.class_weight is not None),
        chosen_loss.spec(accuracy=chosen_loss.is_classification),
        real_bytes,
        compute_bytes(traits, precision),
        chosen_optimizer.rule(),
        trained_by(chosen_optimizer, short_names(net)),
        scaled=precision == "fp16",
        most_parts=MOST_PARTS,
        resident=alone[0] == "resident" and (traits.on_host or not sharding),
        passes=sums_over(sharding),
    )
    shared = shared_plan(alone, traits, sharding) if sharding else alone
    return lower(step), None if traits.resident is None else shared
