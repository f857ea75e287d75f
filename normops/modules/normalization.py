"""LayerNorm, LayerNorm2d, RMSNorm and GroupNorm, and the row layers of a sum."""

from typing import Any

import torch

from normops import functional as F
from normops.modules._dropin import DropIn, WithEpilogue, trace

__all__ = ["AddLayerNorm", "AddRMSNorm", "GroupNorm", "LayerNorm", "LayerNorm2d", "RMSNorm"]


def layer_norm_2d(input: torch.Tensor, *args: Any, residual: torch.Tensor | None = None, **extras: Any) -> torch.Tensor:
    """:func:`normops.functional.layer_norm` over dimension 1."""
    if residual is not None:
        extras["residual"] = residual.movedim(1, -1)
    return F.layer_norm(input.movedim(1, -1), *args, **extras).movedim(-1, 1)


class LayerNorm(WithEpilogue, torch.nn.LayerNorm):
    """Drop-in for :class:`torch.nn.LayerNorm`; see :func:`normops.functional.layer_norm`."""

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not isinstance(input, torch.Tensor):
            return trace(self, input, residual)
        return F.layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            memory_efficient=self.memory_efficient,
        )


class LayerNorm2d(LayerNorm):
    r"""Layer normalization over the channels of images: every position of every sample has a statistic of its own.

    .. math::
        y = \frac{x - \mathrm{mean}_C(x)}{\sqrt{\mathrm{var}_C(x) + \mathrm{eps}}}
            \cdot \mathrm{weight} + \mathrm{bias}

    This is :func:`normops.functional.layer_norm` with the channels moved to the end and back. A channels_last input has
    them there already and is neither copied nor moved; others are copied once. The output is channels_last.

    Shape: input and output :math:`(N, C, H, W)`. Torch has no such layer; parameters and ``state_dict`` are those of
    ``torch.nn.LayerNorm(num_channels)``, from which this class is derived.

    Args:
        num_channels: :math:`C`.
        eps, elementwise_affine, bias, device, dtype: as in :class:`torch.nn.LayerNorm`.

    Raises:
        ValueError: the input does not have four dimensions.
        RuntimeError: it does not have ``num_channels`` channels, or a parameter is on another device.
        NotImplementedError: the input is not a strided floating tensor.

    Liu et al., `A ConvNet for the 2020s <https://arxiv.org/abs/2201.03545>`__, 2022.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        memory_efficient: bool = False,
    ) -> None:
        options: dict[str, Any] = {
            "activation": activation,
            "negative_slope": negative_slope,
            "memory_efficient": memory_efficient,
        }
        super().__init__(num_channels, eps, elementwise_affine, bias, device, dtype, **options)

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")
        if input.shape[1:2] != self.normalized_shape:
            raise RuntimeError(
                f"LayerNorm2d: expected input with {self.normalized_shape[0]} channels, got shape {list(input.shape)}"
            )
        return layer_norm_2d(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            memory_efficient=self.memory_efficient,
        )


class RMSNorm(WithEpilogue, torch.nn.RMSNorm):
    """Drop-in for :class:`torch.nn.RMSNorm`; see :func:`normops.functional.rms_norm`."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            return trace(self, x, residual)
        return F.rms_norm(
            x,
            self.normalized_shape,
            self.weight,
            self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            memory_efficient=self.memory_efficient,
        )


class GroupNorm(WithEpilogue, torch.nn.GroupNorm):
    """Drop-in for :class:`torch.nn.GroupNorm`; see :func:`normops.functional.group_norm`."""

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not isinstance(input, torch.Tensor):
            return trace(self, input, residual)
        return F.group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            memory_efficient=self.memory_efficient,
        )


class AddLayerNorm(DropIn, torch.nn.LayerNorm):
    """LayerNorm of the sum of two tensors, which is returned beside it: ``(norm(input + residual), input + residual)``.

    Arguments, parameters and ``state_dict`` are those of :class:`torch.nn.LayerNorm`; see
    :func:`normops.functional.add_layer_norm`.
    """

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return F.add_layer_norm(input, residual, self.normalized_shape, self.weight, self.bias, self.eps)


class AddRMSNorm(DropIn, torch.nn.RMSNorm):
    """RMSNorm of the sum of two tensors, which is returned beside it: ``(norm(input + residual), input + residual)``.

    Arguments, parameters and ``state_dict`` are those of :class:`torch.nn.RMSNorm`; see
    :func:`normops.functional.add_rms_norm`.
    """

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return F.add_rms_norm(input, residual, self.normalized_shape, self.weight, self.eps)
