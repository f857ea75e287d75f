"""convert exchanges the classes of layers and nothing else; revert undoes it."""

import copy

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


def test_every_class_is_converted():
    assert {case.name for case in MODULES + LAZY_MODULES} | {"LayerNorm2d"} == set(normops.modules.__all__)


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


@pytest.mark.parametrize("function", [normops.convert, normops.revert])
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
