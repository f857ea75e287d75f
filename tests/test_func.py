"""torch.func on converted models: stateless calls, gradients per sample, ensembles, derivatives of the whole model."""

import copy

import pytest
import torch
from models import IMAGE, MODELS, pair
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

# BatchNorm in training couples the samples and moves buffers, so models are in evaluation, as torch recommends.
each_model = pytest.mark.parametrize("name", MODELS)


def evaluated(name, device):
    original, converted = pair(MODELS[name], device=device, dtype=torch.float64)
    return original.eval(), converted.eval(), torch.randn(IMAGE, device=device, dtype=torch.float64)


def same(results):
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


@each_model
def test_functional_call(name, device):
    """With other parameters than the model's, and gradients with respect to them."""
    original, converted, x = evaluated(name, device)
    values = {key: (value * 1.5).detach() for key, value in original.named_parameters()}
    results = [
        grad(lambda p, model=model: functional_call(model, p, (x,)).square().sum())(values)
        for model in (original, converted)
    ]
    same(results)


@each_model
def test_gradients_per_sample(name, device):
    original, converted, x = evaluated(name, device)
    results = []
    for model in (original, converted):
        parameters = {key: value.detach() for key, value in model.named_parameters()}
        buffers = dict(model.named_buffers())

        def loss(parameters, sample, model=model, buffers=buffers):
            return functional_call(model, (parameters, buffers), (sample[None],)).square().sum()

        results.append(vmap(grad(loss), (None, 0))(parameters, x))
    same(results)
    (key, value), *_ = results[1].items()
    assert value.shape == (len(x), *original.get_parameter(key).shape)


@each_model
def test_ensemble(name, device):
    """Several models of one kind as one, by stack_module_state."""
    _, converted, x = evaluated(name, device)
    models = [copy.deepcopy(converted) for _ in range(3)]
    for model in models:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(converted).to("meta")
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    same((outputs, torch.stack([model(x) for model in models])))
    outputs.square().sum().backward()
    stacked = [value.grad for value in parameters.values()]
    torch.stack([model(x) for model in models]).square().sum().backward()
    for value, *gradients in zip(stacked, *(model.parameters() for model in models), strict=True):
        same((value, torch.stack([parameter.grad for parameter in gradients])))


@each_model
def test_derivatives_of_a_model(name, device):
    """Forward and reverse mode, and one over the other, in the direction of a random image."""
    results = []
    torch.manual_seed(1)
    original, converted, x = evaluated(name, device)
    x, direction = x[:2], torch.randn_like(x[:2])
    for model in (original, converted):

        def along(t, model=model):
            return model(x + t * direction).sin().sum()

        zero = torch.zeros((), device=device, dtype=torch.float64)
        one = torch.ones_like(zero)
        results.append(
            [jacrev(along)(zero), jacfwd(along)(zero), hessian(along)(zero), jvp(grad(along), (zero,), (one,))]
        )
    same(results)


@each_model
def test_gradient_penalty(name, device):
    """Double backward through a model in training."""
    results = []
    original, converted = pair(MODELS[name], device=device, dtype=torch.float64)
    x = torch.randn(IMAGE, device=device, dtype=torch.float64, requires_grad=True)
    for model in (original, converted):
        (gradient,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.norm(), [*model.parameters()], allow_unused=True))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-10)
