"""The activations by name, as torch has them. Their formulas are in csrc/activation.h."""

from collections.abc import Callable

import torch
import torch.nn.functional as TF
from torch import Tensor

# What computes the same in torch: for compilers that are to see torch's operations, and what a layer may take over.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": TF.relu,
    "relu6": TF.relu6,
    "leaky_relu": TF.leaky_relu,
    "elu": TF.elu,
    "silu": TF.silu,
    "gelu": TF.gelu,
    "gelu_tanh": lambda z: TF.gelu(z, approximate="tanh"),
    "hardswish": TF.hardswish,
    "mish": TF.mish,
}

DEFAULT_SLOPE = 0.01


def apply(z: Tensor, activation: str | None, negative_slope: float) -> Tensor:
    """The activation in torch's operations."""
    if activation is None:
        return z
    if activation == "leaky_relu":
        return TF.leaky_relu(z, negative_slope)
    return FUNCTIONS[activation](z)


def is_invertible(
    activation: str | None = None, negative_slope: float = DEFAULT_SLOPE, residual: object = None
) -> bool:
    """Whether the backward may start from the output."""
    return residual is None and (activation in (None, "elu") or (activation == "leaky_relu" and negative_slope > 0))


def check(
    op: str,
    activation: str | None,
    negative_slope: float,
    memory_efficient: bool = False,
    residual: Tensor | None = None,
) -> None:
    """Raises what the operators raise."""
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f"{op}: expected activation of type str or None, got {type(activation).__name__}")
    if activation is not None and activation not in FUNCTIONS:
        known = ", ".join(map(repr, FUNCTIONS))
        raise ValueError(f"{op}: expected activation to be None or one of {known}, got {activation!r}")
    if negative_slope != DEFAULT_SLOPE and activation != "leaky_relu":
        behind = f"with {activation!r}" if activation else "without an activation"
        raise ValueError(
            f"{op}: expected negative_slope only with activation='leaky_relu', got {negative_slope:g} {behind}"
        )
    if not memory_efficient:
        return
    if activation not in (None, "leaky_relu", "elu"):
        raise ValueError(
            f"{op}: expected activation to be None, 'leaky_relu' or 'elu', which can be inverted, with "
            f"memory_efficient=True, got {activation!r}"
        )
    if activation == "leaky_relu" and negative_slope <= 0:
        raise ValueError(f"{op}: expected negative_slope > 0 with memory_efficient=True, got {negative_slope:g}")
    if residual is not None:
        raise ValueError(f"{op}: expected no residual with memory_efficient=True, got one")


def of_module(module: torch.nn.Module) -> tuple[str, float] | None:
    """Name and slope of what an activation module of torch computes; None of one that has no name here."""
    return _MODULES[type(module)](module) if type(module) in _MODULES else None


def _named(name, **attributes):
    def describe(module):
        return (name, DEFAULT_SLOPE) if all(getattr(module, k) == v for k, v in attributes.items()) else None

    return describe


_MODULES = {
    torch.nn.ReLU: _named("relu"),
    torch.nn.ReLU6: _named("relu6"),
    torch.nn.LeakyReLU: lambda module: ("leaky_relu", module.negative_slope),
    torch.nn.ELU: _named("elu", alpha=1.0),
    torch.nn.SiLU: _named("silu"),
    torch.nn.GELU: lambda module: ({"none": "gelu", "tanh": "gelu_tanh"}[module.approximate], DEFAULT_SLOPE),
    torch.nn.Hardswish: _named("hardswish"),
    torch.nn.Mish: _named("mish"),
}
