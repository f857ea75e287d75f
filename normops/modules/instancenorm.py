"""InstanceNorm1d, 2d, 3d and their lazy forms."""

import warnings

import torch

from normops import functional as F
from normops.modules._dropin import WithEpilogue, trace

__all__ = [
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
]


class _InstanceNormForward(WithEpilogue, torch.nn.modules.instancenorm._InstanceNorm):
    """The forward of torch's ``_InstanceNorm`` on :func:`normops.functional.instance_norm`."""

    def forward(
        self, input: torch.Tensor, residual: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not isinstance(input, torch.Tensor):
            return trace(self, input, residual, mask)
        self._check_input_dim(input)
        unbatched = input.dim() == self._get_no_batch_dim()
        channels = input.size(0 if unbatched else 1)
        if not torch.jit.is_tracing() and channels != self.num_features:
            if self.affine:
                raise ValueError(f"expected input with {self.num_features} channels (num_features), got {channels}")
            warnings.warn(
                f"expected input with {self.num_features} channels (num_features), got {channels}; affine=False makes "
                "num_features unused",
                stacklevel=2,
            )
        if unbatched:
            batch_of_one = None if residual is None else residual.unsqueeze(0)
            mask_of_one = None if mask is None else mask.unsqueeze(0)
            return self._apply_instance_norm(input.unsqueeze(0), batch_of_one, mask_of_one).squeeze(0)
        return self._apply_instance_norm(input, residual, mask)

    def _apply_instance_norm(
        self, input: torch.Tensor, residual: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            memory_efficient=self.memory_efficient,
            mask=mask,
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
