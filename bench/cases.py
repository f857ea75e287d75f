"""What is measured: the shapes that real networks give their normalization layers, and a few odd ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from bench import fused

_BATCH_NORM = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORM = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

LAYERS = {
    "layer_norm": lambda shape: nn.LayerNorm(shape[-1]),
    "rms_norm": lambda shape: nn.RMSNorm(shape[-1], eps=1e-6),
    "batch_norm": lambda shape: _BATCH_NORM[len(shape)](shape[1]),
    "batch_norm_eval": lambda shape: _BATCH_NORM[len(shape)](shape[1]).eval(),
    "instance_norm": lambda shape: _INSTANCE_NORM[len(shape)](shape[1], affine=True),
    "group_norm": lambda shape: nn.GroupNorm(32, shape[1]),
}
DTYPES = ["float16", "bfloat16", "float32", "float64"]
LAYOUTS = ["contiguous", "channels_last"]

# What a run of minutes measures: layers as models have them. Of BatchNorm, the five widths of a ResNet at 160x160.
_DEFAULT = {
    "layer_norm": [(128, 96), (1024, 768), (12800, 96), (2048, 4096)],
    "rms_norm": [(1, 2048), (512, 2048), (1024, 4096)],
    "batch_norm": [
        (8, 64, 80, 80),
        (8, 256, 40, 40),
        (8, 512, 20, 20),
        (8, 1024, 10, 10),
        (8, 2048, 5, 5),
        (4096, 512),
    ],
    "batch_norm_eval": [(8, 256, 40, 40)],
    "instance_norm": [(8, 64, 64, 64), (1, 32, 64, 64, 64), (16, 64, 400)],
    "group_norm": [(4, 128, 32, 32), (2, 1280, 8, 8), (8, 256, 64, 64)],
}
# Of these, in a run of minutes, in the other dtypes too.
_DEFAULT_SHORT = {
    "layer_norm": [(1024, 768), (2048, 4096)],
    "rms_norm": [(512, 2048)],
    "batch_norm": [(8, 64, 80, 80), (8, 1024, 10, 10)],
    "batch_norm_eval": [(8, 256, 40, 40)],
    "instance_norm": [(8, 64, 64, 64)],
    "group_norm": [(4, 128, 32, 32)],
}
_ROWS = [(4096, 768), (4096, 4096), (65536, 64), (8192, 1024), (2048, 1024), (32, 128), (16, 12288), (64, 1000000)]
_FULL = {
    "layer_norm": [*_DEFAULT["layer_norm"], *_ROWS, (4096, 1000), (4096, 17)],
    "rms_norm": [*_DEFAULT["rms_norm"], *_ROWS],
    "batch_norm": [
        *_DEFAULT["batch_norm"],
        (32, 64, 56, 56),
        (32, 512, 7, 7),
        (8, 64, 128, 128),
        (8, 96, 80, 80),
        (2, 32, 32, 64, 64),
        (32, 3, 224, 224),
        (16, 17, 33, 33),
    ],
    "batch_norm_eval": [*_DEFAULT["batch_norm_eval"], (32, 64, 56, 56), (8, 64, 128, 128)],
    "instance_norm": [*_DEFAULT["instance_norm"], (8, 64, 128, 128), (2, 32, 64, 64, 64), (1, 320, 8, 8, 8)],
    "group_norm": [*_DEFAULT["group_norm"], (2, 64, 32, 32), (2, 1280, 16, 16), (2, 320, 64, 64)],
}
_QUICK = {
    "layer_norm": [(4096, 768), (32, 128)],
    "rms_norm": [(4096, 768)],
    "batch_norm": [(32, 512, 7, 7)],
    "batch_norm_eval": [(32, 64, 28, 28)],
    "instance_norm": [(8, 64, 32, 32)],
    "group_norm": [(2, 64, 32, 32)],
}
SELECTIONS = ["quick", "default", "full"]
# Small, for the sake of the reference in float64.
_ACCURACY = {
    "layer_norm": [(256, 768)],
    "rms_norm": [(256, 768)],
    "batch_norm": [(8, 32, 28, 28)],
    "batch_norm_eval": [(8, 32, 28, 28)],
    "instance_norm": [(8, 32, 28, 28)],
    "group_norm": [(8, 64, 28, 28)],
}


@dataclass(frozen=True)
class Case:
    layer: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    device: str
    mean: float = 0.0  # of the data

    @property
    def name(self) -> str:
        return " ".join([self.layer, self.size, self.dtype, self.layout, self.device])

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def is_fused(self) -> bool:
        return self.layer in fused.LAYERS

    def make_layer(self) -> nn.Module:
        """Torch's layer, with parameters and running statistics unlike those of a new one."""
        layer = (LAYERS | fused.LAYERS)[self.layer](self.shape)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        for name, buffer in layer.named_buffers():
            if name.endswith("running_mean"):
                nn.init.normal_(buffer, self.mean)
            elif name.endswith("running_var"):
                nn.init.uniform_(buffer, 0.5, 1.5)
        layer = layer.to(self.device, getattr(torch, self.dtype))
        if getattr(layer, "residual", None) is not None:
            layer.residual.data = self._random(0.0)
        return layer

    def make_data(self) -> tuple[Tensor, Tensor]:
        """The input, and the gradient of the output."""
        return tuple(self._random(mean) for mean in (self.mean, 0.0))

    def _random(self, mean: float) -> Tensor:
        memory_format = torch.contiguous_format if self.layout == "contiguous" else _CHANNELS_LAST[len(self.shape)]
        values = torch.randn(self.shape, device=self.device).add_(mean)
        return values.to(getattr(torch, self.dtype), memory_format=memory_format)


def _cases(table, layers, dtypes, layouts, devices, **data) -> Iterator[Case]:
    for device, layer in product(devices, layers):
        for shape, layout, dtype in product(table[layer], layouts, dtypes):
            if layout == "contiguous" or len(shape) in _CHANNELS_LAST:
                yield Case(layer, shape, dtype, layout, device, **data)


def timed_cases(
    layers: Sequence[str], dtypes: Sequence[str], layouts: Sequence[str], devices: Sequence[str], selection: str
) -> list[Case]:
    """`selection` is one of `SELECTIONS`."""
    cases = _cases({"quick": _QUICK, "default": _DEFAULT, "full": _FULL}[selection], layers, dtypes, layouts, devices)
    if selection != "default":
        return list(cases)
    return [case for case in cases if case.dtype == dtypes[0] or case.shape in _DEFAULT_SHORT[case.layer]]


def fused_cases(dtypes: Sequence[str], layouts: Sequence[str], devices: Sequence[str], selection: str) -> list[Case]:
    """Norms with what stands around them; the first shape of each if quick."""
    table = {layer: shapes[:1] if selection == "quick" else shapes for layer, shapes in fused.SHAPES.items()}
    return list(_cases(table, list(table), dtypes, layouts, devices))


def accuracy_cases(
    layers: Sequence[str], dtypes: Sequence[str], layouts: Sequence[str], devices: Sequence[str]
) -> list[Case]:
    """Ordinary data, and in float32 data far from zero, where a careless variance loses its digits."""
    far = [dtype for dtype in dtypes if dtype == "float32"]
    return [
        *_cases(_ACCURACY, layers, dtypes, layouts, devices),
        *_cases(_ACCURACY, layers, far, layouts, devices, mean=1e4),
    ]
