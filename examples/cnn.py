"""A residual network whose norms do the ReLU and the addition behind them in the same pass: python examples/cnn.py"""

import torch
from torch import nn
from torch.nn import functional as F

import normops


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = normops.BatchNorm2d(channels, activation="relu")
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = normops.BatchNorm2d(channels, activation="relu")

    def forward(self, x):
        y = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(y), x)  # relu(norm(y) + x)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), normops.BatchNorm2d(16, activation="relu")
        )
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


torch.manual_seed(0)
model = Network().to(memory_format=torch.channels_last)  # which the layers keep
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for step in range(30):
    # Is the bright spot in the upper or in the lower half?
    rows, columns = torch.randint(12, (32,)), torch.randint(12, (32,))
    images = 0.3 * torch.randn(32, 1, 12, 12)
    images[torch.arange(32), 0, rows, columns] += 4
    images[torch.arange(32), 0, rows, (columns + 1) % 12] += 4
    labels = (rows >= 6).long()
    logits = model(images.to(memory_format=torch.channels_last))
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
print(f"loss at the end {loss.item():.3f}")
