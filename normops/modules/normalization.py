"""LayerNorm, RMSNorm and GroupNorm, the row layers over channels, and those of a sum."""

import torch

from normops import functional as F
from normops.modules._dropin import DropIn, WithEpilogue, trace

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "GroupNorm",
    "LayerNorm",
    "LayerNorm1d",
    "LayerNorm2d",
    "LayerNorm3d",
    "RMSNorm",
    "RMSNorm2d",
]


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


class _OverChannels(DropIn):
    """What the layers over channels do with their input; ``_dim`` is how many dimensions it has."""

    _dim: int
    normalized_shape: tuple[int, ...]

    def _check(self, input: torch.Tensor) -> None:
        if input.dim() != self._dim:
            raise ValueError(f"expected {self._dim}D input (got {input.dim()}D input)")
        if input.shape[1:2] != self.normalized_shape:
            raise RuntimeError(
                f"{type(self).__name__}: expected input with {self.normalized_shape[0]} channels, got shape "
                f"{list(input.shape)}"
            )


class _LayerNormOverChannels(_OverChannels, LayerNorm):
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
        super().__init__(
            num_channels,
            eps,
            elementwise_affine,
            bias,
            device,
            dtype,
            activation=activation,
            negative_slope=negative_slope,
            memory_efficient=memory_efficient,
        )

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        self._check(input)
        return F.channel_layer_norm(
            input,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            memory_efficient=self.memory_efficient,
        )


class LayerNorm2d(_LayerNormOverChannels):
    r"""Layer normalization over the channels of images: every position of every sample has a statistic of its own.

    .. math::
        y = \frac{x - \mathrm{mean}_C(x)}{\sqrt{\mathrm{var}_C(x) + \mathrm{eps}}}
            \cdot \mathrm{weight} + \mathrm{bias}

    Neither NCHW nor channels_last inputs are copied, and the output lies as the input does: see
    :func:`normops.functional.channel_layer_norm`.

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

    _dim = 4


class LayerNorm1d(_LayerNormOverChannels):
    """:class:`LayerNorm2d` of sequences, :math:`(N, C, L)`."""

    _dim = 3


class LayerNorm3d(_LayerNormOverChannels):
    """:class:`LayerNorm2d` of volumes, :math:`(N, C, D, H, W)`."""

    _dim = 5


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


class RMSNorm2d(_OverChannels, RMSNorm):
    """Root mean square layer normalization over the channels of images, :math:`(N, C, H, W)`: :class:`LayerNorm2d`
    without mean and bias; see :func:`normops.functional.channel_rms_norm`.

    Args:
        num_channels: :math:`C`.
        eps, elementwise_affine, device, dtype: as in :class:`torch.nn.RMSNorm`.

    Raises:
        ValueError, RuntimeError, NotImplementedError: as :class:`LayerNorm2d`.
    """

    _dim = 4

    def __init__(
        self,
        num_channels: int,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(
            num_channels,
            eps,
            elementwise_affine,
            device,
            dtype,
            activation=activation,
            negative_slope=negative_slope,
            memory_efficient=memory_efficient,
        )

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        self._check(x)
        return F.channel_rms_norm(
            x,
            self.weight,
            self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            memory_efficient=self.memory_efficient,
        )


class GroupNorm(WithEpilogue, torch.nn.GroupNorm):
    """Drop-in for :class:`torch.nn.GroupNorm`; see :func:`normops.functional.group_norm`."""

    def forward(
        self, input: torch.Tensor, residual: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not isinstance(input, torch.Tensor):
            return trace(self, input, residual, mask)
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
            mask=mask,
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
