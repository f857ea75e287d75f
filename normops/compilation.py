"""What torch.compile and torch.export make of the layers: calls of the kernels, or operations the compiler can fuse."""

from typing import Any, Literal

import torch

from normops import _activations

__all__ = ["set_compile_mode"]

_MODES = ("auto", "kernel", "decompose")
# What is left to the compiler in mode "auto", with gradients and without.
_FUSED = {True: {"batch_norm", "instance_norm", "group_norm"}, False: {"batch_norm", "rms_norm"}}
current = "auto"  # the mode, a global, which torch.compile guards: code compiled in another mode is not run


class set_compile_mode:
    """Chooses what ``torch.compile`` and ``torch.export`` see of the layers and functions of normops.

    - ``"auto"``, the default: for each layer what was faster in training steps and in inference of compiled models.
      ``batch_norm`` is left to the compiler, as its second half goes into whatever follows it, and without
      statistics to take it is nothing else; so are ``instance_norm`` and ``group_norm`` where gradients are recorded,
      and ``rms_norm`` where they are not: to decode a token takes many small calls. The others are kernels: between
      matrix products, or with an activation behind them, fusing gained no more than the kernel did; and so is
      everything with ``memory_efficient=True``.
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


def decomposes(name: str, no_counterpart: bool = False) -> bool:
    """Whether the function of this name, which a compiler is looking at, is torch's own to it.

    Torch's knows no mask, and what stands for one is slower than the kernel; nor ``memory_efficient``, which the
    backend "normops" keeps: a call with one of these has ``no_counterpart``."""
    # What torch.compiler.is_exporting() returns; to the Dynamo of torch 2.11 that is always true.
    if current == "auto" and not torch.compiler._is_exporting_flag:
        return name in _FUSED[torch.is_grad_enabled()] and not no_counterpart
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
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> Any:
    """``torch.nn.functional.<name>`` for the dtypes that normops takes: all in the type of the arithmetic."""
    if name in ("add_layer_norm", "add_rms_norm"):
        total = input + args[0]
        norm = "layer_norm" if name == "add_layer_norm" else "rms_norm"
        return decomposed(norm, total, *args[1:], weight_offset=weight_offset), total
    if name in ("channel_layer_norm", "channel_rms_norm"):
        moved = None if residual is None else residual.movedim(1, -1)
        options: dict[str, Any] = {
            "activation": activation,
            "negative_slope": negative_slope,
            "weight_offset": weight_offset,
        }
        moved_input, shape = input.movedim(1, -1), (input.shape[1],)
        output = decomposed(
            "layer_norm" if name == "channel_layer_norm" else "rms_norm",
            moved_input,
            shape,
            *args,
            residual=moved,
            bias=bias,
            **options,
        )
        return output.movedim(-1, 1)
    _activations.check(name, activation, negative_slope, memory_efficient, residual)
    arithmetic = torch.promote_types(input.dtype, torch.float32)
    converted = [_as(arithmetic, arg) for arg in args]
    if weight_offset and len(converted) > 1 and converted[1] is not None:  # the weight
        converted[1] = converted[1] + weight_offset
    after: list[Any] = []  # what torch's functions do not take
    if name in ("layer_norm", "rms_norm"):
        rows, weight = len(args[0]), converted[1]
        own_bias = converted[2] if name == "layer_norm" else bias
        if bias is not None or any(p is not None and p.dim() > rows for p in (weight, own_bias)):
            after, converted[1] = [weight, _as(arithmetic, own_bias)], None
            if name == "layer_norm":
                converted[2] = None
    else:
        first = 1 if name == "group_norm" else 2
        if any(p is not None and p.dim() > 1 for p in converted[first : first + 2]):
            for p in converted[first : first + 2]:
                after.append(p if p is None else p.reshape(-1, p.shape[-1], *[1] * (input.dim() - 2)))
            converted[first : first + 2] = None, None
    if mask is None:
        output = getattr(torch.nn.functional, name)(_as(arithmetic, input), *converted)
    else:
        output = _masked(name, _as(arithmetic, input), mask, *converted)
    if after:
        weight, own_bias = after
        output = output if weight is None else output * weight
        output = output if own_bias is None else output + own_bias
    if residual is not None:
        output = output + _as(arithmetic, residual)
    output = _activations.apply(output, activation, negative_slope)
    if mask is not None:
        output = output.masked_fill(_masked_positions(input, mask), 0)
    if name in ("batch_norm", "instance_norm"):
        *running, _, _, use_input_stats = zip(args[:5], converted[:5], strict=True)
        for statistic, moved in running:
            if use_input_stats[0] and moved is not statistic:
                statistic.copy_(moved)
    return _as(input.dtype, output)


def _masked_positions(input: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As a mask of the input, with one channel."""
    return mask.expand(input.shape[0], *input.shape[2:]).unsqueeze(1).logical_not()


def _masked(name: str, input: torch.Tensor, mask: torch.Tensor, *args: Any) -> torch.Tensor:
    """The channel layers with a mask in torch's operations; what they return at masked positions is finite."""
    running: list[Any]
    if name == "group_norm":
        groups, weight, bias, eps = args
        running, given, momentum = [None, None], False, 0.0
    else:
        *running, weight, bias, use_input_stats, momentum, eps = args
        groups, given = input.shape[1], not use_input_stats
    over_batch = given or name == "batch_norm"
    masked = _masked_positions(input, mask)
    x = input.masked_fill(masked, 0)
    shape = (1, -1, *[1] * (input.dim() - 2))
    if given:
        mean, var = (statistic.view(shape) for statistic in running)
        y = (x - mean) * (var + eps).rsqrt()
    else:
        x = x.reshape(input.shape[0], groups, input.shape[1] // groups, -1)
        positions = masked.reshape(input.shape[0], 1, 1, -1)
        dims = (0, 2, 3) if over_batch else (2, 3)
        count = positions.logical_not().expand(-1, -1, x.shape[2], -1).sum(dims, keepdim=True)
        mean = x.sum(dims, keepdim=True) / count.clamp_min(1)
        x = (x - mean).masked_fill(positions, 0)
        var = x.square().sum(dims, keepdim=True) / count.clamp_min(1)
        y = (x * (var + eps).rsqrt()).reshape(input.shape)
        if running[0] is not None:
            _move(running, (mean, var), momentum, count)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _move(running: Any, statistics: Any, momentum: float, count: torch.Tensor) -> None:
    """The running statistics, by the average of those that are of something."""
    there = (count > 0).to(statistics[0].dtype)
    share = there / there.sum().clamp_min(1)
    correction = count / (count - 1).clamp_min(1)
    moved = there.sum() > 0
    for target, statistic, factor in zip(running, statistics, (share, share * correction), strict=True):
        value = (statistic.detach() * factor).sum((0, 2, 3))
        target.copy_(torch.where(moved, (1 - momentum) * target + momentum * value, target))
