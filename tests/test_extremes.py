"""Statistics whose squares leave the range of float32: exact where float64 has a result."""

import pytest
import reference
import torch
import torch.nn.functional as TF
from cases import CASES, OVER_CHANNELS, SHAPE, each
from layouts import each_memory_format

import normops.functional as F

FEW = ["batch_norm_training", "instance_norm", "group_norm_3", "layer_norm_1d", "layer_norm_2d", "rms_norm_1d"]
few_cases = each([case for case in CASES if case.name in FEW] + OVER_CHANNELS)
few_and_evaluation = each([case for case in CASES if case.name in [*FEW, "batch_norm_eval"]] + OVER_CHANNELS)
# Sizes of the elements, and eps: what is large overflows when squared, and what is small vanishes.
SIZES = [(3e20, 1e-5), (1e19, 1e-5), (1e30, 1e-5), (1e-30, 0.0), (1e-25, 1e-50)]
each_size = pytest.mark.parametrize("size, eps", SIZES, ids=lambda value: f"{value:g}")


def sample_of(case, size, eps, dtype=torch.float32, shape=SHAPE):
    sample = case.sample(shape, dtype=dtype)
    if case.op == "batch_norm" and eps == 0:
        eps = 1e-70
    if case.given_stats:
        sample.fixed["running_mean"] = sample.fixed["running_mean"].double() * size
        sample.fixed["running_var"] = sample.fixed["running_var"].double() * size * size
    sample.fixed["eps"] = eps
    return sample.with_input((sample.input.detach().double() * size).to(dtype))


@pytest.mark.parametrize("activation", [None, "gelu"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_memory_format
@each_size
@few_and_evaluation
def test_equals_reference(case, size, eps, memory_format, dtype, activation):
    sample = sample_of(case, size, eps, dtype)
    sample = sample.with_input(sample.input.detach().contiguous(memory_format=memory_format))
    sample.fixed["activation"] = activation
    grad = torch.randn(SHAPE).to(dtype)
    results, expected = sample.results(grad=grad), sample.double().results(reference, grad.double())
    allowed = 8 * torch.finfo(dtype).eps
    for name, result in results.items():
        scale = expected[name].abs().max().item()
        if not torch.isfinite(expected[name].to(dtype)).all():
            continue  # a gradient that the dtype does not have
        error = (result.double() - expected[name]).abs().max().item()
        assert error <= allowed * scale, f"{name}: {error:.3g} of {scale:.3g}"


@pytest.mark.parametrize("activation, all_wanted", [(None, True), ("gelu", True), ("gelu", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_memory_format
@few_cases
def test_products_with_the_gradient(case, memory_format, dtype, activation, all_wanted):
    """that float32 does not have: of numbers as large as it has any, with dy of 8 and -8."""
    sample = case.sample(dtype=dtype)
    sample.fixed["activation"] = activation
    sample.input.requires_grad_(all_wanted)
    sample = sample.with_input((3e38 * torch.rand(SHAPE)).to(dtype).contiguous(memory_format=memory_format))
    grad = (8 * torch.randn(SHAPE).sign()).to(dtype)
    results, expected = sample.results(grad=grad), sample.double().results(reference, grad.double())
    least = torch.finfo(dtype).smallest_normal if dtype == torch.bfloat16 else 0.0  # may be flushed to zero
    for name, result in results.items():
        error, scale = (result.double() - expected[name]).abs().max(), expected[name].abs().max()
        assert error <= 8 * torch.finfo(dtype).eps * scale + least, f"{name}: {error:.3g} of {scale:.3g}"


@each_memory_format
@few_cases
def test_others_keep_their_bits(case, memory_format):
    """A sample, channel or position of extremes, of infinities or of NaN is the business of its own statistics."""
    for size in (3e20, torch.inf, torch.nan):
        plain = case.sample()
        plain = plain.with_input(plain.input.detach().contiguous(memory_format=memory_format))
        x = plain.input.detach().clone()
        where = (slice(None), 1) if case.over_batch else (1, 1) if case.op == "instance_norm" else 1
        if case in OVER_CHANNELS:
            where = (1, slice(None), 2, 3)
        x[where] *= size
        if size == torch.inf:
            x[where] = torch.where(torch.rand_like(x[where]) < 0.5, x[where], torch.ones_like(x[where]))
        other = plain.with_input(x)
        grad = torch.randn_like(x)
        ours, theirs = plain.results(grad=grad), other.results(grad=grad)
        for name in ("output", "grad_input"):
            ours[name][where] = theirs[name][where] = 0
            assert torch.equal(ours[name], theirs[name]), name


def test_masked():
    x = (3e38 * torch.rand(3, 4, 50)).requires_grad_()
    mask = F.length_mask([50, 7, 30], 50)
    expected = reference.instance_norm(x.double(), mask=mask)
    y = F.instance_norm(x, mask=mask)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    grad = 8 * torch.randn(x.shape).sign()
    (dx,), (exact,) = (torch.autograd.grad(output, x, grad.to(output)) for output in (y, expected))
    # In units of dy / x; the reference's gradient has been rounded to float32 as well.
    torch.testing.assert_close(3e38 * dx, 3e38 * exact, rtol=1e-5, atol=1e-4)


def test_zeros_and_constants():
    """Which have no variance, with any eps."""
    for value in (0.0, 3.0, 1e-30, 1e30):
        x = torch.full((4, 6, 10), value)
        for y in (F.layer_norm(x, (10,)), F.instance_norm(x), F.batch_norm(x, None, None, training=True)):
            assert not y.any()
    for op in (F.layer_norm, TF.layer_norm):
        assert op(torch.zeros(2, 5), (5,), eps=0.0).isnan().all()


def test_add_layer_norm():
    x, r = 3e20 * torch.randn(2, 5, 40)
    y, total = F.add_layer_norm(x, r, (40,))
    expected = reference.layer_norm(total.double(), (40,))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
