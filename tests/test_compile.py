"""The operators are registered as torch wants them, and models with them compile whole."""

import dataclasses

import pytest
import torch
from cases import SHAPE, each_case, each_channel_case, each_module, each_row_case
from compilers import assert_compiled_autograd_is_eager, assert_fake_tensors_lie_as_real_ones
from layouts import LAYOUTS, each_layout
from torch._dynamo.testing import CompileCounterWithBackend

import normops

OPS = torch.ops.normops


@pytest.fixture(autouse=True)
def compiled_anew_to_kernels():
    torch._dynamo.reset()
    with normops.set_compile_mode("kernel"):
        yield


@pytest.mark.parametrize("names", [(), ("weight",)], ids=["plain", "weight"])
@each_case
def test_opcheck(case, names, device):
    sample = case.sample(device=device, names=names)
    kwargs = {**sample.parameters, **sample.fixed}
    torch.library.opcheck(getattr(OPS, case.op).default, (sample.input,), kwargs)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_opcheck_of_moved_statistics(op, device):
    args = torch.randn(SHAPE, device=device), torch.zeros(6, device=device), torch.ones(6, device=device)
    torch.library.opcheck(getattr(OPS, op).default, args, {"training": True} if op == "batch_norm" else {})


def private_calls(case, sample):
    """The private operators behind a case: the arguments of the forward, and how those of the backward begin."""
    weight, bias = (sample.parameters.get(name) for name in ("weight", "bias"))
    x, eps = sample.input.detach(), sample.fixed.get("eps", 1e-5)
    if case.row_dims:
        centered = case.op == "layer_norm"
        forward = (x, case.row_dims, weight, bias, eps, centered)
        _, mean, rstd = (result.detach() for result in OPS._row_norm(*forward))
        return "_row_norm", forward, (torch.randn_like(x), x, case.row_dims, mean, rstd, weight, eps, centered)
    given = (sample.fixed["running_mean"], sample.fixed["running_var"]) if case.given_stats else (None, None)
    over_batch = case.op == "batch_norm" or case.given_stats
    groups = sample.fixed.get("num_groups", x.shape[1])
    forward = (x, *given, weight, bias, groups, over_batch, eps)
    _, mean, var = (result.detach() for result in OPS._channel_norm(*forward))
    backward = (torch.randn_like(x), x, mean, var, weight, groups, over_batch, eps, not case.given_stats)
    return "_channel_norm", forward, backward


@pytest.mark.parametrize(
    ("mask", "requires_grad"),
    [((True, True, True), True), ((True, False, False), False), ((False, True, True), False)],
    ids=["differentiable", "input", "parameters"],
)
@each_case
def test_opcheck_of_private_operators(case, mask, requires_grad, device):
    sample = case.sample(device=device)
    name, forward, backward = private_calls(case, sample)
    for tensor in (forward[0], *backward[:2], *sample.parameters.values()):
        tensor.requires_grad_(requires_grad)
    torch.library.opcheck(getattr(OPS, name).default, forward)
    torch.library.opcheck(getattr(OPS, f"{name}_backward").default, (*backward, (*mask, False)))


def test_opcheck_of_running_stats(device):
    stats = [torch.rand(6, device=device) for _ in range(2)]
    for shape in ((6,), (4, 6)):
        new = [torch.rand(shape, device=device, dtype=torch.float64) for _ in range(2)]
        torch.library.opcheck(OPS._update_running_stats.default, (*stats, *new, 0.1, 20))
    for over_batch in (True, False):
        x = torch.randn(4, 6, 5, device=device)
        torch.library.opcheck(OPS._channel_norm_tracked.default, (x, *stats, None, None, over_batch, 0.1, 1e-5))


def stages(x, dy):
    """The arguments of every stage that is an operator of its own."""
    mean, var = OPS._channel_moments(x)
    sums = OPS._channel_grad_sums(dy, x, mean, var, 1e-5)
    weight = torch.randn(x.shape[1], device=x.device)
    return {
        "_channel_moments": (x,),
        "_merge_moments": (torch.tensor([3.0, 0.0, 2.0]), torch.randn(3, 6), torch.rand(3, 6)),
        "_channel_grad_sums": (dy, x, mean, var, 1e-5),
        "_channel_grad_apply": (dy, x, mean, var, weight, *sums, 3 * x.numel() // x.shape[1], 1e-5),
    }


@each_layout
@pytest.mark.parametrize("op", ["_channel_moments", "_merge_moments", "_channel_grad_sums", "_channel_grad_apply"])
def test_opcheck_of_stages(op, layout, device):
    x, dy = (LAYOUTS[layout](torch.randn(SHAPE, device=device)) for _ in range(2))
    torch.library.opcheck(getattr(OPS, op).default, stages(x, dy)[op])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_layout
@each_case
def test_fake_tensors_lie_as_real_ones(case, layout, dtype, device):
    sample = case.sample(dtype=dtype, device=device)
    sample = sample.with_input(LAYOUTS[layout](sample.input.detach()))
    assert_fake_tensors_lie_as_real_ones(sample)


@each_case
def test_meta_device(case):
    sample = case.sample(device="meta")
    results = sample.results(grad=torch.empty_like(sample.input))
    assert all(result.is_meta for result in results.values())
    assert results["output"].shape == SHAPE


@pytest.mark.real_device
@each_case
def test_compiled_function(case, device):
    sample = case.sample(device=device)
    grad = torch.randn_like(sample.input)
    expected = sample.results(grad=grad)
    compiled = torch.compile(sample.run, backend="aot_eager", fullgraph=True)
    leaves = [sample.input, *sample.parameters.values()]
    output = compiled()
    gradients = torch.autograd.grad(output, leaves, grad)
    for result, other in zip((output, *gradients), expected.values(), strict=True):
        assert torch.equal(result, other)


@pytest.mark.real_device
@each_module
def test_compiled_module(case, device):
    """Two training steps: outputs, gradients and running statistics are those of the module itself.

    The cumulative average of BatchNorm reads its counter, which breaks the graph, in torch as here.
    """
    layer, compiled = case.make(normops).to(device), case.make(normops).to(device)
    whole = not ("BatchNorm" in case.name and case.kwargs.get("momentum", 0.1) is None)
    run = torch.compile(compiled, backend="aot_eager", fullgraph=whole)
    for _ in range(2):
        inputs = [torch.randn(case.shape, device=device, requires_grad=True) for _ in range(2)]
        inputs[1].data = inputs[0].data
        outputs = layer(inputs[0]), run(inputs[1])
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(layer.state_dict(), compiled.state_dict())
    for parameter, other in zip(layer.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.real_device
@each_case
def test_compiled_autograd(case, device):
    sample = case.sample(device=device)
    assert_compiled_autograd_is_eager(sample)


@pytest.mark.real_device
@each_case
def test_dynamic_batch(case, device):
    """One graph serves every size of the batch."""
    sample = case.sample(device=device)

    def function(input):
        return dataclasses.replace(sample, input=input).run()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for size in (3, 4, 7):
        x = torch.randn(size, *SHAPE[1:], device=device, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        output = compiled(x)
        output.sum().backward()
        assert torch.equal(output, function(x))
    assert counter.frame_count == 1


@pytest.mark.real_device
@each_channel_case
def test_dynamic_positions(case, device):
    function, sample = getattr(normops.functional, case.op), case.sample(device=device)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (5, 6, 9):
        x = torch.randn(4, 6, size, size, device=device)
        kwargs = {**sample.parameters, **sample.fixed}
        assert torch.equal(compiled(x, **kwargs), function(x, **kwargs))


@pytest.mark.real_device
@each_row_case
def test_dynamic_rows(case, device):
    function = getattr(normops.functional, case.op)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (5, 6, 9):
        x = torch.randn(3, size, size, device=device)
        shape = x.shape[-case.row_dims :]
        assert torch.equal(compiled(x, shape), function(x, shape))


@pytest.mark.real_device
def test_inductor(device):
    """A training step of a converted model through the default compiler."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.GroupNorm(2, 6),
        torch.nn.InstanceNorm2d(6, affine=True),
        torch.nn.LayerNorm(6),
        torch.nn.RMSNorm(6),
    ).to(device)
    normops.convert(model)
    x = torch.randn(4, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        run(x).pow(3).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


@pytest.mark.real_device
def test_export(device):
    model = normops.convert(torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.BatchNorm1d(7)))
    x = torch.randn(4, 5, device=device)
    program = torch.export.export(model.eval().to(device), (x,))
    assert any("normops" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))
