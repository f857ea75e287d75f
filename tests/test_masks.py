"""Masks: the channel layers as if every sample had come without its padding."""

import copy
import dataclasses

import pytest
import reference
import torch
import torch.nn.functional as TF
from cases import CASES, each_channel_case, each_dtype
from comparison import check
from fusion_cases import laid_out
from layouts import LAYOUTS, each_layout, each_memory_format
from masks import each_mask, few_cases, masked, positions
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import normops
import normops.functional as F
from normops._activations import apply

OPS = torch.ops.normops


# forward and backward


@each_mask
@each_channel_case
def test_equals_layer_without_padding(case, kind, device):
    check(masked(case, kind, device=device))


@pytest.mark.parametrize(
    "shape", [(3, 4, 9001), (2, 3, 40000), (2, 80, 30, 31), (33, 12, 7, 7), (9, 5, 100), (40, 3, 2)], ids=str
)
@pytest.mark.parametrize("kind", ["lengths", "random"])
@few_cases
def test_shapes(case, kind, shape):
    """More than one segment, short lines, small planes."""
    if shape[-1] == 2 and not case.over_batch and kind == "random":
        return  # statistics of one value
    check(masked(case, kind, shape))
    sample = masked(case, kind, shape)
    if len(shape) == 4:
        check(laid_out(sample, LAYOUTS["channels_last"]))


@pytest.mark.real_device
@pytest.mark.parametrize("kind", ["lengths", "random"])
@each_layout
@each_channel_case
def test_layouts(case, layout, kind, device):
    check(laid_out(masked(case, kind, device=device), LAYOUTS[layout]))


@pytest.mark.real_device
@pytest.mark.parametrize("kind", ["lengths", "random"])
@each_memory_format
@each_dtype
@few_cases
def test_dtypes(case, dtype, memory_format, kind, device):
    sample = masked(case, kind, dtype=dtype, device=device)
    check(laid_out(sample, lambda x: x.contiguous(memory_format=memory_format)))


@pytest.mark.real_device
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@each_mask
@few_cases
def test_epilogues(case, kind, residual, activation, device):
    check(masked(case, kind, device=device, activation=activation, residual=residual))


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ["relu", "gelu"], ids=str)
@few_cases
def test_epilogues_in_half_precision(case, activation, residual):
    """Sums are of rounded gradients where valid elements do not lie side by side."""
    sample = masked(case, "random", activation=activation, residual=residual, dtype=torch.bfloat16)
    check(sample, roundings={"grad_input": 2, "grad_weight": 3, "grad_bias": 3})


@pytest.mark.real_device
@pytest.mark.parametrize("leaf", ["input", "weight", "bias", "residual"])
@few_cases
def test_gradient_of_one(case, leaf, device):
    for activation in (None, "relu"):
        sample = masked(case, "random", device=device, activation=activation, residual=True)
        for name, tensor in {"input": sample.input, **sample.parameters}.items():
            tensor.requires_grad_(name == leaf)
        check(sample)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"], ids=str)
@each_mask
@each_channel_case
def test_masked_elements_are_not_read(case, kind, activation, device):
    """NaN in their place, in the input, the residual and the gradient, changes no bit."""
    sample = masked(case, kind, device=device, activation=activation, residual=True)
    valid, grad = positions(sample), torch.randn_like(sample.input)
    nan = torch.full_like(grad, torch.nan)
    other = sample.with_input(torch.where(valid, sample.input, nan))
    residual = torch.where(valid, sample.parameters["residual"], nan).detach().requires_grad_()
    other = dataclasses.replace(other, parameters=sample.parameters | {"residual": residual})
    expected = sample.results(grad=grad)
    results = other.results(grad=torch.where(valid, grad, nan))
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name
    for name in ("output", "grad_input", "grad_residual"):
        assert not results[name][~valid].any()


@pytest.mark.real_device
@few_cases
def test_threads(case, threads):
    for kind in ("lengths", "random"):
        sample = masked(case, kind, (8, 64, 33, 17), activation="gelu", residual=True)
        grad = torch.randn_like(sample.input)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(sample.results(grad=grad))
        for other in results[1:]:
            assert all(torch.equal(results[0][name], other[name]) for name in results[0])


# gradcheck, double backward, transforms


def differentiable(case, kind, device="cpu", functions=F, residual=True):
    torch.manual_seed(2)
    sample = masked(case, kind, (3, 4, 5), device, "silu" if residual else None, residual, dtype=torch.float64)
    names = list(sample.parameters)

    def function(input, *values):
        return getattr(functions, case.op)(input, **dict(zip(names, values, strict=True)), **sample.fixed)

    return function, (sample.input, *sample.parameters.values())


@pytest.mark.real_device
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "epilogue"])
@pytest.mark.parametrize("kind", ["lengths", "holes"])
@each_channel_case
def test_gradcheck(case, kind, residual, device):
    function, tensors = differentiable(case, kind, device, residual=residual)
    assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.real_device
@few_cases
def test_third_order(case, device):
    results = []
    for functions in (F, reference):
        function, tensors = differentiable(case, "lengths", device, functions)
        total = function(*tensors).pow(3).sum()
        for _ in range(3):
            total = sum(g.pow(2).sum() for g in torch.autograd.grad(total, tensors, create_graph=True))
        results.append(total.detach())
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-7)


@pytest.mark.real_device
@few_cases
def test_tangents_and_transforms(case, device):
    results = []
    for functions in (F, reference):
        function, tensors = differentiable(case, "lengths", device, functions)
        *others, residual = (tensor.detach() for tensor in tensors)
        with forward_ad.dual_level():
            output = function(*others, forward_ad.make_dual(residual, residual.cos()))
            results.append(forward_ad.unpack_dual(output))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    function, tensors = differentiable(case, "lengths", device)
    many = [torch.stack([tensor.detach(), 2 * tensor.detach()]) for tensor in tensors]
    alone = [function(*each) for each in zip(*many, strict=True)]
    torch.testing.assert_close(torch.vmap(function)(*many), torch.stack(alone))


@pytest.mark.real_device
def test_vmap_over_masks(device):
    x = torch.randn(5, 3, 4, 6, device=device)
    masks = torch.stack([F.length_mask(torch.randint(2, 7, (3,)), 6) for _ in range(5)]).to(device)

    def norm(x, mask):
        return F.instance_norm(x, mask=mask)

    alone = torch.stack([norm(*each) for each in zip(x, masks, strict=True)])
    torch.testing.assert_close(torch.vmap(norm)(x, masks), alone, rtol=1e-5, atol=1e-5)


# running statistics


@each_mask
def test_running_statistics_of_batch_norm(kind, device):
    sample = masked(CASES[0], kind, device=device)
    ours, theirs = ([torch.randn(6, device=device), torch.rand(6, device=device)] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        other.copy_(mine)
    x, mask = sample.input.detach(), sample.fixed["mask"]
    F.batch_norm(x, *ours, training=True, momentum=0.3, mask=mask)
    valid = mask.expand(x.shape[0], *x.shape[2:])
    TF.batch_norm(x.movedim(1, -1)[valid], *theirs, training=True, momentum=0.3)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.real_device
@each_mask
def test_running_statistics_of_instance_norm(kind, device):
    """The average over the samples that have something."""
    sample = masked(CASES[2], kind, device=device)
    ours = [torch.randn(6, device=device), torch.rand(6, device=device)]
    x, mask = sample.input.detach(), sample.fixed["mask"]
    mask = mask.expand(x.shape[0], *x.shape[2:])
    pieces = [x[n][:, mask[n]].double() for n in range(len(x)) if mask[n].any()]
    expected = [
        0.7 * ours[0] + 0.3 * torch.stack([piece.mean(1) for piece in pieces]).mean(0).float(),
        0.7 * ours[1] + 0.3 * torch.stack([piece.var(1) for piece in pieces]).mean(0).float(),
    ]
    F.instance_norm(x, *ours, momentum=0.3, mask=mask)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_nothing_valid(op, device):
    """Zeros, gradients of zero, and running statistics that stay."""
    x = torch.randn(3, 6, 5, device=device, requires_grad=True)
    weight, bias = (torch.randn(6, device=device, requires_grad=True) for _ in range(2))
    running = [torch.randn(6, device=device), torch.rand(6, device=device)]
    before = copy.deepcopy(running)
    options = {"training": True} if op == "batch_norm" else {}
    mask = torch.zeros(3, 5, dtype=torch.bool, device=device)
    y = getattr(F, op)(x, *running, weight, bias, mask=mask, **options)
    assert not y.any()
    torch.testing.assert_close(running, before, rtol=0, atol=0)
    y.sum().backward()
    assert all(not tensor.grad.any() for tensor in (x, weight, bias))
    assert not F.group_norm(x, 2, mask=mask, eps=0.0).any()


def test_nothing_valid_in_the_first_samples(device):
    """Statistics are joined from sample to sample, and those of nothing with nothing are nothing. In float32 a mean
    that is not a number would be mended, as what leaves the range is (csrc/cpu/extremes.h)."""
    x = torch.randn(5, 6, 7, dtype=torch.float64, device=device)
    mask = torch.ones(5, 7, dtype=torch.bool, device=device)
    mask[:3] = False
    running = [[torch.zeros(6, device=device), torch.ones(6, device=device)] for _ in range(2)]
    y = F.batch_norm(x, *running[0], training=True, mask=mask)
    torch.testing.assert_close(y[3:], F.batch_norm(x[3:], *running[1], training=True))
    torch.testing.assert_close(*running)
    assert not y[:3].any()


# modules


@pytest.mark.real_device
@pytest.mark.parametrize("name, args", [("BatchNorm1d", (6,)), ("InstanceNorm1d", (6,)), ("GroupNorm", (3, 6))])
def test_modules(name, args, device):
    layer = getattr(normops, name)(*args, activation="relu", device=device)
    plain = getattr(torch.nn, name)(*args, device=device)
    x, r = torch.randn(2, 3, 6, 8, device=device)
    mask = F.length_mask(torch.tensor([8, 3, 5], device=device), 8)
    y = layer(x, r, mask)
    if name == "BatchNorm1d":
        pieces = plain(x.movedim(1, -1)[mask]).split([8, 3, 5])
        pieces = [piece.T for piece in pieces]
        torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    else:
        pieces = [plain(x[n : n + 1, :, :size])[0] for n, size in enumerate([8, 3, 5])]
    for n, size in enumerate([8, 3, 5]):
        torch.testing.assert_close(y[n, :, :size], apply(pieces[n] + r[n, :, :size], "relu", 0.01))
        assert not y[n, :, size:].any()
    torch.testing.assert_close(layer(x, mask=mask), layer(x, torch.zeros_like(x), mask))
    scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(x, r, mask), layer(x, r, mask))


@pytest.mark.real_device
def test_module_in_evaluation(device):
    layer = normops.BatchNorm1d(6, device=device).eval()
    layer.running_mean.normal_()
    x, mask = torch.randn(2, 6, 5, device=device), F.length_mask([5, 2], 5).to(device)
    torch.testing.assert_close(layer(x, mask=mask), layer(x) * mask.unsqueeze(1))


@pytest.mark.real_device
def test_unbatched_instance_norm(device):
    layer = normops.InstanceNorm1d(6, device=device)
    x = torch.randn(6, 9, device=device)
    y = layer(x, mask=torch.arange(9, device=device) < 5)
    torch.testing.assert_close(y, torch.nn.functional.pad(layer(x[:, :5]), (0, 4)))


def test_symbolic_trace():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = normops.BatchNorm1d(6)

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    x, mask = torch.randn(2, 6, 5), F.length_mask([5, 2], 5)
    net = Net()
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x, mask), net(x, mask))


# length_mask, errors


@pytest.mark.real_device
def test_length_mask(device):
    expected = torch.tensor([[True, True, False], [False, False, False], [True, True, True]], device=device)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert torch.equal(F.length_mask(torch.tensor([2, 0, 3], dtype=dtype, device=device), 3), expected)
    assert torch.equal(F.length_mask([2, 0, 3], 3), expected.cpu())
    assert F.length_mask([], 3).shape == (0, 3)
    assert F.length_mask(torch.ones(2, dtype=torch.int64, device="meta"), 3).is_meta


WRONG_LENGTHS = [
    ([1, 4], r"lengths in \[0, 3\] \(size\), got 4"),
    ([-1, 2], r"lengths in \[0, 3\] \(size\), got -1"),
    ([1.0, 2.0], r"lengths to be integers of shape \(N\), got torch.float32"),
    ([[1, 2]], r"of shape \[1, 2\]"),
    ([True], r"got torch.bool"),
]


@pytest.mark.parametrize("wrong, told", WRONG_LENGTHS, ids=str)
def test_errors_of_length_mask(wrong, told):
    for given in (wrong, torch.tensor(wrong)):
        with pytest.raises(ValueError, match=f"length_mask: expected .*{told}"):
            F.length_mask(given, 3)


WRONG = {
    "dtype": (torch.ones(4, 5, 7), ValueError, ["mask to be a strided tensor of bool", "got Float"]),
    "shape": (torch.ones(4, 5, 6, dtype=torch.bool), ValueError, ["mask of shape [4, 5, 7]", "got [4, 5, 6]"]),
    "channels": (torch.ones(4, 6, 5, 7, dtype=torch.bool), ValueError, ["mask of shape [4, 5, 7]", "got [4, 6, 5, 7]"]),
    "device": (torch.ones(5, 7, dtype=torch.bool, device="meta"), ValueError, ["device of input (cpu)", "got meta"]),
    "type": (3, TypeError, ["mask of type Tensor or None", "got int"]),
}


@pytest.mark.parametrize("what", WRONG)
@few_cases
def test_errors(case, what):
    mask, error, told = WRONG[what]
    with pytest.raises(error) as raised:
        case.sample().run(mask=mask)
    assert str(raised.value).startswith(case.op)
    assert all(part in str(raised.value) for part in told), raised.value


@pytest.mark.real_device
@pytest.mark.parametrize("name, where", [("batch_norm_training", (1, 0)), ("instance_norm", (2, 3))])
def test_one_valid_value(name, where):
    """In a statistic, which makes no difference in evaluation."""
    case = next(case for case in CASES if case.name == name)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[where] = True
    with pytest.raises(
        ValueError, match=rf"{case.op}: expected mask to leave more than 1 value per statistic .* got 1"
    ):
        case.sample((3, 6, 5)).run(mask=mask)
    statistics = torch.zeros(6), torch.ones(6)
    assert F.batch_norm(torch.randn(3, 6, 5), *statistics, mask=mask).count_nonzero() == 6
    assert F.group_norm(torch.randn(3, 6, 5), 2, mask=mask).count_nonzero() == 6
