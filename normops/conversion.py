"""Turns the normalization layers of a model into normops layers, and back, and says which are."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from normops import _activations, absorption, lookalikes, modules, registry  # noqa: F401  (lookalikes fills the registry)
from normops.modules._dropin import DropIn, WithEpilogue
from normops.report import Layer, Summary

__all__ = ["convert", "revert", "summary"]

_Model = TypeVar("_Model", bound=torch.nn.Module)
_Class = type[torch.nn.Module]

_TO_NORMOPS: dict[_Class, _Class] = {
    getattr(torch.nn, name): getattr(modules, name) for name in modules.__all__ if hasattr(torch.nn, name)
}
_TO_TORCH = {ours: theirs for theirs, ours in _TO_NORMOPS.items()}
# Torch's own layers and the bases of the others.
_NORMS = (
    *_TO_NORMOPS,
    torch.nn.modules.batchnorm._NormBase,
    torch.nn.LocalResponseNorm,
    torch.nn.CrossMapLRN2d,
)


def _check_is_module(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")


def _exchange(model: torch.nn.Module, replacement: Callable[[torch.nn.Module], _Class | None]) -> None:
    _check_is_module(model)
    # All are found before the first is changed: an error leaves the model as it was.
    classes = [(module, replacement(module)) for module in model.modules()]
    for module, cls in classes:
        if cls is not None:
            module.__class__ = cls


def _drop_in(module: torch.nn.Module) -> _Class | None:
    return _TO_NORMOPS.get(type(module)) or registry.replacement_class(module)


def convert(model: _Model, *, fuse: bool = False, memory_efficient: bool = False, verbose: bool = False) -> _Model:
    """Makes every layer of ``model`` that normops has a drop-in for use the kernels of normops.

    The modules stay the same objects: only their class changes. Parameters, buffers, hooks, names, the training flag
    and references held elsewhere (optimizers, ``state_dict`` keys) are untouched. Layers are recognised by their exact
    type (``torch.nn.BatchNorm2d``, ``torch.nn.LayerNorm``, ...); subclasses, which may compute something else, are left
    alone, as is everything else in the model. ``model`` may be a single layer.

    Layers of other libraries that are known to compute the same (:mod:`normops.lookalikes`), and those of classes given
    to :func:`register_conversion`, are converted after a test that they do.

    With ``fuse=True`` a norm also takes over an activation (``torch.nn.ReLU``, ``ReLU6``, ``LeakyReLU``, ``ELU``,
    ``SiLU``, ``GELU``, ``Hardswish``, ``Mish``) that directly follows it in a ``torch.nn.Sequential`` or in a subclass
    with the same forward, and computes both in one pass. The activation becomes an identity that remembers what it
    was; the keys of the ``state_dict`` stay. A norm that stands in several places, an activation of which some places
    do not follow a norm, and modules with hooks, which would see something else, are left. For what is not written as
    a Sequential: ``torch.compile(model, backend="normops")``.

    With ``memory_efficient=True`` the layers of torch's classes whose activation, if they have taken one over, can be
    inverted (``LeakyReLU``, ``ELU``) start their backward from the output and do not keep their input: it pays where
    the next layer keeps that output, as a convolution does. An output that is changed in place, as by
    ``torch.nn.ReLU(inplace=True)``, is an error in the backward then; with ``torch.compile(model, backend="normops")``
    such activations become a part of the norm.

    Returns ``model``. Undo with :func:`revert`.

    Args:
        model: the model, which is changed in place.
        fuse: let norms take over the activations behind them.
        memory_efficient: do not keep the inputs of norms where the outputs will do (:mod:`normops.functional`).
        verbose: print the :func:`summary` of the converted model.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: a layer does not compute what was registered for its class; the model is left as it was.

    Warns if there is no normalization layer in ``model`` at all.
    """
    _exchange(model, _drop_in)
    if fuse:
        absorption.absorb(model)
    if memory_efficient:
        for module in model.modules():
            _save_memory(module)
    if not any(map(_is_norm, model.modules())):
        warnings.warn(
            f"convert: expected a model with normalization layers, found none in {type(model).__name__}", stacklevel=2
        )
    if verbose:
        print(summary(model))
    return model


def _save_memory(module: torch.nn.Module) -> None:
    if type(module) not in _TO_TORCH or not isinstance(module, WithEpilogue) or module.memory_efficient:
        return
    if _activations.is_invertible(module.activation, module.negative_slope):
        module.memory_efficient = True
        module.__dict__["_normops_saves_memory"] = True


def revert(model: _Model) -> _Model:
    """Undoes :func:`convert`: every normops layer of ``model`` becomes the layer it stands for, and every activation
    that it took over is one again. A layer that was made with ``activation=`` stands for none of torch's, and stays.

    Returns ``model``.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    _check_is_module(model)
    for module in model.modules():
        absorption.release(module)
        if module.__dict__.pop("_normops_saves_memory", False):
            del module.__dict__["memory_efficient"]
    _exchange(model, _original)
    return model


def _original(module: torch.nn.Module) -> _Class | None:
    if isinstance(module, WithEpilogue) and module.activation is not None:
        return None
    return _TO_TORCH.get(type(module)) or registry.original_class(type(module))


def summary(model: torch.nn.Module) -> Summary:
    """Says which normalization layers of ``model`` run on normops, which do not, and why.

    Normalization layers are those of torch and of normops, their subclasses, those of registered classes, and modules
    without submodules that have ``Norm`` in the name of their class. ::

        >>> print(normops.summary(model))
        Net: 21 of 22 normalization layers run on normops
          converted  20 x normops.BatchNorm2d: stem.1, body.0.bn1, body.0.bn2, ..., body.9.bn2
          converted  1 x normops.LayerNorm: head.norm
          left       1 x net.FrozenBatchNorm2d: neck.norm (not known to normops: see normops.register_conversion)

    Returns a :class:`normops.report.Summary`, which can be printed and iterated over: each
    :class:`normops.report.Layer` has ``name``, ``cls`` and ``why_left``. Nothing is converted by this.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    _check_is_module(model)
    layers = [Layer(name, type(m), _why_left(m)) for name, m in model.named_modules() if _is_norm(m)]
    return Summary(type(model).__name__, tuple(layers))


def _is_converted(module: torch.nn.Module) -> bool:
    return isinstance(module, DropIn) or registry.original_class(type(module)) is not None


def _is_norm(module: torch.nn.Module) -> bool:
    if _is_converted(module) or isinstance(module, _NORMS) or registry.is_known(type(module)):
        return True
    cls = type(module)
    # A container is not a layer, and torch's weight norm not a normalization of activations.
    return "Norm" in cls.__name__ and not module._modules and not cls.__module__.startswith("torch.nn.utils.")


def _why_left(module: torch.nn.Module) -> str:
    if _is_converted(module):
        return ""
    try:
        if _drop_in(module) is not None:
            return "normops.convert has not been called on it"
    except ValueError:
        pass  # a forward that does not fit, of which the registry says more
    if registry.is_known(type(module)):
        return registry.why_left(module)
    if isinstance(module, tuple(_TO_NORMOPS)):
        return "a subclass, which may compute something else: see normops.register_conversion"
    return "not known to normops: see normops.register_conversion"
