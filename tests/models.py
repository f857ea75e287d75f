"""Small models with every kind of layer, as torch's and as normops layers with the same values."""

import copy

import torch
from torch import nn

import normops


class Residual(nn.Module):
    """The shape of a ResNet's block."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return torch.relu(x + self.body(x))


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Residual(8),
        Residual(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-1), v))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.Sequential(Block(16), Block(16), nn.RMSNorm(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        # No bias, which InstanceNorm would take away again: its gradient would be rounding errors, and nothing else.
        self.middle = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.InstanceNorm2d(8, affine=True), nn.SiLU()
        )
        self.up = nn.ConvTranspose2d(16, 3, 2, stride=2)

    def forward(self, x):
        skip = self.down(x)
        return x + self.up(torch.cat([skip, self.middle(skip)], 1))


MODELS = {"resnet": resnet, "vision transformer": VisionTransformer, "unet": UNet}
IMAGE = (4, 3, 16, 16)


def every_layer():
    """One of each kind, one after the other, for images of 8 by 8."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),  # as in UNet
        nn.BatchNorm2d(6),
        nn.SiLU(),  # which leaves no rows of zeros to the layers that follow
        nn.GroupNorm(2, 6),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        nn.LayerNorm(6),
        nn.RMSNorm(6),
        nn.SyncBatchNorm(6),
    )


def scattered(model):
    """The model with parameters and buffers that leave nothing untested: norms start as ones and zeros."""
    for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        tensor.data += 0.3 * torch.rand_like(tensor)
    return model


def pair(make, **kwargs):
    """The model with torch's layers and a converted copy."""
    model = scattered(make()).to(**kwargs)
    return model, normops.convert(copy.deepcopy(model))
