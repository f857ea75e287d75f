"""The layers under ``torch.fx.symbolic_trace``: leaves of the graph, as torch's own layers are."""

from torch.fx import Proxy


def trace(module, input):
    """What ``module`` returns for an input that is no tensor: the node of the graph that calls it.

    The module that is itself being traced cannot call itself: it shows the inside of the torch layer it stands for,
    which also knows what to say of an input that is neither.
    """
    if isinstance(input, Proxy) and input.tracer.root is not module:
        return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), (input,), {})
    base = next(base for base in type(module).__mro__ if base.__module__.startswith("torch.nn."))
    return base.forward(module, input)
