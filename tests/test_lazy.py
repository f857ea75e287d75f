"""Layers that take their sizes from the first input, of which torch has none."""

import copy
import pickle

import pytest
import torch
from cases import SHAPE
from torch.nn.parameter import UninitializedParameter

import normops

# Arguments, and those of the layer that it becomes for an input of SHAPE.
LAZY = {
    "LazyLayerNorm": ((), {}, (7,), {}),
    "LazyLayerNorm of two": ((2,), {"eps": 1e-3}, ((5, 7),), {"eps": 1e-3}),
    "LazyLayerNorm without bias": ((), {"bias": False}, (7,), {"bias": False}),
    "LazyLayerNorm without parameters": ((), {"elementwise_affine": False}, (7,), {"elementwise_affine": False}),
    "LazyLayerNorm with an activation": ((), {"activation": "gelu"}, (7,), {"activation": "gelu"}),
    "LazyRMSNorm": ((), {}, (7,), {}),
    "LazyRMSNorm of two": ((2,), {"eps": 1e-3}, ((5, 7),), {"eps": 1e-3}),
    "LazyGroupNorm": ((3,), {}, (3, 6), {}),
    "LazyGroupNorm without parameters": ((3,), {"affine": False}, (3, 6), {"affine": False}),
    "LazyLayerNorm2d": ((), {"eps": 1e-6}, (6,), {"eps": 1e-6}),
}
each_lazy = pytest.mark.parametrize("name", LAZY)


def make(name, **more):
    args, kwargs, own_args, own_kwargs = LAZY[name]
    cls = name.split()[0]
    return getattr(normops, cls)(*args, **kwargs, **more), getattr(normops, cls[4:])(*own_args, **own_kwargs, **more)


@each_lazy
def test_becomes_the_layer(name, device):
    lazy, layer = make(name, device=device) if "without parameters" not in name else make(name)
    assert all(isinstance(parameter, UninitializedParameter) for parameter in lazy.parameters())
    x = torch.randn(SHAPE, device=device)
    assert torch.equal(lazy(x), layer(x))
    assert type(lazy) is type(layer) and repr(lazy) == repr(layer)
    torch.testing.assert_close(lazy.state_dict(), layer.state_dict())
    assert torch.equal(lazy(2 * x), layer(2 * x))


@each_lazy
def test_loads_before_it_knows(name):
    lazy, layer = make(name)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    lazy.load_state_dict(layer.state_dict())
    x = torch.randn(SHAPE)
    assert torch.equal(lazy(x), layer(x))


@each_lazy
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(name, duplicate):
    lazy, layer = make(name)
    x = torch.randn(SHAPE)
    assert torch.equal(duplicate(lazy)(x), layer(x))


def test_dtype():
    lazy = normops.LazyLayerNorm(dtype=torch.bfloat16)
    lazy(torch.randn(SHAPE, dtype=torch.bfloat16))
    assert lazy.weight.dtype == torch.bfloat16


def test_is_left_by_convert():
    model = torch.nn.Sequential(normops.LazyRMSNorm())
    assert type(normops.revert(normops.convert(model))[0]) is normops.LazyRMSNorm


def test_errors():
    with pytest.raises(ValueError, match="LazyLayerNorm: expected ndim >= 1, got 0"):
        normops.LazyLayerNorm(0)
    with pytest.raises(ValueError, match=r"LazyRMSNorm: expected input with at least 3 dimensions \(ndim\), got shape"):
        normops.LazyRMSNorm(3)(torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"channels are a multiple of 4 \(num_groups\), got shape \[4, 6, 5, 7\]"):
        normops.LazyGroupNorm(4)(torch.randn(SHAPE))
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        normops.LazyLayerNorm2d()(torch.randn(4, 6, 5))
