"""The oracle's activations and losses against PyTorch in double, and how the parts make the whole."""

import numpy as np
import pytest
import torch
from torch_oracle import (
    CROSS_ENTROPIES,
    ELEMENTWISE,
    NAN,
    TORCH_ACTIVATIONS,
    assert_close,
    loss_case,
    numpy,
    tensor,
    torch_loss,
)

from fusemlp_kernels import contract, reference
from fusemlp_kernels.contract import ACTIVATIONS, LOSSES, LossSpec
from fusemlp_kernels.reference import Batch, Layer


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_its_derivative_are_torchs(name):
    values = np.concatenate(
        [np.random.default_rng(0).normal(0, 3, 200), [0.0, -0.0, 1e-9, -1e-9, 30.0, -30.0, 800, -800]]
    )
    z = tensor(values, grad=True)
    y = TORCH_ACTIVATIONS[name](z, 0.2)
    y.sum().backward()
    assert_close(reference.activation(name, values, 0.2), numpy(y))
    assert_close(reference.activation_grad(name, values, 0.2), z.grad.numpy())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_hand_on_nan(name):
    z = np.array([NAN, 1.0])
    assert np.isnan(reference.activation(name, z, 0.1)).tolist() == [True, False]
    constant = name == "identity"
    assert np.isnan(reference.activation_grad(name, z, 0.1)).tolist() == [not constant, False]


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("by_class", [False, True], ids=["", "class_weight"])
@pytest.mark.parametrize("spec", CROSS_ENTROPIES, ids=str)
def test_cross_entropy_is_torchs(spec, by_class, weighted):
    check_loss(spec, by_class, weighted)


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("spec", ELEMENTWISE, ids=str)
def test_elementwise_loss_is_torchs(spec, weighted):
    check_loss(spec, False, weighted)


def check_loss(spec, by_class, weighted):
    values, t, weight, class_weight = loss_case(spec, 3)
    weight, class_weight = weight if weighted else None, class_weight if by_class else None
    z = tensor(values, grad=True)
    expected = torch_loss(spec, z, t, weight, class_weight)
    expected.backward()
    loss, dz = reference.loss_grad(spec, values, t, weight, class_weight)
    assert_close(loss, expected.item())
    assert_close(dz, z.grad.numpy())


@pytest.mark.parametrize("by_class", [False, True], ids=["", "class_weight"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_unweighted_mean_cross_entropy_is_torchs_own_mean(soft, smoothing, by_class):
    """torch's own normaliser, which ``torch_loss`` above writes out, is the contract's."""
    spec = LossSpec("cross_entropy", label_smoothing=smoothing, soft=soft, ignore_index=None if soft else -100)
    z, t, _, class_weight = loss_case(spec, 5)
    class_weight = class_weight if by_class else None
    target = tensor(t) if soft else torch.tensor(t)
    cw = None if class_weight is None else tensor(class_weight)
    expected = torch.nn.functional.cross_entropy(tensor(z), target, weight=cw, label_smoothing=smoothing)
    assert_close(reference.loss_grad(spec, z, t, None, class_weight)[0], expected.item())


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_loss_goes_back_through_the_output_activation(name, kind):
    spec = LossSpec(kind)
    values, t, weight, _ = loss_case(spec, 8)
    z = tensor(values, grad=True)
    expected = torch_loss(spec, TORCH_ACTIVATIONS[name](z, 0.2), t, weight, None)
    expected.backward()
    loss, dz = reference.loss_grad(spec, values, t, weight, activation=name, slope=0.2)
    assert_close(loss, expected.item())
    assert_close(dz, z.grad.numpy())


@pytest.mark.parametrize("kind", LOSSES)
def test_a_zero_normaliser_gives_zero(kind):
    spec = LossSpec(kind)
    z, t, weight, _ = loss_case(spec, 1)
    loss, dz = reference.loss_grad(spec, z, t, np.zeros_like(weight))
    assert loss == 0.0
    assert np.array_equal(dz, np.zeros_like(z))


def test_ignored_rows_and_impossible_labels_weigh_nothing():
    spec = LossSpec("cross_entropy", label_smoothing=0.1, ignore_index=-7)
    z, t, weight, _ = loss_case(LossSpec("cross_entropy"), 2)
    t[1], t[4] = -7, 99
    counted = (t >= 0) & (t < z.shape[1])
    loss, dz = reference.loss_grad(spec, z, t, weight)
    expected_loss, expected_dz = reference.loss_grad(spec, z[counted], t[counted], weight[counted])
    assert_close(loss, expected_loss)
    assert_close(dz[counted], expected_dz)
    assert not dz[~counted].any()


@pytest.mark.parametrize("kind", LOSSES)
def test_nan_reaches_the_loss_and_its_own_row(kind):
    spec = LossSpec(kind)
    z, t, _, _ = loss_case(spec, 1)
    z[2, 1] = NAN
    loss, dz = reference.loss_grad(spec, z, t)
    assert np.isnan(loss)
    assert np.isnan(dz[2, 1])
    assert np.isfinite(np.delete(dz, 2, axis=0)).all()


@pytest.mark.parametrize("kind", ["cross_entropy", "binary_cross_entropy"])
def test_large_logits_do_not_overflow(kind):
    z = np.array([[1000.0, -1000.0], [-1000.0, 1000.0]])
    t = np.array([0, 0]) if kind == "cross_entropy" else np.array([[1.0, 0.0], [1.0, 0.0]])
    loss, dz = reference.loss_grad(LossSpec(kind), z, t)
    assert loss == (1000.0 if kind == "cross_entropy" else 500.0)
    assert np.isfinite(dz).all()


def test_mae_and_quantile_take_the_subgradient_zero_at_the_target():
    y = np.array([[1.0, 2.0]])
    for kind in ("mae", "quantile"):
        assert reference.loss_grad(LossSpec(kind), y, y)[1].tolist() == [[0.0, 0.0]]


def test_hits():
    y = np.array([[0.1, 0.9], [0.8, 0.2], [-1.0, 2.0]])
    assert reference.correct(LossSpec("cross_entropy"), y, np.array([1, 1, 1])).tolist() == [True, False, True]
    ignoring = LossSpec("cross_entropy", ignore_index=1)
    assert reference.correct(ignoring, y, np.array([1, 0, 1])).tolist() == [False, True, False]
    one_hot = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert reference.correct(LossSpec("mse"), y, one_hot).tolist() == [True, False, True]
    assert reference.correct(LossSpec("cross_entropy", soft=True), y, one_hot).tolist() == [True, False, True]
    binary = reference.correct(LossSpec("binary_cross_entropy"), y, one_hot)
    assert binary.tolist() == [[False, True], [False, True], [True, True]]


def test_the_parts_are_the_whole():
    """The op-by-op functions that backends are compared with compose to ``gradients``."""
    rng = np.random.default_rng(2)
    spec, rate = LossSpec("mse"), 0.5
    x, target, keep = rng.normal(0, 1, (4, 3)), rng.normal(0, 1, (4, 2)), rng.random((4, 5)) >= rate
    hidden = Layer(rng.normal(0, 1, (5, 3)), rng.normal(0, 1, 5), "silu", 0.0, rate)
    output = Layer(rng.normal(0, 1, (2, 5)), rng.normal(0, 1, 2), "tanh")
    z1 = reference.linear(x, hidden.w, hidden.b)
    y1 = reference.dropout(reference.linear(x, hidden.w, hidden.b, "silu"), keep, rate)
    z2 = reference.linear(y1, output.w, output.b)
    loss, dz2 = reference.loss_grad(spec, z2, target, activation="tanh")
    dz1 = reference.grad_input(dz2, output.w, z1, "silu", keep=keep, rate=rate)
    expected_loss, expected = reference.gradients([hidden, output], spec, Batch(x, target, keeps=[keep, None]))
    assert loss == expected_loss
    for actual, wanted in zip((reference.grad_weight(dz1, x), reference.grad_weight(dz2, y1)), expected, strict=True):
        for a, b in zip(actual, wanted, strict=True):
            assert np.array_equal(a, b)


def test_an_empty_batch_has_no_loss():
    for kind in LOSSES:
        target = np.zeros(0, np.int64) if kind == "cross_entropy" else np.zeros((0, 3))
        loss, dz = reference.loss_grad(LossSpec(kind), np.zeros((0, 3)), target)
        assert loss == 0.0
        assert dz.shape == (0, 3)


def test_every_name_of_the_contract_is_known():
    one = np.ones((1, 2))
    for name in contract.ACTIVATIONS:
        assert reference.activation(name, one).shape == (1, 2)
