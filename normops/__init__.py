"""Fused normalization layers for PyTorch: same numbers, same state_dict, a faster step.

``normops.convert(model)`` makes the BatchNorm, LayerNorm, GroupNorm, InstanceNorm and RMSNorm layers of a model use the
kernels of this library. ``normops.BatchNorm2d`` and the others are drop-ins for those of ``torch.nn``, and
``normops.functional`` has the functions.
"""

from normops import functional, modules
from normops._ops import BUILD_INFO
from normops.acceleration import accelerate
from normops.compilation import set_compile_mode
from normops.conversion import convert, revert
from normops.modules import *  # noqa: F403
from normops.registry import register_conversion

__version__ = BUILD_INFO["version"]

__all__ = [
    "accelerate",
    "convert",
    "functional",
    "register_conversion",
    "revert",
    "set_compile_mode",
    *modules.__all__,
]
