"""LayerNorm, LayerNorm2d, RMSNorm and GroupNorm that take their sizes from the first input. Torch has none of them."""

from typing import Any

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from normops.modules.normalization import GroupNorm, LayerNorm, LayerNorm2d, RMSNorm

__all__ = ["LazyGroupNorm", "LazyLayerNorm", "LazyLayerNorm2d", "LazyRMSNorm"]


class _Lazy(LazyModuleMixin):
    """A layer whose parameters wait for an input, of which ``_take`` says what there is to know."""

    def _wait_for(self: Any, names: tuple[str, ...], device: Any, dtype: Any) -> None:
        for name in names:
            setattr(self, name, UninitializedParameter(device=device, dtype=dtype))  # type: ignore[call-arg]

    def reset_parameters(self: Any) -> None:
        if not self.has_uninitialized_params():
            super().reset_parameters()  # type: ignore[misc]

    def initialize_parameters(self: Any, input: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        shape = self._take(input)
        if self.has_uninitialized_params():
            with torch.no_grad():
                for parameter in self.parameters(recurse=False):
                    if isinstance(parameter, UninitializedParameter):
                        parameter.materialize(shape)
                self.reset_parameters()


class _LazyRows(_Lazy):
    """Of the layers that have a ``normalized_shape``, the last ``ndim`` dimensions of the first input."""

    def _be_lazy(
        self: Any, ndim: int, elementwise_affine: bool, names: tuple[str, ...], device: Any, dtype: Any
    ) -> None:
        if ndim < 1:
            raise ValueError(f"{type(self).__name__}: expected ndim >= 1, got {ndim}")
        self.elementwise_affine = elementwise_affine
        if elementwise_affine:
            self._wait_for(names, device, dtype)

    def _take(self: Any, input: torch.Tensor) -> tuple[int, ...]:
        ndim = len(self.normalized_shape)
        if input.dim() < ndim:
            raise ValueError(
                f"{type(self).__name__}: expected input with at least {ndim} dimensions (ndim), got shape "
                f"{list(input.shape)}"
            )
        self.normalized_shape = tuple(input.shape[-ndim:])
        return self.normalized_shape


class LazyLayerNorm(_LazyRows, LayerNorm):
    """:class:`normops.LayerNorm` that takes ``normalized_shape`` from its first input: the last ``ndim`` dimensions.

    Args:
        ndim: how many dimensions are normalized.
        eps, elementwise_affine, bias, device, dtype, activation, negative_slope, memory_efficient: as of
            :class:`normops.LayerNorm`.

    Raises:
        ValueError: ``ndim`` is below 1, or the first input has fewer dimensions.
    """

    cls_to_become = LayerNorm

    def __init__(
        self,
        ndim: int = 1,
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
            (0,) * ndim,
            eps,
            False,
            activation=activation,
            negative_slope=negative_slope,
            memory_efficient=memory_efficient,
        )
        self._be_lazy(ndim, elementwise_affine, ("weight", "bias")[: 1 + bias], device, dtype)


class LazyRMSNorm(_LazyRows, RMSNorm):
    """:class:`normops.RMSNorm` that takes ``normalized_shape`` from its first input: the last ``ndim`` dimensions.

    Args:
        ndim: how many dimensions are normalized.
        eps, elementwise_affine, device, dtype, activation, negative_slope, memory_efficient: as of
            :class:`normops.RMSNorm`.

    Raises:
        ValueError: ``ndim`` is below 1, or the first input has fewer dimensions.
    """

    cls_to_become = RMSNorm

    def __init__(
        self,
        ndim: int = 1,
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
            (0,) * ndim,
            eps,
            False,
            activation=activation,
            negative_slope=negative_slope,
            memory_efficient=memory_efficient,
        )
        self._be_lazy(ndim, elementwise_affine, ("weight",), device, dtype)


class LazyLayerNorm2d(_Lazy, LayerNorm2d):
    """:class:`normops.LayerNorm2d` that takes ``num_channels`` from its first input.

    Args:
        eps, elementwise_affine, bias, device, dtype, activation, negative_slope, memory_efficient: as of
            :class:`normops.LayerNorm2d`.
    """

    cls_to_become = LayerNorm2d

    def __init__(
        self,
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
            0, eps, False, activation=activation, negative_slope=negative_slope, memory_efficient=memory_efficient
        )
        self.elementwise_affine = elementwise_affine
        if elementwise_affine:
            self._wait_for(("weight", "bias")[: 1 + bias], device, dtype)

    def _take(self, input: torch.Tensor) -> tuple[int, ...]:
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")
        self.normalized_shape = (input.shape[1],)
        return self.normalized_shape


class LazyGroupNorm(_Lazy, GroupNorm):
    """:class:`normops.GroupNorm` that takes ``num_channels`` from its first input.

    Args:
        num_groups: a divisor of the channels.
        eps, affine, device, dtype, activation, negative_slope, memory_efficient: as of
            :class:`normops.GroupNorm`.

    Raises:
        ValueError: ``num_groups`` does not divide the channels of the first input.
    """

    cls_to_become = GroupNorm

    def __init__(
        self,
        num_groups: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(
            num_groups,
            0,
            eps,
            False,
            activation=activation,
            negative_slope=negative_slope,
            memory_efficient=memory_efficient,
        )
        self.affine = affine
        if affine:
            self._wait_for(("weight", "bias"), device, dtype)

    def _take(self, input: torch.Tensor) -> tuple[int, ...]:
        if input.dim() < 2 or input.shape[1] % self.num_groups != 0:
            raise ValueError(
                f"LazyGroupNorm: expected input whose channels are a multiple of {self.num_groups} (num_groups), got "
                f"shape {list(input.shape)}"
            )
        self.num_channels = input.shape[1]
        return (self.num_channels,)
