"""convert exchanges the classes of layers and nothing else; revert undoes it."""

import copy
import pickle

import pytest
import torch
from cases import LAZY_MODULES, MODULES, each_lazy_module, each_module
from torch import nn

import normops


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)),
        nn.Flatten(2),
        nn.LayerNorm(16),
        nn.RMSNorm(16),
    )


def norms(model):
    return [module for module in model.modules() if "Norm" in type(module).__name__]


@each_module
def test_layer(case):
    layer = case.make(nn)
    state = dict(layer.__dict__)
    assert normops.convert(layer) is layer
    assert type(layer) is getattr(normops, case.name)
    assert layer.__dict__ == state
    assert normops.revert(layer) is layer
    assert type(layer) is getattr(nn, case.name)
    assert layer.__dict__ == state


# What torch has no layer for.
OWN = {name for name in normops.modules.__all__ if not hasattr(nn, name)}


def test_every_class_is_converted():
    assert {case.name for case in MODULES + LAZY_MODULES} | OWN == set(normops.modules.__all__)


def test_model_keeps_its_objects():
    model = convolutional().eval()
    model[1].weight.requires_grad_(False)
    objects = [*model.modules()], [*model.parameters()], [*model.buffers()]
    names = [name for name, _ in model.named_modules()], list(model.state_dict())
    assert normops.convert(model) is model
    for before, after in zip(objects, ([*model.modules()], [*model.parameters()], [*model.buffers()]), strict=True):
        assert all(a is b for a, b in zip(before, after, strict=True))
    assert names == ([name for name, _ in model.named_modules()], list(model.state_dict()))
    assert not any(module.training for module in model.modules())
    assert not model[1].weight.requires_grad
    assert all(type(module).__module__.startswith("normops.") for module in norms(model))
    assert len(norms(model)) == 5
    normops.revert(model)
    assert all(type(module).__module__.startswith("torch.nn.") for module in norms(model))


def test_hooks_survive():
    model = nn.Sequential(nn.LayerNorm(4))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    normops.convert(model)(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert calls == ["before", "forward", "backward"]


def test_repeated():
    model = normops.convert(normops.convert(convolutional()))
    assert [type(module) for module in norms(model)] == [
        normops.BatchNorm2d,
        normops.GroupNorm,
        normops.InstanceNorm2d,
        normops.LayerNorm,
        normops.RMSNorm,
    ]
    normops.revert(normops.revert(model))
    assert not any(type(module).__module__.startswith("normops") for module in model.modules())


def test_subclasses_are_left_alone():
    class Own(nn.LayerNorm):
        def forward(self, input):
            return input

    class OwnOfOurs(normops.LayerNorm):
        pass

    model = nn.ModuleList([Own(4), OwnOfOurs(4), normops.LayerNorm2d(4), nn.CrossMapLRN2d(2), nn.LocalResponseNorm(2)])
    types = [type(module) for module in model]
    normops.convert(model)
    assert [type(module) for module in model] == types
    normops.revert(model)
    assert [type(module) for module in model] == types


def test_shared_module():
    shared = nn.BatchNorm1d(4)
    model = normops.convert(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(4, 4))}))
    assert model["a"] is model["b"][0] is shared
    assert type(shared) is normops.BatchNorm1d


@pytest.mark.parametrize("materialized", [False, True])
@each_lazy_module
def test_lazy(case, materialized):
    layer, x = case.make(nn), torch.randn(case.shape)
    if materialized:
        layer(x)
    normops.convert(layer)
    layer(x)
    assert type(layer) is getattr(normops, case.name.removeprefix("Lazy"))
    normops.revert(layer)
    assert type(layer) is getattr(nn, case.name.removeprefix("Lazy"))


@each_lazy_module
def test_lazy_reverted_before_it_is_used(case):
    layer = normops.revert(normops.convert(case.make(nn)))
    assert type(layer) is getattr(nn, case.name)
    layer(torch.randn(case.shape))
    assert type(layer) is getattr(nn, case.name.removeprefix("Lazy"))


@pytest.mark.parametrize("function", [normops.convert, normops.revert, normops.summary])
@pytest.mark.parametrize(
    "what", [None, 1, nn.LayerNorm, [nn.LayerNorm(4)], torch.zeros(1)], ids=["None", "int", "class", "list", "Tensor"]
)
def test_not_a_module(function, what):
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got"):
        function(what)


def test_training_continues():
    """The converted model takes the steps the original takes; the optimizer made before the conversion drives it."""
    original = convolutional().double()
    converted = copy.deepcopy(original)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (original, converted)]
    losses = [[], []]
    for step in range(6):
        if step == 2:
            normops.convert(converted)
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        for model, optimizer, history in zip((original, converted), optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss = (model(x) - 1).pow(4).mean()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(original.state_dict(), converted.state_dict(), rtol=1e-8, atol=1e-8)


def test_transformer():
    """Layers inside torch's own modules are found, and the model agrees in evaluation as in training."""
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = model(x), model.eval()(x)
    normops.convert(model)
    assert type(model.norm1) is normops.LayerNorm
    torch.testing.assert_close((model.train()(x), model.eval()(x)), expected)


# What there is to know of it.


def test_summary():
    class Own(nn.LayerNorm):
        pass

    model = convolutional().extend([Own(16), nn.LocalResponseNorm(2)])
    before = normops.summary(model)
    assert [layer.name for layer in before] == ["1", "3.1", "3.2", "5", "6", "7", "8"]
    assert not before.converted and before.left == before.layers
    assert {layer.why_left for layer in before.layers[:5]} == {"normops.convert has not been called on it"}
    assert all(type(module).__module__.startswith("torch.nn.") for module in norms(model)[:5])  # it converts nothing
    after = normops.summary(normops.convert(model))
    assert [layer.name for layer in after] == [layer.name for layer in before]
    assert [layer.class_name for layer in after.converted] == [
        "normops.BatchNorm2d",
        "normops.GroupNorm",
        "normops.InstanceNorm2d",
        "normops.LayerNorm",
        "normops.RMSNorm",
    ]
    own, other = after.left
    assert own.cls is Own and own.why_left.startswith("a subclass, which may compute something else")
    assert other.class_name == "torch.nn.LocalResponseNorm" and other.why_left.startswith("not known to normops")


def test_summary_in_words():
    layers = [nn.BatchNorm2d(4) for _ in range(6)]
    model = normops.convert(nn.Sequential(*layers, nn.LocalResponseNorm(2)))
    assert str(normops.summary(model)) == repr(normops.summary(model))
    assert str(normops.summary(model)).splitlines() == [
        "Sequential: 6 of 7 normalization layers run on normops",
        "  converted  6 x normops.BatchNorm2d: 0, 1, 2, ..., 5",
        "  left       1 x torch.nn.LocalResponseNorm: 6 (not known to normops: see normops.register_conversion)",
    ]
    assert "1 x normops.BatchNorm2d: the model itself" in str(normops.summary(layers[0]))


def test_what_is_no_normalization_layer():
    """Containers named after one, weight norm, and everything else."""

    class PreNorm(nn.Sequential):
        pass

    model = PreNorm(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())
    assert len(normops.summary(model)) == 0
    assert str(normops.summary(model)) == "PreNorm: 0 of 0 normalization layers run on normops"


def test_verbose(capsys):
    model = normops.convert(convolutional())
    assert capsys.readouterr().out == ""
    assert normops.convert(model, verbose=True) is model
    assert capsys.readouterr().out == f"{normops.summary(model)}\n"


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.Sequential()], ids=["layer", "empty"])
def test_nothing_to_convert(model):
    with pytest.warns(
        UserWarning, match=f"convert: expected a model .* found none in {type(model).__name__}"
    ) as caught:
        assert normops.convert(model) is model
    assert caught[0].filename == __file__
    normops.revert(model)  # which has nothing to say


# convert(model, fuse=True)


class Block(torch.nn.Sequential):
    """As libraries write them: a Sequential with a constructor of its own."""

    def __init__(self, channels, activation):
        super().__init__(torch.nn.Conv2d(channels, channels, 1), torch.nn.BatchNorm2d(channels), activation)


def blocks():
    return torch.nn.Sequential(
        Block(4, torch.nn.ReLU(inplace=True)),
        Block(4, torch.nn.LeakyReLU(0.3)),
        torch.nn.Sequential(
            torch.nn.GroupNorm(2, 4), torch.nn.GELU("tanh"), torch.nn.InstanceNorm2d(4), torch.nn.SiLU()
        ),
    )


def fused_norms(model):
    return [m.activation for m in model.modules() if getattr(m, "activation", None) is not None]


def test_fuse():
    model = blocks().train()
    original = copy.deepcopy(model)
    objects, keys = list(model.modules()), list(model.state_dict())
    assert normops.convert(model, fuse=True) is model
    assert fused_norms(model) == ["relu", "leaky_relu", "gelu_tanh", "silu"]
    assert model[1][1].negative_slope == 0.3
    assert all(a is b for a, b in zip(objects, model.modules(), strict=True)) and keys == list(model.state_dict())
    assert repr(model[0][2]) == "Absorbed(ReLU, now in the norm before it)"
    x = torch.randn(3, 4, 5, 5)
    results = []
    for net in (model, original):
        y = net(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in net.parameters()), *net.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    loaded = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(loaded(x), model(x))
    normops.convert(model, fuse=True)  # again: nothing more
    assert fused_norms(model) == ["relu", "leaky_relu", "gelu_tanh", "silu"]


def test_revert_of_fused():
    model = normops.revert(normops.convert(blocks(), fuse=True))
    original = blocks()
    assert repr(model) == repr(original)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert not fused_norms(model) and not any("_normops" in key for m in model.modules() for key in m.__dict__)


def test_what_is_not_fused():
    class Residual(torch.nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    def fused(*layers, prepare=lambda model: None, cls=torch.nn.Sequential):
        model = cls(*layers)
        prepare(model)
        return fused_norms(normops.convert(model, fuse=True))

    norm, relu = torch.nn.BatchNorm2d(4), torch.nn.ReLU()
    assert fused(norm, torch.nn.Dropout(), torch.nn.ReLU()) == []
    assert fused(torch.nn.BatchNorm2d(4), torch.nn.ReLU(), cls=Residual) == []
    assert fused(torch.nn.BatchNorm2d(4), torch.nn.Tanh()) == []
    assert fused(torch.nn.BatchNorm2d(4), torch.nn.ELU(0.5)) == []
    assert fused(norm, torch.nn.ReLU(), norm) == []
    # A shared activation: absorbed in all places or in none.
    assert fused(torch.nn.BatchNorm2d(4), relu, torch.nn.Conv2d(4, 4, 1), relu) == []
    assert fused(torch.nn.BatchNorm2d(4), relu, torch.nn.BatchNorm2d(4), relu) == ["relu", "relu"]
    for hooked in (0, 1):
        hook = lambda model, at=hooked: model[at].register_forward_hook(lambda *args: None)  # noqa: E731
        assert fused(torch.nn.BatchNorm2d(4), torch.nn.ReLU(), prepare=hook) == []


def test_revert_leaves_layers_made_with_an_activation():
    model = torch.nn.Sequential(normops.GroupNorm(2, 4, activation="relu"), normops.GroupNorm(2, 4))
    normops.revert(model)
    assert type(model[0]) is normops.GroupNorm and type(model[1]) is torch.nn.GroupNorm
