"""Layers of other libraries that compute what a layer of normops computes; registered when normops is imported.

- transformers, classes called ``*RMSNorm``, and ``T5LayerNorm`` and its copies: :func:`normops.functional.rms_norm`,
  in the four ways there are to round and to apply the weight (Llama, T5, Gemma, and float32 to the end)
- transformers, ``CohereLayerNorm`` and its copies: :func:`normops.functional.layer_norm`
- transformers, ``*LayerNorm`` with a ``data_format`` (ConvNeXt, SAM) and ``*LayerNorm2d``; timm, ``LayerNorm2d``;
  diffusers, ``WuerstchenLayerNorm`` and ``SDCascadeLayerNorm``: :func:`normops.functional.layer_norm` over the channels
- diffusers, ``RMSNorm`` without a bias, ``T5LayerNorm``, ``FP32LayerNorm``; timm, ``LayerNorm``

These are name patterns, and a class that matches is converted only if the numbers agree (see
:func:`normops.register_conversion`): a class that takes a gate or normalises something else stays as it is.

Rounding: Llama's layer rounds the normalised value to the dtype of the input and then the product with the weight; the
kernel rounds once, at the end, which is nearer to the exact result. The two differ by up to one and a half units in the
last place of a 16-bit output, and by float32 rounding in float32. With a weight of another dtype than the input, the
value is rounded twice here too, and the dtype of the output is the original's. In float64 Llama's layer computes in
float32 inside: there the numbers do not agree to the rounding of the dtype, and a float64 layer is left alone.
"""

import torch

from normops import functional as F
from normops.registry import register_conversion

_HALVES = (torch.float16, torch.bfloat16)


def _rms_norm(module, input, weight, weight_offset=0.0):
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    shape = input.shape[-1:] if weight is None else weight.shape
    return F.rms_norm(input, shape, weight, eps, weight_offset=weight_offset)


def llama_rms_norm(module, input):
    """Rounds to the dtype of the input, then multiplies by the weight, in the wider dtype of the two."""
    if module.weight.dtype == input.dtype:
        return _rms_norm(module, input, module.weight)
    return module.weight * _rms_norm(module, input, None)


def t5_layer_norm(module, input):
    """As Llama's, but what has been normalised is float32 until it meets a 16-bit weight."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dtype == input.dtype:
        return _rms_norm(module, input, weight)
    normalized = _rms_norm(module, input.float(), None)
    return weight * (normalized.to(weight.dtype) if weight.dtype in _HALVES else normalized)


def wide_rms_norm(module, input):
    """All in float32, rounded once to the dtype of the input."""
    return _rms_norm(module, input, getattr(module, "weight", None))


def gemma_rms_norm(module, input):
    """All in float32, with one more than the weight."""
    return _rms_norm(module, input, module.weight, weight_offset=1.0)


def cohere_layer_norm(module, input):
    """All in float32, and without a bias."""
    return F.layer_norm(input, module.weight.shape, module.weight, None, module.variance_epsilon)


def layer_norm(module, input):
    return F.layer_norm(input, module.normalized_shape, module.weight, module.bias, module.eps)


def layer_norm_channels_first(module, input):
    if getattr(module, "data_format", "channels_first") == "channels_last":
        return layer_norm(module, input)
    # What comes out lies as channels_last, as the original's does: the convolutions that follow keep to it.
    return layer_norm(module, input.movedim(1, -1)).movedim(-1, 1)


def _image(module):
    channels = module.normalized_shape
    if getattr(module, "data_format", "channels_first") == "channels_last":
        return 2, 3, 4, *channels
    return 2, *channels, 3, 4


# Later ones are tried first: the most frequent come last.
for _forward in (gemma_rms_norm, t5_layer_norm, wide_rms_norm, llama_rms_norm):
    register_conversion("transformers.models.*RMSNorm", _forward)
for _name in ("transformers.models.*LayerNorm", "diffusers.models.*.T5LayerNorm", "diffusers.models.*.RMSNorm"):
    register_conversion(_name, t5_layer_norm)
register_conversion("transformers.models.*LayerNorm", cohere_layer_norm)
for _name in ("transformers.models.*LayerNorm", "transformers.models.*LayerNorm2d", "timm.layers.*.LayerNorm2d"):
    register_conversion(_name, layer_norm_channels_first, input_shape=_image)
for _name in ("diffusers.*.WuerstchenLayerNorm", "diffusers.*.SDCascadeLayerNorm"):
    register_conversion(_name, layer_norm_channels_first, input_shape=_image)
for _name in ("timm.layers.*.LayerNorm", "diffusers.models.*.FP32LayerNorm"):
    register_conversion(_name, layer_norm)
