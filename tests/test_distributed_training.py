"""Networks with SyncBatchNorm that are trained on several ranks, as libraries do it, go where one rank goes alone."""

import copy

import pytest
import torch
from ranks import BATCHES, share, summed, two_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import normops


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Flatten()
    ).double()


def batches(world_size, sizes):
    torch.manual_seed(4)
    return [torch.randn(sum(sizes), 3, 6, 6, dtype=torch.float64) for _ in range(3)]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained_with(rank, world_size, wrap):
    """Three steps of a wrapped, converted network leave it where the network alone goes with the joined batches."""
    sizes = BATCHES[world_size][1]
    alone = network()
    ours = normops.SyncBatchNorm.convert_sync_batchnorm(normops.convert(network()))
    wrapped = wrap(ours)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (alone, wrapped)]
    for x in batches(world_size, sizes):
        for model, optimizer, part in (
            (alone, optimizers[0], x),
            (wrapped, optimizers[1], share(x, rank, sizes)),
        ):
            optimizer.zero_grad()
            # DDP and FSDP average over the ranks what adds up to the gradient of the joined batch.
            loss = model(part).square().sum() * (1 if model is alone else world_size)
            (loss / sum(sizes)).backward()
            optimizer.step()
    state = {name: whole(value) for name, value in ours.state_dict().items()}
    torch.testing.assert_close(state, alone.state_dict(), rtol=1e-9, atol=1e-9)


def trained_with_ddp(rank, world_size, options):
    trained_with(rank, world_size, lambda model: nn.parallel.DistributedDataParallel(model, **options))


@pytest.mark.parametrize(
    "options", [{}, {"broadcast_buffers": False}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str
)
def test_ddp(ranks, options):
    ranks.run(trained_with_ddp, options)


def two_forwards(rank, world_size):
    """As a GAN's discriminator: DDP broadcasts the buffers before each, which must not spoil the backward."""
    sizes = BATCHES[world_size][1]
    alone = network()
    model = nn.parallel.DistributedDataParallel(normops.SyncBatchNorm.convert_sync_batchnorm(network()))
    real, fake, _ = batches(world_size, sizes)
    (alone(real).square().sum() - alone(fake).abs().sum()).backward()
    loss = model(share(real, rank, sizes)).square().sum() - model(share(fake, rank, sizes)).abs().sum()
    (world_size * loss).backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.module.state_dict(), alone.state_dict(), rtol=1e-9, atol=1e-9)


def test_buffers_broadcast_between_two_forwards(ranks):
    ranks.run(two_forwards)


def trained_with_fsdp(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world_size,))

    def wrap(model):
        for layer in model:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    trained_with(rank, world_size, wrap)


def test_fsdp(ranks):
    ranks.run(trained_with_fsdp)


def checkpointed(rank, world_size, reentrant):
    """The statistics are exchanged again when the forward is repeated, in the same order on all ranks.

    A repeated forward moves the running statistics once more, as with torch's layers: they are not compared.
    """
    sizes = BATCHES[world_size][1]
    alone, ours = network(), normops.SyncBatchNorm.convert_sync_batchnorm(network())
    inputs = batches(world_size, sizes)[0]
    alone(inputs).square().sum().backward()
    x = share(inputs, rank, sizes).requires_grad_()
    for part in (ours[:3], ours[3:]):
        x = checkpoint(part, x, use_reentrant=reentrant)
    x.square().sum().backward()
    for mine, theirs in zip(ours.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(summed(mine.grad), theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(ranks, reentrant):
    ranks.run(checkpointed, reentrant)


def compiled(rank, world_size):
    """The exchange is left to the interpreter; what lies between is compiled."""
    sizes = BATCHES[world_size][1]
    model = normops.SyncBatchNorm.convert_sync_batchnorm(network())
    x = share(batches(world_size, sizes)[0], rank, sizes)
    gradients = []
    for run in (model, torch.compile(copy.deepcopy(model), backend="aot_eager")):
        run(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in run.parameters()])
    torch.testing.assert_close(*gradients)


@two_ranks
def test_compiled(ranks):
    ranks.run(compiled)
