"""add_layer_norm and add_rms_norm: the norm of a sum, and the sum."""

import math

import pytest
import reference
import torch
from cases import SHAPE, each_dtype, each_row_case
from comparison import assert_near, largest, tolerance
from fusion_cases import WRONG, X, fused, laid_out
from layouts import LAYOUTS, each_layout
from torch.autograd import gradcheck, gradgradcheck

import normops
import normops.functional as F

OPS = torch.ops.normops


def added(case, device="cpu", dtype=torch.float32, shape=SHAPE):
    """(function, arguments, tensors) of the sum's norm; the tensors are input, residual and parameters."""
    sample = fused(case, None, True, shape, dtype=dtype, device=device)
    return sample, [sample.input, sample.parameters["residual"]]


def run_added(sample, functions, **more):
    parameters = {name: p for name, p in sample.parameters.items() if name != "residual"}
    if functions is reference:
        total = (sample.input + sample.parameters["residual"]).to(sample.input.dtype)
        return getattr(reference, sample.case.op)(total, **parameters, **sample.fixed, **more), total
    function = getattr(F, f"add_{sample.case.op}")
    return function(sample.input, sample.parameters["residual"], **parameters, **sample.fixed, **more)


@each_layout
@each_row_case
def test_sum_and_norm(case, layout, device):
    sample = laid_out(fused(case, None, True, device=device), LAYOUTS[layout])
    check_sum(sample)


@pytest.mark.parametrize("shape", [(3, 5), (7, 128), (5, 129), (2, 3, 1000), (3, 9001), (0, 7), (3, 4, 0)], ids=str)
@each_row_case
def test_sum_and_norm_of_shapes(case, shape, device):
    if len(shape) < case.row_dims + 1 or (0 in shape and case.op == "rms_norm"):
        return
    sample = fused(case, None, True, shape, device=device)
    check_sum(sample, backward=0 not in shape)


@each_dtype
@each_row_case
def test_sum_and_norm_of_dtypes(case, dtype, device):
    sample = fused(case, None, True, dtype=dtype, device=device)
    sample.fixed["weight_offset"] = 1.0
    check_sum(sample)


def check_sum(sample, backward=True):
    """Against the reference of the rounded sum, with gradients of both results."""
    exact = sample.double()
    dtype = sample.input.dtype
    output, total = run_added(sample, F)
    assert output.dtype == total.dtype == dtype
    assert torch.equal(total, sample.input + sample.parameters["residual"])
    # What is normalized is the sum as it was rounded.
    rounded = (
        exact.input + (total.detach().cpu().double() - exact.input).detach() - exact.parameters["residual"].detach()
    )
    exact.input = rounded
    expected = getattr(reference, sample.case.op)(
        rounded + exact.parameters["residual"],
        **{name: p for name, p in exact.parameters.items() if name != "residual"},
        **exact.fixed,
    )
    allowed = tolerance(dtype, dtype, 1)
    assert_near("output", output, expected.detach(), largest(expected.detach()), allowed)
    if not backward:
        return
    grads = torch.randn_like(output), torch.randn_like(total)
    leaves = [sample.input, sample.parameters["residual"], sample.parameters["weight"]]
    results = torch.autograd.grad((output, total), leaves, grads)
    assert torch.equal(results[0], results[1])
    parts = [
        torch.autograd.grad(expected, exact.parameters["residual"], grads[0].cpu().double(), retain_graph=True)[0],
        grads[1].cpu().double(),
    ]
    # Rounded twice: the gradient through the norm, and the sum.
    scale = largest(parts[0]) + largest(parts[1])
    assert_near("grad", results[0], sum(parts), scale, 2 * allowed)
    to_weight = torch.autograd.grad(expected, exact.parameters["weight"], grads[0].cpu().double())[0]
    terms = sample.input.numel() // results[2].numel()
    scale = max(largest(to_weight), grads[0].double().norm().item() / math.sqrt(results[2].numel()))
    assert_near("grad_weight", results[2], to_weight, scale, tolerance(results[2].dtype, dtype, terms))


@each_row_case
def test_sum_with_one_gradient(case, device):
    """Of the output alone, of the sum alone."""
    sample, leaves = added(case, device)
    output, total = run_added(sample, F)
    plain = fused(case, None, False, device=device)
    plain.input, plain.parameters = total.detach().requires_grad_(), dict(sample.parameters)
    del plain.parameters["residual"]
    grad = torch.randn_like(output)
    expected = plain.results(grad=grad)["grad_input"]
    for result in torch.autograd.grad(output, leaves, grad, retain_graph=True):
        torch.testing.assert_close(result, expected)
    for result in torch.autograd.grad(total, leaves, grad):
        assert torch.equal(result, grad)


@each_row_case
def test_sum_with_gradients_that_are_recorded(case, device):
    """They are those that are not, which gradgradcheck does not ask."""
    sample, leaves = added(case, device)
    outputs = run_added(sample, F)
    grads = [torch.randn_like(output) for output in outputs]
    expected = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    recorded = torch.autograd.grad(outputs, leaves, grads, create_graph=True)
    torch.testing.assert_close([grad.detach() for grad in recorded], list(expected), rtol=1e-4, atol=1e-4)


@each_row_case
def test_sum_gradcheck(case, device):
    sample = fused(case, None, True, (3, 4, 5), dtype=torch.float64, device=device)
    names = list(sample.parameters)

    def function(input, *values):
        parameters = dict(zip(names, values, strict=True))
        residual = parameters.pop("residual")
        return getattr(F, f"add_{case.op}")(input, residual, **parameters, **sample.fixed, weight_offset=0.5)

    tensors = sample.input, *sample.parameters.values()
    assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)
    many = [torch.stack([tensor.detach(), 2 * tensor.detach()]) for tensor in tensors]
    alone = [function(*each) for each in zip(*many, strict=True)]
    torch.testing.assert_close(torch.vmap(function)(*many), tuple(map(torch.stack, zip(*alone, strict=True))))


# compile


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


@each_row_case
def test_opcheck_of_sums(case, device):
    sample = fused(case, None, True, device=device)
    residual = sample.parameters.pop("residual")
    kwargs = {**sample.parameters, **sample.fixed}
    torch.library.opcheck(getattr(OPS, f"add_{case.op}").default, (sample.input, residual), kwargs)


@pytest.mark.real_device
@pytest.mark.parametrize("mode", ["kernel", "decompose"])
@each_row_case
def test_compile_of_sums(case, mode, device):
    sample = fused(case, None, True, device=device)
    residual = sample.parameters.pop("residual")
    function = getattr(F, f"add_{case.op}")
    kwargs = {**sample.parameters, **sample.fixed, "weight_offset": 1.0}
    with normops.set_compile_mode(mode):
        compiled = torch.compile(lambda x, r: function(x, r, **kwargs), fullgraph=True, backend="aot_eager")
        results = compiled(sample.input, residual)
    expected = function(sample.input, residual, **kwargs)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)


# modules


def test_modules_that_add(device):
    x, r = torch.randn(2, *SHAPE, device=device)
    for name in ("LayerNorm", "RMSNorm"):
        layer = getattr(normops, f"Add{name}")(7, device=device)
        plain = getattr(torch.nn, name)(7, device=device)
        plain.load_state_dict(layer.state_dict())
        assert isinstance(layer, getattr(torch.nn, name)) and repr(layer).startswith(f"normops.Add{name}(")
        output, total = layer(x, r)
        torch.testing.assert_close(output, plain(x + r))
        assert torch.equal(total, x + r)


# errors


@pytest.mark.parametrize("what", [what for what in WRONG if "residual" in what])
@each_row_case
def test_errors_of_sums(case, what):
    kwargs, error, told = WRONG[what]
    with pytest.raises(error) as raised:
        getattr(F, f"add_{case.op}")(X, kwargs["residual"], case.parameter_shape(SHAPE))
    assert all(part.replace(" or None", "") in str(raised.value) for part in told), raised.value
