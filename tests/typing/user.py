"""What a user may write, and some mistakes that have to be found: for ``mypy --strict``, in ``make lint``."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import normops
import normops.functional as F
from normops import BatchNorm2d, LayerNorm
from normops.report import Layer, Summary


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNorm2d(8, eps=1e-3, momentum=None, affine=True, track_running_stats=True, device="cpu")
        self.image = normops.LayerNorm2d(8, bias=False, dtype=torch.bfloat16)
        self.sync = normops.SyncBatchNorm(8, process_group=None)
        self.lazy = normops.LazyInstanceNorm1d(affine=True)
        self.fused = normops.GroupNorm(2, 8, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.image.forward(self.norm.forward(x))
        assert_type(y, Tensor)
        return y


class Own(LayerNorm):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(input, residual) + 1


def functions(x: Tensor, statistic: Tensor | None, shape: Sequence[int]) -> list[Tensor]:
    results = [
        F.batch_norm(x, statistic, statistic, None, None, True, 0.1, 1e-5),
        F.instance_norm(x, eps=1e-3),
        F.group_norm(x, 2, weight=statistic),
        F.layer_norm(x, [5]),
        F.rms_norm(x, tuple(shape), eps=None),
        F.group_norm(x, 2, activation="leaky_relu", negative_slope=0.2, residual=x),
        *F.add_layer_norm(x, x, [5], weight_offset=1.0),
        F.batch_norm(x, None, None, training=True, mask=F.length_mask([3, 4], 5)),
        F.channel_layer_norm(x, activation="gelu"),
        F.channel_rms_norm(x, bias=statistic),
        normops.AdaLayerNorm(5).forward(x, x, x),
        normops.AdaGroupNorm(2, 8, weight_offset=0.0).forward(x, x, x),
        normops.LazyLayerNorm(ndim=2).forward(x),
        normops.BatchNorm1d(8).forward(x, None, F.length_mask(x, 5)),
    ]
    assert_type(results, list[Tensor])
    return results


def conversion() -> None:
    net = Net()
    assert_type(normops.convert(net), Net)
    assert_type(normops.convert(net, verbose=True), Net)
    assert_type(normops.revert(net), Net)
    assert_type(normops.SyncBatchNorm.convert_sync_batchnorm(net), Net)
    summary = normops.summary(net)
    assert_type(summary, Summary)
    assert_type(summary.left, tuple[Layer, ...])
    for layer in summary:
        assert_type(layer.name + layer.why_left, str)


def forward(module: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


normops.register_conversion(Own, forward)
normops.register_conversion("somewhere.*RMSNorm", forward, input_shape=lambda module: (2, 3, 8))


def switches(x: Tensor) -> Tensor:
    assert_type(normops.accelerate(True), None)
    normops.accelerate(enabled=False)
    with normops.accelerate(), normops.set_compile_mode("decompose"):
        y = nn.functional.layer_norm(x, (5,))
    normops.set_compile_mode("kernel")
    return y


@normops.accelerate()
def accelerated(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (5,))


assert_type(accelerated(torch.ones(5)), Tensor)
assert_type(normops.__version__, str)


def mistakes(x: Tensor) -> None:
    """An ignore that is not needed is an error."""
    normops.BatchNorm2d(8, activation=1)  # type: ignore[arg-type]
    normops.LayerNorm2d(8).forward([1.0])  # type: ignore[arg-type]
    normops.convert([nn.LayerNorm(8)])  # type: ignore[type-var]
    normops.set_compile_mode("other")  # type: ignore[arg-type]
    F.layer_norm(x, 5)  # type: ignore[arg-type]
    with normops.accelerate(True):  # type: ignore[attr-defined]
        pass
