"""Calls that nobody has thought of: drawn by hypothesis, compared with the reference, and held to what has to be so."""

import copy
import dataclasses
import math

import pytest
import torch
from cases import CASES, MODULES, OVER_CHANNELS
from comparison import roundoff
from hypothesis import given, note
from hypothesis import strategies as st
from property_cases import FUZZING, ROUNDINGS, bounded, check_errors, describe, layouts, samples, shapes

import normops
import normops.functional as F

if not FUZZING:  # the emulator takes too long for every run of the suite
    pytestmark = pytest.mark.real_device

INDEPENDENT = [case for case in [*CASES, *OVER_CHANNELS] if not case.over_batch]
CENTRED = [case for case in CASES if not case.given_stats and case.op != "rms_norm"]
COMPUTED = [case for case in CASES if not case.given_stats]
ROWS = [case for case in CASES if case.row_dims]


def noted(sample):
    note(describe(sample))
    return sample


@bounded(150)
@given(st.data())
def test_reference(device, data):
    check_errors(noted(data.draw(samples())))


@pytest.mark.real_device
@bounded(60)
@given(st.data(), st.sampled_from([2, 3]))
def test_threads(device, threads, data, count):
    """change no bit."""
    sample = noted(data.draw(samples()))
    grad = torch.randn_like(sample.input)
    threads(1)
    expected = sample.results(grad=grad)
    threads(count)
    for name, result in sample.results(grad=grad).items():
        torch.testing.assert_close(result, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


@bounded(60)
@given(st.data())
def test_samples(device, data):
    """Permuted they keep their bits, and so does each without the others."""
    sample = noted(data.draw(samples(INDEPENDENT, plain=True)))
    x = sample.input.detach()
    one_each = sample.case.op == "group_norm" and x[:1].numel() == sample.fixed["num_groups"]  # an error, if alone
    if x.dim() <= (sample.case.row_dims or 1) or not x.numel() or one_each:
        return
    x = x.contiguous()
    grad = torch.randn_like(x)
    results = sample.with_input(x).results(grad=grad)
    order = torch.randperm(len(x))
    permuted = sample.with_input(x[order]).results(grad=grad[order])
    first = sample.with_input(x[:1]).results(grad=grad[:1])
    for name in ("output", "grad_input"):
        assert torch.equal(permuted[name], results[name][order]), name
        assert torch.equal(first[name], results[name][:1]), name


@pytest.mark.real_device  # on CUDA bits depend on where memory begins
@bounded(60)
@given(st.data())
def test_layouts(device, data):
    """change no bit where nothing is summed in the order of memory: given statistics, and rows, which are copied."""
    sample = noted(data.draw(samples([*ROWS, *(case for case in CASES if case.given_stats)])))
    x = sample.input.detach()
    grad = torch.randn_like(x).contiguous()
    formats = {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.dim(), [])
    expected = sample.with_input(x.contiguous()).results(grad=grad)
    for other in [x, *(x.contiguous(memory_format=memory_format) for memory_format in formats)]:
        results = sample.with_input(other).results(grad=grad)
        for name in expected if sample.case.row_dims else expected.keys() & {"output", "grad_input", "grad_residual"}:
            torch.testing.assert_close(results[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.real_device
@bounded(60)
@given(st.data())
def test_sums(device, data):
    """The norm of a sum is that of torch's sum, to the bit, backward too; a gradient of the sum itself is added."""
    sample = noted(data.draw(samples(ROWS, plain=True)))
    if data.draw(st.booleans()):
        sample.fixed["weight_offset"] = 1.0
    x, dtype = sample.input, sample.input.dtype
    residual = data.draw(layouts(x.dim()))((3 * torch.randn(x.shape)).to(dtype)).requires_grad_()
    total = (x + residual).detach().contiguous()
    grad, more = (torch.randn(x.shape).to(dtype) for _ in range(2))
    expected = sample.with_input(total).results(grad=grad)
    joined = getattr(F, f"add_{sample.case.op}")(x, residual, **sample.parameters, **sample.fixed)
    leaves = {"grad_input": x, "grad_residual": residual}
    leaves |= {f"grad_{name}": parameter for name, parameter in sample.parameters.items()}

    def gradients(outputs, grads):
        found = torch.autograd.grad(outputs, list(leaves.values()), grads, retain_graph=True)
        return dict(zip(leaves, found, strict=True))

    one, both = gradients(joined[:1], [grad]), gradients(joined, [grad, more])
    results = {"output": joined[0], "sum": joined[1], **one}
    for name, value in {**expected, "sum": total, "grad_residual": expected["grad_input"]}.items():
        torch.testing.assert_close(results[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    for name, value in both.items():
        if name not in ("grad_input", "grad_residual"):
            torch.testing.assert_close(value, one[name], rtol=0, atol=0, equal_nan=True, msg=name)
            continue
        # Both terms may be rounded to the dtype, half a unit each, and so is their sum.
        added = one[name].double() + more.double()
        allowed = torch.finfo(dtype).eps * (one[name].double().abs() + more.double().abs())
        wrong = added.isfinite() & ~((value.double() - added).abs() <= allowed)
        assert not wrong.any(), name


@bounded(60)
@given(st.data())
def test_channels(device, data):
    """A channel is normalized as it would be with others beside it, or in another place."""
    cases = [case for case in CASES if case.op in ("batch_norm", "instance_norm")]
    sample = noted(data.draw(samples(cases, plain=True)))
    order = torch.randperm(sample.input.shape[1])

    def permuted(sample):
        def values(tensors):
            return {
                name: value.detach()[order].requires_grad_(value.requires_grad) if torch.is_tensor(value) else value
                for name, value in tensors.items()
            }

        other = sample.with_input(sample.input.detach()[:, order])
        return dataclasses.replace(other, parameters=values(sample.parameters), fixed=values(sample.fixed))

    check_errors(permuted(sample))
    if sample.input.dim() > 2 and sample.case.op == "instance_norm" and sample.input.numel():
        dense = sample.with_input(sample.input.detach().contiguous())
        assert torch.equal(permuted(dense).run(), dense.run()[:, order])


@bounded(60)
@given(st.data(), st.integers(-8, 8))
def test_scaled(device, data, power):
    """Powers of four change no digit, if eps is scaled along."""
    sample = noted(data.draw(samples(COMPUTED, [torch.float32, torch.float64], plain=True)))
    x = sample.input.detach().contiguous()  # since the product would be: another layout is summed in another order
    sample.fixed["eps"] = 2.0**-10
    expected = sample.with_input(x).run()
    sample.fixed["eps"] = 2.0 ** (-10 + 4 * power)
    scaled = sample.with_input(x * 4.0**power).run()
    torch.testing.assert_close(scaled, expected, rtol=0, atol=0)


@bounded(60)
@given(st.data(), st.integers(-3, 3))
def test_shifted(device, data, shift):
    """Integers stay exact when they are shifted: what is normalized is the same, and so is the reference."""
    sample = noted(data.draw(samples(CENTRED, [torch.float32, torch.float64], plain=True)))
    x = torch.randint(-50, 50, sample.input.shape).to(sample.input.dtype)
    for input in (x, x + 10.0**shift // 1):
        check_errors(sample.with_input(input))
    sample.fixed["eps"] = 1e-3
    expected, moved = (sample.with_input(input).run().double() for input in (x, x + 1000 * shift))
    # As far from each other as either may be from the reference: |xhat| is at most the root of the count.
    unit = roundoff(x.dtype) * ROUNDINGS
    terms = math.sqrt(x.numel()) * max([1.0, *(p.abs().max().item() for p in sample.parameters.values() if p.numel())])
    assert not x.numel() or (expected - moved).abs().max() <= 2 * unit * 2 * terms


@bounded(60)
@given(shapes(3), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(0, 2**31))
def test_groups(device, shape, dtype, seed):
    """As many groups as channels are instance norm to the bit; one group is layer norm of the sample."""
    torch.manual_seed(seed)
    if 0 in shape[1:] or math.prod(shape[2:]) < 2:
        return
    x = torch.randn(shape).to(dtype)
    assert torch.equal(F.group_norm(x, shape[1]), F.instance_norm(x))
    one, rows = F.group_norm(x, 1).double(), F.layer_norm(x, shape[1:]).double()
    eps = torch.finfo(dtype).eps
    arithmetic = ROUNDINGS * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(one, rows, rtol=eps + arithmetic, atol=arithmetic)


@bounded(60)
@given(
    st.sampled_from(COMPUTED),
    shapes(3, 4).filter(lambda shape: 0 not in shape),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from([0.0, 1.0, 3.0, -0.1, 1000.1]),
    st.integers(0, 2**31),
)
def test_constants(device, case, shape, dtype, value, seed):
    """Without variance the error of dx is bounded by rstd * |dy| * eps for each statistic, where dx is zero too."""
    torch.manual_seed(seed)
    sample = case.sample(case.enough(shape), dtype, names=[])
    sample = sample.with_input(torch.full_like(sample.input, value))
    check_errors(sample)
    grad = torch.ones_like(sample.input)  # whose mean is itself: without a mean of squares the gradient is zero
    dx = sample.results(grad=grad)["grad_input"]
    exact = 0.0
    if case.op == "rms_norm":
        eps = sample.double().fixed["eps"]
        square = sample.input.detach().double().square().mean()
        exact = eps / (square + eps) ** 1.5
    slope = 1 / math.sqrt((sample.double().fixed.get("eps") or 1e-5) + (value**2 if case.op == "rms_norm" else 0))
    allowed = (
        3 * ROUNDINGS * roundoff(dtype) * slope
        + torch.finfo(dtype).eps * abs(float(exact))
        + torch.finfo(dtype).smallest_normal
    )
    assert (dx.double() - exact).abs().max() <= allowed


@pytest.mark.real_device
@bounded(40)
@given(st.sampled_from(MODULES), st.booleans(), st.integers(0, 2**31))
def test_convert_and_revert(device, case, training, seed):
    """The same module with the same state, and torch's bits again."""
    torch.manual_seed(seed)
    original = case.make(torch.nn).train(training)
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter)
    module = copy.deepcopy(original)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    assert normops.convert(module) is module and type(module) is not type(original)
    normops.revert(module)
    assert type(module) is type(original) and module.training == training
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    if case.name != "SyncBatchNorm":
        x = torch.randn(case.shape)
        assert torch.equal(module(x), original(x))
