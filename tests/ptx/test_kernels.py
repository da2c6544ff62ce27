"""The PTX of every class of kernels, executed for sm_80 and sm_90, is within the bounds of the float64 oracle.

A class is a kernel with its constants: the instruction of its matrix products, the path for aligned matrices or for
any, the kind of loss, the optimizer. Activations, dropout, weights and gathered rows are run-time values, which the
cases share out. The bodies are those of the contract's tests.
"""

import pytest
import test_clip_examples as clipping_of
import test_encoding as encoding_of
import test_layers as layers_of
import test_loss as losses_of
import test_members as members_of
import test_nan as nan_of
import test_norms as norms_of
import test_perturb as perturb_of
import test_update as updates_of
from cards import card

from fusemlp_kernels.contract import LossSpec, TensorRule, UpdateRule

ADAM = UpdateRule("adam", decoupled=True, ema=0.9)
RULES = {
    "sgd": UpdateRule("sgd"),
    "momentum": UpdateRule("sgd", momentum=0.9),
    "nesterov": UpdateRule("sgd", momentum=0.9, nesterov=True),
    "adam": ADAM,
}
TENSOR = TensorRule(0.5, 0.01)
CLOCK = {"updates": 3, "rates": [0.1, 0.05, 0.02], "rate_scale": 0.5, "seed": 6}
CLASSES = ("sm_80 mma.sync", "sm_90 mma.sync", "sm_90 wgmma")
GENERAL = [(path, "fp32", False) for path in CLASSES if "mma.sync" in path]
PRODUCTS = [(path, precision, True) for path in CLASSES for precision in ("fp32", "bf16")] + GENERAL
# The other precisions differ in the products alone, and sm_100 has arithmetic on pairs.
LINEAR = [*PRODUCTS, ("sm_80 mma.sync", "fp16", True), ("sm_90 wgmma", "tf32", True), ("sm_100 mma.sync", "fp32", True)]
WEIGHTS = [
    *(("sm_80 mma.sync", "bf16", True), ("sm_90 mma.sync", "fp32", True), ("sm_90 wgmma", "bf16", True)),
    *(*GENERAL, ("sm_100 mma.sync", "bf16", True)),
]


def layouts(aligned, count):
    """Return those of ``count`` inputs, and of the outputs."""
    return (("owned",) * count, "owned") if aligned else (("stepped", "transposed", "plain")[:count], "transposed")


def layer_case(variant, aligned, m, k, n, activation, rate):
    inputs, output = layouts(aligned, 3)
    return layers_of.LayerCase(
        variant, m, k, n, activation=activation, slope=0.3 if activation == "prelu" else 0.0, rate=rate, scale=1.0,
        batch_index=1, layouts=inputs, output_layout=output, seed=3,
    )  # fmt: skip


# The reductions have more steps than the pipeline has stages.
@pytest.mark.parametrize(("path", "precision", "aligned"), LINEAR)
def test_linear(path, precision, aligned):
    with card(path, precision) as emulator:
        case = layer_case(emulator.variant, aligned, 37, 290, 41, "gelu", 0.5)
        layers_of.test_linear.of_case(case, by_row=True, short=2, counted=True, keep_z=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_matrices_that_come_by_tensor_descriptors(precision):
    """They end within a tile, and their reductions within a step."""
    with card("sm_90 TMA", precision) as emulator:
        case = layer_case(emulator.variant, True, 150, 290, 41, "gelu", 0.5)
        layers_of.test_linear.of_case(case, by_row=False, short=0, counted=True, keep_z=True)
        case = layer_case(emulator.variant, True, 150, 41, 290, "prelu", 0.5)
        layers_of.test_grad_input.of_case(case)
    assert emulator.described == {"linear_kernel", "grad_input_kernel"}


@pytest.mark.parametrize("path", CLASSES)
def test_infinity_stays_infinity_in_a_product_of_parts(path):
    with card(path, "fp32") as emulator:
        nan_of.infinities(emulator.variant)


@pytest.mark.parametrize(("path", "precision", "aligned"), PRODUCTS)
def test_grad_input(path, precision, aligned):
    with card(path, precision) as emulator:
        case = layer_case(emulator.variant, aligned, 37, 41, 290, "prelu", 0.5)
        layers_of.test_grad_input.of_case(case)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_small_results_are_reduced_in_parts(target, precision):
    """Two steps along the reduction, the second of which not all parts have."""
    with card(target, precision, processors=9) as emulator:
        variant = emulator.variant
        case = layer_case(variant, True, 37, 530, 41, "gelu", 0.5)
        layers_of.test_linear.of_case(case, by_row=True, short=2, counted=True, keep_z=True)
        layers_of.test_grad_input.of_case(layer_case(variant, True, 37, 41, 530, "prelu", 0.5))
        losses_of.test_linear_loss_grad.of_case(loss_case(variant, True, "entropy", 13), 530, by_x_row=True)
    programs = {("linear_kernel", 9), ("grad_input_kernel", 9), ("linear_loss_grad_kernel", 3)}
    assert set(emulator.launched) == programs


@pytest.mark.parametrize(("path", "precision", "aligned"), WEIGHTS)
def test_grad_weight(path, precision, aligned):
    layers = [
        layers_of.GradWeightLayer(k, n, *layouts(aligned, 2), frozenset(frozen))
        for k, n, frozen in ((70, 33, ""), (9, 20, "w"))
    ]
    with card(path, precision) as emulator:
        layers_of.test_grad_weight.of_case(
            layers, 290, by_row=True, accumulate=2, slope_count=1, wants_norm=True,
            variant=emulator.variant, seed=4,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "precision", "aligned", "rule"),
    [
        *((path, "fp32", True, "adam") for path in CLASSES),
        *((path, "bf16", True, rule) for path, rule in zip(CLASSES, ("sgd", "momentum", "nesterov"), strict=True)),
        *((*general, "adam") for general in GENERAL),
    ],
)
def test_grad_weight_update(path, precision, aligned, rule):
    layers = [(33, 70, "", TENSOR, TensorRule(), layouts(aligned, 2))]
    with card(path, precision) as emulator:
        updates_of.test_grad_weight_update.of_case(
            layers, 290, slope_count=1, by_row=True, rule=RULES[rule], variant=emulator.variant, **CLOCK
        )


ENTROPY = LossSpec("cross_entropy", label_smoothing=0.1, ignore_index=1, accuracy=True)
LOSSES = {
    "entropy": (ENTROPY, "identity"),
    "labels": (LossSpec("cross_entropy", label_smoothing=0.1, ignore_index=1, accuracy=True), "identity"),
    "huber": (LossSpec("huber", delta=0.5, accuracy=True), "prelu"),
}


def loss_case(variant, aligned, loss, n):
    spec, activation = LOSSES[loss]
    inputs, output = layouts(aligned, 3)
    return losses_of.LossCase(
        variant, spec, 37, n, short=2, by_row=True, weights="sparse",
        class_weights="some" if spec is ENTROPY else "none", activation=activation, layouts=inputs,
        output_layout=output, dz="apart", dslope=True, loss_scale=16.0, seed=5,
    )  # fmt: skip


LOSS_CASES = [
    (target, precision, loss, aligned)
    for target in ("sm_80", "sm_90")
    for precision, loss, aligned in (
        *(("fp32", "entropy", True), ("bf16", "huber", True)),
        *(("fp32", "entropy", False), ("fp32", "huber", False)),
    )
]


@pytest.mark.parametrize(("target", "precision", "loss", "aligned"), LOSS_CASES)
def test_linear_loss_grad(target, precision, loss, aligned):
    # with one multiprocessor the reduction is not cut
    with card(target, precision, processors=1) as emulator:
        case = loss_case(emulator.variant, aligned, loss, 13)
        losses_of.test_linear_loss_grad.of_case(case, 150, by_x_row=True)


# Without class weights the target weights of a row are those of its label and of any other.
LABEL_CASES = [
    (target, precision, "labels", aligned)
    for target in ("sm_80", "sm_90")
    for precision, aligned in (("fp32", True), ("bf16", True), ("fp32", False))
]


@pytest.mark.parametrize(("target", "precision", "loss", "aligned"), [*LOSS_CASES, *LABEL_CASES])
def test_loss_grad(target, precision, loss, aligned):
    with card(target, precision) as emulator:
        losses_of.test_loss_grad.of_case(loss_case(emulator.variant, aligned, loss, 300))


@pytest.mark.parametrize(("rule", "precision"), [*((rule, "fp32") for rule in RULES), ("adam", "bf16")])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_update(target, rule, precision):
    """The norm has a kernel of its own."""
    tensors = [(70, TENSOR, 0), (30, None, 1), (1100, TensorRule(), 0)]
    with card(target, precision) as emulator:
        updates_of.test_update.of_case(
            tensors, RULES[rule], clip_norm=0.5, accumulate=2, norm_given=False,
            variant=emulator.variant, **CLOCK,
        )  # fmt: skip


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_advance(target):
    with card(target, "fp32") as emulator:
        updates_of.test_advance.of_case(
            emulator.variant, ADAM, accumulate=2, updates=7, rates=[0.1, 0.2], ahead=1, scale=0.1,
            walk=(4, 8, 4),
        )  # fmt: skip


@pytest.fixture(params=[(target, precision) for target in ("sm_80", "sm_90") for precision in ("fp32", "bf16")])
def variant(request):
    target, precision = request.param
    with card(target, precision) as emulator:
        yield emulator.variant


def test_attacks(variant):
    perturb_of.test_a_start_and_a_step_are_those_of_the_definition(variant, "2", (0.1, 0.9))


def test_privacy(variant):
    layers = [(300, 41, True, True, (("owned",), "owned")), (13, 300, True, False, (("stepped",), "transposed"))]
    clipping_of.test_clip_examples.of_case(layers, 13, short=2, by_row=True, share=0.5, variant=variant, seed=3)
    clipping_of.test_update_adds_noise.of_case(
        [(13, 17), (300,)], UpdateRule("adam"), 0.5, 7.0, updates=6, counts=(5, 0, 3), parts=1, variant=variant, seed=4
    )


def test_members(variant, monkeypatch):
    monkeypatch.setattr(members_of, "shapes_of", lambda variant: members_of.SHAPES[1:3])
    members_of.test_affine_members_and_back(variant, "silu")
    members_of.test_the_first_factors_take_the_rows_of_a_batch(variant)
    members_of.test_heads_and_their_gradients(variant)


def test_norms(variant, monkeypatch):
    """Rows of each tile, and of several; and more columns than the gradients have at a time."""
    monkeypatch.setattr(norms_of, "shapes_of", lambda variant: ((19, 21), (5, 140), (2, 1030)))
    norms_of.test_normalise_and_back(variant, "silu")
    norms_of.test_add(variant)


def test_encodings(variant, monkeypatch):
    """Waves of each tile, with and without the inputs before them, and back."""
    monkeypatch.setattr(encoding_of, "shapes_of", lambda variant: ((19, 2, 10), (5, 9, 8), (3, 40, 14)))
    for inputs in (False, True):
        encoding_of.test_encode_and_back(variant, inputs)
    encoding_of.test_zeros_and_ends_of_the_waves_are_exact(variant)
