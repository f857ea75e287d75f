"""What compilers are told of a call is what it does, and so is what they make of it. For samples (cases.py)."""

import dataclasses

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import normops
import normops.functional as F


def lie(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def assert_fake_tensors_lie_as_real_ones(sample):
    real = sample.results(grad=torch.ones_like(sample.input))
    with FakeTensorMode() as mode:

        def fake(values):
            return {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}

        parameters, fixed = fake(sample.parameters), fake(sample.fixed)
        sample = dataclasses.replace(sample, input=mode.from_tensor(sample.input), parameters=parameters, fixed=fixed)
        results = sample.results(grad=torch.ones_like(sample.input))
    assert {name: lie(result) for name, result in results.items()} == {name: lie(value) for name, value in real.items()}


def assert_compiled_is_eager(sample, mode, dynamic):
    """Output, gradients, and running statistics as they have moved."""
    grad = torch.randn_like(sample.input)
    names, leaves = list(sample.parameters), [sample.input, *sample.parameters.values()]
    fixed = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in sample.fixed.items()}
    expected = sample.results(grad=grad)

    def function(input, *values):
        return getattr(F, sample.case.op)(input, **dict(zip(names, values, strict=True)), **fixed)

    with normops.set_compile_mode(mode):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        output = compiled(*leaves)
        grads = torch.autograd.grad(output, leaves, grad)
    torch.testing.assert_close(output, expected["output"], rtol=1e-4, atol=1e-4)
    for result, name in zip(grads, ["input", *names], strict=True):
        torch.testing.assert_close(result, expected[f"grad_{name}"], rtol=1e-3, atol=1e-3)
    for name, value in fixed.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, sample.fixed[name])


def assert_compiled_autograd_is_eager(sample):
    """A backward that is compiled when it runs, with the graph that the forward left, eager."""
    grad = torch.randn_like(sample.input)
    leaves = [sample.input, *sample.parameters.values()]
    expected = torch.autograd.grad(sample.run(), leaves, grad)
    output = sample.run()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        gradients = torch.autograd.grad(output, leaves, grad)
    for result, other in zip(gradients, expected, strict=True):
        assert torch.equal(result, other)
