"""Norms with what stands around them: torch's operators one after the other, and one call of normops."""

import torch
from torch import Tensor, nn

import normops
from normops import functional as F

ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "leaky_relu": nn.LeakyReLU}


class Block(nn.Module):
    """activation(norm(x) + residual), or (norm(x + residual), x + residual) if the sum comes first.

    The residual is a parameter, so that it has a gradient."""

    def __init__(
        self, norm: nn.Module, activation: str | None = None, residual: tuple[int, ...] = (), first: bool = False
    ):
        super().__init__()
        self.norm, self.activation, self.first = norm, activation, first
        self.after = ACTIVATIONS[activation]() if activation else nn.Identity()
        self.residual = nn.Parameter(torch.randn(residual)) if residual else None
        self.fused = False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.fused:
            return self._fused(x)
        if self.first:
            total = x + self.residual
            return self.norm(total), total
        y = self.norm(x)
        return self.after(y if self.residual is None else y + self.residual)

    def _fused(self, x):
        norm = self.norm
        if not self.first:
            return norm(x, self.residual)
        if isinstance(norm, nn.LayerNorm):
            return F.add_layer_norm(x, self.residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return F.add_rms_norm(x, self.residual, norm.normalized_shape, norm.weight, norm.eps)

    def fuse(self) -> "Block":
        """In place: one call of normops."""
        normops.convert(self)
        if self.activation:
            self.norm.activation = self.activation
        self.fused = True
        return self


def _batch(activation: str, add: bool = False):
    return lambda shape: Block(nn.BatchNorm2d(shape[1]), activation, shape if add else ())


LAYERS = {
    "batch_norm_relu": _batch("relu"),
    "batch_norm_add_relu": _batch("relu", add=True),
    "batch_norm_relu6": _batch("relu6"),
    "group_norm_silu": lambda shape: Block(nn.GroupNorm(32, shape[1]), "silu"),
    "instance_norm_leaky_relu": lambda shape: Block(nn.InstanceNorm2d(shape[1], affine=True), "leaky_relu"),
    "add_layer_norm": lambda shape: Block(nn.LayerNorm(shape[-1]), None, shape, first=True),
    "add_rms_norm": lambda shape: Block(nn.RMSNorm(shape[-1], eps=1e-6), None, shape, first=True),
}
SHAPES = {
    "batch_norm_relu": [(8, 64, 80, 80), (8, 256, 40, 40), (8, 512, 20, 20), (8, 1024, 10, 10)],
    "batch_norm_add_relu": [(8, 256, 40, 40), (8, 512, 20, 20), (8, 2048, 5, 5)],
    "batch_norm_relu6": [(8, 96, 80, 80), (8, 192, 20, 20)],
    "group_norm_silu": [(4, 128, 32, 32), (8, 256, 64, 64)],
    "instance_norm_leaky_relu": [(8, 64, 64, 64), (8, 64, 128, 128)],
    "add_layer_norm": [(1024, 768), (2048, 4096)],
    "add_rms_norm": [(512, 2048), (1024, 4096)],
}


def copies(layer: str) -> tuple[float, float]:
    """What forward and backward move, in copies of the input: two tensors each."""
    if layer.startswith("add_"):
        return 2.0, 2.0  # x, residual: output, sum; their gradients, the sum: dx
    return (1.5, 2.5) if "_add_" in layer else (1.0, 1.5)
