"""What nearly all calls pass goes to the operator at once; anything else by way of torch.ops, with the same result."""

import sys
import threading

import cases
import pytest
import torch
from cases import each
from fusion_cases import extras

from normops import functional as F

X = torch.randn(3, 5)


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def detours(monkeypatch):
    """The operators that were called by way of torch.ops."""
    called, call = [], F._call

    def note(op, *args, **extras):
        called.append(op._opname)
        return call(op, *args, **extras)

    monkeypatch.setattr(F, "_call", note)
    return called


@each(cases.CASES + cases.OVER_CHANNELS)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_usual_arguments(case, activation, detours):
    sample, more = case.sample(), extras(activation) if activation else {}
    direct = sample.run(**more)
    assert not detours and direct.requires_grad
    roundabout = sample.with_input(sample.input.as_subclass(Subclass)).run(**more)
    assert detours == [case.op] and type(roundabout) is Subclass
    assert torch.equal(direct, roundabout.as_subclass(torch.Tensor))


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_both_outputs(name, weight_offset, detours):
    weight = torch.randn(5)
    direct = getattr(F, name)(X, X, (5,), weight, weight_offset=weight_offset)
    assert not detours
    roundabout = getattr(F, name)(X.as_subclass(Subclass), X, (5,), weight, weight_offset=weight_offset)
    assert detours == [name]
    for ours, theirs in zip(direct, roundabout, strict=True):
        assert torch.equal(ours, theirs.as_subclass(torch.Tensor))


@pytest.mark.parametrize("shape", [(5,), [5], torch.Size([5])], ids=["tuple", "list", "Size"])
def test_a_shape_may_be(shape, detours):
    torch.testing.assert_close(F.layer_norm(X, shape), torch.nn.functional.layer_norm(X, (5,)))
    assert not detours


@pytest.mark.parametrize(
    "given", [{"eps": 1}, {"weight": torch.ones(5).as_subclass(Subclass)}], ids=["int", "subclass"]
)
def test_detour(given, detours):
    F.layer_norm(X, (5,), **given)
    assert detours == ["layer_norm"]


def test_a_mode_sees_the_operator(detours):
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        F.group_norm(torch.randn(2, 4, 3), 2)
    assert torch.ops.normops.group_norm.default in seen


def test_a_slope_without_leaky_relu_is_no_default():
    with pytest.raises(ValueError, match="negative_slope"):
        F.layer_norm(X, (5,), negative_slope=0.5)


def test_other_threads_run_meanwhile():
    """Python's lock is let go during a call, as nothing else makes one of these threads give way to the other."""
    x, arrived, interval = torch.randn(100, 1000), [], sys.getswitchinterval()
    gate = threading.Lock()
    gate.acquire()

    def wait():
        with gate:
            arrived.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    sys.setswitchinterval(3600)
    try:
        gate.release()
        outputs = []  # kept, as to free a tensor may let go of the lock, too
        while not arrived and len(outputs) < 1000:
            outputs.append(F.layer_norm(x, (1000,)))
        assert arrived
    finally:
        sys.setswitchinterval(interval)
        thread.join()
