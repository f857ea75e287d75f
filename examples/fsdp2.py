"""A converted transformer whose parameters are spread over the processes:
torchrun --nproc-per-node 2 examples/fsdp2.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import normops


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(0)

model = nn.Sequential(Block(32), Block(32), nn.LayerNorm(32))
normops.convert(model)  # first, then shard
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
for block in model:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(dist.get_rank())  # other data on every process
for step in range(10):
    x = torch.randn(16, 32)
    loss = (model(x) - x.flip(1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0 and step % 3 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

weight = model[0].norm.weight
print(f"rank {dist.get_rank()}: {weight.to_local().numel()} of {weight.numel()} elements of a norm's weight")
dist.destroy_process_group()
