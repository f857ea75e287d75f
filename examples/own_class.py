"""A norm of one's own, which convert is taught: python examples/own_class.py"""

import torch
from torch import nn

import normops
from normops import functional as F


class GemmaLikeNorm(nn.Module):
    """An RMSNorm in float32 whose weight is stored as its distance from one."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.offset = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.offset.float())).to(x.dtype)


def forward(self, x):
    return F.rms_norm(x, self.offset.shape, self.offset, self.eps, weight_offset=1.0)


def input_shape(self):
    return 2, 3, *self.offset.shape


normops.register_conversion(GemmaLikeNorm, forward, input_shape=input_shape)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), GemmaLikeNorm(16), nn.Linear(16, 2))
x = torch.randn(5, 8)
expected = model(x)
# Both forwards are run on random numbers now. They have to agree in output and gradients, in every dtype they take.
normops.convert(model, verbose=True)
torch.testing.assert_close(model(x), expected)

# One that computes something else is found out, and the model stays as it was.
normops.register_conversion(GemmaLikeNorm, lambda self, x: F.rms_norm(x, self.offset.shape), input_shape=input_shape)
try:
    normops.convert(normops.revert(model))
except ValueError as error:
    print(f"refused: {error}")
else:
    raise SystemExit("a wrong forward was accepted")
