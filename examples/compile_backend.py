"""A compiler that fuses norms with what stands around them, in a model that knows nothing of it:
python examples/compile_backend.py"""

import torch
from torch import nn

import normops


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)

    def forward(self, x):
        return nn.functional.silu(self.norm(self.conv(x)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.last = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        x = self.stem(images)
        x = torch.relu(self.norm(x) + x)
        y = self.blocks(x).mean((2, 3))
        return self.head(self.last(y + x.mean((2, 3))))


torch.manual_seed(0)
model, images = Network(), torch.randn(2, 3, 16, 16)
expected = model(images)

# With options={"then": "inductor"} what is left goes on to torch's compiler.
compiled = torch.compile(model, backend="normops")
output = compiled(images)
output.sum().backward()
print(normops.fusion_report())
print(f"largest difference {(output - expected).abs().max().item():.0e}")
torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
