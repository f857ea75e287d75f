"""Fused normalization layers for PyTorch: same numbers, same state_dict, a faster step.

``normops.convert(model)`` makes the BatchNorm, LayerNorm, GroupNorm, InstanceNorm and RMSNorm layers of a model use the
kernels of this library. ``normops.BatchNorm2d`` and the others are drop-ins for those of ``torch.nn``, and
``normops.functional`` has the functions.
"""

from normops import functional, modules
from normops._ops import BUILD_INFO
from normops.acceleration import accelerate
from normops.backend import fusion_report
from normops.compilation import set_compile_mode
from normops.conversion import convert, revert, summary
from normops.modules import (
    AdaGroupNorm,
    AdaInstanceNorm,
    AdaLayerNorm,
    AdaRMSNorm,
    AddLayerNorm,
    AddRMSNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LayerNorm1d,
    LayerNorm2d,
    LayerNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyGroupNorm,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
    LazyLayerNorm,
    LazyLayerNorm2d,
    LazyRMSNorm,
    RMSNorm,
    RMSNorm2d,
    SyncBatchNorm,
)
from normops.registry import register_conversion

__version__: str = BUILD_INFO["version"]

__all__ = [
    "AdaGroupNorm",
    "AdaInstanceNorm",
    "AdaLayerNorm",
    "AdaRMSNorm",
    "AddLayerNorm",
    "AddRMSNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm1d",
    "LayerNorm2d",
    "LayerNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyGroupNorm",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "LazyLayerNorm",
    "LazyLayerNorm2d",
    "LazyRMSNorm",
    "RMSNorm",
    "RMSNorm2d",
    "SyncBatchNorm",
    "accelerate",
    "convert",
    "functional",
    "fusion_report",
    "modules",
    "register_conversion",
    "revert",
    "set_compile_mode",
    "summary",
]
