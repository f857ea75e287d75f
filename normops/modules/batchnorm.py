"""BatchNorm1d, 2d, 3d and their lazy forms."""

import torch

from normops import functional as F
from normops.modules._dropin import WithEpilogue, trace

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"]


class _BatchNormForward(WithEpilogue, torch.nn.modules.batchnorm._BatchNorm):
    """The forward of torch's ``_BatchNorm`` on :func:`normops.functional.batch_norm`."""

    def forward(
        self, input: torch.Tensor, residual: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not isinstance(input, torch.Tensor):
            return trace(self, input, residual, mask)
        self._check_input_dim(input)
        use_input_stats = self.training or (self.running_mean is None and self.running_var is None)
        track = self.training and self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if track and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)  # the cumulative average
        keep_running = track or not self.training
        return self._batch_norm(
            input,
            self.running_mean if keep_running else None,
            self.running_var if keep_running else None,
            self.weight,
            self.bias,
            use_input_stats,
            momentum,
            self.eps,
            residual,
            mask,
        )

    # Annotated for TorchScript.
    def _batch_norm(
        self,
        input: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        residual: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        return F.batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            memory_efficient=self.memory_efficient,
            mask=mask,
        )


class BatchNorm1d(_BatchNormForward, torch.nn.BatchNorm1d):
    """Drop-in for :class:`torch.nn.BatchNorm1d`: ``(N, C)`` or ``(N, C, L)``; see
    :func:`normops.functional.batch_norm`."""


class BatchNorm2d(_BatchNormForward, torch.nn.BatchNorm2d):
    """Drop-in for :class:`torch.nn.BatchNorm2d`: ``(N, C, H, W)``; see :func:`normops.functional.batch_norm`."""


class BatchNorm3d(_BatchNormForward, torch.nn.BatchNorm3d):
    """Drop-in for :class:`torch.nn.BatchNorm3d`: ``(N, C, D, H, W)``; see :func:`normops.functional.batch_norm`."""


class LazyBatchNorm1d(_BatchNormForward, torch.nn.LazyBatchNorm1d):
    """:class:`BatchNorm1d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_BatchNormForward, torch.nn.LazyBatchNorm2d):
    """:class:`BatchNorm2d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_BatchNormForward, torch.nn.LazyBatchNorm3d):
    """:class:`BatchNorm3d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm3d
