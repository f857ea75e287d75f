"""The gradients are those of the reference, and come for what asks for one."""

import itertools

import pytest
import torch
from cases import each_case, each_with_absent_parameters, each_with_leaves
from comparison import check

import normops


@each_with_leaves
def test_equals_reference(case, leaves, device):
    sample = case.sample(device=device)
    for name, tensor in {"input": sample.input, **sample.parameters}.items():
        tensor.requires_grad_(name in leaves)
    check(sample)


@each_with_absent_parameters
def test_absent_parameters(case, names, device):
    check(case.sample(device=device, names=names))


@each_case
def test_nothing_is_recorded_unasked(case, device):
    sample = case.sample(device=device)
    with torch.no_grad():
        assert not sample.run().requires_grad
    with torch.inference_mode():
        assert sample.run().is_inference()
    for tensor in (sample.input, *sample.parameters.values()):
        tensor.requires_grad_(False)
    assert not sample.run().requires_grad


@each_case
def test_gradients_accumulate(case, device):
    sample = case.sample(device=device)
    output = sample.run()
    grad = torch.randn_like(output)
    output.backward(grad, retain_graph=True)
    once = sample.input.grad.clone()
    output.backward(grad)
    torch.testing.assert_close(sample.input.grad, 2 * once)


@each_case
def test_changed_input_is_noticed(case, device):
    sample = case.sample(device=device)
    sample.input = sample.input * 1
    output = sample.run()
    sample.input.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@each_case
def test_output_may_be_changed_in_place(case, device):
    """The backward does not need the output: an in-place activation may follow."""
    sample = case.sample(device=device)
    leaves = [sample.input, *sample.parameters.values()]
    expected = torch.autograd.grad(sample.run().relu().sum(), leaves)
    for result, other in zip(torch.autograd.grad(sample.run().relu_().sum(), leaves), expected, strict=True):
        assert torch.equal(result, other)


@each_with_leaves
def test_a_wrong_gradient_is_found(case, leaves, monkeypatch):
    """The tolerance sees a gradient that is off by one part in ten thousand."""
    sample, wrong = case.sample(), f"grad_{leaves[-1]}"
    right = sample.results
    monkeypatch.setattr(
        sample, "results", lambda grad: {k: v * (1 + 1e-4 * (k == wrong)) for k, v in right(grad=grad).items()}
    )
    with pytest.raises(AssertionError, match=f"{wrong}: error"):
        check(sample)


def test_backward_does_not_read_the_running_stats_again():
    """Evaluation keeps a copy of the statistics: a training step before the backward changes nothing."""
    x = torch.randn(4, 6, 5, requires_grad=True)
    mean, var = torch.zeros(6), torch.ones(6)
    output = normops.functional.batch_norm(x, mean, var, eps=0.0)
    var.fill_(100)
    output.backward(torch.ones_like(output))
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("length", [5, 1000])
@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=4)), ids=str)
def test_masks(mask, length, device):
    """The backward operators compute what is asked for, and nothing where nothing is."""
    ops = torch.ops.normops
    x, dy = torch.randn(2, 4, 6, length, device=device)
    weight = torch.randn(length, device=device)
    _, mean, rstd = ops._row_norm(x, 1, weight, None, 1e-5, True)
    everything = ops._row_norm_backward(dy, x, 1, mean, rstd, weight, 1e-5, True, [True] * 4)
    rows = ops._row_norm_backward(dy, x, 1, mean, rstd, weight, 1e-5, True, mask)
    _, mean, var = ops._channel_norm(x, None, None, None, None, 2, False, 1e-5)
    everything += ops._channel_norm_backward(dy, x, mean, var, None, 2, False, 1e-5, True, [True] * 4)
    channels = ops._channel_norm_backward(dy, x, mean, var, None, 2, False, 1e-5, True, mask)
    for wanted, result, expected in zip(2 * mask, rows + channels, everything, strict=True):
        assert torch.equal(result, expected) if wanted else result is None
