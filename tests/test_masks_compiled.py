"""Masked layers as compilers see them: opcheck, fake tensors, torch.compile and its backends."""

import pytest
import torch
from cases import CASES, SHAPE
from compilers import assert_compiled_autograd_is_eager, assert_compiled_is_eager, assert_fake_tensors_lie_as_real_ones
from fusion_cases import laid_out
from masks import MASKS, few_cases, masked

import normops.functional as F
from normops import backend

OPS = torch.ops.normops


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


@pytest.mark.real_device
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "differentiable"])
@few_cases
def test_opcheck(case, requires_grad, device):
    sample = masked(case, "random", device=device)
    sample.input.requires_grad_(requires_grad)
    torch.library.opcheck(getattr(OPS, case.op).fused, (sample.input,), {**sample.parameters, **sample.fixed})


def test_opcheck_of_private_operators(device):
    x, dy = torch.randn(2, *SHAPE, device=device)
    mask = MASKS["random"](SHAPE).to(device)
    args = (x, None, None, None, None, 6, True, 1e-5)
    torch.library.opcheck(OPS._channel_norm.default, args, {"mask": mask})
    _, mean, var = OPS._channel_norm(*args, mask=mask)
    args = (dy, x, mean, var, None, 6, True, 1e-5, True, (True, True, True, True))
    torch.library.opcheck(OPS._channel_norm_backward.default, args, {"mask": mask})
    torch.library.opcheck(OPS._channel_moments.default, (x, mask))
    torch.library.opcheck(OPS._channel_grad_sums.default, (dy, x, mean, var, 1e-5, mask))
    sums = OPS._channel_grad_sums(dy, x, mean, var, 1e-5, mask)
    weight = torch.randn(6, device=device)
    torch.library.opcheck(OPS._channel_grad_apply.default, (dy, x, mean, var, weight, *sums, 50, 1e-5, mask))
    stats = [torch.rand(6, device=device) for _ in range(2)]
    for counts in ([5], [4, 0, 2, 3]):
        new = torch.rand(2, *([len(counts)] if len(counts) > 1 else []), 6, device=device, dtype=torch.float64)
        counts = torch.tensor(counts, device=device)
        torch.library.opcheck(OPS._update_running_stats.counted, (*stats, *new, 0.1, counts))


@pytest.mark.real_device
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@few_cases
def test_fake_tensors_lie_as_real_ones(case, memory_format, device):
    sample = masked(case, "random", device=device, activation="silu", residual=True, dtype=torch.bfloat16)
    sample = laid_out(sample, lambda x: x.contiguous(memory_format=memory_format))
    assert_fake_tensors_lie_as_real_ones(sample)


@pytest.mark.real_device
@pytest.mark.parametrize(("mode", "dynamic"), [("auto", False), ("kernel", True), ("decompose", False)], ids=str)
@few_cases
def test_compile(case, mode, dynamic, device):
    sample = masked(case, "lengths", device=device, activation="silu", residual=True)
    if case.over_batch:
        sample.fixed |= {"running_mean": torch.zeros(6, device=device), "running_var": torch.ones(6, device=device)}
    assert_compiled_is_eager(sample, mode, dynamic)


@pytest.mark.real_device
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_backend(residual, device):
    """What follows a masked norm stays behind it: it is not masked."""
    x, r = torch.randn(2, *SHAPE, device=device)
    mask = MASKS["random"](SHAPE).to(device)

    def function(x, r):
        y = F.batch_norm(x, None, None, training=True, mask=mask)
        return torch.relu(y + r if residual else y + 1)

    backend.register()
    compiled = torch.compile(function, backend="normops")
    torch.testing.assert_close(compiled(x, r), function(x, r))


@pytest.mark.real_device
def test_compiled_autograd(device):
    sample = masked(CASES[0], "lengths", device=device, activation="silu")
    assert_compiled_autograd_is_eager(sample)


@pytest.mark.real_device
def test_length_mask_in_compiled_code(device):
    def norm(x, lengths):
        return F.instance_norm(x, mask=F.length_mask(lengths, x.shape[-1]))

    x, sizes = torch.randn(3, 4, 9, device=device), torch.tensor([9, 2, 5], device=device)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x, sizes), norm(x, sizes))
