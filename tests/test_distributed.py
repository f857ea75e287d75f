"""SyncBatchNorm on several ranks is BatchNorm on the joined batch."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from comparison import assert_near, largest, tolerance
from ranks import BATCHES, same_on_all_ranks, share, summed, two_ranks
from torch import nn
from torch.autograd import gradcheck

import normops


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (6, 5, 4)  # of a sample
    dtype: torch.dtype = torch.float64
    parameter_dtype: torch.dtype = torch.float64
    memory_format: torch.memory_format = torch.contiguous_format
    options: tuple = ()

    def __str__(self):
        parts = (*self.shape, self.dtype, self.parameter_dtype, self.memory_format, *self.options)
        return "-".join(str(part).removeprefix("torch.") for part in parts)

    def layer(self, namespace=normops, name="SyncBatchNorm", dtype=None):
        torch.manual_seed(1)
        layer = getattr(namespace, name)(self.shape[0], **dict(self.options), dtype=self.parameter_dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        return layer.to(dtype)

    def tensors(self, batch):
        """Inputs and gradients of the outputs for the joined batch."""
        torch.manual_seed(2)
        return [torch.randn(batch, *self.shape).to(self.dtype) * 2 + 1 for _ in range(2)]


CASES = [
    Case(),
    Case((6,)),
    Case((6, 7)),
    Case((6, 3, 2, 4)),
    Case((3, 40, 40), torch.float32, torch.float32),  # more than one segment
    Case((6, 5, 4), memory_format=torch.channels_last),
    Case((6, 3, 2, 4), memory_format=torch.channels_last_3d),
    Case((100, 3, 2), torch.float32, torch.float32, torch.channels_last),
    Case(dtype=torch.float32, parameter_dtype=torch.float32),
    Case(dtype=torch.bfloat16, parameter_dtype=torch.float32),
    Case(dtype=torch.float16, parameter_dtype=torch.float16),
    Case(dtype=torch.float32, parameter_dtype=torch.bfloat16),
    Case((1300, 2)),  # more channels than one exchange takes
    *(
        Case(options=tuple(options.items()))
        for options in ({"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1})
    ),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_batch = pytest.mark.parametrize("batch", range(3), ids=["even", "uneven", "empty rank"])


def expect(error, *told):
    return pytest.raises(error, match="(?s)" + ".*".join(told))


def equals_joined_batch(rank, world_size, case, batch):
    sizes = BATCHES[world_size][batch]
    layer = case.layer()
    exact = case.layer(nn, f"BatchNorm{max(1, len(case.shape) - 1)}d", torch.float64)
    terms = sum(sizes) * max(1, torch.Size(case.shape[1:]).numel())
    for _ in range(2):
        inputs, grads = case.tensors(sum(sizes))
        x = share(inputs, rank, sizes).contiguous(memory_format=case.memory_format).requires_grad_()
        y = layer(x)
        assert y.dtype == case.dtype
        assert y.is_contiguous(memory_format=case.memory_format) or not y.numel()
        layer.zero_grad()
        y.backward(share(grads, rank, sizes))

        joined = inputs.double().requires_grad_()
        expected = exact(joined)
        exact.zero_grad()
        expected.backward(grads.double())
        allowed = tolerance(case.dtype, case.dtype, terms)
        scale = largest(grads.double()) * largest(expected) * 2
        assert_near("output", y, share(expected, rank, sizes), largest(expected), allowed)
        assert_near("grad_input", x.grad, share(joined.grad, rank, sizes), scale, allowed)
        for (name, ours), theirs in zip(layer.named_parameters(), exact.parameters(), strict=True):
            # Rounded on every rank, then summed.
            allowed = world_size * tolerance(ours.dtype, case.dtype, terms)
            assert_near(f"grad_{name}", summed(ours.grad), theirs.grad, largest(theirs.grad) + scale, allowed)
        for (name, ours), theirs in zip(layer.named_buffers(), exact.buffers(), strict=True):
            allowed = tolerance(ours.dtype if ours.is_floating_point() else torch.float64, case.dtype, terms)
            assert_near(name, ours, theirs.double(), largest(theirs.double()), 3 * allowed)
            assert same_on_all_ranks(ours), f"{name} differs between the ranks"
    # Evaluation exchanges nothing, so one rank may do it alone.
    if rank == 0:
        exact.load_state_dict(layer.state_dict())
        y, expected = layer.eval()(inputs), exact.eval()(inputs.double())
        assert_near("evaluation", y, expected, largest(expected), tolerance(y.dtype, y.dtype, terms))


@each_batch
@each_case
def test_equals_joined_batch(ranks, case, batch):
    ranks.run(equals_joined_batch, case, batch)


def masked(rank, world_size, activation):
    """Valid elements are counted over all ranks; one has none."""
    torch.manual_seed(3)
    x, r = (torch.randn(3 * world_size, 6, 9, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(0, 10, (len(x),))
    lengths[:3] = 0  # the first rank
    mask = normops.functional.length_mask(lengths, 9)
    x.masked_fill_(~mask.unsqueeze(1), torch.nan)
    alone = normops.BatchNorm1d(6, dtype=torch.float64, activation=activation)
    ours = normops.SyncBatchNorm(6, dtype=torch.float64, activation=activation)
    leaves = [(t.clone().requires_grad_(), t[3 * rank :][:3].clone().requires_grad_()) for t in (x, r)]
    expected = alone(leaves[0][0], leaves[1][0], mask)
    y = ours(leaves[0][1], leaves[1][1], mask[3 * rank :][:3])
    torch.testing.assert_close(y, expected[3 * rank :][:3])
    expected.pow(3).sum().backward()
    y.pow(3).sum().backward()
    for whole, part in leaves:
        torch.testing.assert_close(part.grad, whole.grad[3 * rank :][:3])
    for mine, theirs in zip(ours.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(summed(mine.grad), theirs.grad)
    torch.testing.assert_close(ours.state_dict(), alone.state_dict())
    with expect(ValueError, "sync_batch_norm: expected mask of shape", r"got \[4\]") if rank else expect(RuntimeError):
        ours(leaves[0][1], None, torch.ones(4, dtype=torch.bool) if rank else None)


@pytest.mark.parametrize("activation", [None, "gelu"], ids=str)
def test_masked(ranks, activation):
    ranks.run(masked, activation)


def epilogue_of_joined_batch(rank, world_size, activation, residual, memory_efficient):
    """What follows the norm sees the statistics of all ranks, forward and backward."""
    sizes = BATCHES[world_size][1]
    options = {"negative_slope": 0.2} if activation == "leaky_relu" else {}
    layer = normops.SyncBatchNorm(6, activation=activation, memory_efficient=memory_efficient, **options)
    function = getattr(nn.functional, activation or "", lambda z, *slope: z)
    slope = (0.2,) if activation == "leaky_relu" else ()
    exact = nn.BatchNorm2d(6).double()
    torch.manual_seed(2)
    joined, added, grads = (torch.randn(sum(sizes), 6, 5, 4) for _ in range(3))
    x = share(joined, rank, sizes).requires_grad_()
    r = share(added, rank, sizes).requires_grad_() if residual else None
    y = layer(x, r)
    y.backward(share(grads, rank, sizes))
    joined = joined.double().requires_grad_()
    added = added.double().requires_grad_()
    expected = function(exact(joined) + added if residual else exact(joined), *slope)
    expected.backward(grads.double())
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y.double(), share(expected, rank, sizes), **close)
    torch.testing.assert_close(x.grad.double(), share(joined.grad, rank, sizes), **close)
    if residual:
        torch.testing.assert_close(r.grad.double(), share(added.grad, rank, sizes), **close)
    for ours, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(summed(ours.grad), theirs.grad, **close)
    for ours, theirs in zip(layer.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), **close)
    y, expected = layer.eval()(x), exact.eval()(x.double())
    torch.testing.assert_close(y.double(), function(expected, *slope), **close)


@two_ranks
@pytest.mark.parametrize(
    ("activation", "residual", "memory_efficient"),
    [("relu", False, False), ("silu", True, False), ("leaky_relu", True, False), (None, True, False), ("elu", 0, True)],
)
def test_epilogue_of_joined_batch(ranks, activation, residual, memory_efficient):
    ranks.run(epilogue_of_joined_batch, activation, residual, memory_efficient)


def far_from_zero(rank, world_size):
    """Float32 data with mean 10,000 and standard deviation 1, the mean another on each rank."""
    x = torch.randn(8, 6, 20, 20) + 10_000 + rank
    y = normops.SyncBatchNorm(6)(x)
    gathered = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(gathered, x)
    exact = nn.functional.batch_norm(torch.cat(gathered).double(), None, None, training=True)
    torch.testing.assert_close(y.double(), exact[8 * rank : 8 * rank + 8], rtol=0, atol=1e-5)


def test_far_from_zero(ranks):
    ranks.run(far_from_zero)


def without_gradients(rank, world_size):
    layer = normops.SyncBatchNorm(6)
    x = torch.randn(4, 6, 5)
    with torch.no_grad():
        y = layer(x + rank)
    assert not y.requires_grad
    assert torch.equal(y, layer(x + rank).detach())
    assert layer.num_batches_tracked == 2
    mean = 0.1 * (x.mean((0, 2)) + (world_size - 1) / 2)
    torch.testing.assert_close(layer.running_mean, 1.9 * mean)
    # Parameters alone: nothing is exchanged in the backward.
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((6,), 20.0))


def test_without_gradients(ranks):
    ranks.run(without_gradients)


def gradient_of_one_parameter(rank, world_size):
    x, dy = torch.randn(2, 4, 6, 5)
    expected = {"weight": (dy * torch.nn.functional.batch_norm(x, None, None, training=True)).sum((0, 2))}
    expected["bias"] = dy.sum((0, 2))
    for name, other in (("weight", "bias"), ("bias", "weight")):
        layer = normops.SyncBatchNorm(6)
        getattr(layer, other).requires_grad_(False)
        layer(x).backward(dy)  # all ranks have the same
        torch.testing.assert_close(getattr(layer, name).grad, expected[name])
        assert getattr(layer, other).grad is None


def test_gradient_of_one_parameter(ranks):
    ranks.run(gradient_of_one_parameter)


def empty_everywhere(rank, world_size):
    layer = normops.SyncBatchNorm(6)
    x = torch.empty(0, 6, 5, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert layer.running_mean.eq(0).all() and layer.running_var.eq(1).all()


def test_empty_everywhere(ranks):
    ranks.run(empty_everywhere)


def collectives(rank, world_size, channels, forward):
    layer = normops.SyncBatchNorm(channels)
    x = torch.randn(2, channels, 3, requires_grad=True)
    with torch.profiler.profile() as profile:
        layer(x).sum().backward()
    names = [event.name for event in profile.events() if event.name.startswith("gloo:")]
    assert len([name for name in names if "gather" in name]) == forward
    assert len([name for name in names if "reduce" in name]) == 1
    assert len(names) == forward + 1


@two_ranks
@pytest.mark.parametrize(("channels", "forward"), [(6, 1), (1024, 1), (1025, 2)])
def test_collectives(ranks, channels, forward):
    ranks.run(collectives, channels, forward)


def gradients_checked(rank, world_size):
    """With the same input on all ranks, moving an element moves it on every rank, in step."""
    layer = normops.SyncBatchNorm(3, track_running_stats=False, dtype=torch.float64)
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x, weight, bias):
        # The derivative of the sum over ranks by one of the equal inputs, and by a parameter on one rank.
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert gradcheck(function, (x, weight, bias))


def test_gradcheck(ranks):
    ranks.run(gradients_checked)


def differentiated_twice(rank, world_size):
    layer = normops.SyncBatchNorm(6)
    x = torch.randn(2, 6, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with expect(NotImplementedError, "sync_batch_norm: the derivative of its backward"):
        grad.sum().backward()


@two_ranks
def test_double_backward(ranks):
    ranks.run(differentiated_twice)


def disagreeing(rank, world_size, kind):
    """The last rank differs; all raise, and name it."""
    last = world_size - 1
    odd = rank == last
    layer = normops.SyncBatchNorm(7 if odd and kind == "channels" else 6)
    x = torch.randn(2, layer.num_features, 3, requires_grad=True)
    if kind == "channels":
        told = ["same channels on all ranks", "6 on rank 0", f"7 on rank {last}"]
    elif kind == "dtype":
        x = x.double() if odd else x
        told = ["same dtype on all ranks", "torch.float32 on rank 0", f"torch.float64 on rank {last}"]
    else:
        x = x.detach() if odd else x
        told = ["same requires_grad on all ranks", "True on rank 0", f"False on rank {last}"]
    with expect(RuntimeError, "sync_batch_norm", *told):
        layer(x)


@pytest.mark.parametrize("kind", ["channels", "dtype", "requires_grad"])
def test_disagreement(ranks, kind):
    ranks.run(disagreeing, kind)


BAD = {
    "dimensions": (torch.randn(6), ValueError, "at least 2D"),
    "no channels": (torch.randn(4, 0), ValueError, "non-zero"),
    "channels": (torch.randn(4, 7), RuntimeError, "expected input with 6 channels"),
    "dtype": (torch.ones(4, 6, dtype=torch.int32), NotImplementedError, "dtype float16"),
    "layout": (torch.randn(4, 6).to_sparse(), NotImplementedError, "strided"),
}


def failing(rank, world_size, kind):
    layer = normops.SyncBatchNorm(6)
    bad, error, told = BAD[kind]
    if rank == 1:
        with expect(error, told):
            layer(bad)
    else:
        with expect(RuntimeError, "rank 1 raised an error"):
            layer(torch.randn(4, 6))
    layer(torch.randn(4, 6))  # the group is as good as before


@pytest.mark.parametrize("kind", BAD)
def test_failing_rank(ranks, kind):
    ranks.run(failing, kind)


def one_value(rank, world_size):
    layer = normops.SyncBatchNorm(6)
    with expect(ValueError, "more than 1 value per channel"):
        layer(torch.randn(1 if rank == 0 else 0, 6))
    assert layer.running_mean.eq(0).all()
    layer(torch.randn(1, 6))  # one each is enough


def test_one_value(ranks):
    ranks.run(one_value)


def in_subgroups(rank, world_size):
    """The outer ranks are a group, each rank in between is one of its own."""
    outer = dist.new_group([0, world_size - 1])
    alone = [dist.new_group([i]) for i in range(world_size)]
    together = rank in (0, world_size - 1)
    inputs = torch.randn(world_size, 4, 6, 5)
    expected = nn.BatchNorm1d(6)(torch.cat([inputs[0], inputs[-1]]) if together else inputs[rank])
    layer = normops.SyncBatchNorm(6, process_group=outer if together else alone[rank])
    y = layer(inputs[rank])
    torch.testing.assert_close(y, expected[-4:] if rank == world_size - 1 else expected[:4])
    if together:
        told = ["same channels", "6 on rank 0", f"8 on rank {world_size - 1}"]
        channels = 6 if rank == 0 else 8
        with expect(RuntimeError, *told):
            normops.SyncBatchNorm(channels, process_group=outer)(torch.randn(2, channels))


def test_subgroups(ranks):
    ranks.run(in_subgroups)


def dead(rank, world_size):
    if rank == 1:
        raise ZeroDivisionError("told to the test")
    normops.SyncBatchNorm(6)(torch.randn(4, 6))


@two_ranks
def test_a_failing_rank_is_a_failing_test(ranks, monkeypatch):
    """The other rank waits for it, but not for ever."""
    monkeypatch.setattr("ranks.GRACE", 1)
    with pytest.raises(AssertionError, match=r"(?s)rank 1: .*told to the test.*rank 0 did not answer"):
        ranks.run(dead)
