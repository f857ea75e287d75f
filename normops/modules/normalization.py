"""LayerNorm, RMSNorm and GroupNorm."""

import torch

from normops import functional as F
from normops.modules._fx import trace

__all__ = ["GroupNorm", "LayerNorm", "RMSNorm"]


class LayerNorm(torch.nn.LayerNorm):
    """Drop-in for :class:`torch.nn.LayerNorm`; see :func:`normops.functional.layer_norm`."""

    def forward(self, input):
        if not isinstance(input, torch.Tensor):
            return trace(self, input)
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """Drop-in for :class:`torch.nn.RMSNorm`; see :func:`normops.functional.rms_norm`."""

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            return trace(self, x)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class GroupNorm(torch.nn.GroupNorm):
    """Drop-in for :class:`torch.nn.GroupNorm`; see :func:`normops.functional.group_norm`."""

    def forward(self, input):
        if not isinstance(input, torch.Tensor):
            return trace(self, input)
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
