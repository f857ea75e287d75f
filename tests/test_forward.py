"""The functions return what the reference and torch return."""

import inspect

import pytest
import reference
import torch
from cases import CASES, each_case, each_with_absent_parameters
from comparison import assert_near, check, largest, tolerance

import normops

SHAPES = [(4, 6), (4, 6, 7), (4, 6, 5, 7), (2, 6, 3, 4, 5), (2, 3, 2, 3, 2, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_case
def test_equals_reference(case, shape, device):
    check(case.sample(case.enough(shape), device=device), backward=False)


@each_with_absent_parameters
def test_absent_parameters(case, names, device):
    check(case.sample(device=device, names=names), backward=False)


@each_case
def test_equals_torch(case, device):
    sample = case.sample(device=device)
    expected = sample.run(torch.nn.functional).double()
    # Torch's own error is of the same kind as ours.
    allowed = 2 * tolerance(torch.float32, torch.float32, sample.input.numel())
    assert_near(case.name, sample.run(), expected.cpu(), largest(expected), allowed)


@pytest.mark.parametrize("eps", [1e-12, 0.1, 10.0])
@each_case
def test_eps(case, eps, device):
    sample = case.sample(device=device)
    sample.fixed["eps"] = eps
    check(sample, backward=False)


@each_case
def test_arguments_are_left_alone(case, device):
    sample = case.sample(device=device)
    tensors = [sample.input, *sample.parameters.values()]
    tensors += [value for value in sample.fixed.values() if isinstance(value, torch.Tensor)]
    before = [tensor.detach().clone() for tensor in tensors]
    sample.run().sum().backward()
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("op", dict.fromkeys(case.op for case in CASES))
def test_signature_is_that_of_torch(op):
    """Up to the arguments by keyword alone, which torch has not."""

    def arguments(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY]

    assert arguments(getattr(normops.functional, op)) == arguments(getattr(torch.nn.functional, op))


@each_case
def test_a_wrong_result_is_found(case, monkeypatch):
    """The tolerance sees a result that is off by one part in ten thousand."""
    right = getattr(normops.functional, case.op)
    monkeypatch.setattr(normops.functional, case.op, lambda *args, **kwargs: right(*args, **kwargs) * (1 + 1e-4))
    with pytest.raises(AssertionError, match="output: error"):
        check(case.sample())


def test_reference_is_that_of_torch():
    """In float64 the reference and torch agree to rounding."""
    for case in CASES:
        sample = case.sample(dtype=torch.float64)
        torch.testing.assert_close(sample.run(reference), sample.run(torch.nn.functional), rtol=1e-12, atol=1e-12)
