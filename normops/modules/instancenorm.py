"""InstanceNorm1d, 2d, 3d and their lazy forms."""

import torch

from normops import functional as F

__all__ = [
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
]


class _InstanceNormForward:
    """Torch's ``_InstanceNorm``, with its one call of ``F.instance_norm`` answered by normops."""

    def _apply_instance_norm(self, input):
        return F.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
        )


class InstanceNorm1d(_InstanceNormForward, torch.nn.InstanceNorm1d):
    """Drop-in for :class:`torch.nn.InstanceNorm1d`: ``(N, C, L)`` or ``(C, L)``; see
    :func:`normops.functional.instance_norm`."""


class InstanceNorm2d(_InstanceNormForward, torch.nn.InstanceNorm2d):
    """Drop-in for :class:`torch.nn.InstanceNorm2d`: ``(N, C, H, W)`` or ``(C, H, W)``; see
    :func:`normops.functional.instance_norm`."""


class InstanceNorm3d(_InstanceNormForward, torch.nn.InstanceNorm3d):
    """Drop-in for :class:`torch.nn.InstanceNorm3d`: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; see
    :func:`normops.functional.instance_norm`."""


class LazyInstanceNorm1d(_InstanceNormForward, torch.nn.LazyInstanceNorm1d):
    """:class:`InstanceNorm1d` that takes ``num_features`` from its first input."""

    cls_to_become = InstanceNorm1d


class LazyInstanceNorm2d(_InstanceNormForward, torch.nn.LazyInstanceNorm2d):
    """:class:`InstanceNorm2d` that takes ``num_features`` from its first input."""

    cls_to_become = InstanceNorm2d


class LazyInstanceNorm3d(_InstanceNormForward, torch.nn.LazyInstanceNorm3d):
    """:class:`InstanceNorm3d` that takes ``num_features`` from its first input."""

    cls_to_become = InstanceNorm3d
