"""The Triton kernels as functions of torch tensors: a step by hand against autograd, and what they refuse."""

import numpy as np
import pytest
from tolerance import assert_within, bound, linear_bound

from fusemlp_kernels import availability, reference
from fusemlp_kernels.contract import Dropout, LossSpec, UpdateRule
from fusemlp_kernels.errors import ArgumentError, DTypeError, ShapeError
from fusemlp_kernels.philox import dropout_keep

if availability()["triton"] is not None:
    pytest.skip(f"triton: {availability()['triton']}", allow_module_level=True)

import torch
import triton
import triton.language as tl

from fusemlp_kernels.triton import functional as F
from fusemlp_kernels.triton import launch
from fusemlp_kernels.triton.tiles import part_of

DEVICE = "cpu" if launch.is_interpreted() else "cuda"
M, K, H, N = 9, 7, 11, 5
SGD = UpdateRule("sgd")


def tensors(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.standard_normal(shape), dtype=torch.float32, device=DEVICE) for shape in shapes]


def host(tensor):
    return tensor.detach().cpu().double().numpy()


def test_a_training_step_by_hand_is_autograds():
    x, w0, b0, w1, b1 = tensors((M, K), (H, K), (H,), (N, H), (N,))
    labels = torch.arange(M, device=DEVICE) % N
    exact = [t.double().requires_grad_() for t in (w0, b0, w1, b1)]
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x.double(), exact[0], exact[1]))
    wanted = torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, exact[2], exact[3]), labels)
    wanted.backward()

    h, z = F.linear(x, w0, b0, "gelu", return_z=True)
    loss, dz1 = F.linear_loss_grad(h, w1, b1, labels)
    dz0 = F.grad_input(dz1, w1, h, "gelu", z=z)
    dw1, db1 = F.grad_weight(dz1, h)
    before = host(w0), host(b0)
    F.grad_weight_update(dz0, x, w0, b0, SGD, 0.1)
    assert loss.shape == () and loss.dtype == torch.float64
    # a chain of a few products of length 11 at most, each within some ten roundings of numbers of the order of one
    limit = 200 * 2.0**-24
    assert_within(host(loss), host(wanted), limit)
    for found, parameter in ((dw1, exact[2]), (db1, exact[3])):
        assert_within(host(found), host(parameter.grad), limit)
    for old, new, parameter in zip(before, (w0, b0), exact[:2], strict=True):
        assert_within(host(new), old - 0.1 * host(parameter.grad), limit)


def test_rows_dropout_and_wide_losses():
    x, w, b = tensors((20, K), (H, K), (H,))
    rows = torch.tensor([3, 19, 0, -1], device=DEVICE)
    dropout = Dropout(0.5, layer=2, seed=9)
    y = F.linear(x, w, b, "relu", rows=rows, dropout=dropout, batch_index=4)
    batch = np.where(rows.cpu().numpy()[:, None] >= 0, host(x)[rows.cpu().numpy()], 0.0)
    keep = dropout_keep(0.5, 2, 9, 4, 4, H)
    expected = reference.dropout(reference.linear(batch, host(w), host(b), "relu"), keep, 0.5)
    assert_within(host(y), expected, linear_bound(batch, host(w), host(b), "relu", keep=keep, rate=0.5)[1])
    (z,) = tensors((3, 700))
    labels = torch.tensor([0, 699, 350], device=DEVICE)
    loss, dz = F.loss_grad(z, labels, LossSpec("cross_entropy", label_smoothing=0.1))
    exact = z.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, labels, label_smoothing=0.1)
    wanted.backward()
    assert_within(host(loss), host(wanted), 1e-5)
    assert_within(host(dz), host(exact.grad), 1e-7)


@pytest.mark.parametrize("first", [4, 8])
def test_columns_that_begin_at_any_vector(first):
    """16 bytes are half of what the fast path takes its offsets to be multiples of."""
    dz, wide = tensors((6, 8), (6, 24))
    x = wide[:, first : first + 8]
    dw, _ = F.grad_weight(dz, x)
    assert_within(host(dw), host(dz).T @ host(x), bound(6, np.abs(host(dz)).T @ np.abs(host(x))))


def test_an_arena_is_updated():
    params, grads, first, second = tensors((40,), (40,), (40,), (40,))
    rule, second = UpdateRule("adam"), second.abs()
    state = host(first), host(second)
    expected, _ = reference.update(rule, F.TensorRule(), host(params), host(grads), state, 3, 0.1)
    F.update(params, grads, rule, 0.1, states=(first, second), update_count=3)
    assert_within(host(params), expected, bound(40, np.abs(expected) + 1.0))


@pytest.mark.parametrize("start", [0, 1, 2, 4, 8, 12])
@pytest.mark.parametrize("moved", ["dz", "x", "w", "b"])
def test_a_tensor_may_begin_anywhere_in_its_memory(moved, start):
    """The kernel of all layers reckons from one tensor to the others, which need not lie 32 bytes apart."""
    given = dict(zip(("dz", "x", "w", "b"), tensors((M, 8), (M, 8), (8, 8), (8,)), strict=True))
    memory = torch.empty(given[moved].numel() + 64, device=DEVICE)
    start += -memory.data_ptr() // 4 % 16
    given[moved] = memory[start : start + given[moved].numel()].view(given[moved].shape).copy_(given[moved])
    exact = {name: host(tensor) for name, tensor in given.items()}
    dw, db = exact["dz"].T @ exact["x"], exact["dz"].sum(axis=0)
    F.grad_weight_update(given["dz"], given["x"], given["w"], given["b"], SGD, 0.1)
    magnitude = np.abs(exact["dz"]).T @ np.abs(exact["x"])
    # the gradient's bound, times the rate; and the roundings of rate * gradient and of the difference
    limit = 0.1 * bound(M, magnitude) + 4 * 2.0**-24 * (np.abs(exact["w"]) + magnitude)
    assert_within(host(given["w"]), exact["w"] - 0.1 * dw, limit)
    magnitude = np.abs(exact["dz"]).sum(axis=0)
    limit = 0.1 * bound(M, magnitude) + 4 * 2.0**-24 * (np.abs(exact["b"]) + magnitude)
    assert_within(host(given["b"]), exact["b"] - 0.1 * db, limit)


X, W, B, Y = (9, 7), (11, 7), (11,), (9, 11)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda x, w, b, y: F.linear(x.double(), w, b), DTypeError, r"linear: x: expected float32.*x\.float\(\)"),
        (
            lambda x, w, b, y: F.linear(x, w.half(), b),
            DTypeError,
            r"linear: w: expected torch\.float32, got torch\.float16",
        ),
        (lambda x, w, b, y: F.linear(x, w[:, :6], b), ShapeError, r"linear: x: expected shape \(9, 6\), got \(9, 7\)"),
        (lambda x, w, b, y: F.linear(x, w, b[:3]), ShapeError, r"linear: b: expected shape \(11\), got \(3,\)"),
        (lambda x, w, b, y: F.linear(x, w, b, "rleu"), ArgumentError, r"linear: activation.*did you mean 'relu'"),
        (lambda x, w, b, y: F.linear(x, w, b, "prelu"), ArgumentError, "slope_param: prelu needs its slope"),
        (lambda x, w, b, y: F.linear(x, w, b, "relu", return_z=True), ArgumentError, "return_z"),
        (lambda x, w, b, y: F.linear(x, w, b, rows=torch.zeros(4)), DTypeError, r"rows: expected torch\.int64"),
        (lambda x, w, b, y: F.linear(x.half(), w, b, tf32=True), ArgumentError, "tf32"),
        (lambda x, w, b, y: F.linear(None, w, b), TypeError, "x: expected a torch tensor, got NoneType"),
        (lambda x, w, b, y: F.grad_input(y, w, x, "gelu"), ArgumentError, "z: the derivative of gelu needs"),
        (lambda x, w, b, y: F.loss_grad(y, torch.zeros(9)), DTypeError, r"target: expected torch\.int64"),
        (lambda x, w, b, y: F.loss_grad(y, y, "mss"), ArgumentError, "did you mean 'mse'"),
        (
            lambda x, w, b, y: F.linear_loss_grad(x, *tensors((300, 7), (300,), (9, 300)), "mse"),
            ArgumentError,
            "300 outputs are more than the 256",
        ),
        (
            lambda x, w, b, y: F.grad_weight_update(y, x, w, b, UpdateRule("adam"), 0.1),
            ArgumentError,
            "adam keeps 2 arrays of state, got 0",
        ),
        (
            lambda x, w, b, y: F.grad_weight_update(y, x, w, b, UpdateRule("sgd", clip_norm=1.0), 0.1),
            ArgumentError,
            "clipping and accumulation need the gradients in memory",
        ),
        (
            lambda x, w, b, y: F.grad_weight_update(y, x, w[:1].expand(11, 7), b, SGD, 0.1),
            ArgumentError,
            r"w: is expanded \(stride 0\)",
        ),
        (lambda x, w, b, y: F.update(w[0], w[0][:3], SGD, 0.1), ShapeError, r"grads: expected shape \(7\), got \(3,\)"),
        (lambda x, w, b, y: F.update(w[0][::2], w[1][:4], SGD, 0.1), ArgumentError, "params: expected a contiguous"),
        (
            lambda x, w, b, y: F.linear(x, torch.zeros(2**31, 0, device=DEVICE), b),
            ShapeError,
            "more than the 2147483647 that a 32-bit index counts",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(call, error, said):
    given = tensors(X, W, B, Y)
    before = [tensor.clone() for tensor in given]
    with pytest.raises(error, match=said):
        call(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_tensors_of_another_device_are_refused(monkeypatch):
    x, w, b, _ = tensors(X, W, B, Y)
    with pytest.raises(ArgumentError, match=r"linear: w: is on meta, the kernels run on .*move it with w\.to\("):
        F.linear(x, w.to("meta"), b)
    if DEVICE == "cpu":
        monkeypatch.setattr(F, "is_interpreted", lambda: False)
        with pytest.raises(ArgumentError, match=r"x: is on the CPU and the kernels run on a GPU; move it with x\.cuda"):
            F.linear(x, w, b)


@triton.jit
def copied_in_parts(x, y, PARTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None] * COLS
    tile = tl.load(x + rows + tl.arange(0, COLS)[None, :])
    for piece in tl.static_range(PARTS):
        at = piece * (COLS // PARTS) + tl.arange(0, COLS // PARTS)
        tl.store(y + rows + at[None, :], part_of(tile, piece, PARTS, ROWS, COLS))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_side_by_side_are_the_tile(parts):
    x = torch.arange(16 * 32, dtype=torch.float32, device=DEVICE).reshape(16, 32)
    y = torch.full_like(x, float("nan"))
    copied_in_parts[(1,)](x, y, PARTS=parts, ROWS=16, COLS=32)
    assert np.array_equal(y.cpu().numpy(), x.cpu().numpy())
