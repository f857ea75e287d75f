"""Weights and biases that come with the input, one for each sample or position: AdaLN, AdaIN, AdaGN, FiLM."""

import pytest
import torch
from cases import CASES, SHAPE, each, each_channel_case, each_dtype, each_row_case
from comparison import check
from compilers import assert_compiled_is_eager, assert_fake_tensors_lie_as_real_ones
from fusion_cases import fused, laid_out
from layouts import LAYOUTS, each_layout, each_memory_format
from torch.autograd import gradcheck, gradgradcheck

import normops
import normops.functional as F
from normops import backend

OPS = torch.ops.normops
FEW = ["batch_norm_training", "batch_norm_eval", "instance_norm", "group_norm_3", "layer_norm_1d", "rms_norm_1d"]
few_cases = each([case for case in CASES if case.name in FEW])
# Which leading dimensions of the input the parameters have.
LEADING = ["n", "nc", "c", "h", "nh", "nch", ""]


def varying(case, leading="n", shape=SHAPE, device="cpu", dtype=torch.float32, names=("weight", "bias"), **kwargs):
    sample = fused(
        case, kwargs.pop("activation", None), kwargs.pop("residual", False), shape, device=device, dtype=dtype
    )
    plain = case.parameter_shape(shape)
    if case.row_dims:
        free = len(shape) - case.row_dims
        own = [size if d < len("nch") and "nch"[d] in leading else 1 for d, size in enumerate(shape[:free])]
    else:
        own = shape[:1]
    for name in ("weight", "bias"):
        sample.parameters.pop(name, None)
    for name in names:
        like = {"device": device, "dtype": kwargs.get("parameter_dtype", dtype)}
        sample.parameters[name] = torch.randn(*own, *plain, **like).requires_grad_()
    return sample


# forward and backward


@each_channel_case
def test_parameters_of_samples(case, device):
    check(varying(case, device=device))


@pytest.mark.parametrize("leading", LEADING)
@each_row_case
def test_parameters_of_rows(case, leading, device):
    sample = varying(case, leading, device=device)
    check(sample)
    sample.fixed["weight_offset"] = 1.0
    check(sample)


@pytest.mark.real_device
@pytest.mark.parametrize(
    "shape", [(1, 6, 9), (3, 200), (33, 48, 1), (2, 80, 30, 31), (12, 6, 7, 7), (3, 4, 9001)], ids=str
)
@few_cases
def test_shapes(case, shape, device):
    """Few rows and many, small planes, more than one segment."""
    check(varying(case, shape=case.enough(shape), device=device))


@pytest.mark.real_device
@each_layout
@few_cases
def test_layouts(case, layout, device):
    check(laid_out(varying(case, device=device), LAYOUTS[layout]))


@pytest.mark.real_device
@each_memory_format
@each_dtype
@few_cases
def test_dtypes(case, dtype, memory_format, device):
    sample = varying(case, dtype=dtype, device=device)
    check(laid_out(sample, lambda x: x.contiguous(memory_format=memory_format)))
    check(varying(case, dtype=dtype, parameter_dtype=torch.float32, device=device))


@pytest.mark.real_device
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu"], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@few_cases
def test_epilogues(case, residual, activation, device):
    check(varying(case, activation=activation, residual=residual, device=device))


@pytest.mark.parametrize("activation", [None, "gelu"], ids=str)
@pytest.mark.parametrize("names", [("weight",), ("bias",)], ids=str)
@few_cases
def test_one_of_them(case, names, activation, device):
    sample = varying(case, names=names, activation=activation, device=device)
    check(sample)
    (name,) = names
    other = "bias" if name == "weight" else "weight"
    if other in case.parameter_names:  # in its plain shape
        sample.parameters[other] = torch.randn(case.parameter_shape(SHAPE), device=device, requires_grad=True)
        check(sample)


@pytest.mark.real_device
@pytest.mark.parametrize("leaf", ["input", "weight", "bias"])
@few_cases
def test_gradient_of_one(case, leaf, device):
    for activation in (None, "gelu"):
        sample = varying(case, activation=activation, device=device)
        for name, tensor in {"input": sample.input, **sample.parameters}.items():
            tensor.requires_grad_(name == leaf)
        check(sample)


@pytest.mark.real_device
@each([case for case in CASES if case.name in ("instance_norm", "group_norm_3", "group_norm_1")])
def test_with_mask(case, device):
    sample = varying(case, device=device)
    sample.fixed["mask"] = torch.rand(4, 5, 7, device=device) < 0.7
    check(sample)


@pytest.mark.real_device
@few_cases
def test_equal_parameters(case, device):
    """As one parameter for all, whose gradient is their sum."""
    sample = case.sample(device=device)
    own = varying(case, names=case.parameter_names, device=device).with_input(sample.input)
    own.parameters = {n: p.detach().expand_as(own.parameters[n]).clone() for n, p in sample.parameters.items()}
    own.fixed = sample.fixed
    for parameter in own.parameters.values():
        parameter.requires_grad_()
    grad = torch.randn_like(sample.input)
    ours, plain = own.results(grad=grad), sample.results(grad=grad)
    for name, result in ours.items():
        torch.testing.assert_close(result.sum_to_size(plain[name].shape), plain[name], rtol=1e-4, atol=1e-4)


@pytest.mark.real_device
def test_memory(device):
    """Nothing as large as the input but the output, its gradient and those of the input."""
    x = torch.randn(4, 512, 256, device=device, requires_grad=True)
    weight, bias = (torch.randn(4, 1, 256, device=device, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = F.layer_norm(x, (256,), weight, bias)
    assert {t.data_ptr() for t in saved if t.numel() >= x.numel()} == {x.data_ptr()}
    with torch.profiler.profile(profile_memory=True) as profile:
        y.backward(torch.ones_like(y))
    if device == "cpu":
        allocated = [e.cpu_memory_usage for e in profile.events() if e.name == "[memory]" and e.cpu_memory_usage > 0]
        assert sum(size >= x.nbytes for size in allocated) <= 2


# gradcheck, double backward, transforms


def differentiable(case, device, functions=F, activation=None):
    torch.manual_seed(0)
    sample = varying(case, shape=(3, 4, 5), dtype=torch.float64, activation=activation, device=device)
    names = list(sample.parameters)

    def function(input, *values):
        return getattr(functions, case.op)(input, **dict(zip(names, values, strict=True)), **sample.fixed)

    return function, (sample.input, *sample.parameters.values())


@pytest.mark.real_device
@pytest.mark.parametrize("activation", [None, "silu"], ids=str)
@few_cases
def test_gradcheck(case, activation, device):
    function, tensors = differentiable(case, device, activation=activation)
    assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.real_device
@few_cases
def test_vmap(case, device):
    function, tensors = differentiable(case, device)
    many = [torch.stack([tensor.detach(), 2 * tensor.detach()]) for tensor in tensors]
    alone = [function(*each) for each in zip(*many, strict=True)]
    torch.testing.assert_close(torch.vmap(function)(*many), torch.stack(alone))


# compile


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


@pytest.mark.real_device
@few_cases
def test_opcheck(case, device):
    sample = varying(case, device=device)
    torch.library.opcheck(getattr(OPS, case.op).fused, (sample.input,), {**sample.parameters, **sample.fixed})


@each_memory_format
@few_cases
def test_fake_tensors_lie_as_real_ones(case, memory_format, device):
    sample = varying(case, activation="silu", residual=True, dtype=torch.bfloat16, device=device)
    sample = laid_out(sample, lambda x: x.contiguous(memory_format=memory_format))
    assert_fake_tensors_lie_as_real_ones(sample)


@pytest.mark.real_device
@pytest.mark.parametrize(("mode", "dynamic"), [("kernel", True), ("decompose", False)], ids=str)
@few_cases
def test_compile(case, mode, dynamic, device):
    sample = varying(case, activation="silu", residual=True, device=device)
    if case.row_dims:
        sample.fixed["weight_offset"] = 1.0
    assert_compiled_is_eager(sample, mode, dynamic)


@pytest.mark.real_device
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_backend(op, device):
    """A norm takes over what follows it, and no sum before it."""
    x, r, weight = (torch.randn(3, size, 8, device=device) for size in (5, 5, 1))

    def function(x, r):
        total = x + r
        return torch.nn.functional.gelu(getattr(F, op)(total, (8,), weight)), total

    backend.register()
    compiled = torch.compile(function, backend="normops")
    torch.testing.assert_close(compiled(x, r), function(x, r))


# modules


@pytest.mark.real_device
def test_ada_layer_norm(device):
    x = torch.randn(3, 11, 8, device=device)
    scale, shift = torch.randn(2, 3, 8, device=device)
    plain = torch.nn.functional.layer_norm(x, (8,)) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    layer = normops.AdaLayerNorm(8)
    torch.testing.assert_close(layer(x, scale, shift), plain)
    torch.testing.assert_close(layer(x, scale.unsqueeze(1), shift.unsqueeze(1)), plain)
    assert isinstance(layer, torch.nn.LayerNorm) and not list(layer.parameters())
    assert repr(layer).startswith("normops.AdaLayerNorm((8,), eps=1e-05, elementwise_affine=False")
    assert repr(layer).endswith("weight_offset=1.0)")
    gelu = normops.AdaLayerNorm(8, activation="gelu", weight_offset=0.0)
    expected = torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (8,)) * scale.unsqueeze(1))
    torch.testing.assert_close(gelu(x, scale, torch.zeros_like(shift)), expected)


@pytest.mark.real_device
def test_ada_rms_norm(device):
    x = torch.randn(3, 11, 8, device=device)
    scale, shift = torch.randn(2, 3, 8, device=device)
    plain = torch.nn.functional.rms_norm(x, (8,)) * (1 + scale.unsqueeze(1))
    layer = normops.AdaRMSNorm(8)
    torch.testing.assert_close(layer(x, scale), plain)
    torch.testing.assert_close(layer(x, scale, shift), plain + shift.unsqueeze(1))


@pytest.mark.real_device
@pytest.mark.parametrize("layer", [normops.AdaInstanceNorm(6), normops.AdaGroupNorm(3, 6)], ids=str)
def test_ada_channels(layer, device):
    x = torch.randn(3, 6, 5, 4, device=device)
    scale, shift = torch.randn(2, 3, 6, device=device)
    norm = torch.nn.functional.group_norm(x, 6 if "Instance" in repr(layer) else 3)
    expected = norm * (1 + scale).view(3, 6, 1, 1) + shift.view(3, 6, 1, 1)
    torch.testing.assert_close(layer(x, scale, shift), expected)
    assert "weight_offset=1.0" in repr(layer) and not list(layer.parameters())
    mask = torch.rand(3, 5, 4, device=device) < 0.7
    assert not layer(x, scale, shift, mask).movedim(1, -1)[~mask].any()


# errors

X = torch.randn(SHAPE)


@pytest.mark.parametrize("name", ["weight", "bias"])
@each_channel_case
def test_errors_of_channels(case, name):
    sample = case.sample(names=())
    for shape in ([3, 6], [4, 5], [6, 4]):
        with pytest.raises(ValueError) as raised:
            sample.run(**{name: torch.ones(shape)})
        told = f"{case.op}: expected {name} of shape [6] (channels of input), or [4, 6] (samples and channels), got"
        assert f"{told} {shape}" in str(raised.value)
    with pytest.raises(RuntimeError, match=f"expected {name} on the device of input"):
        sample.run(**{name: torch.ones(4, 6, device="meta")})


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_errors_of_rows(op, name):
    for shape in ([3, 1, 1, 7], [4, 1, 1, 6], [1, 4, 6, 5, 7], [5, 1, 7]):
        with pytest.raises(ValueError) as raised:
            getattr(F, op)(X, (7,), **{name: torch.ones(shape)})
        assert f"{op}: expected {name} of shape [7] (normalized_shape), or with" in str(raised.value)
        assert f"got {shape}" in str(raised.value)
    with pytest.raises(ValueError, match="weight and bias that differ along the same dimensions of input, got shapes"):
        getattr(F, op)(X, (7,), weight=torch.ones(4, 1, 1, 7), bias=torch.ones(1, 6, 1, 7))


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_running_statistics(op, device):
    """They are moved as where all samples share their parameters."""
    x, parameters = torch.randn(4, 6, 5, device=device), torch.randn(4, 6, device=device)
    moved = []
    for own in (parameters[0], parameters):
        running = torch.zeros(6, device=device), torch.ones(6, device=device)
        getattr(F, op)(x, *running, own, own, True, 0.3)
        moved.append(running)
    torch.testing.assert_close(*moved)
    assert moved[0][0].abs().min() > 0
