"""What the layers have in common beside torch's classes."""

from typing import Any

import torch
from torch.fx import Proxy


class DropIn(torch.nn.Module):
    """A layer of normops, which is printed as one."""

    # Not _get_name, which torch.fx makes the name of a class.
    def __repr__(self) -> str:
        return printed(super().__repr__()) if type(self).__module__.startswith("normops.") else super().__repr__()


def printed(layer: str) -> str:
    """How a layer whose class has another's name is told from it."""
    return f"normops.{layer}"


def trace(module: torch.nn.Module, input: Any) -> Any:
    """What ``module`` returns for an input that is no tensor: under ``torch.fx.symbolic_trace``, which takes layers for
    leaves, the node of the graph that calls it.

    The module that is itself being traced cannot call itself: it shows the inside of the torch layer it stands for,
    which also knows what to say of an input that is neither.
    """
    tracer: Any = input.tracer if isinstance(input, Proxy) else None
    if tracer and tracer.root is not module:
        return tracer.create_proxy("call_module", tracer.path_of_module(module), (input,), {})
    base: Any = next(base for base in type(module).__mro__ if base.__module__.startswith("torch.nn."))
    return base.forward(module, input)
