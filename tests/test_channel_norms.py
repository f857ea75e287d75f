"""LayerNorm and RMSNorm over channels: those of rows, with the channels moved to the end and back."""

import pytest
import reference
import torch
from cases import OVER_CHANNELS, SHAPE, each, each_dtype
from comparison import check
from compilers import assert_compiled_is_eager, assert_fake_tensors_lie_as_real_ones
from fusion_cases import extras, laid_out
from layouts import LAYOUTS, each_layout, each_memory_format
from torch.autograd import gradcheck, gradgradcheck

import normops
import normops.functional as F

OPS = torch.ops.normops


each_case = each(OVER_CHANNELS)


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


def make(case, shape=SHAPE, activation=None, residual=False, **kwargs):
    sample = case.sample(shape, **kwargs)
    sample.fixed |= extras(activation)
    if residual:
        sample.parameters["residual"] = torch.randn_like(sample.input).detach().requires_grad_()
    return sample


# forward and backward

SHAPES = [
    (2, 768, 7, 7),
    (3, 96, 20, 20),
    (2, 300, 3),
    (1, 5, 70, 70),
    (2, 6, 5000),
    (3, 4, 2, 3, 5),
    (5, 6),
    (2, 1, 9),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_case
def test_shapes(case, shape, device):
    """Tiles of a whole plane and of parts of one, more lines than a float sum takes."""
    check(make(case, shape, device=device))


@pytest.mark.real_device
@each_layout
@each_case
def test_layouts(case, layout, device):
    check(laid_out(make(case, device=device, residual=True), LAYOUTS[layout]))


@each_memory_format
@each_dtype
@each_case
def test_dtypes(case, dtype, memory_format, device):
    sample = make(case, (2, 40, 9, 16), dtype=dtype, device=device)
    check(laid_out(sample, lambda x: x.contiguous(memory_format=memory_format)))
    check(make(case, dtype=dtype, parameter_dtype=torch.float32, device=device))


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu"], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@each_case
def test_epilogues(case, residual, activation, device):
    sample = make(case, activation=activation, residual=residual, device=device)
    sample.fixed["weight_offset"] = 1.0
    check(sample)


@pytest.mark.real_device
@pytest.mark.parametrize("leaf", ["input", "weight", "bias", "residual"])
@each_case
def test_gradient_of_one(case, leaf, device):
    for activation in (None, "gelu"):
        sample = make(case, activation=activation, residual=True, device=device)
        if leaf not in ("input", *sample.parameters):
            return
        for name, tensor in {"input": sample.input, **sample.parameters}.items():
            tensor.requires_grad_(name == leaf)
        check(sample)


@pytest.mark.real_device
@pytest.mark.parametrize("names", [(), ("weight",), ("bias",)], ids=str)
@each_case
def test_absent_parameters(case, names, device):
    check(make(case, names=names, device=device))
    check(make(case, names=names, activation="gelu", device=device))


def test_mean_far_from_zero():
    x = (1e4 + torch.randn(2, 96, 20, 20)).requires_grad_()
    y = F.channel_layer_norm(x)
    expected = reference.channel_layer_norm(x.detach().double())
    assert (y - expected).abs().max() < 5e-6


@pytest.mark.real_device
@each_case
def test_threads(case, threads):
    sample = make(case, (4, 96, 40, 40), activation="gelu", residual=True)
    grad = torch.randn_like(sample.input)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(sample.results(grad=grad))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


@pytest.mark.real_device
@each_memory_format
def test_nothing_is_copied(memory_format, device):
    if device != "cpu":
        return  # where a contiguous input goes through its rows
    x = torch.randn(2, 64, 9, 9, device=device).contiguous(memory_format=memory_format).requires_grad_()
    with torch.profiler.profile() as profile:
        y = F.channel_layer_norm(x)
        y.backward(torch.ones_like(y, memory_format=torch.preserve_format))
    assert y.is_contiguous(memory_format=memory_format)
    names = {event.name for event in profile.events()}
    assert "normops::_row_norm" in names
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous"}


# gradcheck, double backward, transforms


@pytest.mark.real_device
@pytest.mark.parametrize("activation", [None, "silu"], ids=str)
@each_case
def test_gradcheck(case, activation, device):
    sample = make(case, (2, 5, 3), activation, activation is not None, dtype=torch.float64, device=device)
    names = list(sample.parameters)

    def function(input, *values):
        return getattr(F, case.op)(input, **dict(zip(names, values, strict=True)), **sample.fixed)

    tensors = sample.input, *sample.parameters.values()
    assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)
    many = [torch.stack([tensor.detach(), 2 * tensor.detach()]) for tensor in tensors]
    alone = [function(*each) for each in zip(*many, strict=True)]
    torch.testing.assert_close(torch.vmap(function)(*many), torch.stack(alone))


# compile


@each_memory_format
@each_case
def test_opcheck(case, memory_format, device):
    sample = make(case, activation="silu", residual=True, device=device)
    sample = laid_out(sample, lambda x: x.contiguous(memory_format=memory_format))
    torch.library.opcheck(getattr(OPS, case.op).fused, (sample.input,), {**sample.parameters, **sample.fixed})
    torch.library.opcheck(getattr(OPS, case.op).default, (sample.input,))


@pytest.mark.real_device
@each_memory_format
@each_case
def test_fake_tensors_lie_as_real_ones(case, memory_format, device):
    sample = laid_out(make(case, device=device), lambda x: x.contiguous(memory_format=memory_format))
    assert_fake_tensors_lie_as_real_ones(sample)


@pytest.mark.real_device
@pytest.mark.parametrize(("mode", "dynamic"), [("auto", True), ("decompose", False)], ids=str)
@each_memory_format
@each_case
def test_compile(case, memory_format, mode, dynamic, device):
    sample = make(case, activation="silu", residual=True, device=device)
    sample = laid_out(sample, lambda x: x.contiguous(memory_format=memory_format))
    sample.fixed["weight_offset"] = 1.0
    assert_compiled_is_eager(sample, mode, dynamic)


# modules

MODULES = {
    "LayerNorm1d": (4, 6, 9),
    "LayerNorm2d": (4, 6, 5, 7),
    "LayerNorm3d": (2, 6, 3, 4, 5),
    "RMSNorm2d": (4, 6, 5, 7),
}


@pytest.mark.real_device
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, device):
    shape = MODULES[name]
    layer = getattr(normops, name)(6, eps=1e-3, activation="gelu", device=device)
    plain = getattr(torch.nn, name[:-2])(6, eps=1e-3, device=device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    plain.load_state_dict(layer.state_dict())
    x, r = torch.randn(2, *shape, device=device)
    expected = torch.nn.functional.gelu(plain(x.movedim(1, -1)).movedim(-1, 1) + r)
    torch.testing.assert_close(layer(x, r), expected)
    assert repr(layer).startswith(f"normops.{name}((6,), eps=0.001, elementwise_affine=True")
    with pytest.raises(ValueError, match=rf"expected {len(shape)}D input \(got 6D input\)"):
        layer(torch.randn(1, 6, 1, 1, 1, 1))
    with pytest.raises(RuntimeError, match=rf"{name}: expected input with 6 channels, got shape \[4, 5"):
        layer(torch.randn(4, 5, *shape[2:]))


def test_errors():
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=r"channel_layer_norm: expected input with at least 2 dimensions"):
        F.channel_layer_norm(x[0, 0, 0])
    with pytest.raises(RuntimeError, match=r"channel_rms_norm: expected weight of shape \[6\] \(channels of input\)"):
        F.channel_rms_norm(x, torch.ones(2, 3))
    with pytest.raises(NotImplementedError, match=r"channel_layer_norm: .* got Int"):
        F.channel_layer_norm(x.int())
