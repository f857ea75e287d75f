"""Norm, residual and activation in one pass: what the three have one after the other."""

import copy
import math

import pytest
import reference
import torch
from cases import MODULES, SHAPE, each, each_case, each_dtype, each_row_case
from comparison import check
from compilers import assert_compiled_is_eager, assert_fake_tensors_lie_as_real_ones
from fusion_cases import (
    ACTIVATIONS,
    SLOPE,
    WRONG,
    each_activation,
    each_residual,
    extras,
    few_activations,
    few_cases,
    fused,
    laid_out,
)
from layouts import LAYOUTS, each_layout, each_memory_format
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import normops
import normops.functional as F
from normops import _activations

OPS = torch.ops.normops


# forward


@each_residual
@each_activation
@each_case
def test_equals_reference(case, activation, residual, device):
    check(fused(case, activation, residual, device=device), backward=False)


@each_activation
def test_values_are_those_of_torch(activation):
    """Far from zero, at the corners, and in the tails."""
    z = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([0.0, 3.0, -3.0, 6.0, 1e4, -1e4])]).view(1, -1, 1)
    z.requires_grad_()
    stats = torch.zeros(z.shape[1]), torch.ones(z.shape[1])
    ours = F.batch_norm(z, *stats, eps=0.0, **extras(activation))
    theirs = _activations.apply(z, activation, SLOPE)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(y.sum(), z)[0] for y in (ours, theirs)]
    if activation == "hardswish":  # which has two derivatives at its corners
        grads = [g[z.detach().abs() != 3] for g in grads]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_activation
def test_functions_are_exact_to_rounding(activation, dtype):
    """The functions themselves: a norm that does nothing, float32 against the reference in float64.

    exp is within 1 unit in the last place and followed by at most three more operations: two units of z, or of one
    (elu, which takes one from it). The derivative of gelu_tanh has terms up to four times its value.
    """
    if activation is None:
        return
    z = torch.cat([torch.linspace(-30, 30, 30011), torch.logspace(-6, 30, 999), -torch.logspace(-6, 30, 999)])
    z = z.to(dtype).view(1, -1, 1).requires_grad_()
    stats = torch.zeros(z.shape[1]), torch.ones(z.shape[1])
    value = F.batch_norm(z, *stats, eps=0.0, **extras(activation))
    exact = z.detach().double().requires_grad_()
    expected = reference.ACTIVATIONS[activation](exact, SLOPE)
    unit = torch.finfo(dtype).eps
    scale = exact.abs().clamp(min=1) if activation == "elu" else exact.abs()
    assert ((value - expected).abs() <= 2 * unit * scale).all()
    derivative, expected = (torch.autograd.grad(y.sum(), x)[0] for y, x in ((value, z), (expected, exact)))
    corner = torch.isin(exact.abs(), exact.new_tensor([0, 3, 6]))
    near = (exact.abs() < 1e4) & ~corner  # beyond, the reference itself has infinite terms
    units = 8 if activation == "gelu_tanh" else 2
    assert ((derivative - expected).abs() <= units * unit * exact.abs().clamp(1, 30))[near].all()


@pytest.mark.parametrize(
    "shape",
    [
        (1, 3),
        (5, 6),
        (2, 64, 9),
        (33, 48, 1),
        (2, 6, 40, 31),
        (9, 3, 7, 7),
        (3, 200, 3, 5),
        (4, 3, 51, 51),
        (2, 3, 9001),
    ],
)
@each_residual
@few_cases
def test_shapes(case, residual, shape, device):
    """Short lines, long ones, narrow ones and wide: pieces begin and end anywhere."""
    check(fused(case, "silu", residual, case.enough(shape), device=device))


@pytest.mark.parametrize("shape", [SHAPE, (2, 6, 4, 32)], ids=["tails", "whole"])
@each_row_case
def test_weight_offset(case, shape, device):
    """Of rows that are whole registers as well, whose weight would be read where it lies."""
    sample = case.sample(shape, device=device)
    sample.fixed["weight_offset"] = 1.0
    check(sample)
    sample.fixed |= {"activation": "gelu"}
    check(sample)


# backward


@each_residual
@each_activation
@each_case
def test_gradients(case, activation, residual, device):
    check(fused(case, activation, residual, device=device))


@pytest.mark.parametrize("leaf", ["input", "weight", "bias", "residual"])
@few_activations
@few_cases
def test_gradient_of_one(case, activation, leaf, device):
    """What does not ask for a gradient gets none, and changes nothing for what does."""
    sample = fused(case, activation, True, device=device)
    if leaf not in ("input", *sample.parameters):
        return
    for name, tensor in {"input": sample.input, **sample.parameters}.items():
        tensor.requires_grad_(name == leaf)
    check(sample)


@few_activations
@few_cases
def test_absent_parameters(case, activation, device):
    check(fused(case, activation, True, device=device, names=()))


@each_residual
@each_activation
def test_what_is_saved(activation, residual):
    """The input, the statistics and the parameters: another tensor of the size of the input only where it has to be."""
    saved = []
    x, r = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(6, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = F.group_norm(x, 3, weight, bias, **extras(activation), residual=r if residual else None)
    large = {t.data_ptr() for t in saved if t.numel() == x.numel()}
    expected = {x.data_ptr()}
    if activation and residual:
        expected |= {y.data_ptr() if activation in ("relu", "leaky_relu") else r.data_ptr()}
    assert large == expected


# gradcheck, double backward


@each_residual
@each_activation
@few_cases
def test_gradcheck(case, activation, residual, device):
    function, tensors = differentiable(case, activation, residual, device)
    assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


def differentiable(case, activation, residual, device, functions=F):
    sample = fused(case, activation, residual, (3, 4, 5), dtype=torch.float64, device=device)
    names = list(sample.parameters)

    def function(input, *values):
        return getattr(functions, case.op)(input, **dict(zip(names, values, strict=True)), **sample.fixed)

    return function, (sample.input, *sample.parameters.values())


@few_activations
@few_cases
def test_third_order(case, activation, device):
    results = []
    for functions in (F, reference):
        torch.manual_seed(0)
        function, tensors = differentiable(case, activation, True, device, functions)
        total = function(*tensors).pow(3).sum()
        for _ in range(3):
            total = sum(g.pow(2).sum() for g in torch.autograd.grad(total, tensors, create_graph=True))
        results.append(total.detach())
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-7)


@few_activations
@few_cases
def test_tangents_and_transforms(case, activation, device):
    """Forward-mode AD with respect to the residual alone; vmap over calls."""
    results = []
    for functions in (F, reference):
        torch.manual_seed(0)
        function, tensors = differentiable(case, activation, True, device, functions)
        *others, residual = (tensor.detach() for tensor in tensors)
        with forward_ad.dual_level():
            output = function(*others, forward_ad.make_dual(residual, residual.cos()))
            results.append(forward_ad.unpack_dual(output))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    many = [torch.stack([tensor.detach(), 2 * tensor.detach()]) for tensor in tensors]
    alone = [function(*each) for each in zip(*many, strict=True)]
    torch.testing.assert_close(torch.vmap(function)(*many), torch.stack(alone))


# layouts, dtypes


@each_residual
@each_layout
@each_case
def test_layouts(case, layout, residual, device):
    check(laid_out(fused(case, "leaky_relu", residual, device=device), LAYOUTS[layout]))


@each_layout
@few_cases
def test_residual_of_another_layout(case, layout, device):
    sample = fused(case, "relu", True, device=device)
    sample.parameters["residual"] = LAYOUTS[layout](sample.parameters["residual"].detach()).requires_grad_()
    check(sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_residual
@few_activations
@few_cases
def test_half_precision(case, activation, residual, dtype, device):
    """With the roundings of any device: the gradient before the activation is rounded where registers keep it."""
    sample = fused(case, activation, residual, dtype=dtype, device=device)
    check(sample, roundings={"grad_input": 2, "grad_weight": 3, "grad_bias": 3} if activation else {})


@pytest.mark.real_device
@each_memory_format
@each_dtype
@each_residual
@each_activation
@few_cases
def test_dtypes(case, activation, residual, dtype, memory_format, device):
    """Rounded once, at the end, as a norm alone.

    But for the gradient of the input, whose first step, the gradient before the activation, may be rounded too; and,
    with leaky_relu, sums of that.
    """
    sample = fused(case, activation, residual, dtype=dtype, device=device)
    sample = laid_out(sample, lambda x: x.contiguous(memory_format=memory_format))
    roundings = {} if activation in (None, "relu", "relu6") else {"grad_input": 2}
    if activation == "leaky_relu":
        roundings |= {"grad_weight": 3, "grad_bias": 3}
    check(sample, roundings=roundings)


@pytest.mark.real_device
@pytest.mark.parametrize("shape", [(8, 64, 33, 17), (1024, 24, 2, 2)], ids=["planes", "small_planes"])
@few_cases
def test_threads(case, shape, threads):
    """Their number does not change a bit."""
    sample = fused(case, "gelu_tanh", True, shape)
    grad = torch.randn_like(sample.input)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(sample.results(grad=grad))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


# edge cases


@each_residual
@few_activations
@few_cases
def test_empty(case, activation, residual, device):
    sample = fused(case, activation, residual, (0, 6, 5, 7), device=device)
    output = sample.run()
    assert output.shape == (0, 6, 5, 7)
    output.sum().backward()
    assert sample.input.grad.shape == output.shape


@few_cases
def test_nan_stays(case, device):
    sample = fused(case, "relu", True, device=device)
    sample.parameters["residual"].data[0, 0, 0, 0] = math.nan
    output = sample.run()
    assert output[0, 0, 0, 0].isnan() and output.isnan().sum() == 1


@few_cases
def test_output_changed_in_place_is_noticed(case, device):
    """Where the backward takes the derivative from it."""
    sample = fused(case, "relu", True, device=device)
    output = sample.run()
    output.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@few_cases
def test_residual_that_is_the_input(case, device):
    sample = case.sample(device=device)
    x = sample.input
    grad = torch.randn_like(x)
    result = torch.autograd.grad(sample.run(residual=x, activation="relu"), x, grad)[0]
    expected = torch.autograd.grad(torch.relu(sample.run() + x), x, grad)[0]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_running_stats_move(device):
    x, r = torch.randn(2, *SHAPE, device=device)
    ours, theirs = ([torch.zeros(6, device=device), torch.ones(6, device=device)] for _ in range(2))
    F.batch_norm(x, *ours, training=True, activation="relu", residual=r)
    F.batch_norm(x, *theirs, training=True)
    assert all(map(torch.equal, ours, theirs))


# compile


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


@each_residual
@pytest.mark.parametrize("activation", ["relu", "silu"])
@few_cases
def test_opcheck(case, activation, residual, device):
    sample = fused(case, activation, residual, device=device)
    torch.library.opcheck(getattr(OPS, case.op).fused, (sample.input,), {**sample.parameters, **sample.fixed})


@pytest.mark.real_device
@each_residual
@each_layout
@few_cases
def test_fake_tensors_lie_as_real_ones(case, layout, residual, device):
    sample = laid_out(fused(case, "silu", residual, device=device), LAYOUTS[layout])
    assert_fake_tensors_lie_as_real_ones(sample)


@pytest.mark.real_device
@pytest.mark.parametrize(("residual", "dynamic"), [(False, False), (True, True)], ids=["static", "residual-dynamic"])
@pytest.mark.parametrize("mode", ["kernel", "decompose"])
@few_cases
def test_compile(case, residual, mode, dynamic, device):
    sample = fused(case, "silu", residual, device=device)
    assert_compiled_is_eager(sample, mode, dynamic)


def test_export(device):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = normops.GroupNorm(2, 6, activation="silu", device=device)
            self.rows = normops.AddLayerNorm(7, device=device)

        def forward(self, x, residual):
            return self.rows(self.norm(x, residual), residual)

    net, args = Net(), tuple(torch.randn(2, *SHAPE, device=device))
    program = torch.export.export(net, args)
    torch.testing.assert_close(program.module()(*args), net(*args))
    with normops.set_compile_mode("decompose"):
        program = torch.export.export(net, args)
    assert not any("normops" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*args), net(*args), rtol=1e-4, atol=1e-4)


def test_autocast(device):
    x, r = torch.randn(2, *SHAPE, device=device, dtype=torch.bfloat16)
    expected = F.group_norm(x, 2, activation="relu", residual=r), *F.add_rms_norm(x, r, (7,))
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        results = F.group_norm(x, 2, activation="relu", residual=r), *F.add_rms_norm(x, r, (7,))
    for result, other in zip(results, expected, strict=True):
        assert result.dtype == other.dtype == torch.bfloat16
        assert torch.equal(result, other)


def test_torchscript():
    layer = normops.GroupNorm(2, 6, activation="relu")
    x, r = torch.randn(2, *SHAPE)
    scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(x, r), layer(x, r))
    torch.testing.assert_close(scripted(x), layer(x))


# modules


@each([case for case in MODULES if not case.kwargs])
def test_modules(case, device):
    layer = case.make(normops, activation="leaky_relu", negative_slope=SLOPE, device=device)
    plain = case.make(normops, device=device)
    x, r = torch.randn(2, *case.shape, device=device)
    for module in (layer, plain):
        for parameter in module.parameters():
            torch.nn.init.ones_(parameter)
    expected = torch.nn.functional.leaky_relu(plain(x) + r, SLOPE)
    torch.testing.assert_close(layer(x, r), expected, rtol=1e-4, atol=1e-5)
    assert repr(layer).endswith(f"activation='leaky_relu', negative_slope={SLOPE})")
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert "activation" not in repr(plain)
    torch.testing.assert_close(copy.deepcopy(layer).eval()(x), layer.eval()(x))


def test_layer_norm_2d(device):
    layer = normops.LayerNorm2d(6, activation="gelu", device=device)
    x, r = torch.randn(2, *SHAPE, device=device)
    expected = torch.nn.functional.gelu(normops.LayerNorm2d(6, device=device)(x) + r)
    torch.testing.assert_close(layer(x, r), expected, rtol=1e-5, atol=1e-6)


def test_unbatched_instance_norm(device):
    layer = normops.InstanceNorm2d(6, activation="relu", device=device)
    x, r = torch.randn(2, *SHAPE, device=device)
    torch.testing.assert_close(layer(x[0], r[0]), layer(x[:1], r[:1])[0])


def test_converted_layers_have_no_activation():
    layer = normops.convert(torch.nn.BatchNorm2d(6))
    assert layer.activation is None and layer.negative_slope == 0.01
    x = torch.randn(SHAPE)
    torch.testing.assert_close(layer(x, x), torch.nn.BatchNorm2d(6)(x) + x)


# errors


@pytest.mark.parametrize("what", WRONG)
@few_cases
def test_errors(case, what):
    kwargs, error, told = WRONG[what]
    with pytest.raises(error) as raised:
        case.sample().run(**kwargs)
    assert str(raised.value).startswith(case.op)
    assert all(part in str(raised.value) for part in told), raised.value


def test_errors_of_modules():
    with pytest.raises(ValueError, match="BatchNorm2d: expected activation to be None or one of 'relu', 'relu6'"):
        normops.BatchNorm2d(6, activation="swish")
    with pytest.raises(ValueError, match="GroupNorm: expected negative_slope only with activation='leaky_relu'"):
        normops.GroupNorm(2, 6, negative_slope=0.3)


def test_names():
    """The lists of activations agree: that of the operators, of Python, and of the reference."""
    assert list(_activations.FUNCTIONS) == list(reference.ACTIVATIONS) == ACTIVATIONS[1:]
    with pytest.raises(ValueError) as raised:
        OPS.rms_norm(torch.randn(SHAPE), (7,), activation="")
    assert ", ".join(map(repr, _activations.FUNCTIONS)) in str(raised.value)
