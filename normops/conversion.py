"""Turns the normalization layers of a model into normops layers, and back."""

import torch

from normops import lookalikes, modules, registry  # noqa: F401  (lookalikes fills the registry)

__all__ = ["convert", "revert"]

_TO_NORMOPS = {getattr(torch.nn, name): getattr(modules, name) for name in modules.__all__ if hasattr(torch.nn, name)}
_TO_TORCH = {ours: theirs for theirs, ours in _TO_NORMOPS.items()}


def _exchange(model, replacement):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    # All are found before the first is changed: an error leaves the model as it was.
    classes = [(module, replacement(module)) for module in model.modules()]
    for module, cls in classes:
        if cls is not None:
            module.__class__ = cls
    return model


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Makes every layer of ``model`` that normops has a drop-in for use the kernels of normops.

    The modules stay the same objects: only their class changes. Parameters, buffers, hooks, names, the training flag
    and references held elsewhere (optimizers, ``state_dict`` keys) are untouched. Layers are recognised by their exact
    type (``torch.nn.BatchNorm2d``, ``torch.nn.LayerNorm``, ...); subclasses, which may compute something else, are left
    alone, as is everything else in the model. ``model`` may be a single layer.

    Layers of other libraries that are known to compute the same (:mod:`normops.lookalikes`), and those of classes given
    to :func:`register_conversion`, are converted after a test that they do.

    Returns ``model``. Undo with :func:`revert`.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: a layer does not compute what was registered for its class; the model is left as it was.
    """
    return _exchange(model, lambda module: _TO_NORMOPS.get(type(module)) or registry.replacement_class(module))


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """Undoes :func:`convert`: every normops layer of ``model`` becomes the layer it stands for.

    Returns ``model``.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    return _exchange(model, lambda module: _TO_TORCH.get(type(module)) or registry.original_class(type(module)))
