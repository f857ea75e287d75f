"""Drop-in modules: torch's own layers, by inheritance, with the forward on :mod:`normops.functional`.

Constructor arguments, parameters, buffers, ``state_dict`` and ``isinstance`` are those of the torch class of the same
name, which is the base class; a drop-in adds no state of its own. Printed, it is called ``normops.LayerNorm``.

By keyword, the constructors also take ``activation`` and ``negative_slope``, and ``forward`` a second tensor,
``residual``, that is added before the activation: both in the same pass (:mod:`normops.functional`).
"""

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
from normops.modules.normalization import AddLayerNorm, AddRMSNorm, GroupNorm, LayerNorm, LayerNorm2d, RMSNorm
from normops.modules.syncbatchnorm import SyncBatchNorm

__all__ = [
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
    "LayerNorm2d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "RMSNorm",
    "SyncBatchNorm",
]
