"""Running statistics: moved like torch's, step by step."""

import copy

import pytest
import torch
from cases import DTYPES, MODULES, each_dtype
from torch.autograd import forward_ad

import normops
import normops.functional as F

STEPS = 4
TRACKING = [case for case in MODULES if case.name.startswith(("BatchNorm", "InstanceNorm"))]


@pytest.mark.parametrize("case", TRACKING, ids=str)
def test_steps(case, device):
    """Training steps and then evaluation give torch's outputs and buffers."""
    ours, theirs = case.make(normops).to(device), case.make(torch.nn).to(device)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(STEPS):
        x = 2 * torch.randn(case.shape, device=device) + 1
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    x = torch.randn(case.shape, device=device)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("running_dtype", DTYPES, ids=str)
@each_dtype
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_dtypes(op, dtype, running_dtype, device):
    """Moved in float64 and rounded once, whatever their dtype and the input's."""
    x = torch.randn(4, 6, 50, device=device).to(dtype)
    mean, var = torch.randn(6, device=device).to(running_dtype), torch.ones(6, device=device).to(running_dtype)
    dims = (0, 2) if op == "batch_norm" else 2
    expected = {
        "mean": 0.8 * mean.double() + 0.2 * x.double().mean(dims).view(-1, 6).mean(0),
        "var": 0.8 * var.double() + 0.2 * x.double().var(dims).view(-1, 6).mean(0),
    }
    options = {"training": True} if op == "batch_norm" else {}
    getattr(F, op)(x, mean, var, momentum=0.2, **options)
    unit = max(torch.finfo(running_dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps)
    torch.testing.assert_close(mean.double(), expected["mean"], rtol=unit, atol=unit)
    torch.testing.assert_close(var.double(), expected["var"], rtol=unit, atol=unit)


def test_strided(device):
    """Running statistics may be slices of something, each of another thing."""
    x = torch.randn(4, 6, 50, device=device)
    moved = []
    for functions in (F, torch.nn.functional):
        means, variances = torch.zeros(6, 2, device=device), torch.ones(6, 3, device=device)
        functions.batch_norm(x, means[:, 0], variances[:, 1], training=True)
        moved.append((means, variances))
    torch.testing.assert_close(*moved)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_with_tangents(op, device):
    """The formula in torch's operators moves them as the kernels do."""
    x, options = torch.randn(4, 6, 50, device=device), {"training": True} if op == "batch_norm" else {}
    moved = []
    with forward_ad.dual_level():
        for input in (x, forward_ad.make_dual(x, torch.ones_like(x))):
            running = torch.zeros(6, device=device), torch.ones(6, device=device)
            getattr(F, op)(input, *running, **options)
            moved.append(running)
    torch.testing.assert_close(*moved)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_momentum(momentum, device):
    x = torch.randn(4, 6, 50, device=device)
    results = []
    for functions in (F, torch.nn.functional):
        mean, var = torch.zeros(6, device=device), torch.ones(6, device=device)
        functions.batch_norm(x, mean, var, training=True, momentum=momentum)
        results.append((mean, var))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_empty_batch_moves_nothing(op, device):
    mean, var = torch.full((6,), 0.5, device=device), torch.full((6,), 2.0, device=device)
    options = {"training": True} if op == "batch_norm" else {}
    getattr(F, op)(torch.empty(0, 6, 5, device=device), mean, var, **options)
    assert mean.eq(0.5).all() and var.eq(2.0).all()


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_change_is_noticed(op, requires_grad, device):
    """A running statistic that someone saved for a backward has changed since, and autograd says so."""
    scale = torch.ones(6, device=device, requires_grad=True)
    for changed in range(2):
        stats = [torch.zeros(6, device=device), torch.ones(6, device=device)]
        product = scale * stats[changed]
        x = torch.randn(4, 6, 5, device=device, requires_grad=requires_grad)
        getattr(F, op)(x, *stats, **({"training": True} if op == "batch_norm" else {}))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_evaluation_leaves_them_alone(device):
    mean, var = torch.zeros(6, device=device), torch.ones(6, device=device)
    versions = mean._version, var._version
    F.batch_norm(torch.randn(4, 6, 5, device=device), mean, var)
    F.instance_norm(torch.randn(4, 6, 5, device=device), mean, var, use_input_stats=False)
    assert (mean._version, var._version) == versions


def test_num_batches_tracked_of_an_old_checkpoint():
    """A model from before the buffer existed has None in its place."""
    ours, theirs = normops.BatchNorm1d(6), torch.nn.BatchNorm1d(6)
    for layer in (ours, theirs):
        layer.num_batches_tracked = None
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_tracking_that_is_turned_off():
    """Later, when there are running statistics: training leaves them alone, and evaluation takes them."""
    theirs = torch.nn.BatchNorm1d(6)
    theirs.track_running_stats = False
    ours, x = normops.convert(copy.deepcopy(theirs)), torch.randn(4, 6)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
