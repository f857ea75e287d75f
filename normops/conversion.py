"""Turns the normalization layers of a model into normops layers, and back."""

from collections.abc import Mapping

import torch

from normops import modules

__all__ = ["convert", "revert"]

_TO_NORMOPS = {getattr(torch.nn, name): getattr(modules, name) for name in modules.__all__ if hasattr(torch.nn, name)}
_TO_TORCH = {ours: theirs for theirs, ours in _TO_NORMOPS.items()}


def _exchange(model: torch.nn.Module, classes: Mapping[type, type]) -> torch.nn.Module:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        # Exact types only: a subclass may have a forward of its own.
        replacement = classes.get(type(module))
        if replacement is not None:
            module.__class__ = replacement
    return model


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Makes every layer of ``model`` that normops has a drop-in for use the kernels of normops.

    The modules stay the same objects: only their class changes. Parameters, buffers, hooks, names, the training flag
    and references held elsewhere (optimizers, ``state_dict`` keys) are untouched. Layers are recognised by their exact
    type (``torch.nn.BatchNorm2d``, ``torch.nn.LayerNorm``, ...); subclasses, which may compute something else, are left
    alone, as is everything else in the model. ``model`` may be a single layer.

    Returns ``model``. Undo with :func:`revert`.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    return _exchange(model, _TO_NORMOPS)


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """Undoes :func:`convert`: every normops layer of ``model`` becomes the torch layer it stands for.

    Returns ``model``.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    return _exchange(model, _TO_TORCH)
