"""The oracle against PyTorch in double and scikit-learn, and how its parts make the whole."""

import itertools
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_oracle as oracle

from fusemlp_kernels import reference
from fusemlp_kernels.contract import ACTIVATIONS, LOSSES, LossSpec, TensorRule, UpdateRule
from fusemlp_kernels.reference import Batch, Layer


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_its_derivative_are_torchs(name):
    values = np.concatenate(
        [np.random.default_rng(0).normal(0, 3, 200), [0.0, -0.0, 1e-9, -1e-9, 30.0, -30.0, 800, -800]]
    )
    z = oracle.tensor(values, grad=True)
    y = oracle.TORCH_ACTIVATIONS[name](z, 0.2)
    y.sum().backward()
    oracle.assert_close(reference.activation(name, values, 0.2), oracle.numpy(y))
    oracle.assert_close(reference.activation_grad(name, values, 0.2), z.grad.numpy())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_hand_on_nan(name):
    z = np.array([oracle.NAN, 1.0])
    assert np.isnan(reference.activation(name, z, 0.1)).tolist() == [True, False]
    constant = name == "identity"
    assert np.isnan(reference.activation_grad(name, z, 0.1)).tolist() == [not constant, False]


LOSSES_OF_TORCH = [*itertools.product(oracle.CROSS_ENTROPIES, (False, True)), *((s, False) for s in oracle.ELEMENTWISE)]


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(("spec", "by_class"), LOSSES_OF_TORCH, ids=str)
def test_losses_are_torchs(spec, by_class, weighted):
    values, t, weight, class_weight = oracle.loss_case(spec, 3)
    weight, class_weight = weight if weighted else None, class_weight if by_class else None
    z = oracle.tensor(values, grad=True)
    expected = oracle.torch_loss(spec, z, t, weight, class_weight)
    expected.backward()
    loss, dz = reference.loss_grad(spec, values, t, weight, class_weight)
    oracle.assert_close(loss, expected.item())
    oracle.assert_close(dz, z.grad.numpy())


@pytest.mark.parametrize("by_class", [False, True], ids=["", "class_weight"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_unweighted_mean_cross_entropy_is_torchs_own_mean(soft, smoothing, by_class):
    """torch's own normaliser, which ``torch_loss`` above writes out, is the contract's."""
    spec = LossSpec("cross_entropy", label_smoothing=smoothing, soft=soft, ignore_index=None if soft else -100)
    z, t, _, class_weight = oracle.loss_case(spec, 5)
    class_weight = class_weight if by_class else None
    target = oracle.tensor(t) if soft else torch.tensor(t)
    cw = None if class_weight is None else oracle.tensor(class_weight)
    expected = torch.nn.functional.cross_entropy(oracle.tensor(z), target, weight=cw, label_smoothing=smoothing)
    oracle.assert_close(reference.loss_grad(spec, z, t, None, class_weight)[0], expected.item())


@pytest.mark.parametrize("kind", LOSSES)
def test_a_zero_normaliser_gives_zero(kind):
    spec = LossSpec(kind)
    z, t, weight, _ = oracle.loss_case(spec, 1)
    loss, dz = reference.loss_grad(spec, z, t, np.zeros_like(weight))
    assert loss == 0.0
    assert np.array_equal(dz, np.zeros_like(z))


def test_ignored_rows_and_impossible_labels_weigh_nothing():
    spec = LossSpec("cross_entropy", label_smoothing=0.1, ignore_index=-7)
    z, t, weight, _ = oracle.loss_case(LossSpec("cross_entropy"), 2)
    t[1], t[4] = -7, 99
    counted = (t >= 0) & (t < z.shape[1])
    loss, dz = reference.loss_grad(spec, z, t, weight)
    expected_loss, expected_dz = reference.loss_grad(spec, z[counted], t[counted], weight[counted])
    oracle.assert_close(loss, expected_loss)
    oracle.assert_close(dz[counted], expected_dz)
    assert not dz[~counted].any()


@pytest.mark.parametrize("kind", LOSSES)
def test_nan_reaches_the_loss_and_its_own_row(kind):
    spec = LossSpec(kind)
    z, t, _, _ = oracle.loss_case(spec, 1)
    z[2, 1] = oracle.NAN
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
    expected_loss, expected, _ = reference.gradients([hidden, output], spec, Batch(x, target, keeps=[keep, None]))
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


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "rule", oracle.SGDS + oracle.ADAMS, ids=lambda rule: f"{rule.kind}-{rule.momentum}-{rule.eps}-{rule.decoupled}"
)
def test_optimizer_is_torchs(rule, decay, factor):
    rng = np.random.default_rng(4)
    p = rng.normal(0, 1, (3, 2))
    parameter = oracle.tensor(p, grad=True)
    optimizer = oracle.torch_optimizer(rule, parameter, decay, factor * oracle.RATE)
    state = tuple(np.zeros_like(p) for _ in range(rule.state_count))
    for t in range(12):
        g = rng.normal(0, 1, p.shape)
        parameter.grad = oracle.tensor(g)
        optimizer.step()
        p, state = reference.update(rule, TensorRule(factor, decay), p, g, state, t, oracle.RATE)
        oracle.assert_close(p, oracle.numpy(parameter))


def test_scikit_learns_convention_is_scikit_learns_optimizer():
    from sklearn.neural_network._stochastic_optimizers import AdamOptimizer, SGDOptimizer

    for momentum, nesterov, adam in [(0.9, False, False), (0.9, True, False), (0.0, False, True)]:
        rng = np.random.default_rng(6)
        p = rng.normal(0, 1, (3, 2))
        theirs = [p.copy()]
        if adam:
            rule = UpdateRule("adam", eps=1e-3, convention="scikit-learn")
            optimizer = AdamOptimizer(theirs, 0.05, 0.9, 0.999, 1e-3)
        else:
            rule = UpdateRule("sgd", momentum=momentum, nesterov=nesterov, convention="scikit-learn")
            optimizer = SGDOptimizer(theirs, 0.05, momentum=momentum, nesterov=nesterov)
        state = tuple(np.zeros_like(p) for _ in range(rule.state_count))
        for t in range(10):
            g = rng.normal(0, 1, p.shape)
            optimizer.update_params(theirs, [g])
            p, state = reference.update(rule, TensorRule(), p, g, state, t, 0.05)
            oracle.assert_close(p, theirs[0])


def test_conventions_of_momentum_differ_when_the_rate_changes():
    """With a constant rate the two velocities differ by a factor; when the rate halves, only torch's steps halve."""
    p, g = np.zeros(1), np.ones(1)
    steps = {}
    for convention in ("torch", "scikit-learn"):
        rule = UpdateRule("sgd", momentum=0.5, convention=convention)
        first, state = reference.update(rule, TensorRule(), p, g, (np.zeros(1),), 0, 0.2)
        second, _ = reference.update(rule, TensorRule(), first, g, state, 1, 0.1)
        steps[convention] = float(first[0]), float((second - first)[0])
    oracle.assert_close(steps["torch"], [-0.2, -0.15])
    oracle.assert_close(steps["scikit-learn"], [-0.2, -0.2])


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_clipping_is_torchs(max_norm):
    rng = np.random.default_rng(0)
    grads = [rng.normal(0, 1, (3, 4)), rng.normal(0, 1, 5)]
    parameters = [oracle.tensor(np.zeros_like(g), grad=True) for g in grads]
    for parameter, g in zip(parameters, grads, strict=True):
        parameter.grad = oracle.tensor(g)
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    factor = reference.clip_factor(grads, max_norm)
    for parameter, g in zip(parameters, grads, strict=True):
        oracle.assert_close(factor * g, parameter.grad.numpy())


def test_clipping_hands_on_nan_and_can_be_off():
    assert np.isnan(reference.clip_factor([np.array([oracle.NAN])], 1.0))
    assert reference.clip_factor([np.array([100.0])], None) == 1.0


def outputs_in_torch(y, layers, parameters, keeps):
    for layer, group, keep in zip(layers, parameters, keeps, strict=True):
        y = y @ group[0].T + group[1]
        learned = layer.activation == "prelu"
        y = (
            torch.nn.functional.prelu(y, group[2])
            if learned
            else oracle.TORCH_ACTIVATIONS[layer.activation](y, layer.slope)
        )
        y = y if keep is None else y * oracle.tensor(keep) / (1.0 - layer.rate)
    return y


def tensors_of(layers):
    return [[oracle.tensor(p, grad=True) for p in layer.parameters] for layer in layers]


@pytest.mark.parametrize(
    "rule", [oracle.SGDS[2], replace(oracle.ADAMS[2], clip_norm=0.3)], ids=["nesterov", "clipped adamw"]
)
def test_training_steps_are_torchs(rule):
    """A whole network with dropout masks, a learned slope, weights and a rate that falls, ten steps."""
    rng = np.random.default_rng(11)
    spec = LossSpec("cross_entropy", label_smoothing=0.1)
    widths, names, rate = [5, 7, 6, 3], ["prelu", "gelu", "identity"], 0.25
    layers = [
        Layer(
            rng.normal(0, 0.5, (n, k)), rng.normal(0, 0.1, n), name, np.array([0.25]) if name == "prelu" else 0.0, rate
        )
        for k, n, name in zip(widths[:-1], widths[1:], names, strict=True)
    ]
    parameters = tensors_of(layers)
    flat = [p for group in parameters for p in group]
    optimizer = oracle.torch_optimizer(rule, torch.zeros(1), 0.1, 0.05)
    optimizer.param_groups[0]["params"] = flat
    tensors = [[TensorRule(weight_decay=0.1)] * len(layer.parameters) for layer in layers]
    state = reference.initial_state(rule, layers)
    for t in range(10):
        x, target, weight = rng.normal(0, 1, (8, 5)), rng.integers(0, 3, 8), rng.uniform(0.5, 2, 8)
        keeps = [rng.random((8, n)) >= rate for n in widths[1:-1]] + [None]
        y = outputs_in_torch(oracle.tensor(x), layers, parameters, keeps)
        expected = oracle.torch_loss(spec, y, target, weight, None)
        optimizer.zero_grad()
        expected.backward()
        if rule.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(flat, rule.clip_norm)
        optimizer.param_groups[0]["lr"] = rate_now = oracle.RATE * 0.9**t
        optimizer.step()
        batch = Batch(x, target, weight, keeps=keeps)
        loss, layers, state = reference.train_step(layers, state, spec, rule, t, rate_now, batch, tensors)
        oracle.assert_close(loss, expected.item())
        for layer, group in zip(layers, parameters, strict=True):
            for p, theirs in zip(layer.parameters, group, strict=True):
                oracle.assert_close(p, oracle.numpy(theirs))


def test_no_function_changes_its_arguments():
    rng = np.random.default_rng(0)
    layers = [Layer(rng.normal(0, 1, (3, 4)), rng.normal(0, 1, 3), "prelu", np.array([0.2]))]
    rule = UpdateRule("adam", clip_norm=0.1)
    state = reference.initial_state(rule, layers)
    batch = Batch(rng.normal(0, 1, (5, 4)), rng.normal(0, 1, (5, 3)), rng.uniform(0, 1, 5))
    arrays = [*layers[0].parameters, *itertools.chain(*state[0]), batch.x, batch.target, batch.weight]
    for array in arrays:
        array.setflags(write=False)
    reference.train_step(layers, state, LossSpec("mse"), rule, 0, oracle.RATE, batch)


def case(hidden, kind, weighted):
    """Return a random network, a loss and a batch."""
    rng = np.random.default_rng(zlib.crc32(f"{hidden} {kind} {weighted}".encode()))
    widths = [int(w) for w in rng.integers(2, 6, int(rng.integers(3, 5)))]
    spec = LossSpec(
        kind,
        reduction="sum" if rng.random() < 0.3 else "mean",
        label_smoothing=0.1 if rng.random() < 0.5 else 0.0,
        ignore_index=1 if rng.random() < 0.5 else None,
        soft=bool(rng.random() < 0.3),
        delta=0.7,
        quantile=0.3,
    )
    output = "identity" if kind in ("cross_entropy", "binary_cross_entropy", "poisson") else hidden
    names = [hidden] * (len(widths) - 2) + [output]
    rates = [0.25] * (len(widths) - 2) + [0.0]
    layers = [
        Layer(rng.normal(0, 0.6, (n, k)), rng.normal(0, 0.3, n), name, slope_of(name, rng), rate)
        for k, n, name, rate in zip(widths[:-1], widths[1:], names, rates, strict=True)
    ]
    rows = int(rng.integers(2, 6))
    batch = Batch(
        x=rng.normal(0, 1, (rows, widths[0])),
        target=targets(spec, rng, rows, widths[-1]),
        weight=rng.uniform(0.2, 2, rows) if weighted else None,
        class_weight=rng.uniform(0.5, 2, widths[-1]) if weighted and kind == "cross_entropy" else None,
        keeps=[rng.random((rows, n)) >= rate if rate else None for n, rate in zip(widths[1:], rates, strict=True)],
    )
    return layers, spec, batch


def slope_of(name, rng):
    return {"leaky_relu": 0.1, "prelu": rng.uniform(0.1, 0.4, 1), "elu": 1.3}.get(name, 0.0)


def targets(spec, rng, rows, columns):
    if spec.kind == "cross_entropy" and not spec.soft:
        # at least the first row is not ignored
        return np.concatenate([[0], rng.integers(0, columns, rows - 1)])
    values = rng.uniform(0.1, 1.0, (rows, columns))
    return values / values.sum(axis=1, keepdims=True) if spec.kind == "cross_entropy" else values


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(("hidden", "kind"), list(itertools.product(ACTIVATIONS, LOSSES)))
def test_gradients_are_torchs(hidden, kind, weighted):
    layers, spec, batch = case(hidden, kind, weighted)
    loss, grads, dx = reference.gradients(layers, spec, batch)
    x, parameters = oracle.tensor(batch.x, grad=True), tensors_of(layers)
    outputs = outputs_in_torch(x, layers, parameters, batch.keeps)
    expected = oracle.torch_loss(spec, outputs, batch.target, batch.weight, batch.class_weight)
    expected.backward()
    oracle.assert_close(loss, expected.item())
    oracle.assert_close(dx, x.grad.numpy())
    for group, theirs in zip(grads, parameters, strict=True):
        for grad, parameter in zip(group, theirs, strict=True):
            oracle.assert_close(grad, parameter.grad.numpy())
