"""What has to be equal to what, most of it to the last bit."""

import pytest
import torch
from cases import CASES, each_case, each_dtype, each_independent_case
from layouts import LAYOUTS, each_memory_format

import normops.functional as F

# Small; many segments and threads; wide; with more channels than one thread prepares.
SHAPES = pytest.mark.parametrize("shape", [(5, 6, 5, 7), (3, 6, 150, 230), (3, 1300, 9, 8), (4, 6000, 2, 2)], ids=str)


def equal(results, others):
    assert results.keys() == others.keys()
    return all(torch.equal(results[name], others[name]) for name in results)


@each_dtype
def test_group_norm_of_single_channels_is_instance_norm(dtype, device):
    x = torch.randn(4, 6, 5, 7, device=device).to(dtype)
    assert torch.equal(F.group_norm(x, 6), F.instance_norm(x))


def test_group_norm_of_one_group_is_layer_norm_of_the_sample(device):
    x = torch.randn(4, 6, 5, 7, device=device)
    torch.testing.assert_close(F.group_norm(x, 1), F.layer_norm(x, x.shape[1:]))


@each_dtype
def test_batch_norm_of_one_sample_is_instance_norm(dtype, device):
    x = torch.randn(1, 6, 5, 7, device=device).to(dtype)
    assert torch.equal(F.batch_norm(x, None, None, training=True), F.instance_norm(x))


def test_layer_norm_of_centred_rows_is_rms_norm(device):
    x = torch.randn(4, 6, 7, device=device, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(F.rms_norm(x, (7,), eps=1e-5), F.layer_norm(x, (7,)))


def test_evaluation_with_the_statistics_of_the_batch_is_training(device):
    x = torch.randn(4, 6, 50, device=device)
    var, mean = torch.var_mean(x, (0, 2), correction=0)
    torch.testing.assert_close(F.batch_norm(x, mean, var), F.batch_norm(x, None, None, training=True))


@SHAPES
@each_memory_format
@each_independent_case
def test_alone_as_in_a_batch(case, memory_format, shape, device):
    """The bits of a sample do not depend on its company."""
    sample = case.sample(shape, device=device)
    sample = sample.with_input(sample.input.detach().contiguous(memory_format=memory_format))
    grad = torch.randn_like(sample.input)
    together = sample.results(grad=grad)
    for i in range(len(sample.input)):
        alone = sample.with_input(sample.input[i : i + 1]).results(grad=grad[i : i + 1])
        for name in ("output", "grad_input"):
            assert torch.equal(alone[name], together[name][i : i + 1]), name


@pytest.mark.parametrize("groups", [32, 512])
def test_alone_as_in_a_batch_of_many_groups(groups, device):
    """Nor where the batch has blocks enough for the card, and a sample has not."""
    x = torch.randn(8, 512, 24, 24, dtype=torch.float64, device=device).contiguous(memory_format=torch.channels_last)
    x, grad = x.requires_grad_(), torch.randn_like(x)
    together = F.group_norm(x, groups)
    alone = F.group_norm(x[5:6], groups)
    assert torch.equal(alone, together[5:6])
    (grad_together,) = torch.autograd.grad(together, x, grad)
    (grad_alone,) = torch.autograd.grad(alone, x, grad[5:6])
    assert torch.equal(grad_alone[5:6], grad_together[5:6])


@SHAPES
@each_memory_format
@each_case
def test_any_number_of_threads(case, memory_format, shape, threads):
    """How many threads share the work does not change a bit."""
    sample = case.sample(shape)
    sample = sample.with_input(sample.input.detach().contiguous(memory_format=memory_format))
    grad = torch.randn_like(sample.input)
    threads(1)
    expected = sample.results(grad=grad)
    for count in (2, 3, 5):
        threads(count)
        assert equal(sample.results(grad=grad), expected), f"{count} threads"


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "expanded" not in name])
@each_case
def test_same_bits_in_slices(case, layout, device):
    """A view is read where it lies: the numbers are those of its copy."""
    sample = case.sample(device=device)
    view = LAYOUTS[layout](sample.input.detach())
    copy = view.clone(memory_format=torch._prims_common.suggest_memory_format(view))
    grad = torch.randn_like(copy)
    assert equal(sample.with_input(view).results(grad=grad), sample.with_input(copy).results(grad=grad))


@each_case
def test_repeatable(case, device):
    sample = case.sample((3, 6, 150, 230), device=device)
    grad = torch.randn_like(sample.input)
    assert equal(sample.results(grad=grad), sample.results(grad=grad))


@pytest.mark.parametrize("case", [case for case in CASES if not case.given_stats], ids=lambda case: case.name)
def test_scale_invariance(case, device):
    """Powers of two change no digits: with eps scaled along, the output keeps its bits."""
    sample = case.sample(device=device)
    sample.fixed["eps"] = 2.0**-10
    expected = sample.run()
    sample.fixed["eps"] = 2.0**-2
    assert torch.equal(sample.with_input(16 * sample.input).run(), expected)


@each_memory_format
@each_dtype
@SHAPES
def test_stages_are_batch_norm(shape, dtype, memory_format, device, request):
    """The stages one at a time, as SyncBatchNorm takes them, are those of the operators that take them all.

    To the last bit on the CPU; a CUDA kernel that takes all of them at once has sums in another order.
    """
    exact = {"rtol": 0, "atol": 0} if request.node.callspec.params["device"] == "cpu" else {}
    ops = torch.ops.normops
    x, dy = (torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    channels, weight = shape[1], torch.randn(shape[1], device=device)
    count = x.numel() // channels
    _, mean, var = ops._channel_norm(x, None, None, weight, None, channels, True, 1e-5)
    gradients = ops._channel_norm_backward(dy, x, mean, var, weight, channels, True, 1e-5, True, [True] * 3 + [False])
    sum_dy, sum_dy_xhat = ops._channel_grad_sums(dy, x, mean, var, 1e-5)
    dx = ops._channel_grad_apply(dy, x, mean, var, weight, sum_dy, sum_dy_xhat, count, 1e-5)
    stages = (*ops._channel_moments(x), dx, sum_dy_xhat, sum_dy)
    for ours, theirs in zip(stages, (mean, var, *gradients[:3]), strict=True):
        torch.testing.assert_close(ours.to(dtype), theirs.to(dtype), **exact)


def test_merged_moments(device):
    """Of parts of different sizes, and of none."""
    x = torch.randn(100, 6, dtype=torch.float64, device=device) + 1000
    parts = x.split([30, 0, 1, 69])
    count = torch.tensor([float(len(part)) for part in parts], device=device)
    moments = [torch.ops.normops._channel_moments(part) for part in parts]
    mean, var = torch.ops.normops._merge_moments(count, *(torch.stack(each) for each in zip(*moments, strict=True)))
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(var, x.var(0, correction=0), rtol=1e-10, atol=0)
