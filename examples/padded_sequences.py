"""Sequences of different lengths, and a BatchNorm that sees no padding: python examples/padded_sequences.py"""

import torch
from torch import nn

import normops
from normops.functional import length_mask


class Encoder(nn.Module):
    def __init__(self, inputs, width, classes):
        super().__init__()
        self.conv = nn.Conv1d(inputs, width, 3, padding=1)
        self.norm = normops.BatchNorm1d(width, activation="relu")
        self.head = nn.Linear(width, classes)

    def forward(self, x, lengths):
        mask = length_mask(lengths, x.shape[2])  # (N, L), True where there is something
        x = self.norm(self.conv(x), mask=mask)  # zero where there is not, after the activation too
        return self.head(x.sum(2) / lengths[:, None])


torch.manual_seed(0)
model = Encoder(4, 32, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for step in range(40):
    lengths = torch.randint(3, 60, (32,))
    labels = torch.randint(2, (32,))
    x = torch.zeros(32, 4, 60)
    for sample, (length, label) in enumerate(zip(lengths, labels, strict=True)):
        wave = torch.sin(torch.arange(int(length)) * (0.5 if label else 1.5))
        x[sample, :, :length] = wave + 0.3 * torch.randn(4, int(length))
    loss = nn.functional.cross_entropy(model(x, lengths), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

# A sequence comes out the same, however much padding its batch gives it.
model.eval()
alone, padded = x[:1, :, : lengths[0]], nn.functional.pad(x[:1], (0, 40))
difference = (model(alone, lengths[:1]) - model(padded, lengths[:1])).abs().max()
print(f"loss at the end {loss.item():.3f}; padded or not, the output differs by {difference.item():.0e}")
assert difference < 1e-5
