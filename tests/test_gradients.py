"""Derivatives of every order and mode, against finite differences and against autograd of the reference."""

import dataclasses

import pytest
import reference
import torch
from cases import each_case, each_with_absent_parameters, each_with_leaves
from comparison import assert_near, largest, tolerance
from layouts import each_memory_format
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import normops

SHAPE = (2, 6, 2, 3)


def differentiable(case, device, functions=normops.functional, **kwargs):
    """A small float64 call as a function of its differentiable tensors, and those tensors."""
    torch.manual_seed(0)
    sample = case.sample(SHAPE, torch.float64, device=device, **kwargs)
    names = list(sample.parameters)

    def function(input, *parameters):
        parameters = dict(zip(names, parameters, strict=True))
        return dataclasses.replace(sample, input=input, parameters=parameters).run(functions)

    return function, (sample.input, *sample.parameters.values())


@each_case
def test_gradcheck(case, device):
    function, tensors = differentiable(case, device)
    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)


@each_with_absent_parameters
def test_gradcheck_absent_parameters(case, names, device):
    function, tensors = differentiable(case, device, names=names)
    assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, fast_mode=True)


@each_case
def test_gradgradcheck(case, device):
    function, tensors = differentiable(case, device)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@each_memory_format
@each_case
def test_third_order(case, memory_format, device):
    """Each derivative taken along a random direction, three times over."""
    derivatives = []
    for functions in (normops.functional, reference):
        function, (input, *parameters) = differentiable(case, device, functions)
        input = input.detach().contiguous(memory_format=memory_format).requires_grad_()
        tensors = (input, *parameters)
        values = [function(*tensors).square()]
        for _ in range(3):
            total = sum((value * torch.randn(value.shape, dtype=value.dtype, device=device)).sum() for value in values)
            values = torch.autograd.grad(total, tensors, create_graph=True)
        derivatives.append(values)
    for ours, theirs in zip(*derivatives, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


@each_case
def test_double_backward_in_float32(case, device):
    """The gradient of a gradient penalty. It goes through twice the operations of a gradient."""
    results = []
    for dtype, functions in ((torch.float32, normops.functional), (torch.float64, reference)):
        function, tensors = differentiable(case, device, functions)
        tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        (grad,) = torch.autograd.grad(function(*tensors).sin().sum(), tensors[0], create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), tensors))
    for ours, theirs in zip(*results, strict=True):
        allowed = 2 * tolerance(torch.float32, torch.float32, tensors[0].numel())
        assert_near(case.name, ours, theirs, largest(theirs), allowed)


def all_arguments(p):
    return tuple(range(1 + len(p)))


def two(x):
    return torch.stack([x, x.exp()])


def cubes(f):
    return lambda *args: f(*args).pow(3).sum()


# Of a function f, an input x and parameters p.
TRANSFORMS = {
    "grad": lambda f, x, *p: torch.func.grad(cubes(f), all_arguments(p))(x, *p),
    "vjp": lambda f, x, *p: torch.func.vjp(f, x, *p)[1](torch.ones_like(x)),
    "jvp": lambda f, x, *p: torch.func.jvp(f, (x, *p), (x.cos(), *(q.sin() for q in p))),
    "jvp of grad": lambda f, x, *p: torch.func.jvp(torch.func.grad(cubes(f)), (x, *p), (x.cos(), *p)),
    "jacrev": lambda f, x, *p: torch.func.jacrev(f, all_arguments(p))(x, *p),
    "jacfwd": lambda f, x, *p: torch.func.jacfwd(f, all_arguments(p))(x, *p),
    "hessian": lambda f, x, *p: torch.func.hessian(cubes(f))(x, *p),
    "vmap": lambda f, x, *p: torch.vmap(f, (0, *(None for _ in p)))(two(x), *p),
    "vmap of dim 1": lambda f, x, *p: torch.vmap(f, (1, *(None for _ in p)), 1)(two(x).movedim(0, 1), *p),
    "vmap over parameters": lambda f, x, *p: torch.vmap(f, (None, *(0 for _ in p)))(x, *map(two, p)),
    "vmap of vmap": lambda f, x, *p: torch.vmap(torch.vmap(f))(*(two(t)[None] for t in (x, *p))),
    "gradients per sample": lambda f, x, *p: torch.vmap(
        torch.func.grad(cubes(f), all_arguments(p)), (0, *(None for _ in p))
    )(two(x), *p),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@each_case
def test_torch_func(case, transform, device):
    results = []
    for functions in (normops.functional, reference):
        function, tensors = differentiable(case, device, functions)
        results.append(TRANSFORMS[transform](function, *(tensor.detach() for tensor in tensors)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_running_stats_under_vmap(op, device):
    """Each of the mapped calls moves running statistics of its own."""
    x = torch.randn(3, 4, 6, 5, device=device)
    mean, var = torch.randn(3, 6, device=device), torch.rand(3, 6, device=device)
    options = {"training": True} if op == "batch_norm" else {}
    expected_mean, expected_var = mean.clone(), var.clone()
    expected = [
        getattr(torch.nn.functional, op)(*args, **options) for args in zip(x, expected_mean, expected_var, strict=True)
    ]
    output = torch.vmap(lambda *args: getattr(normops.functional, op)(*args, **options))(x, mean, var)
    torch.testing.assert_close(output, torch.stack(expected))
    torch.testing.assert_close((mean, var), (expected_mean, expected_var))


@each_with_leaves
def test_forward_mode_with_some_tangents(case, leaves, device):
    results = []
    for functions in (normops.functional, reference):
        function, tensors = differentiable(case, device, functions)
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(tensor.detach(), tensor.detach().cos()) if name in leaves else tensor.detach()
                for name, tensor in zip(("input", *case.parameter_names), tensors, strict=True)
            ]
            results.append(forward_ad.unpack_dual(function(*duals)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def private_forward(case, sample):
    """The private operator behind a case, as a function of the differentiable tensors: (output, two statistics)."""
    ops, fixed, names = torch.ops.normops, sample.fixed, list(sample.parameters)

    def function(input, *values):
        parameters = dict(zip(names, values, strict=True))
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if case.row_dims:
            eps = fixed.get("eps", torch.finfo(input.dtype).eps if case.op == "rms_norm" else 1e-5)
            return ops._row_norm(input, case.row_dims, weight, bias, eps, case.op == "layer_norm")
        given = (fixed["running_mean"], fixed["running_var"]) if case.given_stats else (None, None)
        groups = fixed.get("num_groups", input.shape[1])
        over_batch = case.op == "batch_norm" or case.given_stats
        return ops._channel_norm(input, *given, weight, bias, groups, over_batch, 1e-5)

    return function


@each_case
def test_private_operators(case, device):
    """Called directly they are as differentiable as the public ones, but for the statistics, which are constants."""
    torch.manual_seed(0)
    sample = case.sample(SHAPE, torch.float64, device=device)
    function, tensors = private_forward(case, sample), (sample.input, *sample.parameters.values())
    output, *statistics = function(*tensors)
    assert torch.equal(output, sample.run())
    assert output.requires_grad and not any(statistic.requires_grad for statistic in statistics)
    assert gradcheck(lambda *args: function(*args)[0], tensors, check_forward_ad=True, fast_mode=True)
    with torch.no_grad():
        plain = function(*tensors)
    mapped = torch.vmap(function)(*(tensor.detach()[None] for tensor in tensors))
    for result, one, other in zip((output, *statistics), plain, mapped, strict=True):
        assert result.dtype == one.dtype == other.dtype
        torch.testing.assert_close(result, one)
        torch.testing.assert_close(other[0], one)
