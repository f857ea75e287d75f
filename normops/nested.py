"""Nested tensors (``torch.jagged``): the layers of what is in them, without padding.

Their values lie side by side, so rows are rows, and a batch of sequences is, to BatchNorm and to the layers over
channels, one long sequence. InstanceNorm, GroupNorm and parameters of samples have sequences padded, with a mask.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SUMS = ("add_layer_norm", "add_rms_norm")
_ROWS = ("layer_norm", "rms_norm", *_SUMS)


def run(name: str, function: Callable[..., Any], input: Any, *args: Any, **extras: Any) -> Any:
    """``function``, which is normops' function of this name, of nested input."""
    if input.layout != torch.jagged:
        raise ValueError(
            f"{name}: expected a nested tensor of layout torch.jagged, with one ragged dimension, got {input.layout}"
        )
    if extras.get("mask") is not None:
        raise ValueError(f"{name}: expected no mask with a nested tensor, which has no padding, got one")
    if input.lengths() is not None:
        input = input.contiguous()
    run_on = _rows if name in _ROWS else _samples if _knows_samples(name, *args) else _joined
    return run_on(name, function, input, *args, **extras)


def _knows_samples(name: str, *args: Any) -> bool:
    """Whether it makes a difference which sample a position belongs to."""
    if name == "batch_norm":
        _, _, weight, bias, *_ = args
        return any(isinstance(parameter, Tensor) and parameter.dim() > 1 for parameter in (weight, bias))
    return name in ("instance_norm", "group_norm")


def _ragged(input: Any) -> int:
    """The dimension of the values along which the samples follow each other."""
    return input._ragged_idx - 1


def _nest(values: Tensor, like: Any) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(
        values,
        like.offsets(),
        jagged_dim=like._ragged_idx,
        min_seqlen=like._maybe_min_seqlen,
        max_seqlen=like._maybe_max_seqlen,
    )


def _values(name: str, argument: str, tensor: Any, input: Any) -> Tensor:
    """Of a residual, whose samples have to be as long as those of the input."""
    if tensor is input:
        return input.values()
    if not isinstance(tensor, Tensor) or not tensor.is_nested or tensor.shape != input.shape:
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: expected {argument} to be nested as input is ({tuple(input.shape)}), got {got}")
    return tensor.values()


def _rows(name: str, function: Callable[..., Any], input: Any, *args: Any, **extras: Any) -> Any:
    shape = args[1 if name in _SUMS else 0]
    rows = len(shape) if isinstance(shape, (tuple, list, torch.Size)) else 1
    if input._ragged_idx >= input.dim() - rows:
        raise ValueError(
            f"{name}: expected the ragged dimension of a nested tensor before those that are normalized, got dimension "
            f"{input._ragged_idx} of {input.dim()}, the last {rows} of which are (normalized_shape)"
        )
    if name in _SUMS:
        args = _values(name, "residual", args[0], input), *args[1:]
    if extras.get("residual") is not None:
        extras["residual"] = _values(name, "residual", extras["residual"], input)
    result = function(input.values(), *args, **extras)
    return tuple(_nest(part, input) for part in result) if isinstance(result, tuple) else _nest(result, input)


def _check_channels_are_even(name: str, input: Any) -> None:
    if input._ragged_idx < 2:
        raise ValueError(
            f"{name}: expected a nested tensor (N, C, *) whose ragged dimension is behind the channels, got "
            f"{tuple(input.shape)}: transpose it"
        )


def _joined(name: str, function: Callable[..., Any], input: Any, *args: Any, **extras: Any) -> Tensor:
    _check_channels_are_even(name, input)
    ragged = _ragged(input)
    if extras.get("residual") is not None:
        extras["residual"] = _values(name, "residual", extras["residual"], input).movedim(ragged, 0)
    return _nest(function(input.values().movedim(ragged, 0), *args, **extras).movedim(0, ragged), input)


def _samples(name: str, function: Callable[..., Any], input: Any, *args: Any, **extras: Any) -> Tensor:
    _check_channels_are_even(name, input)
    ragged, offsets, length = _ragged(input), input.offsets(), input._get_max_seqlen()
    values = input.values().movedim(ragged, 0)
    place = torch.arange(values.shape[0], device=values.device)
    sample = torch.searchsorted(offsets[1:].contiguous(), place, right=True)
    place = place - offsets[sample] + sample * length
    samples, rest = offsets.shape[0] - 1, values.shape[1:]

    def pad(values: Tensor) -> Tensor:
        """(N, C, *rest, length), with the positions where they are, which is channels_last if nothing else is there."""
        padded = values.new_zeros(samples * length, *rest).index_copy(0, place, values)
        padded = padded.view(samples, length, *rest)
        return padded.unsqueeze(2).movedim(3, 1) if len(rest) == 1 else padded.movedim(1, -1)

    def unpad(padded: Tensor) -> Tensor:
        padded = padded.movedim(1, 3).squeeze(2) if len(rest) == 1 else padded.movedim(-1, 1)
        return padded.reshape(samples * length, *rest)[place]

    if extras.get("residual") is not None:
        extras["residual"] = pad(_values(name, "residual", extras["residual"], input).movedim(ragged, 0))
    mask = torch.arange(length, device=values.device) < offsets.diff().unsqueeze(1)
    mask = mask.unsqueeze(2) if len(rest) == 1 else mask.view(samples, *[1] * (len(rest) - 1), length)
    return _nest(unpad(function(pad(values), *args, mask=mask, **extras)).movedim(0, ragged), input)
