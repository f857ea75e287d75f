"""What the nodes of Dynamo's graphs are: norms, additions, activations; what they write to, where they come from."""

import inspect
import operator
import re
from typing import Any

import torch
import torch.nn.functional as TF
from torch.fx import Node

from normops import _activations

_OPS = torch.ops.normops
_NAMES = {
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}
_NORMS: dict[Any, str] = {
    **{getattr(TF, name): name for name in _NAMES},
    **{getattr(getattr(_OPS, name), overload): name for name in _NAMES for overload in ("default", "fused")},
    **{getattr(torch, name): name for name in ("group_norm", "layer_norm", "rms_norm")},
}


def norm_name(node: Any) -> str:
    """The function that a node calls, if that is a norm without an epilogue, and without a mask, which would be applied
    to what is taken over."""
    if not isinstance(node, Node) or node.op != "call_function" or node.target not in _NORMS:
        return ""
    name = _NORMS[node.target]
    others = {"activation", "residual", "mask"} | ({"bias"} if name == "rms_norm" else set())
    return "" if node.kwargs.keys() & others else name


def norm_arguments(node: Node) -> dict[str, Any]:
    """Its arguments by name, without torch's cudnn_enabled."""
    names = _NAMES[_NORMS[node.target]]
    return dict(zip(names, node.args, strict=False)) | {
        k: v for k, v in node.kwargs.items() if k in (*names, "weight_offset")
    }


def is_torchs(node: Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload)


def _named(name: str):
    return lambda arguments: {"activation": name}


def _leaky(arguments):
    slope = arguments.get("negative_slope", 0.01)
    return {"activation": "leaky_relu", "negative_slope": slope} if isinstance(slope, (int, float)) else {}


def _elu(arguments):
    return {"activation": "elu"} if arguments.get("alpha", 1.0) == 1.0 else {}


def _hardtanh(arguments):
    bounds = arguments.get("min_val", -1.0), arguments.get("max_val", 1.0)
    return {"activation": "relu6"} if bounds == (0.0, 6.0) else {}


def _gelu(arguments):
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    return {"activation": names[arguments.get("approximate", "none")]}


# How the functions are called, in the order of their arguments.
_ACTIVATIONS: dict[Any, tuple[tuple[str, ...], Any]] = {
    **{function: (("input", "inplace"), _named(name)) for name, function in _activations.FUNCTIONS.items()},
    **{f: (("input", "inplace"), _named("relu")) for f in (TF.relu, TF.relu_, torch.relu, torch.relu_)},
    **dict.fromkeys((TF.hardtanh, TF.hardtanh_), (("input", "min_val", "max_val", "inplace"), _hardtanh)),
    **dict.fromkeys((TF.leaky_relu, TF.leaky_relu_), (("input", "negative_slope", "inplace"), _leaky)),
    **dict.fromkeys((TF.elu, TF.elu_), (("input", "alpha", "inplace"), _elu)),
    TF.gelu: (("input",), _gelu),
    "relu": (("input",), _named("relu")),
    "relu_": (("input",), _named("relu")),
}


def _is_call(node: Any) -> bool:
    return isinstance(node, Node) and node.op in ("call_function", "call_method")


def activation_of(node: Node) -> dict[str, Any]:
    """What the norm before it is to be told, if a node calls an activation that is known."""
    if not _is_call(node) or node.target not in _ACTIVATIONS:
        return {}
    names, describe = _ACTIVATIONS[node.target]
    return describe(dict(zip(names, node.args, strict=False)) | node.kwargs)


def activation_name(node: Node) -> str:
    return activation_of(node).get("activation", "")


_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def summands(node: Any) -> tuple[Node, ...]:
    """The two nodes that a node adds; nothing of another node, of numbers, or with a factor."""
    if not _is_call(node) or node.target not in _ADDITIONS or node.kwargs or len(node.args) != 2:
        return ()
    tensors = all(isinstance(arg, Node) and isinstance(value_of(arg), torch.Tensor) for arg in node.args)
    return tuple(node.args) if tensors else ()


def is_written(addition: Node) -> bool:
    """Whether the sum replaces the first summand."""
    return addition.target in (operator.iadd, "add_")


def value_of(node: Any) -> Any:
    """An example of what a node returns."""
    if not isinstance(node, Node):
        return None
    return node.meta.get("example_value", node.meta.get("val"))


def target_name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


_IN_PLACE = {getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "setitem")}


def written(node: Node) -> list[Node]:
    """The nodes whose values a node changes."""
    if norm_name(node) in ("batch_norm", "instance_norm"):
        changed = [norm_arguments(node).get(name) for name in ("running_mean", "running_var")]
    elif isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        changed = [
            value
            for argument, value in zip(arguments, node.args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    elif _is_call(node) and node.args and _changes_first(node):
        changed = [node.args[0]]
    else:
        changed = []
    changed.append(node.kwargs.get("out"))
    return [value for value in changed if isinstance(value, Node)]


def _changes_first(node: Node) -> bool:
    name = target_name(node)
    if node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        return True
    if node.target in _ACTIVATIONS:
        names = _ACTIVATIONS[node.target][0]
        return bool((dict(zip(names, node.args, strict=False)) | node.kwargs).get("inplace", False))
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return bool(node.kwargs.get("inplace", False))
    return bool(bound.arguments.get("inplace", False))


_VIEWS = re.compile(
    "chunk|contiguous|detach|diagonal|expand|expand_as|flatten|getitem|movedim|narrow|permute|ravel|reshape|select|split|"
    "squeeze|swapaxes|t|to|transpose|type|unbind|unflatten|unfold|unsqueeze|view|view_as|float|half|bfloat16|double"
)


def root(node: Node) -> Node:
    """The node whose memory a node's value may lie in."""
    while _is_call(node) and node.args and isinstance(node.args[0], Node):
        if not _VIEWS.fullmatch(target_name(node)) and node.args[0] not in written(node):
            break
        node = node.args[0]
    return node


def changes_mode(node: Node) -> bool:
    """Whether what follows is computed under other rules: of autograd, of autocast."""
    return node.op == "call_function" and bool(
        re.search(r"_set_grad_enabled|_enter_autocast|_exit_autocast|inference_mode|set_.*hooks", target_name(node))
    )


def where(node: Node) -> str:
    """The module that called a function, as in ``named_modules``; or the node's own name."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return node.name
    path = re.sub(r"^L\['\w+'\]\.?", "", stack[-1][0])
    path = re.sub(r"_modules\['(\w+)'\]|\[['\"]?(\w+)['\"]?\]", lambda m: f".{m[1] or m[2]}", path)
    return re.sub(r"\.+", ".", path.replace("_modules.", "")).strip(".") or node.name
