"""LayerNorm2d is LayerNorm with the channels moved to the end and back."""

import copy
import pickle

import pytest
import torch
from cases import SHAPE, each_dtype
from comparison import assert_near, largest, tolerance
from layouts import LAYOUTS, each_layout
from torch.autograd import gradcheck, gradgradcheck

import normops

OPTIONS = [{}, {"elementwise_affine": False}, {"bias": False}, {"eps": 0.1}]
each_options = pytest.mark.parametrize("options", OPTIONS, ids=str)


def pair(device="cpu", dtype=torch.float32, **options):
    """The layer, and torch's LayerNorm in float64, with the same random parameters."""
    ours = normops.LayerNorm2d(6, **options, device=device, dtype=dtype)
    exact = torch.nn.LayerNorm(6, **options, dtype=torch.float64)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    exact.load_state_dict(ours.state_dict())
    return ours, exact


def moved(layer, x):
    return layer(x.movedim(1, -1)).movedim(-1, 1)


@each_options
@each_dtype
@each_layout
def test_equals_layer_norm(layout, dtype, options, device):
    ours, exact = pair(device, dtype, **options)
    x = LAYOUTS[layout]((2 * torch.randn(SHAPE, device=device) + 1).to(dtype)).detach().requires_grad_()
    joined = x.detach().cpu().double().requires_grad_()
    y, expected = ours(x), moved(exact, joined)
    grad = torch.randn_like(expected).to(dtype)
    y.backward(grad.to(device))
    expected.backward(grad.double())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
    allowed = tolerance(dtype, dtype, 6)
    assert_near("output", y, expected, largest(expected), allowed)
    # The terms of the gradient are as large as dy * weight * rstd, and what is left of them may cancel.
    rstd = (joined.var(1, correction=0).min() + ours.eps).rsqrt().item()
    weight = largest(exact.weight) if exact.elementwise_affine else 1.0
    assert_near("grad_input", x.grad, joined.grad, 2 * largest(grad.double()) * weight * rstd, allowed)
    for (name, mine), theirs in zip(ours.named_parameters(), exact.parameters(), strict=True):
        permitted = tolerance(dtype, dtype, x.numel() // 6)
        # A sum of independent terms dy * xhat, with xhat of mean square one, even where the sum itself cancels.
        size = grad.double().norm().item() / len(theirs) ** 0.5
        assert_near(f"grad_{name}", mine.grad, theirs.grad, size + largest(theirs.grad), permitted)


def test_channels_last_is_not_copied(device):
    x = torch.randn(SHAPE, device=device).contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile() as profile:
        normops.LayerNorm2d(6, device=device)(x)
    names = {event.name for event in profile.events()}
    assert "normops::_row_norm" in names
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous"}


@each_options
def test_gradients(options, device):
    layer, _ = pair(device, torch.float64, **options)
    x = torch.randn(2, 6, 2, 2, device=device, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, x)
    assert gradgradcheck(layer, x)


def test_compiled(device):
    layer, _ = pair(device)
    x = torch.randn(SHAPE, device=device)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(run(x), layer(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(duplicate):
    layer, _ = pair()
    x = torch.randn(SHAPE)
    assert torch.equal(duplicate(layer)(x), layer(x))


def test_module():
    layer = normops.LayerNorm2d(6, eps=1e-6)
    assert isinstance(layer, torch.nn.LayerNorm)
    assert repr(layer).startswith("normops.LayerNorm2d((6,), eps=1e-06, elementwise_affine=True")
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert layer(torch.empty(0, 6, 4, 5)).shape == (0, 6, 4, 5)


def test_errors():
    layer = normops.LayerNorm2d(6)
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        layer(torch.randn(4, 6, 5))
    with pytest.raises(RuntimeError, match=r"LayerNorm2d: expected input with 6 channels, got shape \[4, 5, 6, 7\]"):
        layer(torch.randn(4, 5, 6, 7))
    with pytest.raises(NotImplementedError, match="Int"):
        layer(torch.ones(4, 6, 5, 7, dtype=torch.int32))
