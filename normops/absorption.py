"""Activations that a norm before them in an ``nn.Sequential`` takes over, for ``convert(model, fuse=True)``."""

import itertools
from collections import Counter
from typing import Any

import torch
from torch import nn

from normops import _activations
from normops.modules._dropin import WithEpilogue

__all__ = ["Absorbed"]

# Hooks see what goes into a layer and what comes out of it, which is then something else.
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Absorbed(nn.Module):
    """What is left of an activation that the norm before it has taken over: it returns its input.

    It is the same object, with another class until :func:`normops.revert`.
    """

    _normops_original: type[nn.Module]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input

    def extra_repr(self) -> str:
        return f"{self._normops_original.__name__}, now in the norm before it"


def absorb(model: nn.Module) -> None:
    """Makes the norms of normops in ``model`` take over the activations that directly follow them."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    pairs = [pair for parent in model.modules() if _calls_in_order(parent) for pair in _neighbours(parent)]
    # An activation that stands in several places has to be absorbed in all of them.
    absorbed = Counter(id(activation) for norm, activation in pairs if _fits(norm, activation, places))
    for norm, activation in pairs:
        if _fits(norm, activation, places) and absorbed[id(activation)] == places[id(activation)]:
            _take(norm, activation)
    for _, activation in pairs:
        if absorbed[id(activation)] == places[id(activation)] and not isinstance(activation, Absorbed):
            activation.__dict__["_normops_original"] = type(activation)
            activation.__class__ = Absorbed


def _calls_in_order(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _neighbours(parent: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    children = [child for child in parent._modules.values() if child is not None]
    return list(itertools.pairwise(children))


def _fits(norm: nn.Module, activation: nn.Module, places: "Counter[int]") -> bool:
    return (
        isinstance(norm, WithEpilogue)
        and type(norm).__module__.startswith("normops.")
        and norm.activation is None
        and places[id(norm)] == 1
        and _activations.of_module(activation) is not None
        and not any(getattr(module, hooks) for module in (norm, activation) for hooks in _HOOKS)
        and not any("forward" in module.__dict__ for module in (norm, activation))
    )


def _take(norm: Any, activation: nn.Module) -> None:
    described = _activations.of_module(activation)
    assert described is not None
    norm.activation, norm.negative_slope = described
    norm.__dict__["_normops_absorbed"] = True


def release(module: nn.Module) -> None:
    """Undoes it for one module."""
    if isinstance(module, Absorbed):
        module.__class__ = module.__dict__.pop("_normops_original")
    elif module.__dict__.pop("_normops_absorbed", False):
        del module.__dict__["activation"]
        del module.__dict__["negative_slope"]
