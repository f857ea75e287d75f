"""The modules are torch's in everything but the speed."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from cases import LAZY_MODULES, MODULES, each_lazy_module, each_module

import normops

NAMES = sorted({case.name for case in MODULES + LAZY_MODULES})
# Not of torch.nn: tested in files of their own.
OWN = [name for name in normops.modules.__all__ if not hasattr(torch.nn, name)]
# DistributedDataParallel refuses torch's class on the CPU, so ours is derived from its base.
BASES = {"SyncBatchNorm": torch.nn.modules.batchnorm._BatchNorm}


def pair(case, device="cpu", dtype=torch.float32):
    """The layer of normops and that of torch, with the same random parameters."""
    ours, theirs = (case.make(namespace, device=device, dtype=dtype) for namespace in (normops, torch.nn))
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_table_is_complete():
    assert sorted(normops.modules.__all__) == sorted(NAMES + OWN)


@pytest.mark.parametrize("name", NAMES)
def test_class(name):
    ours, theirs = getattr(normops, name), getattr(torch.nn, name)
    assert issubclass(ours, BASES.get(name, theirs))
    # SyncBatchNorm has **kwargs for an argument that only newer torch has.
    shared = [p for p in inspect.signature(ours).parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [p for p in shared if p.name in ("activation", "negative_slope", "memory_efficient")]
    assert len(options) == (0 if name == "SyncBatchNorm" else 3) and all(p.kind is p.KEYWORD_ONLY for p in options)
    shared = [p for p in shared if p not in options]
    parameters = {p.name: (p.kind, p.default) for p in inspect.signature(theirs).parameters.values()}
    assert all(parameters.pop(p.name) == (p.kind, p.default) for p in shared)
    assert not parameters or name == "SyncBatchNorm"
    forward = list(inspect.signature(ours.forward).parameters)
    extras = ["residual", "mask"] if not name.endswith(("LayerNorm", "RMSNorm")) else ["residual"]
    assert forward == [*inspect.signature(theirs.forward).parameters, *extras]
    assert ours.__doc__ and ours.__doc__ != theirs.__doc__


@each_module
def test_forward_and_backward(case, device):
    ours, theirs = pair(case, device)
    inputs = [torch.randn(case.shape, device=device, requires_grad=True) for _ in range(2)]
    inputs[1].data = inputs[0].data
    outputs = [layer(x) for layer, x in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    grad = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(grad)
    torch.testing.assert_close(*(x.grad for x in inputs))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@each_module
def test_uses_normops(case, device):
    layer, x = case.make(normops).to(device), torch.randn(case.shape, device=device)
    with torch.profiler.profile() as profile:
        layer(x)
    assert any(event.name.startswith("normops::") for event in profile.events())


@each_module
def test_state_dict(case):
    ours, theirs = case.make(normops), case.make(torch.nn)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@each_module
def test_repr(case):
    """Torch's, and whose layer it is."""
    theirs = case.make(torch.nn)
    assert repr(case.make(normops)) == f"normops.{theirs}"
    assert repr(torch.nn.Sequential(case.make(normops))) == repr(torch.nn.Sequential(theirs)).replace(
        case.name, f"normops.{case.name}"
    )


def test_repr_of_a_subclass():
    class Own(normops.LayerNorm):
        pass

    assert repr(Own(4)).startswith("Own((4,), eps=")


@each_module
def test_isinstance(case):
    assert isinstance(case.make(normops), BASES.get(case.name, getattr(torch.nn, case.name)))


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@each_module
def test_copies(case, duplicate):
    layer, _ = pair(case)
    x = torch.randn(case.shape)
    layer(x)  # moves the running statistics
    other = duplicate(layer)
    assert type(other) is type(layer)
    assert torch.equal(other.eval()(x), layer.eval()(x))


@each_module
def test_device_and_dtype(case, device):
    layer = case.make(normops, device=device, dtype=torch.float64)
    assert all(p.dtype == torch.float64 and p.device.type == device for p in layer.parameters())
    assert layer(torch.randn(case.shape, device=device, dtype=torch.float64)).dtype == torch.float64
    assert layer.bfloat16()(torch.randn(case.shape, device=device, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("case", [case for case in MODULES if case.name.startswith("InstanceNorm")], ids=str)
def test_without_batch(case, device):
    ours, theirs = pair(case, device)
    x = torch.randn(case.shape[1:], device=device)
    assert ours(x).shape == x.shape
    torch.testing.assert_close(ours(x), theirs(x))


@each_lazy_module
def test_lazy(case, device):
    ours, theirs = case.make(normops, device=device), case.make(torch.nn, device=device)
    assert ours.has_uninitialized_params() == theirs.has_uninitialized_params()
    x = torch.randn(case.shape, device=device)
    torch.testing.assert_close(ours(x), theirs(x))
    name = case.name.removeprefix("Lazy")
    assert type(ours) is getattr(normops, name)
    assert type(theirs) is getattr(torch.nn, name)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@each_module
def test_training(case, device):
    """Some steps of SGD leave the parameters and buffers where torch's layer leaves them."""
    ours, theirs = pair(case, device, torch.float64)
    models = [torch.nn.Sequential(layer, torch.nn.Tanh()) for layer in (ours, theirs)]
    batches = [torch.randn(case.shape, device=device, dtype=torch.float64) for _ in range(3)]
    for model in models:
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.1) if parameters else None
        for x in batches:
            loss = (model(x) - x.flip(0)).square().mean()
            if optimizer:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d"])
def test_wrong_number_of_dimensions(name):
    """The check and its message are torch's."""
    x = torch.randn(2, 6, 3, 3, 3, 3)
    with pytest.raises(ValueError) as theirs:
        getattr(torch.nn, name)(6)(x)
    with pytest.raises(ValueError) as ours:
        getattr(normops, name)(6)(x)
    assert str(ours.value) == str(theirs.value)
