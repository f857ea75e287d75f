"""Norms whose scale and shift come with the input, one for each sample: AdaLN, AdaIN, AdaGN."""

from typing import Any

import torch

from normops import functional as F
from normops.modules._dropin import WithEpilogue

__all__ = ["AdaGroupNorm", "AdaInstanceNorm", "AdaLayerNorm", "AdaRMSNorm"]


class _Adaptive(WithEpilogue):
    """A layer without parameters: ``norm(input) * (weight_offset + scale) + shift``."""

    def __init__(self, *args: Any, weight_offset: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_offset = weight_offset

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_offset={self.weight_offset}"


def _beside_rows(parameter: torch.Tensor, input: torch.Tensor, rows: int) -> torch.Tensor:
    """A parameter of one row for each sample, (N, *normalized_shape), in the dimensions of the input."""
    if parameter.dim() == 1 + rows < input.dim():
        return parameter.reshape(parameter.shape[0], *[1] * (input.dim() - 1 - rows), *parameter.shape[1:])
    return parameter


class AdaLayerNorm(_Adaptive, torch.nn.LayerNorm):
    r"""Layer normalization with scale and shift for each sample, as in DiT (AdaLN, AdaLN-Zero).

    .. math:: y = \mathrm{norm}(x) \cdot (\mathrm{weight\_offset} + \mathrm{scale}) + \mathrm{shift}

    in one pass, and without tensors of the size of the input, forward or backward.

    Shape: input and output :math:`(N, *, \text{normalized\_shape})`; ``scale`` and ``shift``
    :math:`(N, \text{normalized\_shape})`, or any shape that can be broadcast to the input's and ends in
    ``normalized_shape``.

    Args:
        normalized_shape, eps: as of :class:`torch.nn.LayerNorm`.
        weight_offset: 1, so that scale and shift of zero leave the norm as it is.
        activation, negative_slope: as of all layers.

    Raises:
        ValueError: ``scale`` or ``shift`` does not fit the input; and as :func:`normops.functional.layer_norm`.

    Peebles and Xie, `Scalable Diffusion Models with Transformers <https://arxiv.org/abs/2212.09748>`__, 2022.
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        *,
        weight_offset: float = 1.0,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            normalized_shape,
            eps,
            elementwise_affine=False,
            weight_offset=weight_offset,
            activation=activation,
            negative_slope=negative_slope,
        )

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
    ) -> torch.Tensor:
        rows = len(self.normalized_shape)
        return F.layer_norm(
            input,
            self.normalized_shape,
            _beside_rows(scale, input, rows),
            _beside_rows(shift, input, rows),
            self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            weight_offset=self.weight_offset,
        )


class AdaRMSNorm(_Adaptive, torch.nn.RMSNorm):
    """Root mean square layer normalization with scale and shift for each sample: :class:`AdaLayerNorm` without the
    mean. ``shift`` may be ``None``."""

    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        *,
        weight_offset: float = 1.0,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            normalized_shape,
            eps,
            elementwise_affine=False,
            weight_offset=weight_offset,
            activation=activation,
            negative_slope=negative_slope,
        )

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = len(self.normalized_shape)
        return F.rms_norm(
            input,
            self.normalized_shape,
            _beside_rows(scale, input, rows),
            self.eps,
            bias=None if shift is None else _beside_rows(shift, input, rows),
            activation=self.activation,
            negative_slope=self.negative_slope,
            weight_offset=self.weight_offset,
        )


class AdaInstanceNorm(_Adaptive, torch.nn.Module):
    r"""Instance normalization with scale and shift for each sample and channel (AdaIN).

    .. math:: y = \mathrm{norm}(x) \cdot (\mathrm{weight\_offset} + \mathrm{scale}) + \mathrm{shift}

    Shape: input and output :math:`(N, C, *)`; ``scale`` and ``shift`` :math:`(N, C)`.

    Args:
        num_features: :math:`C`.
        eps: as of :class:`torch.nn.InstanceNorm2d`.
        weight_offset: 1, so that scale and shift of zero leave the norm as it is; 0 as in the paper, where the scale is
            a standard deviation.
        activation, negative_slope: as of all layers.

    Raises:
        ValueError: ``scale`` or ``shift`` is not of shape :math:`(N, C)`; and as
            :func:`normops.functional.instance_norm`.

    Huang and Belongie, `Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization
    <https://arxiv.org/abs/1703.06868>`__, 2017.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        weight_offset: float = 1.0,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(weight_offset=weight_offset, activation=activation, negative_slope=negative_slope)
        self.num_features, self.eps = num_features, eps

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}{super().extra_repr()}"

    def forward(
        self, input: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if input.shape[1] != self.num_features:
            raise RuntimeError(
                f"AdaInstanceNorm: expected input with {self.num_features} channels (num_features), got shape "
                f"{list(input.shape)}"
            )
        return F.instance_norm(
            input,
            weight=self.weight_offset + scale,
            bias=shift,
            eps=self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            mask=mask,
        )


class AdaGroupNorm(_Adaptive, torch.nn.GroupNorm):
    r"""Group normalization with scale and shift for each sample and channel (AdaGN).

    .. math:: y = \mathrm{norm}(x) \cdot (\mathrm{weight\_offset} + \mathrm{scale}) + \mathrm{shift}

    Shape: input and output :math:`(N, C, *)`; ``scale`` and ``shift`` :math:`(N, C)`.

    Args:
        num_groups, num_channels, eps: as of :class:`torch.nn.GroupNorm`.
        weight_offset: 1, so that scale and shift of zero leave the norm as it is.
        activation, negative_slope: as of all layers.

    Raises:
        ValueError: ``scale`` or ``shift`` is not of shape :math:`(N, C)`; and as :func:`normops.functional.group_norm`.

    Dhariwal and Nichol, `Diffusion Models Beat GANs on Image Synthesis <https://arxiv.org/abs/2105.05233>`__, 2021.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        *,
        weight_offset: float = 1.0,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            num_groups,
            num_channels,
            eps,
            affine=False,
            weight_offset=weight_offset,
            activation=activation,
            negative_slope=negative_slope,
        )

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.group_norm(
            input,
            self.num_groups,
            self.weight_offset + scale,
            shift,
            self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            mask=mask,
        )
