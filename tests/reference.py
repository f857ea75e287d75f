"""The layers in float64 and plain torch operations, one page to be read and believed: what everything is compared with.

The functions take the arguments of their namesakes in ``torch.nn.functional`` (but move no running statistics) and are
differentiable to any order.
``frozen=True`` treats the statistics as constants, which leaves of the gradient only its first term, rstd * weight *
dy: the scale against which the rounding errors of the whole are measured.
"""

import torch


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
    """(C) as it lies in (N, C, S)."""
    return None if parameter is None else parameter.double().view(1, -1, 1)


def _channel_norm(input, dims, running_mean, running_var, weight, bias, use_input_stats, eps, frozen):
    x = input.double().flatten(2) if input.dim() > 2 else input.double().unsqueeze(2)
    if use_input_stats:
        x = _standardized(x, dims, eps, frozen=frozen)
    else:
        x = (x - _per_channel(running_mean)) / torch.sqrt(_per_channel(running_var) + eps)
    return _affine(x, _per_channel(weight), _per_channel(bias)).reshape(input.shape)


def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, eps=1e-5, frozen=False):
    return _channel_norm(input, (0, 2), running_mean, running_var, weight, bias, training, eps, frozen)


def instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, eps=1e-5, frozen=False
):
    return _channel_norm(input, (2,), running_mean, running_var, weight, bias, use_input_stats, eps, frozen)


def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, frozen=False):
    samples, channels = input.shape[:2]
    groups = input.double().reshape(samples, num_groups, input[0].numel() // num_groups)
    x = _standardized(groups, (2,), eps, frozen=frozen).reshape(samples, channels, -1)
    return _affine(x, _per_channel(weight), _per_channel(bias)).reshape(input.shape)


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, frozen=False):
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(_standardized(input.double(), dims, eps, frozen=frozen), weight, bias)


def rms_norm(input, normalized_shape, weight=None, eps=None, frozen=False):
    if eps is None:  # the epsilon of the arithmetic, which the caller has to give where it is not float64
        eps = torch.finfo(torch.float64).eps
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(_standardized(input.double(), dims, eps, centered=False, frozen=frozen), weight, None)
