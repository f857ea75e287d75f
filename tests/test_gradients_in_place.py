"""The gradient of the input takes the place of the output's where nobody else has that, and nowhere else."""

import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, OVER_CHANNELS, SHAPE, Sample, each, each_channel_case
from test_extremes import sample_of as extreme_sample
from torch import nn
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import normops
import normops.functional as F

each_with_channels = each(CASES + OVER_CHANNELS)
# Row layers take channels_last through a copy of its rows.
each_laid_out = pytest.mark.parametrize(
    ("case", "memory_format"),
    [
        pytest.param(case, memory_format, id=f"{case.name}-{name}")
        for case in CASES + OVER_CHANNELS
        for name, memory_format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last))
        if name == "contiguous" or not case.row_dims
    ],
)


def in_place(step):
    """For each backward of a norm that ``step`` takes, whether it wrote over the gradient it was given."""
    with profile() as events:
        step()
    names = [event.name for event in events.function_events]
    return [
        name.endswith("_") for name in names if name.startswith("normops::_") and name.rstrip("_").endswith("backward")
    ]


def like(output):
    """Factors for the output in its layout, so that its gradient is a new tensor of that layout."""
    factors = torch.linspace(0.5, 2, output.numel()).reshape(output.shape)
    return torch.empty_like(output).copy_(factors)


def gradients(sample, keep, **more):
    """Of all leaves; the gradient of the output is kept by somebody else, or by nobody."""
    kept = []
    leaves = [sample.input, *sample.parameters.values(), *([more["residual"]] if "residual" in more else [])]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    output = sample.run(**more)
    if keep:
        output.register_hook(kept.append)
    product = (output * like(output)).sum()
    assert in_place(product.backward) == [not keep]
    return [leaf.grad for leaf in leaves]


def check_bits(sample, **more):
    for result, expected in zip(gradients(sample, False, **more), gradients(sample, True, **more), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [*((dtype, None) for dtype in DTYPES), (torch.float32, "relu"), (torch.bfloat16, "gelu")],
    ids=lambda value: str(value).removeprefix("torch."),
)
@each_laid_out
def test_same_bits(case, memory_format, dtype, activation):
    sample = case.sample(dtype=dtype)
    sample = sample.with_input(sample.input.detach().contiguous(memory_format=memory_format))
    sample.fixed["activation"] = activation
    check_bits(sample)


@pytest.mark.parametrize("shape", [(9, 6, 1, 1), (5, 6, 7, 7), (2, 6, 3, 3000), (12, 6, 8, 300)], ids=str)
@each_with_channels
def test_same_bits_in_shapes(case, shape):
    """Narrow, short and long lines, more rows than are taken at a time."""
    sample = case.sample(case.enough(shape))
    check_bits(sample)


@pytest.mark.parametrize("size", [1e20, 1e-30], ids=str)
@each_with_channels
def test_same_bits_of_extremes(case, size):
    """Those elements are taken a second time."""
    sample = extreme_sample(case, size, eps=1e-70)
    check_bits(sample)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_with_channels
def test_same_bits_with_a_residual(case, dtype, activation):
    """Its gradient goes to memory of its own, and is the first step of the input's."""
    sample = case.sample(dtype=dtype)
    residual = torch.randn(SHAPE).to(dtype).requires_grad_()
    check_bits(sample, residual=residual, activation=activation)


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [(torch.float32, None), (torch.float32, "gelu"), (torch.bfloat16, "relu")],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [(SHAPE, torch.contiguous_format), (SHAPE, torch.channels_last), ((9, 6, 1000), torch.contiguous_format)],
    ids=str,
)
@each_channel_case
def test_same_bits_with_a_mask(case, shape, memory_format, dtype, activation):
    sample = case.sample(shape, dtype=dtype)
    sample = sample.with_input(sample.input.detach().contiguous(memory_format=memory_format))
    positions = F.length_mask(torch.linspace(2, shape[-1], shape[0]).long(), shape[-1])
    mask = positions if len(shape) == 3 else positions[:, None] & (torch.rand(shape[0], *shape[2:]) > 0.2)
    check_bits(sample, mask=mask, activation=activation)


@pytest.mark.parametrize("shape", [(12, 6, 8, 300), (2, 6, 3, 3000)], ids=str)
@each([case for case in CASES if not (case.row_dims or case.given_stats)])
def test_same_bits_with_parameters_of_samples(case, shape):
    sample = case.sample(shape)
    sample.parameters = {name: torch.randn(shape[:2], requires_grad=True) for name in sample.parameters}
    check_bits(sample)


def test_same_bits_with_parameters_of_rows():
    weight, bias = torch.randn(2, 4, 1, 48, requires_grad=True)
    (case,) = (case for case in CASES if case.name == "layer_norm_1d")
    sample = Sample(case, torch.randn(4, 9, 48, requires_grad=True), {}, {"normalized_shape": (48,)})
    check_bits(sample, weight=weight, bias=bias)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
@each_with_channels
def test_same_bits_with_frozen_parameters(case, frozen):
    sample = case.sample((9, *SHAPE[1:]))
    for name, parameter in sample.parameters.items():
        parameter.requires_grad_(frozen not in (name, "both"))
    check_bits(sample)


@each([case for case in CASES if not case.given_stats])
def test_same_bits_from_the_output(case):
    check_bits(case.sample(), memory_efficient=True)


@each_with_channels
def test_same_bits_with_threads(case, threads):
    sample = case.sample((4, 64, 24, 24))
    for count in (1, 3):
        threads(count)
        check_bits(sample)


def test_sum_of_two():
    x, residual = torch.randn(2, 8, 48)

    def gradient(keep):
        kept, input = [], x.clone().requires_grad_()
        output, total = F.add_layer_norm(input, residual, (48,))
        if keep:
            output.register_hook(kept.append)
        loss = (output * like(output)).sum() + total.square().sum()
        assert in_place(loss.backward) == [not keep]
        return input.grad

    assert torch.equal(gradient(False), gradient(True))


def test_chain():
    """In a model nearly every gradient has one owner; where a block adds its input to its output it has two, until
    one of them is done."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
            self.last = nn.BatchNorm2d(4)

        def forward(self, input):
            return self.last(self.body(input)) + input

    model = normops.convert(nn.Sequential(nn.Conv2d(3, 4, 1), Block(), nn.GroupNorm(2, 4), nn.Tanh()))
    output = model(torch.randn(2, 3, 5, 5))
    # GroupNorm's; the last of the block's, which the sum hands on in two directions; the one within.
    assert in_place(output.sum().backward) == [True, False, True]


class Array(torch.autograd.Function):
    """Hands on a gradient in the memory of an array, which is kept."""

    kept = np.empty(0)

    @staticmethod
    def forward(ctx, input):
        return input.clone()

    @staticmethod
    def backward(ctx, grad):
        Array.kept = grad.numpy().copy()
        return torch.from_numpy(Array.kept)


FACTORS = torch.linspace(0.5, 2, 30).reshape(5, 6)
UNSUITABLE = {
    "array": lambda output: Array.apply(output) * FACTORS,
    "part of more": lambda output: torch.cat([output, torch.ones(3, 6)]) * torch.cat([FACTORS, FACTORS[:3]]),
    "transposed": lambda output: output.mT * FACTORS.mT.contiguous(),
    "expanded": lambda output: output,
}


@pytest.mark.parametrize("case", UNSUITABLE)
@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.BatchNorm1d(6)], ids=str)
def test_memory_that_is_not_its_own(layer, case):
    layer = normops.convert(nn.Sequential(layer))
    product = UNSUITABLE[case](layer(torch.randn(5, 6, requires_grad=True)))
    assert in_place(product.sum().backward) == [False]
    if case == "array":
        assert torch.equal(torch.from_numpy(Array.kept), FACTORS)


def test_gradients_that_are_kept():
    layer = normops.LayerNorm(6)
    x, factors = torch.randn(5, 6, requires_grad=True), torch.rand(5, 6)

    output = layer(x)
    output.retain_grad()
    (output * factors).sum().backward()
    assert torch.equal(output.grad, factors)

    # The caller's own.
    grad = torch.rand(5, 6)
    before = grad.clone()
    assert in_place(lambda: layer(x).backward(grad)) == [False]
    assert torch.equal(grad, before)

    # That of a sum is one tensor for both, and stays a gradient of the other.
    other = torch.randn(5, 6, requires_grad=True)
    ((layer(x) + other) * factors).sum().backward()
    assert torch.equal(other.grad, factors)

    # A view that was kept of it.
    views = []
    output = layer(x)
    output.register_hook(lambda grad: views.append(grad.view(-1)))
    (output * factors).sum().backward()
    assert torch.equal(views[0], factors.view(-1))


def test_hooks_of_modules():
    """They are shown the gradient as it came, after those of the inputs are there."""
    layer, seen = normops.LayerNorm(6), []
    x, factors = torch.randn(5, 6, requires_grad=True), torch.rand(5, 6)
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: seen.extend(grad_output))
    (layer(x) * factors).sum().backward()
    assert torch.equal(seen[0], factors)

    # Both gradients are asked for.
    layer = normops.LayerNorm(6)
    output = layer(x)
    of_output, _ = torch.autograd.grad((output * factors).sum(), [output, x])
    assert torch.equal(of_output, factors)


def test_graphs_and_modes():
    layer = normops.LayerNorm(6)
    x = torch.randn(5, 6, requires_grad=True)
    product = (layer(x) * torch.rand(5, 6)).sum()
    assert in_place(lambda: torch.autograd.grad(product, [x], create_graph=True)) == [False]
    product = (layer(x) * torch.rand(5, 6)).sum()
    assert in_place(lambda: product.backward(retain_graph=True)) == [True]
    first, x.grad = x.grad, None
    product.backward()
    assert torch.equal(x.grad, first)

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    names = []
    product = (layer(x) * torch.rand(5, 6)).sum()
    with Names():
        product.backward()
    assert "normops::_row_norm_backward" in names and "normops::_row_norm_backward_" not in names


def test_result_is_no_view():
    """Also where the gradient came as one: what was allowed with the result before still is."""
    x = torch.randn(5, 6, requires_grad=True)
    results = []
    for layer in (normops.LayerNorm(6), normops.BatchNorm1d(6)):
        loss = (layer(x).reshape(-1) * torch.rand(30)).sum()
        assert in_place(lambda loss=loss: results.extend(torch.autograd.grad(loss, x))) == [True]
        assert not results[-1]._is_view()
        results[-1].detach_().mul_(torch.ones(6, requires_grad=True))


def test_less_memory():
    """The gradient that is handed on lies where the one that came did."""
    x = torch.randn(5, 6, requires_grad=True)
    addresses = []

    class Address(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            return input.clone()

        @staticmethod
        def backward(ctx, grad):
            addresses.append(grad.data_ptr())
            return grad

    output = F.layer_norm(Address.apply(x), (6,))
    (F.layer_norm(output, (6,)) * torch.rand(5, 6)).sum().backward()
    assert x.grad.data_ptr() == addresses[0]
