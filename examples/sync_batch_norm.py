"""BatchNorm over the joined batch of all processes, on the CPU:
torchrun --nproc-per-node 2 examples/sync_batch_norm.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normops

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(0)  # the same parameters everywhere

model = nn.Sequential(
    nn.Conv2d(3, 8, 3, bias=False),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(8, 4),
)
model = DistributedDataParallel(normops.SyncBatchNorm.convert_sync_batchnorm(model))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

images, labels = torch.randn(9, 3, 12, 12), torch.randint(4, (9,))
# Parts need not be of one size: 9 images on two processes are 5 and 4.
mine, my_labels = images.tensor_split(ranks)[rank], labels.tensor_split(ranks)[rank]
for step in range(5):
    loss = nn.functional.cross_entropy(model(mine), my_labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"rank {rank}, step {step}: loss {loss.item():.3f}")

# The statistics are those of all nine images, on every rank.
expected = nn.BatchNorm2d(8, momentum=1.0)
norm = model.module[1]
with torch.no_grad():
    norm.momentum = 1.0
    features = model.module[0](images)
    norm(features.tensor_split(ranks)[rank])
    expected(features)
torch.testing.assert_close(norm.running_mean, expected.running_mean)
torch.testing.assert_close(norm.running_var, expected.running_var)
print(f"rank {rank}: statistics of the joined batch")
dist.destroy_process_group()
