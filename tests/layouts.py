"""The ways an input may lie in memory: each takes a contiguous tensor and returns one of its shape."""

import pytest
import torch


def misaligned(x):
    """The same elements behind one more: no vector starts on a boundary."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def in_order(x, dims):
    """The dimensions from outermost to innermost are ``dims``."""
    return x.permute(dims).contiguous().permute(sorted(range(x.dim()), key=dims.__getitem__))


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels outermost": lambda x: in_order(x, [1, 0, *range(2, x.dim())]),
    "samples innermost": lambda x: in_order(x, [*range(1, x.dim()), 0]),
    "misaligned": misaligned,
    "misaligned channels_last": lambda x: misaligned(x.movedim(1, -1)).movedim(-1, 1),
    "sliced channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "sliced channels of channels_last": lambda x: channels_last(torch.cat([x, x], 1))[:, x.shape[1] :],
    "sliced samples": lambda x: torch.cat([x, x])[::2],
    "sliced positions": lambda x: torch.cat([x, x], -1)[..., 1 : 1 + x.shape[-1]],
    "sliced positions of channels_last": lambda x: channels_last(torch.cat([x, x], -1))[..., : x.shape[-1]],
    "every other position": lambda x: torch.cat([x, x], -1)[..., ::2],
    "expanded samples": lambda x: x[:1].expand_as(x),
    "expanded channels": lambda x: x[:, :1].expand_as(x),
    "expanded positions": lambda x: x[..., :1].expand_as(x),
    "expanded column": lambda x: x[..., :1].contiguous().expand_as(x),
}

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_memory_format = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
