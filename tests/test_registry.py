"""Look-alikes are converted where they compute what their entry claims, and only there."""

import copy
import pickle

import pytest
import torch
from torch import nn

import normops
import normops.functional as F
from normops import registry


class LlamaRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class WideRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * x).to(hidden_states.dtype)


class T5LayerNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x


class GemmaRMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class ConvNextLayerNorm(nn.LayerNorm):
    def __init__(self, normalized_shape, *, eps=1e-6, data_format="channels_last", **kwargs):
        super().__init__(normalized_shape, eps=eps, **kwargs)
        self.data_format = data_format

    def forward(self, features):
        if self.data_format == "channels_first":
            return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(features)


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        x = super().forward(hidden_states)
        return x if gate is None else x * gate


class OddRMSNorm(LlamaRMSNorm):
    """Something else in a way that only small inputs show."""

    def forward(self, hidden_states):
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt((x.pow(2).mean(-1, keepdim=True)).clamp(min=self.variance_epsilon))
        return self.weight * x.to(hidden_states.dtype)


KNOWN = [LlamaRMSNorm, WideRMSNorm, T5LayerNorm, GemmaRMSNorm, ConvNextLayerNorm]
for _class in (*KNOWN, GatedRMSNorm, OddRMSNorm):
    # As far as the patterns of the entries can see.
    _class.__module__ = "transformers.models.some.modeling_some"
each_known = pytest.mark.parametrize("cls", KNOWN)


@pytest.fixture(autouse=True)
def picklable(monkeypatch):
    """Pickle finds the classes where their names say."""
    import sys
    import types

    for name in (
        "transformers",
        "transformers.models",
        "transformers.models.some",
        "transformers.models.some.modeling_some",
    ):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for cls in (*KNOWN, GatedRMSNorm, OddRMSNorm):
        setattr(sys.modules["transformers.models.some.modeling_some"], cls.__name__, cls)


@pytest.fixture
def entries(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_entries", list(registry._entries))


def randomized(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@each_known
def test_converted_and_reverted(cls):
    layer = randomized(cls(32))
    state = dict(layer.__dict__)
    original = copy.deepcopy(layer)
    assert normops.convert(layer) is layer
    assert type(layer) is not cls and isinstance(layer, cls)
    assert repr(layer) == f"normops.{original}"
    assert layer.__dict__ == state
    x = torch.randn(4, 5, 32)
    torch.testing.assert_close(layer(x), original(x))
    with torch.profiler.profile() as profile:
        layer(x)
    assert any(event.name.startswith("normops::") for event in profile.events())
    assert normops.convert(layer) is layer
    normops.revert(layer)
    assert type(layer) is cls


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", KNOWN[:4])
def test_rounding(cls, dtype, weight_dtype):
    """The dtype of the original's output, and its values but for a rounding to 16 bits more or less."""
    original = randomized(cls(64)).to(weight_dtype)
    layer = normops.convert(copy.deepcopy(original))
    assert type(layer) is not cls
    x = torch.randn(50, 64).to(dtype)
    ours, theirs = layer(x), original(x)
    assert ours.dtype == theirs.dtype
    # Two roundings here, one there, each of half a unit, and float32 arithmetic.
    unit = max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps)
    allowed = (1.5 * unit + 8 * torch.finfo(torch.float32).eps) * theirs.double().abs()
    assert ((ours.double() - theirs.double()).abs() <= allowed + 1e-7).all()


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_channels_first(data_format):
    layer = randomized(ConvNextLayerNorm(6, data_format=data_format))
    x = torch.randn(2, 6, 5, 6) if data_format == "channels_first" else torch.randn(2, 5, 4, 6)
    expected = layer(x)
    normops.convert(layer)
    assert type(layer) is not ConvNextLayerNorm
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).stride() == expected.stride()  # the convolutions that follow go by it


@pytest.mark.parametrize("cls", [GatedRMSNorm, OddRMSNorm])
def test_what_does_not_fit_is_left_alone(cls):
    layer = cls(32)
    normops.convert(layer)
    assert type(layer) is cls


def test_float64_of_llama_is_left_alone():
    """The original computes in float32 inside; normops would be more exact, which is not the same."""
    assert type(normops.convert(LlamaRMSNorm(8).double())) is LlamaRMSNorm
    assert type(normops.convert(LlamaRMSNorm(8))) is not LlamaRMSNorm


def test_forward_of_an_instance_is_left_alone():
    layer = LlamaRMSNorm(8)
    layer.forward = lambda x: x
    assert type(normops.convert(layer)) is LlamaRMSNorm


def test_the_test_touches_nothing(monkeypatch):
    monkeypatch.setattr(registry, "_verdicts", {})  # or it might have been tested before
    layer = LlamaRMSNorm(8)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    state, random = layer.weight.clone(), torch.get_rng_state()
    normops.convert(layer)
    assert not calls and layer.weight.grad is None
    assert torch.equal(layer.weight, state) and torch.equal(torch.get_rng_state(), random)
    layer(torch.randn(2, 8))
    assert calls


def test_meta_device():
    layer = LlamaRMSNorm(8).to("meta")
    assert type(normops.convert(layer)) is not LlamaRMSNorm
    assert layer.to_empty(device="cpu")(torch.randn(2, 8)).shape == (2, 8)


@each_known
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(cls, duplicate):
    layer = normops.convert(randomized(cls(8)))
    other = duplicate(layer)
    assert type(other) is type(layer)
    x = torch.randn(2, 3, 8)
    assert torch.equal(other(x), layer(x))
    assert type(normops.revert(other)) is cls


@each_known
def test_compiled(cls):
    layer = normops.convert(randomized(cls(8)))
    x = torch.randn(2, 3, 8)
    torch._dynamo.reset()  # one line of code is the forward of all of them
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


class Scale(nn.Module):
    """Not a layer of anyone."""

    def __init__(self, dim, power=1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.power = power

    def forward(self, x):
        return nn.functional.rms_norm(x, self.weight.shape, self.weight**self.power, 1e-5)


def scale_forward(module, x):
    return F.rms_norm(x, module.weight.shape, module.weight, 1e-5)


@pytest.mark.parametrize("layer", [Scale, f"{Scale.__module__}.Scale"], ids=["class", "name"])
def test_own_class(layer, entries):
    with pytest.warns(UserWarning, match="found none in Scale"):
        assert type(normops.convert(Scale(8))) is Scale
    normops.register_conversion(layer, scale_forward)
    module = normops.convert(Scale(8))
    assert type(module) is not Scale
    assert module(x=torch.ones(2, 8)).shape == (2, 8)
    # Another option, another test.
    model = nn.Sequential(nn.LayerNorm(4), Scale(8, power=2))
    with pytest.raises(
        ValueError, match=r"(?s)convert: the forward registered for Scale does not fit: output differs by"
    ):
        normops.convert(model)
    assert type(model[0]) is nn.LayerNorm


def test_a_pattern_that_does_not_fit(entries):
    normops.register_conversion("*Scale", scale_forward)
    assert type(normops.convert(Scale(8, power=2))) is Scale
    normops.register_conversion("*Scale", lambda module, x: F.rms_norm(x, (8,), module.weight.square(), 1e-5))
    assert type(normops.convert(Scale(8, power=2))) is not Scale
    assert type(normops.convert(Scale(8))) is not Scale


def test_summary(entries):
    model = nn.Sequential(LlamaRMSNorm(8), GatedRMSNorm(8), Scale(8), nn.Linear(8, 8))
    (unknown,) = (layer.name for layer in normops.summary(model) if "more than one argument" in layer.why_left)
    assert unknown == "1" and [layer.name for layer in normops.summary(model)] == ["0", "1"]
    normops.register_conversion(Scale, scale_forward)
    normops.convert(model)
    assert [(layer.name, bool(layer.why_left)) for layer in normops.summary(model)] == [
        ("0", False),
        ("1", True),
        ("2", False),
    ]
    normops.register_conversion(Scale, lambda module, x: 2 * scale_forward(module, x))
    (layer,) = normops.summary(Scale(8))
    assert layer.why_left.startswith("output differs by")


WRONG = {
    "dtype": lambda module, x: scale_forward(module, x).double(),
    "shape": lambda module, x: scale_forward(module, x)[None],
    "eps": lambda module, x: F.rms_norm(x, module.weight.shape, module.weight, 1e-6),
    "no gradient of weight": lambda module, x: F.rms_norm(x, module.weight.shape, module.weight.detach(), 1e-5),
    "gradient": lambda module, x: scale_forward(module, x.detach()) + 0 * x,
    "error": lambda module, x: F.rms_norm(x, (9,)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_forward_is_found(wrong, entries):
    normops.register_conversion(Scale, WRONG[wrong])
    with pytest.raises(ValueError, match="registered for Scale does not fit"):
        normops.convert(Scale(8))


class Sometimes(Scale):
    """Something else now and then, which a single call does not show."""

    def __init__(self, dim, when):
        super().__init__(dim)
        self.when = when
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        if self.when == "counts":
            self.calls += 1
        other = {
            "evaluation": not self.training,
            "training": self.training,
            "without gradients": not torch.is_grad_enabled(),
            "rows alone": x.dim() == 1,
            "matrices": x.dim() == 2,
            "images": x.dim() == 4,
            "second call": self.calls > 0,
        }
        if self.when == "second call":
            self.calls += 1
        return super().forward(x) * (1.5 if other.get(self.when) else 1)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "when",
    ["evaluation", "training", "without gradients", "rows alone", "matrices", "images", "second call", "counts"],
)
def test_what_differs_now_and_then_is_found(when, mode, entries):
    normops.register_conversion(Sometimes, scale_forward)
    with pytest.raises(ValueError, match="registered for Sometimes does not fit"):
        normops.convert(Sometimes(8, when).train(mode))
    layer = Sometimes(8, "never")
    assert type(normops.convert(layer)) is not Sometimes


class Images(Scale):
    """Takes four dimensions and no other number."""

    def forward(self, x):
        if x.dim() != 4:
            raise ValueError(f"expected images, got {x.dim()} dimensions")
        return super().forward(x)


def test_ranks_that_the_class_refuses_are_not_tested(entries):
    normops.register_conversion(Images, lambda module, x: scale_forward(module, x.flatten(0, 2)).view(x.shape))
    assert type(normops.convert(Images(8))) is not Images
    normops.register_conversion(Images, scale_forward, input_shape=lambda module: (3, 8))
    with pytest.raises(ValueError, match="accepts no floating input of these shapes: expected images, got 2"):
        normops.convert(Images(8))


def test_unpickled_where_it_is_not_registered(entries):
    normops.register_conversion(Scale, scale_forward)
    data = pickle.dumps(normops.convert(Scale(8)))
    registry._entries.clear()
    assert type(pickle.loads(data)) is Scale


def test_bad_arguments():
    with pytest.raises(TypeError, match="class of modules or its name"):
        normops.register_conversion(int, scale_forward)
    with pytest.raises(TypeError, match="forward to be a function"):
        normops.register_conversion(Scale, None)
