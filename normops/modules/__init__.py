"""Drop-in modules: torch's own layers, by inheritance, with the forward on :mod:`normops.functional`.

Constructor arguments, parameters, buffers, ``state_dict`` and ``isinstance`` are those of the torch class of the same
name, which is the base class; a drop-in adds no state of its own. Printed, it is called ``normops.LayerNorm``.

By keyword, the constructors also take ``activation`` and ``negative_slope``, and ``forward`` a second tensor,
``residual``, that is added before the activation: both in the same pass. The forward of the channel layers takes
``mask`` as well, which says what of the input is valid (:mod:`normops.functional`).
"""

from normops.modules.adaptive import AdaGroupNorm, AdaInstanceNorm, AdaLayerNorm, AdaRMSNorm
from normops.modules.batchnorm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from normops.modules.instancenorm import (
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)
from normops.modules.lazy import LazyGroupNorm, LazyLayerNorm, LazyLayerNorm2d, LazyRMSNorm
from normops.modules.normalization import (
    AddLayerNorm,
    AddRMSNorm,
    GroupNorm,
    LayerNorm,
    LayerNorm1d,
    LayerNorm2d,
    LayerNorm3d,
    RMSNorm,
    RMSNorm2d,
)
from normops.modules.syncbatchnorm import SyncBatchNorm

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
]
