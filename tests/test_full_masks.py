"""A mask of nothing is no mask: with all of it True, every channel layer gives the bits that it gives without."""

import pytest
import torch
from cases import SHAPE, each_channel_case, each_dtype
from fusion_cases import fused, laid_out
from layouts import LAYOUTS, each_layout

import normops.functional as F

EPILOGUES = [(None, False), (None, True), ("relu", True), ("leaky_relu", False), ("gelu", False), ("silu", True)]
# More than one segment, small planes (which are walked otherwise without a mask), two dimensions and five, nothing.
SHAPES = [(2, 3, 9001), (16, 6, 7, 7), (9, 8), (33, 12, 5), (2, 70, 30, 31), (2, 4, 3, 4, 5), (0, 6, 5), (3, 6, 0)]


def masks_of(x):
    """All that may be given for an input: of its positions, and what is broadcast to them."""
    shape = (x.shape[0], *x.shape[2:])
    return [torch.ones(given, dtype=torch.bool, device=x.device) for given in {shape, (1, *shape[1:]), shape[1:]}]


def assert_no_difference(sample, device):
    """Without a difference, but on CUDA, where finding out what is in a mask would mean waiting for the device."""
    grad = torch.randn_like(sample.input)
    expected = sample.results(grad=grad)
    for mask in masks_of(sample.input):
        for name, result in sample.results(grad=grad, mask=mask).items():
            assert result.dtype == expected[name].dtype, name
            if device == "cpu":
                assert torch.equal(result, expected[name]), f"{name}, mask of shape {tuple(mask.shape)}"
            else:
                torch.testing.assert_close(result, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.real_device
@each_dtype
@each_layout
@each_channel_case
def test_layouts(case, layout, dtype, device):
    for activation, residual in EPILOGUES:
        sample = fused(case, activation, residual, dtype=dtype, device=device)
        assert_no_difference(laid_out(sample, LAYOUTS[layout]), device)


@pytest.mark.real_device
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_channel_case
def test_shapes(case, shape, device):
    for activation, residual in EPILOGUES[:3]:
        sample = fused(case, activation, residual, case.enough(shape), device=device)
        assert_no_difference(sample, device)
        if sample.input.dim() >= 4:
            assert_no_difference(laid_out(sample, LAYOUTS["channels_last"]), device)


@pytest.mark.real_device
@pytest.mark.parametrize("own", ["weight", "bias", "both"])
@each_channel_case
def test_parameters_of_samples(case, own, device):
    sample = case.sample(device=device)
    for name in ("weight", "bias") if own == "both" else (own,):
        sample.parameters[name] = torch.randn(SHAPE[:2], device=device, requires_grad=True)
    assert_no_difference(sample, device)


@pytest.mark.real_device
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_running_statistics(op, device):
    x = torch.randn(SHAPE, device=device)
    options = {"training": True} if op == "batch_norm" else {}
    start = torch.randn(6, device=device), torch.rand(6, device=device)
    expected = [part.clone() for part in start]
    getattr(F, op)(x, *expected, **options)
    for mask in masks_of(x):
        running = [part.clone() for part in start]
        getattr(F, op)(x, *running, mask=mask, **options)
        torch.testing.assert_close(running, expected, rtol=0 if device == "cpu" else 1e-6, atol=0)


@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
@each_channel_case
def test_one_position_of_many(case, position, device):
    """A mask of one position, at either end, is a mask."""
    sample = case.sample(device=device)
    mask = torch.ones((SHAPE[0], *SHAPE[2:]), dtype=torch.bool, device=device)
    mask.view(-1)[position] = False
    output = sample.run(mask=mask)
    channel = output.movedim(1, -1).reshape(-1, SHAPE[1])
    assert not channel[position].any() and channel.count_nonzero() == output.numel() - SHAPE[1]
