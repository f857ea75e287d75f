"""Whatever the strides of input and gradient, the numbers are right and the output lies as torch's does."""

import pytest
import torch
from cases import SHAPE, each_case, each_channel_case
from comparison import check
from layouts import LAYOUTS, each_layout, each_memory_format

import normops

SHAPE_3D = (2, 6, 3, 4, 5)


GRAD_LAYOUTS = {
    **{name: LAYOUTS[name] for name in ("contiguous", "channels_last", "transposed", "misaligned", "sliced channels")},
    "scalar expanded": lambda g: g.new_tensor(0.7).expand_as(g),
    "rows expanded": lambda g: g[:1, :1].expand_as(g),
    "positions expanded": lambda g: g[..., :1, :1].expand_as(g),
    "column expanded": lambda g: g[..., :1].contiguous().expand_as(g),
}


@pytest.mark.parametrize("shape", [SHAPE, SHAPE_3D], ids=["2d", "3d"])
@each_layout
@each_case
def test_input(case, layout, shape, device):
    sample = case.sample(shape, device=device)
    check(sample.with_input(LAYOUTS[layout](sample.input.detach())))


@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@each_case
def test_gradient(case, input_layout, grad_layout, device):
    sample = case.sample(device=device)
    sample = sample.with_input(LAYOUTS[input_layout](sample.input.detach()))
    check(sample, GRAD_LAYOUTS[grad_layout](torch.randn_like(sample.input)))


@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "scalar expanded"])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE_3D], ids=["2d", "3d"])
@each_layout
@each_case
def test_strides_of_results(case, layout, shape, grad_layout, device):
    """As torch's, but for instance_norm, which keeps channels_last.

    (On the CPU, torch's rms_norm keeps other orders of dimensions too, in the gradient alone.)
    """
    sample = case.sample(shape, device=device)
    sample = sample.with_input(LAYOUTS[layout](sample.input.detach()))
    grad = GRAD_LAYOUTS[grad_layout](torch.randn(shape, device=device))
    results = sample.results(grad=grad)
    if case.op == "instance_norm":
        like = torch.empty_like(sample.input, memory_format=torch._prims_common.suggest_memory_format(sample.input))
        expected = {"output": like, "grad_input": like}
    else:
        expected = sample.results(torch.nn.functional, grad)
    for name in ("output", "grad_input"):
        assert results[name].stride() == expected[name].stride(), name


@each_memory_format
def test_channels_last_survives(memory_format, device):
    """A convolution behind the layer gets its input in the format it wants."""
    x = torch.randn(SHAPE, device=device).contiguous(memory_format=memory_format)
    for layer in (normops.BatchNorm2d(6), normops.InstanceNorm2d(6), normops.GroupNorm(3, 6)):
        assert layer.to(device)(x).is_contiguous(memory_format=memory_format)


@each_case
def test_parameters_of_any_strides(case, device):
    sample = case.sample(device=device)
    for name, parameter in sample.parameters.items():
        strided = torch.stack([parameter.detach(), torch.zeros_like(parameter)], -1)[..., 0]
        sample.parameters[name] = strided.requires_grad_()
    check(sample)


@each_case
def test_parameters_that_begin_anywhere(case, device):
    """A slice need not lie on the boundaries that vectors are read at, though the input does."""
    sample = case.sample((2, 6, 4, 8), device=device)
    for name, parameter in sample.parameters.items():
        longer = torch.nn.functional.pad(parameter.detach().flatten(), (1, 0))
        sample.parameters[name] = longer[1:].view_as(parameter).requires_grad_()
    check(sample)


@pytest.mark.real_device
@pytest.mark.parametrize("shape", [(64, 6, 5, 7), (1, 6, 5, 7), (9, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, "sliced rows"])
@each_channel_case
def test_small_planes(case, layout, shape, device):
    """Of many samples, which may be walked as one line; of one; and of one position."""
    sample = case.sample(case.enough(shape), device=device)
    x = sample.input.detach()
    # Of the sliced rows each plane lies in one piece, and there are gaps between planes.
    check(sample.with_input(torch.cat([x, x], 2)[:, :, : shape[2]] if layout == "sliced rows" else LAYOUTS[layout](x)))
