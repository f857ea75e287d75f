r"""``torch.nn.functional``'s normalization functions on the kernels of normops.

The five functions take the arguments of their namesakes, in the same order, so exchanging the import exchanges the
implementation. All of them compute

.. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \mathrm{eps}}} \cdot \mathrm{weight} + \mathrm{bias}

and differ in the elements over which ``mean`` and ``var`` (biased) are taken.

Behind torch's arguments, by keyword alone, they take what often follows a norm, and do it in the same pass over memory:

.. math:: \mathrm{activation}(y + \mathrm{residual})

``activation`` is ``None``, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (with ``negative_slope``), ``"elu"``, ``"silu"``,
``"gelu"``, ``"gelu_tanh"``, ``"hardswish"`` or ``"mish"``; ``residual`` a tensor of the input's shape, dtype and
device, in any strides. What the backward needs of the activation it makes anew from the input, or takes from the
output if there is a residual (``relu``, ``leaky_relu``); the other activations keep the residual. The row layers also
take ``weight_offset``, a number that is added to the weight wherever it is used: 1 for a weight stored as its distance
from one. With ``memory_efficient=True`` the backward starts from the output, which the next layer keeps anyway, and
the input is not kept: see :ref:`below <memory-efficient>`. :func:`add_layer_norm` and :func:`add_rms_norm` add first,
and return the sum beside its norm.

The channel layers take ``mask``, a tensor of bools of shape :math:`(N, *)`, the input's without the channels, or one
that is broadcast to it, such as :math:`(N, 1, W)`: True where the input is valid, as :func:`length_mask` makes it for
sequences of different lengths. Statistics and gradients are of valid elements only, the running statistics move by
their count, and outputs and the gradients of input and residual are zero elsewhere, after an activation too. What is
masked is not read as numbers: it may be NaN. All of it is as if each sample had come without its padding. A statistic
with one valid value is an error in training (on CUDA, where finding out would mean waiting for the device, and in
compiled code it is not noticed), and one without any is as if it were not there.

``weight`` and ``bias`` may be a sample's own, as in AdaIN, AdaLN or FiLM, where another network makes them: of shape
:math:`(N, C)` in the channel layers; in the row layers of any shape that ends in ``normalized_shape`` and is
broadcast to the input's, :math:`(N, 1, D)` above all. One of the two may have its plain shape. Neither they nor their
gradients, which have their shapes, are ever made as large as the input.

Nested tensors (``torch.jagged``) are normalized as if there were no padding: rows by the row layers, and by all others
what is :math:`(N, C, *)` with the ragged dimension behind the channels (``x.transpose(1, 2)`` of :math:`(N, j, C)`).

.. _memory-efficient:

``memory_efficient=True`` takes no activation, ``"leaky_relu"`` or ``"elu"``, which can be inverted, and no residual.
The result is the same to the bit. In the backward the activation, weight and bias are undone, which gives the
normalized input to the rounding of the output: in float32 and float64 gradients are as exact as otherwise to within a
factor of two, in 16-bit types those of the parameters as if the input had been rounded once more. Where too little of
the input is left in the output, it is kept channel by channel (in the row layers: position by position): where the
weight is next to zero or less than a quarter of the bias, and with ``"elu"`` where an output is nearer to -1 than
1/256; with ``"elu"`` in 16-bit types it is kept as a whole. The output must not be changed in place, which raises an
error in the backward. ``torch.compile``, which decides itself what is saved and what is computed anew, takes no notice
of it (but with ``backend="normops"``), nor do ``torch.func`` and forward-mode AD. With a mask, or weights of
samples, the input is kept.

``input`` may be float16, bfloat16, float32 or float64, in any strides; ``weight``, ``bias`` and running statistics may
be of any of these dtypes, whatever that of ``input``. The result has the dtype of ``input``; arithmetic is done in
float32 (float64 for float64), and statistics are merged in float64. Contiguous and channels_last inputs are read as
they lie, and so are most slices of them; inputs with other strides are copied first. Each function can be
differentiated any number of times, forward and backward, and works under ``torch.func`` and ``torch.compile``.

Errors are of the types that torch raises: ``NotImplementedError`` for an input that is not floating or not strided,
``ValueError`` for too few values per statistic or an impossible eps, ``TypeError`` for an argument of the wrong type,
and ``RuntimeError`` for shapes, parameters and devices that do not fit. Of what torch does not have, an ``activation``
that is not known, a ``negative_slope`` without ``"leaky_relu"``, and a ``residual`` of another shape or device are
``ValueError``, and a ``residual`` of another dtype is a ``TypeError``: it is neither broadcast nor promoted. A ``mask``
of another dtype than bool, or of a wrong shape or device, is a ``ValueError``, and so is a weight or bias with more
dimensions than torch's that does not fit the input.
``memory_efficient`` with an activation that has no inverse, with a ``negative_slope`` that is not positive or with a
residual is a ``ValueError``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from normops import _activations, _ops  # noqa: F401  (_ops registers the operators)
from normops._dispatch import call as _call
from normops._dispatch import check_is_shape as _check_is_shape
from normops._dispatch import direct as _direct
from normops._dispatch import extras as _extras

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "channel_layer_norm",
    "channel_rms_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "length_mask",
    "rms_norm",
]

# Dynamo takes this one for true.
_is_compiling = torch.compiler.is_compiling
_add_layer_norm = torch.ops.normops.add_layer_norm.default
_add_rms_norm = torch.ops.normops.add_rms_norm.default
_batch_norm = torch.ops.normops.batch_norm.default
_channel_layer_norm = torch.ops.normops.channel_layer_norm.default
_channel_rms_norm = torch.ops.normops.channel_rms_norm.default
_group_norm = torch.ops.normops.group_norm.default
_instance_norm = torch.ops.normops.instance_norm.default
_layer_norm = torch.ops.normops.layer_norm.default
_rms_norm = torch.ops.normops.rms_norm.default


def length_mask(lengths: Tensor | Sequence[int], size: int) -> Tensor:
    """The mask of sequences that begin where their padded batch does: position ``i`` of sample ``n`` is valid if
    ``i < lengths[n]``.

    Args:
        lengths: shape :math:`(N)`, integers in :math:`[0, size]`; a tensor or a sequence.
        size: the length of the padded batch.

    Returns:
        bools of shape :math:`(N, size)`, on the device of ``lengths``.

    Raises:
        ValueError: ``lengths`` is no vector of integers, or one of them is negative or above ``size``. In compiled code
            the latter is not noticed.
    """
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, dtype=None if len(lengths) else torch.int64)
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(
            f"length_mask: expected lengths to be integers of shape (N), got {lengths.dtype} of shape "
            f"{list(lengths.shape)}"
        )
    if not (torch.compiler.is_compiling() or lengths.is_meta) and lengths.numel() > 0:
        least, most = (int(limit) for limit in torch.aminmax(lengths))
        if least < 0 or most > size:
            raise ValueError(f"length_mask: expected lengths in [0, {size}] (size), got {least if least < 0 else most}")
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    memory_efficient: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Batch normalization: one statistic per channel, over the batch and all positions.

    Ioffe and Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`__, 2015.

    Args:
        input: shape :math:`(N, C, *)`. The result has its shape, and its memory format if that is channels_last.
        running_mean, running_var: shape :math:`(C)`. With ``training=True`` they may be ``None``, and are otherwise
            moved in place to ``(1 - momentum) * running + momentum * statistic``, with the unbiased variance. With
            ``training=False`` they are the statistics.
        weight, bias: shape :math:`(C)`, or :math:`(N, C)` for a sample each, or ``None``.
        training: take the statistics from ``input``.
        momentum: the share of the new statistic in the running one.
        eps: added to the variance; positive when ``training``.
        activation, negative_slope, residual, memory_efficient, mask: see the top of :mod:`normops.functional`.

    Raises:
        ValueError: one (valid) value per channel with ``training=True``; a ``mask`` that does not fit; only one of the
            running statistics; a bad ``eps``.
        RuntimeError: a parameter or running statistic of the wrong shape or device; none of the latter in evaluation.
        NotImplementedError: ``input`` is not a strided floating tensor.
    """
    given = input, running_mean, running_var, weight, bias, training, momentum, eps
    if not _is_compiling():
        output = _direct.batch_norm(*given, activation, negative_slope, residual, memory_efficient, mask)
        if output is not NotImplemented:
            return output
    extras = _extras(activation, negative_slope, residual, memory_efficient=memory_efficient, mask=mask)
    return _call(_batch_norm, *given, **extras)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    memory_efficient: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Instance normalization: one statistic per sample and channel, over all positions.

    Ulyanov, Vedaldi and Lempitsky, `Instance Normalization <https://arxiv.org/abs/1607.08022>`__, 2016.

    A channels_last input stays channels_last (torch returns a contiguous tensor).

    Args:
        input: shape :math:`(N, C, *)` with more than one position.
        running_mean, running_var: shape :math:`(C)`, or ``None``; moved as in :func:`batch_norm` with the average of
            the samples' statistics, or used as the statistics if ``use_input_stats=False``.
        weight, bias: shape :math:`(C)`, or :math:`(N, C)` for a sample each, or ``None``.
        use_input_stats: take the statistics from ``input``.
        momentum: the share of the new statistic in the running one.
        eps: added to the variance.
        activation, negative_slope, residual, memory_efficient, mask: see the top of :mod:`normops.functional`.

    Raises:
        ValueError: one (valid) position per channel with ``use_input_stats=True``; a ``mask`` that does not fit; only
            one of the running statistics.
        RuntimeError: a parameter or running statistic of the wrong shape or device, or none of the latter with
            ``use_input_stats=False``.
        NotImplementedError: ``input`` is not a strided floating tensor.
    """
    given = input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    if not _is_compiling():
        output = _direct.instance_norm(*given, activation, negative_slope, residual, memory_efficient, mask)
        if output is not NotImplemented:
            return output
    extras = _extras(activation, negative_slope, residual, memory_efficient=memory_efficient, mask=mask)
    return _call(_instance_norm, *given, **extras)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    memory_efficient: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Group normalization: one statistic per sample and group of channels, over all positions.

    Wu and He, `Group Normalization <https://arxiv.org/abs/1803.08494>`__, 2018.

    Args:
        input: shape :math:`(N, C, *)`. The result has its shape, and its memory format if that is channels_last.
        num_groups: a divisor of :math:`C`. With :math:`C` groups this is instance norm, with one it is layer norm over
            the whole sample.
        weight, bias: shape :math:`(C)`, or :math:`(N, C)` for a sample each, or ``None``.
        eps: added to the variance.
        activation, negative_slope, residual, memory_efficient, mask: see the top of :mod:`normops.functional`.

    Raises:
        ValueError: a single sample with one value per group, or one valid value; a ``mask`` that does not fit.
        RuntimeError: ``num_groups`` does not divide the channels; a parameter of the wrong shape or device.
        NotImplementedError: ``input`` is not a strided floating tensor.
    """
    given = input, num_groups, weight, bias, eps
    if not _is_compiling():
        output = _direct.group_norm(*given, activation, negative_slope, residual, memory_efficient, mask)
        if output is not NotImplemented:
            return output
    extras = _extras(activation, negative_slope, residual, memory_efficient=memory_efficient, mask=mask)
    return _call(_group_norm, *given, **extras)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    memory_efficient: bool = False,
) -> Tensor:
    r"""Layer normalization: one statistic per row, the last ``len(normalized_shape)`` dimensions.

    Ba, Kiros and Hinton, `Layer Normalization <https://arxiv.org/abs/1607.06450>`__, 2016.

    Args:
        input: shape :math:`(*, \text{normalized\_shape})`. The result is contiguous.
        normalized_shape: the trailing dimensions of ``input``.
        weight, bias: shape ``normalized_shape``, or one that is broadcast (above), or ``None``.
        eps: added to the variance.
        activation, negative_slope, residual, weight_offset, memory_efficient: see the top of
            :mod:`normops.functional`.

    Raises:
        RuntimeError: ``normalized_shape`` is empty or not the end of the input's shape; a parameter has another shape
            or device.
        NotImplementedError: ``input`` is not a strided floating tensor.
    """
    given = input, normalized_shape, weight, bias, eps
    extras = activation, negative_slope, residual, weight_offset, memory_efficient
    if not _is_compiling() and (output := _direct.layer_norm(*given, *extras)) is not NotImplemented:
        return output
    if not isinstance(normalized_shape, (tuple, list)):
        _check_is_shape("layer_norm", normalized_shape)
    return _call(_layer_norm, *given, **_extras(*extras))


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    memory_efficient: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    r"""Root mean square layer normalization: :math:`x / \sqrt{\mathrm{mean}(x^2) + \mathrm{eps}} \cdot \mathrm{weight}`
    over the last ``len(normalized_shape)`` dimensions.

    Zhang and Sennrich, `Root Mean Square Layer Normalization <https://arxiv.org/abs/1910.07467>`__, 2019.

    Args:
        input: shape :math:`(*, \text{normalized\_shape})`. The result has its shape, and its memory format if that is
            channels_last.
        normalized_shape: the trailing dimensions of ``input``.
        weight, bias: shape ``normalized_shape``, or one that is broadcast (above), or ``None``.
        eps: added to the mean square; ``None`` is the machine epsilon of float32 (of float64 for float64), as in torch.
        activation, negative_slope, residual, weight_offset, memory_efficient: see the top of
            :mod:`normops.functional`.

    Raises:
        RuntimeError: ``normalized_shape`` is empty or not the end of the input's shape; a parameter has another shape
            or device.
        NotImplementedError: ``input`` is not a strided floating tensor.
    """
    given = input, normalized_shape, weight, eps
    extras = activation, negative_slope, residual, weight_offset, memory_efficient
    if not _is_compiling() and (output := _direct.rms_norm(*given, *extras, bias)) is not NotImplemented:
        return output
    if not isinstance(normalized_shape, (tuple, list)):
        _check_is_shape("rms_norm", normalized_shape)
    return _call(_rms_norm, *given, **_extras(*extras, bias=bias))


def channel_layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    memory_efficient: bool = False,
) -> Tensor:
    r"""Layer normalization over the channels: one statistic per sample and position, over dimension 1.

    The layer of ConvNeXt and of SAM, as ``layer_norm(input.movedim(1, -1), ...).movedim(-1, 1)`` without the
    copies: an input whose positions lie side by side (NCHW) is read once and stays as it is, and so does channels_last.

    Liu et al., `A ConvNet for the 2020s <https://arxiv.org/abs/2201.03545>`__, 2022.

    Args:
        input: shape :math:`(N, C, *)`. The result has its shape, and its memory format.
        weight, bias: shape :math:`(C)`, or ``None``.
        eps: added to the variance.
        activation, negative_slope, residual, weight_offset, memory_efficient: see the top of
            :mod:`normops.functional`; an input whose channels do not lie side by side is kept in any case.

    Raises:
        ValueError: ``input`` has fewer than two dimensions.
        RuntimeError: a parameter has another shape or device.
        NotImplementedError: ``input`` is not a strided floating tensor.
    """
    given = input, weight, bias, eps
    extras = activation, negative_slope, residual, weight_offset, memory_efficient
    if not _is_compiling() and (output := _direct.channel_layer_norm(*given, *extras)) is not NotImplemented:
        return output
    return _call(_channel_layer_norm, *given, **_extras(*extras))


def channel_rms_norm(
    input: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    memory_efficient: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    r"""Root mean square layer normalization over the channels: :func:`channel_layer_norm` without the mean.

    Args:
        input: shape :math:`(N, C, *)`. The result has its shape, and its memory format.
        weight, bias: shape :math:`(C)`, or ``None``.
        eps: as of :func:`rms_norm`.
        activation, negative_slope, residual, weight_offset, memory_efficient: see the top of
            :mod:`normops.functional`; an input whose channels do not lie side by side is kept in any case.

    Raises:
        ValueError, RuntimeError, NotImplementedError: as :func:`channel_layer_norm`.
    """
    given = input, weight, eps
    extras = activation, negative_slope, residual, weight_offset, memory_efficient
    if not _is_compiling() and (output := _direct.channel_rms_norm(*given, *extras, bias)) is not NotImplemented:
        return output
    return _call(_channel_rms_norm, *given, **_extras(*extras, bias=bias))


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""``(layer_norm(input + residual), input + residual)``: both are read once, and both results written once.

    The backward takes both gradients in one pass. The sum is rounded to the dtype of ``input`` before it is normalized,
    as that of torch's ``+`` is.

    Args:
        input: shape :math:`(*, \text{normalized\_shape})`. Both results have it, and are contiguous.
        residual: a tensor of the shape, dtype and device of ``input``, in any strides.
        normalized_shape, weight, bias, eps, weight_offset: as in :func:`layer_norm`.

    Raises:
        ValueError, TypeError: ``residual`` has another shape or device; another dtype.
        RuntimeError, NotImplementedError: as in :func:`layer_norm`.
    """
    given = input, residual, normalized_shape, weight, bias, eps
    if not _is_compiling() and (outputs := _direct.add_layer_norm(*given, weight_offset)) is not NotImplemented:
        return outputs
    if not isinstance(normalized_shape, (tuple, list)):
        _check_is_shape("add_layer_norm", normalized_shape)
    extras = _extras(None, _activations.DEFAULT_SLOPE, None, weight_offset)
    return _call(_add_layer_norm, *given, **extras)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""``(rms_norm(input + residual), input + residual)``: both are read once, and both results written once.

    The backward takes both gradients in one pass. The sum is rounded to the dtype of ``input`` before it is normalized,
    as that of torch's ``+`` is.

    Args:
        input: shape :math:`(*, \text{normalized\_shape})`. Both results have it, and are contiguous.
        residual: a tensor of the shape, dtype and device of ``input``, in any strides.
        normalized_shape, weight, eps, weight_offset: as in :func:`rms_norm`.

    Raises:
        ValueError, TypeError: ``residual`` has another shape or device; another dtype.
        RuntimeError, NotImplementedError: as in :func:`rms_norm`.
    """
    given = input, residual, normalized_shape, weight, eps
    if not _is_compiling() and (outputs := _direct.add_rms_norm(*given, weight_offset)) is not NotImplemented:
        return outputs
    if not isinstance(normalized_shape, (tuple, list)):
        _check_is_shape("add_rms_norm", normalized_shape)
    extras = _extras(None, _activations.DEFAULT_SLOPE, None, weight_offset)
    return _call(_add_rms_norm, *given, **extras)


# In TorchScript a call of one of these functions is a call of the operator, where it is one.
for _name in __all__:
    if hasattr(torch.ops.normops, _name):
        torch.jit._builtins._register_builtin(globals()[_name], f"normops::{_name}")
