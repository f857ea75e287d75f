"""SyncBatchNorm: BatchNorm over the joined batch of all ranks.

The channel engine works in three stages: moments, merge, apply. Here the merge reaches over the ranks, which takes one
collective in the forward (the moments) and one in the backward (the sums of the gradient).
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from normops import _activations
from normops.modules import batchnorm

__all__ = ["SyncBatchNorm"]

_Module = TypeVar("_Module", bound=torch.nn.Module)

_OPS = torch.ops.normops
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A rank sends its moments in a frame of fixed size, so that ranks that disagree on the number of channels find out
# instead of waiting for bytes that never come. What has more channels than fit sends the rest in a second collective.
_FRAME_CHANNELS = 1024
# What a frame begins with. A rank that cannot take part, because its input is wrong, says so with -1 channels.
_HEADER = ("count", "channels", "dtype", "requires_grad")


def _gather(frame, group):
    """The frames of all ranks, one a row, on the CPU, where they are read and merged."""
    world_size = dist.get_world_size(group)
    rows = frame.new_empty(world_size * frame.numel())
    # The old name still exists in torch 2.13, but warns.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(rows, frame, group=group)
    return rows.view(world_size, -1).cpu()


def _send_failure(device, group):
    """Takes part in the collective of the other ranks, so that they do not wait for this one."""
    frame = torch.zeros(len(_HEADER) + 2 * _FRAME_CHANNELS, dtype=torch.float64, device=device)
    frame[1] = -1
    _gather(frame, group)


def _check_frames(headers, group):
    """Raises, on every rank alike, if the ranks do not do the same."""
    rank_of = [dist.get_global_rank(group or dist.group.WORLD, i) for i in range(len(headers))]
    failed = [rank_of[i] for i, header in enumerate(headers) if header[1] < 0]
    if failed:
        raise RuntimeError(f"sync_batch_norm: rank {failed[0]} raised an error instead of sending its statistics")
    shown = {"dtype": lambda index: _DTYPES[index], "requires_grad": bool}
    for column, name in enumerate(_HEADER[1:], 1):
        values = [shown.get(name, int)(int(header[column])) for header in headers]
        for i, value in enumerate(values):
            if value != values[0]:
                raise RuntimeError(
                    f"sync_batch_norm: expected input with the same {name} on all ranks, got {values[0]} on rank "
                    f"{rank_of[0]} and {value} on rank {rank_of[i]}"
                )


@torch.no_grad()
def _joined_moments(input, mask, requires_grad, group):
    """Mean and biased variance of every channel over the inputs of all ranks, and the number of values in each.

    The moments are exchanged in float64 and merged in the order of the ranks, so all ranks get the same bits.
    """
    channels = input.shape[1]
    mean, var = _OPS._channel_moments(input, mask)
    frame = mean.new_zeros(len(_HEADER) + 2 * _FRAME_CHANNELS)
    count = input.numel() // channels if mask is None else int(mask.sum())
    frame[: len(_HEADER)] = torch.tensor(
        [count, channels, _DTYPES.index(input.dtype), requires_grad], dtype=torch.float64
    )
    moments = torch.stack([mean, var])
    first = min(channels, _FRAME_CHANNELS)
    body = slice(len(_HEADER), len(_HEADER) + 2 * first)
    frame[body] = moments[:, :first].flatten()
    frames = _gather(frame, group)
    _check_frames(frames[:, : len(_HEADER)].tolist(), group)
    gathered = frames[:, body].view(-1, 2, first)
    if first < channels:
        rest = _gather(moments[:, first:].flatten(), group)
        gathered = torch.cat([gathered, rest.view(-1, 2, channels - first)], 2)
    counts = frames[:, 0]
    mean, var = _OPS._merge_moments(counts, gathered[:, 0], gathered[:, 1])
    return mean.to(input.device), var.to(input.device), int(counts.sum())


def _check_input(input, num_features):
    if input.dim() < 2:
        raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
    if input.shape[1] == 0:
        raise ValueError("SyncBatchNorm number of input channels should be non-zero")
    if input.layout != torch.strided or input.dtype not in _DTYPES:
        raise NotImplementedError(
            "sync_batch_norm: expected strided input of dtype float16, bfloat16, float32 or float64, got "
            f"{input.layout} and {input.dtype}"
        )
    if input.shape[1] != num_features:
        raise RuntimeError(
            f"sync_batch_norm: expected input with {num_features} channels, got input of shape {list(input.shape)}"
        )


def _seen_mask(input, mask):
    """The mask in the shape (N, *positions), as the functions check and see it."""
    shape = [input.shape[0], *input.shape[2:]]
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"sync_batch_norm: expected mask of type Tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.device != input.device:
        raise ValueError(
            f"sync_batch_norm: expected mask to be a tensor of bool on the device of input ({input.device}), got "
            f"{mask.dtype} on {mask.device}"
        )
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"sync_batch_norm: expected mask of shape {shape} (the input's without channels), or one that can be "
            f"broadcast to it, got {list(mask.shape)}"
        ) from None


class _Apply(torch.autograd.Function):
    """The third stage and, in the backward, the three stages with the sum over ranks between them."""

    @staticmethod
    def forward(ctx, input, weight, bias, mask, mean, var, count, eps, group):
        output, _, _ = _OPS._channel_norm(input, mean, var, weight, bias, input.shape[1], True, eps, mask=mask)
        ctx.save_for_backward(input, weight, mask, mean, var)
        ctx.count, ctx.eps, ctx.group = count, eps, group
        return output

    @staticmethod
    def backward(ctx, grad_output):
        options = ctx.count, ctx.eps, ctx.group, ctx.needs_input_grad[:3]
        return *_Gradients.apply(grad_output, *ctx.saved_tensors, *options), *[None] * 6


class _Gradients(torch.autograd.Function):
    """The backward as a function of its own, which can say that it has no derivative."""

    @staticmethod
    def forward(ctx, grad_output, input, weight, mask, mean, var, count, eps, group, wanted):
        sum_dy, sum_dy_xhat = _OPS._channel_grad_sums(grad_output, input, mean, var, eps, mask)
        dx = None
        if wanted[0]:
            totals = torch.stack([sum_dy, sum_dy_xhat])
            dist.all_reduce(totals, group=group)
            dx = _OPS._channel_grad_apply(grad_output, input, mean, var, weight, *totals, count, eps, mask)
        # Parameters get the gradient of this rank's share, as of any layer: DDP sums them up.
        return dx, sum_dy_xhat if wanted[1] else None, sum_dy if wanted[2] else None

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("sync_batch_norm: the derivative of its backward is not implemented across ranks")


def _sync_batch_norm(input, mask, running_mean, running_var, weight, bias, momentum, eps, group):
    requires_grad = torch.is_grad_enabled() and input.requires_grad
    mean, var, count = _joined_moments(input, mask, requires_grad, group)
    if count == 1:
        raise ValueError(
            "sync_batch_norm: expected more than 1 value per channel when training, got 1 on all ranks together, "
            f"here input of shape {list(input.shape)}"
        )
    if running_mean is not None and count > 0:
        _OPS._update_running_stats(running_mean, running_var, mean, var, momentum, count)
    return _Apply.apply(input, weight, bias, mask, mean, var, count, eps, group)


class SyncBatchNorm(batchnorm._BatchNormForward, torch.nn.modules.batchnorm._BatchNorm):
    r"""Batch normalization over the joined batch of all ranks of a process group: arguments, parameters and
    ``state_dict`` of :class:`torch.nn.SyncBatchNorm`, on any backend of :mod:`torch.distributed`, gloo on the CPU
    included.

    Every rank ends with the outputs and running statistics that :class:`normops.BatchNorm2d` has for the joined batch,
    the latter the same to the bit on all ranks. There is one collective in the forward (two above 1,024 channels) and
    one in the backward, both in float64. Batches may differ in size and may be empty, as long as all ranks call the
    layer, forward and backward.

    With a ``mask``, which every rank has for its own input, or not, valid elements are counted over all ranks.

    In evaluation, with one rank, or where :mod:`torch.distributed` is not in use, nothing is exchanged and the layer is
    BatchNorm. As torch's, it exchanges nothing in evaluation even with ``track_running_stats=False``.

    Shape: input and output :math:`(N, C, *)`. The output keeps the memory format and dtype of the input.

    Args:
        activation, negative_slope, memory_efficient: as of all layers; with several ranks, the first two are computed
            after the layer, and the input is kept in any case.
        process_group: the ranks to join; ``None``: all of them. The others are those of :class:`torch.nn.BatchNorm2d`.

    Raises:
        ValueError: the input has fewer than two dimensions, ``mask`` does not fit it, or the ranks have one value per
            channel between them.
        RuntimeError: the input has another number of channels than the layer, or ranks differ in the number of
            channels, in the dtype of the input or in whether it requires a gradient: on all ranks alike, naming the
            rank.
        NotImplementedError: the input is not a strided floating tensor (the other ranks raise ``RuntimeError``); the
            gradient is differentiated again.

    It is a subclass of torch's ``_BatchNorm`` and not of :class:`torch.nn.SyncBatchNorm`, which
    ``DistributedDataParallel`` refuses on the CPU.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,  # activation, negative_slope, memory_efficient; bias, where torch has it
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs)
        self.process_group = process_group

    def _synchronizes(self) -> bool:
        return (
            self.training
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) > 1
        )

    def _check_input_dim(self, input: torch.Tensor) -> None:
        try:
            _check_input(input, self.num_features)
        except Exception:
            if self._synchronizes():
                _send_failure(input.device, self.process_group)
            raise

    def _batch_norm(self, input, running_mean, running_var, weight, bias, training, momentum, eps, residual, mask):
        if not self._synchronizes():
            return super()._batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps, residual, mask
            )
        if mask is not None:
            try:
                mask = _seen_mask(input, mask)
            except Exception:
                _send_failure(input.device, self.process_group)
                raise
        output = _sync_batch_norm(
            input, mask, running_mean, running_var, weight, bias, momentum, eps, self.process_group
        )
        # Not in one pass yet: the stages between which ranks meet know no epilogue.
        masked = None if mask is None else mask.unsqueeze(1).logical_not()
        if residual is not None:
            output = output + (residual if masked is None else residual.masked_fill(masked, 0))
        output = _activations.apply(output, self.activation, self.negative_slope)
        return output if masked is None else output.masked_fill(masked, 0)

    @classmethod
    def convert_sync_batchnorm(cls, module: _Module, process_group: dist.ProcessGroup | None = None) -> _Module:
        """Makes every BatchNorm of ``module``, torch's or normops', a :class:`SyncBatchNorm` of ``process_group``.

        As in :func:`normops.convert`, the modules stay the same objects and only their class changes, so parameters,
        buffers, hooks, whatever else they hold, and optimizers made before are untouched. Layers are recognised by
        their exact type: a subclass may compute something else and is left alone. ``torch.nn.SyncBatchNorm`` becomes
        this class too, and keeps its process group unless another is given.

        Returns ``module``.

        Raises:
            TypeError: ``module`` is not a ``torch.nn.Module``.
            ValueError: a lazy BatchNorm in ``module`` has not seen an input yet.
        """
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"expected module to be a torch.nn.Module, got {type(module).__name__}")
        layers: list[Any] = [layer for layer in module.modules() if type(layer) in _CONVERTED]
        for layer in layers:
            if isinstance(layer, torch.nn.modules.lazy.LazyModuleMixin):
                raise ValueError(
                    f"convert_sync_batchnorm: expected layers that know their number of channels, got a "
                    f"{type(layer).__name__}: run the model once before"
                )
        for layer in layers:
            layer.process_group = process_group or getattr(layer, "process_group", None)
            layer.__class__ = cls
        return module


_CONVERTED = {getattr(namespace, name) for name in batchnorm.__all__ for namespace in (torch.nn, batchnorm)}
_CONVERTED |= {torch.nn.SyncBatchNorm, SyncBatchNorm}
