"""The layers in float64 and plain torch operations, one page to be read and believed: what everything is compared with.

The functions take the arguments of their namesakes in ``normops.functional`` (but move no running statistics) and are
differentiable to any order.
``frozen=True`` treats the statistics as constants, which leaves of the gradient only its first term, rstd * weight *
dy: the scale against which the rounding errors of the whole are measured.
"""

import functools
import math

import torch

ACTIVATIONS = {
    "relu": lambda z, slope: z.clamp(min=0),
    "relu6": lambda z, slope: z.clamp(0, 6),
    "leaky_relu": lambda z, slope: torch.where(z > 0, z, slope * z),
    "elu": lambda z, slope: torch.where(z > 0, z, torch.expm1(z.clamp(max=0))),
    "silu": lambda z, slope: z * torch.sigmoid(z),
    "gelu": lambda z, slope: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z, slope: z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    "hardswish": lambda z, slope: z * (z + 3).clamp(0, 6) / 6,
    "mish": lambda z, slope: z * torch.tanh(torch.nn.functional.softplus(z)),
}


def _finished(y, activation=None, negative_slope=0.01, residual=None):
    """activation(y + residual)"""
    z = y if residual is None else y + residual.double()
    return z if activation is None else ACTIVATIONS[activation](z, negative_slope)


def _standardized(x, dims, eps, centered=True, frozen=False):
    """(x - mean) / sqrt(var + eps), the statistics taken over ``dims``; without ``centered`` the mean is 0."""
    source = x.detach() if frozen else x
    mean = source.mean(dims, keepdim=True) if centered else 0
    var = (source - mean).square().mean(dims, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps)


def _affine(x, weight, bias):
    x = x if weight is None else x * weight.double()
    return x if bias is None else x + bias.double()


def _per_channel(parameter):
    """(C), or (N, C), as it lies in (N, C, S); so is what lies there already."""
    if parameter is None:
        return None
    return parameter.double() if parameter.dim() == 3 else parameter.double().unsqueeze(-1)


def _channel_norm(input, dims, running_mean, running_var, weight, bias, use_input_stats, eps, frozen):
    x = input.double().flatten(2) if input.dim() > 2 else input.double().unsqueeze(2)
    if use_input_stats:
        x = _standardized(x, dims, eps, frozen=frozen)
    else:
        x = (x - _per_channel(running_mean)) / torch.sqrt(_per_channel(running_var) + eps)
    return _affine(x, _per_channel(weight), _per_channel(bias)).reshape(input.shape)


def _alone(x, valid):
    """The valid elements of (N, C, *), for which ``valid`` has flags: (1, C, how many)."""
    return x.movedim(1, -1)[valid].T.unsqueeze(0)


def _without_padding(function):
    """With a mask: the layer of what each sample, or all of them together, has without its padding; zero elsewhere."""

    @functools.wraps(function)
    def masked(input, *args, mask=None, residual=None, **kwargs):
        if mask is None:
            return function(input, *args, residual=residual, **kwargs)
        valid = mask.cpu().expand(input.shape[0], *input.shape[2:])
        pieces = [valid]
        if function.__name__ != "batch_norm":
            samples = torch.arange(len(valid)).view(-1, *[1] * (valid.dim() - 1))
            pieces = [valid & (samples == n) for n in range(len(valid))]
        output = torch.zeros_like(input.double()).movedim(1, -1)
        for piece in pieces:
            if piece.any():
                own = None if residual is None else _alone(residual, piece)
                here = dict(kwargs)
                for name in ("weight", "bias"):
                    if kwargs.get(name) is not None and kwargs[name].dim() == 2:
                        everywhere = kwargs[name].view(*input.shape[:2], *[1] * (input.dim() - 2)).expand_as(input)
                        here[name] = _alone(everywhere, piece)
                y = function(_alone(input, piece), *args, residual=own, **here)
                output = output.masked_scatter(piece.unsqueeze(-1), y.squeeze(0).T)
        return output.movedim(-1, 1)

    return masked


@_without_padding
def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, eps=1e-5, frozen=False, **extras
):
    y = _channel_norm(input, (0, 2), running_mean, running_var, weight, bias, training, eps, frozen)
    return _finished(y, **extras)


@_without_padding
def instance_norm(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    eps=1e-5,
    frozen=False,
    **extras,
):
    y = _channel_norm(input, (2,), running_mean, running_var, weight, bias, use_input_stats, eps, frozen)
    return _finished(y, **extras)


@_without_padding
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, frozen=False, **extras):
    samples, channels = input.shape[:2]
    positions = math.prod(input.shape[2:])
    groups = input.double().reshape(samples, num_groups, channels // num_groups * positions)
    x = _standardized(groups, (2,), eps, frozen=frozen).reshape(samples, channels, positions)
    return _finished(_affine(x, _per_channel(weight), _per_channel(bias)).reshape(input.shape), **extras)


def _moved(weight, offset):
    return None if weight is None else weight.double() + offset


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, frozen=False, weight_offset=0, **extras):
    dims = tuple(range(-len(normalized_shape), 0))
    x = _standardized(input.double(), dims, eps, frozen=frozen)
    return _finished(_affine(x, _moved(weight, weight_offset), bias), **extras)


def rms_norm(input, normalized_shape, weight=None, eps=None, frozen=False, weight_offset=0, bias=None, **extras):
    if eps is None:  # the epsilon of the arithmetic, which the caller has to give where it is not float64
        eps = torch.finfo(torch.float64).eps
    dims = tuple(range(-len(normalized_shape), 0))
    x = _standardized(input.double(), dims, eps, centered=False, frozen=frozen)
    return _finished(_affine(x, _moved(weight, weight_offset), bias), **extras)


def _over_channels(function):
    """The layer of rows over dimension 1."""

    def over_channels(input, *args, residual=None, **kwargs):
        residual = None if residual is None else residual.movedim(1, -1)
        rows = input.movedim(1, -1)
        return function(rows, rows.shape[-1:], *args, residual=residual, **kwargs).movedim(-1, 1)

    return over_channels


channel_layer_norm = _over_channels(layer_norm)
channel_rms_norm = _over_channels(rms_norm)
