"""Programs of training steps and forward passes, lowered for a backend that need not be there."""

from hypothesis import strategies as st

from fusemlp import MLP, SGD, Adam, AdamW, CrossEntropy, LeakyReLU, ParameterOptions
from fusemlp.describe.losses import as_loss
from fusemlp.describe.optimizers import as_optimizer
from fusemlp.program.builder import Inputs, Step
from fusemlp.program.layout import parameter_layout, persistent_places, plan_workspace, short_names
from fusemlp.program.lowering import lower, trained_by
from fusemlp.program.passes import Penalty
from fusemlp_kernels.contract import ACTIVATIONS, Ridge
from fusemlp_kernels.registry import TRAITS

BACKENDS = tuple(TRAITS)
ELEMENTWISE = ("mse", "mae", "huber", "quantile")
TAKE_LOGITS = ("cross_entropy", "binary_cross_entropy", "poisson")
FROZEN = ParameterOptions(trainable=False)


def layout_of(net, backend, real_bytes=4):
    return parameter_layout(net, row_multiple=TRAITS[backend].row_multiple, item_bytes=real_bytes)


def training_program(
    net,
    loss="cross_entropy",
    optimizer="sgd",
    batch_size=8,
    backend="numpy",
    *,
    rows=20,
    indexed=True,
    weighted=False,
    soft=False,
    accuracy=None,
    real_bytes=4,
    seed=3,
    **options,
):
    """Return ``Engine``'s program for ``fit`` (``indexed``: a batch is picked from ``rows`` rows) or for ``step``."""
    loss, optimizer = as_loss(loss), as_optimizer(optimizer)
    step = Step(
        net,
        batch_size,
        TRAITS[backend],
        layout_of(net, backend, real_bytes),
        Inputs(rows if indexed else batch_size, indexed, weighted, loss.class_weight is not None),
        loss.spec(accuracy=loss.is_classification if accuracy is None else accuracy, soft=soft),
        real_bytes,
        rule=optimizer.rule(),
        trained=trained_by(optimizer, short_names(net)),
        seed=seed,
        **options,
    )
    return lower(step)


def inference_program(net, loss=None, batch_size=8, backend="numpy", *, real_bytes=4):
    """The forward pass up to the outputs, or with ``loss`` up to its sums."""
    spec = None if loss is None else as_loss(loss).spec(accuracy=False)
    layout = layout_of(net, backend, real_bytes)
    return lower(Step(net, batch_size, TRAITS[backend], layout, Inputs(batch_size), spec, real_bytes))


def planned(program, net, backend="numpy"):
    """The places of all values that have memory of the engine's, as ``BoundProgram`` gives them to the verifier."""
    ranges = plan_workspace(program, row_multiple=TRAITS[backend].row_multiple).ranges
    return {**ranges, **persistent_places(program, layout_of(net, backend, program.real_bytes))}


@st.composite
def cases(draw):
    """A network, a backend, and the program of a training step or of a forward pass."""
    hidden = draw(st.integers(0, 3))
    sizes = draw(st.lists(st.integers(1, 20), min_size=hidden + 1, max_size=hidden + 1))
    # 600 outputs are more than the GPU backends fuse with the loss
    outputs = draw(st.sampled_from([2, 3, 9, 600]))
    activations = st.sampled_from([*ACTIVATIONS, LeakyReLU(0.2)])
    loss = draw(st.sampled_from([*TAKE_LOGITS, *ELEMENTWISE, "weighted classes"]))
    takes_logits = loss in TAKE_LOGITS or loss == "weighted classes"
    net = MLP(
        [*sizes, outputs],
        activation=draw(st.lists(activations, min_size=hidden, max_size=hidden)),
        output_activation="identity" if takes_logits else draw(activations),
        dropout=draw(st.lists(st.sampled_from([0.0, 0.3]), min_size=hidden, max_size=hidden)),
    )
    if loss == "weighted classes":
        loss = CrossEntropy(class_weight=[1.0] * outputs)
    backend = draw(st.sampled_from(BACKENDS))
    batch_size = draw(st.integers(1, 33))
    if draw(st.booleans()):
        chosen = draw(st.sampled_from([None, loss if isinstance(loss, str) else "cross_entropy"]))
        return net, backend, inference_program(net, chosen, batch_size, backend)
    frozen = draw(st.sets(st.sampled_from(list(net.parameter_shapes()))))
    options = {
        "per_parameter": dict.fromkeys(frozen, FROZEN),
        "clip_norm": draw(st.sampled_from([None, 1.0])),
        "accumulate": draw(st.sampled_from([1, 3])),
    }
    optimizers = [SGD(0.1, **options), SGD(0.1, momentum=0.9, **options), Adam(**options), AdamW(**options)]
    resident = {}
    if draw(st.booleans()):
        resident = {
            "resident": True,
            "passes": draw(st.sampled_from([(), (Penalty(Ridge()),), (Penalty(Ridge(0.1, 2.0)),)])),
        }
    program = training_program(
        net,
        loss,
        draw(st.sampled_from(optimizers)),
        batch_size,
        backend,
        indexed=bool(resident) or draw(st.booleans()),
        weighted=draw(st.booleans()),
        soft=loss == "cross_entropy" and draw(st.booleans()),
        **resident,
    )
    return net, backend, program
