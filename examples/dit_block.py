"""A block of a diffusion transformer: a condition scales and shifts what is normalized: python examples/dit_block.py"""

import torch
from torch import nn
from torch.nn import functional as F

import normops


class DiTBlock(nn.Module):
    """Attention and MLP behind norms without parameters: the condition decides scale, shift and gate (AdaLN-Zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = normops.AdaLayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = normops.AdaLayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)  # a block begins as the identity
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        y = self.norm1(x, scale1, shift1)  # norm(x) * (1 + scale1) + shift1, in one pass
        x = x + gate1 * self.attention(y, y, y, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm2(x, scale2, shift2))


torch.manual_seed(0)
block = DiTBlock(width=64, heads=4)
x, condition = torch.randn(8, 16, 64), torch.randn(8, 64)
torch.testing.assert_close(block(x, condition), x)

# Noise is to be taken away from tokens that the condition names.
tokens = nn.Linear(64, 64)
optimizer = torch.optim.AdamW(block.parameters(), lr=2e-3)
for step in range(60):
    condition = torch.randn(16, 64)
    with torch.no_grad():
        clean = tokens(condition)[:, None].expand(-1, 16, -1)
    loss = F.mse_loss(block(clean + torch.randn(16, 16, 64), condition), clean)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
print(f"loss at the end {loss.item():.3f}")
