"""memory_efficient=True: the backward starts from the output, and the input is not kept."""

import copy
import gc
import math

import pytest
import reference
import torch
from cases import SHAPE, each_case
from comparison import largest
from fusion_cases import extras, few_cases, laid_out
from layouts import LAYOUTS, each_layout
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import normops
import normops.functional as F
from normops import backend

each_activation = pytest.mark.parametrize("activation", [None, "leaky_relu", "elu"], ids=str)


def efficient(case, activation, shape=SHAPE, least=0.5, **kwargs):
    """A sample whose weights can be divided by, with ``memory_efficient`` and without."""
    sample = case.sample(shape, **kwargs)
    sample.fixed |= extras(activation)
    if "weight" in sample.parameters:
        weight = sample.parameters["weight"].data
        weight.copy_(torch.where(weight < 0, weight - least, weight + least))
    more = copy.copy(sample)
    more.fixed = sample.fixed | {"memory_efficient": True}
    return sample, more


def errors(sample, grad):
    """The largest error of every result, relative to the largest exact value."""
    results, exact = sample.results(grad=grad), sample.double()
    exact.fixed = {name: value for name, value in exact.fixed.items() if name != "memory_efficient"}
    expected = exact.results(reference, grad.cpu().double())
    return {
        name: (result.detach().cpu().double() - expected[name]).abs().max().item() / largest(expected[name])
        for name, result in results.items()
    }


def saved_by(function):
    """The tensors that autograd keeps for the backward of what ``function`` computes."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return saved


# forward


@each_activation
@each_case
def test_same_bits_forward(case, activation, device):
    plain, sample = efficient(case, activation, device=device)
    assert torch.equal(sample.run(), plain.run())


@each_activation
@few_cases
def test_keeps_the_output_alone(case, activation, device):
    _, sample = efficient(case, activation, device=device)
    for parameter in sample.parameters.values():
        parameter.data.clamp_(0.5, 1.5)
    sample.input.data.clamp_(-2, 2)  # and no output of elu near -1
    outputs = []
    saved = saved_by(lambda: outputs.append(sample.run()))
    large = {t.data_ptr() for t in saved if t.numel() == sample.input.numel()}
    assert large == {outputs[0].data_ptr()}


def test_memory_is_freed():
    """An input that nobody else holds is gone after the forward."""
    layer = normops.BatchNorm2d(8, activation="leaky_relu", memory_efficient=True)
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    inputs = []
    for kind in (layer, normops.BatchNorm2d(8, activation="leaky_relu")):
        z = x * 2
        inputs.append(z.untyped_storage()._weak_ref())
        y = kind(z)
        del z
        gc.collect()
        expired = torch.UntypedStorage._expired(inputs[-1])
        assert expired == kind.memory_efficient
        y.sum().backward()


# backward


@each_activation
@each_case
def test_gradients(case, activation, device):
    """Within twice the error of the ordinary way, or a few units."""
    plain, sample = efficient(case, activation, (8, 6, 16, 16) if case.op != "rms_norm" else SHAPE, device=device)
    grad = torch.randn_like(sample.input)
    ordinary, other = errors(plain, grad), errors(sample, grad)
    unit = torch.finfo(torch.float32).eps
    for name, error in other.items():
        assert error <= max(2 * ordinary[name], 8 * unit), f"{name}: {error / unit:.1f} and {ordinary[name] / unit:.1f}"


@each_activation
@few_cases
def test_what_cannot_be_had_from_the_output_is_kept(case, activation, device):
    """Weights that are zero or small, biases that are large: as exact as ever, and only their inputs are kept."""
    plain, sample = efficient(case, activation, (8, 6, 5, 8), device=device)
    if "weight" not in sample.parameters:
        return
    weight = sample.parameters["weight"].data
    first, second = weight.view(-1)[:2].unbind()
    first.zero_()
    second.fill_(1e-36)
    if "bias" in sample.parameters:
        sample.parameters["bias"].data.view(-1)[2] = 1e4
    saved = saved_by(sample.run)
    lost = 3 if "bias" in sample.parameters else 2
    whole = sample.input.numel()
    if activation != "elu":
        assert whole * lost // weight.numel() in [t.numel() for t in saved]
    grad = torch.randn_like(sample.input)
    ordinary, other = errors(plain, grad), errors(sample, grad)
    for name, error in other.items():
        assert error <= max(2 * ordinary[name], 1e-6), f"{name}: {error:.2g}, ordinary {ordinary[name]:.2g}"


@few_cases
def test_all_weights_zero(case, device):
    """The last BatchNorm of a residual block, as it begins."""
    plain, sample = efficient(case, None, device=device)
    for parameter in sample.parameters.values():
        parameter.data.zero_()
    grad = torch.randn_like(sample.input)
    ours, ordinary = sample.results(grad=grad), plain.results(grad=grad)
    for name in ours:
        assert torch.equal(ours[name], ordinary[name])


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
@few_cases
def test_far_from_zero(case, mean, device):
    """The mean takes no part in what is made anew."""
    plain, sample = efficient(case, None, (8, 6, 5, 8), device=device)
    sample.input.data.add_(mean)
    grad = torch.randn_like(sample.input)
    ordinary, other = errors(plain, grad), errors(sample, grad)
    for name, error in other.items():
        assert error <= max(2 * ordinary[name], 2e-6), f"{name}: {error:.2g}, ordinary {ordinary[name]:.2g}"


# gradcheck, double backward


@each_activation
@few_cases
def test_gradcheck(case, activation, device):
    _, sample = efficient(case, activation, (3, 4, 5), dtype=torch.float64, device=device)
    names = list(sample.parameters)

    def function(input, *values):
        return getattr(F, case.op)(input, **dict(zip(names, values, strict=True)), **sample.fixed)

    tensors = (sample.input, *sample.parameters.values())
    assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


@each_activation
@few_cases
def test_double_backward_behind_others(case, activation, device):
    """The input is made anew, and yet the result of what made it."""
    results = []
    for sample in efficient(case, activation, dtype=torch.float64, device=device):
        x = sample.input
        inner = copy.copy(sample)
        inner.input = x.sin() * 2
        y = inner.run()
        leaves = [x, *sample.parameters.values()]
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves))
    for ours, ordinary in zip(*results, strict=True):
        torch.testing.assert_close(ours, ordinary, rtol=1e-6, atol=1e-6)


@few_cases
def test_backward_twice(case, device):
    _, sample = efficient(case, "leaky_relu", device=device)
    total = sample.run().pow(2).sum()
    leaves = [sample.input, *sample.parameters.values()]
    once = torch.autograd.grad(total, leaves, retain_graph=True)
    assert all(map(torch.equal, once, torch.autograd.grad(total, leaves)))


# layouts, dtypes


@each_layout
@few_cases
def test_layouts(case, layout, device):
    _, sample = efficient(case, "leaky_relu", device=device)
    sample.fixed.pop("memory_efficient")
    sample = laid_out(sample, LAYOUTS[layout])
    expected = sample.results(grad=torch.ones_like(sample.input))
    sample.fixed["memory_efficient"] = True
    results = sample.results(grad=torch.ones_like(sample.input))
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_activation
@few_cases
def test_dtypes(case, activation, dtype, device):
    """The input comes back rounded: the gradient of the input may have a second rounding, sums those of their terms."""
    _, sample = efficient(case, activation, dtype=dtype, device=device)
    exact = copy.copy(sample)
    sample.fixed.pop("memory_efficient")
    grad = torch.randn_like(sample.input)
    ordinary, other = sample.results(grad=grad), exact.results(grad=grad)
    unit = torch.finfo(dtype).eps
    for name, result in other.items():
        scale = max(largest(ordinary[name]), grad.norm().item() / math.sqrt(ordinary[name].numel()))
        error = (result - ordinary[name]).abs().max().item()
        assert error <= 8 * unit * scale, f"{name}: {error / unit / scale:.2g} units"


# edge cases


@few_cases
def test_empty(case, device):
    _, sample = efficient(case, None, (0, 6, 5, 7), device=device)
    output = sample.run()
    output.sum().backward()
    assert sample.input.grad.shape == output.shape


@few_cases
def test_output_changed_in_place_is_noticed(case, device):
    _, sample = efficient(case, None, device=device)
    output = sample.run()
    output.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@few_cases
def test_transforms(case, device):
    """Which take the composition, where nothing is saved by these operators."""
    plain, sample = efficient(case, "leaky_relu", dtype=torch.float64, device=device)
    many = torch.stack([sample.input.detach(), 2 * sample.input.detach()])

    def run(sample, x):
        other = copy.copy(sample)
        other.input = x
        return other.run()

    torch.testing.assert_close(*(torch.vmap(lambda x, s=s: run(s, x))(many) for s in (plain, sample)))
    with forward_ad.dual_level():
        x = forward_ad.make_dual(sample.input.detach(), many[1])
        ours, ordinary = (forward_ad.unpack_dual(run(s, x)).tangent for s in (sample, plain))
    torch.testing.assert_close(ours, ordinary)


def test_checkpoint_and_autocast(device):
    layer = normops.GroupNorm(2, 6, activation="leaky_relu", memory_efficient=True, device=device)
    plain = normops.GroupNorm(2, 6, activation="leaky_relu", device=device)
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    grads = []
    for run in (plain, layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            y = run(x)
        grads.append(torch.autograd.grad(y.pow(2).sum(), x)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[2], grads[1])


# compile


@pytest.mark.real_device
@few_cases
def test_compile(case, device):
    """Compilers decide themselves what is saved; gradients are the same."""
    torch._dynamo.reset()
    plain, sample = efficient(case, "leaky_relu", device=device)
    names = list(sample.parameters)

    def function(input, *values):
        return getattr(F, case.op)(input, **dict(zip(names, values, strict=True)), **sample.fixed)

    leaves = [sample.input, *sample.parameters.values()]
    for mode in ("kernel", "decompose"):
        with normops.set_compile_mode(mode):
            y = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
            grads = torch.autograd.grad(y.pow(2).sum(), leaves)
        expected = torch.autograd.grad(plain.run().pow(2).sum(), leaves)
        for ours, ordinary in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, ordinary, rtol=1e-3, atol=1e-3)


def test_opcheck_and_export(device):
    x, weight = torch.randn(SHAPE, device=device, requires_grad=True), torch.ones(6, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.normops.group_norm.fused, (x, 3, weight), {"memory_efficient": True})
    layer = normops.GroupNorm(2, 6, memory_efficient=True, device=device)
    program = torch.export.export(layer, (x.detach(),))
    torch.testing.assert_close(program.module()(x), layer(x))


# modules


def test_modules():
    layer = normops.BatchNorm2d(6, activation="elu", memory_efficient=True)
    assert repr(layer).endswith("activation='elu', memory_efficient=True)")
    assert layer.state_dict().keys() == torch.nn.BatchNorm2d(6).state_dict().keys()
    for cls, args in ((normops.LayerNorm, (7,)), (normops.RMSNorm, (7,)), (normops.LayerNorm2d, (6,))):
        assert cls(*args, memory_efficient=True).memory_efficient and not cls(*args).memory_efficient
    x = torch.randn(SHAPE)
    scripted = torch.jit.script(normops.InstanceNorm2d(6, memory_efficient=True))
    torch.testing.assert_close(scripted(x), normops.InstanceNorm2d(6)(x))
    assert copy.deepcopy(layer).memory_efficient


def test_convert_and_revert():
    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.LeakyReLU(0.1), torch.nn.Conv2d(8, 8, 3),
            torch.nn.GroupNorm(2, 8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.InstanceNorm2d(8),
        )  # fmt: skip

    model = normops.convert(make(), fuse=True, memory_efficient=True)
    assert [getattr(layer, "memory_efficient", False) for layer in model] == [i in (1, 7) for i in range(8)]
    x = torch.randn(2, 3, 16, 16)
    losses = [net(x).pow(2).sum() for net in (make(), model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    normops.revert(model)
    assert not any("memory_efficient" in layer.__dict__ for layer in model)
    assert [type(layer) for layer in model] == [type(layer) for layer in make()]


def test_backend():
    """What is fused keeps the flag where it can be kept, and loses it where it cannot."""

    class Net(torch.nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.norm, self.activation = normops.BatchNorm2d(6, memory_efficient=True), activation

        def forward(self, x):
            return self.activation(self.norm(x))

    backend.register()
    for activation, keeps in ((torch.nn.LeakyReLU(0.2, inplace=True), False), (torch.nn.ReLU(inplace=True), True)):
        torch._dynamo.reset()
        net = torch.compile(Net(activation), backend="normops")
        x = torch.randn(SHAPE, requires_grad=True)
        net(x * 1)
        z = x * 1
        saved = saved_by(lambda net=net, z=z: net(z))
        assert (z.data_ptr() in {t.data_ptr() for t in saved}) == keeps


# errors

WRONG = {
    "activation": ({"activation": "relu"}, ["None, 'leaky_relu' or 'elu'", "memory_efficient=True", "got 'relu'"]),
    "slope": (
        {"activation": "leaky_relu", "negative_slope": -0.5},
        ["negative_slope > 0 with memory_efficient=True", "-0.5"],
    ),
    "residual": ({"residual": torch.randn(SHAPE)}, ["no residual with memory_efficient=True"]),
}


@pytest.mark.parametrize("what", WRONG)
@few_cases
def test_errors(case, what):
    kwargs, told = WRONG[what]
    with pytest.raises(ValueError) as raised:
        case.sample().run(**kwargs, memory_efficient=True)
    assert str(raised.value).startswith(case.op)
    assert all(part in str(raised.value) for part in told), raised.value
    if what != "residual":
        with pytest.raises(ValueError) as raised:
            normops.BatchNorm1d(6, **kwargs, memory_efficient=True)
        assert all(part in str(raised.value) for part in told), raised.value
