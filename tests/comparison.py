"""How near to the reference a result has to be, and why."""

import math

import reference
import torch


def roundoff(input_dtype):
    """Half a unit in the last place of the arithmetic of an input.

    In float64 the statistics are no finer than the arithmetic, and the reference no finer than the result: 16 times as
    much leaves room for means that are many deviations from zero.
    """
    arithmetic = torch.promote_types(input_dtype, torch.float32)
    return torch.finfo(arithmetic).eps / 2 * (16 if arithmetic == torch.float64 else 1)


def tolerance(result_dtype, input_dtype, terms):
    """The error allowed to a result, relative to the size of the terms it is made of.

    - The result is rounded once to its dtype: half a unit in the last place.
    - It is computed in float32 (float64 for float64) by fewer than 8 operations that round: the deviation from the
      centre, the coefficients (scale, slope, shift; weight and bias in the type of the arithmetic), and the
      multiply-adds that join them.
    - Behind the coefficients are sums. No accumulator takes more than 256 terms one after the other before its total
      goes on in float64. Rounding errors of such a chain behave like independent ones (Higham and Mary, "A new approach
      to probabilistic rounding error analysis", 2019): the loss grows with the root of its length; 4 standard
      deviations leave room for the largest of many elements.
    """
    return torch.finfo(result_dtype).eps / 2 + roundoff(input_dtype) * (8 + 4 * math.sqrt(min(terms, 256)))


def describe(tensor):
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)} with strides {tensor.stride()}"


def assert_near(name, result, expected, scale, allowed):
    assert result.shape == expected.shape, f"{name}: shape {tuple(result.shape)}, not {tuple(expected.shape)}"
    if result.numel() == 0:
        return
    error = (result.detach().cpu().double() - expected).abs().max().item()
    assert error <= allowed * scale, f"{name}: error {error:.3g} of scale {scale:.3g}, allowed {allowed:.3g} of it"


def largest(tensor):
    return tensor.abs().max().item() if tensor.numel() else 0.0


def check(sample, grad=None, backward=True, allowed=None, roundings=None):
    """Runs normops on ``sample`` and compares output, gradients and their dtypes with the reference.

    ``grad`` is the gradient of the output, random by default. ``allowed`` overrides :func:`tolerance`, and
    ``roundings`` says which results are rounded to their dtype more than once.
    """
    if backward and grad is None:
        grad = torch.randn_like(sample.input)
    results = sample.results(grad=grad)
    exact = sample.double()
    grad = None if grad is None else grad.cpu().double()
    expected = exact.results(reference, grad)
    scales = {name: largest(value) for name, value in exact.results(reference, grad, frozen=True).items()}
    leaves = {"output": sample.input, "grad_input": sample.input}
    leaves |= {f"grad_{name}": parameter for name, parameter in sample.parameters.items()}
    assert results.keys() == expected.keys()
    for name, result in results.items():
        leaf = leaves[name]
        assert result.dtype == leaf.dtype, f"{sample.case.name}: {name} is {result.dtype}, not {leaf.dtype}"
        scale, terms = scales[name], sample.input.numel()
        if leaf.numel() and leaf.shape != sample.input.shape:  # and not the input or a residual
            # A sum of independent terms dy * xhat is about as large as the root of the sum of their squares, and xhat
            # has mean square one: that is the size of a sum even where its terms happen to cancel.
            scale = max(scale, grad.norm().item() / math.sqrt(leaf.numel()))
            terms = terms // leaf.numel()
        permitted = allowed or tolerance(result.dtype, sample.input.dtype, terms)
        permitted += ((roundings or {}).get(name, 1) - 1) * torch.finfo(result.dtype).eps / 2
        assert_near(f"{sample.case.name} of {describe(sample.input)}, {name}", result, expected[name], scale, permitted)
