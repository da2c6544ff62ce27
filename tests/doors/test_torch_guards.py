"""Calls of PyTorch that a fused step makes useless are reported."""

import gc
import warnings

import pytest
import torch
from torch import nn

# bound to the function before any module is fused
from torch.nn.utils import clip_grad_norm_ as imported_before
from torch_pair import Pair, adam, batch, eager_step, make, sgd

import fusemlp.torch as door
from fusemlp.torch import loop
from fusemlp_kernels.errors import ArgumentError


@pytest.mark.parametrize("clip", [imported_before, nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad.clip_grad_norm_])
def test_clipping_after_a_step(clip):
    module = make()
    step = door.fuse(module, nn.CrossEntropyLoss(), sgd(module.parameters()))
    step(*batch())
    for parameters in (module.parameters(), list(module.parameters()), module[0].weight):
        with pytest.raises(
            ArgumentError, match=r"clip_grad_norm_: \d parameters .* pass clip_grad_norm=max_norm to fuse"
        ):
            clip(parameters, 1.0)
    with pytest.raises(ArgumentError, match=r"clip_grad_value_: .* FusedMLP in an eager loop"):
        nn.utils.clip_grad_value_(module.parameters(), 1.0)


def test_clipping_where_only_others_have_gradients():
    module, head = make(), nn.Linear(3, 1).double()
    step = door.fuse(module, nn.CrossEntropyLoss(), sgd(module.parameters()))
    step(*batch())
    head(torch.ones(2, 3).double()).sum().backward()
    with pytest.warns(UserWarning, match="4 parameters have no gradient.* only the others are clipped"):
        norm = imported_before([*module.parameters(), *head.parameters()], 0.1)
    assert norm > 0.1
    assert head.weight.grad.norm() < 0.1


def test_clipping_works_elsewhere():
    """In an eager loop over a fused module, for other modules, frozen parameters, and after the step is gone."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module, other = make(), make()
        optimizer = adam(module.parameters())
        step = door.fuse(module, nn.CrossEntropyLoss(), optimizer)
        assert imported_before(other.parameters(), 1.0) == 0.0
        module[0].bias.requires_grad_(False)
        step(*batch())
        nn.functional.cross_entropy(module(batch()[0]), batch()[1]).backward()
        assert imported_before(module.parameters(), 1e-3) > 1e-3
        optimizer.zero_grad()
        del step
        gc.collect()
        assert imported_before(module.parameters(), 1.0) == 0.0


def test_clipping_functions_without_a_wrapper(monkeypatch):
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        monkeypatch.setattr(nn.utils, name, lambda parameters, limit: limit)
    loop._watch_torch.__wrapped__()
    module = make()
    assert nn.utils.clip_grad_norm_(module.parameters(), 3.0) == 3.0
    step = door.fuse(module, nn.CrossEntropyLoss(), sgd(module.parameters()))
    step(*batch())
    with pytest.raises(ArgumentError, match="pass clip_grad_norm=max_norm to fuse"):
        nn.utils.clip_grad_norm_(module.parameters(), 3.0)


def test_clipping_can_still_be_compiled():
    module = make()
    door.fuse(module, nn.CrossEntropyLoss(), sgd(module.parameters()))
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    torch.compiler.reset()
    clip = torch.compile(lambda: imported_before([parameter], 1.0), backend="eager", fullgraph=True)
    assert clip() == 2.0
    torch.testing.assert_close(parameter.grad.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("dtype, words", [(torch.float32, "float32, .*tf32"), (torch.float64, "float64")])
def test_autocast_around_a_step_warns_once(dtype, words):
    pair = Pair(make(dtype=dtype), close={"rtol": 1e-5, "atol": 1e-6})
    x, y = batch(dtype=dtype)
    with torch.autocast("cpu"):
        with pytest.warns(
            UserWarning, match=f"autocast has no effect on a fused step, which computes in torch.{words}"
        ) as seen:
            pair.step(x, y)
        assert seen[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pair.step(x, y)
    for _ in range(2):
        eager_step(pair.twin, pair.eager, x, y)
    pair.same()


def test_autocast_with_positive_weights_and_outputs():
    """Torch's part of the step stays in the module's type."""
    module = make(dtype=torch.float32)
    step = door.fuse(module, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), sgd(module.parameters()))
    x, _ = batch(dtype=torch.float32)
    expected = module(x).detach()
    with torch.autocast("cpu"), pytest.warns(UserWarning, match="autocast"):
        loss, output = step(x, (x[:, :3] > 0.0).float(), return_output=True)
    assert loss.dtype == output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
