"""The tracers before torch.compile: torch.fx and TorchScript take a converted model as they take the original."""

import io
import operator

import pytest
import torch
from cases import MODULES, SHAPE, each, each_case, each_module
from models import IMAGE, MODELS, every_layer, pair
from torch import nn

import normops


def nodes(graph_module):
    return [(node.op, str(node.target)) for node in graph_module.graph.nodes]


@pytest.mark.parametrize("name", MODELS)
def test_symbolic_trace(name, device):
    """The same nodes as of the unconverted model; the layers are leaves and still those of normops."""
    original, converted = pair(MODELS[name], device=device)
    traced = torch.fx.symbolic_trace(converted)
    assert nodes(traced) == nodes(torch.fx.symbolic_trace(original))
    layers = [module for module in traced.modules() if "Norm" in type(module).__name__]
    assert layers and all(type(layer).__module__.startswith("normops.") for layer in layers)
    x = torch.randn(IMAGE, device=device)
    torch.testing.assert_close(traced(x), original(x))


@each_module
def test_symbolic_trace_of_a_layer(case):
    """Inside of another module it is a leaf; traced itself it does what torch's layer does, be it an error."""
    traced = torch.fx.symbolic_trace(nn.Sequential(case.make(normops)))
    assert nodes(traced)[1] == ("call_module", "0")
    try:
        expected = nodes(torch.fx.symbolic_trace(case.make(nn)))
    except torch.fx.proxy.TraceError:
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(case.make(normops))
    else:
        traced = nodes(torch.fx.symbolic_trace(case.make(normops)))
        extras = [("placeholder", name) for name in ("residual", "mask")]
        assert [node for node in traced if node not in extras] == expected


@each_case
def test_symbolic_trace_of_a_function(case, device):
    sample = case.sample(device=device)
    function, fixed = getattr(normops.functional, case.op), {**sample.parameters, **sample.fixed}
    traced = torch.fx.symbolic_trace(lambda x: function(operator.neg(x), **fixed))
    torch.testing.assert_close(traced(sample.input), function(-sample.input, **fixed))


def test_symbolic_trace_of_a_shape_in_the_graph():
    traced = torch.fx.symbolic_trace(lambda x: normops.functional.layer_norm(x, x.shape[-1:]))
    x = torch.randn(3, 5)
    torch.testing.assert_close(traced(x), torch.nn.functional.layer_norm(x, (5,)))


def test_what_is_neither_tensor_nor_proxy():
    with pytest.raises(TypeError) as theirs:
        nn.LayerNorm(5)([1.0])
    with pytest.raises(TypeError) as ours:
        normops.LayerNorm(5)([1.0])
    assert str(ours.value) == str(theirs.value)


def through_a_file(scripted):
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@each([case for case in MODULES if case.name != "SyncBatchNorm"])  # torch cannot script its own
def test_torchscript(case, device):
    """Scripted, saved and loaded, a layer computes, differentiates and moves its statistics with the kernels."""
    layer = case.make(normops).to(device)
    scripted = through_a_file(torch.jit.script(layer))
    assert f"normops::{normops_op(case)}" in str(scripted.inlined_graph)
    for _ in range(2):
        inputs = [torch.randn(case.shape, device=device, requires_grad=True) for _ in range(2)]
        inputs[1].data = inputs[0].data
        for module, x in zip((layer, scripted), inputs, strict=True):
            module(x).pow(3).sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert layer.state_dict().keys() == scripted.state_dict().keys()
    for ours, other in zip(layer.state_dict().values(), scripted.state_dict().values(), strict=True):
        assert torch.equal(ours, other)


def normops_op(case):
    name = case.name.rstrip("123d")
    return {"BatchNorm": "batch_norm", "InstanceNorm": "instance_norm", "GroupNorm": "group_norm"}.get(
        name, "layer_norm" if name == "LayerNorm" else "rms_norm"
    )


@pytest.mark.parametrize("name", MODELS)
def test_torchscript_of_a_model(name, device):
    original, converted = pair(MODELS[name], device=device)
    x = torch.randn(IMAGE, device=device)
    torch.testing.assert_close(torch.jit.script(converted)(x), original(x))


def test_torchscript_errors():
    """The checks are those of the layer."""
    scripted = torch.jit.script(normops.InstanceNorm2d(6, affine=True))
    with pytest.raises(torch.jit.Error, match="expected input with 6 channels"):
        scripted(torch.randn(2, 5, 3, 3))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of SyncBatchNorm's checks, torch's as ours
def test_jit_trace(device):
    model, converted = pair(every_layer, device=device)
    x = torch.randn(4, 3, 8, 8, device=device)
    traced = torch.jit.trace(converted.eval(), x)
    assert "normops::" in str(traced.inlined_graph)
    other = torch.randn(7, 3, 8, 8, device=device)
    torch.testing.assert_close(traced(other), model.eval()(other))


@pytest.mark.parametrize("case", [case for case in MODULES if case.name.startswith("InstanceNorm")], ids=str)
def test_wrong_number_of_features(case):
    """An error where there are parameters, a warning where there are none, as in torch."""
    x = torch.randn(case.shape)[:, :4]
    for namespace in (nn, normops):
        layer = case.make(namespace)
        if layer.affine:
            with pytest.raises(ValueError, match="num_features"):
                layer(x)
        elif not layer.track_running_stats:
            with pytest.warns(UserWarning, match="num_features"):
                layer(x)
    assert SHAPE[1] != 4
