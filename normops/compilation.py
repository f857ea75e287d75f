"""What torch.compile and torch.export make of the layers: calls of the kernels, or operations the compiler can fuse."""

from typing import Any, Literal

import torch

from normops import _activations

__all__ = ["set_compile_mode"]

_MODES = ("auto", "kernel", "decompose")
current = "auto"  # the mode, a global, which torch.compile guards: code compiled in another mode is not run


class set_compile_mode:
    """Chooses what ``torch.compile`` and ``torch.export`` see of the layers and functions of normops.

    - ``"auto"``, the default: for each layer what was faster in training steps and in inference of compiled models.
      ``batch_norm`` is left to the compiler, as its second half goes into whatever follows it, and without
      statistics to take it is nothing else; so is ``instance_norm`` where gradients are recorded. The others are
      kernels: between matrix products, or with an activation behind them, fusing gained no more than the kernel did;
      and so is everything with ``memory_efficient=True``.
      An exported program has kernels only.
    - ``"kernel"``: one operator per layer, computed by the kernels as without a compiler.
    - ``"decompose"``: the operations of torch's own function, in the type of the arithmetic (float32, or float64 for
      float64), which Inductor fuses with what comes before and after. An exported program then holds no operators of
      normops, runs without it and can be written as ONNX. The memory format of the result is the compiler's affair.

    The setting is global and works like ``torch.set_grad_enabled``: as a call, or for the length of a block::

        normops.set_compile_mode("decompose")
        with normops.set_compile_mode("decompose"):
            program = torch.export.export(model, args)

    It is read when code is compiled. What was compiled in another mode is compiled again when it is next called.
    Outside of a compiler it changes nothing, and calls of ``torch.ops.normops`` are kernels in any mode.

    Raises:
        ValueError: another mode.
    """

    def __init__(self, mode: Literal["auto", "kernel", "decompose"]) -> None:
        if mode not in _MODES:
            raise ValueError(f"expected mode to be one of {', '.join(map(repr, _MODES))}, got {mode!r}")
        self._mode, self._before = mode, current
        _set(mode)

    def __enter__(self) -> None:
        _set(self._mode)

    def __exit__(self, *exception: object) -> None:
        _set(self._before)


def _set(mode: str) -> None:
    global current
    current = mode


def decomposes(name: str, memory_efficient: bool = False) -> bool:
    """Whether the function of this name, which a compiler is looking at, is torch's own to it.

    Torch's knows no ``memory_efficient``, which the backend "normops" keeps."""
    # What torch.compiler.is_exporting() returns; to the Dynamo of torch 2.11 that is always true.
    if current == "auto" and not torch.compiler._is_exporting_flag:
        left = name == "batch_norm" or (name == "instance_norm" and torch.is_grad_enabled())
        return left and not memory_efficient
    return current == "decompose"


def _as(dtype: torch.dtype, argument: Any) -> Any:
    """A conversion that changes nothing would stand in the graph, between what could be fused."""
    if isinstance(argument, torch.Tensor) and argument.dtype != dtype:
        return argument.to(dtype)
    return argument


def decomposed(
    name: str,
    input: torch.Tensor,
    *args: Any,
    activation: str | None = None,
    negative_slope: float = _activations.DEFAULT_SLOPE,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    memory_efficient: bool = False,
) -> Any:
    """``torch.nn.functional.<name>`` for the dtypes that normops takes: all in the type of the arithmetic."""
    if name in ("add_layer_norm", "add_rms_norm"):
        total = input + args[0]
        norm = "layer_norm" if name == "add_layer_norm" else "rms_norm"
        return decomposed(norm, total, *args[1:], weight_offset=weight_offset), total
    _activations.check(name, activation, negative_slope, memory_efficient, residual)
    arithmetic = torch.promote_types(input.dtype, torch.float32)
    converted = [_as(arithmetic, arg) for arg in args]
    if weight_offset and len(converted) > 1 and converted[1] is not None:  # the weight
        converted[1] = converted[1] + weight_offset
    output = getattr(torch.nn.functional, name)(_as(arithmetic, input), *converted)
    if residual is not None:
        output = output + _as(arithmetic, residual)
    output = _activations.apply(output, activation, negative_slope)
    if name in ("batch_norm", "instance_norm"):
        *running, _, _, use_input_stats = zip(args[:5], converted[:5], strict=True)
        for statistic, moved in running:
            if use_input_stats[0] and moved is not statistic:
                statistic.copy_(moved)
    return _as(input.dtype, output)
