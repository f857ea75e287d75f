"""Drop-in modules: torch's own layers, by inheritance, with the forward on :mod:`normops.functional`.

Constructor arguments, parameters, buffers, ``state_dict``, ``repr`` and ``isinstance`` are those of the torch class of
the same name, which is the base class; a drop-in adds no state of its own.
"""

from normops.modules import batchnorm, instancenorm, normalization, syncbatchnorm
from normops.modules.batchnorm import *  # noqa: F403
from normops.modules.instancenorm import *  # noqa: F403
from normops.modules.normalization import *  # noqa: F403
from normops.modules.syncbatchnorm import *  # noqa: F403

__all__ = [*batchnorm.__all__, *instancenorm.__all__, *normalization.__all__, *syncbatchnorm.__all__]
