"""What the layers have in common beside torch's classes."""

import inspect
from typing import Any

import torch
from torch.fx import Proxy

from normops import _activations


class DropIn(torch.nn.Module):
    """A layer of normops, which is printed as one."""

    # Not _get_name, which torch.fx makes the name of a class.
    def __repr__(self) -> str:
        return printed(super().__repr__()) if type(self).__module__.startswith("normops.") else super().__repr__()


_OPTIONS = ("activation", "negative_slope", "memory_efficient")


class WithEpilogue(DropIn):
    """A layer that may end with an activation, and whose backward may start from its output.

    ``activation``, ``negative_slope`` and ``memory_efficient`` are options of the constructor, printed where they are
    not as by default and no part of the ``state_dict``. They are attributes of the class otherwise, so that converted
    and unpickled layers have them.
    """

    activation: str | None = None
    negative_slope: float = _activations.DEFAULT_SLOPE
    memory_efficient: bool = False

    def __init__(
        self,
        *args: Any,
        activation: str | None = None,
        negative_slope: float = _activations.DEFAULT_SLOPE,
        memory_efficient: bool = False,
        **kwargs: Any,
    ) -> None:
        _activations.check(type(self).__name__, activation, negative_slope, memory_efficient)
        super().__init__(*args, **kwargs)
        if activation is not None:
            self.activation = activation
        if negative_slope != _activations.DEFAULT_SLOPE:
            self.negative_slope = negative_slope
        if memory_efficient:
            self.memory_efficient = memory_efficient

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What TorchScript wants to know; what is said of the constructor: the torch layer's arguments, and these."""
        super().__init_subclass__(**kwargs)
        constants = {name for base in cls.__mro__ for name in base.__dict__.get("__constants__", ())}
        cls.__constants__ = sorted(  # type: ignore[attr-defined]
            constants | set(_OPTIONS)
        )
        ours = [base for base in cls.__mro__ if base.__module__.startswith("normops.") and base is not WithEpilogue]
        constructors = [base.__dict__["__init__"] for base in ours if "__init__" in base.__dict__]
        if constructors:
            parameters = list(inspect.signature(constructors[0]).parameters.values())[1:]
        else:
            base = next(base for base in cls.__mro__ if not base.__module__.startswith("normops."))
            own = inspect.signature(WithEpilogue.__init__).parameters
            theirs = [p for p in inspect.signature(base).parameters.values() if p.name not in own]
            parameters = [*theirs, *(own[name] for name in _OPTIONS)]
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        options = [super().extra_repr()]
        if self.activation is not None:
            options.append(f"activation={self.activation!r}")
        if self.negative_slope != _activations.DEFAULT_SLOPE:
            options.append(f"negative_slope={self.negative_slope}")
        if self.memory_efficient:
            options.append("memory_efficient=True")
        return ", ".join(filter(None, options))


def printed(layer: str) -> str:
    """How a layer whose class has another's name is told from it."""
    return f"normops.{layer}"


def trace(module: torch.nn.Module, input: Any, residual: Any = None, mask: Any = None) -> Any:
    """What ``module`` returns for an input that is no tensor: under ``torch.fx.symbolic_trace``, which takes layers for
    leaves, the node of the graph that calls it.

    The module that is itself being traced cannot call itself: it shows the inside of the torch layer it stands for,
    which also knows what to say of an input that is neither. It does so without a residual and a mask, as these are
    ``None`` unless they are given.
    """
    tracer: Any = input.tracer if isinstance(input, Proxy) else None
    if tracer and tracer.root is not module:
        given = {name: value for name, value in (("residual", residual), ("mask", mask)) if value is not None}
        args = (input,) if "mask" in given else (input, *given.values())
        return tracer.create_proxy("call_module", tracer.path_of_module(module), args, given if "mask" in given else {})
    base: Any = next(base for base in type(module).__mro__ if base.__module__.startswith("torch.nn."))
    output = base.forward(module, input)
    if isinstance(module, WithEpilogue):
        output = _activations.apply(output, module.activation, module.negative_slope)
    return output
