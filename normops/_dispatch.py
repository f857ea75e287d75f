"""How a function calls its operator: which overload, what compilers see instead, nested tensors, and errors of the type
that torch's functions raise."""

import functools
import re
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from normops import _activations, _ops, compilation, nested

# The overloads that take more than torch's functions do, of the operators that have one.
_FUSED = {
    packet.default: packet.fused
    for packet in (
        torch.ops.normops.batch_norm,
        torch.ops.normops.channel_layer_norm,
        torch.ops.normops.channel_rms_norm,
        torch.ops.normops.group_norm,
        torch.ops.normops.instance_norm,
        torch.ops.normops.layer_norm,
        torch.ops.normops.rms_norm,
    )
}

# The operators as functions of C++, which take all arguments and extras by position. What is out of the ordinary they
# leave to `call`: then they return NotImplemented (csrc/python_calls.cpp).
direct = _ops._C

# Torch's own functions raise TypeError for an argument of the wrong type, and in one line.
_WRONG_TYPE = re.compile(r"Expected a value of type '(.+?)' for argument '(.+?)'")


def call(op: Any, *args: Any, **extras: Any) -> Any:
    if torch.compiler.is_compiling():
        if args[0].is_nested:
            return nested.run(op._opname, functools.partial(call, op), *args, **extras)
        if compilation.decomposes(op._opname, "memory_efficient" in extras or "mask" in extras):
            return compilation.decomposed(op._opname, *args, **extras)
    try:
        return (_FUSED.get(op, op) if extras else op)(*args, **extras)
    except RuntimeError as error:
        # Looked for here, where it costs other inputs nothing: operators take no nested ones.
        if isinstance(args[0], Tensor) and args[0].is_nested:
            return nested.run(op._opname, functools.partial(call, op), *args, **extras)
        if wrong := _WRONG_TYPE.search(str(error)):
            raise TypeError(_type_message(op, args, extras, *wrong.groups())) from None
        raise


def extras(
    activation: str | None,
    negative_slope: float,
    residual: Tensor | None,
    weight_offset: float = 0.0,
    memory_efficient: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, Any]:
    """What is not as it is by default."""
    given: dict[str, Any] = {}
    if activation is not None:
        given["activation"] = activation
    if negative_slope != _activations.DEFAULT_SLOPE:
        given["negative_slope"] = negative_slope
    if residual is not None:
        given["residual"] = residual
    if weight_offset != 0.0:
        given["weight_offset"] = weight_offset
    if memory_efficient:
        given["memory_efficient"] = memory_efficient
    if mask is not None:
        given["mask"] = mask
    if bias is not None:
        given["bias"] = bias
    return given


def _type_message(op: Any, args: tuple[Any, ...], extras: dict[str, Any], wanted: str, name: str) -> str:
    value = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | extras
    value = value[name]
    got = type(value).__name__
    if isinstance(value, (tuple, list)):
        got += " of " + (", ".join(sorted({type(item).__name__ for item in value})) or "nothing")
    wanted = re.sub(r"Optional\[(.+)\]", r"\1 or None", wanted).replace("List[int]", "tuple of ints")
    return f"{op._opname}: expected {name} of type {wanted}, got {got}"


def check_is_shape(op: str, normalized_shape: object) -> None:
    """The operators take anything that can be iterated; torch's functions take tuples and lists."""
    if not has_torch_function((normalized_shape,)):
        raise TypeError(
            f"{op}: expected normalized_shape to be a tuple or list of ints, got {type(normalized_shape).__name__}"
        )
